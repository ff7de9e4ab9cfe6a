"""How much memory a document and its agents take, by arithmetic alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvkern.errors import CapacityError, RequestError
from kvkern.geometry import PAGE, Geometry, pad_tokens

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """ "24GiB", "512M" or "1000000" -> bytes; K, M, G and T are powers of 1,024. Raises RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise RequestError(
            "memory", found=repr(text), needed="a number of bytes such as 24GiB or 512M", do="write it so"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def render_bytes(n: float) -> str:
    """Bytes for a reader: 165.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


@dataclass(frozen=True)
class Fit:
    """What a memory budget holds beside the weights.

    agents               suffixes of suffix_tokens that fit beside one copy of the document
    agents_expanded      the same if each agent had its own copy of the document's KV
    prefix_bytes         the document's KV, padded to 128 tokens
    suffix_bytes         one agent's pages, whole pages of 16 tokens
    weights_bytes        the model's weights
    memory_bytes         the budget
    token_bytes          K and V of one token over all layers
    """

    document_tokens: int
    suffix_tokens: int
    memory_bytes: int
    weights_bytes: int
    token_bytes: int
    prefix_bytes: int
    suffix_bytes: int
    agents: int
    agents_expanded: int


def fit(
    geometry: Geometry, *, document_tokens: int, suffix_tokens: int, memory_bytes: int, weights_bytes: int = 0
) -> Fit:
    """How many agents fit. Activations are not counted: leave room for them in the budget.

    Raises RequestError for a number below 1, CapacityError where weights and document alone are larger than the budget.
    """
    for name, value in (("document_tokens", document_tokens), ("suffix_tokens", suffix_tokens)):
        if value < 1:
            raise RequestError(name, found=value, needed="at least 1", do="give a number of tokens")
    token = geometry.token_bytes()
    prefix = pad_tokens(document_tokens) * token
    suffix = -(-suffix_tokens // PAGE) * PAGE * token
    left = memory_bytes - weights_bytes - prefix
    if left < suffix:
        raise CapacityError(
            "memory",
            found=render_bytes(memory_bytes),
            needed=f"at least {render_bytes(weights_bytes + prefix + suffix)} for weights, document and one agent",
            do="give more memory, or a shorter document",
        )
    return Fit(
        document_tokens=document_tokens,
        suffix_tokens=suffix_tokens,
        memory_bytes=memory_bytes,
        weights_bytes=weights_bytes,
        token_bytes=token,
        prefix_bytes=prefix,
        suffix_bytes=suffix,
        agents=left // suffix,
        agents_expanded=(memory_bytes - weights_bytes) // (prefix + suffix),
    )
