"""AOTInductor packages of real transformers models, from Python and from C++, against the eager oracle.

A package costs half a minute of C++ compilation, so tests share them; what needs none runs on exported programs.
"""

import contextlib
import functools
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import GateNotFoundError, ProfileError, SereConfig, SimilarityProfile
from sere_compile.errors import LoweringError, OutputError
from sere_compile.lowering import aot
from sere_compile.lowering.export import export_rewritten
from sere_compile.testing import oracle_routing

from ..tiny_models import build, gate_names, random_profile, tokens
from .cpp_runner import run_cpp
from .models import SmallMoE, hidden_states, small_profile

BATCHES = (1, 5, 40)
BATCH = torch.export.Dim("batch", min=1, max=64)
INPUTS = {"args": (tokens(),), "kwargs": {"use_cache": False}}
DYNAMIC = {"input_ids": {0: BATCH}, "use_cache": None}
ELF, EM_CUDA = b"\x7fELF", 190
S1 = SereConfig(select_top_k=1, min_active=0)
# Experts implementation and number of layers. Of grouped_mm PyTorch's own operator is traced for bfloat16 alone.
CUDA = [("batched_mm", 1), ("batched_mm", 2), ("grouped_mm", 2)]


def assert_equals_oracle(run, model, profile, device="cpu", half=False):
    """`run(ids)` equals the oracle for every batch size, and re-routing mattered for one of them at least.

    With experts in half precision one rounding can turn a later layer's choice: all but a few positions are compared.
    """
    changed = False
    for batch in BATCHES:
        ids = tokens(batch, device=device)
        expected, unchanged = oracle_logits(model, profile, ids)
        if half:
            errors = (run(ids) - expected).abs().amax(-1)
            assert errors.quantile(0.9) < 0.02, f"batch {batch}: {errors}"
            assert errors.median() < 0.002, f"batch {batch}: {errors}"
        else:
            torch.testing.assert_close(run(ids), expected, rtol=1e-4, atol=1e-4)
        changed |= (unchanged - expected).abs().amax(-1).median().item() > 0.1
    assert changed, "the case re-routes nothing"


def oracle_logits(model, profile, ids):
    """Logits with re-routed ids and with the original ones."""
    with torch.no_grad():
        with oracle_routing(model, profile, 1, min_active=0):
            expected = model(ids, use_cache=False).logits
        return expected, model(ids, use_cache=False).logits


@pytest.fixture(scope="module", params=CUDA, ids=lambda case: f"{case[0]}-{case[1]}")
def cuda_package(request, tmp_path_factory):
    """One for the tests of a case: packaging takes a minute."""
    if request.param[0] == "grouped_mm" and "aoti_torch_cuda__grouped_mm" not in aot._shims("cuda"):
        pytest.skip(f"torch {torch.__version__} cannot call grouped_mm on CUDA from a package, which `package` says")
    return package_model(tmp_path_factory.mktemp("cuda"), "cuda", *request.param)


class TestExportRewritten:
    """What `package` compiles; `rewrite` itself has its tests in tests/test_rewrite.py."""

    def test_a_model_gives_the_same_program(self):
        """`export_rewritten` on a model; matrices attached to a model inside a wrapper are found under its names."""
        model = build("mixtral")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        ids = tokens()
        program = export_rewritten(Logits(model), (ids,), config=S1, dynamic_shapes=({0: BATCH},))
        module = program.module()
        assert_equals_oracle(module, model, profile)
        assert export_rewritten(program) is program

    def test_models_that_switch_gradients_off_are_seen(self):
        """A forward under `@torch.no_grad()` is not hidden in a nested graph."""

        class Block(Routed):
            forward = torch.no_grad()(Routed.forward)

        program = export_rewritten(Block(), (torch.randn(5, 6),), profile=routed_profile())
        assert reroutes(program) == 1


class TestPackage:
    @pytest.mark.slow
    def test_save_and_load_in_another_process(self, tmp_path):
        """A saved program needs only `import sere_compile.ops` to load; packaged there, it is the same function."""
        free = ({0: torch.export.Dim("tokens", min=1, max=64)},)
        program = torch.export.export(SmallMoE().eval(), (hidden_states(5),), dynamic_shapes=free)
        rewritten = sere_compile.rewrite(program, profile=small_profile(), config=S1).run_decompositions()
        assert reroutes(rewritten) == 1, "decomposition keeps the operator whole"
        torch.export.save(rewritten, tmp_path / "rewritten.pt2")
        subprocess.run([sys.executable, "-c", LOAD_AND_PACKAGE, tmp_path], check=True)
        run = torch._inductor.aoti_load_package(str(tmp_path / "package.pt2"))
        for count in (1, 2, 33):
            hidden = hidden_states(count, seed=count)
            torch.testing.assert_close(run(hidden), rewritten.module()(hidden), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(run(hidden_states(2)), program.module()(hidden_states(2)), atol=1e-2)

    @pytest.mark.slow
    @pytest.mark.parametrize(("experts", "layers"), [("batched_mm", 1), ("grouped_mm", 2)])
    def test_python_and_cpp(self, experts, layers, tmp_path):
        """A model packaged in one call gives the oracle's logits for every batch size, in Python and without it."""
        packaged = package_model(tmp_path, "cpu", experts, layers)
        check_in_python(*packaged)
        check_in_cpp(*packaged)

    @pytest.mark.gpu
    def test_cuda_in_cpp(self, cuda_package):
        """On CUDA the package brings the Triton kernel as machine code, and runs without Python."""
        check_in_cpp(*cuda_package)
        with zipfile.ZipFile(cuda_package.path) as archive:
            holding = [name for name in archive.namelist() if holds_kernel(archive.read(name))]
        assert holding, "no entry of the package is or embeds GPU code of reroute_kernel"

    @pytest.mark.gpu
    def test_cuda_in_python(self, cuda_package):
        if not loads_packages():
            # Seen where the C++ compiler links libstdc++ statically: docs/lowering_aot.md says what helps.
            pytest.skip(f"torch {torch.__version__} cannot load a package of one nn.Linear on this machine as it is")
        check_in_python(*cuda_package)

    def test_operators_in_python_are_told(self, tmp_path, monkeypatch, caplog):
        """grouped_mm on CPU calls an operator that transformers writes in Python: no process without it can load that.

        The compiled package was seen to fail in C++; here nothing is compiled.
        """
        compiled = []
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda p, **options: compiled.append(options))
        options = {"max_autotune": False}
        for experts, told in (("grouped_mm", True), ("batched_mm", False)):
            caplog.clear()
            model = build("mixtral", experts)
            aot.package(model, tmp_path / "m.pt2", **INPUTS, profile=random_profile(model), inductor_options=options)
            assert ("transformers.grouped_mm_fallback.default" in caplog.text) == told
        assert [call["inductor_configs"] for call in compiled] == [options, options]
        assert compiled[0]["inductor_configs"] is not options

    def test_an_operator_that_this_torch_cannot_call_is_refused(self, tmp_path, monkeypatch):
        """The C++ compiler of AOTInductor would say so after a minute."""
        program = torch.export.export(Grouped(), (torch.randn(6, 16, dtype=torch.bfloat16),))
        compiled = []
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda p, **options: compiled.append(p))
        known = aot._shims("cpu")
        for shims, called in ((known.replace("__grouped_mm", "__none"), 0), (known + "aoti_torch_cpu__grouped_mm", 1)):
            monkeypatch.setattr(aot, "_shims", lambda device, shims=shims: shims)
            expected = contextlib.nullcontext() if called else pytest.raises(LoweringError, match="batched_mm")
            with expected:
                aot.package(program, tmp_path / "m.pt2", allow_no_gates=True)
            assert len(compiled) == called


class Grouped(nn.Module):
    """Two experts for three rows each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 16, dtype=torch.bfloat16))

    def forward(self, x):
        return torch.ops.aten._grouped_mm(x, self.weight, offs=torch.tensor([3, 6], dtype=torch.int32))


@functools.cache
def loads_packages():
    """Whether torch itself can load a package in Python on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PLAIN_PACKAGE, f"{folder}/plain.pt2"]
        return subprocess.run(command, capture_output=True).returncode == 0


PLAIN_PACKAGE = """
import sys, torch
model, x = torch.nn.Linear(16, 8).eval(), torch.randn(6, 16)
with torch.no_grad():
    program = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))
"""


class TestBadInput:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_untraceable_model_names_the_implementations(self, wrapped):
        """One line of ours on top, torch's own text below it and its error as the cause."""
        model = build("qwen3_moe", "eager")
        with pytest.raises(LoweringError) as caught:
            export_rewritten(Logits(model), INPUTS["args"]) if wrapped else export_rewritten(model, **INPUTS)
        first, rest = str(caught.value).split("\n", 1)
        assert first == (
            f"torch.export cannot trace {'Logits' if wrapped else 'Qwen3MoeForCausalLM'}. Of transformers' experts "
            'implementations "grouped_mm" and "batched_mm" export, "eager" does not; this model uses "eager" '
            "(model.set_experts_implementation changes it)."
        )
        assert str(caught.value.__cause__) in rest

    def test_untraceable_model_of_ones_own(self):
        with pytest.raises(LoweringError, match=r"cannot trace Linear\. Experts that index stacked weights"):
            export_rewritten(nn.Linear(4, 4), ("not a tensor",))

    def test_no_gate(self, caplog):
        """An error, or with `allow_no_gates` a warning and the program as it was."""
        program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
        with pytest.raises(GateNotFoundError, match="no MoE gate in the traced graph"):
            export_rewritten(program)
        with caplog.at_level(logging.WARNING):
            assert export_rewritten(program, allow_no_gates=True) is program
        assert "runs unchanged: no MoE gate" in caplog.text
        with pytest.raises(GateNotFoundError):
            export_rewritten(program, config=SereConfig(strict=True), allow_no_gates=True)

    @pytest.mark.parametrize(
        ("gates", "named"),
        [
            ({"gate": 8, "layers.7.gate.weight": 8}, "its gate layers.7.gate.weight is not a weight"),
            ({"experts": 8}, "no matrix for the gate gate; it has experts"),
            ({"gate": 4}, r"the matrix for gate is \[4, 4\], its gate has 8 experts"),
        ],
    )
    def test_profile_of_another_model(self, gates, named):
        """The first gate that differs is named: too many, too few, another size."""
        program = torch.export.export(Routed(), (torch.randn(5, 6),))
        profile = SimilarityProfile({name: torch.eye(size) for name, size in gates.items()})
        with pytest.raises(ProfileError, match=named):
            export_rewritten(program, profile=profile)

    def test_arguments_that_would_be_ignored(self):
        """Export arguments for a program, and a profile for a program that is re-routed already."""
        program = torch.export.export(Routed(), (torch.randn(5, 6),))
        with pytest.raises(LoweringError, match="an ExportedProgram has its own"):
            export_rewritten(program, (torch.randn(5, 6),))
        rewritten = export_rewritten(program, profile=routed_profile())
        with pytest.raises(LoweringError, match="re-routed already"):
            export_rewritten(rewritten, profile=routed_profile())
        with pytest.raises(LoweringError, match="got function"):
            export_rewritten(tokens)

    def test_paths_are_checked_before_compiling(self, tmp_path):
        """A wrong ending or a missing folder is told before anything is traced."""
        with pytest.raises(LoweringError, match=r"ends in \.pt2, got 'model.so'"):
            aot.package(None, "model.so")
        with pytest.raises(OutputError, match="there is no folder"):
            aot.package(None, tmp_path / "missing" / "model.pt2")

    def test_a_failed_package_leaves_the_earlier_one(self, tmp_path, monkeypatch, no_room):
        """Nothing is compiled; what the writer gets holds errors back, for which torch's would end the process."""

        def write(program, *, package_path, inductor_configs):
            with no_room():
                for _ in range(3):
                    assert package_path.write(b"new" * 10**5) == 3 * 10**5

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", write)
        path, model = tmp_path / "m.pt2", build("mixtral", "batched_mm")
        path.write_bytes(b"old")
        with pytest.raises(OutputError, match=r"m.pt2 could not be written: File too large"):
            aot.package(model, path, **INPUTS, profile=random_profile(model))
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"m.pt2": b"old"}


LOAD_AND_PACKAGE = """
import sys
import torch
import sere_compile.ops

assert "transformers" not in sys.modules
folder = sys.argv[1]
program = torch.export.load(folder + "/rewritten.pt2")

from sere_compile.lowering import aot
aot.package(program, folder + "/package.pt2")
"""


class Logits(nn.Module):
    """One tensor in, one out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


class Routed(nn.Module):
    """A gate of K = 3 of 8 experts that are gathered per slot; x [T, 6]."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate = nn.Parameter(torch.randn(8, 6, generator=generator))
        self.experts = nn.Parameter(torch.randn(8, 6, 6, generator=generator))

    def forward(self, x):
        weights, ids = torch.topk(torch.softmax(x @ self.gate.T, dim=-1), 3, dim=-1)
        outputs = (x[:, None, None, :] @ self.experts[ids]).squeeze(2)
        return (outputs * weights[..., None]).sum(1)


def routed_profile():
    half = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    return SimilarityProfile({"gate": half + half.T})


def reroutes(program):
    return sum(str(node.target).startswith("sere.reroute") for node in program.graph.nodes)


class Packaged(NamedTuple):
    path: Path
    model: nn.Module
    profile: SimilarityProfile
    device: str
    half: bool


def package_model(folder, device, experts, layers):
    """A package of the first layers of a tiny Qwen3-MoE; test_agreement.py has two of each model.

    In float32, but for the experts of grouped_mm: the router's scores stay as exact as the eager model's.
    """
    half = experts == "grouped_mm"
    model = build("qwen3_moe", experts, device=device)
    matrices = random_profile(model)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    for layer in model.model.layers if half else ():
        layer.mlp.experts.to(torch.bfloat16)
    profile = SimilarityProfile({gate: matrices[gate] for gate in gate_names(layers)})
    path = aot.package(
        model,
        folder / "m.pt2",
        (tokens(device=device),),
        kwargs=INPUTS["kwargs"],
        dynamic_shapes=DYNAMIC,
        profile=profile,
        config=S1,
        # Without it Inductor rounds to bfloat16 less often than the eager model.
        inductor_options={"emulate_precision_casts": True} if half else None,
    )
    assert path == str(folder / "m.pt2")
    return Packaged(Path(path), model, profile, device, half)


def check_in_python(path, model, profile, device, half):
    compiled = torch._inductor.aoti_load_package(str(path))
    assert_equals_oracle(lambda ids: compiled(ids, use_cache=False).logits, model, profile, device, half)


def check_in_cpp(path, model, profile, device, half):
    outputs = run_cpp(path.parent, path, [[tokens(batch)] for batch in BATCHES], device)
    results = {len(logits): logits.to(device) for (logits,) in outputs}
    assert_equals_oracle(lambda ids: results[len(ids)], model, profile, device, half)


def holds_kernel(entry):
    """Whether a file of a package is or embeds a cubin of the one-launch kernel."""
    start = entry.find(ELF)
    while start >= 0:
        machine = int.from_bytes(entry[start + 18 : start + 20], "little")
        if machine == EM_CUDA and b".text.reroute_kernel" in entry[start:]:
            return True
        start = entry.find(ELF, start + 1)
    return False
