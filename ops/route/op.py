"""The operator `sere::route`: argument checks, shape rule, choice between kernels and reference."""

import torch
from torch import Tensor

from ..checks import check_budget, check_min_active, check_real_tokens, check_same_device, check_similarity
from ..native import FLOAT_NUMBERS
from ..registration import register_triton_op
from .reference import GROUP_SCORES, SCORINGS, Rerouting, Scoring, route_reference

# K maxima are taken one after the other, of a token's scores in registers.
KERNEL_MAX_SLOTS = 32
KERNEL_MAX_EXPERTS = 1024


def check_arguments(
    logits: Tensor, bias: Tensor | None, scoring: Scoring, rerouting: Rerouting, router_weight: Tensor | None = None
) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device, value), naming argument, expected and actual."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected dtype float32, bfloat16 or float16, got {logits.dtype}")
    if not scoring.dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype, got {scoring.dtype}")
    num_experts = _num_experts(logits, router_weight)
    if logits.dim() == 0 or not 1 <= scoring.top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to E of logits {list(logits.shape)}, got {scoring.top_k}")
    if scoring.scoring not in SCORINGS:
        raise ValueError(f"scoring: expected one of {', '.join(SCORINGS)}, got {scoring.scoring!r}")
    if bias is not None and list(bias.shape) != [num_experts]:
        raise ValueError(f"bias: expected shape [{num_experts}], got {list(bias.shape)}")
    if rerouting.ids_dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids_dtype: expected torch.int32 or torch.int64, got {rerouting.ids_dtype}")
    matrices = {"similarity": rerouting.similarity, "projection": rerouting.projection}
    check_same_device(logits, "logits", bias=bias, router_weight=router_weight, **matrices)
    _check_tokens(logits, rerouting)
    _check_groups(num_experts, scoring)
    _check_rerouting(num_experts, rerouting)


def _num_experts(logits: Tensor, router_weight: Tensor | None) -> int:
    """E, of logits [..., E], or of hidden states [..., H] and the router's weight [E, H] that makes them."""
    if router_weight is None:
        return int(logits.shape[-1]) if logits.dim() else 0
    if router_weight.dtype is not logits.dtype:
        raise TypeError(f"router_weight: expected dtype {logits.dtype} (of logits), got {router_weight.dtype}")
    if logits.dim() == 0 or router_weight.dim() != 2 or router_weight.shape[1] != logits.shape[-1]:
        raise ValueError(
            f"router_weight: expected shape [E, H] with hidden states [..., H], got {list(router_weight.shape)} with "
            f"{list(logits.shape)}"
        )
    return int(router_weight.shape[0])


def _check_groups(num_experts: int, scoring: Scoring) -> None:
    if scoring.group_score not in GROUP_SCORES:
        raise ValueError(f"group_score: expected one of {', '.join(GROUP_SCORES)}, got {scoring.group_score!r}")
    if scoring.num_groups < 1 or num_experts % scoring.num_groups:
        raise ValueError(f"num_groups: expected a divisor of {num_experts} experts, got {scoring.num_groups}")
    if not 1 <= scoring.top_groups <= scoring.num_groups:
        raise ValueError(f"top_groups: expected 1 to {scoring.num_groups} groups, got {scoring.top_groups}")
    if scoring.is_grouped and scoring.group_score == "top2" and num_experts // scoring.num_groups < 2:
        raise ValueError(f"group_score: top2 needs groups of two experts, got {scoring.num_groups} of {num_experts}")


def _check_tokens(logits: Tensor, rerouting: Rerouting) -> None:
    for name in ("real_tokens", "rerouted_tokens"):
        tokens = getattr(rerouting, name)
        check_real_tokens(tokens, name)
        check_same_device(logits, "logits", **{name: tokens})


def _check_rerouting(num_experts: int, rerouting: Rerouting) -> None:
    check_budget(rerouting.max_active)
    if rerouting.fill:
        check_min_active(rerouting.min_active)
    if rerouting.similarity is None:
        return
    if rerouting.fill:
        raise ValueError("similarity: filling goes by the token's own scores, expected None with fill=True")
    check_similarity(rerouting.similarity, rerouting.min_active)
    for name, matrix in (("similarity", rerouting.similarity), ("projection", rerouting.projection)):
        if matrix is not None and matrix.shape != (num_experts, num_experts):
            raise ValueError(f"{name}: expected shape {[num_experts] * 2}, got {list(matrix.shape)}")
    if rerouting.projection is not None and rerouting.projection.dtype != torch.float32:
        raise TypeError(f"projection: expected dtype torch.float32, got {rerouting.projection.dtype}")


def _route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool = False,
    epsilon: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    outside_zero: bool = True,
    similarity: Tensor | None = None,
    select_top_k: int = 0,
    threshold: float = 0.0,
    min_active: int = 0,
    max_active: int = 0,
    projection: Tensor | None = None,
    fill: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    real_tokens: Tensor | None = None,
    rerouted_tokens: Tensor | None = None,
    router_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    # Under torch.compile(dynamic=True) numbers can be symbolic; the generated code depends on their value.
    settings = Scoring(
        int(top_k), scoring, bool(renormalize), float(epsilon), float(scale), dtype,
        int(num_groups), int(top_groups), group_score, bool(outside_zero),
    )  # fmt: skip
    numbers = int(select_top_k), float(threshold), int(min_active), int(max_active)
    rerouting = Rerouting(similarity, *numbers, projection, bool(fill), ids_dtype, real_tokens, rerouted_tokens)
    check_arguments(logits, bias, settings, rerouting, router_weight)
    in_one = _in_one_cluster(logits, bias, settings, rerouting, router_weight)
    if router_weight is not None and not in_one:
        logits, router_weight = torch.nn.functional.linear(logits, router_weight), None
        in_one = _in_one_cluster(logits, bias, settings, rerouting, None)
    if in_one:
        return torch.ops.sere.route_cluster.default(
            logits, bias, settings.top_k, settings.scoring, settings.renormalize, settings.epsilon, settings.scale,
            settings.dtype, rerouting.similarity, *numbers, rerouting.projection, rerouting.fill, rerouting.ids_dtype,
            rerouting.real_tokens, rerouting.rerouted_tokens, router_weight,
        )  # fmt: skip
    if logits.is_cuda and settings.top_k <= KERNEL_MAX_SLOTS and logits.shape[-1] <= KERNEL_MAX_EXPERTS:
        from ..launching import device_guard
        from .launch import launch_route

        with device_guard(logits):
            return launch_route(logits, bias, settings, rerouting)
    return route_reference(logits, bias, settings, rerouting)


def _in_one_cluster(
    logits: Tensor, bias: Tensor | None, scoring: Scoring, rerouting: Rerouting, router_weight: Tensor | None
) -> bool:
    """Whether `cluster.cu` selects and fills or re-routes, and makes the logits where the router's weight is given.

    Where a compiler traces, re-routing is left to Triton: Inductor launches that itself, and an operator of Python's
    would cost the host more than a launch costs the device.
    """
    if not rerouting.acts_on(scoring.top_k) or scoring.is_grouped or scoring.dtype not in FLOAT_NUMBERS:
        return False
    from ..cuda.cluster import MOST_REROUTED_TOKENS, MOST_TOKENS, takes, takes_hidden

    floats, is_traced = (bias, rerouting.similarity), type(logits) is not Tensor
    if router_weight is not None:
        return not is_traced and takes_hidden(logits, router_weight, scoring.top_k, *floats)
    if rerouting.fill:
        return takes(logits.shape, scoring.top_k, logits, bias, most=MOST_TOKENS)
    return not is_traced and takes(logits.shape, scoring.top_k, logits, *floats, most=MOST_REROUTED_TOKENS)


@torch.library.custom_op("sere::route_cluster", mutates_args=())
def route_cluster(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    epsilon: float,
    scale: float,
    dtype: torch.dtype,
    similarity: Tensor | None,
    select_top_k: int,
    threshold: float,
    min_active: int,
    max_active: int,
    projection: Tensor | None,
    fill: bool,
    ids_dtype: torch.dtype,
    real_tokens: Tensor | None,
    rerouted_tokens: Tensor | None,
    router_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`sere::route` that changes ids, by `cluster.cu` on Hopper and later; by Triton where that cannot be had."""
    from ..cuda.cluster import Rows, Selection, launch_cluster
    from ..launching import device_guard
    from .launch import launch_route

    flat = logits.reshape(-1, logits.shape[-1])
    bias, similarity, projection = (None if t is None else t.contiguous() for t in (bias, similarity, projection))
    rows = Rows(flat if flat.stride(1) == 1 else flat.contiguous(), bias=bias, router=router_weight)
    numbers = select_top_k, threshold, min_active, max_active
    rerouting = Rerouting(similarity, *numbers, projection, fill, ids_dtype, real_tokens, rerouted_tokens)
    shape = (*logits.shape[:-1], top_k)
    ids = torch.empty(shape, dtype=ids_dtype, device=logits.device)
    weights = torch.empty(shape, dtype=dtype, device=logits.device)
    outs = ids.view(-1, top_k), weights.view(-1, top_k)
    with device_guard(logits):
        if launch_cluster(rows, rerouting, Selection(scoring, renormalize, epsilon, scale), *outs):
            return weights, ids
        logits = logits if router_weight is None else torch.nn.functional.linear(logits, router_weight)
        return launch_route(logits, bias, Scoring(top_k, scoring, renormalize, epsilon, scale, dtype), rerouting)


@route_cluster.register_fake
def _route_cluster_fake(
    logits, bias, top_k, scoring, renormalize, epsilon, scale, dtype, similarity, select_top_k, threshold, min_active,
    max_active, projection, fill, ids_dtype, *_
):  # fmt: skip
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=ids_dtype)


_route_op = register_triton_op("sere::route", _route)


@_route_op.register_fake
def _route_fake(
    logits, bias, top_k, scoring, renormalize=False, epsilon=0.0, scale=1.0, dtype=torch.float32, num_groups=1,
    top_groups=1, group_score="max", outside_zero=True, similarity=None, select_top_k=0, threshold=0.0, min_active=0,
    max_active=0, projection=None, fill=False, ids_dtype=torch.int64, real_tokens=None, rerouted_tokens=None,
    router_weight=None,
):  # fmt: skip
    settings = Scoring(
        top_k, scoring, renormalize, epsilon, scale, dtype, num_groups, top_groups, group_score, outside_zero
    )
    numbers = select_top_k, threshold, min_active, max_active
    rerouting = Rerouting(similarity, *numbers, projection, fill, ids_dtype, real_tokens, rerouted_tokens)
    check_arguments(logits, bias, settings, rerouting, router_weight)
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=ids_dtype)


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool = False,
    epsilon: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    outside_zero: bool = True,
    similarity: Tensor | None = None,
    select_top_k: int = 0,
    threshold: float = 0.0,
    min_active: int = 0,
    max_active: int = 0,
    projection: Tensor | None = None,
    fill: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    real_tokens: Tensor | None = None,
    rerouted_tokens: Tensor | None = None,
    router_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score router logits, select the top K experts of each token, weigh and re-route them.

    Args:
        logits: fp32, bf16 or fp16 [..., E], any strides; everything is computed in fp32.
        bias: [E], added to the scores for the selection only; the weights are the scores without it.
        top_k: K, at most E.
        scoring: "softmax" or "sigmoid" over all experts before the selection, "softmax_after" over the selected
            logits, or "none".
        renormalize: divide the weights of a token by their sum plus epsilon.
        epsilon: see renormalize.
        scale: a factor on the weights, last.
        dtype: of the weights.
        num_groups: G; the experts are G groups of consecutive ones, of which `top_groups` are open to a token.
        top_groups: how many groups. All of them, as by default, is no limit.
        group_score: what ranks groups: "max", their best score plus bias, or "top2", the sum of their two best.
        outside_zero: experts of other groups are selected as if their score were 0; False: -inf.
        similarity: fp32, bf16 or fp16 [E, E]. With one, and 0 < select_top_k < K, ids are re-routed as `sere::reroute`
            does; the other arguments of that operator follow.
        select_top_k: S.
        threshold: rho.
        min_active: the least number of primary experts; 0 is off.
        max_active: a budget of primary experts; 0 is off.
        projection: fp32 [E, E]: the weight of a slot that goes from u to v is multiplied by projection[u, v].
        fill: instead of by a similarity, lost slots are filled as `sere::fill` does, inside of the groups that are open
            to the token: select_top_k, threshold, min_active and max_active are those of that operator, scores without
            the bias weigh (softmax for "softmax_after" and "none"), and what is selected by ranks.
        ids_dtype: of the ids, int64 or int32.
        real_tokens: int64 [1], how many of the tokens are real, the first ones; the others, padding, get the ids -1
            and the weights 0. None: all are.
        rerouted_tokens: int64 [1], how many of the tokens take part in re-routing or filling, the first ones; the
            others count for nothing and keep their experts. 0 changes nothing. None: all do.
        router_weight: [E, H], of the dtype of `logits`, which are hidden states [..., H] then: logits are made of them
            by this weight, as `torch.nn.functional.linear` makes them, up to the order of sums.

    Returns:
        (weights, ids), both new and contiguous [..., K], in descending order of score plus bias before
        re-routing. Among equals the lowest expert comes first, NaN is above everything (with groups it has no defined
        place). Without bias and groups the order is that of the logits, which scores that round to the same keep.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a number, the name of the scoring or of the groups' score does not fit.

    On CUDA one launch; two with re-routing, except where one is faster (`one_launch` in launch.py), or with filling (up
    to 256 tokens and experts on Hopper and later: one). On Hopper and later re-routing of up to 64 tokens is one launch
    too where no compiler traces the call, and with `router_weight` the logits are made in it. No gradient.
    """
    return torch.ops.sere.route.default(
        logits, bias, top_k, scoring, renormalize, epsilon, scale, dtype, num_groups, top_groups, group_score,
        outside_zero, similarity, select_top_k, threshold, min_active, max_active, projection, fill, ids_dtype,
        real_tokens, rerouted_tokens, router_weight,
    )  # fmt: skip
