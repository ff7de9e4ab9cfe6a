"""Which arithmetic serves a device: the Triton kernels, csrc on the CPU, or the torch functions of `plain`. One contract for all.

An explicit choice never falls back in silence: what cannot run here is refused with the reason.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from kvkern import native, plain, rows
from kvkern.errors import BackendError

NAMES = ("triton", "cpu", "torch")


class Backend(NamedTuple):
    """The functions of the contract (see `plain` for shapes), and why this backend was chosen."""

    name: str
    why: str
    append: Callable[..., torch.Tensor]
    prefix_attention: Callable[..., plain.State]
    suffix_attention: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    merge: Callable[[plain.State, plain.State], plain.State]
    append_fused: Callable[..., torch.Tensor] = plain.append_fused


def choose(name: str | None, device: torch.device | str) -> Backend:
    """The backend of this name on this device; by default Triton on CUDA, csrc on the CPU, torch elsewhere.

    Raises BackendError for a name that is unknown or cannot run here, and on the CPU for a KVKERN_ISA that cannot.
    """
    chosen = _choose(name, torch.device(device).type, interpreted())
    if chosen.name == "cpu":
        native.instruction_set()  # the environment may have changed since: never from the cache
    return chosen


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache
def _choose(name: str | None, device: str, interpreter: bool) -> Backend:
    if name not in (None, *NAMES):
        raise BackendError(
            "backend", found=name, needed=f"one of {', '.join(NAMES)}", do="leave it out to let the device decide"
        )
    has_triton = importlib.util.find_spec("triton") is not None
    if name is None:
        name = {"cuda": "triton" if has_triton else "torch", "cpu": "cpu"}.get(device, "torch")
        why = "triton is not installed" if device == "cuda" and not has_triton else f"the default on {device}"
    else:
        why = "chosen by name"
    if name == "torch":
        return Backend(name, why, plain.append, plain.prefix_attention, plain.suffix_attention, plain.merge)
    if name == "cpu":
        if device != "cpu":
            raise BackendError(
                "backend",
                found=f"cpu on {device}",
                needed="tensors on the CPU",
                do=f"use backend='{'triton' if device == 'cuda' and has_triton else 'torch'}' here",
            )
        return Backend(
            name,
            why,
            native.append,
            native.prefix_attention,
            native.suffix_attention,
            native.merge,
            rows.append_fused,
        )
    if not has_triton:
        raise BackendError(
            "backend",
            found="triton, which is not installed",
            needed="an installed triton",
            do="pip install triton, or use backend='torch'",
        )
    if device != "cuda" and not interpreter:
        raise BackendError(
            "backend",
            found=f"triton on {device}",
            needed="a CUDA device, or TRITON_INTERPRET=1 set before kvkern is imported",
            do="use backend='torch' here",
        )
    from kvkern.kernels import append, merge, prefix, suffix

    return Backend(
        name, why, append.append, prefix.prefix_attention, suffix.suffix_attention, merge.merge, append.append_fused
    )
