"""Replace a dispatch whose cost does not follow the active experts by `sere.expert_mlp`.

    flat = view(ids, -1)                                  flat, sort, histc, grouped_mm, silu, ... are gone
    up = bmm(gate_up_proj[flat], repeat(hidden))    ->    out = sere.expert_mlp(hidden, ids, weights,
    act = silu(up[:, :I]) * up[:, I:]                         gate_up=gate_up_proj, down=down_proj, ..)
    out = (bmm(down_proj[flat], act) * w).sum(1)

`W[ids]` + bmm copies weights for every slot, and sort + histc + grouped_mm runs at half of the
memory's speed. What the region computes is not read off its nodes. Its weights, its operations and
the activations that these allow leave a few candidates, and the one that computes the region's own
numbers on random experts is taken (case 1). A region with an operation that no candidate has (case
2), whose numbers none reproduces (case 3), or that writes to or is written by the rest of the graph
(case 4) stays as it is, with a reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..ops.expert_mlp.op import DTYPES
from ..ops.expert_mlp.reference import expert_mlp_reference, gate_width, scale_sizes
from .extract_dispatch import DispatchRegion
from .gate import Gate, Skip, SkipReason, Use, UseKind
from .graph import nodes
from .graph.aliases import aliases
from .graph.columns import constant

_FP8_MATMULS = frozenset({nodes.FP8_BLOCKS_BY_ID, nodes.FP8_BLOCKS_SORTED})
MATMULS = _FP8_MATMULS | {"bmm", "grouped_mm", "transformers.grouped_mm_fallback"}
# Moving rows, counting slots, multiplying by routing weights, adding biases and slots up.
_ROUTINE = (
    nodes.VALUE_PRESERVING
    | MATMULS
    | {"transpose", "permute", "slice", "select", "chunk", "split", "unbind", "item", "index", "index_put"}
    | {"sort", "argsort", "histc", "bincount", "cumsum", "arange", "empty_like", "floor_divide"}
    | {"repeat_interleave", "repeat", "size", "sym_size", "mul", "add", "sum", "getattr", "masked_fill"}
)
# The operations of each activation; `gpt_oss` is recognised by its constants as well.
_ACTIVATING: Mapping[str, tuple[frozenset[str], ...]] = {
    "silu": (frozenset({"silu"}), frozenset({"sigmoid"})),
    "gelu": (frozenset({"gelu"}),),
    "gelu_tanh": (frozenset({"gelu"}), frozenset({"tanh"}), frozenset({"tanh", "pow"})),
    "relu": (frozenset({"relu"}),),
    "relu2": (frozenset({"relu", "square"}), frozenset({"relu", "pow"})),
    "gpt_oss": (frozenset({"clamp", "sigmoid"}),),
}
_GPT_OSS_CONSTANTS = frozenset({1.702, 7.0})
# Relative to the root mean square. The matmuls of float32 regions may be TF32; rounding to bfloat16
# gives 0.004. Where activations are rounded to FP8, the last bit before it decides between two
# numbers that are 1/8 apart: on an H200 0.014 (0.035 from what is not rounded at all).
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}
_FP8_TOLERANCE = 2e-2
_OF_FP8 = ("gate_up_scale", "down_scale", "fp8_activations")  # arguments that other weights go without
# Distance between two experts in the storage of the random weights, which overlap to need no more
# than one expert's.
_EXPERT_STEP = 64


@dataclass(frozen=True)
class ExpertLayer:
    """What a region computes, as arguments of `sere.expert_mlp`; tensors are inputs of the region."""

    gate_up: Node
    down: Node
    gate_up_bias: Node | None
    down_bias: Node | None
    activation: str
    interleaved: bool
    transposed: bool
    gate_up_scale: Node | None = None
    down_scale: Node | None = None
    fp8_activations: bool = False

    @property
    def tolerance(self) -> float:
        """How far it may be from the region, relative to the root mean square."""
        return _FP8_TOLERANCE if self.fp8_activations else _TOLERANCE[nodes.value(self.down).dtype]

    def arguments(self, value: Callable[[Node], Any] = lambda node: node) -> dict[str, Any]:
        """The operator's arguments after the weights, with `value(node)` for each tensor; of FP8's, those it has."""
        return {
            name: value(given) if isinstance(given, Node) else given
            for name, given in vars(self).items()
            if self.fp8_activations or name not in _OF_FP8
        }


def fuse_experts(
    gate: Gate, region: DispatchRegion, sizes: Mapping[Node, int], device: torch.device, *, fp8: bool = False
) -> Gate | Skip:
    """Replace the gate's dispatch region by one `sere.expert_mlp`, before the gate is re-routed.

    Args:
        gate: a gate of the graph; its ids and weights keep their nodes.
        region: from `extract_dispatch(gate)`.
        sizes: numbers for the graph inputs that are symbolic sizes, as one call would have them.
        device: where the region runs.
        fp8: also where weights are FP8, for which no kernel of ours was compared with stock ones.

    Returns:
        The gate with the operator as its one dispatch use, or why the graph is unchanged.
    """
    hidden = _hidden(region)
    if isinstance(hidden, Skip):
        return hidden
    if not fp8 and any(nodes.kind(node) in _FP8_MATMULS for node in region.inside):
        return Skip(SkipReason.NOT_MEASURED, region.output, 'FP8 weights; lower_experts="always" takes ours')
    candidates = [*_candidates(region, hidden), *_fp8_candidates(region, hidden)]
    if not candidates:
        return _why_no_candidate(region)
    exposed = _exposed(region, hidden)
    if exposed is not None:
        return Skip(SkipReason.SHARED_MEMORY, exposed, f"at {exposed.name}")
    layer = _confirmed(region, candidates, _outside(gate), sizes, device)
    return layer if isinstance(layer, Skip) else _replace(gate, region, layer, hidden)


def _hidden(region: DispatchRegion) -> Node | Skip:
    """The hidden states [T, H] that the region reads, as a node that stands before its output."""
    count = len(region.activations)
    if count != 1:
        return Skip(SkipReason.READS_OTHERS, region.output, f"{count} besides ids and weights, expected one")
    two_dimensional = all(len(nodes.shape(node) or ()) == 2 for node in (region.ids, region.weights, region.output))
    if not two_dimensional or not nodes.same_shape(region.ids, region.weights):
        return Skip(SkipReason.SHAPES, region.ids, "its dispatch is not over [T, K]")
    result, seen = _result(region), [region.activations[0]]
    for node in seen:
        if nodes.same_shape(node, result) and nodes.value(node).dtype == nodes.value(result).dtype:
            dtype = nodes.value(node).dtype
            return node if dtype in DTYPES else Skip(SkipReason.DTYPE, node, str(dtype))
        views = (user for user in node.users if nodes.kind(user) in ("view", "to") and nodes.operand(user) is node)
        seen.extend(user for user in views if user < region.output and user not in seen)
    return Skip(SkipReason.SHAPES, seen[0], "its hidden states are not [T, H] in the dtype of its result")


def _result(region: DispatchRegion) -> Node:
    """What the operator stands for: the region's output, or the cast of it that alone reads it."""
    users = list(region.output.users)
    casts = len(users) == 1 and nodes.kind(users[0]) == "to" and nodes.same_shape(users[0], region.output)
    return users[0] if casts else region.output


def _candidates(region: DispatchRegion, hidden: Node) -> Iterator[ExpertLayer]:
    """Every layer that has the region's tensors and could have its operations."""
    tensors = [node for node in region.inputs if nodes.is_tensor(node)]
    matrices = [node for node in tensors if len(nodes.shape(node) or ()) == 3]
    vectors = [node for node in tensors if len(nodes.shape(node) or ()) == 2]
    dtype = nodes.value(hidden).dtype
    if len(matrices) != 2 or len(vectors) > 2 or len(matrices) + len(vectors) != len(tensors):
        return
    if any(nodes.value(node).dtype != dtype for node in tensors):
        return
    width = nodes.last_size(hidden)
    biases = [None] * (2 - len(vectors)) + vectors
    for gate_up, down in itertools.permutations(matrices):
        for transposed, activation in itertools.product((False, True), _activations(region)):
            up_shape, down_shape = nodes.shape(gate_up) or (), nodes.shape(down) or ()
            experts, inner = down_shape[0], down_shape[1 if transposed else 2]
            columns = gate_width(activation) * inner
            wanted = (experts, width, columns) if transposed else (experts, columns, width)
            if up_shape != wanted or down_shape != ((experts, inner, width) if transposed else (experts, width, inner)):
                continue
            for up_bias, down_bias in dict.fromkeys(itertools.permutations(biases)):
                fits = up_bias is None or nodes.shape(up_bias) == (experts, columns)
                fits = fits and (down_bias is None or nodes.shape(down_bias) == (experts, width))
                for interleaved in (False, True)[: gate_width(activation)]:
                    if fits:
                        yield ExpertLayer(gate_up, down, up_bias, down_bias, activation, interleaved, transposed)


def _fp8_candidates(region: DispatchRegion, hidden: Node) -> Iterator[ExpertLayer]:
    """Layers of FP8 weights in blocks, each with the scales that its product reads."""
    products = [node for node in region.inside if nodes.kind(node) in _FP8_MATMULS]
    if len(products) != 2 or nodes.value(hidden).dtype == torch.float32:
        return
    (gate_up, gate_up_scale), (down, down_scale) = (
        (nodes.argument(node, 1, "B"), nodes.argument(node, 2, "Bs")) for node in products
    )
    if {gate_up, gate_up_scale, down, down_scale} != {node for node in region.inputs if nodes.is_tensor(node)}:
        return
    scaled = ((gate_up, gate_up_scale), (down, down_scale))
    if any(nodes.shape(scale) != scale_sizes(nodes.shape(weight) or (0,)) for weight, scale in scaled):
        return
    experts, width, inner = nodes.shape(down) or (0, 0, 0)
    for activation in _activations(region):
        if nodes.shape(gate_up) == (experts, gate_width(activation) * inner, width):
            yield ExpertLayer(
                gate_up, down, None, None, activation, False, False, gate_up_scale, down_scale, fp8_activations=True
            )


def _activations(region: DispatchRegion) -> list[str]:
    """The activations that the region's operations allow."""
    computing = _computing(region)
    kinds = {nodes.kind(node) for node in computing}
    if not kinds & MATMULS:
        return []
    special = frozenset(kinds - _ROUTINE)
    approximate = {nodes.argument(node, 1, "approximate", "none") for node in computing if nodes.kind(node) == "gelu"}
    constants = {
        value for node in computing for value in (*node.args, *node.kwargs.values()) if isinstance(value, float)
    }
    found = [name for name, kinds_of in _ACTIVATING.items() if special in kinds_of]
    if approximate:
        found = ["gelu_tanh"] if approximate == {"tanh"} else ["gelu"]
    if "gpt_oss" in found:
        return ["gpt_oss"] if constants >= _GPT_OSS_CONSTANTS else []
    return [name + suffix for name in found for suffix in ("_glu", "")]


def _computing(region: DispatchRegion) -> list[Node]:
    """Operations that may be part of an activation; those on ids (clamps, masks) are not."""
    computing = (node for node in region.inside if node.op in ("call_function", "call_method"))
    return [node for node in computing if not nodes.is_tensor(node) or nodes.value(node).is_floating_point()]


def _why_no_candidate(region: DispatchRegion) -> Skip:
    ours = next((node for node in region.inside if nodes.kind(node) == nodes.OUR_EXPERTS), None)
    if ours is not None:
        return Skip(SkipReason.OURS_ALREADY, ours, ours.name)
    kinds = {nodes.kind(node) for node in _computing(region)}
    if not kinds & MATMULS:
        return Skip(SkipReason.NOT_BATCHED, region.output, f"operations ({', '.join(sorted(kinds))})")
    other = sorted(kinds - _ROUTINE)
    shapes = [list(nodes.shape(node) or ()) for node in region.inputs if nodes.is_tensor(node)]
    detail = f"tensors {shapes}, operations ({', '.join(other)})"
    return Skip(SkipReason.NO_EXPERT_LAYER, region.output, detail)


def _exposed(region: DispatchRegion, hidden: Node) -> Node | None:
    """The first write that crosses the region's border, or None."""
    inside = set(region.inside)
    # Routing weights may be normalised in place before they are dispatched; the hidden states are
    # read first.
    dispatched = max(region.ids, region.weights)
    early = aliases(hidden)
    late = {alias for tensor in (region.ids, region.weights, *region.inputs) for alias in aliases(tensor)}
    for node in region.output.graph.nodes:
        if node < region.inside[0] or region.output < node:
            continue
        for written in nodes.writes(node):
            too_late = written in late and dispatched < node
            if written in early or too_late or (node in inside and written not in inside):
                return node
    return None


def _confirmed(
    region: DispatchRegion,
    candidates: list[ExpertLayer],
    outside: tuple[int, ...],
    sizes: Mapping[Node, int],
    device: torch.device,
) -> ExpertLayer | Skip:
    """The candidate that computes the region's numbers on random inputs, and 0 for ids `outside`."""
    generator = torch.Generator(device).manual_seed(0)
    scales = {scale for layer in candidates for scale in (layer.gate_up_scale, layer.down_scale)}

    def random(node: Node, *, matrix: bool = False) -> torch.Tensor:
        shape = nodes.shape_in_call(node, sizes)
        dtype = nodes.value(node).dtype
        if node in scales:
            return torch.rand(shape, generator=generator, device=device).to(dtype) + 0.5
        if matrix:
            return _random_experts(shape, dtype, generator)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    try:
        with torch.inference_mode(False), torch.no_grad():
            values: dict[Node, Any] = {
                node: random(node, matrix=len(nodes.shape(node) or ()) == 3)
                if nodes.is_tensor(node)
                else nodes.size_in_call(node, sizes)
                for node in region.inputs
            }
            dtype = nodes.value(_result(region)).dtype
            hidden = random(region.activations[0]) * 4  # far enough out for clamps to act
            experts = int((nodes.shape(candidates[0].down) or ())[0])
            shape = nodes.shape_in_call(region.ids, sizes)
            weights = torch.rand(shape, generator=generator, device=device).to(nodes.value(region.weights).dtype)
            for ids in _routes(experts, outside, shape, generator):
                ids = ids.to(nodes.value(region.ids).dtype)
                result = region.module(ids, weights, *values.values(), hidden)
                # The region may begin before the cast that produces the hidden states.
                flat, expected = hidden.to(dtype).reshape(result.shape), result.double()
                size = expected.square().mean().sqrt()
                errors = []
                for layer in candidates:
                    actual = expert_mlp_reference(flat, ids, weights, **layer.arguments(values.__getitem__)).double()
                    errors.append((actual - expected).square().mean().sqrt())
                allowed = [layer.tolerance * size for layer in candidates]
                candidates = [c for c, error, most in zip(candidates, errors, allowed, strict=True) if error <= most]
                if not candidates:
                    detail = f"nearest: {min(errors):.3g} off, allowed {max(allowed):.3g}"
                    return Skip(SkipReason.OTHER_EXPERTS, region.output, detail)
            return candidates[0]
    except torch.OutOfMemoryError as error:
        return Skip(SkipReason.NO_MEMORY, region.output, (str(error).splitlines() or ["none is left"])[0][:120])


def _outside(gate: Gate) -> tuple[int, ...]:
    """Values of the ids that name no expert: columns after the experts, and the mark of padding."""
    scores = nodes.operand(gate.selection)
    columns = nodes.last_size(scores) if scores is not None else None
    assert columns is not None  # otherwise it would not be a gate
    argument = {"where": "other", "masked_fill": "value"}.get(nodes.kind(gate.ids))
    padding = constant(nodes.argument(gate.ids, 2, argument)) if argument is not None else None
    marks = () if padding is None or 0 <= padding < columns else (int(padding),)
    return (*marks, *range(gate.num_experts, columns))


def _routes(
    experts: int, outside: tuple[int, ...], shape: tuple[int, ...], generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Random ids of experts; then every value outside, as many at a time as there are slots."""
    yield torch.randint(experts, shape, generator=generator, device=generator.device)
    slots = math.prod(shape)
    for start in range(0, len(outside), slots):
        few = torch.tensor(outside[start : start + slots], device=generator.device)
        yield few.repeat(-(-slots // len(few)))[:slots].reshape(shape)


def _random_experts(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Expert weights [E, N, M] that keep the scale of what they multiply; their storage overlaps."""
    experts, rows, columns = shape
    count = rows * columns + (experts - 1) * _EXPERT_STEP
    numbers = torch.randn(count, generator=generator, device=generator.device) * min(rows, columns) ** -0.5
    return numbers.to(dtype).as_strided(shape, (_EXPERT_STEP, columns, 1))


def _replace(gate: Gate, region: DispatchRegion, layer: ExpertLayer, hidden: Node) -> Gate:
    result = _result(region)
    graph = result.graph
    with graph.inserting_before(region.output):
        routed = (hidden, gate.ids, region.weights)
        new = graph.call_function(torch.ops.sere.expert_mlp.default, routed, layer.arguments())
    new.meta = dict(result.meta)
    result.replace_all_uses_with(new)
    for node in reversed(dict.fromkeys((*region.inside, result))):
        # Some have other users too; a write has its effect inside the region only (see `_exposed`).
        if not node.users:
            graph.erase_node(node)
    kept = tuple(use for use in gate.uses if not use.consumer._erased)
    return dataclasses.replace(gate, uses=(*kept, Use(new, gate.ids, UseKind.EXPERT_INDEX)))
