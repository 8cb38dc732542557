"""Find MoE gates by dataflow: from a selection back to a router weight and forward to the experts.

A gate is a selection over the last dimension of scores that a weight projected, whose ids reach
expert weights:

    logits  = linear(hidden, router_weight)         # [T, E]     evidence behind
    values, ids = topk(scoring(logits), K)          # [T, K]     the selection
    ... experts_weight[ids] / sort(ids) -> grouped_mm(.., experts_weight) / output          evidence ahead

Both sides are needed. Everything else that looks like a selection of experts is refused with a
reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from .evidence.behind_ids import behind_ids
from .evidence.classify_uses import Leaving, Uses, classify_uses
from .evidence.expert_evidence import picks_outputs, reaches_experts
from .evidence.router import Router, trace_router
from .evidence.routing_weights import find_routing_weights, weigh_a_product
from .evidence.selections import Selection, find_selections, with_marked_padding
from .evidence.token_places import drops_tokens, split_at_fixed_places
from .gate import Evidence, Gate, Skip, SkipReason, UseKind
from .graph import nodes
from .graph.nested import nested_in, why_nested
from .graph.walk import walk

_NEAR = 24  # nodes between chosen ids and a table that maps them to others
_REROUTING = frozenset({"sere.reroute", "sere.reroute_merged"})

# Decides how many experts ids that leave the graph go to, from the router's weight node and the
# number of scores; 0 (or False) where it knows of none, True for as many as scores. A graph alone
# cannot tell an expert loop after a graph break from a sampler that returns token ids.
OutsideEvidence = Callable[[Node, int], int]


@dataclass(frozen=True)
class Findings:
    """Gates in graph order, and every selection that is no gate with the reason."""

    gates: tuple[Gate, ...]
    skips: tuple[Skip, ...]

    @property
    def nearest_miss(self) -> Skip | None:
        """The refused selection that looked most like a gate."""
        return max(self.skips, key=lambda skip: skip.evidence, default=None)


def find_gates(module: GraphModule, experts_outside: OutsideEvidence = lambda weight, num_experts: 0) -> Findings:
    """Find every MoE gate of a traced graph.

    Args:
        module: a graph from Dynamo, torch.export, make_fx or symbolic_trace, with recorded shapes. Of leaf modules
            nothing is seen: `graph.leaf_modules.open_linears` writes those that are an `nn.Linear` as functions.
        experts_outside: see `OutsideEvidence`; by default ids that only leave the graph are no
            gate.

    Returns:
        The gates, and a `Skip` for each selection that is none.
    """
    gates: list[Gate] = []
    skips: list[Skip] = []
    chosen: set[Node] = set()
    leaves = Leaving(module.graph)
    for selection in find_selections(module.graph):
        chosen.update(() if isinstance(selection, Skip) else selection.ids)
        found = selection if isinstance(selection, Skip) else _examine(selection, experts_outside, leaves)
        if isinstance(found, Gate):
            gates.append(found)
        elif not _is_ordinary_maximum(selection, found):
            skips.append(found)
    halves = {name for skip in skips if skip.reason is SkipReason.PRODUCT_KEYS for name in skip.detail.split(", ")}
    found_halves = [gate.selection for gate in gates if gate.selection.name in halves]
    skips += [Skip(SkipReason.PRODUCT_KEYS, node, nodes.place(node)) for node in found_halves]
    skips = [_named_half(skip) if skip.node.name in halves else skip for skip in skips]
    gates = [gate for gate in gates if gate.selection.name not in halves]
    return Findings(tuple(gates), tuple(skips + _hash_routing(module, chosen) + _nested(module)))


def _is_ordinary_maximum(selection: Selection | Skip, skip: Skip) -> bool:
    """Whether a refused argmax is one of the many that do not select from what a weight projected."""
    single = isinstance(selection, Selection) and selection.form == "max"
    return single and skip.reason is not SkipReason.REWRITTEN and skip.evidence < Evidence.IDS


def _examine(selection: Selection, experts_outside: OutsideEvidence, leaves: Leaving) -> Gate | Skip:
    columns = nodes.last_size(selection.scores)
    assert columns is not None
    router = trace_router(selection.scores, columns)
    if selection.smallest and (isinstance(router, Skip) or nodes.kind(router.projection) != "cdist"):
        return Skip(SkipReason.SMALLEST, selection.node, nodes.place(selection.node))
    if isinstance(router, Skip):
        return router
    if not selection.ids:
        return Skip(SkipReason.NO_IDS, selection.node, nodes.place(selection.node), evidence=Evidence.ROUTER)
    uses, num_experts = _experts_behind(selection, router, experts_outside, leaves)
    marked = with_marked_padding(selection, uses.all)
    if marked is not None:
        selection = marked
        uses, num_experts = _experts_behind(selection, router, experts_outside, leaves)
    done = next((use.consumer for use in uses.all if nodes.kind(use.consumer) in _REROUTING), None)
    if done is not None:
        return Skip(SkipReason.REWRITTEN, selection.node, f"by {done.name}", evidence=Evidence.REWRITING)
    refused = _refused_dispatch(selection, uses, Evidence.EXPERTS if num_experts else Evidence.DISPATCH)
    if refused is not None:
        return refused
    if num_experts == 0:
        return _without_experts(selection, router.columns, uses)
    if uses.entangled is not None:
        return Skip(
            SkipReason.STEPS,
            selection.node,
            f"{uses.entangled.name} reads an incomplete choice",
            evidence=Evidence.EXPERTS,
        )
    fetched = all(use.kind is UseKind.EXPERT_INDEX for use in uses.all if use.kind.dispatches)
    if fetched and selection.top_k > 1 and not weigh_a_product(selection.ids[0], list(selection.values), uses.all):
        place = nodes.place(selection.node)
        return Skip(SkipReason.NOTHING_WEIGHED, selection.node, place, evidence=Evidence.DISPATCH)
    weights = find_routing_weights(selection.ids[0], list(selection.values), uses.all, router.projection)
    return Gate(
        selection=selection.node,
        ids=selection.ids[0],
        values=next((node for node in selection.values if node.users), None),
        router_weight=router.weight,
        router_input=router.hidden,
        num_experts=num_experts,
        top_k=selection.top_k,
        scoring=router.scoring,
        is_sorted=selection.is_sorted,
        uses=tuple(uses.all),
        weights=weights if isinstance(weights, Node) else None,
        weights_skip=weights if isinstance(weights, Skip) else None,
        form=selection.form,
        all_ids=selection.ids,
    )


def _without_experts(selection: Selection, columns: int, uses: Uses) -> Skip:
    """Why no experts are behind the ids: what these give is there before, or there are none."""
    if (table := picks_outputs(selection.ids, columns)) is not None:
        return Skip(SkipReason.DENSE, selection.node, nodes.place(table), evidence=Evidence.EXPERTS)
    detail = behind_ids(selection.ids, uses.all, columns)
    return Skip(SkipReason.NO_DISPATCH, selection.node, detail, evidence=Evidence.IDS)


def _refused_dispatch(selection: Selection, uses: Uses, evidence: Evidence) -> Skip | None:
    """A refusal where other ids would send other tokens to the experts."""
    for use in uses.all:
        if use.kind.dispatches and drops_tokens(use.consumer):
            place = nodes.place(use.consumer)
            return Skip(SkipReason.CAPACITY, selection.node, place, evidence)
    slots = math.prod(nodes.shape(selection.ids[0]) or ())
    for use in uses.all:
        fixed = split_at_fixed_places(use.consumer, slots)
        if fixed is not None:
            place = nodes.place(fixed)
            return Skip(SkipReason.FIXED_SIZES, selection.node, place, evidence)
    return None


def _experts_behind(
    selection: Selection, router: Router, experts_outside: OutsideEvidence, leaves: Leaving
) -> tuple[Uses, int]:
    """The uses of the ids and E, 0 where no dispatch use is known to reach experts.

    With more columns than experts (slots that compute nothing) E is a number that the ids are
    compared with; a count of each column compares them with all numbers.
    """
    uses = classify_uses(selection, router.projection, router.columns, router.columns, leaves)
    if uses.reach:
        return uses, router.columns
    names_all = uses.compared_with.issuperset(range(router.columns))
    for fewer in sorted(uses.compared_with, reverse=True):
        if 1 < fewer < router.columns and not names_all:
            attempt = classify_uses(selection, router.projection, fewer, router.columns, leaves)
            if attempt.reach:
                return attempt, fewer
    ids_leave = any(use.kind is UseKind.LEAVES for use in uses.all)
    outside = experts_outside(router.weight, router.columns) if ids_leave else 0
    return uses, router.columns if outside is True else int(outside)


def _named_half(skip: Skip) -> Skip:
    """One of the two selections that a product of keys is made of."""
    return replace(skip, reason=SkipReason.PRODUCT_KEYS, detail=nodes.place(skip.node))


def _hash_routing(module: GraphModule, chosen: set[Node]) -> list[Skip]:
    """Ids that a table assigns to token ids, not to chosen ones, and that reach weights stacked over experts."""
    found = []
    for node in module.graph.nodes:
        if nodes.kind(node) not in ("index", "embedding") or nodes.is_floating(node) or not nodes.is_tensor(node):
            continue
        if not chosen.isdisjoint(walk(nodes.operands(node), nodes.numbers_behind, _NEAR)):
            continue
        tables = [s for s in nodes.operands(node) if len(nodes.shape(s) or ()) == 2 and not nodes.is_floating(s)]
        roots = [nodes.parameter_root(table) for table in tables]
        if any(root is not None and nodes.is_model_state(root) for root in roots) and _dispatches(node):
            found.append(Skip(SkipReason.HASH, node, nodes.place(node), evidence=Evidence.DISPATCH))
    return found


def _dispatches(ids: Node) -> bool:
    """Whether weights stacked over any number of experts are close behind the ids."""
    return any(
        nodes.kind(user) not in ("gather", "take_along_dim") and reaches_experts(user, None) for user in ids.users
    )


def _nested(module: GraphModule) -> list[Skip]:
    """Selections in nested graphs: gates there are refused, the others keep their reasons."""
    found = []
    for node in module.graph.find_nodes(op="get_attr"):
        inner = nested_in(node, module)
        if inner is not None:
            inside = find_gates(inner)
            found += [
                Skip(SkipReason.NESTED, g.selection, why_nested(node), evidence=Evidence.EXPERTS) for g in inside.gates
            ]
            found += inside.skips
    return found
