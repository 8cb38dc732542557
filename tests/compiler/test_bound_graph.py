"""One graph for many layers: each call gets the matrices of its own router weights."""

import copy
import logging
import sys
import threading
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sere_compile
from sere_compile import ProbeError, SereConfig, sere_backend
from sere_compile.compiler import bound_graph, missing_gates
from sere_compile.compiler.bound_graph import BoundGraph
from sere_compile.compiler.dynamo_graph import AppendedInput
from sere_compile.report import IDENTITY, REWRITTEN
from sere_compile.similarity import binding

from ..compiled import CountingInner, logits, oracle_logits
from ..passes.moe_modules import Indexed, expected, rows
from ..tiny_models import EAGER_SLOW, IMPLEMENTATIONS, TOP_K, build, gate_names, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
FIRST = {"select_top_k": 1, "min_active": 0, "inner": "eager"}


class TestBinding:
    def test_one_graph_serves_layers_with_a_matrix_each(self):
        """Layers compiled one by one share one graph, and each still gets its own matrix."""
        model, ids = build("qwen3_moe"), tokens()
        profile = random_profile(model)
        expected = oracle_logits(model, profile, ids, 1)
        swapped = dict(zip(profile, reversed(list(profile.values())), strict=True))
        assert not torch.allclose(expected, oracle_logits(model, swapped, ids, 1), atol=1e-4), "layers look alike"
        sere_compile.attach(model, profile)
        counter = CountingInner()
        for layer in model.model.layers:
            layer.compile(backend=sere_backend.with_options(select_top_k=1, inner=counter))
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
        assert counter.graphs == 1

    def test_an_identity_gate_never_looks_for_its_owner(self, monkeypatch):
        """S = K: the search through all live objects does not run, however often layers take turns in one graph."""
        model, ids = build("qwen3_moe"), tokens()
        searched = []
        monkeypatch.setattr("sere_compile.experts.owner.live_modules", lambda: searched.append(1) or [])
        for layer in model.model.layers:
            layer.compile(backend=sere_backend.with_options(select_top_k=TOP_K["qwen3_moe"], inner="eager"))
        for _ in range(2):
            logits(model, ids)
        assert searched == []

    @pytest.mark.parametrize("change", ["deepcopy", "load_state_dict"])
    def test_profile_follows_the_model(self, change):
        """A copy of the model, and weights assigned to it after attaching, have the profile; nothing is probed."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        expected = oracle_logits(model, profile, ids, 1)
        sere_compile.attach(model, profile)
        if change == "deepcopy":
            model = copy.deepcopy(model)
        else:
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_default_dtype_does_not_matter(self, dtype):
        """The matrix is float32 to the inner compiler whatever torch's default dtype is."""
        model, ids = build("mixtral"), tokens()
        profile = random_profile(model)
        expected = oracle_logits(model, profile, ids, 1)
        sere_compile.attach(model, profile)
        seen = []

        def inner(graph, inputs):
            seen.extend(n for n in graph.graph.find_nodes(op="placeholder") if "sere_similarity" in n.name)
            return graph.forward

        torch.set_default_dtype(dtype)
        try:
            compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner=inner))
            got = logits(compiled, ids)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert [node.meta["example_value"].dtype for node in seen] == [torch.float32] * 2

    def test_threads_share_a_graph(self):
        """Threads that run different layers through one graph get each its own layer's matrix."""
        model = build("qwen3_moe", "batched_mm")
        profile = random_profile(model)
        sere_compile.attach(model, profile)
        blocks = [layer.mlp for layer in model.model.layers]
        backend = sere_compile.SereBackend(SereConfig(select_top_k=1, inner="eager"))
        bound = []
        original = sere_compile.backend.BoundGraph

        class Kept(original):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                bound.append(self)

        sere_compile.backend.BoundGraph = Kept
        try:
            for block in blocks:
                block.compile(backend=backend)
                with torch.no_grad():
                    block(torch.randn(4, 2, 32))
        finally:
            sere_compile.backend.BoundGraph = original
        [graph] = bound
        weights = [block.gate.weight for block in blocks]
        expected = [profile[name] for name in gate_names()]
        position = graph._plans[0].position
        wrong = []

        def run(index):
            arguments = [None] * position + [weights[index]]
            for _ in range(2000):
                if not torch.equal(graph.bind(arguments)[0], expected[index]):
                    wrong.append(index)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not wrong

    def test_attaching_another_profile_needs_no_recompile(self):
        """A compiled model uses the profile that is attached now."""
        model, ids = build("mixtral"), tokens()
        counter = CountingInner()
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner=counter))
        for seed in (1, 2):
            profile = random_profile(model, seed)
            sere_compile.attach(model, profile)
            expected = oracle_logits(model, profile, ids, 1)
            torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)
        assert counter.graphs == 1

    def test_profile_that_lacks_a_gate_is_an_error(self):
        """A model with a profile never falls back to probing for the gates the profile lacks."""
        model, ids = build("mixtral"), tokens()
        model._sere_profile = sere_compile.SimilarityProfile({gate_names()[0]: torch.ones(8, 8)})
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"no matrix for the gate model\.layers\.1"):
            logits(compiled, ids)

    @pytest.mark.parametrize("experts", EAGER_SLOW)
    def test_probing_measures_the_experts(self, experts, caplog):
        """With nothing attached, twins are found by probing and the log says so once."""
        model, ids = build("mixtral", experts), tokens()
        twins = (3, 5)
        with torch.no_grad():
            for layer in model.model.layers:
                for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                    weight[twins[1]] = weight[twins[0]]
        sere_compile.compiler.gate_matrices.warn_of_probing.reset()
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
        with caplog.at_level(logging.WARNING):
            logits(compiled, ids)
        assert sum("experts are probed" in record.message for record in caplog.records) == 1
        for gate in gate_names():
            entry = sere_compile.similarity.binding.lookup(model.get_parameter(gate))
            matrix = entry.matrix.clone().fill_diagonal_(-1)
            assert entry.name == gate
            assert matrix[twins].item() == pytest.approx(1.0, abs=1e-3)
            assert matrix.argmax().item() in (3 * 8 + 5, 5 * 8 + 3)

    def test_probing_a_block_compiled_alone(self):
        """A compiled MoE block, whose hidden states are an input of its graph, measures what the model does."""
        matrices = []
        for alone in (False, True):
            torch._dynamo.reset()
            model = build("mixtral")
            backend = sere_backend.with_options(select_top_k=1, inner="eager")
            if alone:
                for layer in model.model.layers:
                    layer.mlp.compile(backend=backend)
                logits(model, tokens())
            else:
                logits(torch.compile(model, backend=backend), tokens())
            matrices.append(sere_compile.similarity.binding.lookup(model.get_parameter(gate_names()[1])).matrix)
        torch.testing.assert_close(matrices[1], matrices[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_probing_agrees_between_implementations(self):
        """The traced dispatch region and the experts module give the same matrix."""
        matrices = []
        for experts in IMPLEMENTATIONS:
            torch._dynamo.reset()
            model = build("qwen3_moe", experts)
            compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager"))
            logits(compiled, tokens())
            matrices.append(sere_compile.similarity.binding.lookup(model.get_parameter(gate_names()[1])).matrix)
        torch.testing.assert_close(matrices[1], matrices[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(matrices[2], matrices[0], rtol=1e-4, atol=1e-5)


class Unreachable(nn.Module):
    """A loop over experts of the graph with weights of its own for each: its dispatch cannot be run by itself."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.router = nn.Parameter(torch.randn(6, 8, generator=generator))
        self.experts = nn.Parameter(torch.randn(6, 8, 8, generator=generator))

    def forward(self, x):
        weights, ids = (x @ self.router.T).softmax(-1).topk(3)
        y = 0.0
        for expert in range(6):
            share = (weights * (ids == expert)).sum(-1, keepdim=True)
            y = y + torch.tanh(x @ self.experts[expert]) * share
        return y


class TestUnprobed:
    """Experts that cannot be run to measure a matrix: the gate stays as it is, with a reason, and nothing stops."""

    def test_is_refused_with_a_reason(self, caplog):
        model, x = Unreachable(), torch.randn(5, 8)
        with caplog.at_level(logging.WARNING), torch.no_grad():
            got = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, min_active=0, inner="eager"))(
                x
            )
        assert torch.equal(got, model(x))
        [told] = [record.message for record in caplog.records if "is not re-routed" in record.message]
        assert "router cannot be probed" in told
        assert "Attach a profile" in told
        assert not any("experts are probed" in record.message for record in caplog.records)
        report = sere_compile.explain(model, x, config=SereConfig(select_top_k=1))
        assert [row.status for row in report] == ["skipped"]
        assert "router cannot be probed" in report.rows[0].reason

    def test_is_an_error_where_that_was_asked_for(self):
        backend = sere_backend.with_options(select_top_k=1, inner="eager", strict=True)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="router cannot be probed"):
            torch.compile(Unreachable(), backend=backend)(torch.randn(5, 8))

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_later_layer_of_the_same_graph(self, strict, caplog):
        """One layer's experts give infinity: it runs as it was, the layer before stays re-routed."""
        model = build("mixtral")
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj.fill_(float("inf"))
        hidden = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        backend = sere_backend.with_options(select_top_k=1, min_active=0, inner="eager", strict=strict)
        blocks = [layer.mlp for layer in model.model.layers]
        plain = [block(hidden) for block in blocks]
        for block in blocks:
            block.compile(backend=backend)
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            assert not torch.equal(as_tensor(blocks[0](hidden)), as_tensor(plain[0]))
            if strict:
                with pytest.raises(ProbeError, match="hold NaN or infinity"):
                    blocks[1](hidden)
                return
            for _ in range(2):
                torch.testing.assert_close(as_tensor(blocks[1](hidden)), as_tensor(plain[1]), equal_nan=True)
        assert sum("hold NaN or infinity" in record.message for record in caplog.records) == 1


class Pair(nn.Module):
    """Two layers, whose routers may be one."""

    def __init__(self, *, tied):
        super().__init__()
        self.first, self.second = Indexed(), Indexed()
        with torch.no_grad():
            for parameter in self.second.parameters():
                parameter.mul_(2)
        if tied:
            self.second.router = self.first.router

    def forward(self, x):
        return self.second(x + self.first(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_later_model_whose_routers_are_one(strict, caplog):
    """Dynamo uses the graph of a model with two; one matrix cannot describe two sets of experts."""
    apart, tied, x = Pair(tied=False), Pair(tied=True), rows()
    backend = sere_backend.with_options(select_top_k=1, min_active=0, inner="eager", strict=strict)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        plain = tied(x)
        assert not torch.allclose(torch.compile(apart, backend=backend)(x), apart(x), atol=1e-3)
        compiled = torch.compile(tied, backend=backend)
        if strict:
            with pytest.raises(Exception, match="also selects from other experts"):
                compiled(x)
            return
        for _ in range(2):
            assert torch.equal(compiled(x), plain)
    assert sum("also selects from other experts" in record.message for record in caplog.records) == 2


class TwiceApplied(nn.Module):
    """One layer for both steps: what its first routing weights scale is behind the second routing too."""

    def __init__(self):
        super().__init__()
        self.layer = Indexed()

    def forward(self, x):
        for _ in range(2):
            x = x + self.layer(x)
        return x


def test_a_layer_that_is_applied_twice(caplog):
    """The second step shows the experts that the first cannot run."""
    model, x = TwiceApplied(), rows()
    with torch.no_grad():
        found = torch.compile(model, backend=sere_backend.with_options(**FIRST, strict=True))(x)
        wanted = x
        for _ in range(2):
            wanted = wanted + expected(model.layer, wanted, binding.lookup(model.layer.router).matrix, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not any("is not re-routed" in message for message in caplog.messages)


class LightOnesOff(Indexed):
    """Experts that weigh little are left out: nothing shows which of the weights are the routing weights."""

    def dispatch(self, x, ids, weights):
        return super().dispatch(x, ids, weights * (weights > 0.3 * weights[:, :1]))


@pytest.mark.parametrize("substitution", ["reroute", "projection", "fill"])
@pytest.mark.parametrize("strict", [False, True])
def test_experts_that_can_neither_be_run_nor_filled(substitution, strict, caplog):
    """A program that runs without us is not stopped, unless that is asked for."""
    block, x = LightOnesOff(), rows()
    backend = sere_backend.with_options(**FIRST, substitution=substitution, strict=strict)
    with torch.no_grad():
        if strict:
            with pytest.raises(Exception, match=r"strict=True, and router cannot be re-routed"):
                torch.compile(block, backend=backend)(x)
            return
        assert torch.equal(torch.compile(block, backend=backend)(x), block(x))
    [message] = [message for message in caplog.messages if "is not re-routed" in message]
    assert "its experts cannot be run" in message
    assert ("it cannot be filled: " in message) is (substitution == "fill")


def as_tensor(result):
    return result[0] if isinstance(result, tuple) else result


def by_hand(monkeypatch, status=REWRITTEN, **options):
    """A graph of one gate, whose weight is its only input; what runs, and what is asked to bind."""
    config = SereConfig(select_top_k=1, **options)
    plan = types.SimpleNamespace(status=status, weight=lambda arguments: arguments[0], config=config, name="router")
    graph = types.SimpleNamespace(
        own_inputs=types.SimpleNamespace(values_of=lambda arguments: None), appended=[AppendedInput(plan, "similarity")]
    )
    ran, bound = [], []
    monkeypatch.setattr(bound_graph, "bind_weight", lambda plan, weight, *more: bound.append(weight))
    monkeypatch.setattr(bound_graph, "appended_value", lambda item, weight: weight + 1)
    made = BoundGraph(lambda *given: ran.append(given), lambda *given: ran.append("as it was"), graph, [plan])
    return made, ran, bound


class TestByHand:
    def test_extra_inputs_are_kept_while_weights_stay(self, monkeypatch):
        made, ran, bound = by_hand(monkeypatch)
        first, second = torch.zeros(2), torch.ones(2)
        for weight in (first, first, second, first):
            made(weight)
        assert [id(weight) for weight in bound] == [id(first), id(second), id(first)]
        assert [(a is w, b.tolist()) for (a, b), w in zip(ran, (first, first, second, first), strict=True)] == [
            (True, [1.0, 1.0]), (True, [1.0, 1.0]), (True, [2.0, 2.0]), (True, [1.0, 1.0])
        ]  # fmt: skip
        assert ran[0][1] is ran[1][1]

    def test_another_matrix_is_asked_for(self, monkeypatch):
        made, _, bound = by_hand(monkeypatch)
        weight = torch.zeros(2)
        made(weight)
        binding.assign(torch.zeros(3), "elsewhere", torch.eye(2), "profile")
        made(weight)
        assert len(bound) == 2

    @pytest.mark.parametrize(("status", "rewritten"), [(REWRITTEN, 1), (IDENTITY, 0)])
    def test_what_ran_is_counted(self, status, rewritten, monkeypatch):
        """A graph in which nothing is re-routed counts as one with gates."""
        made, _, _ = by_hand(monkeypatch, status)
        runs = missing_gates.runs
        before = runs.graphs, runs.with_gates, runs.rewritten
        made(torch.zeros(2))
        after = runs.graphs, runs.with_gates, runs.rewritten
        assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, rewritten]

    def test_a_layer_whose_experts_cannot_be_run(self, monkeypatch, caplog):
        """It is asked about once, runs as it was, and counts as no re-routed graph; other layers do."""
        made, ran, _ = by_hand(monkeypatch)
        bad, good, asked = torch.zeros(2), torch.ones(2), []

        def bind(plan, weight, *more):
            asked.append(weight)
            if weight is bad:
                raise ProbeError("no")

        monkeypatch.setattr(bound_graph, "bind_weight", bind)
        monkeypatch.setattr(bound_graph, "unprobed", lambda plan, error: f"because {error}")
        before = missing_gates.runs.rewritten
        for weight in (bad, bad, good):
            made(weight)
        assert ran[:2] == ["as it was"] * 2
        assert len(ran[2]) == 2
        assert len(asked) == 2
        assert missing_gates.runs.rewritten == before + 1
        assert caplog.messages == ["a layer with the code of router is not re-routed: because no"]

    def test_strict_raises_that_each_time(self, monkeypatch):
        made, ran, _ = by_hand(monkeypatch, strict=True)

        def bind(*of):
            raise ProbeError("no")

        monkeypatch.setattr(bound_graph, "bind_weight", bind)
        for _ in range(2):
            with pytest.raises(ProbeError, match="no"):
                made(torch.zeros(2))
        assert ran == []

    def test_who_watches_is_told_until_it_has_seen_enough(self, monkeypatch):
        made, _, _ = by_hand(monkeypatch)
        seen = []
        made._watch = lambda weights: seen.append(weights) or len(seen) == 2
        weight = torch.zeros(2)
        for _ in range(4):
            made(weight)
        assert len(seen) == 2
        assert all(one is weight for [one] in seen)


@pytest.fixture
def small_buckets(monkeypatch):
    """Buckets of DistributedDataParallel end at 2 KB: more than a gate and its experts, less than `Wide`'s layers."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2000)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield lambda model: nn.parallel.DistributedDataParallel(model, bucket_cap_mb=2000 / 2**20)
    dist.destroy_process_group()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("sere_compile")]


class Wide(nn.Module):
    """Experts between layers that fill a bucket each, or between `ids` and experts, if these are `ahead`."""

    def __init__(self, ahead=False):
        super().__init__()
        self.first, self.last = nn.Linear(6, 500), nn.Linear(500, 6)
        self.experts, self.ahead = Indexed(), ahead

    def forward(self, x):
        if self.ahead:
            ids, weights = self.experts.route(x)
            return self.experts.dispatch(self.last(self.first(x)), ids, weights)
        return x + self.last(self.first(self.experts(self.last(self.first(x)))))


class TestBucketsOfDistributedDataParallel:
    """Dynamo cuts its graph at them, and compiles each piece with fake tensors, parameters included."""

    @pytest.mark.parametrize("inner", [CountingInner(), "aot_eager"], ids=["counting", "aot_eager"])
    @pytest.mark.parametrize("attached", [True, False])
    def test_each_piece_is_bound_to_its_weights(self, small_buckets, caplog, inner, attached):
        """As the model without them, also where each piece is run on fake tensors first."""
        options = {"select_top_k": 1, "min_active": 0, "strict": True}
        model = Wide()
        if attached:
            matrix = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
            sere_compile.attach(model, sere_compile.SimilarityProfile({"experts.router": matrix + matrix.T}))
        expected = torch.compile(model, backend="sere", options={**options, "inner": "eager"})(rows())
        assert not torch.allclose(expected, model(rows()), atol=1e-4)
        torch._dynamo.reset()
        caplog.clear()
        if not attached:  # probed anew
            binding.forget(model.experts.router)
        parallel = torch.compile(small_buckets(model), backend="sere", options={**options, "inner": inner})
        for _ in range(2):
            torch.testing.assert_close(parallel(rows()), expected, rtol=1e-5, atol=1e-5)
        assert said(caplog) == []
        assert not isinstance(inner, CountingInner) or inner.graphs > 1
        parallel(rows()).sum().backward()
        assert model.experts.router.grad is not None

    def test_a_cut_between_router_and_experts(self, small_buckets, caplog):
        model = Wide(ahead=True)
        expected = model(rows())
        parallel = torch.compile(
            small_buckets(model), backend=sere_backend.with_options(select_top_k=1, min_active=0, inner="aot_eager")
        )
        torch.testing.assert_close(parallel(rows()), expected, rtol=1e-5, atol=1e-5)
        [message] = said(caplog)
        assert "the buckets of DistributedDataParallel cut the graph" in message
        assert "torch._dynamo.config.optimize_ddp = False" in message
