"""Tile sizes, a function of geometry, dtype and architecture: it cannot see the batch, so no tile can follow it. And what a
launch is made with: switches, the device, memory for descriptors.

BLOCK_N and num_warps affect rounding (which keys share a tile, how a row's sum is cut); BLOCK_M and num_stages do not.
The numbers were chosen by what compiles within the registers and the shared memory; bench/forms.py measures others beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime import _allocation

from kvkern.errors import BackendError
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
    """prefix_small: K1's form for a step of few packed rows. Its warps hold their rows as the large form's do, 16 each and
    every key of the tile, so a row's bits are the same in both and the choice may follow the batch. None: there is no such
    form."""

    prefix: Tile
    suffix: Tile
    prefix_small: Tile | None = None


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
    suffix = Tile(suffix_rows, 32 if wide else 64, 4, 3)
    # K1 for head_dim 128, G = 4 and bf16 (triton 3.6.0 and 3.7.1): 255 registers on sm_80 and sm_90 and no spill, 98,304 B
    # shared on sm_80, 163,872 B on sm_90. A part of a warp's keys in another warp would cut a row's sum elsewhere: half the
    # rows by half the warps keeps 16 rows a warp.
    if arch in SMALL_SHARED or arch < 90:
        stages = 2 if wide or arch in SMALL_SHARED else 3
        return Tiles(Tile(64, 32, 8, stages) if wide else Tile(128, 64, 8, stages), suffix)
    if wide:
        return Tiles(Tile(64, 64, 8, 2), suffix)
    if arch < 100:
        return Tiles(Tile(128, 128, 8, 2), suffix, Tile(64, 128, 4, 2))
    # Accumulators pass through tensor memory on sm_100, where 128 keys a tile spill and 64 do not.
    return Tiles(Tile(128, 64, 8, 2), suffix)


def descriptors(dtype: torch.dtype, arch: int) -> bool:
    """Whether K1 loads by tensor descriptors, which sm_90 and later copy by one instruction a tile; before, by pointers."""
    return arch >= 90 and dtype != torch.float32


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> int:
    """10 * major + minor of the device's compute capability. Raises BackendError before sm_80."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise BackendError(
            "backend",
            found=f"triton on {device}, compute capability {major}.{minor}",
            needed="compute capability 8.0 or later",
            do="use backend='torch' here",
        )
    return 10 * major + minor


def debug() -> bool:
    """Whether kernels check on the device what they index by: KVKERN_DEBUG=1, read at each launch."""
    return os.environ.get("KVKERN_DEBUG") == "1"


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel starts before the one ahead of it has ended (programmatic dependent launch): KVKERN_PDL=1, from
    sm_90 on."""
    return os.environ.get("KVKERN_PDL") == "1" and device.type == "cuda" and arch_of(device) >= 90


def switches(device: torch.device) -> dict[str, bool]:
    """Constants DEBUG and PDL of a launch, with the launch options that they need; without either, no option at all."""
    checked, dependent = debug(), dependent_launch(device)
    options = {"DEBUG": checked, "PDL": dependent}
    if checked:
        options["debug"] = True
    if dependent:
        options["launch_pdl"] = True
    return options


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device, whichever is current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def scratch(device: torch.device) -> Iterator[None]:
    """Memory for the descriptors that programs make, for launches within; a user's own allocator is back in place after.

    It comes from torch: freed after the launch, it is used again in the stream's order alone, and within a captured graph
    it belongs to the graph.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    # Private in triton 3.6 to 3.7, whose set_allocator says nothing of the allocator before.
    token = _allocation._allocator.set(allocate)
    try:
        yield
    finally:
        _allocation._allocator.reset(token)
