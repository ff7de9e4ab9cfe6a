"""The numbers of a model that decide how its attention is rounded, and the cuts that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvkern.errors import DtypeError, ShapeError

PAGE = 16
"""Tokens in a suffix page."""

SUFFIX_SEGMENT = 1024
"""Tokens in a segment of a suffix, counted from the suffix's own token 0."""

PAD = 128
"""A prefix is stored padded with zeros to a multiple of this many tokens, so that every key tile is whole."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pad_tokens(tokens: int) -> int:
    """Tokens of the stored block: `tokens` rounded up to a multiple of 128."""
    return -(-tokens // PAD) * PAD


def segment_tokens(tokens: int) -> int:
    """Tokens in a segment of a prefix node of `tokens` tokens: at least 1,024, and at most 16 segments a node.

    A function of the node's length alone: it cannot follow the batch, so neither can the rounding.
    """
    return max(1024, -(-tokens // 16 // PAD) * PAD)


def num_segments(tokens: int) -> int:
    return -(-tokens // segment_tokens(tokens))


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Geometry:
    """Shape and dtype of a model's KV.

    layers        decoder layers
    num_qo_heads  query heads
    num_kv_heads  key/value heads; G = num_qo_heads / num_kv_heads query heads share one
    head_dim      elements of a head, a multiple of 16
    dtype         of K and V: torch.float32, float16 or bfloat16
    """

    layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("layers", "num_qo_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ShapeError(
                    f"geometry.{name}",
                    found=value,
                    needed="an integer of at least 1",
                    do="read it from the model's config",
                )
        if self.num_qo_heads % self.num_kv_heads:
            raise ShapeError(
                "geometry.num_qo_heads",
                found=self.num_qo_heads,
                needed=f"a multiple of num_kv_heads = {self.num_kv_heads}",
                do="use a model whose query heads share kv heads evenly",
            )
        if self.head_dim % 16 or self.head_dim > 256:
            raise ShapeError(
                "geometry.head_dim",
                found=self.head_dim,
                needed="a multiple of 16, at most 256",
                do="use a model with such heads",
            )
        if self.dtype not in DTYPES:
            raise DtypeError(
                "geometry.dtype",
                found=self.dtype,
                needed="torch.float32, torch.float16 or torch.bfloat16",
                do="load the model in one of these",
            )

    @property
    def G(self) -> int:
        """Query heads that share one kv head."""
        return self.num_qo_heads // self.num_kv_heads

    def block_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Shape of a prefix's one allocation: [layers, 2, num_kv_heads, padded tokens, head_dim]."""
        return self.layers, 2, self.num_kv_heads, pad_tokens(tokens), self.head_dim

    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
