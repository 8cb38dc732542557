"""How the Triton kernels of `sere::expert_mlp` are cut into tiles: the choices, and the rule that makes them."""

import dataclasses

import torch

# Rows of the smallest tile; tl.dot takes no fewer.
ROWS = 16
# Where tiles of 32 rows would read the weights of many experts twice.
MANY_SLOTS_PER_EXPERT = 24
# Where looking at all slots for each tile costs more than a launch that does so once.
MANY_SLOTS = 1024
# Columns of a tile of 16-bit numbers, and where three programs on each multiprocessor of an H200, 396, would have no
# two rounds of the second projection's tiles: the second one would be of a few, each as long as all the first.
TILE_COLUMNS, FEW_TILES = 64, 792


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Meta-parameters of one projection's launch; `per_sm` programs on each multiprocessor.

    With `align` tiles of the first projection may be narrower than `block_n`, by multiples of `align`, see `cut`.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int
    block_m: int = 32
    swap: bool = False
    align: int | None = None

    @property
    def step(self) -> int:
        """What widths of tiles are multiples of."""
        return self.align or self.block_n

    def arguments(self) -> dict:
        """As keyword arguments of a launch."""
        return {
            "SMALL": ROWS, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "SWAP": self.swap, "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip

    def programs(self, device: torch.device) -> int:
        """The size of the grid on a device. Without CUDA (fake tensors, the interpreter) some small number."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return 3
        return self.per_sm * torch.cuda.get_device_properties(device).multi_processor_count


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Meta-parameters of a call.

    `chunk` bounds the words that a program looks at together: 4096 fit its registers. `planned`: a launch ahead of
    the projections finds out which slots are whose, where each program of the first would do so for each tile.
    """

    gate_up: TileConfig
    down: TileConfig
    chunk: int = 4096
    planned: bool = False


def launch_config(
    dtype: torch.dtype,
    transposed: bool,
    many_per_expert: bool = False,
    planned: bool = False,
    mxfp4: bool = False,
    few_tiles: bool = False,
) -> LaunchConfig:
    """The tiles for one layer's weights.

    `many_per_expert`: more than `MANY_SLOTS_PER_EXPERT` slots, T * K / E; `planned`: `MANY_SLOTS` in all or more;
    `mxfp4`: weights of 4 bits; `few_tiles`: fewer than `FEW_TILES` tiles of the second projection, of all experts.

    An expert's rows beyond a tile read its weights again. Up to 16 are one tile in any case; a larger one for the rest
    takes shared memory from the copies under way.
    """
    if mxfp4:
        # A quarter of the bytes per column: as many of these in flight as of 16 bits by deeper tiles.
        tile = TileConfig(64, 256, 4, 3, 2, swap=True) if dtype.itemsize == 2 else TileConfig(32, 64, 4, 3, 2)
        return LaunchConfig(tile, tile, planned=planned)
    if dtype.itemsize == 4:
        tile = TileConfig(32, 32, 4, 3, 2)
        return LaunchConfig(tile, tile, planned=planned)
    if transposed:
        # Only as wgmma's operand are tiles copied to shared memory in the background in this layout.
        tile = TileConfig(64, 64, 4, 4, 2, swap=True)
        return LaunchConfig(tile, dataclasses.replace(tile, per_sm=3), planned=planned)
    gate_up = TileConfig(64, 64, 4, 5, 2, swap=True, align=4)
    if planned or many_per_expert:
        # Re-routing sends many slots to few experts.
        gate_up = dataclasses.replace(gate_up, num_stages=4, block_m=64)
    if many_per_expert:
        down = TileConfig(TILE_COLUMNS, 64, 4, 5, 2, swap=True, block_m=64)
    else:
        down = TileConfig(TILE_COLUMNS, 128, 4, 4, 2) if few_tiles else TileConfig(TILE_COLUMNS, 64, 4, 5, 3)
    return LaunchConfig(gate_up, down, planned=planned)
