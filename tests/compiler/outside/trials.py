"""Trials of blocks: in compiled models, and of blocks that are not compiled, some of whose questions are answered."""

import contextlib
import types

import torch

from sere_compile.compiler import dynamo
from sere_compile.compiler.dynamo_graph import DynamoGraph
from sere_compile.compiler.gate_plan import experts_are_live
from sere_compile.compiler.outside import prove_outside
from sere_compile.compiler.outside.made_up_choices import Choose, Score, Tell
from sere_compile.compiler.outside.trial import Trial
from sere_compile.experts.owner import Owners
from sere_compile.experts.trial_block import TrialBlock
from sere_compile.passes import Gate, Use, find_gates

from ...passes.graph.written import Written
from .blocks import EXPERTS, HIDDEN, TOP_K, Experts, Plain

VERSIONS = [f"{name}{way}" for way in ("", ", ids alone", ", ids kept") for name in ("plain", "merged")]


def verdicts(model, *args, **kwargs):
    """Of every gate of the model's graphs whose ids leave; the compiled model gives what the model gives."""
    torch._dynamo.reset()
    prove_outside._verdicts.clear()
    found = []

    def backend(graph, inputs):
        traced, owners = DynamoGraph(graph, inputs), Owners()
        for gate in find_gates(traced.module, experts_are_live(traced.value_of, owners)).gates:
            found.append(prove_outside.prove_outside(gate, owners.find(traced.value_of(gate.router_weight))))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return found


class EagerTrial(Trial):
    """A trial whose block is not compiled: what its graphs would hold is called in its router."""

    def __init__(self, experts, *, top_k=TOP_K, needs_merge=True):
        w = Written()
        scores = w.given(5, EXPERTS)
        self.seen = types.SimpleNamespace(  # the gate as its graph has it
            num_experts=EXPERTS, top_k=top_k, form="top-k", scoring="softmax", needs_merge=needs_merge, uses=(),
            ids=w.top_k(scores, top_k)[1], weights=w.given(5, top_k), router_input=w.given(5, HIDDEN),
        )  # fmt: skip
        plain = Plain(experts)
        block = TrialBlock(plain, plain.gate.weight, plain, EXPERTS, EXPERTS)
        super().__init__(self.seen, block, None)
        self._call = block.module
        self.choose = Choose(lambda: self.graphs.draw, scores, self.seen)
        self.score = Score(lambda: self.graphs.draw)
        self.graphs.versions = dict.fromkeys(("original", "plain", "merged"), None)
        block.module.select = self.select

    def select(self, logits):
        self.graphs.found = [self.seen]
        weights, ids = self.choose(self.score(logits).softmax(-1).topk(self.seen.top_k))
        Tell(self.graphs.ids)(ids)
        Tell(self.graphs.weights)(weights)
        if self.graphs.version == "plain":
            ids = torch.ops.sere.reroute(ids, self.graphs.matrix, 1)
        elif self.graphs.version == "merged":
            ids, weights = torch.ops.sere.reroute_merged(ids, weights, self.graphs.matrix, 1)
        return weights, ids


def trial_of(**others):
    """A trial of which these methods do something else, or whose graphs hold something else."""
    trial = EagerTrial(Experts())
    for name, other in others.items():
        setattr(trial.graphs if hasattr(trial.graphs, name) else trial, name, other)
    return trial


def returning(value):
    return lambda *_, **__: value


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def parameters(trial, *names):
    """Those of a trial's block that have a part per expert, by name."""
    found = {one.name: one for one in trial.block.candidates() if one.dim in (0, None)}
    return [found[name] for name in names]


def watched_compiling(monkeypatch):
    """A list that is empty but while nothing more is to be compiled."""
    inside = []

    @contextlib.contextmanager
    def nothing_more():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(dynamo, "compiling_nothing_more", nothing_more)
    return inside


def gate_of(ids, *uses, **changes):
    """A gate whose ids are used so; what else it has does not matter."""
    own = {"selection": ids, "values": None, "router_weight": ids, "router_input": ids, "scoring": "softmax"}
    own |= {"num_experts": EXPERTS, "top_k": TOP_K, "is_sorted": True, "all_ids": (ids,)}
    return Gate(ids=ids, uses=tuple(Use(consumer, ids, kind) for consumer, kind in uses), **own | changes)


def ids_that_leave():
    """Ids, what stays in their graph and what else leaves it, both made of them, the end of what stays, the output."""
    w = Written()
    ids = w.input(torch.zeros(5, TOP_K, dtype=torch.int64))
    inside, made = w.call(torch.add, ids, 1), w.call(torch.mul, ids, 2)
    last = w.call(torch.neg, inside)
    w.give(ids, made, last)
    return ids, inside, made, last, w.graph.output_node()
