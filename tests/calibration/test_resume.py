"""Calibrations that were interrupted go on where they stopped."""

from __future__ import annotations

import copy

import pytest
import torch

import sere_compile
from sere_compile import CalibrationError
from sere_compile.calibration import calibrate as calibrate_module
from sere_compile.whole_file import write_whole

from ..thinned import thinned
from ..tiny_models import tokens
from .plain import FIRST, SECOND, run


class TestResume:
    def batches(self, stop=None):
        for seed in range(4):
            if seed == stop:
                raise KeyboardInterrupt
            yield tokens(2, 5, seed)

    def test_goes_on_where_it_was_interrupted(self, qwen, tmp_path):
        """Between two batches; the result is bit for bit that of one run."""
        path = tmp_path / "state"
        with pytest.raises(KeyboardInterrupt):
            run(qwen, self.batches(stop=2), resume=path, method="cosine")
        got = run(qwen, self.batches(), resume=path, method="cosine")
        assert got == run(qwen, self.batches(), method="cosine")
        assert got.metadata["tokens"] == "40"

    def test_a_batch_counts_as_a_whole_or_not_at_all(self, qwen, tmp_path, monkeypatch):
        """Interrupted between two layers of a forward, the first layer's part of it is dropped."""
        path, original, calls = tmp_path / "state", calibrate_module._Calibration._see, []

        def see(self, arrival):
            calls.append(arrival.name)
            if len(calls) == 4:
                raise KeyboardInterrupt
            original(self, arrival)

        with monkeypatch.context() as patch:
            patch.setattr(calibrate_module._Calibration, "_see", see)
            with pytest.raises(KeyboardInterrupt):
                run(qwen, self.batches(), resume=path)
        assert calls == [FIRST, SECOND] * 2
        torch._dynamo.reset()
        assert run(qwen, self.batches(), resume=path) == run(qwen, self.batches())

    def test_a_finished_one_returns_at_once(self, qwen, tmp_path, monkeypatch):
        """The file holds all that the profile is made of; batches that it holds are not run again."""
        path = tmp_path / "state"
        first = run(qwen, self.batches(), resume=path, max_tokens=20)
        monkeypatch.setattr(calibrate_module._Calibration, "add", None)
        assert run(qwen, self.batches(), resume=path, max_tokens=20) == first

    @pytest.mark.parametrize("change", thinned(["text", "order", "batch size", "fewer", "none"], (1, 3)))
    def test_of_other_data(self, qwen, tmp_path, change):
        """Sums of one text are never taken for those of another; the file stays as it was."""
        path = tmp_path / "state"
        run(qwen, self.batches(), resume=path, max_tokens=20)
        first, second, *rest = self.batches()
        changed = {
            "text": [first, second.clone().index_fill_(1, torch.tensor([4]), 7), *rest],
            "order": [second, first, *rest],
            "batch size": [torch.cat([first, second]), *rest],
            "fewer": [first],
            "none": [],
        }[change]
        content = path.read_bytes()
        with pytest.raises(CalibrationError, match=r"state is of other data: the 2 batches in it differ"):
            run(qwen, changed, resume=path)
        assert path.read_bytes() == content

    def test_mappings_are_told_apart_by_every_argument(self, qwen, tmp_path):
        """A mask is data, too; what an object prints, such as its address, is not."""
        path, ids = tmp_path / "state", tokens(2, 5)
        mask = torch.ones_like(ids)
        run(qwen, [{"input_ids": ids, "attention_mask": mask}], resume=path)
        assert run(qwen, [{"attention_mask": mask, "input_ids": ids}], resume=path)
        with pytest.raises(CalibrationError, match="of other data: the 1 batch in it differs"):
            run(qwen, [{"input_ids": ids, "attention_mask": mask.index_fill(1, torch.tensor([0]), 0)}], resume=path)

    def test_more_tokens_than_are_asked_for(self, qwen, tmp_path):
        """Sums cannot be taken back."""
        path = tmp_path / "state"
        run(qwen, self.batches(), resume=path, max_tokens=20)
        with pytest.raises(CalibrationError, match=r"holds 20 tokens already, and 10 are asked for: .* remove it"):
            run(qwen, self.batches(), resume=path, max_tokens=10)

    def test_of_an_earlier_version(self, qwen, tmp_path):
        """Which did not say what data its sums are of."""
        path = tmp_path / "state"
        run(qwen, self.batches(), resume=path, max_tokens=20)
        path.write_bytes(path.read_bytes().replace(b'\\"data\\"', b'\\"date\\"'))
        with pytest.raises(CalibrationError, match="earlier version, which did not record what data"):
            run(qwen, self.batches(), resume=path)

    @pytest.mark.parametrize(("kept", "told"), [(True, "holds 2 batches, 20 tokens"), (False, "nothing")])
    def test_an_interrupt_says_what_is_kept(self, qwen, tmp_path, caplog, kept, told):
        """And what would have kept it."""
        with pytest.raises(KeyboardInterrupt):
            run(qwen, self.batches(stop=2), resume=tmp_path / "state" if kept else None)
        (message,) = [r.getMessage() for r in caplog.records if "interrupted" in r.getMessage()]
        assert told in message
        assert kept or "--resume" in message

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "cosine"}, r"another method \(frobenius, not cosine\); remove it"),
            pytest.param({"chunk": 3}, r"another chunk \(256, not 3\)", marks=pytest.mark.slow),
            pytest.param({"seed": 3}, r"another seed \(0, not 3\)", marks=pytest.mark.slow),
        ],
    )
    def test_of_another_calibration(self, qwen, tmp_path, change, message):
        """What cannot be added up is refused."""
        path = tmp_path / "state"
        run(qwen, self.batches(), resume=path, max_tokens=10)
        with pytest.raises(CalibrationError, match=message):
            run(qwen, self.batches(), resume=path, **change)

    def test_of_another_model(self, qwen, tmp_path):
        """The same class with other weights."""
        path = tmp_path / "state"
        run(qwen, self.batches(), resume=path, max_tokens=10)
        other = copy.deepcopy(qwen)
        with torch.no_grad():
            other.get_parameter(FIRST).add_(0.01)
        with pytest.raises(CalibrationError, match="another model; remove it"):
            run(other, self.batches(), resume=path)

    def test_in_no_folder(self, qwen, tmp_path):
        """Told before the first batch, not when an hour's work is to be kept."""
        seen = []
        with pytest.raises(sere_compile.OutputError, match="there is no folder"):
            run(qwen, (seen.append(batch) or batch for batch in self.batches()), resume=tmp_path / "missing" / "state")
        assert not seen

    def test_of_no_calibration(self, qwen, tmp_path):
        """A file that somebody else wrote is neither read nor overwritten."""
        path = tmp_path / "m.safetensors"
        sere_compile.SimilarityProfile({FIRST: torch.eye(3)}).save(path)
        content = path.read_bytes()
        with pytest.raises(CalibrationError, match="is no file of an interrupted calibration"):
            run(qwen, self.batches(), resume=path)
        assert path.read_bytes() == content
        write_whole(tmp_path / "text", b"hello")
        with pytest.raises(sere_compile.ProfileError, match="not a readable safetensors file"):
            run(qwen, self.batches(), resume=tmp_path / "text")
