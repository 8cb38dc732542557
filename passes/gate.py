"""What the matcher reports: gates, the uses of their ids, and refusals with their reasons."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from torch.fx import Node


class UseKind(enum.Enum):
    """What a consumer does with the expert ids of a gate."""

    LOOK_UP = "look-up"  # reads this token's scores or a per-expert scale: keeps the original ids
    STATISTIC = "statistic"  # counts for a loss or a log: keeps the original ids
    RANKING = "masks the next choice"  # removes an expert from the scores of the next step: keeps the original ids
    EXPERT_INDEX = "indexed weights"  # gathers stacked expert weights per slot: duplicates are summed
    GROUPED = "grouped by expert"  # sorts slots by expert for a grouped matmul: duplicates are summed
    LEAVES = "leaves the graph"  # goes to code outside the graph: duplicates may be wrong
    UNKNOWN = "unknown dispatch"  # anything else on its way to the experts: duplicates may be wrong

    @property
    def dispatches(self) -> bool:
        """Whether the consumer sends tokens to experts, so that it must see re-routed ids."""
        return self not in (UseKind.LOOK_UP, UseKind.STATISTIC, UseKind.RANKING)

    @property
    def sums_duplicates(self) -> bool:
        """Whether a token that names an expert twice is proven to get the sum of both slots."""
        return self in (UseKind.EXPERT_INDEX, UseKind.GROUPED)


class Evidence(enum.IntEnum):
    """The last question of the matcher that was answered with yes, in the order they are asked."""

    NONE = 0  # it is no selection of the largest scores along the last dimension
    SELECTION = 1  # does it select so?
    ROUTER = 2  # are its scores the projection of hidden states by a weight?
    IDS = 3  # are its indices used?
    DISPATCH = 4  # do they send tokens somewhere?
    EXPERTS = 5  # are there experts? If so, it is what a user would call a gate.
    REWRITING = 6  # is it re-routed already?


class SkipReason(enum.Enum):
    """Why a selection, or a part of a gate, was not rewritten. The value is what a report prints."""

    NOT_LAST_DIM = "selects over another dimension than the last"
    SMALLEST = "selects the smallest scores"
    SIZE_UNKNOWN = "the number of scores or of selected experts is not a constant"
    NO_ROUTER = "its scores do not come from a projection by a weight"
    EXPERT_CHOICE = "it selects tokens for each column of its scores: experts that choose tokens are not re-routed"
    AMBIGUOUS_ROUTER = "its scores come from several projections"
    ROUTER_SIZE = "its projection has more columns than there are scores to select from"
    STEPS = "it selects experts one at a time and uses each separately"
    CAPACITY = "capacity-based dispatch: with other ids it would drop other tokens"
    FIXED_SIZES = (
        "its tokens are split among the experts at places that tracing fixed, which hold for the traced call only"
    )
    PRODUCT_KEYS = "product keys: its candidates are pairs of other selections"
    HASH = "hash routing: its experts come from a table, not from scores"
    NESTED = "it is inside a nested graph, which is not rewritten"  # the detail says whose it is, and what to do
    NESTED_EXPERTS = "its experts are inside a nested graph, which is not rewritten"
    BENT_WEIGHTS = (
        "its weights pass through another function after the dispatch, where those of two slots cannot be added"
    )
    SCALED_INPUT = "its weights scale the input of the experts, where the weights of two slots cannot be added"
    RESELECTED = "another selection chooses among its results, and new weights would change that choice"
    ASCENDING = (
        "it takes the best scores in ascending order, and re-routing ranks them best first: write topk, or "
        "sort(descending=True)"
    )
    NOT_ALIKE = "its experts are not alike, so that none can stand in another's place"
    UNVERIFIED = "the rewritten graph was not proven to compute what re-routing defines"
    ONE_TOKEN = (
        "it is inside torch.func.vmap, where its batch is one example, and re-routing takes the tokens of a batch "
        "together: call the layer on the whole batch instead"
    )
    FETCHED = "its indices fetch values, keys or prompts of the model; none is a weight that acts on hidden states"
    SHARED_ROUTER = "its router weight also selects from other experts"
    NOT_PROBED = "no similarity profile is attached for it, and its experts cannot be run to measure one"
    NO_IDS = "its indices are not used"
    NO_DISPATCH = "no experts are found behind its indices"
    NOTHING_WEIGHED = "its scores do not weight what is computed with what its indices choose"
    DENSE = (
        "every expert computes every token, and its indices only pick or weigh the results, so that re-routing saves "
        'nothing: write a dispatch that runs the chosen experts alone, as experts_implementation="grouped_mm" of '
        "transformers does"
    )
    NO_WEIGHTS = "its dispatch needs merged duplicates, but no routing weights were found to merge"
    AMBIGUOUS_WEIGHTS = "its dispatch needs merged duplicates, but several tensors could be the routing weights"
    NO_SCALE = "its routing weights, which projection coefficients would scale, could not be determined"
    SCORES_BY_ID = "its dispatch reads the scores again at the ids, so that re-routing would change its weights"
    REWRITTEN = "it is re-routed already"
    NO_SCORES = "the scores of all experts do not reach its dispatch, so that slots cannot be filled by them"
    WEIGHTS_LATE = "its dispatch begins before the routing weights that would have to be merged are known"
    BUDGET = "its dispatch needs merged duplicates, which a budget of active experts (max_active) does not reach"
    MUTATED = "an in-place operation changes its ids or weights after they are dispatched"

    # Why its dispatch cannot be cut out of the graph.
    WEIGHTS_UNKNOWN = "its routing weights could not be determined"
    DISPATCH_OUTSIDE = "its dispatch is outside the graph"
    NO_EXIT = "no single tensor with one row per token follows from its dispatch"
    READS_OTHERS = "its dispatch reads other tensors than ids, weights and hidden states"

    # Why its experts or its routing keep the kernels they have.
    GRADIENTS = "gradients are on"
    MANY_TOKENS = "more tokens than our kernels are faster for"
    NOT_MEASURED = "our kernels were not compared with its own"
    MANY_SLOTS = "more slots than our kernels are faster for"
    TOO_MANY_SLOTS = "more slots than our kernels take"
    DTYPE = "our kernels do not take its dtype"
    SHAPES = "its tensors have other shapes than our kernels take"
    SHARED_MEMORY = "its memory is shared with the rest of the graph"
    READ_ELSEWHERE = "more than its dispatch reads its results"
    NO_MEMORY = "there is no memory to compare it with ours"
    OURS_ALREADY = "its experts are sere.expert_mlp already"
    NOT_BATCHED = "its experts do not run as batched or grouped matmuls"
    NO_EXPERT_LAYER = "no expert layer of ours has its tensors and operations"
    OTHER_EXPERTS = "no expert layer of ours gives its numbers"
    NOT_TOP_K = "it does not select by top-k"
    NO_LOGITS = "its logits could not be determined"
    TWO_PROJECTIONS = "its router weight projects twice"
    OWN_OPERATIONS = "its routing has operations of its own"
    OTHER_ROUTING = "no routing of ours gives its ids and weights"

    # Why re-routing does not become part of the operator that selects.
    NOT_FUSED = "its routing is not ours"
    MERGES = "its slots have to be merged"
    COUNTED = "its ids are counted"
    MATRIX_LATE = "its matrix comes after it"


@dataclass(frozen=True)
class Skip:
    """A selection, or a part of a gate, that was left alone. Every pass refuses in this form.

    Attributes:
        reason: kind of refusal.
        node: the node at fault.
        detail: what was found, what was expected.
        evidence: the last of the matcher's questions that was answered with yes; the refusal with
            the highest is the nearest miss.
    """

    reason: SkipReason
    node: Node
    detail: str = ""
    evidence: Evidence = Evidence.NONE

    @property
    def is_refused_gate(self) -> bool:
        """Whether a router feeds it and experts follow it: what a user would call a gate."""
        return self.evidence >= Evidence.EXPERTS and self.reason is not SkipReason.REWRITTEN

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value


@dataclass(frozen=True)
class Use:
    """One consumer of the ids.

    Attributes:
        consumer: the node that reads them.
        read: the node it reads: the ids themselves or a view, cast or copy of them.
        kind: what the consumer does.
    """

    consumer: Node
    read: Node
    kind: UseKind


@dataclass(frozen=True)
class Gate:
    """A top-k selection over router scores whose ids dispatch tokens to experts.

    Attributes:
        selection: the node that selects, see `evidence/selections.py`; the first where several
            select one expert each.
        form: how it selects: "top-k", "sort", "max" or "steps".
        ids: int [..., K], expert ids in descending order of score.
        all_ids: every node that holds the ids; tracers may take them out of the selection twice.
        values: [..., K], the selected scores, or None where they are not used.
        router_weight: graph input or attribute, [E, H] or [H, E].
        router_input: the hidden states that the router projects.
        num_experts: E; ids outside [0, E) are no experts (slots that compute nothing, padding).
        top_k: K.
        scoring: operations between projection and selection that shape the scores, e.g. "softmax".
        is_sorted: whether the selection promises descending order.
        uses: every consumer of the ids.
        weights: the routing weights [..., K] as the dispatch consumes them, where they could be
            determined.
        weights_skip: why they could not.
    """

    selection: Node
    ids: Node
    values: Node | None
    router_weight: Node
    router_input: Node
    num_experts: int
    top_k: int
    scoring: str
    is_sorted: bool
    uses: tuple[Use, ...]
    weights: Node | None = None
    weights_skip: Skip | None = field(default=None, compare=False)
    form: str = "top-k"
    all_ids: tuple[Node, ...] = ()

    @property
    def dispatch_uses(self) -> tuple[Use, ...]:
        """The uses that must see re-routed ids."""
        return tuple(use for use in self.uses if use.kind.dispatches)

    @property
    def needs_merge(self) -> bool:
        """Whether some dispatch is not proven to sum a token's duplicate experts."""
        return not all(use.kind.sums_duplicates for use in self.dispatch_uses)

    @property
    def dispatch(self) -> str:
        """The kinds of dispatch in words, for reports."""
        return ", ".join(sorted({use.kind.value for use in self.dispatch_uses}))
