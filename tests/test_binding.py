"""The way into csrc/: random calls of all that takes addresses, as they should be and with one thing wrong.

A valid call must give what fp64, or the torch backend, gives. A call with one thing wrong must raise an error that names it,
before anything is computed: of all that it was given, and of the results, which lie between guard bands, no bit changes.
Wrong are tensors, given to native, rows and cpu, and numbers, given to _C instead of those that a valid call is made of.
"""

from __future__ import annotations

import ast
import math
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NAN, NO_PAGE, Guarded, bits
from test_cpu import sum_by_hand
from test_rows import STEP, close
from torch import Tensor
from torch.nn import functional

from kvkern import _C, cpu, native, plain, rows
from kvkern.errors import DeviceError, DtypeError, KvkernError, ShapeError
from kvkern.geometry import PAGE, num_segments, segment_tokens
from kvkern.plain import State

LOG2E = math.log2(math.e)
EPS = 1e-5
ISAS = _C.instruction_sets()
BUILT = (torch.float32, torch.float16, torch.bfloat16)
NOT_BUILT = (torch.float64, torch.int32, torch.complex64, torch.float8_e4m3fn)
BOUND = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Of an output, relative to the largest; in 16 bits the weights may be rounded too."""
ROWS = (0, 1, 2, 7, 8, 9, 16, 17, 24, 25, 33, 48, 49)
"""The edges of the kernels' groups of rows."""
LAST, LAST64 = 2**31 - 1, 2**63 - 1
OUT = (-1, LAST, -LAST - 1)
OUT64 = (-1, LAST64, -LAST64 - 1)
"""Indices that no table has."""

many = pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.full)])


# -- memory that is watched --------------------------------------------------------------------------------------------


class Results:
    """torch, for a module under test: what it allocates is full of NaN, or of what it asked for, between guard bands."""

    BAND = 64

    def __init__(self) -> None:
        self.stores: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def full(self, shape: Sequence[int], value: float, *, dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        store = torch.full((count + 2 * self.BAND,), NAN, dtype=dtype)
        inner = store[self.BAND : self.BAND + count].fill_(value)
        self.stores.append((store, store.clone()))
        return inner.view(tuple(shape))

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        return self.full(shape, NAN, dtype=dtype)

    def zeros(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        return self.full(shape, 0, dtype=dtype)

    def empty_like(self, other: Tensor) -> Tensor:
        return self.empty(other.shape, dtype=other.dtype)

    def assert_bands_whole(self) -> None:
        for store, before in self.stores:
            for band in (slice(None, self.BAND), slice(-self.BAND, None)):
                assert torch.equal(bits(store[band]), bits(before[band])), "a guard band was written"

    def assert_untouched(self) -> None:
        for store, before in self.stores:
            assert torch.equal(bits(store), bits(before)), "a result was written"


Show = Callable[[Results, str, dict[str, Any]], None]


class Tap:
    """_C, with each call of it shown first: the results it is to write, its name and its arguments by theirs."""

    def __init__(self, show: Show, results: Results) -> None:
        self.show, self.results = show, results

    def __getattr__(self, name: str) -> Any:
        function = getattr(_C, name)

        def call(*given: Any, **named: Any) -> Any:
            self.show(self.results, name, dict(zip(ARGUMENTS[name], given, strict=False)) | named)
            return function(*given, **named)

        return call


@contextmanager
def watched(show: Show | None = None) -> Iterator[Results]:
    results = Results()
    with pytest.MonkeyPatch.context() as patch:
        for module in (native, rows):
            patch.setattr(module, "torch", results)
        for module in (native, rows, cpu) if show else ():
            patch.setattr(module, "_C", Tap(show, results))
        yield results


def storage(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


# -- calls -------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A valid call. numbers: tensors of one dtype, which the kernels know; tables: of integers; options: all else."""

    function: Callable[..., Any]
    numbers: dict[str, Tensor]
    tables: dict[str, Tensor]
    options: dict[str, Any]
    check: Callable[[Any], None]
    wrong_indices: list[tuple[str, tuple[int, ...], int, str]] = field(default_factory=list)
    """table, place in it, value, and the error's words."""
    keep: list[Tensor] = field(default_factory=list)
    any_dtype: bool = False
    strided: tuple[str, ...] = ()
    """Numbers whose elements may lie apart."""
    not_read: tuple[str, ...] = ()
    """Tables of which only the shape counts."""

    def __call__(self, **changed: Any) -> Any:
        given = self.numbers | self.tables | self.options | changed
        for name in ("a", "b", "state"):
            if f"{name}.m" in given:
                given[name] = State(*(given.pop(f"{name}.{part}") for part in State._fields))
        return self.function(**given)

    def memory(self) -> list[Tensor]:
        return [storage(t) for t in (*self.numbers.values(), *self.tables.values(), *self.keep)]


def laid(tensor: Tensor) -> Tensor:
    """Its values in memory of exactly its size, or strided between guard bands."""
    if random.random() < 0.5:
        return tensor.clone()
    order = list(range(tensor.dim() - 1))
    random.shuffle(order)
    return Guarded.of(tensor, [*order, tensor.dim() - 1]).view


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def isa() -> str:
    return random.choice(ISAS)


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, states: Sequence[State], scale: float
) -> tuple[Tensor, Tensor]:
    """(o, lse) in fp64 of rows [R, H, D] that see so many of the keys [n, kv heads, D], and what was seen by the states [R, H]."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("rhd,nhd->rhn", q.double(), k) * (scale * LOG2E)
    hidden = torch.arange(k.shape[0]) >= lengths[:, None]
    scores = torch.cat(
        [scores.masked_fill(hidden[:, None], -math.inf), torch.full((*scores.shape[:2], 1), -math.inf)], -1
    )
    top = torch.stack([scores.amax(-1), *(s.m.double() for s in states)]).amax(0)
    pivot = top.masked_fill(top == -math.inf, 0)
    weights = torch.exp2(scores - pivot[..., None])[..., :-1]
    shares = [torch.exp2(s.m.double() - pivot) for s in states]
    total = weights.sum(-1) + sum(s.l * share for s, share in zip(states, shares, strict=True))
    acc = torch.einsum("rhn,nhd->rhd", weights, v)
    acc = acc + sum(s.acc * share[..., None] for s, share in zip(states, shares, strict=True))
    unseen = total == 0
    o = torch.where(unseen[..., None], 0, acc / total[..., None])
    return o, torch.where(unseen, -math.inf, (pivot + torch.log2(total)) / LOG2E)


def assert_near(found: Tensor, expected: Tensor, bound: float, name: str) -> None:
    assert found.shape == expected.shape
    same = found.double() == expected  # infinities
    error = torch.where(same, 0, (found.double() - expected).abs())
    largest = expected[expected.isfinite()].abs().max().clamp(min=1) if expected.isfinite().any() else 1
    assert (error <= bound * largest).all(), f"{name}: error {error.max()}"


def draw_prefix() -> Call:
    n, heads, group, head_dim = (
        random.choice(ROWS),
        random.randint(1, 3),
        random.randint(1, 4),
        16 * random.randint(1, 6),
    )
    tokens = random.choice([1, 2, 63, 64, 127, 128, 129, 1023, 1024, 1025, 2500])
    dtype, scale, layer = random.choice(BUILT), random.uniform(0.05, 0.4), random.randrange(2)
    padded, segments = -(-tokens // 128) * 128, num_segments(tokens)
    block = torch.full((2, 2, heads, padded, head_dim), NAN, dtype=dtype)
    block[layer, :, :, :tokens] = torch.randn(2, heads, tokens, head_dim)
    q = laid(torch.randn(n, heads * group, head_dim).to(dtype))
    # Rows and segments cut anywhere; a later segment leaves a state of its own.
    cuts = sorted({0, n, random.randint(0, n)})
    cut = random.randint(1, segments)
    items = [(0, a, b, 0, cut, 0) for a, b in pairwise(cuts)]
    items += [(0, a, b, cut, segments, 1) for a, b in pairwise(cuts)] if cut < segments else []
    items.append((0, 0, 0, 0, 0, 0))
    states = 1 + segments - cut
    node = [block.data_ptr(), tokens, padded, segment_tokens(tokens)]

    def check(found: State) -> None:
        parts = [
            State(*(x[i].view(heads, n, group, *x.shape[3:]).transpose(0, 1).flatten(1, 2) for x in found))
            for i in range(states)
        ]
        keys = [x.transpose(0, 1) for x in block[layer, :, :, :tokens]]
        right = reference(q, *keys, torch.full((n,), tokens), [], scale)
        # The states are folded by the reference: without keys of its own.
        whole = reference(q, *(x[:0] for x in keys), torch.zeros(n), parts, scale)
        for name, a, b in zip(("o", "lse"), whole, right, strict=True):
            assert_near(a, b, BOUND[dtype], name)

    wrong = []
    if n:
        at = random.randrange(len(items) - 1)
        for column, word, values in (
            (0, "node", (2, *OUT)),
            (1, "row begin", (n + 1, *OUT)),
            (2, "row end", (n + 1, *OUT)),
            (3, "segment begin", (segments, *OUT)),
            (4, "segment end", (segments + 1, items[at][3], *OUT)),
            (5, "state", (states, *OUT)),
        ):
            wrong += [
                ("items", (at, column), value, f"^{word} of item {at}: found {value}, needed") for value in values
            ]
        for column, word, values in (
            (0, "address", (0, node[0] + 1)),
            (1, "tokens", (0, padded + 1, *OUT64)),
            (2, "(padded )?tokens", (tokens - 1, *OUT64)),
            (3, "tokens in a segment", (0, *OUT64)),
        ):
            wrong += [("node_table", (0, column), value, f"^{word} of node 0: found") for value in values]
    return Call(
        native.prefix_attention,
        {"q": q},
        {
            "node_table": torch.tensor([node, [0, 0, 0, 0]]),
            "items": int32(items),
            "path_table": torch.ones(2, states, dtype=torch.int32),
        },
        {"num_kv_heads": heads, "layer": layer, "sm_scale": scale, "instruction_set": isa()},
        check,
        wrong,
        [block],
        not_read=("path_table",),
    )


class Agents:
    """Rows of some agents, padding rows after them, and their page table; what is unused in the tables is out of range."""

    def __init__(self, page_tokens: int = PAGE) -> None:
        self.page_tokens, self.width = page_tokens, random.randint(1, 5)
        self.capacity = self.width * page_tokens
        count, spare, padding = random.randint(0, 5), random.randint(1, 2), random.randint(0, 2)
        self.slots, self.pages = count + spare, count * self.width + spare
        self.table = int32(random.choices(NO_PAGE, k=self.slots * (self.width + 2))).view(self.slots, -1)[:, 1:-1]
        self.seq_lens = torch.full((self.slots,), 2**30, dtype=torch.int32)
        free, self.held = random.sample(range(self.pages), self.pages), random.sample(range(self.slots), count)
        slot_of, back = [], []
        self.spans: list[tuple[int, int, int, int]] = []
        """slot, first row, end of rows, length"""
        for slot in self.held:
            edges = (1, self.page_tokens, self.page_tokens + 1, 64, 65, self.capacity, random.randint(1, self.capacity))
            length = min(random.choice(edges), self.capacity)
            new = random.randint(1, min(length, 20))
            self.seq_lens[slot] = length
            for i in range(-(-length // page_tokens)):
                self.table[slot, i] = free.pop()
            self.spans.append((slot, len(slot_of), len(slot_of) + new, length))
            slot_of += [slot] * new
            back += reversed(range(new))
        self.rows = len(slot_of) + padding
        self.row_slot = int32(slot_of + [-1] * padding)
        self.row_back = int32(back + [LAST] * padding)

    def tables(self) -> dict[str, Tensor]:
        return {
            "page_table": self.table,
            "seq_lens": self.seq_lens,
            "row_slot": self.row_slot,
            "row_back": self.row_back,
        }

    def cells(self) -> Iterator[tuple[int, int, int]]:
        """Row, page and place in the page of all rows that have one."""
        for slot, begin, end, length in self.spans:
            for row in range(begin, end):
                position = length - end + row
                yield row, int(self.table[slot, position // self.page_tokens]), position % self.page_tokens

    def wrong_rows(self) -> list[tuple[str, tuple[int, ...], int, str]]:
        """What K0 has to refuse."""
        if not self.spans:
            return []
        slot, begin, end, length = random.choice(self.spans)
        row = random.randrange(begin, end)
        page = (length - end + row) // self.page_tokens
        where = "suffix position"
        return [
            *(("row_slot", (row,), x, f"^row_slot of row {row}: found {x}") for x in (-2, self.slots, *OUT[1:])),
            *(
                ("row_back", (row,), x, f"^{where} of row {row}: found")
                for x in (length, length - 1 - self.capacity, *OUT[1:])
            ),
            *(("seq_lens", (slot,), x, f"^{where} of row") for x in (0, self.capacity + end - begin, *OUT)),
            *(("page_table", (slot, page), x, rf"^page of row \d+: found {x}") for x in (self.pages, *OUT)),
        ]


def draw_suffix() -> Call:
    agents = Agents(random.choice((16, 16, 16, 1, 5, 48, 64, 300)))
    heads, group, head_dim = random.randint(1, 3), random.randint(1, 4), 16 * random.randint(1, 6)
    dtype, scale, slots = random.choice(BUILT), random.uniform(0.05, 0.4), random.randint(0, 4)
    tokens, n = agents.page_tokens, agents.rows
    pages = [torch.full((agents.pages, heads, tokens, head_dim), NAN, dtype=dtype) for _ in range(2)]
    for slot, _, _, length in agents.spans:
        for position in range(length):
            for x in pages:
                x[agents.table[slot, position // tokens], :, position % tokens] = torch.randn(heads, head_dim)
    k_pages, v_pages = (laid(x) for x in pages)
    q = laid(torch.randn(n, heads * group, head_dim).to(dtype))
    paths = int32([[1, 2, 1, 2][:slots], [1, 1, 0, 0][:slots], [0, 9, -9, 7][:slots]])
    used = [min(slots, 4), min(slots, 2), 0]
    m, l = torch.randn(slots, heads, n * group), torch.rand(slots, heads, n * group) + 0.5
    acc = torch.randn(slots, heads, n * group, head_dim)
    # An agent's rows in one tile or two; what no tile holds stays 0 and -inf.
    path_of = [random.randrange(3) for _ in agents.spans]
    tiles = [(0, 0, 0, 0)]
    for (slot, begin, end, _), path in zip(agents.spans, path_of, strict=True):
        tiles += [(slot, a, b, path) for a, b in pairwise(sorted({begin, end, random.randint(begin, end)}))]

    def check(found: tuple[Tensor, Tensor]) -> None:
        o, lse = torch.zeros(n, heads * group, head_dim).double(), torch.full((n, heads * group), -math.inf).double()
        states = [
            State(*(x[i].view(heads, n, group, *x.shape[3:]).transpose(0, 1).flatten(1, 2) for x in (m, l, acc)))
            for i in range(slots)
        ]
        for (slot, begin, end, length), path in zip(agents.spans, path_of, strict=True):
            at = [(int(agents.table[slot, i // tokens]), i % tokens) for i in range(length)]
            k, v = (torch.stack([x[page, :, token] for page, token in at]) for x in (k_pages, v_pages))
            mine = [State(*(x[begin:end] for x in state)) for state in states[: used[path]]]
            lengths = torch.arange(length - (end - begin), length) + 1
            o[begin:end], lse[begin:end] = reference(q[begin:end], k, v, lengths, mine, scale)
        assert_near(found[0], o, BOUND[dtype], "o")
        assert_near(found[1], lse, BOUND[dtype], "lse")

    wrong = []
    if agents.spans:
        at = random.randrange(1, len(tiles))
        slot, begin, end, _ = tiles[at]
        for column, word, values in (
            (0, "slot", (agents.slots, *OUT)),
            (1, "row begin", (n + 1, *OUT)),
            (2, "row end", (n + 1, *OUT)),
            (3, "path", (3, *OUT)),
        ):
            wrong += [
                ("suffix_tiles", (at, column), x, f"^{word} of suffix tile {at}: found {x}, needed") for x in values
            ]
        entry = random.randrange(-(-(int(agents.seq_lens[slot]) - int(agents.row_back[end - 1])) // tokens))
        wrong += [("page_table", (slot, entry), x, f"^page of slot {slot}: found {x}") for x in (agents.pages, *OUT)]
        too_long = rf"^(suffix length|page) of slot {slot}: found"
        wrong += [("seq_lens", (slot,), x, too_long) for x in (agents.capacity + 20, LAST)]
        wrong += [("row_back", (begin,), x, too_long) for x in (-agents.capacity, OUT[2])]
    if slots:
        wrong += [("path_table", (1, 0), x, f"^flag of path 1: found {x}") for x in (2, 3, *OUT)]
    if slots > 1:
        wrong += [("path_table", (0, slots - 1), x, f"^flag of path 0: found {x}") for x in (3, *OUT)]
    return Call(
        native.suffix_attention,
        {"q": q, "k_pages": k_pages, "v_pages": v_pages},
        agents.tables()
        | {"suffix_tiles": int32(tiles), "path_table": paths, "state.m": m, "state.l": l, "state.acc": acc},
        {"sm_scale": scale, "instruction_set": isa()},
        check,
        wrong,
    )


def draw_merge() -> Call:
    lead, head_dim = random.choice([(), (1,), (7,), (3, 5), (0, 4), (2, 1, 33)]), random.choice([1, 7, 16, 80])
    parts = {
        f"{side}.{name}": laid(x) if x.dim() else x
        for side in "ab"
        for name, x in zip(
            State._fields, (torch.randn(lead), torch.rand(lead) + 0.5, torch.randn(*lead, head_dim)), strict=True
        )
    }

    def check(found: State) -> None:
        a, b = (State(*(parts[f"{side}.{name}"].double() for name in State._fields)) for side in "ab")
        for name, x, y in zip(State._fields, found, plain.fold(a, b), strict=True):
            assert_near(x, y, 1e-6, name)

    return Call(native.merge, {}, parts, {"instruction_set": isa()}, check, strided=tuple(parts))


def draw_append() -> Call:
    agents, heads, head_dim = Agents(random.choice((16, 1, 5))), random.randint(1, 3), random.choice([1, 5, 16, 33])
    dtype = random.choice((*BUILT, torch.float64, torch.complex64))
    k, v = (laid(torch.randn(agents.rows, heads, head_dim).mul(9).abs().to(dtype)) for _ in range(2))
    pages = [laid(torch.zeros(agents.pages, heads, agents.page_tokens, head_dim, dtype=dtype)) for _ in range(2)]
    before = [storage(x).clone() for x in pages]

    def check(_: None) -> None:
        for x, store, source in zip(pages, before, (k, v), strict=True):
            expected = store.view(dtype).as_strided(x.shape, x.stride(), x.storage_offset())
            for row, page, token in agents.cells():
                expected[page, :, token] = source[row]
            assert torch.equal(storage(x), store), "pages, or what lies around them"

    numbers = {"k": k, "v": v, "k_pages": pages[0], "v_pages": pages[1]}
    return Call(cpu.append, numbers, agents.tables(), {}, check, agents.wrong_rows(), any_dtype=True)


def draw_append_fused() -> Call:
    agents, heads, kv_heads = Agents(), random.randint(1, 5), random.randint(1, 3)
    dtype, head_dim, normed = random.choice(BUILT), 2 * random.choice([1, 5, 8, 24, 40, 64]), random.random() < 0.5
    numbers = {
        name: laid(torch.randn(agents.rows, h, head_dim).to(dtype))
        for name, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    numbers |= {name: laid(torch.randn(agents.rows, head_dim).to(dtype)) for name in ("cos", "sin")}
    if normed:
        numbers |= {name: torch.rand(head_dim).to(dtype) + 0.5 for name in ("q_norm", "k_norm")}
    for name in ("k_pages", "v_pages"):
        numbers[name] = laid(torch.zeros(agents.pages, kv_heads, PAGE, head_dim, dtype=dtype))
    options = {"q_eps": EPS, "k_eps": EPS} | ({} if normed else {"q_norm": None, "k_norm": None})
    before = {name: storage(numbers[name]).clone() for name in ("k_pages", "v_pages")}

    def check(found: Tensor) -> None:
        theirs = {name: torch.zeros(numbers[name].shape, dtype=dtype) for name in before}
        q = plain.append_fused(**numbers | agents.tables() | options | theirs)
        for a, b in ((found, q), *((numbers[name], theirs[name]) for name in before)):
            torch.testing.assert_close(a, b, rtol=STEP[dtype], atol=4 * STEP[dtype])
        for name, store in before.items():  # around the pages
            x = numbers[name]
            store.view(dtype).as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
            assert torch.equal(storage(x), store), name

    return Call(rows.append_fused, numbers, agents.tables(), options | {"isa": isa()}, check, agents.wrong_rows())


def draw_norm() -> Call:
    n, size, dtype = random.choice(ROWS), random.choice([1, 2, 15, 16, 17, 64, 577]), random.choice(BUILT)
    numbers = {"x": laid(torch.randn(n, size).to(dtype)), "weight": torch.rand(size).to(dtype) + 0.5}
    if random.random() < 0.5:
        numbers["residual"] = laid(torch.randn(n, size).to(dtype))
    both = numbers["x"] + numbers.get("residual", 0)

    def check(found: tuple[Tensor, Tensor]) -> None:
        close(found[0], plain._norm(both, numbers["weight"], EPS))
        assert torch.equal(found[1], both)

    return Call(rows.rms_norm, numbers, {}, {"eps": EPS, "isa": isa()}, check)


def draw_gate() -> Call:
    n, size, dtype = random.choice(ROWS), random.choice([1, 2, 15, 16, 17, 64, 577]), random.choice(BUILT)
    gate, up = (laid(torch.randn(n, size).mul(3).to(dtype)) for _ in range(2))
    return Call(
        rows.silu_mul,
        {"gate": gate, "up": up},
        {},
        {"isa": isa()},
        lambda found: close(found, functional.silu(gate) * up),
    )


DRAWS: dict[str, Callable[[], Call]] = {
    "prefix_attention": draw_prefix,
    "suffix_attention": draw_suffix,
    "fold": draw_merge,
    "append": draw_append,
    "append_fused": draw_append_fused,
    "rms_norm": draw_norm,
    "silu_mul": draw_gate,
}
of_all = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


# -- valid calls -------------------------------------------------------------------------------------------------------


def run(call: Call, show: Show | None = None) -> None:
    """The call as it is: right, and nothing written around its results."""
    with watched(show) as results:
        found = call()
    results.assert_bands_whole()
    call.check(found)


@many
@of_all
def test_a_valid_call_gives_what_fp64_gives_and_writes_nothing_around_it(draw, rounds):
    for _ in range(rounds):
        run(draw())


def test_control_an_element_written_behind_a_result_is_seen(monkeypatch):
    silu_mul = _C.silu_mul

    def beyond(gate: int, up: int, out: int, dtype: int, shape: Sequence[int], *rest: Any) -> None:
        silu_mul(gate, up, out, dtype, (shape[0] + 1, shape[1]), *rest)

    call = Call(rows.silu_mul, {name: torch.ones(5, 16)[:4] for name in ("gate", "up")}, {}, {}, lambda _: None)
    run(call)
    monkeypatch.setattr(_C, "silu_mul", beyond)
    with pytest.raises(AssertionError, match="a guard band was written"):
        run(call)


# -- tensors with something wrong --------------------------------------------------------------------------------------


def refused(call: Call, kinds: type | tuple[type, ...], words: str, **changed: Any) -> None:
    """The call with these arguments raises an error of this kind whose field, or first words, are those, and changes nothing."""
    before = [part.clone() for part in call.memory()]
    with watched() as results, pytest.raises(kinds) as caught:
        call(**changed)
    assert caught.type in (kinds if isinstance(kinds, tuple) else (kinds,)), caught.value
    said = caught.value.field if isinstance(caught.value, KvkernError) else str(caught.value)
    assert re.search(words, said), f"{said!r} instead of {words!r}"
    results.assert_untouched()
    for part, was in zip(call.memory(), before, strict=True):
        assert torch.equal(part, was), "an argument was written"


def apart(tensor: Tensor) -> Tensor:
    """The same values, each two elements from the next."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values from an address of one byte more."""
    store = bytearray(tensor.numel() * tensor.itemsize + 1)
    moved = torch.frombuffer(store, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)
    return moved.copy_(tensor)


def names(*fields: str) -> str:
    return "|".join(rf"\b{re.escape(name)}\b" for name in fields)


@many
@of_all
def test_a_tensor_of_a_wrong_dtype_device_or_place_is_refused_by_name(draw, rounds):
    for _ in range(rounds):
        call = draw()
        of_one_dtype = names(*call.numbers)
        for name, tensor in (call.numbers | call.tables).items():
            refused(call, DeviceError, names(name), **{name: tensor.to("meta")})
            number = name in call.numbers
            others = [dtype for dtype in (*BUILT, *NOT_BUILT, torch.int64) if dtype != tensor.dtype]
            if len(call.numbers) == 1 and number:
                others = list(NOT_BUILT)
            other = (
                tensor.abs().clamp(max=9).to(random.choice(others))
                if tensor.numel()
                else tensor.to(random.choice(others))
            )
            refused(call, DtypeError, of_one_dtype if number else names(name), **{name: other})
            if tensor.dim() and tensor.shape[-1] > 1 and tensor.numel() and name not in call.strided:
                refused(call, ShapeError, names(name), **{name: apart(tensor)})
            # Bytes are copied from anywhere, and what is not read may lie anywhere.
            if tensor.numel() and not (number and call.any_dtype) and name not in call.not_read:
                refused(call, ValueError, f"^{name.split('.')[-1]}: ", **{name: misaligned(tensor)})
        if call.numbers and not call.any_dtype:
            other = random.choice(NOT_BUILT)
            refused(call, DtypeError, of_one_dtype, **{name: x.to(other) for name, x in call.numbers.items()})


@many
@of_all
def test_a_tensor_of_a_wrong_shape_is_refused_by_a_name(draw, rounds):
    """By whichever of those that do not fit together."""
    for _ in range(rounds):
        call = draw()
        fields = names(*call.numbers, *call.tables, "head_dim")
        for name, tensor in (call.numbers | call.tables).items():
            if tensor.dim() and tensor.shape[0]:
                refused(call, ShapeError, fields, **{name: tensor[0]})
            refused(call, ShapeError, fields, **{name: tensor[None]})
            for dim, size in enumerate(tensor.shape):
                free = (name, dim) in FREE.get(call.function.__name__, ()) and "residual" not in call.numbers
                if tensor.numel() and not free:
                    refused(call, ShapeError, fields, **{name: tensor.narrow(dim, 0, size - 1)})
                    refused(call, ShapeError, fields, **{name: torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)})


FREE = {
    # How many of them there are follows from nothing else: any number fits.
    "prefix_attention": {("q", 0), ("q", 1), ("node_table", 0), ("items", 0), ("path_table", 0), ("path_table", 1)},
    "suffix_attention": {("suffix_tiles", 0), ("path_table", 0), ("page_table", 1)},
    "append": {("page_table", 1)},
    "append_fused": {("page_table", 1), ("q", 1)},
    "rms_norm": {("x", 0)},  # without a residual
}


@many
def test_heads_that_the_kernels_are_not_built_for_are_refused(rounds):
    for _ in range(rounds):
        for call in (draw_prefix(), draw_suffix()):
            for less in (1, 8, call.numbers["q"].shape[-1]):
                changed = {name: x[..., : x.shape[-1] - less] for name, x in call.numbers.items()}
                refused(call, ShapeError, "^(q|k_pages)$", **changed)
        call = draw_prefix()
        for heads in (0, -1, -(2**63), call.numbers["q"].shape[1] + 1):
            refused(call, ShapeError, "^(q|num_kv_heads)$", num_kv_heads=heads)
        refused(call, ShapeError, "^q$", q=call.numbers["q"][:, :0])
        refused(call, ValueError, "^layer: found -1", layer=-1)
        call = draw_append_fused()
        odd = {name: x[..., :-1] for name, x in call.numbers.items()}
        refused(call, ShapeError, "^head_dim$", **odd)
        for parts in (("q",), ("k", "v", "k_pages", "v_pages")):
            refused(call, ShapeError, f"heads of {parts[0]}", **{name: call.numbers[name][:, :0] for name in parts})
        none = {name: call.numbers[name][:, :, :0] for name in ("k_pages", "v_pages")}
        refused(call, ShapeError, "k_pages", **none)


@many
@of_all
def test_an_index_that_leads_out_of_its_table_is_refused(draw, rounds):
    for _ in range(2 * rounds):
        call = draw()
        for table, place, value, words in call.wrong_indices:
            changed = call.tables[table].clone()
            changed[place] = value
            if table == "page_table":  # its rows may lie apart, and do
                changed = torch.cat([changed, changed], 1)[:, : changed.shape[1]]
            refused(call, IndexError, words, **{table: changed})


@pytest.mark.parametrize("name", ["gate", "up"])
def test_control_a_check_that_is_gone_is_seen(monkeypatch, name):
    call = Call(rows.silu_mul, {"gate": torch.ones(4, 16), "up": torch.ones(4, 16)}, {}, {}, lambda _: None)
    wrong = {name: apart(call.numbers[name])}
    refused(call, ShapeError, names(name), **wrong)
    monkeypatch.setattr(rows, "_check", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(call, ShapeError, names(name), **wrong)


def test_control_an_error_that_comes_too_late_is_seen(monkeypatch):
    call = Call(rows.silu_mul, {"gate": torch.ones(4, 16), "up": torch.ones(4, 16)}, {}, {}, lambda _: None)
    silu_mul = _C.silu_mul

    def late(*given: Any) -> None:
        silu_mul(*given)
        raise ValueError("up: found out in the end")

    monkeypatch.setattr(_C, "silu_mul", late)
    with pytest.raises(AssertionError, match="a result was written"):
        refused(call, ValueError, "^up: ")


# -- numbers with something wrong --------------------------------------------------------------------------------------

ARGUMENTS = {
    node.name: [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    for node in ast.parse((Path(_C.__file__).parent / "_C.pyi").read_text()).body
    if isinstance(node, ast.FunctionDef)
}
ELEMENT = 0
"""Where an alignment stands: that of the call's dtype."""
ADDRESSES: Mapping[str, Mapping[str, tuple[tuple[str, int], ...]]] = {
    # argument -> for each address in it the error's name and the alignment
    "append": {
        **{name: ((name, 1),) for name in ("k", "v", "k_pages", "v_pages")},
        **{name: ((name, 4),) for name in ("page_table", "seq_lens", "row_slot", "row_back")},
    },
    "prefix_attention": {
        "q": (("q", ELEMENT),),
        "node_table": (("node_table", 8),),
        "items": (("items", 4),),
        "state": (("m", 4), ("l", 4), ("acc", 4)),
    },
    "suffix_attention": {
        **{name: ((name, ELEMENT),) for name in ("q", "k_pages", "v_pages", "o")},
        **{
            name: ((name, 4),)
            for name in ("page_table", "seq_lens", "row_slot", "row_back", "suffix_tiles", "path_table", "lse")
        },
        "state": (("m", 4), ("l", 4), ("acc", 4)),
    },
    "fold": {side: (("m", 4), ("l", 4), ("acc", 4)) for side in ("a", "b", "out")},
    "rms_norm": {
        name: (("sum" if name == "residual" else name, ELEMENT),) for name in ("x", "residual", "weight", "out", "sum")
    },
    "silu_mul": {name: ((name, ELEMENT),) for name in ("gate", "up", "out")},
    "append_fused": {
        "numbers": tuple((name, ELEMENT) for name in ("q", "k", "v", "out")),
        "turns": tuple((name, ELEMENT) for name in ("q_norm", "k_norm", "cos", "sin")),
        "pages": (("k_pages", ELEMENT), ("v_pages", ELEMENT)),
        "places": tuple((name, 4) for name in ("page_table", "seq_lens", "row_slot", "row_back")),
    },
}
OPTIONAL = {("append_fused", "q_norm"), ("append_fused", "k_norm")}
SIZES = {
    *("rows", "num_kv_heads", "row_bytes", "head_dim", "shape", "num_nodes", "num_items", "num_states", "layer"),
    *("num_pages", "page_tokens", "slots", "table_width", "table", "num_tiles", "num_paths", "segment"),
}
STRIDES = {"q_strides": "q_strides", "k_page_strides": "k_page_strides", "v_page_strides": "v_page_strides"}
STRIDES_OF_ROWS = {"strides": r"q, k, v|x, residual|gate, up", "turn_strides": "cos, sin", "page_strides": "pages"}
NEITHER = {"k_strides", "v_strides", "scale", "eps", "threads", "table_stride", "dtype", "instruction_set"}


def wrong_numbers(function: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Any, type, str]]:
    """(argument, its value with one number wrong, error, its first words)."""
    size = 4 if given.get("dtype", 0) == 0 else 2

    def put(name: str, i: int, value: Any) -> Any:
        return [*given[name][:i], value, *given[name][i + 1 :]] if isinstance(given[name], Sequence) else value

    for name, value in given.items():
        parts = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for i, (word, alignment) in enumerate(ADDRESSES[function].get(name, ())):
            if parts[i] and (function, word) not in OPTIONAL:
                yield name, put(name, i, 0), ValueError, rf"^{word}: "
            if parts[i]:
                for odd in range(1, alignment or size):
                    yield name, put(name, i, parts[i] + odd), ValueError, rf"^({word}|{name}): "
            yield name, put(name, i, -1), TypeError, "incompatible function arguments"
        for i in range(len(parts)):
            for word in ("x", None):
                if name != "instruction_set" or word is None:
                    yield name, put(name, i, word), TypeError, "incompatible function arguments"
            if name in SIZES and (function, name, i) != ("append_fused", "table", 2):
                for none in (-1, -(2**63), 2**63 - 1):
                    yield name, put(name, i, none), ValueError, rf"^[\w, ]*\b{name}\b[\w, ]*: "
            words = (STRIDES_OF_ROWS if function in ("rms_norm", "silu_mul", "append_fused") else STRIDES).get(name)
            if words and not (
                function == "append" or (name == "strides" and function == "rms_norm" and i == 1 and not parts[1])
            ):
                yield name, put(name, i, parts[i] + 1), ValueError, rf"^({words}): "
        if name == "dtype":
            for unknown in (-1, 3, 2**31 - 1):
                yield name, unknown, ValueError, "^dtype: "
        if name == "instruction_set":
            yield name, "mmx", ValueError, "^instruction_set: found mmx"


def try_wrong_numbers(call: Call) -> list[str]:
    """Before each call of _C that the call makes, the same one with every number wrong in turn; returns their names."""
    seen: list[str] = []

    def show(results: Results, function: str, given: dict[str, Any]) -> None:
        before = [part.clone() for part in call.memory()]
        for name, value, kind, words in wrong_numbers(function, given):
            with pytest.raises(kind, match=words):
                getattr(_C, function)(**given | {name: value})
                print(f"{function} takes {name} = {value}")  # seen where nothing was raised
        results.assert_untouched()
        for part, was in zip(call.memory(), before, strict=True):
            assert torch.equal(part, was), f"{function} wrote to an argument"
        seen.append(function)

    run(call, show)
    return seen


@many
@of_all
def test_a_number_that_is_no_address_size_stride_or_dtype_is_refused_by_name(draw, rounds):
    tried = 0
    while tried < rounds:
        call = draw()
        if all(tensor.numel() for tensor in (call.numbers | call.tables).values()):  # of nothing no address is needed
            assert try_wrong_numbers(call) == [next(name for name, f in DRAWS.items() if f is draw)]
            tried += 1


def test_every_function_that_takes_an_address_is_drawn_and_every_argument_has_a_kind():
    others = {"block_sum", "exp2", "prefer_huge_pages", "instruction_sets"}
    assert set(ARGUMENTS) == set(DRAWS) | others, "a function without a draw, or without a test below"
    for function in DRAWS:
        kinds = {*ADDRESSES[function], *SIZES, *STRIDES, *STRIDES_OF_ROWS, *NEITHER}
        assert set(ARGUMENTS[function]) <= kinds


@of_all
def test_any_number_of_threads_is_one(draw, monkeypatch):
    for threads in (-(2**31), -1, 0, 1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        run(draw())


def test_exp2_and_the_sum_of_a_block_refuse_what_is_no_address_or_size():
    for _ in range(20):
        count = random.choice((1, 2, 15, 16, 17, 130))
        results = Results()
        x, y = (results.empty((count,), dtype=torch.float32) for _ in range(2))
        x.uniform_(-20, 20)
        results.stores = [(store, store.clone()) for store, _ in results.stores]
        right: dict[str, Any] = {"x": x.data_ptr(), "y": y.data_ptr(), "count": count, "instruction_set": isa()}
        for name, value in (
            ("x", 0),
            ("y", 0),
            ("x", right["x"] + 1),
            ("y", right["y"] + 2),
            ("count", -1),
            ("count", -(2**63)),
        ):
            with pytest.raises(ValueError, match=f"^{name}: found"):
                _C.exp2(**right | {name: value})
        results.assert_untouched()
        assert _C.exp2(0, 0, 0) is None
        _C.exp2(**right)
        results.assert_bands_whole()
        torch.testing.assert_close(y, torch.exp2(x), rtol=2**-22, atol=0)

        data, odd = random.randbytes(8 * count + 7), random.randrange(8)
        words, start = data[odd:][: 8 * count], random.choice((0, 1, 2**63, 2**64 - 1))
        block = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        address = block.data_ptr() + odd
        assert _C.block_sum(address, 8 * count, start) == sum_by_hand(words, start)
        for less in (1, 7):
            with pytest.raises(ValueError, match=f"^size_bytes: found {8 * count - less}, needed a multiple of 8"):
                _C.block_sum(address, 8 * count - less)
        for wrong, words_of_error in (
            ((0, 8), "address"),
            ((address, -8), "size_bytes"),
            ((address, -(2**63)), "size_bytes"),
        ):
            with pytest.raises(ValueError, match=f"^{words_of_error}: found"):
                _C.block_sum(*wrong)
        for start in (-1, 2**64):
            with pytest.raises(TypeError):
                _C.block_sum(address, 8, start)
    with pytest.raises(ValueError, match=r"^size_bytes: found -1"):
        _C.prefer_huge_pages(0, -1)


# -- several threads of Python, and processes --------------------------------------------------------------------------


def test_all_functions_at_once_from_several_threads_of_python():
    calls = [draw() for draw in DRAWS.values() for _ in range(2)]
    big = torch.randn(64, 4096)  # work that is shared
    right = rows.silu_mul(big, big)
    failed: list[BaseException] = []

    def ask(mine: Sequence[Call]) -> None:
        try:
            torch.set_num_threads(3)
            for _ in range(5):
                for call in mine:
                    call.check(call())
                assert torch.equal(rows.silu_mul(big, big), right)
                with pytest.raises(ShapeError):
                    rows.silu_mul(big, big[1:])
        except BaseException as error:
            failed.append(error)

    was = torch.get_num_threads()
    try:
        askers = [threading.Thread(target=ask, args=(calls[i::3],)) for i in range(3)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    finally:
        torch.set_num_threads(was)
    assert not failed, failed


def test_rows_are_computed_after_a_fork_that_threads_went_before():
    x, weight = torch.randn(64, 4096), torch.rand(4096)
    was = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        gate, norm = rows.silu_mul(x, x).numpy().tobytes(), rows.rms_norm(x, weight, EPS)[0].numpy().tobytes()
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a process that hangs ends
            same = rows.silu_mul(x, x).numpy().tobytes() == gate
            same = same and rows.rms_norm(x, weight, EPS)[0].numpy().tobytes() == norm
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert rows.silu_mul(x, x).numpy().tobytes() == gate
    finally:
        torch.set_num_threads(was)
