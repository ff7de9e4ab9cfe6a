"""Tile sizes: a function of geometry, dtype and architecture. It cannot see the batch, so no tile can follow it.

BLOCK_N and num_warps affect rounding (which keys share a tile, how a row's sum is cut); BLOCK_M and num_stages do not.
The numbers were chosen by what compiles within the registers and the shared memory; their speed is not measured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from kvkern.geometry import next_power_of_2

INTERPRETER = 80
"""The architecture whose tiles the interpreter runs."""

SMALL_SHARED = (86, 89, 120)
"""Architectures with about 100 KB of shared memory a block instead of 163 to 227."""


@dataclass(frozen=True)
class Tile:
    """What one launch is made with: rows and keys of a tile, warps, and stages of the load pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Tiles:
    prefix: Tile
    suffix: Tile


@lru_cache(maxsize=64)
def tiles(head_dim: int, G: int, dtype: torch.dtype, arch: int) -> Tiles:
    """Tiles of K1 and K2. arch is 10 * major + minor of the compute capability."""
    wide = next_power_of_2(head_dim) > 128
    # All rows of one token and kv head lie in one suffix tile; a tensor core takes at least 16 rows.
    suffix_rows = max(16, next_power_of_2(G))
    if dtype == torch.float32:
        # Exact fp32 products run on the FMA units, which hold their operands in registers: small tiles, or many spills.
        keys = 16 if wide else 32
        return Tiles(Tile(16, keys, 4, 2), Tile(suffix_rows, keys, 4, 2))
    # For head_dim 128 and 16-bit operands (triton 3.7.1): K1 has 255 registers, no spill and 98,304 B shared on sm_80, 255,
    # none and 163,840 B on sm_90, 255 with 176 B of stack on sm_100: anything more spills. K2 has 193, 168 and 168.
    if arch in SMALL_SHARED or arch < 90:
        stages = 2 if wide or arch in SMALL_SHARED else 3
        prefix = Tile(64, 32, 8, stages) if wide else Tile(128, 64, 8, stages)
    else:
        # From sm_100 on, 128 keys spill three times as much as 64: accumulators pass through tensor memory.
        prefix = Tile(64, 64, 8, 2) if wide else Tile(128, 128 if arch < 100 else 64, 8, 2)
    return Tiles(prefix, Tile(suffix_rows, 32 if wide else 64, 4, 3))


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> int:
    """10 * major + minor of the device's compute capability."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device, whichever is current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
