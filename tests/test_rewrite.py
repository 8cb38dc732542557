"""`rewrite` on programs that were traced ahead of time, against the eager oracle."""

import dataclasses
import functools
import io
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

import sere_compile
from sere_compile import ConfigError, GateNotFoundError, ProfileError, SereConfig, SimilarityProfile
from sere_compile.passes import SkipReason, find_gates
from sere_compile.passes.graph import nodes
from sere_compile.testing import oracle_routing, reroute_oracle

from .tiny_models import LAYERS, PAIRS, TOP_K, build, gate_names, random_profile, tokens

EXPERTS = ("grouped_mm", "batched_mm")
S1 = SereConfig(select_top_k=1)


@functools.cache
def exported(name, experts):
    """A model and its program for 2 to 64 sequences; tracing takes seconds, so tests share it."""
    model = build(name, experts)
    dynamic = {"input_ids": {0: torch.export.Dim("batch", min=2, max=64)}, "use_cache": None}
    inputs = {"input_ids": tokens(), "use_cache": False}
    with torch.no_grad():
        return model, torch.export.export(model, (), inputs, dynamic_shapes=dynamic)


def logits(program, ids):
    module = program.module() if isinstance(program, torch.export.ExportedProgram) else program
    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def oracle(model, profile, ids, select_top_k=1, **options):
    with oracle_routing(model, profile, select_top_k, **options):
        return logits(model, ids)


def operators(program):
    graph = program.graph_module.graph if isinstance(program, torch.export.ExportedProgram) else program.graph
    return [nodes.kind(node) for node in graph.nodes if nodes.kind(node).startswith("sere.")]


def symmetric(experts):
    half = torch.rand(experts, experts, generator=torch.Generator().manual_seed(0))
    return ((half + half.T) / 2).fill_diagonal_(1.0)


class _Linear(nn.Module):
    """A router and, in `_LinearLoop`, experts that symbolic_trace keeps as leaf modules."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 5, bias=False)
        self.experts = nn.Parameter(torch.randn(5, 6, 6))

    def route(self, x):
        best = self.gate(x).softmax(-1).topk(2, -1)
        return best[0], best[1]

    def combine(self, x, weights, ids):
        return torch.einsum("th,tkhf,tk->tf", x, self.experts[ids], weights)

    def forward(self, x):
        return self.combine(x, *self.route(x))


class _LinearLoop(_Linear):
    def __init__(self):
        super().__init__()
        del self.experts
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.SiLU(), nn.Linear(7, 6)) for _ in range(5))

    def combine(self, x, weights, ids):
        shares = [((ids == number) * weights).sum(-1, keepdim=True) for number in range(5)]
        return sum(share * expert(x) for share, expert in zip(shares, self.experts, strict=True))


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "experts"), [pair for pair in PAIRS if pair.values[1] in EXPERTS])
class TestExportedProgram:
    def test_s_below_k_equals_the_oracle(self, name, experts):
        """One gate a layer is re-routed; other batch sizes than the traced one are right too."""
        model, program = exported(name, experts)
        profile = random_profile(model)
        done = sere_compile.rewrite(program, profile=profile, config=S1)
        assert operators(done) == ["sere.reroute"] * LAYERS
        for batch in (9, 4, 2):
            ids = tokens(batch, seed=batch)
            close(logits(done, ids), oracle(model, profile, ids))
        assert not torch.allclose(logits(model, ids), oracle(model, profile, ids), rtol=1e-3, atol=1e-3)

    def test_s_equal_k_changes_no_bit(self, name, experts):
        """With S = K nothing is inserted, and the output is the original's bit for bit."""
        model, program = exported(name, experts)
        done = sere_compile.rewrite(program, config=SereConfig(select_top_k=TOP_K[name]))
        assert operators(done) == []
        assert torch.equal(logits(done, tokens()), logits(model, tokens()))

    def test_decomposed_block(self, name, experts):
        """A block in core ATen, without in-place operations, is rewritten like the one it came from."""
        block, hidden = build(name, experts).model.layers[0].mlp, torch.randn(4, 6, 32)
        matrix = symmetric(block.gate.weight.shape[0])
        with torch.no_grad():
            program = torch.export.export(block, (hidden,)).run_decompositions()
            done = sere_compile.rewrite(program, profile=SimilarityProfile({"gate.weight": matrix}), config=S1)
            assert operators(done) == ["sere.reroute"]
            with oracle_routing(block, {"gate.weight": matrix}, 1):
                close(done.module()(hidden), block(hidden))

    def test_unlifted_module(self, name, experts):
        """`program.module()` is a GraphModule with attributes; it is rewritten like the program."""
        model, program = exported(name, experts)
        profile, ids = random_profile(model), tokens(3)
        done = sere_compile.rewrite(program.module(), profile=profile, config=S1)
        assert operators(done) == ["sere.reroute"] * LAYERS
        close(logits(done, ids), oracle(model, profile, ids))

    def test_make_fx_block(self, name, experts):
        """An MoE block traced by make_fx, whose router weight has the name that make_fx gave it."""
        block, hidden = build(name, experts).model.layers[0].mlp, torch.randn(4, 6, 32)
        with torch.no_grad():
            graph = make_fx(block)(hidden)
            [gate] = find_gates(graph).gates
            matrix = symmetric(gate.num_experts)
            # A profile of the model serves as well: its names are looked up in the live modules.
            for weight in (str(gate.router_weight.target), "gate.weight"):
                done = sere_compile.rewrite(graph, profile=SimilarityProfile({weight: matrix}), config=S1)
                with oracle_routing(block, {"gate.weight": matrix}, 1):
                    close(done(hidden), block(hidden))
            assert torch.equal(graph(hidden), block(hidden))


class TestProgram:
    @pytest.mark.slow
    def test_before_decompositions(self):
        """A rewritten program can be decomposed."""
        model, program = exported("mixtral", "grouped_mm")
        profile, ids = random_profile(model), tokens()
        done = sere_compile.rewrite(program, profile=profile, config=S1).run_decompositions()
        close(logits(done, ids), oracle(model, profile, ids))

    @pytest.mark.slow
    def test_after_decompositions(self):
        """So is a whole model."""
        model, program = exported("qwen3_moe", "grouped_mm")
        profile, ids = random_profile(model), tokens()
        done = sere_compile.rewrite(program.run_decompositions(), profile=profile, config=S1)
        assert operators(done) == ["sere.reroute"] * LAYERS
        close(logits(done, ids), oracle(model, profile, ids))

    def test_strict_export(self):
        """A program traced through Dynamo."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        with torch.no_grad():
            program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=True)
        close(logits(sere_compile.rewrite(program, profile=profile, config=S1), ids), oracle(model, profile, ids))

    @pytest.mark.parametrize("unlifted", [False, True])
    def test_input_is_unchanged(self, unlifted):
        """The program that was passed in keeps its graph, signature, buffers and output; weights are shared."""
        model, program = exported("mixtral", "grouped_mm")
        traced = program.module() if unlifted else program
        graph = traced if unlifted else traced.graph_module
        before = (str(graph.graph), list(traced.state_dict() if unlifted else traced.state_dict))
        done = sere_compile.rewrite(traced, profile=random_profile(model), config=S1)
        assert (str(graph.graph), list(traced.state_dict() if unlifted else traced.state_dict)) == before
        assert torch.equal(logits(traced, tokens()), logits(model, tokens()))
        state = done.state_dict() if unlifted else done.state_dict
        name = "model.embed_tokens.weight"
        assert state[name].data_ptr() == model.get_parameter(name).data_ptr()

    def test_matrices_are_buffers(self):
        """Each gate's matrix is a buffer of its own, in the state dict and the signature."""
        model, program = exported("mixtral", "grouped_mm")
        profile = random_profile(model)
        done = sere_compile.rewrite(program, profile=profile, config=S1)
        added = [name for name in done.state_dict if name not in program.state_dict]
        assert len(added) == LAYERS
        assert set(added) <= set(done.graph_signature.buffers)
        for name, matrix in zip(added, profile.values(), strict=True):
            assert torch.equal(done.state_dict[name], matrix)

    def test_dynamic_batch_is_kept(self):
        """Range constraints survive, and a batch outside them is still refused."""
        model, program = exported("mixtral", "grouped_mm")
        done = sere_compile.rewrite(program, profile=random_profile(model), config=S1)
        assert str(done.range_constraints) == str(program.range_constraints)
        with pytest.raises(AssertionError, match="Guard failed"):
            logits(done, tokens(65))

    def test_threshold_and_minimum_reach_the_operator(self):
        """Options are those of the backend."""
        model, program = exported("qwen3_moe", "batched_mm")
        profile, ids = random_profile(model), tokens(2, 6)
        config = SereConfig(select_top_k=1, threshold=0.8, min_active=10)
        got = logits(sere_compile.rewrite(program, profile=profile, config=config), ids)
        close(got, oracle(model, profile, ids, threshold=0.8, min_active=10))
        assert not torch.allclose(got, oracle(model, profile, ids), atol=1e-3)

    def test_rewriting_twice_is_refused(self):
        """A second pass would re-route re-routed ids; it says that they are."""
        model, program = exported("mixtral", "grouped_mm")
        done = sere_compile.rewrite(program, profile=random_profile(model), config=S1)
        with pytest.raises(GateNotFoundError, match=SkipReason.REWRITTEN.value):
            sere_compile.rewrite(done, profile=random_profile(model), config=S1)

    def test_eager_experts_do_not_export(self):
        """With eager experts there is no program to rewrite: torch.export itself refuses their loop."""
        with pytest.raises(Exception, match=r"[Uu]nbacked|data-dependent|[Cc]ould not (guard|extract)") as caught:
            torch.export.export(build("mixtral", "eager"), (), {"input_ids": tokens(), "use_cache": False})
        assert "sere" not in type(caught.value).__module__


class TestMaxTokens:
    def test_static_batch(self):
        """A program for more tokens than max_tokens stays as it is, one for fewer is re-routed."""
        block, hidden = build("mixtral").model.layers[0].mlp, torch.randn(4, 6, 32)
        with torch.no_grad():
            program = torch.export.export(block, (hidden,))
        profile = SimilarityProfile({"gate.weight": symmetric(8)})
        for limit, found in ((23, []), (24, ["sere.reroute"])):
            config = SereConfig(select_top_k=1, max_tokens=limit)
            assert operators(sere_compile.rewrite(program, profile=profile, config=config)) == found

    def test_dynamic_batch(self):
        """A program for 12 to 384 tokens is decided by a limit outside of that range, and refused inside."""
        model, program = exported("mixtral", "grouped_mm")
        profile = random_profile(model)
        for limit, found in ((11, []), (384, ["sere.reroute"] * LAYERS)):
            config = SereConfig(select_top_k=1, max_tokens=limit)
            assert operators(sere_compile.rewrite(program, profile=profile, config=config)) == found
        with pytest.raises(ConfigError, match="max_tokens=100 lies inside the range"):
            sere_compile.rewrite(program, profile=profile, config=SereConfig(select_top_k=1, max_tokens=100))


class Logits(nn.Module):
    """Tensors in, tensors out, so that loading the program needs no class of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


LOAD = """
import sys, torch
import sere_compile.ops
program = torch.export.load(sys.argv[1])
ids, expected = torch.load(sys.argv[2])
with torch.no_grad():
    torch.testing.assert_close(program.module()(ids), expected, rtol=1e-5, atol=1e-5)
assert "transformers" not in sys.modules
print("sere.reroute" in str(program.graph))
"""


@pytest.mark.slow
def test_save_and_load(tmp_path):
    """A rewritten program is saved, and runs in a process that imports only the operators."""
    model, ids = build("qwen3_moe", "batched_mm"), tokens()
    profile = random_profile(model)
    with torch.no_grad():
        program = torch.export.export(Logits(model), (ids,))
    renamed = SimilarityProfile({f"model.{name}": matrix for name, matrix in profile.items()})
    torch.export.save(sere_compile.rewrite(program, profile=renamed, config=S1), tmp_path / "program.pt2")
    torch.save((ids, oracle(model, profile, ids)), tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "program.pt2"), str(tmp_path / "expected.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


def test_save_to_a_buffer():
    """Saving and loading in one process keeps every bit."""
    model, program = exported("mixtral", "grouped_mm")
    done = sere_compile.rewrite(program, profile=random_profile(model), config=S1)
    buffer = io.BytesIO()
    torch.export.save(done, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.export.load(buffer), tokens()), logits(done, tokens()))


class TestErrors:
    def test_profile_lacks_a_gate(self):
        """A profile is never completed by probing."""
        _, program = exported("mixtral", "grouped_mm")
        profile = SimilarityProfile({gate_names()[0]: torch.eye(8)})
        with pytest.raises(ProfileError, match=r"no matrix for the gate model\.layers\.1\.mlp\.gate\.weight; it has"):
            sere_compile.rewrite(program, profile=profile, config=S1)

    def test_profile_of_another_size(self):
        """Nor is a matrix cut or padded."""
        _, program = exported("mixtral", "grouped_mm")
        profile = SimilarityProfile({name: torch.eye(4) for name in gate_names()})
        with pytest.raises(ProfileError, match=r"is \[4, 4\], its gate has 8 experts"):
            sere_compile.rewrite(program, profile=profile, config=S1)

    def test_no_gate(self):
        """The nearest candidate is named, with its line."""

        class Sampler(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(8, 50)

            def forward(self, x):
                return torch.topk(self.head(x).softmax(-1), 3)

        program = torch.export.export(Sampler(), (torch.randn(4, 8),))
        with pytest.raises(GateNotFoundError, match=r"candidate is topk at test_rewrite\.py:\d+: no experts are found"):
            sere_compile.rewrite(program)

    @pytest.mark.parametrize("kind", [_Linear, _LinearLoop], ids=lambda kind: kind.__name__)
    def test_leaf_modules_of_symbolic_trace(self, kind):
        """A router that is an nn.Linear is one, and so are experts made of such: exact, and bit for bit with S = K."""
        module, x = kind(), torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
        graph = symbolic_trace(module)
        ShapeProp(graph).propagate(x)
        assert "call_module" in {node.op for node in graph.graph.nodes}
        matrix = symmetric(5)
        profile = SimilarityProfile({"gate.weight": matrix})
        same = sere_compile.rewrite(graph, profile=profile, config=SereConfig(select_top_k=2))
        with torch.no_grad():
            assert torch.equal(same(x), module(x))
            got = sere_compile.rewrite(graph, profile=profile, config=S1.replace(min_active=0))(x)
            weights, ids = module.route(x)
            torch.testing.assert_close(got, module.combine(x, weights, reroute_oracle(ids, matrix, 1)))
            assert not torch.allclose(got, module(x)), f"nothing is re-routed of {ids}"
        assert "call_module" in {node.op for node in graph.graph.nodes}, "the graph that was given stays"

    def test_no_shapes(self):
        """A bare symbolic_trace has the gate and not its sizes; the error says what records them."""
        with pytest.raises(GateNotFoundError, match=r"carry no shapes.*ShapeProp\(graph_module\)\.propagate"):
            sere_compile.rewrite(symbolic_trace(_Indexed()))

    def test_counting_is_refused(self):
        """A traced program has no counters, and does not pretend to."""
        with pytest.raises(ConfigError, match="collect_stats counts in models"):
            sere_compile.rewrite(symbolic_trace(_Indexed()), config=SereConfig(collect_stats=True))

    def test_every_option_is_used_or_refused(self):
        """An option that somebody adds to SereConfig is not ignored here without a word."""

        @dataclasses.dataclass(frozen=True)
        class Newer(SereConfig):
            flavour: str = "plain"

        sere_compile.rewrite(torch.export.export(_Indexed(), (torch.randn(4, 6),)), config=Newer(inner="eager"))
        with pytest.raises(ConfigError, match=r"flavour='odd' is for backend='sere'; .* takes max_active, max"):
            sere_compile.rewrite(symbolic_trace(_Indexed()), config=Newer(flavour="odd"))

    def test_no_selection(self):
        """A program without any top-k says so."""
        program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
        with pytest.raises(GateNotFoundError, match="no top-k selection at all"):
            sere_compile.rewrite(program)

    def test_every_gate_refused(self):
        """Gates that all have to stay are an error, not a copy of the input."""
        program = torch.export.export(_Masked(), (torch.randn(4, 6),))
        profile = SimilarityProfile({"router": symmetric(5)})
        with pytest.raises(GateNotFoundError, match="1 of 1 gates were refused: its dispatch reads the scores again"):
            sere_compile.rewrite(program, profile=profile, config=S1)

    def test_one_gate_refused(self, caplog):
        """One of two gates is logged as refused, its matrix is not kept; strict makes it an error."""

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.good, self.bad = _Indexed(), _Masked()

            def forward(self, x):
                return self.bad(self.good(x))

        x, matrix = torch.randn(4, 6), symmetric(5)
        program = torch.export.export(Two(), (x,))
        profile = SimilarityProfile({"good.router": matrix, "bad.router": matrix})
        with caplog.at_level(logging.WARNING):
            done = sere_compile.rewrite(program, profile=profile, config=S1)
        assert [r.message for r in caplog.records if "bad.router is not re-routed" in r.message]
        assert operators(done) == ["sere.reroute"]
        assert sum(name.startswith("sere_") for name in done.state_dict) == 1
        done.module()(x)
        with pytest.raises(GateNotFoundError, match="1 of 2 gates were refused"):
            sere_compile.rewrite(program, profile=profile, config=S1.replace(strict=True))


class _Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(5, 6))
        self.experts = nn.Parameter(torch.randn(5, 6, 6))

    def forward(self, x):
        weights, ids = torch.topk((x @ self.router.T).softmax(-1), 3)
        return ((x[:, None, None] @ self.experts[ids]).squeeze(2) * weights[..., None]).sum(1)


class _Masked(_Indexed):
    def forward(self, x):
        scores = (x @ self.router.T).softmax(-1)
        values, ids = torch.topk(scores, 3)
        gates = scores * torch.zeros_like(scores).scatter(1, ids, 1.0) / values.sum(-1, keepdim=True)
        return torch.einsum("te,ehd,th->td", gates, self.experts, x)


class TestProbing:
    @pytest.mark.parametrize("experts", EXPERTS)
    @pytest.mark.parametrize("unlifted", [False, True])
    def test_twins_are_found(self, experts, unlifted):
        """Without a profile the experts are run: two with equal weights are the most similar pair."""
        block = build("mixtral", experts).model.layers[0].mlp
        with torch.no_grad():
            for weight in (block.experts.gate_up_proj, block.experts.down_proj):
                weight[5] = weight[3]
            program = torch.export.export(block, (torch.randn(4, 6, 32),))
        done = sere_compile.rewrite(program.module() if unlifted else program, config=S1)
        state = done.state_dict() if unlifted else done.state_dict
        [matrix] = [state[name] for name in state if name.startswith("sere_similarity")]
        assert matrix[3, 5].item() == pytest.approx(1.0, abs=1e-3)
        assert matrix.clone().fill_diagonal_(-1).argmax().item() in (3 * 8 + 5, 5 * 8 + 3)
        hidden = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), oracle_routing(block, {"gate.weight": matrix}, 1):
            close((done if unlifted else done.module())(hidden), block(hidden))

    def test_program_agrees_with_the_backend(self):
        """The similarity of a program's gate is the one that the backend measures."""
        block, hidden = build("qwen3_moe").model.layers[0].mlp, torch.randn(4, 6, 32)
        with torch.no_grad():
            done = sere_compile.rewrite(torch.export.export(block, (hidden,)), config=S1)
            torch._dynamo.reset()
            backend = sere_compile.sere_backend.with_options(select_top_k=1, inner="eager")
            torch.compile(block, backend=backend)(hidden)
        entry = sere_compile.similarity.binding.lookup(block.gate.weight)
        close(done.state_dict["sere_similarity_0"], entry.matrix)

    @pytest.mark.parametrize("experts", EXPERTS)
    def test_any_batch_size(self, experts):
        """A program for any number of tokens has no numbers to run its experts with: the live model's are run."""
        block, hidden = build("qwen3_moe", experts).model.layers[0].mlp, torch.randn(4, 6, 32)
        free = {0: torch.export.Dim("batch", min=2, max=64)}
        with torch.no_grad():
            program = torch.export.export(block, (hidden,), dynamic_shapes=(free,))
            fixed = sere_compile.rewrite(torch.export.export(block, (hidden,)), config=S1)
        done = sere_compile.rewrite(program, config=S1)
        close(done.state_dict["sere_similarity_0"], fixed.state_dict["sere_similarity_0"])
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        told = r"cannot be probed: .*Give a profile, or rewrite while that model is"
        with pytest.raises(GateNotFoundError, match=told):
            sere_compile.rewrite(torch.export.load(buffer), config=S1)

    def test_experts_that_only_a_call_has(self):
        """Experts that are passed as an argument are no state that could be exchanged: nothing is proven, or probed."""

        class Passed(_Indexed):
            def forward(self, x, experts):
                weights, ids = torch.topk((x @ self.router.T).softmax(-1), 3)
                return ((x[:, None, None] @ experts[ids]).squeeze(2) * weights[..., None]).sum(1)

        program = torch.export.export(Passed(), (torch.randn(4, 6), torch.randn(5, 6, 6)))
        with pytest.raises(GateNotFoundError, match="no tensor with one row per token gathers what its experts give"):
            sere_compile.rewrite(program, config=S1)


def wanted_of(module, x, matrix):
    """The module's output with the definition's ids."""
    weights, ids = torch.topk((x @ module.router.T).softmax(-1), 3)
    new_ids = reroute_oracle(ids, matrix, 1)
    outputs = torch.einsum("th,ehd->ted", x, module.experts)
    return (outputs.gather(1, new_ids[..., None].expand(-1, -1, 6)) * weights[..., None]).sum(1)


def from_export(module, x):
    return torch.export.export(module, (x,))


def from_symbolic_trace(module, x):
    traced = symbolic_trace(module)
    ShapeProp(traced).propagate(x)
    return traced


def from_make_fx(module, x):
    return make_fx(module)(x)


def from_make_fx_with_symbols(module, x):
    return make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)


@pytest.mark.parametrize("trace", [from_export, from_symbolic_trace, from_make_fx, from_make_fx_with_symbols])
@pytest.mark.parametrize("probed", [False, True])
def test_hand_written_module(trace, probed):
    """A module without any library behind it, by every tracer, with a profile and probed: the definition's output."""
    module, x = _Indexed(), torch.randn(12, 6)
    traced = trace(module, x)
    if probed and trace is from_make_fx_with_symbols:
        with pytest.raises(GateNotFoundError, match="traced for any number of tokens"):
            sere_compile.rewrite(traced)
        return
    # make_fx names a weight itself.
    name = "router"
    if isinstance(traced, torch.fx.GraphModule):
        name = str(find_gates(traced).gates[0].router_weight.target)
    profile = None if probed else SimilarityProfile({name: symmetric(5)})
    done = sere_compile.rewrite(traced, profile=profile, config=SereConfig(select_top_k=1, min_active=0))
    state = done.state_dict() if isinstance(done, torch.fx.GraphModule) else done.state_dict
    matrix = state["sere_similarity_0"]
    assert probed or torch.equal(matrix, symmetric(5))
    with torch.no_grad():
        run = done if isinstance(done, torch.fx.GraphModule) else done.module()
        close(run(x), wanted_of(module, x, matrix))
        if trace is from_make_fx_with_symbols:
            close(run(x[:7]), wanted_of(module, x[:7], matrix))


def test_budget_of_active_experts():
    """select_top_k="auto" is decided by the operator, batch by batch, in a program as in a compiled model."""
    module, x, matrix = _Indexed(), torch.randn(12, 6), symmetric(5)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=1, max=64)},))
    config = SereConfig(select_top_k="auto", max_active=3, min_active=0)
    done = sere_compile.rewrite(program, profile=SimilarityProfile({"router": matrix}), config=config)
    with torch.no_grad():
        for tokens_of in (x[:1], x[:2], x):
            weights, ids = torch.topk((tokens_of @ module.router.T).softmax(-1), 3)
            new_ids = reroute_oracle(ids, matrix, 1, max_active=3)
            outputs = torch.einsum("th,ehd->ted", tokens_of, module.experts)
            wanted = (outputs.gather(1, new_ids[..., None].expand(-1, -1, 6)) * weights[..., None]).sum(1)
            close(done.module()(tokens_of), wanted)


def test_argument_called_like_a_builtin():
    """nn.Sequential calls its argument `input`, which fx would rename in a copy; the program's signature goes by it."""
    module, x, matrix = nn.Sequential(_Indexed()), torch.randn(12, 6), symmetric(5)
    done = sere_compile.rewrite(torch.export.export(module, (x,)), profile=SimilarityProfile({"0.router": matrix}))
    assert done.graph_signature.user_inputs == ("input",)
    alone = torch.export.export(module[0], (x,))
    alone = sere_compile.rewrite(alone, profile=SimilarityProfile({"router": matrix}))
    close(done.module()(x), alone.module()(x))


class _SharedRouter(nn.Module):
    """Two sets of experts behind one router, gathered or in a loop."""

    def __init__(self, block):
        super().__init__()
        self.first, self.second = block(), block()
        self.second.router = self.first.router
        with torch.no_grad():
            for parameter in self.second.parameters():
                if parameter is not self.first.router:
                    parameter.mul_(2)

    def forward(self, x):
        y = x + self.first(x)
        return y + self.second(y)


@pytest.mark.parametrize("dispatch", ["gathered", "loop"])
def test_a_router_of_two_sets_of_experts_is_refused(dispatch):
    """One matrix per router weight cannot describe both, however the experts are reached."""
    from .passes.moe_modules import ExpertLoop, Indexed, rows, similarity

    module = _SharedRouter(Indexed if dispatch == "gathered" else ExpertLoop)
    program = torch.export.export(module, (rows(),))
    matrix = similarity()
    profile = SimilarityProfile({"first.router": (matrix + matrix.T) / 2})
    with pytest.raises(GateNotFoundError, match="also selects from other experts"):
        sere_compile.rewrite(program, profile=profile, config=S1)
    torch._dynamo.reset()
    strict = sere_compile.compile(
        module, inner="eager", strict=True, capture="default" if dispatch == "gathered" else "auto"
    )
    with pytest.raises(Exception, match="also selects from other experts"):
        strict(rows())


class Balanced(nn.Module):
    """As many experts as tokens in the call that is traced, and a loss of the load beside the output."""

    def __init__(self, experts=8):
        super().__init__()
        self.gate = nn.Linear(16, experts, bias=False)
        self.stack = nn.Parameter(torch.randn(experts, 16, 16) / 4)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        load = nn.functional.one_hot(ids, len(self.stack)).to(x.dtype).sum(1).mean(0)
        return torch.einsum("th,tkhf,tk->tf", x, self.stack[ids], weights), (load * load).sum()


class TestAsManyTokensAsExperts:
    """What is free stays free, though the traced call could be taken for a matrix for each expert."""

    @pytest.mark.parametrize("select", [1, 2])
    def test_exported(self, select):
        model = Balanced().requires_grad_(False)
        free = ({0: torch.export.Dim("tokens", min=1, max=64)},)
        program = torch.export.export(model, (torch.randn(8, 16),), dynamic_shapes=free)
        profile = SimilarityProfile({"gate.weight": symmetric(8)})
        rewritten = sere_compile.rewrite(program, profile=profile, config=SereConfig(select_top_k=select, min_active=0))
        x = torch.randn(20, 16)
        got = rewritten.module()(x)[0]
        assert got.shape == (20, 16)
        if select == 2:
            assert torch.equal(got, program.module()(x)[0])

    def test_compiled(self):
        model = Balanced().requires_grad_(False)
        sere_compile.attach(model, SimilarityProfile({"gate.weight": symmetric(8)}))
        x = torch.randn(8, 16)
        torch._dynamo.mark_dynamic(x, 0)
        compiled = torch.compile(model, backend="sere", options={"select_top_k": 1, "inner": "eager"})
        assert compiled(x)[0].shape == (8, 16)


class _Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize("trace", ["make_fx", "export"])
def test_weights_that_come_with_each_call(trace):
    """Nobody has them to try; with S = K there is nothing to do."""

    class Functional(nn.Module):
        def forward(self, x, router, experts):
            weights, ids = (x @ router.T).softmax(-1).topk(2)
            return torch.einsum("th,tkhf,tk->tf", x, experts[ids], weights)

    given = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8, 16, 16)
    traced = make_fx(Functional())(*given) if trace == "make_fx" else torch.export.export(Functional(), given)
    with pytest.raises(GateNotFoundError, match="is an argument of the call, and no parameter or buffer of the model"):
        sere_compile.rewrite(traced, config=SereConfig(select_top_k=1))
    same = sere_compile.rewrite(traced, config=SereConfig(select_top_k=2))
    same = same if trace == "make_fx" else same.module()
    assert torch.equal(same(*given), Functional()(*given))


def test_a_layer_that_is_applied_twice():
    """Without a profile the second step shows the experts that the first cannot run."""
    from .passes.moe_modules import Indexed, rows

    program = torch.export.export(_Twice(Indexed()), (rows(),))
    done = sere_compile.rewrite(program, config=S1.replace(strict=True))
    assert sum("sere.reroute" in str(node.target) for node in done.graph.nodes) == 2
