"""Where a gate's matrix comes from: attached, of the model's profile, or probed."""

import copy
import functools
import logging
import types

import pytest
import torch
from torch import nn

import sere_compile
from sere_compile import ConfigError, ProbeError, ProfileError, SereConfig
from sere_compile.compiler import gate_matrices
from sere_compile.compiler.dynamo_graph import AppendedInput
from sere_compile.compiler.gate_matrices import appended_value, bind_weight, examples, find_matrix, named_entry
from sere_compile.compiler.gate_plan import GatePlan
from sere_compile.experts.owner import Owners
from sere_compile.experts.probe import probe_gate
from sere_compile.idle import tell_once
from sere_compile.passes import Evidence, Skip, SkipReason, extract_dispatch
from sere_compile.report import REWRITTEN, SKIPPED
from sere_compile.similarity import binding
from sere_compile.similarity.threshold import matrix_in_graph

from ..passes.moe_modules import EXPERTS, Indexed, from_make_fx, one_gate, rows
from ..passes.test_verify_rewrite import weights_of

MATRIX = torch.rand(EXPERTS, EXPERTS, generator=torch.Generator().manual_seed(1))
MATRIX = ((MATRIX + MATRIX.T) / 2).fill_diagonal_(1.0)


@pytest.fixture(autouse=True)
def untold():
    """Nothing was told before, and what is told here is forgotten."""
    for once in (tell_once, gate_matrices.warn_of_probing):
        once.reset()
    yield
    for once in (tell_once, gate_matrices.warn_of_probing):
        once.reset()


@pytest.fixture(scope="module")
def traced():
    """A gate whose experts are in the graph, and what the graph holds."""
    graph = from_make_fx(Indexed(), rows())
    return one_gate(graph), weights_of(graph)


def plan_of(traced, config=None, status=REWRITTEN, **known):
    gate, _ = traced
    config = config or SereConfig(select_top_k=1)
    return GatePlan(gate, "graph's name", config, config, extract_dispatch(gate), None, status=status, **known)


def fresh_weight():
    return nn.Parameter(torch.rand(EXPERTS, 6))


def no_owners():
    """Owners that are not asked."""

    def find(weight):
        raise AssertionError("the heap is searched for nothing")

    return types.SimpleNamespace(find=find)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.router = fresh_weight()


class TestExamples:
    def test_are_like_what_calls_bring(self, traced, monkeypatch):
        monkeypatch.setattr(torch, "empty", functools.partial(torch.empty, dtype=torch.float64))  # the user's default
        made = examples(plan_of(traced), torch.ones(2, dtype=torch.bfloat16))
        assert sorted(made) == ["projection", "similarity"]
        assert {(tuple(m.shape), m.dtype, m.device.type) for m in made.values()} == {
            ((EXPERTS, EXPERTS), torch.float32, "cpu")
        }

    def test_are_where_the_weight_is(self, traced):
        made = examples(plan_of(traced), torch.ones(2, device="meta"))
        assert {m.device.type for m in made.values()} == {"meta"}

    @pytest.mark.parametrize("threshold", [0.5, "q0.4"])
    def test_values_of_a_call(self, threshold, traced):
        """The matrix as the threshold has it, the coefficients, and a counter that stays one tensor."""
        weight, scale = fresh_weight(), torch.rand(EXPERTS, EXPERTS).fill_diagonal_(1.0)
        binding.assign(weight, "router", MATRIX, "profile", projection=scale)
        plan = plan_of(traced, SereConfig(select_top_k=1, threshold=threshold))

        def value(kind):
            return appended_value(AppendedInput(plan, kind), weight)

        assert torch.equal(value("similarity"), matrix_in_graph(MATRIX, threshold))
        assert torch.equal(value("projection"), scale)
        assert value("counts") is value("counts") is binding.lookup(weight).counts
        assert value("counts").dtype == torch.int64


class TestNames:
    def test_a_weight_that_is_bound(self, traced):
        weight = fresh_weight()
        binding.assign(weight, "router", MATRIX, "profile")
        entry = named_entry(plan_of(traced), weight, no_owners())
        assert entry is binding.lookup(weight)
        assert entry.name == "router"

    def test_a_matrix_of_another_size(self, traced):
        weight = fresh_weight()
        binding.assign(weight, "router", MATRIX[:5, :5], "profile")
        with pytest.raises(ProfileError, match=r"the matrix for router is \[5, 5\], its gate has 8 experts"):
            named_entry(plan_of(traced), weight, no_owners())

    def test_a_weight_that_no_module_holds(self, traced):
        weight = fresh_weight()
        entry = named_entry(plan_of(traced), weight, Owners())
        assert (entry.name, entry.matrix) == ("graph's name", None)
        assert binding.lookup(weight) is entry

    def test_a_model_without_a_profile(self, traced):
        model = Model()
        entry = named_entry(plan_of(traced), model.inner.router, Owners())
        assert (entry.name, entry.matrix) == ("inner.router", None)

    @pytest.mark.parametrize("known", [True, False])
    def test_a_copy_of_a_model_has_its_profile(self, known, traced):
        """Also where the weight has a name already, but no matrix."""
        model = Model()
        sere_compile.attach(model, sere_compile.SimilarityProfile({"inner.router": MATRIX}))
        copied = copy.deepcopy(model)
        weight = copied.inner.router
        if known:
            binding.name(weight, "earlier")
        entry = named_entry(plan_of(traced), weight, Owners())
        assert entry.name == "inner.router"
        assert torch.equal(entry.matrix, MATRIX)
        assert entry.from_profile

    def test_a_profile_without_the_gate(self, traced):
        model = Model()
        model._sere_profile = sere_compile.SimilarityProfile({"other.router": MATRIX})
        with pytest.raises(ProfileError, match=r"it has no matrix for the gate inner\.router"):
            named_entry(plan_of(traced), model.inner.router, Owners())


class TestFinding:
    """Before a gate is rewritten."""

    def test_a_bound_matrix_is_not_measured(self, traced):
        weight = fresh_weight()
        binding.assign(weight, "router", MATRIX, "profile")
        version = binding.version()
        assert find_matrix(plan_of(traced), weight, traced[1], no_owners()) is None
        assert binding.version() == version

    def test_experts_in_the_graph_are_run(self, traced, caplog):
        weight, plan = fresh_weight(), plan_of(traced)
        with caplog.at_level(logging.INFO, logger="sere_compile"):
            assert find_matrix(plan, weight, traced[1], Owners()) is None
        entry = binding.lookup(weight)
        wanted = probe_gate(plan.gate, plan.region, "any", weight, lambda: None, traced[1], "")
        assert torch.equal(entry.matrix, wanted.similarity)
        assert torch.equal(entry.projection, wanted.projection.fill_diagonal_(1.0))
        assert (entry.name, entry.source, entry.from_profile) == ("graph's name", "probed", False)
        told = [(r.levelname, r.message) for r in caplog.records if r.name == gate_matrices.__name__]
        assert [level for level, _ in told] == ["INFO", "WARNING"]
        assert f"probing its {EXPERTS} experts" in told[0][1]
        assert "no similarity profile is attached" in told[1][1]

    def test_it_is_only_asked_whether_they_could_be_run(self, traced):
        weight = fresh_weight()
        assert find_matrix(plan_of(traced), weight, traced[1], Owners(), probing=False) is None
        assert binding.lookup(weight).matrix is None

    @pytest.mark.parametrize("probing", [True, False])
    def test_experts_that_cannot_be_run(self, probing, traced):
        """A reason, and no error."""
        weight, plan = fresh_weight(), plan_of(traced)
        plan.region = Skip(SkipReason.NO_IDS, plan.gate.selection, "of nothing")
        refusal = find_matrix(plan, weight, traced[1], Owners(), probing=probing)
        assert (refusal.reason, refusal.node) == (SkipReason.NOT_PROBED, plan.gate.selection)
        assert refusal.evidence is Evidence.EXPERTS
        assert refusal.is_refused_gate
        assert refusal.detail.startswith("the experts of graph's name cannot be probed")
        assert "Attach a profile: sere_compile.attach(model, profile)" in refusal.detail
        assert binding.lookup(weight).matrix is None

    @pytest.mark.parametrize("probing", [True, False])
    def test_another_gate_with_the_same_router_shows_them(self, probing, traced):
        weight, plan, other = fresh_weight(), plan_of(traced), plan_of(traced)
        plan.region = Skip(SkipReason.NO_IDS, plan.gate.selection, "of nothing")
        plan.sharing = other.sharing = [other, plan]
        assert find_matrix(plan, weight, traced[1], Owners(), probing=probing) is None
        assert (binding.lookup(weight).matrix is not None) is probing
        other.region = Skip(SkipReason.NO_IDS, plan.gate.selection, "of nobody")
        assert "of nothing" in find_matrix(plan, fresh_weight(), traced[1], Owners(), probing=probing).detail

    def test_experts_beside_the_router_are_looked_for(self, traced, monkeypatch):
        """In the model that owns the weight, and as many as the gate has."""
        model, plan, asked = Model(), plan_of(traced), []
        plan.region = Skip(SkipReason.NO_IDS, plan.gate.selection, "")
        monkeypatch.setattr(gate_matrices, "find_experts", lambda owner, count: asked.append((owner.name, count)))
        assert find_matrix(plan, model.inner.router, traced[1], Owners(), probing=False) is not None
        assert asked == [("inner.router", EXPERTS)]


class TestBinding:
    """In each call with new weights."""

    @pytest.mark.parametrize("status", [SKIPPED, "identity"])
    def test_a_gate_that_is_not_rewritten_needs_none(self, status, traced):
        weight = fresh_weight()
        bind_weight(plan_of(traced, status=status), weight, traced[1], no_owners())
        assert binding.lookup(weight) is None

    def test_experts_are_probed(self, traced):
        weight = fresh_weight()
        bind_weight(plan_of(traced), weight, traced[1], Owners())
        assert binding.lookup(weight).source == "probed"
        assert binding.lookup(weight).matrix.shape == (EXPERTS, EXPERTS)

    def test_experts_that_cannot_be_run(self, traced):
        plan = plan_of(traced)
        plan.region = Skip(SkipReason.NO_IDS, plan.gate.selection, "")
        with pytest.raises(ProbeError, match="cannot be probed"):
            bind_weight(plan, fresh_weight(), traced[1], Owners())

    def test_a_gate_that_is_filled_needs_no_matrix(self, traced, caplog):
        """Nor is it said that a threshold on similarities cannot act."""
        weight, bound = fresh_weight(), fresh_weight()
        binding.assign(bound, "router", MATRIX, "profile")
        plan = plan_of(traced, SereConfig(select_top_k=1, threshold=2.0), is_filled=True)
        bind_weight(plan, weight, traced[1], Owners())
        bind_weight(plan, bound, traced[1], Owners())
        assert binding.lookup(weight).matrix is None
        assert binding.lookup(bound).judged == set()
        assert caplog.messages == []

    def test_other_options_than_those_in_the_graph(self, traced):
        weight = fresh_weight()
        binding.name(weight, "layers.3.router")
        given = SereConfig(select_top_k=1, per_gate={"layers.3.*": {"select_top_k": 2}})
        plan = plan_of(traced, given.for_gate("layers.2.router"))
        plan.given = given
        with pytest.raises(ConfigError, match=r"per_gate gives layers\.3\.router other options"):
            bind_weight(plan, weight, traced[1], Owners())
        plan.config = given.for_gate("layers.3.router")
        bind_weight(plan, weight, traced[1], Owners())

    def test_a_threshold_that_no_similarity_reaches_is_asked_about_once(self, traced, caplog, monkeypatch):
        asked, own = [], gate_matrices.never_reached
        monkeypatch.setattr(gate_matrices, "never_reached", lambda *of: asked.append(of) or own(*of))
        weight = fresh_weight()
        binding.assign(weight, "router", MATRIX, "profile")
        for threshold in (0.1, 1.0, 1.0, 0.1):
            bind_weight(plan_of(traced, SereConfig(select_top_k=1, threshold=threshold)), weight, traced[1], Owners())
        assert [of[0] for of in asked] == [0.1, 1.0]
        assert all(of[1] is binding.lookup(weight).matrix for of in asked)
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith("router: threshold=1 is above every similarity")

    def test_probed_matrices_are_asked_about_too(self, traced, caplog):
        weight = fresh_weight()
        bind_weight(plan_of(traced, SereConfig(select_top_k=1, threshold=1.0)), weight, traced[1], Owners())
        assert binding.lookup(weight).judged == {1.0}
        assert any("graph's name: threshold=1 is above" in message for message in caplog.messages)


def test_that_there_is_no_profile_is_said_once(caplog):
    warn = gate_matrices._ProbingWarning()
    for _ in range(3):
        warn()
    assert len(caplog.messages) == 1
    warn.reset()
    warn()
    assert len(caplog.messages) == 2
    assert isinstance(gate_matrices.warn_of_probing, gate_matrices._ProbingWarning)
