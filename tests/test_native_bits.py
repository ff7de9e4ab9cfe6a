"""The cpu backend's bits: a row knows neither how many rows it stands among, nor where, nor how many threads there are.

On every instruction set, below the operator, where the kernels cut rows into lanes and nodes into segments.
"""

from __future__ import annotations

import random

import pytest
import test_exact
import torch
from helpers import assert_same_bits
from test_native import INSTRUCTION_SETS, Step, assert_same_states
from torch import Tensor

from kvkern import native
from kvkern.geometry import num_segments, segment_tokens
from kvkern.plain import State

DTYPES = [torch.float32, torch.bfloat16]
NOTHING = [0, 0, 0, 0, 0, 0]


class Node:
    """A node of its own, not a SharedPrefix, and rows that are all in one work item."""

    def __init__(self, tokens: int, *, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.heads, self.head_dim, self.segments = num_kv_heads, head_dim, num_segments(tokens)
        self.block = torch.randn(1, 2, num_kv_heads, -(-tokens // 128) * 128, head_dim).to(dtype)
        self.block[:, :, :, tokens:] = torch.nan
        row = [self.block.data_ptr(), tokens, self.block.shape[3], segment_tokens(tokens)]
        self.table = torch.tensor([row, row])

    def states(self, q: Tensor, instruction_set: str, *, segments: tuple[int, int] | None = None) -> State:
        """Of all rows, folded over the node, or over these segments with a slot for each."""
        begin, end = segments or (0, self.segments)
        slots = 1 if begin == 0 else end - begin
        state = native.prefix_attention(
            q,
            self.table,
            torch.tensor([[0, 0, q.shape[0], begin, end, 0], NOTHING], dtype=torch.int32),
            torch.ones(2, slots, dtype=torch.int32),
            num_kv_heads=self.heads,
            layer=0,
            sm_scale=0.2,
            instruction_set=instruction_set,
        )
        return State(*(part.view(slots, self.heads, q.shape[0], -1, *part.shape[3:]) for part in state))


def row_of(state: State, row: int) -> State:
    return State(*(part[:, :, row] for part in state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_a_row_has_the_same_bits_among_1_to_130_others_in_any_order(instruction_set, dtype):
    node = Node(1161, num_kv_heads=1, head_dim=32, dtype=dtype)
    q = torch.randn(130, 3, 32).to(dtype)
    alone = [node.states(q[i : i + 1], instruction_set) for i in range(130)]
    for rows in range(2, 131):
        some = random.sample(range(130), rows)
        together = node.states(q[some], instruction_set)
        for place in {0, rows // 2, rows - 1, random.randrange(rows)}:
            assert_same_states(row_of(together, place), row_of(alone[some[place]], 0), f"row {place} of {rows}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("rows", [1, 30])
def test_one_two_and_four_threads_walk_a_long_node_with_the_same_bits(rows, instruction_set, dtype):
    """With few rows its segments are walked apart, one kv head being no work for four threads."""
    node = Node(12_100, num_kv_heads=1, head_dim=128, dtype=dtype)
    q = torch.randn(rows, 4, 128).to(dtype)
    with test_exact.threads(1):
        one = node.states(q, instruction_set)
    for threads in (2, 4):
        with test_exact.threads(threads):
            assert_same_states(node.states(q, instruction_set), one, f"{threads} threads")


def test_control_segments_folded_in_another_order_are_seen():
    node = Node(12_100, num_kv_heads=1, head_dim=128, dtype=torch.float32)
    q = torch.randn(1, 4, 128)
    first = node.states(q, "", segments=(0, 1))
    later = node.states(q, "", segments=(1, node.segments))
    parts = [first, *(State(*(part[i : i + 1] for part in later)) for i in range(node.segments - 1))]
    whole = node.states(q, "")
    right = wrong = parts[0]
    for part in parts[1:]:
        right = native.merge(right, part)
    for part in reversed(parts[1:]):
        wrong = native.merge(wrong, part)
    assert_same_states(right, whole, "left to right")
    with pytest.raises(AssertionError, match=r"right to left\.\w+: \d+ of \d+ differ"):
        assert_same_states(wrong, whole, "right to left")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("back", range(5))
def test_a_row_sees_nothing_of_a_later_token_whichever_key_of_a_pair_it_is(back, instruction_set, dtype):
    """Products of bf16 take two keys at once; of the last pair a row may see only the first."""
    step = Step.make(agents=3, rows=6, prefix_tokens=130, suffix_tokens=70, G=3, dtype=dtype)
    before = step.run(instruction_set)
    position = 69 - back
    page = step.pool.page_table[:, position // 16].long()
    step.pool.pages[0, 1, page, :, position % 16] = torch.nan
    after = step.run(instruction_set)
    for agent in range(3):
        rows = slice(agent * 6, agent * 6 + 6 - back - 1)
        assert_same_bits(after[0][rows], before[0][rows], f"o of agent {agent}")
        assert after[0][agent * 6 + 5 - back : agent * 6 + 6].isnan().all(), "who sees the token sees NaN"
