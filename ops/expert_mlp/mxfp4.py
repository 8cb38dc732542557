"""MXFP4, the format of gpt-oss's experts: 4-bit floats (E2M1), of which 32 in a row share a power of two (E8M0).

OCP Microscaling Formats (MX) Specification 1.0. Two numbers are one byte, the first in its low bits. Scales are biased
by 127; 255 stands for NaN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers of a row that share one scale.
MX_BLOCK = 32
# Numbers that kernels load as one, 16 bits.
MX_WORD = 4
# Twice the numbers that the codes 0 to 7 stand for; with 8 added to its code a number is negative.
_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
_BIAS = 127


def mxfp4_sizes(sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the bytes and of the scales of weights [.., N], N a multiple of 32: [.., N / 2] and [.., N / 32]."""
    *leading, depth = sizes
    return (*leading, depth // 2), (*leading, depth // MX_BLOCK)


def unpack_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """The numbers that bytes uint8 [.., N / 2] and scales uint8 [.., N / 32] stand for: fp32 [.., N]."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
    exponent, half = codes >> 1 & 3, codes & 1
    doubled = torch.where(exponent == 0, half, (2 + half) << (exponent - 1).clamp(min=0))
    numbers = torch.where(codes < 8, doubled, -doubled.float()) * 0.5
    return (numbers.unflatten(-1, (-1, MX_BLOCK)) * _powers(scale)[..., None]).flatten(-2)


def _powers(scale: Tensor) -> Tensor:
    """2 ** (scale - 127) in fp32, from the bits, since pow rounds; the least one has no exponent of its own."""
    bits = scale.int()
    powers = torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)
    return torch.where(bits == 255, torch.nan, powers)


def pack_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes and scales that stand for weights exactly.

    Args:
        weights: [.., N] in any floating-point dtype, N a multiple of 32; numbers that were MXFP4 once, as those of a
            checkpoint that was dequantised.

    Returns:
        uint8 [.., N / 2] and uint8 [.., N / 32], for `unpack_mxfp4` and `sere::expert_mlp`.

    Raises:
        ValueError: N is no multiple of 32, or some weights are no such numbers.
    """
    if weights.shape[-1] % MX_BLOCK:
        raise ValueError(f"weights: expected a last size that is a multiple of {MX_BLOCK}, got {list(weights.shape)}")
    blocks = weights.float().unflatten(-1, (-1, MX_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    # With the largest at 4 or 6 all others have codes, if they have any with another scale.
    exponent = torch.where(largest > 0, largest.frexp().exponent - 3, 0).clamp(-_BIAS, _BIAS)
    doubled = torch.ldexp(blocks.abs().double(), 1 - exponent)
    table = torch.tensor(_DOUBLED, dtype=torch.float64, device=weights.device)
    codes = torch.bucketize(doubled, table).clamp(max=len(_DOUBLED) - 1)
    exact = (table[codes] == doubled).all(-1)
    if not bool(exact.all()):
        raise ValueError(
            f"weights: expected numbers of MXFP4, got others in {int((~exact).sum()):,} of {exact.numel():,} blocks of "
            f"{MX_BLOCK}"
        )
    codes = (codes + 8 * blocks.signbit()).to(torch.uint8).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent[..., 0] + _BIAS).to(torch.uint8)
