"""Cases of attention over prefixes and suffixes, run through the operator in hostile buffers.

Everything that a kernel must not touch holds NaN, everything that it must not write is compared bit for bit afterwards,
and every page number that it must not use is out of range.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kvkern.attention import shared_prefix_attention
from kvkern.checks.assertions import Out, assert_same_bits, assert_untouched

# What tests compare by is what users' checks compare by: the same cases, bounds and oracle.
from kvkern.checks.assertions import assert_exact as assert_exact
from kvkern.checks.assertions import bits as bits
from kvkern.checks.assertions import plain_attention as plain_attention
from kvkern.checks.cases import Agent, Case, make_case
from kvkern.checks.cases import assert_case_is_exact as assert_case_is_exact
from kvkern.checks.cases import assert_same_rows as assert_same_rows
from kvkern.geometry import PAGE, Geometry
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan

NAN = float("nan")
NO_PAGE = (2**30, -1, -(2**31), 2**31 - 1)
"""Page numbers that no pool has, for the unused entries of a page table."""


# -- hostile memory ----------------------------------------------------------------------------------------------------


class Guarded:
    """A tensor that lies strided in a larger one full of NaN, which must be unchanged afterwards."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, dims: Sequence[int] | None = None) -> None:
        """dims: the order of the dimensions in memory, outermost first; the last dimension stays innermost."""
        dims = list(range(len(shape))) if dims is None else list(dims)
        assert dims[-1] == len(shape) - 1
        # 16 more elements in a row keep rows aligned as a model's are.
        padded = [shape[d] + 2 for d in dims[:-1]] + [shape[-1] + 32]
        self.buffer = torch.full(padded, NAN, dtype=dtype)
        inner = self.buffer[tuple(slice(1, -1) for _ in dims[:-1]) + (slice(16, -16),)]
        self.view = inner.permute([dims.index(d) for d in range(len(dims))])
        assert self.view.shape == tuple(shape) and self.view.stride(-1) == 1
        self.before = self.buffer

    @classmethod
    def of(cls, tensor: Tensor, dims: Sequence[int] | None = None) -> Guarded:
        guarded = cls(tensor.shape, tensor.dtype, dims)
        guarded.view.copy_(tensor)
        return guarded.seal()

    def seal(self) -> Guarded:
        """From here on nothing may change."""
        self.before = self.buffer.clone()
        return self

    def check(self, name: str) -> None:
        assert_untouched(self.buffer, self.before, f"{name} and its guard bands")


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """What torch.empty returns holds NaN, so that nothing can depend on it."""
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)


def hostile_pool(
    geometry: Geometry, num_pages: int, slots: int, *, width: int | None = None
) -> tuple[PagePool, Guarded]:
    """A pool whose pages lie strided between guard bands in one of two layouts and are handed out in random order, as are
    its slots; whatever is unused in page table and lengths is out of range."""
    pool = PagePool(geometry, num_pages, slots=slots, max_pages_per_slot=width, debug=True)
    layout = random.choice([(0, 1, 2, 3, 4, 5), (0, 1, 2, 4, 3, 5)])
    pages = Guarded(pool.pages.shape, geometry.dtype, layout)
    pool.pages = pages.view
    table = torch.empty((slots + 2, pool.max_pages_per_slot + 3), dtype=torch.int32)
    table.copy_(torch.tensor(NO_PAGE)[torch.randint(len(NO_PAGE), table.shape)])
    pool.page_table = table[1:-1, 1:-2]
    pool.seq_lens.fill_(2**30)
    ids, held = pool.alloc(num_pages), [pool.acquire_slot() for _ in range(slots)]
    pool.seq_lens.fill_(2**30)
    random.shuffle(ids)
    random.shuffle(held)
    pool.free(ids)
    for slot in held:
        pool.release_slot(slot)
    return pool, pages.seal()


# -- a case ------------------------------------------------------------------------------------------------------------


class CaseMaker:
    """make_case(...): random values in a case of the shape that is asked for."""

    def __call__(
        self,
        *,
        rows: int | None = None,
        prefix_tokens: int = 0,
        suffix_tokens: int | Sequence[int] | None = None,
        tree: Mapping[str, tuple[int, str | None]] | None = None,
        agents: Sequence[tuple[str | None, int, int]] | None = None,
        num_kv_heads: int = 2,
        G: int = 2,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        sm_scale: float | None = None,
        layers: int = 2,
    ) -> Case:
        """Either `rows` agents with one row each over one prefix, or any agents over any tree.

        suffix_tokens  of all or of each of the `rows` agents, the row's own token included; ragged, up to 70, if None
        tree           name -> (tokens, name of the parent or None), parents first
        agents         (name of the leaf or None, suffix tokens after this step, rows in this step)

        The case runs in a random layer; the prefixes of the other layers hold NaN.
        """
        if agents is None:
            assert rows is not None and tree is None
            if suffix_tokens is None:
                suffix_tokens = [random.randint(1, 70) for _ in range(rows)]
            lengths = [suffix_tokens] * rows if isinstance(suffix_tokens, int) else suffix_tokens
            tree = {"doc": (prefix_tokens, None)} if prefix_tokens else {}
            agents = [("doc" if prefix_tokens else None, n, 1) for n in lengths]
        geometry = Geometry(layers, num_kv_heads * G, num_kv_heads, head_dim, dtype)
        return make_case(geometry, torch.device("cpu"), tree=tree or {}, agents=agents, sm_scale=sm_scale)


# -- running a case through the operator -------------------------------------------------------------------------------


def attend(
    backend: str | None,
    case: Case,
    *,
    workers_per_node: int = 1,
    padding: int = 0,
    rows_per_step: int | None = None,
) -> list[Out]:
    """Each agent's o and lse, in the order of the case, through `shared_prefix_attention`.

    padding        padding rows after the agents' rows, whose q, k and v are NaN; they must give 0 and -inf
    rows_per_step  rows that each agent brings to a step, until it has brought all; all in one step if None

    Along the way: the pages must change by the tokens of each step and by nothing else; q, k and v must not change.
    """
    g = case.geometry
    needed = [-(-a.k.shape[0] // PAGE) for a in case.agents]
    pool, pages = hostile_pool(g, sum(needed) + 3, len(case.agents) + 2, width=max(needed))
    slots = [pool.acquire_slot() for _ in case.agents]
    for slot, agent in zip(slots, case.agents, strict=True):
        write_history(pool, slot, agent, case.layer)
    done = [0] * len(slots)
    outs: list[list[Out]] = [[] for _ in slots]
    while any(n < a.rows for n, a in zip(done, case.agents, strict=True)):
        takes = [
            (i, done[i], a.rows if rows_per_step is None else min(a.rows, done[i] + rows_per_step))
            for i, a in enumerate(case.agents)
            if done[i] < a.rows
        ]
        for i, out in _step(backend, case, pool, pages, slots, takes, workers_per_node, padding).items():
            outs[i].append(out)
        for i, _, end in takes:
            done[i] = end
    return [Out(*(torch.cat(parts) for parts in zip(*out, strict=True))) for out in outs]


def write_history(pool: PagePool, slot: int, agent: Agent, layer: int) -> None:
    """The tokens before this step, put into their pages one by one."""
    history = agent.k.shape[0] - agent.rows
    pool.reserve(slot, history)
    pool.advance(slot, history)
    pool.seq_lens[slot] = history
    for i, page in enumerate(pool.table(slot)):
        n = min(PAGE, history - i * PAGE)
        for which, values in enumerate((agent.k, agent.v)):
            pool.pages[layer, which, page, :, :n] = values[i * PAGE : i * PAGE + n].transpose(0, 1)


def _step(
    backend: str | None,
    case: Case,
    pool: PagePool,
    pages: Guarded,
    slots: Sequence[int],
    takes: Sequence[tuple[int, int, int]],
    workers_per_node: int,
    padding: int,
) -> dict[int, Out]:
    """One step of (agent, first row, last row): plan, call, check of all that must not change."""
    g, layer = case.geometry, case.layer
    rows = sum(end - begin for _, begin, end in takes)
    for i, begin, end in takes:
        pool.reserve(slots[i], end - begin)
    plan = Plan.make(
        pool,
        [AgentRows(slots[i], case.agents[i].node, end - begin) for i, begin, end in takes],
        bucket=rows + padding if padding else None,
        workers_per_node=workers_per_node,
    )
    packed = [takes[n] for n in plan.order]
    q = torch.full((plan.rows, g.num_qo_heads, g.head_dim), NAN, dtype=g.dtype)
    k, v = (torch.full((plan.rows, g.num_kv_heads, g.head_dim), NAN, dtype=g.dtype) for _ in range(2))
    pages.seal()
    after = pages.before.clone()
    expected = after.as_strided(pages.view.shape, pages.view.stride(), pages.view.storage_offset())
    for (i, begin, end), row in zip(packed, plan.qo_indptr, strict=False):
        agent = case.agents[i]
        first = agent.k.shape[0] - agent.rows + begin
        q[row : row + end - begin] = agent.q[begin:end]
        for which, (mine, packed_rows) in enumerate(((agent.k, k), (agent.v, v))):
            mine = mine[first : first + end - begin]
            packed_rows[row : row + end - begin] = mine
            for position, token in enumerate(mine, start=first):
                expected[layer, which, pool.table(slots[i])[position // PAGE], :, position % PAGE] = token

    layouts = [random.choice([(0, 1, 2), (1, 0, 2)]) for _ in range(3)]
    inputs = [Guarded.of(t, layout) for t, layout in zip((q, k, v), layouts, strict=True)]
    plan.begin()
    with fresh_memory_is_nan():
        o, lse = shared_prefix_attention(
            *(t.view for t in inputs),
            plan,
            pool,
            layer=layer,
            sm_scale=case.sm_scale,
            return_lse=True,
            backend=backend,
        )
    for name, t in zip("qkv", inputs, strict=True):
        t.check(name)
    assert_untouched(pages.buffer, after, "pages and their guard bands")
    assert o.shape == q.shape and o.dtype == q.dtype and lse.dtype == torch.float32
    assert_same_bits(o[rows:], torch.zeros_like(o[rows:]), "o of padding rows")
    assert_same_bits(lse[rows:], torch.full_like(lse[rows:], -math.inf), "lse of padding rows")
    return {
        i: Out(o[row : row + end - begin], lse[row : row + end - begin])
        for (i, begin, end), row in zip(packed, plan.qo_indptr, strict=False)
    }
