"""Plan: the rows of one step in depth-first order of the prefix tree, and the work items of the kernels.

Made when agents join, leave, or bring another number of rows. Lengths grow on the device (`begin`), so a decode step reuses
its plan. All that varies with a plan is a tensor, hence a new plan never recompiles. Every check that can be made before a
step is made here; a layer's call compares one small tuple.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvkern.errors import CapacityError, DeviceError, DtypeError, ReadOnlyError, RequestError, ShapeError
from kvkern.geometry import PAGE, next_power_of_2, num_segments
from kvkern.pages import PagePool
from kvkern.prefix import SharedPrefix

SUFFIX_BLOCK_M = 16
"""Packed rows (tokens times G) that one worker of the suffix kernel takes at most."""

PREFIX_BLOCK_M = 128
"""Packed rows of a work item at most, so that a launch over items has as many programs as there is work."""

LEAST = 2
"""Rows and states that a table has at least: a compiler makes sizes of 0 and 1 constants, and a new plan must not recompile.
Rows of zeros are added; a work item or a tile without rows does nothing."""

STATE_COST = 0.15
"""Time to write a row tile's state and to read it again, in that of the row tile and a segment: 128 KB through memory against
4 * 128 * 128 * 1,024 FLOP or more, by arithmetic for an H100."""

STARTS, CONTINUES = 1, 2
"""Flags of the path table: this state starts a node, or goes on with the node of the state before it."""


class AgentRows(NamedTuple):
    """What one agent brings to a step: its slot in the pool, the leaf of its path (None: no prefix), and rows."""

    slot: int
    node: SharedPrefix | None
    rows: int


class PlanTensors(NamedTuple):
    """The plan on the device, in the order of the flat operator's arguments.

    row_slot      int32 [T]       slot of each row; -1 for a padding row
    row_back      int32 [T]       rows of the same agent after this one: suffix position = seq_lens[slot] - 1 - row_back
    suffix_tiles  int32 [R, 4]    (slot, row begin, row end, path): rows of one agent for one worker of the suffix kernel
    path_table    int32 [paths, S]  fold order of the states of a path: 1 starts a node, 2 continues it, 0 no more
    node_table    int64 [N, 4]    (address of the allocation, P, padded P, tokens in a segment)
    items         int32 [W, 6]    (node, row begin, row end, segment begin, segment end, state), at most PREFIX_BLOCK_M packed
                                  rows, or one token: a walk from segment 0 folds as it goes and leaves one state; a later
                                  walk leaves every segment's state in its own slot
    """

    row_slot: Tensor
    row_back: Tensor
    suffix_tiles: Tensor
    path_table: Tensor
    node_table: Tensor
    items: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """One step's rows.

    order       indices of the given agents in packing order
    qo_indptr   row offsets in packing order, one more than agents
    rows        rows of the step, padding included
    last_rows   packed row of each given agent's last row, in the order given
    tensors     the plan on the device
    expects     (rows, num_qo_heads, num_kv_heads, head_dim, dtype, device) that a layer's call must bring
    begun       whether the rows were ever counted: before that they have no place in the pages
    """

    pool: PagePool
    agents: tuple[AgentRows, ...]
    order: tuple[int, ...]
    qo_indptr: tuple[int, ...]
    rows: int
    last_rows: tuple[int, ...]
    tensors: PlanTensors
    expects: tuple[object, ...]
    _blocks: tuple[Tensor, ...]
    _slots: Tensor
    _counts: Tensor
    begun: bool = False

    @classmethod
    def make(
        cls,
        pool: PagePool,
        agents: Sequence[AgentRows],
        *,
        bucket: int | None = None,
        workers_per_node: int | None = None,
    ) -> Plan:
        """Order agents by path, and cut the work.

        bucket            rows to pad the step to; no padding if None
        workers_per_node  runs that a node's segments are cut into; by default as many as keep a GPU's multiprocessors busy, and
                          one elsewhere. The bits do not depend on it

        Raises RequestError (no agent, a slot twice, no rows), ReadOnlyError (a released prefix), ShapeError or DeviceError
        (a prefix of another geometry or device than the pool's), CapacityError (more rows than the bucket holds); ShapeError,
        DtypeError or DeviceError too for pages that were put into the pool and are not as it would have made them.
        """
        _check(pool, agents, workers_per_node)
        keys = _path_keys(agents)
        order = sorted(range(len(agents)), key=lambda i: keys[i])
        qo_indptr = [0]
        for i in order:
            qo_indptr.append(qo_indptr[-1] + agents[i].rows)
        used = qo_indptr[-1]
        rows = used if bucket is None else bucket
        if rows < used:
            raise CapacityError(
                "bucket",
                found=f"{bucket} rows",
                needed=f"at least {used}",
                do="use a larger bucket, or fewer rows a step",
            )

        row_slot, row_back, tiles = [-1] * rows, [0] * rows, []
        tile_rows = max(1, SUFFIX_BLOCK_M // next_power_of_2(pool.geometry.G))
        paths: dict[tuple[int, ...], int] = {}
        for n, i in enumerate(order):
            begin, end = qo_indptr[n], qo_indptr[n + 1]
            row_slot[begin:end] = [agents[i].slot] * (end - begin)
            row_back[begin:end] = range(end - begin - 1, -1, -1)
            path = paths.setdefault(keys[i], len(paths))
            tiles += [(agents[i].slot, r, min(r + tile_rows, end), path) for r in range(begin, end, tile_rows)]

        processors = multiprocessors(pool.device) // pool.geometry.num_kv_heads
        nodes, items, flags = _cut(agents, order, keys, qo_indptr, workers_per_node, processors, pool.geometry.G)
        width = max(LEAST, max(map(len, flags.values())))
        table = [flags[key] + [0] * (width - len(flags[key])) for key in paths]
        blocks = tuple(node.block() for node in nodes)
        node_rows = [
            (block.data_ptr(), node.tokens, node.padded_tokens, node.segment_tokens)
            for node, block in zip(nodes, blocks, strict=True)
        ]

        def vector(values: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(pool.device)

        def table_of(values: Sequence[Sequence[int]], width: int, dtype: torch.dtype) -> Tensor:
            filled = [*values, *[[0] * width] * (LEAST - len(values))]
            return torch.tensor(filled, dtype=dtype).to(pool.device)

        g = pool.geometry
        row_of = dict(zip(order, qo_indptr[1:], strict=True))
        return cls(
            pool=pool,
            agents=tuple(agents),
            order=tuple(order),
            qo_indptr=tuple(qo_indptr),
            rows=rows,
            last_rows=tuple(row_of[i] - 1 for i in range(len(agents))),
            tensors=_any_size(
                vector(row_slot, torch.int32),
                vector(row_back, torch.int32),
                table_of(tiles, 4, torch.int32),
                table_of(table, width, torch.int32),
                table_of(node_rows, 4, torch.int64),
                table_of(items, 6, torch.int32),
            ),
            expects=(rows, g.num_qo_heads, g.num_kv_heads, g.head_dim, g.dtype, pool.device),
            _blocks=blocks,
            _slots=vector([agent.slot for agent in agents], torch.int64),
            _counts=vector([agent.rows for agent in agents], torch.int32),
        )

    def begin(self) -> None:
        """Count this step's rows into the suffix lengths, on host and device; once a step, before its first layer.

        A step that runs again on one begin writes the same places again: the same rows give the same bits, as a warm-up, a
        measurement or a comparison of backends needs it, which is why it is not refused; other rows take the place of the
        last ones. Raises CapacityError for a slot that was not reserved pages for its rows; then nothing is counted.
        """
        for n, agent in enumerate(self.agents):
            try:
                self.pool.advance(agent.slot, agent.rows)
            except Exception:
                for done in self.agents[:n]:
                    self.pool.advance(done.slot, -done.rows)
                raise
        self.pool.seq_lens.index_add_(0, self._slots, self._counts)
        object.__setattr__(self, "begun", True)


def _any_size(*tensors: Tensor) -> PlanTensors:
    """The tensors, marked for torch.compile as of any size, so that what it compiles for one plan serves every plan."""
    plan = PlanTensors(*tensors)
    # Who compiles has imported dynamo, and others need not pay the seconds that it takes to import.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        for tensor in plan:
            dynamo.maybe_mark_dynamic(tensor, 0)
        dynamo.maybe_mark_dynamic(plan.path_table, 1)
    return plan


def _check(pool: PagePool, agents: Sequence[AgentRows], workers_per_node: int | None) -> None:
    if not agents:
        raise RequestError(
            "agents", found="none", needed="at least one", do="make a plan only for a step that has rows"
        )
    _check_pages(pool)
    if workers_per_node is not None and workers_per_node < 1:
        raise RequestError("workers_per_node", found=workers_per_node, needed="at least 1", do="leave it out")
    seen: set[int] = set()
    for slot, node, rows in agents:
        if slot in seen:
            raise RequestError(
                "agents.slot", found=f"{slot} twice", needed="each slot once", do="bring all rows of an agent together"
            )
        seen.add(slot)
        if rows < 1:
            raise RequestError(
                "agents.rows", found=rows, needed="at least 1", do="leave an agent without rows out of the step"
            )
        pool.length(slot)
        for above in node.path() if node is not None else ():
            if above.released or not above.published:
                raise ReadOnlyError(
                    "prefix",
                    found=repr(above),
                    needed="a published prefix that is still held",
                    do="publish before, and release after, the agents below it",
                )
            if (above.geometry, above.device) != (pool.geometry, pool.device):
                kind = ShapeError if above.geometry != pool.geometry else DeviceError
                raise kind(
                    "prefix",
                    found=f"{above.geometry} on {above.device}",
                    needed=f"{pool.geometry} on {pool.device} as in the pool",
                    do="make pool and prefix for one model",
                )


def _check_pages(pool: PagePool) -> None:
    """Pages may be somebody else's memory, of any strides but the last; their shape is what tables and kernels count in."""
    g, pages = pool.geometry, pool.pages
    needed = (g.layers, 2, pool.num_pages, g.num_kv_heads, PAGE, g.head_dim)
    if tuple(pages.shape) != needed:
        raise ShapeError(
            "pages",
            found=list(pages.shape),
            needed=f"{list(needed)}, pages of {PAGE} tokens",
            do="view larger pages as several of this size",
        )
    if pages.stride(-1) != 1:
        raise ShapeError(
            "pages.stride(-1)", found=pages.stride(-1), needed=1, do="lay the elements of a head side by side"
        )
    if pages.dtype != g.dtype:
        raise DtypeError("pages", found=pages.dtype, needed=f"{g.dtype} as in the pool's geometry", do="convert them")
    if pages.device != pool.page_table.device:
        raise DeviceError(
            "pages", found=pages.device, needed=f"{pool.page_table.device} as the page table", do="move them there"
        )


def _path_keys(agents: Sequence[AgentRows]) -> list[tuple[int, ...]]:
    """Each agent's path as indices of nodes by first appearance: sorted, they are a depth-first order of the tree."""
    index: dict[int, int] = {}
    return [
        tuple(index.setdefault(id(node), len(index)) for node in (agent.node.path() if agent.node else ()))
        for agent in agents
    ]


def _cut(
    agents: Sequence[AgentRows],
    order: Sequence[int],
    keys: Sequence[tuple[int, ...]],
    qo_indptr: Sequence[int],
    workers: int | None,
    processors: int,
    group: int,
) -> tuple[list[SharedPrefix], list[tuple[int, ...]], dict[tuple[int, ...], list[int]]]:
    """Nodes in depth-first order, work items, and for each path its flags in fold order.

    A node's rows are contiguous, cut into items of at most PREFIX_BLOCK_M packed rows. Its states follow those of its
    ancestors, so siblings use the same slots for other rows.
    """
    nodes: list[SharedPrefix] = []
    number: dict[tuple[int, ...], int] = {}
    ranges: dict[tuple[int, ...], list[int]] = {}
    for n, i in enumerate(order):
        node = agents[i].node
        for depth, above in enumerate(node.path() if node else (), start=1):
            prefix = keys[i][:depth]
            if prefix not in number:
                number[prefix] = len(nodes)
                nodes.append(above)
                ranges[prefix] = [qo_indptr[n], qo_indptr[n + 1]]
            ranges[prefix][1] = qo_indptr[n + 1]

    item_rows = max(1, PREFIX_BLOCK_M // group)
    tiles = {prefix: -(-(end - begin) // item_rows) for prefix, (begin, end) in ranges.items()}
    work = sum(tiles[prefix] * nodes[n].tokens for prefix, n in number.items())
    items: list[tuple[int, ...]] = []
    flags: dict[tuple[int, ...], list[int]] = {(): []}
    for prefix, n in number.items():
        segments = num_segments(nodes[n].tokens)
        if workers is not None:
            run = -(-segments // workers)
        elif segments > 1:
            own = processors * tiles[prefix] * nodes[n].tokens // work  # its part of the multiprocessors
            run = _run(tiles[prefix], segments, max(1, own))
        else:
            run = segments
        state = len(flags[prefix[:-1]])
        first_row, last_row = ranges[prefix]
        for begin in range(first_row, last_row, item_rows):
            end = min(begin + item_rows, last_row)
            items.append((n, begin, end, 0, min(run, segments), state))
            for first in range(run, segments, run):
                items.append((n, begin, end, first, min(first + run, segments), state + 1 + first - run))
        flags[prefix] = flags[prefix[:-1]] + [STARTS] + [CONTINUES] * (segments - min(run, segments))
    return nodes, items, flags


def _run(tiles: int, segments: int, processors: int) -> int:
    """Segments of a walk, so that `tiles` row tiles of `segments` segments end soonest on so many processors of one kv head.

    In segments' time: rounds of walks, and what the states take that walks after the first leave for each segment.
    """

    def seconds(run: int) -> float:
        walks = -(-segments // run)
        return -(-tiles * walks // processors) * run + STATE_COST * tiles / processors * (segments - min(run, segments))

    # Of equals the longest, which leaves the fewest states.
    return min(range(segments, 0, -1), key=seconds)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of anything else, which shares out the segments by itself."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
