"""`calibrate` against a plain computation that keeps every expert's outputs on every token."""

from __future__ import annotations

import copy
import itertools
import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import sere_compile
from sere_compile import CalibrationError, ConfigError, calibrate
from sere_compile.calibration import calibrate as calibrate_module
from sere_compile.calibration import observed_model
from sere_compile.experts.counterfactual import CounterfactualExperts
from sere_compile.whole_file import write_whole

from ..passes.moe_modules import DUPLICATE_UNSAFE, EXPERTS, HIDDEN, SUMS_DUPLICATES, Block, Indexed, rows
from ..tiny_models import IMPLEMENTATIONS, build, gate_names, tokens

FIRST, SECOND = gate_names()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3_moe")


def run(model, batches, **options):
    return calibrate(model, batches, progress=False, **options)


def expert_outputs(model, batches):
    """[E, T, H] float64 for each gate: hidden states by hooks, experts one after the other from their weights."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(f"model.layers.{i}.mlp").register_forward_hook(
            lambda module, inputs, output, i=i: seen.setdefault(gate_names()[i], []).append(inputs[0].flatten(0, -2))
        )
        for i in range(2)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False) if isinstance(batch, dict) else model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for i, name in enumerate(gate_names()):
        found[name] = outputs_of(model.model.layers[i].mlp.experts, torch.cat(seen[name]))
    return found


def outputs_of(experts, hidden):
    """[E, T, H] float64: experts one after the other."""
    outputs = []
    for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, value = F.linear(hidden, up).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * value, down))
    return torch.stack(outputs).detach().double()


def pairs(outputs, function):
    """The matrix of a function of two experts' outputs."""
    number = len(outputs)
    matrix = torch.empty(number, number, dtype=torch.float64)
    for p, q in itertools.product(range(number), repeat=2):
        matrix[p, q] = function(outputs[p], outputs[q])
    return matrix


def plain_frobenius(outputs):
    distance = pairs(outputs, lambda a, b: (a - b).norm())
    return 1 - distance / distance.max()


def plain_cosine(outputs):
    return pairs(outputs, lambda a, b: F.cosine_similarity(a, b, dim=-1).mean())


def plain_cka(kernel):
    def of_kernel(x):
        if kernel == "linear":
            return x @ x.T
        if kernel == "polynomial":
            return (x @ x.T + 1) ** 3
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        between = distances[~torch.eye(len(x), dtype=torch.bool)]
        return torch.exp(-distances / (2 * 0.8**2 * between.median()))

    def hsic(a, b):
        centring = torch.eye(len(a), dtype=torch.float64) - 1 / len(a)
        return torch.trace(of_kernel(a) @ centring @ of_kernel(b) @ centring)

    return lambda outputs: pairs(outputs, lambda a, b: hsic(a, b) / torch.sqrt(hsic(a, a) * hsic(b, b)))


METRICS = {
    ("frobenius", "linear"): plain_frobenius,
    ("cosine", "linear"): plain_cosine,
    ("cka", "linear"): plain_cka("linear"),
    ("cka", "rbf"): plain_cka("rbf"),
    ("cka", "polynomial"): plain_cka("polynomial"),
}


class TestNumbers:
    @pytest.mark.parametrize(("method", "kernel"), METRICS)
    def test_equals_the_plain_computation(self, qwen, method, kernel):
        """Every metric, to 1e-5; several batches and chunks, but for CKA, whose chunk is its minibatch."""
        batches = [tokens(3, 5)] if method == "cka" else [tokens(3, 5, seed) for seed in range(2)]
        got = run(qwen, batches, method=method, kernel=kernel, chunk=7 if method != "cka" else 64)
        for name, outputs in expert_outputs(qwen, batches).items():
            expected = METRICS[method, kernel](outputs).fill_diagonal_(1.0).float()
            torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-5)
            projection = pairs(outputs, lambda a, b: (a * b).sum() / (b * b).sum()).float()
            torch.testing.assert_close(got.projections[name], projection, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    @pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
    def test_every_implementation(self, name, experts):
        """Grouped, gathered and looped experts, in a graph or outside."""
        model, batches = build(name, experts), [tokens(3, 5)]
        got = run(model, batches)
        for gate, outputs in expert_outputs(model, batches).items():
            torch.testing.assert_close(got[gate], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("block", [*SUMS_DUPLICATES, *DUPLICATE_UNSAFE], ids=lambda block: block.__name__)
    def test_experts_of_any_code(self, block):
        """Without a module of a known signature the traced dispatch runs; batches of several sizes."""
        if block.__name__ == "IndexPut":
            pytest.skip("a loop over where() is outside of the graph, and its layers are no module with ids")
        module, batches = block(), [rows(), rows(7, seed=1), rows(7, seed=2)]
        got = run(module, batches, chunk=4)
        with torch.no_grad():
            outputs = torch.stack([module.expert(e, torch.cat(batches)) for e in range(EXPERTS)]).double()
        torch.testing.assert_close(got["router"], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_what_follows_the_experts_counts(self):
        """Experts in a narrower space: similar is what the model adds, behind the projection back."""

        class Latent(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.up = Indexed(), nn.Linear(HIDDEN, HIDDEN, bias=False)
                self.up.weight.data.normal_(0, 3, generator=torch.Generator().manual_seed(1))

            def forward(self, x):
                ids, weights = self.inner.route(x)
                y = torch.tanh(x[:, None, None, :] @ self.inner.experts[ids])
                return ((y.squeeze(2) @ self.up.weight.T) * weights[..., None]).sum(1)

        module, x = Latent(), rows()
        got = run(module, [x])
        with torch.no_grad():
            outputs = torch.stack([module.up(module.inner.expert(e, x)) for e in range(EXPERTS)]).double()
        torch.testing.assert_close(got["inner.router"], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_half_precision_is_summed_in_more(self):
        """The sums over a bfloat16 model's outputs are those in float64, not in bfloat16."""
        model, batches = build("mixtral", dtype=torch.bfloat16), [tokens(8, 12, seed) for seed in range(3)]
        got = run(model, batches, chunk=16)
        for name, outputs in expert_outputs(model, batches).items():
            torch.testing.assert_close(got[name], plain_frobenius(outputs).float(), rtol=0, atol=2e-3)

    def test_padding_does_not_count(self, qwen):
        """Tokens with mask 0, on either side, are run but not compared."""
        ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
        mask[0, :4], mask[2, 3:] = 0, 0
        batch = {"input_ids": ids, "attention_mask": mask}
        got = run(qwen, [batch], chunk=5)
        assert got.metadata["tokens"] == str(int(mask.sum()))
        for name, outputs in expert_outputs(qwen, [batch]).items():
            expected = plain_frobenius(outputs[:, mask.flatten().bool()])
            torch.testing.assert_close(got[name], expected.float(), rtol=0, atol=1e-5)

    def test_stops_at_max_tokens(self, qwen):
        """The last batch counts in part, those behind it are not read."""
        batches = iter([tokens(2, 5, seed) for seed in range(4)])
        got = run(qwen, batches, max_tokens=13)
        assert got.metadata["tokens"] == "13"
        assert len(list(batches)) <= 2
        outputs = expert_outputs(qwen, [tokens(2, 5, seed) for seed in range(2)])
        for name in gate_names():
            torch.testing.assert_close(got[name], plain_frobenius(outputs[name][:, :13]).float(), rtol=0, atol=1e-5)


class TestRunning:
    def test_holds_one_chunk_only(self, qwen, monkeypatch):
        """Never the outputs of all experts on more than `chunk` tokens."""
        sizes = []
        original = CounterfactualExperts.outputs

        def outputs(self, numbers, num_experts):
            sizes.append(len(numbers))
            return original(self, numbers, num_experts)

        monkeypatch.setattr(CounterfactualExperts, "outputs", outputs)
        run(qwen, [tokens(4, 9)], chunk=8)
        assert max(sizes) == 8
        assert sum(sizes) >= 2 * 4 * 9

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    def test_nothing_is_computed_for_slots_without_weight(self, experts, monkeypatch):
        """A module that takes ids of any width gets one a row, in a handful of calls."""
        calls, find = [], observed_model.find_experts

        def found(owner, number):
            module = find(owner, number)

            def recorded(hidden, ids, weights):
                calls.append(tuple(ids.shape))
                return module(hidden, ids, weights)

            return recorded

        monkeypatch.setattr(observed_model, "find_experts", found)
        run(build("qwen3_moe", experts), [tokens(4, 8)], chunk=32)
        assert calls.count((16 * 32, 1)) == 2
        assert len(calls) <= 6, "two for the chunks, the others to compare"

    def test_a_module_that_disagrees_is_not_used(self, monkeypatch):
        """What the graph computes decides, not what stands beside the router."""
        model, batches = build("mixtral"), [tokens(2, 5)]
        expected = run(model, batches)
        monkeypatch.setattr(
            observed_model, "find_experts", lambda owner, number: lambda hidden, ids, weights: hidden * ids.float()
        )
        torch._dynamo.reset()
        got = run(model, batches)
        for name in gate_names():
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
    def test_compiled_models(self, how):
        """A model that is compiled already is calibrated as it was, and stays compiled."""
        model, batches = build("mixtral"), [tokens(2, 5)]
        expected = run(model, batches)
        if how == "torch.compile":
            model = torch.compile(model, backend="eager")
        else:
            model.compile(backend="eager")
        got = run(model, batches)
        assert got == expected
        assert list(got) == gate_names()
        assert how == "torch.compile" or model._compiled_call_impl is not None

    def test_leaves_the_model_alone(self, qwen):
        """Training mode of each module, weights and outputs are as before."""
        model = copy.deepcopy(qwen)
        model.train()
        model.model.layers[1].eval()
        before = [module.training for module in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        run(model, [tokens(2, 5)])
        assert [module.training for module in model.modules()] == before
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_profile_says_where_it_comes_from_and_fits(self, qwen, tmp_path):
        """Metadata, names and projections; saved, loaded and attached."""
        got = run(qwen, [tokens(2, 5)], method="cka", kernel="rbf", seed=3)
        assert {**got.metadata, "sere_compile": ""} == {
            "method": "cka_rbf", "tokens": "10", "seed": "3", "model_type": "qwen3_moe", "sere_compile": "",
        }  # fmt: skip
        got.save(tmp_path / "p.safetensors")
        loaded = sere_compile.SimilarityProfile.load(tmp_path / "p.safetensors")
        assert loaded == got
        assert loaded.projections.keys() == got.projections.keys() == set(gate_names())
        sere_compile.attach(copy.deepcopy(qwen), loaded)

    def test_shows_a_bar(self, qwen, capsys):
        """tqdm, on request."""
        calibrate(qwen, [tokens(2, 5)], max_tokens=10)
        assert "10/10" in capsys.readouterr().err


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

    def test_a_finished_one_returns_at_once(self, qwen, tmp_path):
        """The file holds all that the profile is made of; batches that it holds are not run again."""
        path = tmp_path / "state"
        first = run(qwen, self.batches(), resume=path, max_tokens=20)
        assert run(qwen, iter([None]), resume=path, max_tokens=20) == first

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "cosine"}, r"another method \(frobenius, not cosine\); remove it"),
            ({"chunk": 3}, r"another chunk \(256, not 3\)"),
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


class TestErrors:
    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "the data set is empty: batches gave no batch"),
            ([{"input_ids": tokens(2, 3), "attention_mask": torch.zeros(2, 3)}], "all its tokens are padding"),
            (tokens(2, 3), "batches is an iterable of batches, got Tensor; a single batch goes in a list"),
            ({"input_ids": tokens(2, 3)}, "got dict; a single batch"),
            ("text", "got str"),
            (3, "got int"),
            ([[1, 2]], "a batch is a mapping of keyword arguments, .* or a tensor; got list"),
            (["text"], "got str"),
            ([{1: tokens(2, 3)}], "got dict"),
            ([{"input_ids": tokens(2, 3), "attention_mask": torch.ones(2)}], r"must be a tensor \[batch, length\]"),
        ],
    )
    def test_data_of_a_wrong_kind(self, qwen, batches, message):
        """The message says what is wrong and what is right."""
        with pytest.raises(CalibrationError, match=message):
            run(qwen, batches)

    def test_too_few_tokens(self, qwen, tmp_path):
        """What there is stays in the resume file, for more batches."""
        path = tmp_path / "state"
        with pytest.raises(CalibrationError, match="hold 10 tokens, padding not counted; max_tokens=50 asks for more"):
            run(qwen, [tokens(2, 5)], max_tokens=50, resume=path)
        more = [tokens(2, 5, seed) for seed in range(5)]
        assert run(qwen, more, max_tokens=50, resume=path).metadata["tokens"] == "50"

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_outputs_that_are_not_finite(self, qwen, value):
        """The gate and the expert are named."""
        model = copy.deepcopy(qwen)
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[5, 0, 0] = value
        message = r"layers\.1\.mlp\.gate\.weight: the outputs of expert 5 \(of 16\) hold NaN or infinity"
        with pytest.raises(CalibrationError, match=message):
            run(model, [tokens(2, 5)])

    def test_no_gates(self):
        """A dense model."""
        config = LlamaConfig(
            vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        with pytest.raises(CalibrationError, match=r"no MoE gate ran in a graph of this model: see sere_compile\.expl"):
            run(LlamaForCausalLM(config), [tokens(2, 5)])

    def test_experts_that_cannot_be_run(self):
        """Ids that leave the graph, and no module that takes them."""

        class Away(Block):
            def forward(self, x):
                ids, weights = self.route(x)
                torch._dynamo.graph_break()
                return self.away(x, ids, weights)

            @torch._dynamo.disable
            def away(self, x, ids, weights):
                return (torch.tanh(torch.einsum("th,tkhd->tkd", x, self.experts[ids])) * weights[..., None]).sum(1)

        with pytest.raises(CalibrationError, match=r"the experts of router cannot be run: its dispatch is outside"):
            run(Away(), [rows()])

    def test_mask_of_other_tokens(self, qwen):
        """A model that routes other tokens than the mask is of."""
        batch = {"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = qwen

            def forward(self, input_ids, attention_mask):
                return self.inner(torch.cat([input_ids, input_ids]), use_cache=False)

        message = r"cannot be determined at inner.* which sees 20 tokens: .*mask \(2, 5\)"
        with pytest.raises(CalibrationError, match=message):
            run(Twice(), [batch])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "frobenios"}, "did you mean 'frobenius'"),
            ({"method": "cka", "kernel": "gauss"}, "unknown kernel 'gauss'"),
            ({"kernel": "rbf"}, "kernel='rbf' is for method=\"cka\""),
            ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
            ({"chunk": 2.5}, "chunk must be an integer of at least 1, got 2.5"),
            ({"seed": -1}, "seed must be an integer from 0 to 18446744073709551615, got -1"),
            ({"seed": 10**30}, "seed must be an integer from 0 to"),
        ],
    )
    def test_options(self, qwen, options, message):
        """Before the model runs."""
        with pytest.raises(ConfigError, match=message):
            run(qwen, [tokens(2, 5)], **options)


class TestDataFree:
    def test_draws_what_each_layer_sees(self, monkeypatch):
        """Channel by channel the scale of the norm in front of the gate, in each layer its own."""
        model, drawn = build("qwen3_moe"), {}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight.copy_(torch.rand(32, generator=generator) * 4 - 2)
        original = observed_model.of_module

        def of_module(experts, hidden, slots, size):
            drawn.setdefault(id(experts), hidden)
            return original(experts, hidden, slots, size)

        monkeypatch.setattr(observed_model, "of_module", of_module)
        profile = run(model, None, max_tokens=4000)
        assert profile.metadata["tokens"] == "4000"
        for layer in model.model.layers:
            hidden, gain = drawn[id(layer.mlp.experts)], layer.post_attention_layernorm.weight.detach()
            assert hidden.shape == (4000, 32)
            torch.testing.assert_close(hidden.std(0), gain.abs(), rtol=0.06, atol=0)
            assert hidden.mean(0).abs().max() < 0.1

    @pytest.mark.parametrize("experts", IMPLEMENTATIONS)
    def test_equals_the_plain_computation(self, experts):
        """On the hidden states that were drawn, whichever way the experts run; the same for the same seed."""
        model = build("mixtral", experts)
        got = run(model, None, max_tokens=64)
        hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        layers = model.model.layers
        for name, layer in zip(gate_names(), layers, strict=True):
            outputs = outputs_of(layer.mlp.experts, hidden * layer.post_attention_layernorm.weight)
            torch.testing.assert_close(got[name], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_is_seeded(self, qwen):
        """The same seed gives the same profile, bit for bit, another one another."""
        got = run(qwen, None, max_tokens=64)
        assert got == run(qwen, None, max_tokens=64)
        assert got != run(qwen, None, max_tokens=64, seed=1)

    def test_scale_matters(self):
        """A norm that silences a channel silences what experts make of it: two that differ there alone are twins."""
        model = build("mixtral")
        with torch.no_grad():
            for layer in model.model.layers:
                experts = layer.mlp.experts
                experts.gate_up_proj[5], experts.down_proj[5] = experts.gate_up_proj[3], experts.down_proj[3]
                experts.gate_up_proj[5, :, 7] += 1
                layer.post_attention_layernorm.weight[7] = 0
        profile = run(model, None)
        for name in gate_names():
            assert profile[name][3, 5] == 1
        torch.compile(model, backend=sere_compile.sere_backend.with_options(select_top_k=1, inner="eager"))(tokens())
        for name in gate_names():
            assert sere_compile.similarity.binding.lookup(model.get_parameter(name)).matrix[3, 5] == 1

    def test_without_a_norm(self, caplog):
        """Standard normal, and the log says why."""
        with caplog.at_level(logging.INFO, logger="sere_compile"):
            profile = run(Indexed(), None, example=rows(), max_tokens=32)
        assert "hidden states for router are drawn standard normal: no norm was found" in caplog.text
        x = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = torch.stack([Indexed().expert(e, x) for e in range(EXPERTS)]).double()
        torch.testing.assert_close(profile["router"], plain_frobenius(outputs).float(), rtol=0, atol=1e-5)

    def test_a_model_that_has_no_example(self):
        """Tracing needs one call."""
        with pytest.raises(CalibrationError, match="calibrating Indexed without batches needs example="):
            run(Indexed(), None)
