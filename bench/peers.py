"""What else computes a layer's decode step over a shared prefix: one class a peer, all of one form.

available  why the peer cannot run in this case, or None
prepare    a function of no arguments that gives o [agents, num_qo_heads, head_dim]; all that a caller could keep from step to
           step (copies of K and V, packed rows, page lists, plans) is made here, outside of the time

A peer that takes all rows of a kv head as one block of queries gives prefix and suffix apart, joined by `kvkern.merge_state`;
where there is no suffix, the prefix alone.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvkern
from kvkern import cpu
from kvkern.checks.assertions import plain_attention
from kvkern.geometry import PAGE
from kvkern.kernels.oracle import attend_fp64

Run = Callable[[], Tensor]
PERIOD = 3_999_971
SAMPLED_WHOLE = 4096
"""Tokens of a prefix up to which the rows that are checked are checked in all heads on the CPU too."""


class Sample(NamedTuple):
    """Some heads of an agent's row as fp64 and as plain torch have them, [1, heads, head_dim]."""

    agent: int
    heads: slice
    reference: Tensor
    plain: Tensor


@dataclass(eq=False)
class Case:
    """One layer's decode step of `agents` agents over a prefix and suffixes of one length, their newest token among them.

    With suffixes of 0 tokens nothing is appended, and every row sees the prefix alone.
    """

    geometry: kvkern.Geometry
    prefix_tokens: int
    suffix_tokens: int
    prefix: kvkern.SharedPrefix
    pool: kvkern.PagePool
    plan: kvkern.Plan
    q: Tensor
    k: Tensor
    v: Tensor
    backend: str | None

    @classmethod
    def make(
        cls,
        geometry: kvkern.Geometry,
        agents: int,
        prefix_tokens: int,
        suffix_tokens: int,
        *,
        device: torch.device,
        backend: str | None = None,
    ) -> Case:
        """Drawn afresh; the newest token of each suffix is appended when `kvkern` runs."""

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(geometry.dtype)

        heads, head_dim = geometry.num_kv_heads, geometry.head_dim
        if device.type == "cpu":
            room(device, geometry.token_bytes() * (prefix_tokens + agents * -(-suffix_tokens // PAGE) * PAGE))
        prefix = kvkern.SharedPrefix(geometry, torch.arange(prefix_tokens), device=device)
        if device.type == "cpu":
            fill(prefix.block()[0, :, :, :prefix_tokens])
        else:
            prefix.block()[0, :, :, :prefix_tokens] = normal(2, heads, prefix_tokens, head_dim)
        prefix.publish()
        # A row has a place in the pages even where it is not appended.
        held = max(1, suffix_tokens)
        pool = kvkern.PagePool(geometry, agents * -(-held // PAGE), slots=agents, device=device)
        if device.type == "cpu":
            fill(pool.pages)
        else:
            pool.pages.normal_()
        for _ in range(agents):
            slot = pool.acquire_slot()
            pool.reserve(slot, held)
            pool.advance(slot, held - 1)
        pool.seq_lens.fill_(held - 1)
        plan = kvkern.Plan.make(pool, [kvkern.AgentRows(slot, prefix, 1) for slot in range(agents)])
        plan.begin()
        if not suffix_tokens:
            pool.seq_lens.zero_()
        q, k, v = (normal(agents, n, head_dim) for n in (geometry.num_qo_heads, heads, heads))
        return cls(geometry, prefix_tokens, suffix_tokens, prefix, pool, plan, q, k, v, backend)

    @property
    def agents(self) -> int:
        return self.q.shape[0]

    @property
    def device(self) -> torch.device:
        return self.q.device

    def kvkern(self, backend: str | None = None) -> Tensor:
        if not self.suffix_tokens:
            return self.prefix_alone(backend or self.backend)
        return kvkern.shared_prefix_attention(
            self.q, self.k, self.v, self.plan, self.pool, layer=0, backend=backend or self.backend
        )

    def prefix_alone(self, backend: str | None) -> Tensor:
        """The flat operator on rows that append nothing and have no suffix."""
        pool, none = self.pool, self.k[:0]
        o, _ = torch.ops.kvkern.shared_prefix_attention(
            self.q,
            none,
            none,
            pool.pages,
            pool.page_table,
            pool.seq_lens,
            *self.plan.tensors,
            0,
            self.geometry.head_dim**-0.5,
            backend,
        )
        return o

    @functools.cached_property
    def prefix_kv(self) -> tuple[Tensor, Tensor]:
        """K and V of the prefix, [num_kv_heads, P, head_dim]; on the CPU where they lie, in huge pages if there are any."""
        if self.device.type == "cpu":
            keys, values = self.prefix.block()[0, :, :, : self.prefix_tokens].unbind()
            return keys, values
        return self.prefix.key(0), self.prefix.value(0)

    def suffix_kv(self, agents: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """K and V of the suffixes in copies, [agents, num_kv_heads, S, head_dim]."""
        table = self.pool.page_table[agents, : -(-self.suffix_tokens // PAGE)].long()
        own = (
            pages[table].transpose(1, 2).flatten(2, 3)[:, :, : self.suffix_tokens]
            for pages in (self.pool.k_pages(0), self.pool.v_pages(0))
        )
        keys, values = (part.contiguous() for part in own)
        return keys, values

    @functools.cached_property
    def suffixes(self) -> tuple[Tensor, Tensor]:
        """`suffix_kv` of all agents, one copy for all peers; on the CPU in memory of the pool's kind."""
        self.room(self.agents * self.suffix_tokens * self.geometry.token_bytes())
        if self.device.type != "cpu" or not self.suffix_tokens:
            return self.suffix_kv()
        g, step = self.geometry, 8
        shape = (self.agents, g.num_kv_heads, self.suffix_tokens, g.head_dim)
        keys, values = (cpu.map_tensor(shape, g.dtype)[0] for _ in range(2))
        for some in (slice(first, first + step) for first in range(0, self.agents, step)):
            keys[some], values[some] = self.suffix_kv(some)
        return keys, values

    @functools.cached_property
    def one_pool(self) -> tuple[Tensor, Tensor]:
        """Prefix and suffixes as pages of one pool, the prefix's first: K and V, [pages, num_kv_heads, 16, head_dim]."""
        n = -(-self.prefix_tokens // PAGE)
        self.room((n + self.pool.num_pages) * PAGE * self.geometry.token_bytes())
        block = self.prefix.block()[0].unflatten(2, (-1, PAGE)).transpose(1, 2)[:, :n]
        own = self.pool.k_pages(0), self.pool.v_pages(0)
        keys, values = (torch.cat([shared, mine]) for shared, mine in zip(block, own, strict=True))
        return keys, values

    @functools.cached_property
    def packed(self) -> Tensor:
        """Rows by kv head, [num_kv_heads, agents * G, head_dim]."""
        g = self.geometry
        return self.q.view(self.agents, g.num_kv_heads, g.G, g.head_dim).transpose(0, 1).flatten(1, 2).contiguous()

    def unpack(self, o: Tensor) -> Tensor:
        """[num_kv_heads, agents * G, ...] -> [agents, num_qo_heads, ...]."""
        g = self.geometry
        return o.unflatten(1, (self.agents, g.G)).transpose(0, 1).flatten(1, 2)

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """Of the first, the middle and the last agent: its row in fp64, and by plain torch, kv head by kv head.

        On the CPU, over a long prefix, one kv head of each agent, another of each.
        """
        g, found = self.geometry, []
        few = self.device.type == "cpu" and self.prefix_tokens > SAMPLED_WHOLE
        for n, agent in enumerate(sorted({0, self.agents // 2, self.agents - 1})):
            own, row = self.suffix_kv(slice(agent, agent + 1)), self.q[agent, None]
            parts = []
            heads = [n * (g.num_kv_heads - 1) // 2] if few else list(range(g.num_kv_heads))
            for head in heads:
                keys, values = (
                    torch.cat([shared[head], suffix[0, head]])[:, None]
                    for shared, suffix in zip(self.prefix_kv, own, strict=True)
                )
                q = row[:, head * g.G : (head + 1) * g.G]
                reference, _ = attend_fp64(q.cpu(), keys.cpu(), values.cpu())
                parts.append((reference, plain_attention(q, keys, values).o))
            reference, plain = (torch.cat(rows, dim=1) for rows in zip(*parts, strict=True))
            found.append(Sample(agent, slice(heads[0] * g.G, (heads[-1] + 1) * g.G), reference, plain))
        return found

    def room(self, size: int) -> None:
        room(self.device, size)


def room(device: torch.device, size: int) -> None:
    """Raise MemoryError where `size` bytes would not leave half of the memory that is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if size > free // 2:
        raise MemoryError(f"{size / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")


def fill(tensor: Tensor) -> None:
    """Normal numbers, drawn once and repeated: a CPU draws 10 to 100 million a second, and a pool may have a billion.

    The period is prime, so that no two heads, tokens or pages are alike.
    """
    drawn = torch.randn(min(tensor.numel(), PERIOD)).to(tensor.dtype)
    whole = tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    flat, n = whole.view(-1), drawn.numel()
    pieces = flat.numel() // n
    flat[: pieces * n].view(pieces, n).copy_(drawn.expand(pieces, n))
    flat[pieces * n :] = drawn[: flat.numel() - pieces * n]
    if whole is not tensor:
        tensor.copy_(whole)


def available_memory() -> int:
    """Bytes that the host could still give out."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Peer(Protocol):
    name: str

    def available(self, case: Case) -> str | None: ...

    def prepare(self, case: Case) -> Run: ...


class Cuda:
    """A peer for CUDA alone, and for 16 bits."""

    def available(self, case: Case) -> str | None:
        if case.device.type != "cuda":
            return "for CUDA alone"
        return "for 16 bits alone" if case.geometry.dtype == torch.float32 else None


def with_lse(case: Case, attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Run:
    """Prefix with all rows of a kv head as one block, suffix with an agent's, merged; attend takes [.., .., tokens, head_dim]."""
    g = case.geometry
    keys, values = (part[None] for part in case.prefix_kv)
    rows, own_rows = case.packed[None], case.q.view(case.agents, g.num_kv_heads, g.G, g.head_dim)
    if not case.suffix_tokens:
        return lambda: case.unpack(attend(rows, keys, values)[0][0])
    own_keys, own_values = case.suffixes

    def run() -> Tensor:
        o, lse = attend(rows, keys, values)
        own, own_lse = attend(own_rows, own_keys, own_values)
        shared = case.unpack(o[0]), case.unpack(lse.float().reshape(g.num_kv_heads, -1))
        return kvkern.merge_state(*shared, own.flatten(1, 2), own_lse.float().reshape(case.agents, -1))[0]

    return run


class ExpandedSdpa:
    """torch's scaled_dot_product_attention, every agent with its own copy of the prefix."""

    name = "expanded_sdpa"

    def available(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case) -> Run:
        g = case.geometry
        tokens = case.prefix_tokens + case.suffix_tokens
        case.room(case.agents * tokens * g.token_bytes())

        def whole(shared: Tensor, own: Tensor) -> Tensor:
            parts, shape = (
                [shared.expand(case.agents, -1, -1, -1), own],
                (case.agents, g.num_kv_heads, tokens, g.head_dim),
            )
            if case.device.type != "cpu":
                return torch.cat(parts, dim=2)
            return torch.cat(parts, dim=2, out=cpu.map_tensor(shape, g.dtype)[0])  # memory of the prefix's kind

        keys, values = (whole(*each) for each in zip(case.prefix_kv, case.suffixes, strict=True))
        q, gqa = case.q[:, :, None], g.G > 1
        return lambda: scaled_dot_product_attention(q, keys, values, enable_gqa=gqa)[:, :, 0]


def aten(name: str) -> Callable[..., Any]:
    """An operator of torch that is private, hence may go. Raises NotImplementedError, which leaves this peer out with a reason."""
    operator = getattr(torch.ops.aten, name, None)
    if operator is None:
        raise NotImplementedError(f"torch {torch.__version__} has no operator aten::{name}")
    return operator


class FlashRows:
    """torch's flash operator for the CPU, all rows of a kv head as one block of queries."""

    name = "flash_rows"

    def available(self, case: Case) -> str | None:
        return None if case.device.type == "cpu" else "for the CPU alone"

    def prepare(self, case: Case) -> Run:
        operator = aten("_scaled_dot_product_flash_attention_for_cpu")
        return with_lse(case, operator)


class CudnnRows(Cuda):
    """cuDNN's attention, by the operator that SDPBackend.CUDNN_ATTENTION chooses, since that alone gives the lse."""

    name = "cudnn_rows"

    def prepare(self, case: Case) -> Run:
        operator = aten("_scaled_dot_product_cudnn_attention")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            o, lse, *_ = operator(q, k, v, None, True)
            return o, lse

        return with_lse(case, attend)


class FlexRows(Cuda):
    """torch's FlexAttention, compiled for this case's shapes."""

    name = "flex_rows"

    def prepare(self, case: Case) -> Run:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        torch.compiler.reset()  # each case has shapes of its own, and a function is compiled for only so many
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            o, aux = compiled(q, k, v, return_aux=AuxRequest(lse=True))
            return o, aux.lse

        return with_lse(case, attend)


class FlashInfer(Cuda):
    """What both wrappers of FlashInfer need: lists of pages in one pool of prefix and suffixes."""

    def available(self, case: Case) -> str | None:
        reason = super().available(case)
        if reason is None and importlib.util.find_spec("flashinfer") is None:
            reason = "flashinfer is not installed"
        return reason

    def pages(self, case: Case) -> tuple[Tensor, Tensor]:
        """Pages of the prefix [n], and of the suffixes [agents, m], int32, in `one_pool`."""
        n, m = -(-case.prefix_tokens // PAGE), -(-case.suffix_tokens // PAGE)
        return torch.arange(n, dtype=torch.int32, device=case.device), case.pool.page_table[:, :m] + n

    def last(self, case: Case, tokens: int, count: int) -> Tensor:
        """Tokens on the last page of each of `count` lists."""
        return torch.full((count,), (tokens - 1) % PAGE + 1, dtype=torch.int32, device=case.device)

    def workspace(self, case: Case) -> Tensor:
        return torch.zeros(256 << 20, dtype=torch.uint8, device=case.device)

    def offsets(self, case: Case, count: int, step: int) -> Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=case.device) * step


class FlashInferCascade(FlashInfer):
    """MultiLevelCascadeAttentionWrapper: the prefix for all agents at once, then the suffixes; kernels of its own choice."""

    name = "flashinfer_cascade"

    def available(self, case: Case) -> str | None:
        reason = super().available(case)
        return "it takes a suffix of 0 tokens for a page" if reason is None and not case.suffix_tokens else reason

    def choose(self, wrapper: Any) -> None:
        """Leave it the choice."""

    def prepare(self, case: Case) -> Run:
        import flashinfer

        g, agents = case.geometry, case.agents
        pool, (shared, own) = case.one_pool, self.pages(case)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, self.workspace(case), "HND")
        self.choose(wrapper)
        wrapper.plan(
            [self.offsets(case, 1, agents), self.offsets(case, agents, 1)],
            [self.offsets(case, 1, len(shared)), self.offsets(case, agents, own.shape[1])],
            [shared, own.flatten()],
            [self.last(case, case.prefix_tokens, 1), self.last(case, case.suffix_tokens, agents)],
            g.num_qo_heads,
            g.num_kv_heads,
            g.head_dim,
            PAGE,
            sm_scale=1 / math.sqrt(g.head_dim),
            q_data_type=g.dtype,
            kv_data_type=g.dtype,
        )
        return lambda: wrapper.run(case.q, pool)


class FlashInferCascadeFa2(FlashInferCascade):
    """The same by its kernels named fa2, which pack the query heads of a kv head into one tile."""

    name = "flashinfer_cascade_fa2"

    def choose(self, wrapper: Any) -> None:
        levels = getattr(wrapper, "_batch_prefill_wrappers", None)  # private, hence may go
        if levels is None:
            raise NotImplementedError("this flashinfer's wrapper has no place to name kernels in")
        for level in levels:
            level._backend = "fa2"


class FlashInferDecode(FlashInfer):
    """BatchDecodeWithPagedKVCacheWrapper: agents share the prefix's pages in memory, and each reads them."""

    name = "flashinfer_decode"

    def available(self, case: Case) -> str | None:
        reason = super().available(case)
        if reason is None and case.prefix_tokens % PAGE:
            reason = f"a prefix of {case.prefix_tokens} tokens is no whole number of pages of {PAGE}"
        return reason

    def prepare(self, case: Case) -> Run:
        import flashinfer

        g, agents = case.geometry, case.agents
        pool, (shared, own) = case.one_pool, self.pages(case)
        lists = torch.cat([shared.expand(agents, -1), own], dim=1)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self.workspace(case), "HND", use_tensor_cores=g.G > 1)
        wrapper.plan(
            self.offsets(case, agents, lists.shape[1]),
            lists.flatten(),
            self.last(case, case.suffix_tokens, agents),
            g.num_qo_heads,
            g.num_kv_heads,
            g.head_dim,
            PAGE,
            sm_scale=1 / math.sqrt(g.head_dim),
            q_data_type=g.dtype,
            kv_data_type=g.dtype,
        )
        return lambda: wrapper.run(case.q, pool)


class TorchBackend:
    """kvkern itself on the `torch` backend."""

    name = "torch_backend"

    def available(self, case: Case) -> str | None:
        return "it is what is measured" if case.backend == "torch" else None

    def prepare(self, case: Case) -> Run:
        return lambda: case.kvkern("torch")


PEERS: list[Peer] = [
    FlashRows(),
    CudnnRows(),
    FlexRows(),
    FlashInferCascade(),
    FlashInferCascadeFa2(),
    FlashInferDecode(),
    ExpandedSdpa(),  # it takes the memory that the others leave
    TorchBackend(),
]
