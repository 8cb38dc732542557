"""Whether the matrices of a profile fit a gate: the errors that a user reads where they do not."""

from __future__ import annotations

import torch

from ..errors import ProfileError


def check_size(matrix: torch.Tensor, gate: str, num_experts: int) -> None:
    """Refuse a matrix [E', E'] for a gate of E experts.

    Raises:
        ProfileError: E' differs from E.
    """
    if matrix.shape[0] != num_experts:
        raise ProfileError(f"the matrix for {gate} is {list(matrix.shape)}, its gate has {num_experts} experts")


def required_projection(projection: torch.Tensor | None, gate: str) -> torch.Tensor:
    """The projection coefficients of a gate, which `substitution="projection"` needs.

    Raises:
        ProfileError: there are none.
    """
    if projection is None:
        raise ProfileError(
            f'substitution="projection" needs projection coefficients, and this profile has none for {gate}: make one '
            "with sere_compile.calibrate(model, batches), whose profiles have them"
        )
    return projection
