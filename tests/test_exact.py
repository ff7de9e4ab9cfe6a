"""What is promised exact, one section a tier, strongest first. Each test stands with a control: a mistake that it must catch.

b  an agent alone and the same agent among others, joined early or late, in steps of any size: the same bits
d  any order of agents, pages and slots, any placement of segments: the same bits
"""

from __future__ import annotations

import functools
import math
import random
from contextlib import contextmanager

import pytest
import torch
from helpers import Out, assert_case_is_exact, assert_same_bits, assert_same_rows, attend

import kvkern.plan
from kvkern import plain

DTYPES = [torch.float32, torch.bfloat16]
DIFFER = r"o\[{}\]: \d+ of \d+ differ, first at"


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- tier b, kernels: alone and among others ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_among_64(backend, make_case, dtype, num_threads):
    case = make_case(rows=64, prefix_tokens=2049, G=3, dtype=dtype)  # two whole segments and one token
    with threads(num_threads):
        among = attend(backend, case)
        for row in (0, 17, 63):
            assert_same_rows(attend(backend, case.only(row))[0], among[row], row)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("G", [1, 4, 7])
def test_alone_and_among_others_whatever_the_heads(backend, make_case, G, head_dim):
    case = make_case(rows=37, prefix_tokens=1025, G=G, num_kv_heads=1, head_dim=head_dim)
    among = attend(backend, case)
    for row in (0, 36, random.randrange(1, 36)):
        assert_same_rows(attend(backend, case.only(row))[0], among[row], row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_and_among_others_where_suffixes_cross_a_segment(backend, make_case, dtype):
    lengths = [1023, 1024, 1025, 2049, 5, 64]
    case = make_case(rows=len(lengths), prefix_tokens=129, suffix_tokens=lengths, num_kv_heads=1, dtype=dtype)
    among = attend(backend, case)
    for i in range(len(lengths)):
        assert_same_rows(attend(backend, case.only(i))[0], among[i], i)


def test_it_is_the_same_bits_beside_nobody_somebody_or_everybody(backend, make_case):
    """Agents that join and leave: every subset gives an agent the bits that it has alone."""
    case = make_case(rows=9, prefix_tokens=1100)
    alone = [attend(backend, case.only(i))[0] for i in range(9)]
    for _ in range(4):
        some = random.sample(range(9), random.randint(2, 9))
        for i, out in zip(some, attend(backend, case.only(*some)), strict=True):
            assert_same_rows(alone[i], out, i)


def test_rows_keep_their_bits_where_torch_cuts_a_chunk_between_three_threads(backend, make_case):
    """16 kv heads of 8 query heads make 131,072 scores of a chunk, which torch would cut at element 43,691, in row 5."""
    case = make_case(rows=16, suffix_tokens=400, num_kv_heads=16, G=8, head_dim=16, layers=1)
    with threads(3):
        among = attend(backend, case)
        for row in (0, 5, 10):
            assert_same_rows(attend(backend, case.only(row))[0], among[row], row)


def sizes_of_exp2(monkeypatch):
    """Elements of every exp2 and log2 from here on, as they come."""
    sizes = set()

    def spied(function):
        def call(tensor, *args, **kwargs):
            sizes.add(tensor.numel())
            return function(tensor, *args, **kwargs)

        return call

    for owner, name in ((torch, "exp2"), (torch, "log2"), (torch.Tensor, "exp2_")):
        monkeypatch.setattr(owner, name, spied(getattr(owner, name)))
    return sizes


@pytest.mark.parametrize(("num_kv_heads", "G"), [(1, 1), (3, 1), (1, 7), (3, 3), (16, 8)])
def test_no_row_falls_into_the_rest_of_a_vector(make_case, num_kv_heads, G, monkeypatch):
    """Two vectors of 16 are one turn of torch's loop, and what is left over takes another routine. A buffer is cut between
    threads in pieces of at least 32,768 elements: up to twice that, in the middle or not at all."""
    agents = [("doc", 40, 5), ("doc", 1030, 1), (None, 3, 1)]
    case = make_case(tree={"doc": (1500, None)}, agents=agents, num_kv_heads=num_kv_heads, G=G, head_dim=16)
    sizes = sizes_of_exp2(monkeypatch)
    attend("torch", case, workers_per_node=2)
    assert len(sizes) > 2, "no exp2 was seen"
    odd = sorted(n for n in sizes if n % 32 or n > 65_536)
    assert not odd, f"exp2 of {odd} elements: where a row lies decides which routine it takes"


@pytest.mark.parametrize(
    ("constant", "mistake", "num_kv_heads", "G"), [("EXP2_PIECE", 2**40, 16, 8), ("SUFFIX_ROWS", 5, 1, 1)]
)
def test_control_a_call_that_torch_may_cut_anywhere_is_caught(
    make_case, constant, mistake, num_kv_heads, G, monkeypatch
):
    monkeypatch.setattr(plain, constant, mistake)
    with pytest.raises(AssertionError, match=r"exp2 of \[\d+"):
        test_no_row_falls_into_the_rest_of_a_vector(make_case, num_kv_heads, G, monkeypatch)


@pytest.mark.parametrize("padding", [1, 15, 64])
def test_padding_rows_change_no_bit(backend, make_case, padding):
    case = make_case(rows=5, prefix_tokens=1100, G=3)
    bare, padded = attend(backend, case), attend(backend, case, padding=padding)
    for i in range(5):
        assert_same_rows(bare[i], padded[i], i)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_per_step", [1, 7])
def test_rows_have_the_same_bits_one_at_a_time_and_all_at_once(backend, make_case, rows_per_step, dtype):
    """Decode rows and extend rows: which step brought a row leaves no trace. The first agent crosses its suffix's segment."""
    agents = [("doc", 1035, 20), ("doc", 17, 17), (None, 40, 12), ("doc", 9, 1)]
    case = make_case(tree={"doc": (1025, None)}, agents=agents, num_kv_heads=1, dtype=dtype)
    at_once, apart = attend(backend, case), attend(backend, case, rows_per_step=rows_per_step)
    for i in range(len(agents)):
        assert_same_rows(apart[i], at_once[i], i)


TREE = {
    "book": (1100, None),
    "chapter": (1025, "book"),
    "talk": (17, "chapter"),
    "annex": (129, "book"),
    "letter": (40, None),
}
LEAVES = ["talk", "annex", None, "letter", "chapter", "talk", "book", "chapter"]


def test_siblings_and_other_documents_change_no_bit(backend, make_case):
    case = make_case(tree=TREE, agents=[(leaf, random.randint(3, 70), random.randint(1, 3)) for leaf in LEAVES])
    among = attend(backend, case)
    for i in range(len(LEAVES)):
        assert_same_rows(attend(backend, case.only(i))[0], among[i], i)
    for some in ([0, 1], [5, 6, 2], [7, 3, 4, 0]):
        for i, out in zip(some, attend(backend, case.only(*some)), strict=True):
            assert_same_rows(among[i], out, i)


# -- tier b, kernels: the controls -------------------------------------------------------------------------------------


@contextmanager
def segments(case, tokens, monkeypatch):
    """The mistake: prefixes cut every `tokens` tokens, whatever their length."""
    nodes = {node for agent in case.agents if agent.node for node in agent.node.path()}
    with monkeypatch.context() as patch:
        patch.setattr(kvkern.plan, "num_segments", lambda n: -(-n // tokens))
        for node in nodes:
            patch.setattr(node, "segment_tokens", tokens)
        yield


@pytest.mark.parametrize("row", [0, 17, 63])
def test_control_segments_that_follow_the_batch_are_caught(backend, make_case, row, monkeypatch):
    case = make_case(rows=64, prefix_tokens=2049, num_kv_heads=1)
    with segments(case, 512, monkeypatch):
        alone = attend(backend, case.only(row))[0]
    assert_case_is_exact([alone], case.only(row))  # as a result it is right; only its bits are others
    with pytest.raises(AssertionError, match=DIFFER.format(row)):
        assert_same_rows(alone, attend(backend, case)[row], row)
    with segments(case, 1024, monkeypatch):  # and the tool that makes the mistake makes no other
        assert_same_rows(attend(backend, case.only(row))[0], attend(backend, case)[row], row)


def test_control_a_suffix_segment_of_another_length_is_caught(backend, make_case, monkeypatch):
    case = make_case(rows=2, prefix_tokens=20, suffix_tokens=[1500, 40])
    right = attend(backend, case)
    monkeypatch.setattr(plain, "SUFFIX_SEGMENT", 512)
    wrong = attend(backend, case.only(0))[0]
    assert_case_is_exact([wrong], case.only(0))
    with pytest.raises(AssertionError, match=DIFFER.format(0)):
        assert_same_rows(wrong, right[0], 0)


def test_control_a_row_tile_that_follows_the_rows_is_caught(backend, make_case, monkeypatch):
    case = make_case(rows=64, prefix_tokens=2049, num_kv_heads=1, G=1, head_dim=128)
    among = attend(backend, case)
    monkeypatch.setattr(plain, "ROW_TILE", 1)  # as many as the rows of a lone agent: a GEMM becomes a GEMV
    alone = attend(backend, case.only(17))[0]
    assert_case_is_exact([alone], case.only(17))
    with pytest.raises(AssertionError, match=DIFFER.format(17)):
        assert_same_rows(alone, among[17], 17)


def test_control_a_mask_off_by_one_is_caught(backend, make_case, monkeypatch):
    case = make_case(tree={"doc": (100, None)}, agents=[("doc", 30, 6)])
    apart = attend(backend, case, rows_per_step=1)[0]
    gather = plain._gather

    def one_more(chunk, first, k_pages, v_pages, page_table):
        mine = (chunk.lengths > 0).long()
        chunk.lengths += mine
        try:
            return gather(chunk, first, k_pages, v_pages, page_table)
        finally:
            chunk.lengths -= mine

    monkeypatch.setattr(plain, "_gather", one_more)
    at_once = attend(backend, case)[0]
    # All rows but the last see the next row's token; the last sees a place that nobody has written, which is NaN.
    with pytest.raises(AssertionError, match=DIFFER.format(0)):
        assert_same_rows(Out(*(part[:-1] for part in apart)), Out(*(part[:-1] for part in at_once)), 0)
    with pytest.raises(AssertionError, match=r"o\[0\]: \d+ of \d+ are NaN"):
        assert_same_rows(apart, at_once, 0)


def test_control_nan_and_a_sign_of_zero_do_not_pass_as_the_same_bits():
    nan = torch.tensor([1.0, math.nan])
    with pytest.raises(AssertionError, match="o: 1 of 2 are NaN"):
        assert_same_bits(nan, nan.clone(), "o")
    with pytest.raises(AssertionError, match=r"o: 1 of 2 differ, first at \(1,\): 0.0 != -0.0"):
        assert_same_bits(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]), "o")
    with pytest.raises(AssertionError, match="float32"):
        assert_same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64), "o")


# -- tier b, engine ----------------------------------------------------------------------------------------------------


# -- tier d, kernels: order and placement ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_agents_changes_no_bit(backend, make_case, dtype):
    case = make_case(tree=TREE, agents=[(leaf, random.randint(3, 40), 2) for leaf in LEAVES], G=3, dtype=dtype)
    given = attend(backend, case)
    order = random.sample(range(len(LEAVES)), len(LEAVES))
    for i, out in zip(order, attend(backend, case.only(*order)), strict=True):
        assert_same_rows(given[i], out, i)


def test_which_pages_and_slots_an_agent_has_changes_no_bit(backend, make_case):
    case = make_case(rows=4, prefix_tokens=50, suffix_tokens=[100, 33, 1, 64])
    first = attend(backend, case)
    for _ in range(4):  # every run draws pages, slots and the layout of the pages anew
        for i, out in enumerate(attend(backend, case)):
            assert_same_rows(first[i], out, i)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix_tokens", [5000, 20_000])
def test_segments_on_one_worker_or_many_have_the_same_bits(backend, make_case, prefix_tokens, dtype):
    case = make_case(rows=3, prefix_tokens=prefix_tokens, num_kv_heads=1, layers=1, dtype=dtype)
    one = attend(backend, case, workers_per_node=1)
    for workers in (2, 3, 8, 16):
        for i, out in enumerate(attend(backend, case, workers_per_node=workers)):
            assert_same_rows(one[i], out, i)


@pytest.mark.parametrize("workers", [2, 3])
def test_every_node_of_a_path_may_be_split(backend, make_case, workers):
    tree = {"a": (3000, None), "b": (2049, "a"), "c": (1025, "b"), "d": (5000, "a")}
    case = make_case(tree=tree, agents=[("c", 20, 2), ("d", 5, 1), ("a", 9, 1), (None, 3, 1)], num_kv_heads=1, G=3)
    one, many = attend(backend, case), attend(backend, case, workers_per_node=workers)
    for i in range(4):
        assert_same_rows(one[i], many[i], i)


def premerge(order, monkeypatch):
    """A consumer that joins the states of a node before it takes them, from the left as the rule is, or from the right."""
    path_state = plain._path_state

    def joined(states, path_table, paths, first, last, chunk):
        assert path_table.max(0).values.tolist()[:2] == [1, 2], "no node was split: the control enters nothing"
        used = int((path_table[0] > 0).sum())
        shape = states.m.shape[1:]
        # In the width of a row tile, as every fold: exp2 of a few elements takes another routine than that of many.
        wide = [states.m.new_zeros(used, plain.ROW_TILE, *part.shape[4:]) for part in states]
        for part, source in zip(wide, states, strict=True):
            part[:, : shape.numel()] = source[:used].flatten(1, 3)
        slots = [plain.State(*(part[slot] for part in wide)) for slot in range(used)]
        if order == "left":
            total = functools.reduce(plain.fold, slots)
        else:
            total = functools.reduce(lambda right, left: plain.fold(left, right), slots[::-1])
        merged = plain.State(*(part.clone() for part in states))
        for part, value in zip(merged, total, strict=True):
            part[0] = value[: shape.numel()].unflatten(0, shape)
        alone = path_table.clone()
        alone[:, 1:] = 0
        return path_state(merged, alone, paths, first, last, chunk)

    monkeypatch.setattr(plain, "_path_state", joined)


def test_control_a_split_that_is_merged_in_another_order_is_caught(backend, make_case, monkeypatch):
    case = make_case(rows=3, prefix_tokens=5000, num_kv_heads=1)
    one = attend(backend, case)
    with monkeypatch.context() as patch:
        premerge("right", patch)
        wrong = attend(backend, case, workers_per_node=5)
    assert_case_is_exact(wrong, case)
    with pytest.raises(AssertionError, match=DIFFER.format(0)):
        assert_same_rows(one[0], wrong[0], 0)
    with monkeypatch.context() as patch:  # the same consumer in the right order makes no difference
        premerge("left", patch)
        for i, out in enumerate(attend(backend, case, workers_per_node=5)):
            assert_same_rows(one[i], out, i)


def test_control_a_later_worker_that_folds_as_it_walks_is_caught(backend, make_case, monkeypatch):
    case = make_case(rows=3, prefix_tokens=5000, num_kv_heads=1)
    one = attend(backend, case)
    cut = kvkern.plan._cut

    def folding(*arguments):
        nodes, items, flags = cut(*arguments)
        (_, begin, end, _, first_end, state), (_, _, _, second, last, _) = items
        # The second run as a node of its own, walked from segment 0: its states are one before they reach the first's.
        (node,) = nodes
        tail = Tail(node, second * node.segment_tokens)
        return (
            [node, tail],
            [(0, begin, end, 0, first_end, state), (1, begin, end, 0, last - second, state + 1)],
            {key: [1, 2] for key in flags},
        )

    class Tail:
        """The tokens of a node from `first` on, at the address where they lie; of one layer and one head."""

        def __init__(self, node, first):
            self.tokens, self.segment_tokens = node.tokens - first, node.segment_tokens
            self.padded_tokens = node.padded_tokens - first
            block = node.block()
            kept = block[:, :, :, first:].contiguous()
            self.block = lambda: kept

    monkeypatch.setattr(kvkern.plan, "_cut", folding)
    wrong = attend(backend, case, workers_per_node=2)
    assert_case_is_exact(wrong, case)
    with pytest.raises(AssertionError, match=DIFFER.format(0)):
        assert_same_rows(one[0], wrong[0], 0)


# -- tier d, engine ----------------------------------------------------------------------------------------------------
