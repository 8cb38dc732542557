"""`pipeline`: which pass runs when, what a refusal does, and that the arrows between the files point one way."""

import ast
import importlib
import operator
import types
from pathlib import Path

import pytest
import torch

import sere_compile.passes
from sere_compile.passes import (
    COUNTED,
    PIPELINE,
    Evidence,
    Gate,
    Proof,
    Rewrite,
    RoutingSettings,
    Run,
    Skip,
    SkipReason,
    extract_dispatch,
    pipeline,
    run_pipeline,
)
from sere_compile.passes.graph import nodes
from sere_compile.passes.graph.nodes import kind

from .moe_modules import Indexed, MaskPicks, expected, from_dynamo, one_gate, rows, run, similarity
from .test_fuse_experts import E, H, Layer, T, trace

FOLDER = Path(sere_compile.passes.__file__).parent
ALL = {entry.switch for entry in PIPELINE}


def run_of(graph, gate, settings=None, **options):
    """A run of the pipeline whose inputs become attributes of the graph; `asked` lists their kinds."""
    asked = []

    def input_for(name):
        if name not in asked:
            asked.append(name)
            counting = name == "counts"
            value = torch.zeros(len(COUNTED), dtype=torch.int64) if counting else similarity(gate.num_experts)
            graph.register_buffer(name, value)
            with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
                graph.graph.get_attr(name)
        return next(node for node in graph.graph.find_nodes(op="get_attr") if node.target == name)

    given = {
        "settings": settings or RoutingSettings(1),
        "sizes": {},
        "device": torch.device("cpu"),
        "has_gradients": False,
        "prove": lambda gate, weighing: Proof(gate, gate.needs_merge, None, frozenset(), "shown"),
        "input_for": input_for,
        **options,
    }
    return Run(gate=gate, region=extract_dispatch(gate), **given), asked


def go(switches, graph=None, gate=None, **options):
    """The run after the pipeline, what it returned, and the inputs it asked for."""
    graph = graph or from_dynamo(Indexed(), rows())
    state, asked = run_of(graph, gate or one_gate(graph), **options)
    refused = run_pipeline(state, switches.__contains__)
    graph.graph.lint()
    graph.recompile()
    return state, refused, asked


class TestOrder:
    def test_each_entry_has_the_name_of_its_file_and_function(self):
        """The table is a list of files."""
        for entry in PIPELINE:
            assert callable(getattr(importlib.import_module(f"sere_compile.passes.{entry.name}"), entry.name))
        names = [entry.name for entry in PIPELINE]
        assert names == sorted(set(names), key=names.index)
        assert all(set(entry.unless) <= set(names[:place]) for place, entry in enumerate(PIPELINE))

    def test_nothing_on(self):
        """The graph stays, and no input is asked for."""
        graph = from_dynamo(Indexed(), rows())
        before = str(graph.graph)
        state, refused, asked = go(set(), graph)
        assert (state.done, state.refused, refused, asked, state.proof) == ([], {}, None, [], None)
        assert str(graph.graph) == before

    def test_re_routing_alone(self):
        """A gate with stock routing: the operator behind it is what remains, and gives SERE's numbers."""
        module, x = Indexed(), rows()
        graph = from_dynamo(module, x)
        state, refused, asked = go({"reroute"}, graph)
        assert (state.done, refused, asked) == (["verify_rewrite", "reroute_dispatch"], None, ["similarity"])
        assert state.refused["fuse_reroute"].reason is SkipReason.NOT_FUSED
        with torch.no_grad():
            torch.testing.assert_close(run(graph, x), expected(module, x, similarity(), 1), rtol=1e-5, atol=1e-5)

    def test_everything(self):
        """Experts, routing and re-routing become two operators; `reroute_dispatch` has nothing left to do."""
        graph, _, gate = trace(Layer(), torch.randn(T, H))
        state, refused, _ = go(ALL - {"collect_stats"}, graph, gate, projecting=True)
        assert state.done == ["verify_rewrite", "fuse_experts", "fuse_router", "fuse_reroute"]
        assert (state.refused, refused, state.proof.shown) == ({}, None, "shown")
        kinds = [kind(node) for node in graph.graph.nodes]
        assert (kinds.count("sere.route"), kinds.count("sere.expert_mlp")) == (1, 1)
        assert not {"sere.reroute", "topk"} & set(kinds)
        assert state.gate.selection is state.rewrite.gate.selection

    def test_counting_reads_the_ids_as_they_were(self):
        """So re-routing stays an operator of its own, and its counter stands behind it."""
        graph, _, gate = trace(Layer(), torch.randn(T, H))
        state, _, asked = go(ALL, graph, gate, counting=True)
        assert state.refused["fuse_reroute"].reason is SkipReason.COUNTED
        assert state.done[-2:] == ["reroute_dispatch", "count_routing"]
        assert asked == ["similarity", "counts"]
        assert state.rewrite.new_ids.next.target.__name__ == "add_counts"


class TestRefusals:
    def test_a_required_pass_ends_re_routing(self):
        """A rewrite that was refused by its proof is not made; kernels replace what they can all the same."""
        graph = from_dynamo(Indexed(), rows())
        before = str(graph.graph)
        prove = lambda gate, weighing: Skip(SkipReason.UNVERIFIED, gate.selection)  # noqa: E731
        state, refused, asked = go({"reroute"}, graph, prove=prove)
        assert refused.reason is SkipReason.UNVERIFIED
        assert (state.done, list(state.refused), asked) == ([], ["verify_rewrite"], [])
        assert str(graph.graph) == before
        graph, _, gate = trace(Layer(), torch.randn(T, H))
        state, refused, _ = go(ALL - {"collect_stats"}, graph, gate, prove=prove)
        assert refused.reason is SkipReason.UNVERIFIED
        assert state.done == ["fuse_experts", "fuse_router"]

    def test_what_was_proven_is_done(self):
        """Merging is the proof's to say, not the hint's of the gate."""
        graph = from_dynamo(Indexed(), rows())
        prove = lambda gate, weighing: Proof(gate, True, None, frozenset(), "shown")  # noqa: E731
        state, refused, _ = go({"reroute"}, graph, prove=prove)
        assert refused is None
        assert state.rewrite.merged
        assert state.refused["fuse_reroute"].reason is SkipReason.MERGES

    def test_weights_in_a_table_move_with_the_ids(self):
        """Not within `sere.route`, which knows no table; where weights are scaled, only as proven for that."""
        for projecting in (False, True):
            graph = from_dynamo(MaskPicks(), rows())
            gate = one_gate(graph)
            table = nodes.operand(gate.selection)
            reader = next(iter(graph.graph.find_nodes(op="call_function", target=operator.mul)))
            proof = Proof(gate, False, (), frozenset(), "shown", ((reader, table),))
            refusal = Skip(SkipReason.UNVERIFIED, gate.selection)
            prove = lambda gate, weighing, proof=proof, refusal=refusal: refusal if weighing else proof  # noqa: E731
            state, refused, _ = go({"reroute"}, graph, gate, prove=prove, projecting=projecting)
            assert (refused is None) == (not projecting)
            if not projecting:
                assert state.refused["fuse_reroute"].reason is SkipReason.MERGES
                assert reader.args[0] is not table

    def test_weights_change_only_where_that_is_proven(self):
        """Coefficients of projection scale weights: that plain re-routing is right says nothing of them."""
        graph = from_dynamo(Indexed(), rows())
        refusal = Skip(SkipReason.UNVERIFIED, next(iter(graph.graph.nodes)))
        prove = lambda gate, weighing: refusal if weighing else Proof(gate, False, None, frozenset(), "shown")  # noqa: E731
        state, refused, _ = go({"reroute"}, graph, prove=prove, projecting=True)
        assert refused is refusal
        assert state.rewrite is None

    def test_a_speed_pass_does_not(self):
        """The gate keeps its kernels and is re-routed all the same; each refusal is a `Skip` with its node."""
        state, refused, _ = go(ALL - {"collect_stats"}, has_gradients=True)
        assert refused is None
        reasons = {name: skip.reason for name, skip in state.refused.items()}
        assert reasons == {
            "fuse_experts": SkipReason.GRADIENTS,
            "fuse_router": SkipReason.GRADIENTS,
            "fuse_reroute": SkipReason.NOT_FUSED,
        }
        assert state.done[-1] == "reroute_dispatch"

    def test_a_dispatch_that_cannot_be_cut_out(self):
        """Its reason is that of `extract_dispatch`."""
        graph = from_dynamo(Indexed(), rows())
        state, _ = run_of(graph, one_gate(graph))
        state.region = Skip(SkipReason.NO_EXIT, state.gate.ids)
        run_pipeline(state, {"lower_experts"}.__contains__)
        assert state.refused == {"fuse_experts": state.region}

    def test_re_routing_is_required(self):
        """With a refusal of `reroute_dispatch` the gate counts as not re-routed."""
        graph = from_dynamo(Indexed(), rows())
        gate = one_gate(graph)
        unknown = Gate(**{**vars(gate), "weights": None})
        _, refused, _ = go({"reroute"}, graph, unknown, projecting=True)
        assert refused.reason is SkipReason.NO_SCALE


def test_a_switch_is_asked_when_its_pass_is_reached():
    """Comparing a symbolic batch guards: what stands behind a refusal, or is not needed, must not be asked."""
    graph, _, gate = trace(Layer(), torch.randn(T, H))
    state, _ = run_of(graph, gate)
    asked = []

    def is_on(switch):
        asked.append((switch, list(state.done)))
        return True

    run_pipeline(state, is_on)
    assert [switch for switch, _ in asked] == [
        "reroute",
        "lower_experts",
        "fuse_router",
        "reroute",
        "collect_stats",
    ]
    assert asked[3][1] == ["verify_rewrite", "fuse_experts", "fuse_router"]
    assert gate.num_experts == E


# What the files of each layer may import of this package, in the order of the layers.
LAYERS = ("gate", "graph", "evidence", "passes", "pipeline")


def layer_of(parts):
    """The layer of a module, from its path below `passes/`."""
    return parts[0] if parts[0] in LAYERS else "passes"


def imported_modules(path):
    """Paths below `passes/` of what a file imports from there."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(parts):
            base = (*parts[: len(parts) - node.level], *filter(None, (node.module or "").split(".")))
            yield from ((*base, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_arrows_between_the_layers_point_one_way(path):
    """`gate` and `graph` know none of the others, `evidence` no pass, no pass the pipeline."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    if parts == ("__init__",):
        return
    own = layer_of(parts)
    wrong = []
    for module in imported_modules(path):
        other = layer_of(module)
        if own == "graph" and other == "gate":
            wrong.append(module)
        if LAYERS.index(other) > LAYERS.index(own) or (own == other == "gate"):
            wrong.append(module)
    assert wrong == []


def test_passes_import_each_other_in_one_direction():
    """No circle among the files of the passes."""
    files = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    needs = {name: {module[0] for module in imported_modules(path)} & files.keys() for name, path in files.items()}
    assert needs["pipeline"] > {"fuse_experts", "fuse_router"}
    while needs:
        free = {name for name, others in needs.items() if not others & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}


class TestWhatARunSays:
    def test_readers_are_as_proven(self):
        """Any where nothing is proven yet; as proven for the weights where that was asked."""
        graph = from_dynamo(Indexed(), rows())
        gate = one_gate(graph)
        found, _ = run_of(graph, gate)
        assert found.readers is None
        readers = tuple(graph.graph.find_nodes(op="placeholder"))
        found.proof = Proof(gate, False, readers, frozenset(), "shown")
        assert found.readers == readers
        found.weighed = Proof(gate, True, readers[:1], frozenset(), "shown")
        assert found.readers == readers[:1]


class TestProperties:
    """Of a run, by hand: what is fused, proven and refused."""

    @staticmethod
    def run(**state):
        gate = types.SimpleNamespace(
            dispatch_uses=("use",), needs_merge=True, weights="weights", ids="ids", dispatch="indexed weights"
        )
        given = dict.fromkeys(("settings", "sizes", "device", "prove", "input_for"))
        return Run(gate=gate, region=None, has_gradients=False, **{**given, **state})

    @staticmethod
    def proof(uses=("use",), merged=False, readers=("reader",)):
        gate = types.SimpleNamespace(dispatch_uses=uses, ids="ids", dispatch="indexed weights")
        return Proof(gate, merged, readers, frozenset(), "")

    def test_without_a_proof(self):
        run = self.run()
        assert (run._is_fused, run.merged, run.readers, run.refused_weights) == (False, True, None, None)

    def test_as_proven(self):
        run = self.run(proof=self.proof())
        assert (run._is_fused, run.merged, run.readers) == (False, False, ("reader",))
        run = self.run(proof=self.proof(), weighed=self.proof(readers=("other",)))
        assert run.readers == ("other",)

    def test_once_experts_are_one_operator(self):
        """It takes ids and weights, whatever was proven of what it replaced."""
        skip = Skip(SkipReason.UNVERIFIED, None)
        run = self.run(proof=self.proof(uses=("before",)), weighed=skip)
        assert (run._is_fused, run.merged, run.readers, run.refused_weights) == (True, True, None, None)
        assert self.run(proof=self.proof(), weighed=skip).refused_weights is skip
        assert self.run(proof=self.proof(), weighed=self.proof()).refused_weights is None

    def test_what_is_kept(self):
        run = self.run()
        skip, rewrite = Skip(SkipReason.UNVERIFIED, None), Rewrite("gate", "ids", merged=False)
        before = run.gate
        assert pipeline._keep(run, skip) is skip
        assert (run.gate, run.rewrite) == (before, None)
        assert pipeline._keep(run, rewrite) is None
        assert (run.gate, run.rewrite) == (before, rewrite)
        assert pipeline._keep(run, "another gate") is None
        assert (run.gate, run.rewrite) == ("another gate", rewrite)

    @pytest.mark.parametrize(("projecting", "filling"), [(False, False), (True, False), (False, True)])
    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("weights", [None, "weights"])
    def test_weights_that_change_are_proven_to_matter(self, projecting, filling, merged, weights):
        asked = []

        def prove(gate, weighing):
            asked.append(weighing)
            return self.proof(merged=merged)

        run = self.run(prove=prove, projecting=projecting, filling=filling)
        run.gate.weights = weights
        assert pipeline._prove(run) is None
        weighed = (projecting or filling) and weights is not None
        assert asked == ([False, True] if weighed and not merged else [False])
        assert (run.weighed is not None) is weighed
        assert run.gate is run.proof.gate

    def test_what_joins_the_router(self):
        refused = Skip(SkipReason.UNVERIFIED, None)
        assert pipeline._check_joining(self.run(proof=self.proof())) is None
        assert pipeline._check_joining(self.run(proof=self.proof(), counting=True)).reason is SkipReason.COUNTED
        assert pipeline._check_joining(self.run(proof=self.proof(merged=True))).reason is SkipReason.MERGES
        run = self.run(proof=self.proof(), weighed=refused, filling=True)
        assert pipeline._check_joining(run) is refused
        run.filling = False
        assert pipeline._check_joining(run) is None

    def test_what_falls_back(self):
        refused = Skip(SkipReason.UNVERIFIED, None)
        run = self.run(weighed=refused)
        assert pipeline._check_fallback(run) is refused
        run.filling = True
        run.refused["fill_dispatch"] = Skip(SkipReason.UNVERIFIED, None, "other")
        assert pipeline._check_fallback(run) is None
        run.find_matrix = lambda: Skip(SkipReason.NOT_PROBED, None, "no experts", Evidence.EXPERTS)
        missing = pipeline._check_fallback(run)
        assert (missing.reason, missing.evidence) == (SkipReason.NOT_PROBED, Evidence.EXPERTS)
        assert missing.detail == f"no experts; it cannot be filled: {run.refused['fill_dispatch']}"
        run.strict = True
        other = pipeline._check_fallback(run)
        assert (other.detail, other.is_refused_gate) == ("other", True)
        assert pipeline._check_filling(run) is refused

    def test_what_falls_back_has_no_threshold(self, monkeypatch):
        """That of filling is no similarity."""
        asked, skip = [], Skip(SkipReason.UNVERIFIED, None)
        monkeypatch.setattr(
            pipeline, "reroute_dispatch", lambda gate, *inputs, **how: asked.append((inputs, how)) or skip
        )
        run = self.run(settings=RoutingSettings(1, 0.5), input_for=str.upper, proof=self.proof(merged=True))
        pipeline._reroute_dispatch(run)
        run.filling, run.projecting = True, True
        pipeline._reroute_dispatch(run)
        how = {"merged": True, "readers": ("reader",), "tables": ()}
        assert asked[0] == (("SIMILARITY", RoutingSettings(1, 0.5), None), how)
        assert asked[1] == (("SIMILARITY", RoutingSettings(1, 0.0), "PROJECTION"), how)
