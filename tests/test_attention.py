"""The operator against the oracle around every edge, its refusals, opcheck, and torch.compile.

Every run goes through helpers.attend, which also holds that pages change by the new tokens alone, that inputs do not
change, that padding rows give 0 and -inf, and that nothing reads NaN or a page number out of range.
"""

from __future__ import annotations

import math
import mmap
import random
import sys
from itertools import pairwise

import pytest
import torch
from helpers import (
    Out,
    assert_case_is_exact,
    assert_exact,
    assert_same_bits,
    assert_same_rows,
    assert_untouched,
    attend,
    hostile_pool,
    plain_attention,
    write_history,
)

import kvkern.attention
from kvkern import plain
from kvkern.attention import merge_state, shared_prefix_attention
from kvkern.backends import choose
from kvkern.errors import (
    BackendError,
    CapacityError,
    DeviceError,
    DtypeError,
    KvkernError,
    ReadOnlyError,
    RequestError,
    ShapeError,
)
from kvkern.geometry import Geometry
from kvkern.kernels.oracle import attend_fp64
from kvkern.pages import PagePool
from kvkern.plan import AgentRows, Plan
from kvkern.prefix import SharedPrefix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAT = torch.ops.kvkern.shared_prefix_attention.default


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix_tokens", [0, 1, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025, 5000])
def test_prefixes_of_any_length(backend, make_case, prefix_tokens, dtype):
    case = make_case(
        tree={"doc": (prefix_tokens, None)} if prefix_tokens else {},
        agents=[("doc" if prefix_tokens else None, n, rows) for n, rows in ((1, 1), (16, 3), (33, 17))],
        dtype=dtype,
    )
    assert_case_is_exact(attend(backend, case), case)


@pytest.mark.parametrize(
    ("prefix_tokens", "dtype"), [(16_386, torch.float32), (20_000, torch.float32), (20_000, torch.bfloat16)]
)
def test_prefixes_whose_segments_are_longer_than_1024_tokens(backend, make_case, prefix_tokens, dtype):
    case = make_case(rows=3, prefix_tokens=prefix_tokens, num_kv_heads=1, head_dim=64, layers=1, dtype=dtype)
    assert case.agents[0].node.segment_tokens > 1024
    assert_case_is_exact(attend(backend, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix_tokens", [0, 127])
def test_suffixes_of_any_length(backend, make_case, prefix_tokens, dtype):
    lengths = [1, 15, 16, 17, 63, 64, 65, 300, 1023, 1024, 1025, 2500]
    case = make_case(
        rows=len(lengths), prefix_tokens=prefix_tokens, suffix_tokens=lengths, num_kv_heads=1, G=2, dtype=dtype
    )
    assert_case_is_exact(attend(backend, case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("G", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_heads_of_any_shape(backend, make_case, G, head_dim, dtype):
    case = make_case(
        tree={"doc": (129, None)},
        agents=[("doc", 20, 1), ("doc", 40, 9), (None, 17, 2)],
        num_kv_heads=random.choice([1, 2, 3]),
        G=G,
        head_dim=head_dim,
        dtype=dtype,
    )
    assert_case_is_exact(attend(backend, case), case)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 21, 22, 63, 64, 65])
def test_steps_of_any_number_of_rows(backend, make_case, rows):
    # With G = 3 a tile of 64 packed rows ends within the 22nd row.
    case = make_case(rows=rows, prefix_tokens=130, num_kv_heads=1, G=3, head_dim=32)
    assert_case_is_exact(attend(backend, case), case)


# Rows beside which a tile of some backend ends: 4 to 24 lanes of a group and 4 groups of a unit, 16 and 64 rows of a GEMM,
# 128 packed rows of a work item; with G = 3 most of them end within a row.
ROWS_AT_EDGES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    11,
    12,
    13,
    15,
    16,
    17,
    23,
    24,
    25,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    95,
    96,
    97,
]
ROWS_AT_EDGES += [127, 128, 129, 143, 144, 145, 191, 192, 193, 255, 256, 257, 299, 300]
ROWS_AT_EDGES_OF_3 = [1, 2, 3, 5, 6, 10, 11, 21, 22, 32, 33, 42, 43, 64, 65, 85, 86, 127, 128, 129, 300]


def check_rows(backend, make_case, rows, G, dtype):
    """An agent that brings this many rows of one chunk, or two that bring them together, beside four that decode.

    All rows of the step are judged together: of a row of 32 numbers the error of plain torch may be small by luck.
    """
    first = random.randint(1, rows)
    brought = [first, rows - first] if rows > first else [rows]
    case = make_case(
        tree={"doc": (130, None)},
        agents=[("doc", n + random.randint(0, 20), n) for n in brought] + [(None, 9, 1)] * 4,
        num_kv_heads=1,
        G=G,
        head_dim=32,
        dtype=dtype,
    )
    judged = attend(backend, case), case.oracle(), case.plain()
    for name in ("o", "lse"):
        assert_exact(*(torch.cat([getattr(out, name).flatten() for out in outs]) for outs in judged), name)


@pytest.mark.parametrize(
    ("rows", "G"), [(rows, 1) for rows in ROWS_AT_EDGES] + [(rows, 3) for rows in ROWS_AT_EDGES_OF_3]
)
def test_agents_may_bring_rows_up_to_the_edge_of_any_tile(backend, make_case, rows, G):
    check_rows(backend, make_case, rows, G, random.choice(DTYPES))


@pytest.mark.full
@pytest.mark.parametrize("G", [1, 3])
def test_agents_may_bring_any_number_of_rows_up_to_300(backend, make_case, G):
    for rows in range(1, 301):
        check_rows(backend, make_case, rows, G, DTYPES[rows % 3])


@pytest.mark.full
def test_any_number_of_agents_up_to_300_decode_together(backend):
    """All of them are within the bound of the oracle, and each has the bits that it has among 300."""
    q, k_prefix, v_prefix, k_suffix, v_suffix, lengths = batch_of(
        [random.randint(0, 20) for _ in range(300)], prefix_tokens=130, num_kv_heads=1, G=random.choice([1, 2, 3])
    )

    def run(n):
        args = q[:n], k_prefix, v_prefix, k_suffix[:n], v_suffix[:n], lengths[:n]
        return kvkern.attention.attend(*args, return_lse=True, backend=backend)

    o, lse = run(300)
    assert_attend_is_exact((q, k_prefix, v_prefix, k_suffix, v_suffix, lengths), o, lse)
    for n in range(1, 300):
        few = run(n)
        assert_same_bits(few[0], o[:n], f"o of {n} agents")
        assert_same_bits(few[1], lse[:n], f"lse of {n} agents")


@pytest.mark.parametrize("sm_scale", [1.0, 0.01])
def test_a_scale_of_ones_own(backend, make_case, sm_scale):
    case = make_case(rows=3, prefix_tokens=200, sm_scale=sm_scale)
    assert_case_is_exact(attend(backend, case), case)


def test_scores_as_large_as_a_model_makes_them_do_not_overflow(backend, make_case):
    case = make_case(rows=4, prefix_tokens=1100, suffix_tokens=30, sm_scale=40.0)
    outs = attend(backend, case)
    assert max(out.lse.abs().max() for out in outs) > 1000
    for out, reference in zip(outs, case.oracle(), strict=True):
        # The softmax is as good as hard here, and a score of 2,000 has an absolute error of 1e-4 in fp32.
        torch.testing.assert_close(out.lse.double(), reference.lse, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.o.double(), reference.o, rtol=1e-2, atol=1e-2)


TREE = {
    "book": (1100, None),
    "chapter": (129, "book"),
    "talk": (17, "chapter"),
    "other chapter": (1025, "book"),
    "letter": (40, None),
    "reply": (2049, "letter"),
}
ANYONE = [
    ("talk", 20, 1),
    (None, 1, 1),
    ("book", 33, 2),
    ("letter", 16, 16),
    ("other chapter", 65, 1),
    ("talk", 1030, 9),
    ("reply", 5, 5),
    (None, 70, 3),
    ("chapter", 17, 1),
    ("reply", 130, 30),
    ("book", 64, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workers_per_node", [1, 2])
def test_trees_several_documents_and_agents_without_one_in_one_step(backend, make_case, workers_per_node, dtype):
    case = make_case(tree=TREE, agents=ANYONE, dtype=dtype)
    assert_case_is_exact(attend(backend, case, workers_per_node=workers_per_node, padding=5), case)


@pytest.mark.parametrize("leaf", ["book", "chapter", "talk"])
def test_every_level_of_a_path_is_seen_once(backend, make_case, leaf):
    case = make_case(tree=TREE, agents=[(leaf, 18, 2)])
    assert len(case.agents[0].node.path()) == {"book": 1, "chapter": 2, "talk": 3}[leaf]
    assert_case_is_exact(attend(backend, case), case)


PREFIX_TOKENS = [1, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025, 5000, 20_000]
SUFFIX_TOKENS = [1, 15, 16, 17, 300, 1023, 1024, 1025, 2500]
LARGEST = 2_600_000
"""Elements of K over all query heads that an agent of a drawn case may see."""


def draw_case(make_case, largest=LARGEST):
    """A case of any shape: dtype, heads, a tree of up to three levels beside another document, ragged suffixes, any rows."""
    every = [(G, head_dim, heads) for G in (*range(1, 9), 16) for head_dim in (64, 80, 128) for heads in (1, 2, 3)]
    # The document first, or hardly a draw would have a long one.
    tokens = random.choice([n for n in PREFIX_TOKENS if 2 * n * math.prod(every[0]) <= largest])
    G, head_dim, num_kv_heads = random.choice([heads for heads in every if 2 * tokens * math.prod(heads) <= largest])
    most_tokens = largest // (G * head_dim * num_kv_heads)
    lengths = [n for n in PREFIX_TOKENS if n <= most_tokens // 2]
    tree = {"doc": (tokens, None), "other": (random.choice(lengths), None)}
    for name, parent in (("chapter", "doc"), ("talk", "chapter")):
        room = most_tokens // 2 - sum(tree[above][0] for above in ("doc", "chapter") if above in tree)
        if fitting := [n for n in lengths if n <= room]:
            tree[name] = (random.choice(fitting), parent)
        else:
            break
    agents = []
    for _ in range(random.randint(1, 5)):
        suffix = random.choice([n for n in SUFFIX_TOKENS if n <= most_tokens // 2])
        rows = min(suffix, random.choice([1, 1, 1, 2, 16, 17, 64, 300]))
        agents.append((random.choice([*tree, None]), suffix, rows))
    dtype = random.choice([torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16])
    case = make_case(tree=tree, agents=agents, num_kv_heads=num_kv_heads, G=G, head_dim=head_dim, dtype=dtype)
    print(f"{dtype} G={G} head_dim={head_dim} kv heads={num_kv_heads} tree={tree} agents={agents}")
    return case


@pytest.mark.full
@pytest.mark.parametrize("draw", range(60))
def test_a_case_of_any_shape_at_all(backend, make_case, draw):
    case = draw_case(make_case)
    options = {
        "workers_per_node": random.choice([1, 2, 3, 16]),
        "padding": random.choice([0, 1, 7]),
        "rows_per_step": random.choice([None, None, 23]),
    }
    print(options)
    outs = attend(backend, case, **options)
    assert_case_is_exact(outs, case)
    alone = random.randrange(len(outs))
    assert_same_rows(attend(backend, case.only(alone))[0], outs[alone], alone)


def test_control_what_is_drawn_is_every_shape(make_case, capsys):
    """Of a few hundred draws, with nothing computed: each length, each G, dtype, head_dim, level and an empty tree."""
    made = [draw_case(lambda **shape: shape) for _ in range(600)]
    capsys.readouterr()
    assert {shape["G"] for shape in made} == {*range(1, 9), 16}
    assert {shape["head_dim"] for shape in made} == {64, 80, 128} and len({shape["dtype"] for shape in made}) == 3
    assert {tokens for shape in made for tokens, _ in shape["tree"].values()} == set(PREFIX_TOKENS)
    assert {suffix for shape in made for _, suffix, _ in shape["agents"]} == set(SUFFIX_TOKENS)
    assert {leaf for shape in made for leaf, _, _ in shape["agents"]} == {"doc", "other", "chapter", "talk", None}
    assert all(0 < rows <= suffix for shape in made for _, suffix, rows in shape["agents"])


def test_extends_of_many_rows_beside_decode_rows(backend, make_case):
    agents = [("doc", 1030, 200), ("doc", 40, 1), ("doc", 64, 64), ("doc", 300, 1), (None, 129, 129)]
    case = make_case(tree={"doc": (1500, None)}, agents=agents, num_kv_heads=1)
    assert_case_is_exact(attend(backend, case, padding=1), case)


def test_rows_that_come_one_by_one_append_to_the_pages_they_left(backend, make_case):
    case = make_case(tree={"doc": (50, None)}, agents=[("doc", 40, 25), ("doc", 16, 16), (None, 5, 4)])
    assert_case_is_exact(attend(backend, case, rows_per_step=3), case)


@pytest.mark.parametrize("padding", [1, 7, 100])
def test_padding_rows_give_nothing_and_write_nothing(backend, make_case, padding):
    case = make_case(rows=3, prefix_tokens=100)
    assert_case_is_exact(attend(backend, case, padding=padding), case)


def test_control_a_padding_row_that_takes_a_slot_is_caught(backend, make_case, monkeypatch):
    case = make_case(rows=3, prefix_tokens=100)
    make = Plan.make.__func__

    def filled(cls, pool, agents, **options):
        plan = make(cls, pool, agents, **options)
        plan.tensors.row_slot[-1] = plan.tensors.row_slot[0]
        return plan

    monkeypatch.setattr(Plan, "make", classmethod(filled))
    with pytest.raises(AssertionError, match=r"pages and their guard bands: \d+ of \d+ differ"):
        attend(backend, case, padding=1)


def test_control_a_key_more_or_less_is_caught(backend, make_case, monkeypatch):
    case = make_case(rows=4, prefix_tokens=300, suffix_tokens=[5, 16, 17, 40])
    gather = plain._gather

    def without_the_own_token(chunk, first, k_pages, v_pages, page_table):
        k, v, _ = gather(chunk, first, k_pages, v_pages, page_table)
        tokens = torch.arange(first, first + plain.SUFFIX_KEYS)
        return k, v, tokens[None, :] >= chunk.lengths[:, None] - 1

    monkeypatch.setattr(plain, "_gather", without_the_own_token)
    with pytest.raises(AssertionError, match=r"o\[0\]: max error"):
        assert_case_is_exact(attend(backend, case), case)
    monkeypatch.undo()
    walk = plain._walk
    monkeypatch.setattr(plain, "_walk", lambda q, k, v, valid: walk(q, k, v, valid + 1))
    with pytest.raises(AssertionError, match=r"o\[0\]: max error"):
        assert_case_is_exact(attend(backend, case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["q", "k"])
def test_a_nan_stays_one_and_in_its_own_row(backend, make_case, where, dtype):
    case = make_case(rows=3, prefix_tokens=40, suffix_tokens=20, dtype=dtype)
    getattr(case.agents[1], where)[-1, 0] = math.nan
    for i, out in enumerate(attend(backend, case)):
        # Of the query or kv head 0: NaN is no zero and no -inf, which would hide what a model did wrong.
        heads = slice(0, 1 if where == "q" else case.geometry.G)
        assert torch.isnan(out.o[:, heads]).all() == torch.isnan(out.lse[:, heads]).all() == (i == 1)
        assert not torch.isnan(out.o[:, heads.stop :]).any() and not torch.isnan(out.lse[:, heads.stop :]).any()


def test_control_a_page_number_past_the_length_is_no_index(backend, make_case, monkeypatch):
    case = make_case(rows=2, prefix_tokens=20, suffix_tokens=[3, 40])
    where = torch.where
    monkeypatch.setattr(
        plain.torch, "where", lambda c, a, b: a if not isinstance(b, torch.Tensor) and b == 0 else where(c, a, b)
    )
    with pytest.raises(IndexError):
        attend(backend, case)


def test_control_a_wrong_result_is_caught_by_its_error():
    reference = torch.randn(100, dtype=torch.float64)
    plain_result = reference.bfloat16()
    assert_exact(reference.bfloat16(), reference, plain_result)
    far = reference.bfloat16()
    far[3] += 1
    with pytest.raises(AssertionError, match=r"o: max error"):
        assert_exact(far, reference, plain_result)
    coarse = reference.bfloat16() * (1 + 2**-8)
    with pytest.raises(AssertionError, match=r"o: (max|mean) error"):
        assert_exact(coarse, reference, plain_result)
    with pytest.raises(AssertionError, match="1 of 100 are NaN"):
        assert_exact(torch.where(torch.arange(100) == 3, math.nan, reference), reference, plain_result)
    with pytest.raises(AssertionError, match="not finite elsewhere"):
        assert_exact(torch.where(torch.arange(100) == 3, math.inf, reference), reference, plain_result)


# -- attend ------------------------------------------------------------------------------------------------------------


def batch_of(lengths, *, prefix_tokens=70, rows=None, dtype=torch.float32, num_kv_heads=2, G=2, head_dim=32):
    """Arguments of kvkern.attend; the suffixes hold NaN after their lengths."""
    heads = [num_kv_heads * G] if rows is None else [rows, num_kv_heads * G]
    q = torch.randn(len(lengths), *heads, head_dim).to(dtype)
    prefix = torch.randn(2, prefix_tokens, num_kv_heads, head_dim).to(dtype)
    suffix = torch.full((2, len(lengths), max(lengths) + 3, num_kv_heads, head_dim), math.nan, dtype=dtype)
    for b, n in enumerate(lengths):
        suffix[:, b, :n] = torch.randn(2, n, num_kv_heads, head_dim)
    return q, *prefix, *suffix, torch.tensor(lengths, dtype=torch.int32)


def assert_attend_is_exact(args, o, lse):
    q, k_prefix, v_prefix, k_suffix, v_suffix, seq_lens = args
    if q.dim() == 3:
        q, o, lse = q[:, None], o[:, None], lse[:, None]
    for b, n in enumerate(seq_lens.tolist()):
        rows = q.shape[1]
        # A row before the suffix's first token sees the prefix alone, all of it.
        early = max(0, rows - n)
        runs = [(slice(r, r + 1), 0) for r in range(early)] + [(slice(early, rows), n)] * (early < rows)
        for run, tokens in runs:
            k, v = torch.cat([k_prefix, k_suffix[b, :tokens]]), torch.cat([v_prefix, v_suffix[b, :tokens]])
            reference, near = attend_fp64(q[b, run], k, v), plain_attention(q[b, run], k, v)
            assert_exact(o[b, run], reference[0], near.o, f"o[{b}]")
            assert_exact(lse[b, run], reference[1], near.lse, f"lse[{b}]")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, 1, 5])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 70, 1030])
def test_attend_on_plain_tensors(backend, prefix_tokens, rows, dtype):
    args = batch_of([7, 0, 16, 3, 40], prefix_tokens=prefix_tokens, rows=rows, dtype=dtype)
    with torch.no_grad():
        o, lse = kvkern.attention.attend(*args, None, True, backend=backend)
    assert o.shape == args[0].shape and o.dtype == dtype and lse.dtype == torch.float32
    assert_attend_is_exact(args, o, lse)


def test_attend_gives_0_and_minus_infinity_where_nothing_is_seen(backend):
    args = batch_of([0, 2], prefix_tokens=0, rows=3)
    o, lse = kvkern.attention.attend(*args, return_lse=True, backend=backend)
    for b, blind in ((0, 3), (1, 1)):
        assert_same_bits(o[b, :blind], torch.zeros_like(o[b, :blind]), "o")
        assert (lse[b, :blind] == -math.inf).all()
    assert torch.isfinite(lse[1, 1:]).all()


@pytest.mark.parametrize("prefix_tokens", [17, 1025])
@pytest.mark.parametrize("room", [0, 5])
def test_attend_where_nobody_has_a_suffix_is_attention_over_the_prefix(backend, prefix_tokens, room):
    q, k_prefix, v_prefix, k_suffix, v_suffix, lengths = batch_of([0, 0, 0], prefix_tokens=prefix_tokens, rows=2, G=5)
    empty = (t[:, :0] if room == 0 else t for t in (k_suffix, v_suffix))  # what is past a length holds NaN
    args = q, k_prefix, v_prefix, *empty, lengths
    o, lse = kvkern.attention.attend(*args, return_lse=True, backend=backend)
    assert_attend_is_exact(args, o, lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_with_suffixes_of_any_length_none_included(backend, dtype):
    args = batch_of([0, 1, 15, 16, 17, 300, 1023, 1024, 1025, 2500], rows=2, num_kv_heads=1, dtype=dtype)
    assert_attend_is_exact(args, *kvkern.attention.attend(*args, return_lse=True, backend=backend))


def test_attend_returns_o_alone_unless_asked_and_takes_a_scale(backend):
    args = batch_of([3, 9])
    o = kvkern.attention.attend(*args, 0.5, backend=backend)
    both = kvkern.attention.attend(*args, sm_scale=0.5, return_lse=True, backend=backend)
    assert_same_bits(o, both[0], "o")
    q, k_prefix, v_prefix, k_suffix, v_suffix, _ = args
    k, v = torch.cat([k_prefix, k_suffix[0, :3]]), torch.cat([v_prefix, v_suffix[0, :3]])
    reference, _ = attend_fp64(q[:1], k, v, sm_scale=0.5)
    torch.testing.assert_close(o[0:1].double(), reference, rtol=1e-5, atol=1e-5)


def test_attend_changes_none_of_its_inputs(backend):
    args = batch_of([3, 0, 20], rows=2)
    before = [t.clone() for t in args]
    kvkern.attention.attend(*args, backend=backend)
    for name, a, b in zip(("q", "k_prefix", "v_prefix", "k_suffix", "v_suffix", "seq_lens"), args, before, strict=True):
        assert_untouched(a, b, name)


def test_attend_has_the_bits_of_the_operator(backend, make_case):
    case = make_case(rows=5, prefix_tokens=1100, suffix_tokens=[1, 16, 33, 5, 64])
    width = max(a.k.shape[0] for a in case.agents)
    suffixes = torch.zeros(2, 5, width, *case.agents[0].k.shape[1:])
    for b, agent in enumerate(case.agents):
        suffixes[0, b, : agent.k.shape[0]], suffixes[1, b, : agent.k.shape[0]] = agent.k, agent.v
    node = case.agents[0].node
    o, lse = kvkern.attention.attend(
        torch.cat([a.q for a in case.agents]),
        node.key(case.layer).transpose(0, 1),
        node.value(case.layer).transpose(0, 1),
        *suffixes,
        torch.tensor([a.k.shape[0] for a in case.agents]),
        return_lse=True,
        backend=backend,
    )
    for b, out in enumerate(attend(backend, case)):
        assert_same_bits(o[b : b + 1], out.o, f"o[{b}]")
        assert_same_bits(lse[b : b + 1], out.lse, f"lse[{b}]")


@pytest.mark.parametrize(
    ("name", "change", "kind", "field", "found"),
    [
        ("q", lambda t: t[0], ShapeError, "q", "[4, 32]"),
        ("q", lambda t: t[:0], ShapeError, "q", "[0, 4, 32]"),
        ("k_prefix", lambda t: t[..., :16], ShapeError, "k_prefix", "[70, 2, 16]"),
        ("k_prefix", lambda t: t[0], ShapeError, "k_prefix", "[2, 32]"),
        ("v_prefix", lambda t: t[:5], ShapeError, "v_prefix", "[5, 2, 32]"),
        ("k_suffix", lambda t: t[:1], ShapeError, "k_suffix", "[1, 12, 2, 32]"),
        ("k_suffix", lambda t: t[0], ShapeError, "k_suffix", "[12, 2, 32]"),
        ("v_suffix", lambda t: t[:, :, :1], ShapeError, "v_suffix", "[2, 12, 1, 32]"),
        ("seq_lens", lambda t: t[:1], ShapeError, "seq_lens", "[1]"),
        ("q", lambda t: t.double(), DtypeError, "q", "torch.float64"),
        ("k_prefix", lambda t: t.half(), DtypeError, "k_prefix", "torch.float16"),
        ("v_suffix", lambda t: t.bfloat16(), DtypeError, "v_suffix", "torch.bfloat16"),
        ("seq_lens", lambda t: t.float(), DtypeError, "seq_lens", "torch.float32"),
        ("seq_lens", lambda t: t.bool(), DtypeError, "seq_lens", "torch.bool"),
        ("v_prefix", lambda t: t.to("meta"), DeviceError, "v_prefix", "meta"),
        ("k_suffix", lambda t: t.to("meta"), DeviceError, "k_suffix", "meta"),
        ("seq_lens", lambda t: t * 0 - 1, RequestError, "seq_lens[0]", "-1"),
        ("seq_lens", lambda t: t * 0 + 13, RequestError, "seq_lens[0]", "13"),
        ("q", lambda t: t[:, :3], ShapeError, "geometry.num_qo_heads", "3"),
        ("backend", lambda t: "cuda", BackendError, "backend", "cuda"),
    ],
)
def test_attend_refuses_by_name(name, change, kind, field, found):
    names = ("q", "k_prefix", "v_prefix", "k_suffix", "v_suffix", "seq_lens")
    args = dict(zip(names, batch_of([4, 9]), strict=True), backend="torch")
    args[name] = change(args[name])
    refused(kind, field, found, kvkern.attention.attend, **args)


def refused(kind, field, found, call, *args, **options) -> KvkernError:
    """One error of this kind that reads: field, found, needed, do."""
    with pytest.raises(KvkernError) as caught:
        call(*args, **options)
    error = caught.value
    assert type(error) is kind and (error.field, error.found) == (field, found)
    assert error.needed and error.do
    assert str(error) == f"{field}: found {found}, needed {error.needed}\n  do: {error.do}"
    return error


# -- memory far apart --------------------------------------------------------------------------------------------------

FAR = 2**31
"""Elements. An offset that was multiplied in 32 bits ends elsewhere."""


def untouched_memory(*shape, dtype=torch.bfloat16):
    """Zeros of any size: only what is touched takes memory."""
    size = math.prod(shape) * dtype.itemsize
    try:
        # MAP_NORESERVE: the system need not have so much.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except OSError as error:
        pytest.skip(f"no address space of {size:,} bytes: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory that is not there")
def test_prefixes_whose_heads_and_layers_lie_more_than_2_to_the_31_elements_apart(backend, make_case, monkeypatch):
    case = make_case(
        tree={"doc": (1030, None)},
        agents=[("doc", 20, 3), ("doc", 1, 1), (None, 5, 2)],
        head_dim=128,
        dtype=torch.bfloat16,
    )
    near = case.agents[0].node.block()
    padded = FAR // 128 + 128
    far = untouched_memory(*near.shape[:3], padded, 128)
    far[:, :, :, : near.shape[3]] = near
    assert far.stride(2) > FAR
    make = Plan.make.__func__

    def moved(cls, pool, agents, **options):
        plan = make(cls, pool, agents, **options)
        plan.tensors.node_table[0, 0], plan.tensors.node_table[0, 2] = far.data_ptr(), padded
        return plan

    monkeypatch.setattr(Plan, "make", classmethod(moved))
    assert_case_is_exact(attend(backend, case), case)
    assert_case_is_exact(attend(backend, case, workers_per_node=2), case)
    far[case.layer, 1, 1, :1030] = 0  # the control: that the far memory is what was read
    with pytest.raises(AssertionError, match=r"o\[0\]: max error"):
        assert_case_is_exact(attend(backend, case), case)


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory that is not there")
@pytest.mark.parametrize("far", ["pages", "heads", "tokens"])
def test_suffix_pages_of_which_something_lies_more_than_2_to_the_31_elements_apart(backend, make_case, far):
    """As pages may: they are read by their strides. Appended to, then attended to, with history and without."""
    case = make_case(agents=[(None, 70, 3), (None, 20, 20)], num_kv_heads=3, G=2, head_dim=64, dtype=torch.bfloat16)
    geometry, layer = case.geometry, case.layer
    pool = PagePool(geometry, 7, slots=2, debug=True)
    # Four times a stride of 2^29 elements and more, whichever it is, is past 2^31.
    page, head, token = {"pages": (FAR // 4 + 64, 1024, 64), "heads": (2**14, FAR // 2 + 2**18, 64)}.get(
        far, (64, 2**10, FAR // 8 + 2**14)
    )
    plane = 2**26
    strides = (2 * plane, plane, page, head, token, 1)
    last = sum((n - 1) * stride for n, stride in zip(pool.pages.shape, strides, strict=True))
    assert last > FAR
    memory = untouched_memory(last + 1)
    pool.pages = memory.as_strided(pool.pages.shape, strides)
    table = [pool.alloc(5), pool.alloc(2)]
    for pages in table:
        pool.free(pages)
    slots = [pool.acquire_slot() for _ in case.agents]
    for slot, agent in zip(slots, case.agents, strict=True):
        write_history(pool, slot, agent, layer)
        pool.reserve(slot, agent.rows)
    plan = Plan.make(pool, [AgentRows(slot, None, a.rows) for slot, a in zip(slots, case.agents, strict=True)])
    plan.begin()
    packed = [case.agents[i] for i in plan.order]
    q, k, v = (torch.cat([getattr(a, name)[-a.rows :] for a in packed]) for name in "qkv")

    def outs():
        o, lse = shared_prefix_attention(q, k, v, plan, pool, layer=layer, return_lse=True, backend=backend)
        rows = [slice(begin, end) for begin, end in pairwise(plan.qo_indptr)]
        return [Out(o[rows[plan.order.index(i)]], lse[rows[plan.order.index(i)]]) for i in range(2)]

    assert_case_is_exact(outs(), case)
    for agent, slot in zip(case.agents, slots, strict=True):
        stored = pool.pages[layer, :, pool.table(slot)].transpose(2, 3).flatten(1, 2)[:, : agent.k.shape[0]]
        assert_same_bits(stored[0], agent.k, "k in the pages")
        assert_same_bits(stored[1], agent.v, "v in the pages")
    pool.pages[layer, 1, pool.table(slots[0]), 2] = 9  # the control: that this memory is what is read
    with pytest.raises(AssertionError, match=r"o\[0\]: max error"):
        assert_case_is_exact(outs(), case)


# -- merge_state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [0, 1, 40, 99, 100])
def test_merge_state_joins_two_runs_of_keys(cut, dtype):
    q, (k, v) = torch.randn(3, 4, 32).to(dtype), torch.randn(2, 100, 2, 32).to(dtype)

    def seen(begin, end):
        # One row at a time, so that each sees every key of the run.
        parts = [attend_fp64(row[None], k[begin:end], v[begin:end]) for row in q]
        o, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return o.to(dtype), lse.float()

    o, lse = merge_state(*seen(0, cut), *seen(cut, 100))
    assert o.dtype == dtype and lse.dtype == torch.float32
    near = [plain_attention(row[None], k, v) for row in q]
    reference = [attend_fp64(row[None], k, v) for row in q]
    assert_exact(o, torch.cat([r[0] for r in reference]), torch.cat([r.o for r in near]))
    assert_exact(lse, torch.cat([r[1] for r in reference]), torch.cat([r.lse for r in near]), "lse")
    if cut in (0, 100):
        # What has seen nothing changes nothing, to the bit.
        assert_same_bits(o, seen(0, 100)[0], "o")


def test_merge_state_of_nothing_and_nothing_is_nothing():
    o, lse = torch.zeros(2, 4, 32), torch.full((2, 4), -math.inf)
    merged = merge_state(o, lse, o, lse)
    assert_same_bits(merged[0], o, "o")
    assert_same_bits(merged[1], lse, "lse")


@pytest.mark.parametrize(
    ("name", "change", "kind", "field", "found"),
    [
        ("o_b", lambda t: t[:1], ShapeError, "o_b", "[1, 4, 32]"),
        ("lse_a", lambda t: t[..., None], ShapeError, "lse_a", "[2, 4, 1]"),
        ("lse_b", lambda t: t[:, :2], ShapeError, "lse_b", "[2, 2]"),
        ("o_b", lambda t: t.half(), DtypeError, "o_b", "torch.float16 beside o_a torch.float32"),
        ("lse_a", lambda t: t.double(), DtypeError, "lse_a", "torch.float64"),
        ("lse_b", lambda t: t.half(), DtypeError, "lse_b", "torch.float16"),
    ],
)
def test_merge_state_refuses_by_name(name, change, kind, field, found):
    args = {"o_a": torch.zeros(2, 4, 32), "lse_a": torch.zeros(2, 4)}
    args |= {"o_b": torch.zeros(2, 4, 32), "lse_b": torch.zeros(2, 4)}
    args[name] = change(args[name])
    refused(kind, field, found, merge_state, **args)


# -- what the operator refuses -----------------------------------------------------------------------------------------


class Step:
    """One step of three agents, two of them over a document of 100 tokens, ready to be spoiled in one place."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.geometry = Geometry(2, 4, 2, 32, dtype)
        self.pool, self.guard = hostile_pool(self.geometry, 10, 5)
        self.node = SharedPrefix(self.geometry, torch.arange(100))
        self.node.block()[:, :, :, :100].normal_()
        self.node.publish()
        self.slots = [self.pool.acquire_slot() for _ in range(3)]
        for slot in self.slots:
            self.pool.reserve(slot, 20)
        nodes = (self.node, self.node, None)
        self.agents = [AgentRows(s, n, r) for s, n, r in zip(self.slots, nodes, (1, 3, 2), strict=True)]
        self.plan = Plan.make(self.pool, self.agents)
        self.plan.begin()
        self.q = torch.randn(6, 4, 32).to(dtype)
        self.k, self.v = torch.randn(2, 6, 2, 32).to(dtype)

    def arguments(self) -> dict[str, object]:
        names = ("q", "k", "v", "plan")
        return {name: getattr(self, name) for name in names} | {"pages": self.pool, "layer": 1, "backend": "torch"}

    def flat(self) -> tuple[object, ...]:
        """The same as arguments of the flat operator."""
        pool = self.pool
        pages = pool.pages, pool.page_table, pool.seq_lens
        return self.q, self.k, self.v, *pages, *self.plan.tensors, 1, 32**-0.5, "torch"


def _other_last_stride(t):
    return torch.stack([t, t], dim=-1)[..., 0]


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("change", "kind", "field", "found"),
    [
        (lambda t: t[:5], ShapeError, "{}", "[5, {h}, 32]"),
        (lambda t: t[:, :1], ShapeError, "{}", "[6, 1, 32]"),
        (lambda t: t[..., :16], ShapeError, "{}", "[6, {h}, 16]"),
        (lambda t: t[0], ShapeError, "{}", "[{h}, 32]"),
        (_other_last_stride, ShapeError, "{}.stride(-1)", "2"),
        (lambda t: t.half(), DtypeError, "{}", "torch.float16"),
        (lambda t: t.double(), DtypeError, "{}", "torch.float64"),
        (lambda t: t.to("meta"), DeviceError, "{}", "meta"),
    ],
)
def test_rows_that_are_not_the_plans_are_refused(name, change, kind, field, found):
    step = Step()
    arguments = step.arguments()
    heads = arguments[name].shape[1]
    arguments[name] = change(arguments[name])
    step.guard.seal()
    refused(kind, field.format(name), found.replace("{h}", str(heads)), shared_prefix_attention, **arguments)
    step.guard.check("pages")


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(layer):
    refused(ShapeError, "layer", str(layer), shared_prefix_attention, **Step().arguments() | {"layer": layer})


def test_another_pool_than_the_plans_is_refused():
    step = Step()
    other = PagePool(step.geometry, 10, slots=5)
    error = refused(
        RequestError,
        "pages",
        "another pool than the plan's",
        shared_prefix_attention,
        **step.arguments() | {"pages": other},
    )
    assert "plan" in error.do


def test_a_plan_that_was_never_begun_is_refused():
    step = Step()
    step.pool.reserve(step.slots[0], 1)
    plan = Plan.make(step.pool, [AgentRows(step.slots[0], step.node, 1)])
    arguments = step.arguments() | {"q": step.q[:1], "k": step.k[:1], "v": step.v[:1], "plan": plan}
    error = refused(RequestError, "plan", "not begun", shared_prefix_attention, **arguments)
    assert "begin()" in error.do
    plan.begin()
    assert shared_prefix_attention(**arguments).shape == (1, 4, 32)


def test_a_step_without_pages_cannot_begin_and_counts_nothing():
    step = Step()
    plan = Plan.make(step.pool, [AgentRows(step.slots[0], None, 1), AgentRows(step.slots[1], None, 40)])
    lengths, on_host = step.pool.seq_lens.clone(), [step.pool.length(slot) for slot in step.slots]
    error = refused(CapacityError, "pages of the slot", "2 for 43 tokens", plan.begin)
    assert "reserve" in error.do
    assert torch.equal(step.pool.seq_lens, lengths)
    assert [step.pool.length(slot) for slot in step.slots] == on_host


def test_an_unknown_backend_is_refused():
    refused(BackendError, "backend", "fast", shared_prefix_attention, **Step().arguments() | {"backend": "fast"})


def test_a_released_prefix_is_refused_by_the_next_plan_and_kept_for_the_last():
    step = Step()
    before = shared_prefix_attention(**step.arguments())
    step.node.release()
    error = refused(ReadOnlyError, "prefix", repr(step.node), Plan.make, step.pool, step.agents)
    assert "released" in error.found
    # A step in flight keeps its keys: rows and pages are as they were, so its bits are too.
    assert_same_bits(shared_prefix_attention(**step.arguments()), before, "o")


def test_a_prefix_that_is_not_published_is_refused():
    step = Step()
    node = SharedPrefix(step.geometry, torch.arange(5))
    error = refused(ReadOnlyError, "prefix", repr(node), Plan.make, step.pool, [AgentRows(step.slots[0], node, 1)])
    assert "filling" in error.found


def test_by_default_the_device_decides_and_o_comes_alone():
    step = Step()
    o = shared_prefix_attention(**step.arguments() | {"backend": choose(None, "cpu").name})
    both = shared_prefix_attention(**step.arguments() | {"backend": None, "return_lse": True})
    assert_same_bits(o, both[0], "o")
    assert both[1].shape == (6, 4)


# -- the flat operator, and torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_flat_operator_passes_opcheck(dtype):
    step = Step(dtype)  # which holds the memory that the node table names
    passed = torch.library.opcheck(FLAT, step.flat())
    assert passed and set(passed.values()) == {"SUCCESS"}


def test_opcheck_passes_where_nothing_is_appended():
    step = Step()
    q, k, v, *rest = step.flat()
    FLAT(q, k, v, *rest)  # so that the pages hold numbers: NaN is not equal to NaN
    torch.library.opcheck(FLAT, (q, k[:0], v[:0], *rest))


def test_the_flat_operator_says_what_it_writes():
    written = {a.name for a in FLAT._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"pages"}


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_under_autograd_it_has_the_same_bits_and_refuses_a_gradient(name):
    step = Step()
    given = step.arguments()
    with torch.no_grad():
        needed = shared_prefix_attention(**given)
    o = shared_prefix_attention(**given | {name: given[name].clone().requires_grad_()})
    assert_same_bits(o.detach(), needed, "o")
    with pytest.raises(RequestError, match=r"backward: .*no backward"):
        o.sum().backward()
    with torch.no_grad():
        assert not shared_prefix_attention(**given).requires_grad


PLANS = [  # other numbers of agents, nodes, paths, states, items, tiles and rows
    [("a", 1), ("a", 2)],
    [("b", 1), (None, 1), ("a", 1), ("b", 30)],
    [("d", 2), ("c", 1), ("c", 1), ("b", 1), ("a", 5), (None, 9)],
    [("d", 3)],
    [(None, 2)],
]


class Compiled:
    """A function around the operator, as eager and compiled, and steps of many plans for both."""

    def __init__(self, **options) -> None:
        torch._dynamo.reset()
        self.geometry = Geometry(2, 4, 2, 32, torch.float32)
        self.pool = PagePool(self.geometry, 64, slots=8)
        a, b = self.node(100), self.node(2049)
        c = self.node(5000, a)
        self.nodes = {None: None, "a": a, "b": b, "c": c, "d": self.node(20, c)}
        self.compiled = torch.compile(self.function, fullgraph=True, **options)

    def node(self, tokens, parent=None):
        node = SharedPrefix(self.geometry, torch.arange(tokens), parent=parent)
        node.block()[:, :, :, :tokens].normal_()
        return node.publish()

    def function(self, q, k, v, plan):
        o, lse = shared_prefix_attention(q * 2, k, v + 1, plan, self.pool, layer=1, return_lse=True)
        return o.sin(), lse

    def same_bits(self, agents, **options):
        """One step, eager and compiled, of the same rows: results and pages."""
        slots = [self.pool.acquire_slot() for _ in agents]
        for slot, (_, rows) in zip(slots, agents, strict=True):
            self.pool.reserve(slot, rows)
        plan = Plan.make(
            self.pool, [AgentRows(s, self.nodes[n], r) for s, (n, r) in zip(slots, agents, strict=True)], **options
        )
        plan.begin()
        q, (k, v) = torch.randn(plan.rows, 4, 32), torch.randn(2, plan.rows, 2, 32)
        used = [page for slot in slots for page in self.pool.table(slot)]
        results = []
        for function in (self.function, self.compiled):
            self.pool.pages[:, :, used] = 7
            results.append((*function(q, k, v, plan), self.pool.pages[:, :, used]))
        for name, a, b in zip(("o", "lse", "pages"), *results, strict=True):
            assert_same_bits(a, b, name)
        for slot in slots:
            self.pool.release_slot(slot)


@pytest.mark.parametrize(("mode", "warm"), [({"dynamic": True}, 1), ({}, 2)])
def test_compiled_it_has_the_eager_bits_and_a_new_plan_does_not_recompile(mode, warm):
    step = Compiled(backend="aot_eager", **mode)
    # Without dynamic=True torch compiles the first number of rows as it is, and all others with the second.
    for agents in PLANS[:warm]:
        step.same_bits(agents)
    with torch.compiler.set_stance("fail_on_recompile"):
        for agents in PLANS:
            for options in ({}, {"workers_per_node": 3}, {"bucket": 64}):
                step.same_bits(agents, **options)


def test_control_a_number_of_the_plan_in_the_function_would_recompile():
    step = Compiled(backend="eager", dynamic=True)
    inner = step.function
    step.compiled = torch.compile(
        lambda q, k, v, plan: inner(q, k, v, plan) if len(plan.order) else None,
        fullgraph=True,
        backend="eager",
        dynamic=True,
    )
    step.same_bits(PLANS[0])
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompil"):
        step.same_bits(PLANS[1])


def test_compiled_by_inductor_it_has_the_eager_bits():
    step = Compiled(dynamic=True)
    step.function = lambda q, k, v, plan: shared_prefix_attention(q, k, v, plan, step.pool, layer=1, return_lse=True)
    step.compiled = torch.compile(step.function, fullgraph=True, dynamic=True)
    step.same_bits(PLANS[1])
    with torch.compiler.set_stance("fail_on_recompile"):
        step.same_bits(PLANS[2], bucket=32)
