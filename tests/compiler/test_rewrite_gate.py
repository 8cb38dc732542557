"""What is proven of real models before they are re-routed, and what is refused."""

import dataclasses
import functools
import types

import pytest
import torch

import sere_compile
from sere_compile import SereConfig, sere_backend
from sere_compile.compiler import rewrite_gate
from sere_compile.compiler.gate_plan import GatePlan
from sere_compile.compiler.outside.compare_versions import Verdict
from sere_compile.passes import COUNTED, Evidence, Proof, Skip, SkipReason
from sere_compile.passes.graph import nodes
from sere_compile.passes.verify_rewrite import SHOWN
from sere_compile.report import REWRITTEN, SKIPPED

from ..compiled import logits
from ..passes.moe_modules import Indexed, ScatterCombine, expected, from_dynamo, one_gate, rows, similarity
from ..passes.test_check_savings import Returning, by_table
from ..tiny_models import EAGER_SLOW, PAIRS, build, random_profile, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class TestVerification:
    """Each gate is run at compile time, as traced and re-routed."""

    @pytest.mark.parametrize(("name", "experts"), PAIRS)
    def test_right_rewrites_are_proven(self, name, experts):
        """Every experts implementation passes, and computes what it computes without the proof."""
        model, ids = build(name, experts), tokens()
        sere_compile.attach(model, random_profile(model))
        results = []
        for strict in (True, False):
            torch._dynamo.reset()
            backend = sere_backend.with_options(select_top_k=1, inner="eager", strict=strict)
            results.append(logits(torch.compile(model, backend=backend), ids))
        assert torch.equal(*results)

    @pytest.mark.parametrize("experts", [pytest.param("grouped_mm", marks=pytest.mark.slow), *EAGER_SLOW[1:]])
    def test_report_says_what_was_proven(self, experts):
        """Inside a graph the definition; of a loop outside it too, by running that."""
        config = SereConfig(select_top_k=1)
        report = sere_compile.explain(build("qwen3_moe", experts), tokens(), use_cache=False, config=config)
        outside = f"{SHOWN}; the code outside the graph was run"
        assert {row.proof for row in report.rewritten} == {outside if experts == "eager" else SHOWN}
        assert "proven" in str(report)

    @pytest.mark.slow
    def test_experts_outside_that_no_rewrite_serves_are_refused(self, monkeypatch):
        """The mean of a token's distinct experts: a report row, and with strict=True an error."""
        model, ids = build("qwen3_moe", "eager"), tokens()
        experts = type(model.model.layers[0].mlp.experts)
        forward = experts.forward

        def mean_of_distinct(self, hidden_states, top_k_index, top_k_weights):
            again = (top_k_index[..., None] == top_k_index[..., None, :]).tril(-1).any(-1)
            share = (~again).to(top_k_weights)
            return forward(self, hidden_states, top_k_index, share / share.sum(-1, keepdim=True))

        monkeypatch.setattr(experts, "forward", mean_of_distinct)
        report = sere_compile.explain(model, ids, use_cache=False, config=SereConfig(select_top_k=1))
        assert {row.status for row in report} == {"skipped"}
        assert "run with the code that receives its ids" in report.rows[0].reason
        compiled = torch.compile(model, backend=sere_backend.with_options(select_top_k=1, inner="eager", strict=True))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="run with the code that receives its ids"):
            logits(compiled, ids)

    def test_a_wrong_rule_is_put_right(self, monkeypatch):
        """A dispatch that loses a slot is taken for one that sums both: it is merged all the same."""
        monkeypatch.setattr("sere_compile.passes.gate.UseKind.sums_duplicates", property(lambda kind: True))
        block = ScatterCombine()
        matrix = similarity()
        matrix = (matrix + matrix.T) / 2
        sere_compile.attach(block, sere_compile.SimilarityProfile({"router": matrix}))
        options = {"select_top_k": 1, "inner": "eager", "min_active": 0}
        with torch.no_grad():
            got = torch.compile(block, backend="sere", options=options)(rows())
            torch.testing.assert_close(got, expected(block, rows(), matrix.fill_diagonal_(1.0), 1))


class InsideActivation(Indexed):
    """Weights inside the activation: new ids are right, and no coefficient may be multiplied to the weights."""

    def dispatch(self, x, ids, weights):
        made = (x[:, None, None, :] @ self.experts[ids]).squeeze(2)
        return torch.tanh(made * weights[..., None]).sum(1)


@pytest.mark.parametrize(("block", "proven"), [(InsideActivation, False), (Indexed, True)])
def test_what_is_refused_is_not_called_proven(block, proven, caplog):
    """With projections the weights change as well: that new ids alone were proven is no news of a refused gate."""
    model, config = block(), SereConfig(select_top_k=1, min_active=0, substitution="projection", inner="eager")
    matrix = similarity()
    matrix = ((matrix + matrix.T) / 2).fill_diagonal_(1.0)
    sere_compile.attach(model, sere_compile.SimilarityProfile({"router": matrix}, projections={"router": matrix}))
    with caplog.at_level("INFO", logger="sere_compile"), torch.no_grad():
        torch.compile(model, backend=sere_compile.SereBackend(config))(rows())
    assert ("is not re-routed" in caplog.text) != proven
    assert ("proven:" in caplog.text) == proven


def test_other_weights_in_a_functional_call_are_not_re_routed_in_silence(caplog):
    """The profile belongs to the model's own router weight, and the call brings another one."""
    model, x = ScatterCombine(), rows()
    matrix = similarity()
    sere_compile.attach(model, sere_compile.SimilarityProfile({"router": (matrix + matrix.T) / 2}))
    others = {name: torch.randn_like(value) for name, value in model.named_parameters()}

    def call(x):
        return torch.func.functional_call(model, others, (x,))

    backend = sere_backend.with_options(select_top_k=1, min_active=0, inner="eager")
    with torch.no_grad(), caplog.at_level("WARNING"):
        got = torch.compile(call, backend=backend)(x)
    assert torch.equal(got, call(x))
    assert any("is not re-routed" in record.message for record in caplog.records)


class TestWords:
    """What a report says of the passes for speed."""

    @pytest.mark.parametrize(
        ("done", "refused", "said"),
        [
            ((), {}, ""),
            (("fuse_experts",), {}, "experts"),
            (("verify_rewrite", "fuse_experts", "fuse_router", "fuse_reroute"), {}, "experts and routing"),
            (("fuse_router",), {"fuse_experts": "why"}, "routing; stock experts: why"),
            (
                (),
                {"fuse_experts": "why", "fuse_router": "so", "fuse_reroute": "no"},
                "stock experts: why; stock routing: so",
            ),
        ],
        ids=str,
    )
    def test_kernels(self, done, refused, said):
        assert rewrite_gate._kernels(types.SimpleNamespace(done=done, refused=refused)) == said


class TestSavings:
    """Where every expert computes every token, re-routing is right, and saves nothing."""

    def test_it_is_told(self, caplog):
        """In the report and the log; S = K is still the model's own."""
        block, x = Returning(by_table), rows()
        sere_compile.attach(block, sere_compile.SimilarityProfile({"router": symmetric()}))
        [row] = sere_compile.explain(block, x, config=SereConfig(select_top_k=1, min_active=0))
        assert (row.status, row.reason.split(",")[0]) == ("rewritten", "every expert computes every token")
        assert "WARNING" in caplog.text
        assert "is re-routed, but every expert computes every token" in caplog.text

    def test_nothing_is_told_of_others(self, caplog):
        block, x = Indexed(), rows()
        sere_compile.attach(block, sere_compile.SimilarityProfile({"router": symmetric()}))
        [row] = sere_compile.explain(block, x, config=SereConfig(select_top_k=1, min_active=0))
        assert (row.status, row.reason) == ("rewritten", "")
        assert "every expert" not in caplog.text


def symmetric():
    return ((similarity() + similarity().T) / 2).fill_diagonal_(1.0)


@pytest.fixture(scope="module")
def gate():
    return one_gate(from_dynamo(Indexed(), rows()))


class Traced:
    """A graph that is being rewritten, as far as it is asked."""

    fuses_experts, takes_kernels, has_gradients, others_follow, is_piece = False, True, True, False, False

    def __init__(self, gate, values=()):
        self.module = gate.selection.graph.owning_module
        self.values, self.placed, self.dropped = dict(values), [], []

    def value_of(self, node):
        return self.values.get(node)

    def place(self, plan, kind, value):
        self.placed.append((kind, value))
        return plan.gate.ids

    def drop_unused(self, plan):
        self.dropped.append(plan)


WEIGHT = torch.zeros(8, 6)
MATRICES = {"similarity": torch.eye(8), "projection": torch.ones(8, 8)}


def plan_of(gate, **options):
    config = SereConfig(select_top_k=1, **options)
    region = Skip(SkipReason.READS_OTHERS, gate.ids)
    return GatePlan(gate=gate, name="router", config=config, given=config, region=region, constant=None, position=0)


class TestByHand:
    """A gate on its way through passes that are told what to do."""

    @staticmethod
    def taken(gate, monkeypatch, does=lambda run: None, refusal=None, **options):
        """The plan of a gate behind passes that do this and refuse so, with the graph, the run and its switches."""
        plan, graph, seen = plan_of(gate, **options), Traced(gate), {}

        def passes(run, is_on):
            seen.update(run=run, is_on=is_on)
            does(run)
            return refusal

        monkeypatch.setattr(rewrite_gate, "run_pipeline", passes)
        given = rewrite_gate.rewrite_gate(plan, graph, MATRICES, WEIGHT, None, lambda: None)
        assert given is refusal
        return plan, graph, seen

    @staticmethod
    def rewritten(gate, merged=True, filled=False, **refused):
        other = dataclasses.replace(gate, top_k=2)

        def does(run):
            run.proof = Proof(other, merged, None, frozenset(), "as shown")
            run.rewrite = types.SimpleNamespace(merged=merged, filled=filled)
            run.done.append("fuse_router")
            run.refused.update(refused)

        return other, does

    @pytest.mark.parametrize(("merged", "filled"), [(True, False), (False, True)])
    def test_what_was_done_is_recorded(self, gate, monkeypatch, caplog, merged, filled):
        other, does = self.rewritten(gate, merged, filled, fuse_experts="no kernel")
        with caplog.at_level("INFO", logger="sere_compile"):
            plan, graph, _ = self.taken(gate, monkeypatch, does)
        assert (plan.status, plan.gate, plan.proof) == (REWRITTEN, other, "as shown")
        assert (plan.merged, plan.is_filled) == (merged, filled)
        assert (plan.kernels, plan.unfused) == ("routing; stock experts: no kernel", "no kernel")
        assert (plan.reason, plan.fallback, graph.dropped) == ("", "", [])
        assert "router: proven: S = K changes no bit; S < K gives as shown" in caplog.text
        assert "router keeps its experts: no kernel" in caplog.text

    def test_a_refusal(self, gate, monkeypatch, caplog):
        """What was placed for it goes; what was proven of it before stays unsaid."""
        other, _ = self.rewritten(gate)
        skip = Skip(SkipReason.UNVERIFIED, gate.selection, "for once")

        def does(run):
            run.proof = Proof(other, True, None, frozenset(), "as shown")

        with caplog.at_level("INFO", logger="sere_compile"):
            plan, graph, _ = self.taken(gate, monkeypatch, does, skip)
        assert (plan.status, plan.reason, plan.refusal, plan.proof) == (SKIPPED, str(skip), skip, "")
        assert (plan.merged, plan.is_filled, graph.dropped) == (False, False, [plan])
        assert "proven" not in caplog.text

    def test_what_is_not_to_be_re_routed_is_not_called_so(self, gate, monkeypatch):
        plan, _, _ = self.taken(gate, monkeypatch)
        assert plan.status not in (REWRITTEN, SKIPPED)
        assert (plan.gate, plan.proof, plan.merged, plan.kernels) == (gate, "", False, "")

    def test_one_that_could_not_be_filled_says_so(self, gate, monkeypatch, caplog):
        _, does = self.rewritten(gate, fill_dispatch="no scores")
        plan, _, _ = self.taken(gate, monkeypatch, does, substitution="fill")
        assert (plan.status, plan.fallback) == (REWRITTEN, "re-routed, not filled: no scores")
        assert "router is re-routed, not filled: no scores" in caplog.text

    def test_one_that_was_refused_before_is_left_alone(self, gate, monkeypatch):
        plan = plan_of(gate)
        plan.refuse(skip := Skip(SkipReason.SHARED_ROUTER, gate.selection))
        monkeypatch.setattr(rewrite_gate, "run_pipeline", None)
        assert rewrite_gate.rewrite_gate(plan, Traced(gate), MATRICES, WEIGHT, None, None) is skip
        assert plan.unfused is skip

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({}, []),
            ({"substitution": "projection", "strict": True}, ["projecting", "strict"]),
            ({"substitution": "fill", "collect_stats": True}, ["filling", "counting"]),
            ({"lower_experts": "always"}, ["fuses_fp8"]),
            ({"lower_experts": True}, []),
        ],
        ids=str,
    )
    def test_what_passes_are_told(self, gate, options, told):
        plan, inputs = plan_of(gate, **options), gate.selection.graph.find_nodes(op="placeholder")
        first, second = list(inputs)[:2]
        graph = Traced(gate, {first: 7, second: torch.zeros(3)})
        run = rewrite_gate._run(plan, graph, MATRICES, WEIGHT, None, None)
        flags = ("projecting", "filling", "strict", "counting", "fuses_experts", "fuses_fp8")
        assert [flag for flag in flags if getattr(run, flag)] == told
        assert (run.gate, run.region, run.settings) == (gate, plan.region, plan.settings)
        assert (run.sizes, run.device, run.has_gradients) == ({first: 7}, WEIGHT.device, True)
        graph.fuses_experts, graph.has_gradients = True, False
        run = rewrite_gate._run(plan, graph, MATRICES, WEIGHT, None, None)
        assert (run.fuses_experts, run.has_gradients) == (True, False)

    def test_places_for_what_is_read_beside(self, gate):
        plan, graph = plan_of(gate), Traced(gate)
        run = rewrite_gate._run(plan, graph, MATRICES, WEIGHT, None, None)
        for kind in ("similarity", "projection", "counts"):
            assert run.input_for(kind) is gate.ids
        (_, matrix), (_, factors), (kind, counts) = graph.placed
        assert matrix is MATRICES["similarity"]
        assert factors is MATRICES["projection"]
        assert (kind, counts.tolist(), counts.dtype) == ("counts", [0] * len(COUNTED), torch.int64)

    @pytest.mark.parametrize("filling", [False, True])
    @pytest.mark.parametrize("proven", [False, True])
    @pytest.mark.parametrize("has_matrix", [False, True])
    def test_a_matrix_is_asked_for_once_the_gate_is_proven(self, gate, monkeypatch, filling, proven, has_matrix):
        """Filling reads none."""
        proof = Proof(gate, True, None, frozenset(), "") if proven else Skip(SkipReason.UNVERIFIED, gate.ids)
        missing, asked = None if has_matrix else Skip(SkipReason.NO_WEIGHTS, gate.ids, "no matrix"), []
        monkeypatch.setattr(rewrite_gate, "_prove", lambda *_, weighing: asked.append(weighing) or proof)
        plan = plan_of(gate, **({"substitution": "fill"} if filling else {}))
        run = rewrite_gate._run(plan, Traced(gate), MATRICES, WEIGHT, None, lambda: asked.append("matrix") or missing)
        wanted = proof if filling or not proven or has_matrix else missing
        assert run.prove(gate, True) is wanted
        assert asked == [True, *(["matrix"] if proven and not filling else [])]

    @pytest.mark.parametrize(
        ("switch", "options", "on"),
        [
            ("lower_experts", {"lower_experts": "always"}, True),
            ("lower_experts", {"lower_experts": True}, False),  # on a GPU
            ("lower_experts", {"lower_experts": False}, False),
            ("lower_experts", {"lower_experts": "always", "kernels": False}, False),
            ("lower_experts", {"lower_experts": False, "fuses": True}, True),
            ("lower_experts", {"lower_experts": "always", "kernels": False, "fuses": True}, True),
            ("fuse_router", {"fuse_router": "always"}, True),
            ("fuse_router", {"fuse_router": "always", "kernels": False}, False),
            ("fuse_router", {"fuse_router": False, "fuses": True}, False),
            ("reroute", {}, True),
            ("reroute", {"reason": "S = K"}, False),
            ("collect_stats", {"collect_stats": True, "rewrite": True}, True),
            ("collect_stats", {"collect_stats": True}, False),
            ("collect_stats", {"collect_stats": False, "rewrite": True}, False),
        ],
        ids=str,
    )
    def test_which_passes_run(self, gate, switch, options, on):
        options = dict(options)
        kernels, fuses = options.pop("kernels", True), options.pop("fuses", False)
        reason, rewrite = options.pop("reason", ""), options.pop("rewrite", None)
        plan = plan_of(gate, **options)
        plan.reason = reason
        run = types.SimpleNamespace(fuses_experts=fuses, device=torch.device("cpu"), rewrite=rewrite)
        assert rewrite_gate._switches(plan, run, kernels)(switch) is on

    def test_an_unknown_switch(self, gate):
        is_on = rewrite_gate._switches(plan_of(gate), types.SimpleNamespace(fuses_experts=True), True)
        with pytest.raises(ValueError, match="no option turns on magic"):
            is_on("magic")


class Returned(Indexed):
    """Its ids leave the graph that dispatches by them."""

    def forward(self, x):
        ids, weights = self.route(x)
        return self.dispatch(x, ids, weights), ids


class TestOutside:
    """What is concluded where the ids leave the graph."""

    @staticmethod
    def proven(gate, monkeypatch, verdict, weighing=False):
        guards, owners, graph = [], types.SimpleNamespace(find=lambda weight: ("owner", weight)), Traced(gate)

        def outside(other, owner):
            assert (other, owner) == (gate, ("owner", WEIGHT))
            return verdict

        def verify(other, value_of, run_outside, *, weighing):
            assert value_of == graph.value_of
            return run_outside(other)

        monkeypatch.setattr(rewrite_gate, "prove_outside", outside)
        monkeypatch.setattr(rewrite_gate, "verify_rewrite", verify)
        monkeypatch.setattr(rewrite_gate, "computes_the_same", lambda other, known: (other, known) == ("twin", verdict))
        monkeypatch.setattr(rewrite_gate.dynamo, "guard_input", lambda node, check, why: guards.append((node, check)))
        return rewrite_gate._prove(
            types.SimpleNamespace(saves_nothing=""), gate, WEIGHT, graph, owners, weighing=weighing
        ), guards

    @pytest.mark.parametrize(
        ("is_gate", "reason", "evidence"),
        [
            (True, SkipReason.UNVERIFIED, Evidence.EXPERTS),
            (False, SkipReason.NO_DISPATCH, Evidence.ROUTER),
        ],
    )
    def test_nothing_proven(self, gate, monkeypatch, is_gate, reason, evidence):
        skip, guards = self.proven(gate, monkeypatch, Verdict(None, "because", is_gate))
        assert (skip.reason, skip.node, skip.detail, skip.evidence) == (reason, gate.selection, "because", evidence)
        assert guards == []

    @pytest.mark.parametrize("merged", [True, False])
    def test_proven(self, gate, monkeypatch, merged):
        """And guarded: another layer that the graph is reused for has to compute the same."""
        proof, [(node, check)] = self.proven(gate, monkeypatch, Verdict(merged))
        assert (proof.gate, proof.merged, proof.experts) == (gate, merged, frozenset())
        assert proof.shown == f"{SHOWN}; the code outside the graph was run"
        assert node is gate.router_weight
        assert check("twin")
        assert not check("other")

    @pytest.mark.parametrize("rows", [0, 256])
    def test_as_many_tokens_as_were_tried(self, gate, monkeypatch, rows):
        limits = []
        monkeypatch.setattr(rewrite_gate.dynamo, "serve_at_most", lambda *of: limits.append(of))
        self.proven(gate, monkeypatch, Verdict(True, rows=rows))
        slots = nodes.value(gate.ids).numel()
        assert [of[1:] for of in limits] == ([(slots, rows * gate.top_k)] if rows else [])

    @staticmethod
    def beside(monkeypatch, verdict, block=Returned, shown=SHOWN, follow=True):
        """What is concluded of a dispatch in the graph, where others may follow behind it, and the guards set."""
        gate, guards = one_gate(from_dynamo(block(), rows())), []
        graph, proof = Traced(gate), Proof(gate, True, None, frozenset(), shown)
        graph.others_follow = follow

        def outside(other, owner, *, kept):
            assert (other, owner, kept) == (gate, "owner", True)
            return verdict

        monkeypatch.setattr(rewrite_gate, "prove_outside", outside)
        monkeypatch.setattr(rewrite_gate, "verify_rewrite", lambda *_, weighing: proof)
        monkeypatch.setattr(rewrite_gate, "computes_the_same", lambda other, known: (other, known) == ("twin", verdict))
        monkeypatch.setattr(rewrite_gate.dynamo, "guard_input", lambda node, check, why: guards.append((node, check)))
        owners = types.SimpleNamespace(find=lambda weight: "owner")
        found = rewrite_gate._prove(types.SimpleNamespace(), gate, WEIGHT, graph, owners, weighing=False)
        return found, proof, gate, guards

    @pytest.mark.parametrize(
        ("off", "refused"), [((), False), ((False,), False), ((True,), True), ((True, False), True)]
    )
    def test_others_that_follow(self, monkeypatch, off, refused):
        """The proof stands unless the block gave other things with this very rewrite."""
        verdict = Verdict(None, "because", off=frozenset(off))
        found, proof, gate, guards = self.beside(monkeypatch, verdict)
        assert guards == []
        if refused:
            assert (found.reason, found.node) == (SkipReason.UNVERIFIED, gate.selection)
            assert (found.detail, found.evidence) == ("because", Evidence.EXPERTS)
        else:
            assert found is proof

    @pytest.mark.parametrize("number", [0, 3])
    def test_layers_that_others_follow_in_the_same_way(self, monkeypatch, number):
        """Share the graph: a block that was run has a number for what it computes."""
        _, _, gate, [(node, check)] = self.beside(monkeypatch, Verdict(True, block=number))
        assert node is gate.router_weight
        assert check("twin")
        assert not check("other")

    @pytest.mark.parametrize(
        "not_asked",
        [{"follow": False}, {"shown": "as counted"}, {"block": Indexed}],
        ids=["nothing follows", "another proof", "no ids leave"],
    )
    def test_where_nothing_else_is_run(self, monkeypatch, not_asked):
        found, proof, _, guards = self.beside(monkeypatch, Verdict(None, off=frozenset({True}), block=1), **not_asked)
        assert found is proof
        assert guards == []

    def test_other_weights(self, gate, monkeypatch):
        """They can be told only of a code that multiplies by them, which takes merged ones as well."""
        skip, guards = self.proven(gate, monkeypatch, Verdict(False), weighing=True)
        assert (skip.reason, skip.evidence, guards) == (SkipReason.UNVERIFIED, Evidence.EXPERTS, [])
        assert skip.detail.startswith("the code that receives its weights does more than multiply")
        proof, _ = self.proven(gate, monkeypatch, Verdict(True), weighing=True)
        assert isinstance(proof, Proof)

    def test_what_is_refused_in_the_graph_is_not_run_outside(self, monkeypatch):
        gate = one_gate(from_dynamo(Returned(), rows()))
        skip, graph = Skip(SkipReason.UNVERIFIED, gate.ids), Traced(gate)
        graph.others_follow = True
        monkeypatch.setattr(rewrite_gate, "verify_rewrite", lambda *_, weighing: skip)
        monkeypatch.setattr(rewrite_gate, "prove_outside", None)
        assert rewrite_gate._prove(None, gate, WEIGHT, graph, None, weighing=False) is skip

    def test_what_is_new_alone(self, gate, monkeypatch):
        """The rewrite leaves what the graph makes of ids the router's own, where the code outside takes it so."""
        alone = dataclasses.replace(gate, top_k=1)
        monkeypatch.setattr(rewrite_gate, "ids_alone", lambda of: alone if of is gate else None)
        for ids_alone, shown in ((True, alone), (False, gate)):
            proof, _ = self.proven(gate, monkeypatch, Verdict(True, ids_alone=ids_alone))
            assert proof.gate is shown
        monkeypatch.setattr(rewrite_gate, "ids_alone", lambda of: None)
        assert self.proven(gate, monkeypatch, Verdict(True, ids_alone=True))[0].gate is gate

    def test_what_a_run_outside_says_of_savings(self, gate, monkeypatch):
        plan = types.SimpleNamespace(saves_nothing="before")
        monkeypatch.setattr(rewrite_gate, "prove_outside", lambda *_: Verdict(True, saves_nothing="dense"))
        monkeypatch.setattr(rewrite_gate, "verify_rewrite", lambda of, _, run_outside, weighing: run_outside(of))
        monkeypatch.setattr(rewrite_gate.dynamo, "guard_input", lambda *_: True)
        owners = types.SimpleNamespace(find=lambda weight: None)
        assert isinstance(rewrite_gate._prove(plan, gate, WEIGHT, Traced(gate), owners, weighing=False), Proof)
        assert plan.saves_nothing == "dense"

    def test_whether_ids_leave_ahead_of_what_their_dispatch_gives(self, monkeypatch):
        """What the dispatch gives leaves as well: that is no other way out."""
        for block, beside in ((Returned, True), (Indexed, False)):
            found = one_gate(from_dynamo(block(), rows()))
            assert rewrite_gate._leaves_beside(found) is beside
        monkeypatch.setattr(rewrite_gate, "ends_of", lambda of: Skip(SkipReason.NO_IDS, of.ids))
        assert rewrite_gate._leaves_beside(one_gate(from_dynamo(Returned(), rows()))) is False


class TestWhatIsSaved:
    """No fewer weights are read where all experts compute, unless an operator that runs the chosen ones may come."""

    @staticmethod
    def said(gate, monkeypatch, *, found=None, region=None, kernels=True, **options):
        plan, graph = plan_of(gate, **options), Traced(gate)
        graph.takes_kernels = kernels
        if region is not None:
            plan.region = region
        proof, asked = Proof(gate, True, None, frozenset({1}), ""), []
        monkeypatch.setattr(rewrite_gate, "check_savings", lambda *given: asked.append(given) or found)
        said = rewrite_gate._saves_nothing(plan, graph, proof, WEIGHT.device)
        assert asked in ([], [(gate, frozenset({1}))])
        return said, bool(asked)

    def test_why_nothing_is_saved(self, gate, monkeypatch):
        dense = Skip(SkipReason.DENSE, gate.ids, "a table")
        said = functools.partial(self.said, gate, monkeypatch)
        assert said() == ("", True)
        assert said(found=dense) == (f"{SkipReason.DENSE.value} (a table)", True)
        fused = {"found": dense, "region": "a region", "lower_experts": "always"}
        assert said(**fused) == ("", False)
        for other in ({"region": None}, {"kernels": False}, {"lower_experts": False}):
            assert said(**fused | other) == (f"{SkipReason.DENSE.value} (a table)", True)

    @pytest.mark.parametrize("known", ["", "of a run outside"])
    @pytest.mark.parametrize("proven", [True, False])
    def test_it_is_asked_once_a_gate_is_proven(self, gate, monkeypatch, known, proven):
        """Unless a run of the code outside said so already."""
        proof = Proof(gate, True, None, frozenset(), "") if proven else Skip(SkipReason.UNVERIFIED, gate.ids)
        monkeypatch.setattr(rewrite_gate, "_prove", lambda *_, weighing: proof)
        monkeypatch.setattr(rewrite_gate, "_saves_nothing", lambda *given: "nothing is saved")
        plan = plan_of(gate)
        plan.saves_nothing = known
        run = rewrite_gate._run(plan, Traced(gate), MATRICES, WEIGHT, None, lambda: None)
        assert run.prove(gate, False) is proof
        assert plan.saves_nothing == ((known or "nothing is saved") if proven else known)

    @pytest.mark.parametrize(("rewritten", "saves_nothing"), [(True, "dense"), (False, "dense"), (True, "")])
    def test_it_is_told_of_what_is_re_routed(self, gate, monkeypatch, caplog, rewritten, saves_nothing):
        plan = plan_of(gate)
        plan.saves_nothing = saves_nothing

        def passes(run, is_on):
            run.rewrite = types.SimpleNamespace(merged=True, filled=False) if rewritten else None

        monkeypatch.setattr(rewrite_gate, "run_pipeline", passes)
        rewrite_gate.rewrite_gate(plan, Traced(gate), MATRICES, WEIGHT, None, lambda: None)
        told = rewritten and bool(saves_nothing)
        assert [record.message for record in caplog.records] == ["router is re-routed, but dense"] * told
