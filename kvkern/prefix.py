"""SharedPrefix: the K and V of one document for all layers, in one allocation that is never written after it is published.

A prefix is a node of a tree: a child continues its parent (a document, then a chapter that a group of agents shares), and
an agent hangs below one node and attends to every node on its path. The block is [layers, 2, num_kv_heads, padded tokens,
head_dim], head-major and contiguous, padded with zeros to a multiple of 128 tokens so that every key tile is whole.
On the CPU the block is its own mapping, protected read-only by the operating system when it is published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from kvkern import cpu
from kvkern.errors import DeviceError, KvkernError, ReadOnlyError, RequestError, ShapeError, StoreError
from kvkern.geometry import Geometry, num_segments, pad_tokens, segment_tokens


class SharedPrefix:
    """One document's KV: filled once, published once, then read by any number of agents until it is released.

    geometry   shape and dtype of the model's KV
    token_ids  the node's own tokens, integers, one dimension, at least one
    device     where the block lies
    parent     the published prefix that this one continues, or None

    Raises RequestError for no tokens or no integers, ShapeError or DeviceError for a parent of another geometry or device.
    """

    def __init__(
        self,
        geometry: Geometry,
        token_ids: Tensor,
        *,
        device: torch.device | str = "cpu",
        parent: SharedPrefix | None = None,
    ) -> None:
        if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
            raise RequestError(
                "document", found=f"token ids of {token_ids.dtype}", needed="integers", do="give the ids themselves"
            )
        if token_ids.dim() != 1 or token_ids.numel() == 0:
            raise RequestError(
                "document",
                found=f"token ids of shape {list(token_ids.shape)}",
                needed="at least one token, in one dimension",
                do="give a text that is not empty",
            )
        self.geometry = geometry
        # As tensors name it: "cuda" is the current one, of a number.
        self.device = torch.zeros(0, device=device).device
        self.parent = parent
        self._token_ids = token_ids.detach().to("cpu", torch.int64, copy=True)
        self.tokens = int(token_ids.numel())
        self.padded_tokens = pad_tokens(self.tokens)
        self.segment_tokens = segment_tokens(self.tokens)
        self.position = 0
        if parent is not None:
            parent._need_published("parent")
            if parent.geometry != geometry:
                raise ShapeError(
                    "parent.geometry", found=parent.geometry, needed=geometry, do="continue a prefix of the same model"
                )
            if parent.device != self.device:
                raise DeviceError(
                    "parent.device", found=parent.device, needed=self.device, do="keep a path of prefixes on one device"
                )
            self.position = parent.end
        self._mapping: Any = None
        self._block: Tensor | None = None
        shape = geometry.block_shape(self.tokens)
        if self.device.type == "cpu":
            self._block, self._mapping = cpu.map_tensor(shape, geometry.dtype)
        else:
            self._block = torch.zeros(shape, dtype=geometry.dtype, device=self.device)
        if parent is not None:
            parent.retain()  # Last, so that an allocation that fails leaves no trace.
        self._sums: Tensor | None = None
        self.references = 1
        self.identity: Any = None
        self.provenance: Mapping[str, Any] = {}

    # -- filling and publishing ------------------------------------------------------------------------------------

    @property
    def published(self) -> bool:
        return self._sums is not None

    @property
    def released(self) -> bool:
        return self._block is None

    def block(self) -> Tensor:
        """The allocation itself, for the modules that fill it or hand its address to a kernel; not for users."""
        if self._block is None:
            raise ReadOnlyError(
                "prefix",
                found="released",
                needed="a prefix that is still held",
                do="load or publish the document again",
            )
        return self._block

    def publish(self, *, identity: Any = None, provenance: Mapping[str, Any] | None = None) -> Self:
        """From here on nothing writes the block; on the CPU the operating system forbids it.

        Raises ReadOnlyError if it is published already.
        """
        if self.published:
            raise ReadOnlyError(
                "prefix",
                found="published already",
                needed="a prefix that is being filled",
                do="allocate another prefix",
            )
        self._sums = self.block_sums()
        self.identity = identity
        self.provenance = dict(provenance or {})
        if self._mapping is not None:
            self._mapping.protect()
        return self

    def adopt(self, block: Tensor, mapping: Any) -> None:
        """Serve from a read-only mapping of a file instead of a copy. Only before publishing."""
        if self.published or block.shape != self.block().shape or block.dtype != self.geometry.dtype:
            raise ReadOnlyError(
                "prefix",
                found="a published prefix or another shape",
                needed="an unpublished one",
                do="map the file at load",
            )
        self._block, self._mapping = block, mapping

    # -- the tree --------------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """Position of the first token after this node."""
        return self.position + self.tokens

    def path(self) -> list[SharedPrefix]:
        """The nodes from the root down to this one."""
        nodes: list[SharedPrefix] = []
        node: SharedPrefix | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def path_token_ids(self) -> Tensor:
        """All tokens an agent below this node attends to, int64 on the CPU."""
        return torch.cat([node._token_ids for node in self.path()])

    @property
    def token_ids(self) -> Tensor:
        """A copy of the node's own tokens, int64 on the CPU."""
        return self._token_ids.clone()

    # -- reading: copies only --------------------------------------------------------------------------------------

    def key(self, layer: int) -> Tensor:
        """A copy of one layer's keys, [num_kv_heads, tokens, head_dim]."""
        return self._copy(layer, 0)

    def value(self, layer: int) -> Tensor:
        """A copy of one layer's values, [num_kv_heads, tokens, head_dim]."""
        return self._copy(layer, 1)

    def _copy(self, layer: int, which: int) -> Tensor:
        if not 0 <= layer < self.geometry.layers:
            raise ShapeError(
                "layer", found=layer, needed=f"0 to {self.geometry.layers - 1}", do="name a layer of the model"
            )
        return self.block()[layer, which, :, : self.tokens].clone()

    @property
    def size_bytes(self) -> int:
        block = self.block()
        return block.numel() * block.element_size()

    # -- integrity -------------------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """(layer, 0 for K or 1 for V, segment, view [num_kv_heads, segment tokens, head_dim]): the unit of every digest."""
        block, step = self.block(), self.segment_tokens
        for layer in range(self.geometry.layers):
            for which in range(2):
                for segment in range(num_segments(self.tokens)):
                    yield layer, which, segment, block[layer, which, :, segment * step : (segment + 1) * step]

    def block_sums(self) -> Tensor:
        """64-bit sums of every (layer, K/V, segment), computed where the block lies, as int64 [layers, 2, segments]."""
        sums = cpu.block_sums([(view, 0) for _, _, _, view in self.blocks()])
        # Sums are unsigned; int64 holds the same 64 bits.
        signed = [s - (1 << 64) if s >= 1 << 63 else s for s in sums]
        return torch.tensor(signed, dtype=torch.int64).view(self.geometry.layers, 2, -1)

    def check(self) -> None:
        """Recompute the sums on the device. Raises StoreError that names layer, K or V, and segment of a changed block."""
        self._need_published("prefix")
        assert self._sums is not None
        changed = (self.block_sums() != self._sums).nonzero()
        if changed.numel():
            layer, which, segment = changed[0].tolist()
            raise StoreError(
                f"kv[layer {layer}, {'KV'[which]}, segment {segment}]",
                found="a changed sum",
                needed="the sum it was published with",
                do="release the prefix and load it again; if it comes back, the memory is at fault",
            )

    @property
    def sums(self) -> Tensor:
        """The sums that were taken when the prefix was published, a copy, int64 [layers, 2, segments]."""
        self._need_published("prefix")
        assert self._sums is not None
        return self._sums.clone()

    # -- life ------------------------------------------------------------------------------------------------------

    def retain(self) -> Self:
        self.block()
        self.references += 1
        return self

    def release(self) -> None:
        """Give back one reference; with the last one the block is freed. A release too many raises ReadOnlyError."""
        self.block()
        self.references -= 1
        if self.references == 0:
            # A Plan that is still in flight holds the tensor itself, so no kernel loses its keys.
            self._block = self._mapping = None
            if self.parent is not None:
                self.parent.release()

    def __enter__(self) -> Self:
        self.block()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.released:
            self.release()

    def _need_published(self, field: str) -> None:
        self.block()
        if not self.published:
            raise KvkernError(
                field,
                found="a prefix that is still being filled",
                needed="a published prefix",
                do="call publish() first",
            )

    def __repr__(self) -> str:
        state = "released" if self.released else "published" if self.published else "filling"
        g = self.geometry
        shape = f"{g.layers} layers, {g.num_kv_heads} kv heads of {g.head_dim}, {g.dtype}"
        return f"<{type(self).__name__} {self.tokens} tokens at {self.position}, {shape}, {self.device}, {state}>"
