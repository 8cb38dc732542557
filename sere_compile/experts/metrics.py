"""How alike experts are, from their outputs on the same tokens: the metrics of SERE, in streaming form.

Every metric is an accumulator: `update` takes the outputs of all E experts on some tokens, any
number of times, and `similarity` gives the `[E, E]` matrix over all of them. Memory does not grow
with the tokens.

Sources: SERE, arXiv:2602.07616 (the choice of metrics); Kornblith et al. 2019, arXiv:1905.00414
(CKA); Nguyen et al. 2021, arXiv:2010.15327 (CKA from minibatches). Sums are kept in float64,
because a distance comes out of a difference of large inner products and some experts are nearly
copies of each other.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import torch

from ..errors import ConfigError, ProbeError

# Float64 elements of the largest temporary: 128 MiB.
DEFAULT_MAX_ELEMENTS = 2**24
# Relative to squared norms. The float64 Gram of two equal experts can be off by some 1e-14;
# distances below 1e-6 of the outputs' norm are therefore nought, or the noise of equal experts
# would be scaled up to [0, 1].
_NOISE = 1e-12


class SimilarityAccumulator(Protocol):
    """What calibration needs of a metric."""

    num_tokens: int

    def update(self, outputs: torch.Tensor) -> None:
        """Add the outputs `[E, n, H]` of all experts on n tokens."""

    def similarity(self) -> torch.Tensor:
        """The `[E, E]` float32 similarity over all tokens so far: symmetric, ones on the diagonal."""

    def sums(self) -> torch.Tensor | None:
        """The `[E, E]` float64 sums that it keeps, None before the first outputs; with `num_tokens` all it knows."""

    def restore(self, sums: torch.Tensor | None, num_tokens: int) -> None:
        """Go on from what `sums` and `num_tokens` were."""


class _GramAccumulator:
    """Sums `sum_t <A_p[t], A_q[t]>` over tokens into an `[E, E]` float64 Gram matrix.

    Args:
        num_experts: E.
        max_elements: bound on the float64 temporary; tokens are taken in chunks of at most this
            many elements over all experts, and of one token at least.
    """

    def __init__(self, num_experts: int, max_elements: int = DEFAULT_MAX_ELEMENTS) -> None:
        self.num_experts = _positive("num_experts", num_experts)
        self.max_elements = _positive("max_elements", max_elements)
        self.num_tokens = 0
        # Lives on the device of the first outputs, so that an update moves nothing.
        self._gram: torch.Tensor | None = None

    def update(self, outputs: torch.Tensor) -> None:
        """Add the outputs `[E, n, H]` of all experts on the same n tokens; any floating dtype, any device.

        Raises:
            ProbeError: wrong shape or dtype, or outputs that are not finite (nothing is added
                then).
        """
        _check_outputs(outputs, self.num_experts)
        if not outputs.shape[1]:
            return
        if self._gram is None:
            self._gram = outputs.new_zeros(self.num_experts, self.num_experts, dtype=torch.float64)
        for chunk in self._chunks(outputs.detach()):
            rows = self._prepare(chunk.double()).flatten(1)
            # Not in place: batches may come from inside and from outside inference mode.
            self._gram = self._gram.to(rows.device) + rows @ rows.T
        self.num_tokens += outputs.shape[1]

    def sums(self) -> torch.Tensor | None:
        """See `SimilarityAccumulator`. The tensor is never written to: an update makes a new one."""
        return self._gram

    def restore(self, sums: torch.Tensor | None, num_tokens: int) -> None:
        """See `SimilarityAccumulator`."""
        self._gram, self.num_tokens = sums, num_tokens

    def _chunks(self, outputs: torch.Tensor) -> Iterator[torch.Tensor]:
        experts, _, width = outputs.shape
        yield from outputs.split(max(1, self.max_elements // max(1, experts * width)), dim=1)

    def _prepare(self, chunk: torch.Tensor) -> torch.Tensor:
        return chunk

    def _collected(self) -> torch.Tensor:
        """The Gram matrix, exactly symmetric, which a matrix product alone does not promise."""
        if self._gram is None:
            raise ProbeError(f"{type(self).__name__} has seen no expert outputs; call update() first")
        return _no_overflow((self._gram + self._gram.T) / 2)


class FrobeniusAccumulator(_GramAccumulator):
    """`1 - d(p, q) / max d` with `d(p, q) = ||A_p - A_q||_F` over all tokens; the paper's recommendation.

    Distances come from the Gram matrix, `d^2 = G_pp + G_qq - 2 G_pq`, so no pair of outputs is ever
    formed. Experts that are all equal are all similar: a matrix of ones.
    """

    def similarity(self) -> torch.Tensor:
        """`[E, E]` float32 in [0, 1], symmetric, ones on the diagonal.

        Raises:
            ProbeError: no outputs were added.
        """
        gram = self._collected()
        squares = gram.diagonal()
        total = squares[:, None] + squares[None, :]
        squared = total - 2 * gram
        distance = torch.where(squared > _NOISE * total, squared, 0.0).sqrt()
        largest = distance.max()
        return _finished(1 - distance / largest if largest > 0 else torch.ones_like(distance))

    def projection(self) -> torch.Tensor:
        """`[E, E]` float32, `a[u, v] = <A_u, A_v> / <A_v, A_v>`: the scale of v that comes closest to u.

        Not symmetric. Ones on the diagonal; a column v whose expert always gives zero is zero, its
        diagonal entry included.

        Raises:
            ProbeError: no outputs were added.
        """
        gram = self._collected()
        squares = gram.diagonal()
        return torch.where(squares > 0, gram / squares, 0.0).float()


class CosineAccumulator(_GramAccumulator):
    """The mean over tokens of `cos(A_p[t], A_q[t])`.

    A token for which an expert gives zeros counts as cosine 0 with every other expert. The
    reference implementation maps this to [0, 1] by `(c + 1) / 2`: the same choices, other
    thresholds.
    """

    def similarity(self) -> torch.Tensor:
        """`[E, E]` float32 in [-1, 1], symmetric, ones on the diagonal.

        Raises:
            ProbeError: no outputs were added.
        """
        return _finished((self._collected() / self.num_tokens).clamp(-1, 1))

    def _prepare(self, chunk: torch.Tensor) -> torch.Tensor:
        # By the largest entry first: the squares of tiny outputs would vanish.
        chunk = chunk / _or_one(chunk.abs().amax(dim=-1, keepdim=True))
        return chunk / _or_one(chunk.norm(dim=-1, keepdim=True))


class CkaAccumulator:
    """Centred kernel alignment, from minibatches: one `update` is one minibatch.

    With the kernel matrix `K_p[i, j] = k(A_p[i], A_p[j])` over the n tokens of a batch and the
    centring `C = I - 1/n`, the biased HSIC is `h(p, q) = tr(K_p C K_q C) / (n - 1)^2`, and
    `CKA(p, q) = H_pq / sqrt(H_pp H_qq)` where H is the mean of h over batches, weighted by their
    tokens. A single batch gives the full CKA exactly. Summing before dividing is the minibatch
    estimator of Nguyen et al.; they sum the unbiased HSIC, which differs from the full CKA on one
    batch and can be negative. The price is a bias towards 1 where a batch has fewer tokens than the
    outputs have dimensions.

    Kernels, on outputs x, y:
        linear: `<x, y>`.
        rbf: `exp(-|x - y|^2 / (2 s^2))` with s = `bandwidth` times the median distance between two
            tokens of the batch, for each expert its own (Kornblith et al. use fractions from 0.2 to
            0.8).
        polynomial: `(<x, y> + 1)^3`; it depends on the scale of the outputs, which the others do
            not.
    (The reference implementation has degree 2, and for s^2 the variance of the squared distances.)

    An update costs time E^2 n^2 + E n^2 H. Its temporaries are of `max_elements` float64 elements
    (or E n, if that is more) plus a few n x n matrices. An expert whose output does not vary aligns
    with none: 0.
    """

    KERNELS = ("linear", "rbf", "polynomial")

    def __init__(
        self,
        num_experts: int,
        kernel: str = "linear",
        bandwidth: float = 0.8,
        max_elements: int = DEFAULT_MAX_ELEMENTS,
    ) -> None:
        if kernel not in self.KERNELS:
            raise ConfigError(f"unknown CKA kernel {kernel!r}; {_nearest(kernel, self.KERNELS)}")
        if not bandwidth > 0:
            raise ConfigError(f"bandwidth must be positive, got {bandwidth}")
        self.num_experts = _positive("num_experts", num_experts)
        self.max_elements = _positive("max_elements", max_elements)
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.num_tokens = 0
        self._hsic: torch.Tensor | None = None

    def update(self, outputs: torch.Tensor) -> None:
        """Add one minibatch, the outputs `[E, n, H]` of all experts on the same n tokens.

        A batch of one token has no variance, and adds nothing; nor does an empty one.

        Raises:
            ProbeError: wrong shape or dtype, or outputs that are not finite (nothing is added
                then).
        """
        _check_outputs(outputs, self.num_experts)
        tokens = outputs.shape[1]
        if tokens < 2:
            return
        hsic = self._batch_hsic(outputs.detach()) * (tokens / (tokens - 1) ** 2)
        self._hsic = hsic if self._hsic is None else self._hsic.to(hsic.device) + hsic
        self.num_tokens += tokens

    def similarity(self) -> torch.Tensor:
        """`[E, E]` float32 in [0, 1], symmetric, ones on the diagonal.

        Raises:
            ProbeError: no batch of two tokens or more was added.
        """
        if self._hsic is None:
            raise ProbeError("CkaAccumulator has seen no batch of two or more tokens; call update() first")
        roots = self._hsic.diagonal().sqrt()
        return _finished((self._hsic / _or_one(roots[:, None] * roots[None, :])).clamp(0, 1))

    def sums(self) -> torch.Tensor | None:
        """See `SimilarityAccumulator`. The tensor is never written to: an update makes a new one."""
        return self._hsic

    def restore(self, sums: torch.Tensor | None, num_tokens: int) -> None:
        """See `SimilarityAccumulator`."""
        self._hsic, self.num_tokens = sums, num_tokens

    def _batch_hsic(self, outputs: torch.Tensor) -> torch.Tensor:
        """`tr(K_p C K_q C)` for all pairs, [E, E], from a block of rows of every kernel matrix at a time."""
        experts, tokens, _ = outputs.shape
        scales, means, norms = zip(*(self._moments(expert.double()) for expert in outputs), strict=True)
        hsic = outputs.new_zeros(experts, experts, dtype=torch.float64)
        block = max(1, self.max_elements // (experts * tokens))
        for start in range(0, tokens, block):
            rows = slice(start, start + block)
            centred = [
                self._kernel_rows(expert.double(), rows, scale) - mean[rows, None] - mean + mean.mean()
                for expert, scale, mean in zip(outputs, scales, means, strict=True)
            ]
            flat = torch.stack(centred).flatten(1)
            hsic += flat @ flat.T
        hsic = _no_overflow((hsic + hsic.T) / 2)
        # Where centring cancelled all but rounding, the output does not vary.
        constant = hsic.diagonal() <= _NOISE**2 * torch.stack(norms)
        return hsic.masked_fill(constant[:, None] | constant[None, :], 0.0)

    def _moments(self, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of one expert's [n, H]: the rbf kernel's `2 s^2`, the kernel's row means [n] and squared norm."""
        scale = self._rbf_scale(outputs) if self.kernel == "rbf" else outputs.new_ones(())
        kernel = self._kernel_rows(outputs, slice(None), scale)
        return scale, kernel.mean(1), kernel.square().sum()

    def _kernel_rows(self, outputs: torch.Tensor, rows: slice, scale: torch.Tensor) -> torch.Tensor:
        if self.kernel == "rbf":
            return torch.exp(-_squared_distances(outputs, rows) / scale)
        inner = outputs[rows] @ outputs.T
        return inner if self.kernel == "linear" else (inner + 1) ** 3

    def _rbf_scale(self, outputs: torch.Tensor) -> torch.Tensor:
        tokens = len(outputs)
        squared = _squared_distances(outputs, slice(None))
        # Cut after the first entry, rows of n + 1 end on the diagonal.
        between = squared.flatten()[1:].view(tokens - 1, tokens + 1)[:, :-1]
        # Where most tokens are equal the median is 0, and the limit of the kernel is "are they
        # equal".
        return (2 * self.bandwidth**2 * between.median()).clamp_min(torch.finfo(torch.float64).tiny)


METRICS: dict[str, Callable[[int], SimilarityAccumulator]] = {
    "frobenius": FrobeniusAccumulator,
    "cosine": CosineAccumulator,
    "cka": CkaAccumulator,
    "cka_rbf": partial(CkaAccumulator, kernel="rbf"),
    "cka_polynomial": partial(CkaAccumulator, kernel="polynomial"),
}


def make_accumulator(method: str, num_experts: int) -> SimilarityAccumulator:
    """The accumulator that `METRICS` has under `method`, for `num_experts` experts.

    Raises:
        ConfigError: there is no such method.
    """
    if method not in METRICS:
        raise ConfigError(f"unknown similarity method {method!r}; {_nearest(method, METRICS)}")
    return METRICS[method](num_experts)


def _nearest(name: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    near = difflib.get_close_matches(str(name).lower(), choices, n=1, cutoff=0.0)[0]
    return f"did you mean {near!r}? There are {', '.join(choices)}"


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")
    return value


def _check_outputs(outputs: torch.Tensor, num_experts: int) -> None:
    shape = tuple(outputs.shape)
    if len(shape) != 3 or shape[0] != num_experts or shape[2] == 0:
        raise ProbeError(f"expected expert outputs of shape [{num_experts}, tokens, hidden], got {shape}")
    if not outputs.is_floating_point():
        raise ProbeError(f"expected floating-point expert outputs, got {outputs.dtype}")
    if shape[1] == 0:
        return
    # Minimum and maximum carry NaN on, and need no temporary of the outputs' size.
    finite = outputs.amin(dim=(1, 2)).isfinite() & outputs.amax(dim=(1, 2)).isfinite()
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ProbeError(f"the outputs of expert {', '.join(map(str, bad))} (of {num_experts}) hold NaN or infinity")


def _or_one(values: torch.Tensor) -> torch.Tensor:
    """A divisor that leaves zeros over zero at zero."""
    return torch.where(values > 0, values, 1.0)


def _squared_distances(outputs: torch.Tensor, rows: slice) -> torch.Tensor:
    """Between the given rows of [n, H] and all of them; [rows, n]."""
    # Distances do not change with the mean, their rounding does.
    outputs = outputs - outputs.mean(0)
    squares = outputs.square().sum(1)
    total = squares[rows, None] + squares
    squared = total - 2 * outputs[rows] @ outputs.T
    return torch.where(squared > _NOISE * total, squared, 0.0)


def _no_overflow(sums: torch.Tensor) -> torch.Tensor:
    if sums.isfinite().all():
        return sums
    raise ProbeError("the expert outputs are too large: their products overflow float64")


def _finished(similarity: torch.Tensor) -> torch.Tensor:
    return similarity.fill_diagonal_(1.0).float()
