"""The Triton backend through the operator, in the interpreter: the sizes that test_triton does not come to.

Pages, inputs and outputs are those of helpers.attend, hostile on every side; what a kernel may get wrong by its own make
is in test_triton.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import test_attention
import torch
from helpers import assert_case_is_exact, assert_same_rows, attend
from triton_interpreter import INTERPRETING, interpreted, repair

TRITON = "triton"


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETING:
        repair(monkeypatch)


@pytest.fixture
def backend() -> str:
    return TRITON


def larger(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("prefix_tokens", "dtype"),
    [
        (0, "float32"),
        (15, "bfloat16"),
        (1024, "bfloat16"),
        (1024, "float16"),
        larger(17, "float32"),
        larger(1023, "bfloat16"),
        larger(1023, "float32"),
        larger(1025, "float32"),
        larger(5000, "float32"),
        larger(5000, "bfloat16"),
        larger(20_000, "bfloat16"),
    ],
)
@interpreted
def test_prefixes_of_these_lengths(make_case, prefix_tokens: int, dtype: str) -> None:
    case = make_case(
        tree={"doc": (prefix_tokens, None)} if prefix_tokens else {},
        agents=[("doc" if prefix_tokens else None, n, rows) for n, rows in ((1, 1), (16, 3), (33, 17))],
        num_kv_heads=1,
        dtype=getattr(torch, dtype),
    )
    assert_case_is_exact(attend(TRITON, case), case)


@pytest.mark.parametrize(
    ("suffix_tokens", "rows"),
    [(63, 1), (65, 65), (300, 3), larger(64, 2), larger(300, 300), larger(1023, 1), larger(1025, 2), larger(2500, 17)],
)
@interpreted
def test_suffixes_of_these_lengths(make_case, suffix_tokens: int, rows: int) -> None:
    case = make_case(
        tree={"doc": (15, None)},
        agents=[("doc", suffix_tokens, rows), (None, suffix_tokens, 1)],
        num_kv_heads=1,
        dtype=random.choice([torch.float32, torch.bfloat16]),
    )
    assert_case_is_exact(attend(TRITON, case), case)


@pytest.mark.parametrize("head_dim", [64, larger(80), larger(128)])
@pytest.mark.parametrize("G", [5, 16, larger(6), larger(7)])
@interpreted
def test_groups_of_these_sizes(make_case, G: int, head_dim: int) -> None:
    case = make_case(
        tree={"doc": (129, None)},
        agents=[("doc", 20, 1), ("doc", 40, 9), (None, 17, 2)],
        num_kv_heads=random.choice([1, 2]),
        G=G,
        head_dim=head_dim,
        dtype=random.choice([torch.float32, torch.bfloat16]),
    )
    assert_case_is_exact(attend(TRITON, case), case)


@pytest.mark.parametrize("rows", [17, 65, 129, *(larger(n) for n in (15, 16, 31, 32, 33, 63, 64, 127, 128, 300))])
@interpreted
def test_agents_may_bring_this_many_rows(make_case, rows: int) -> None:
    test_attention.check_rows(TRITON, make_case, rows, random.choice([1, 3]), random.choice(test_attention.DTYPES))


@pytest.mark.parametrize("prefix_tokens", [17])
@pytest.mark.parametrize("room", [0, 5])
@interpreted
def test_attend_where_nobody_has_a_suffix(prefix_tokens: int, room: int) -> None:
    test_attention.test_attend_where_nobody_has_a_suffix_is_attention_over_the_prefix(TRITON, prefix_tokens, room)


@pytest.mark.full
@pytest.mark.parametrize("draw", range(10))
@interpreted
def test_a_case_of_any_shape(make_case, draw: int) -> None:
    case = test_attention.draw_case(make_case, largest=250_000)
    outs = attend(TRITON, case, workers_per_node=random.choice([1, 2, 3]), padding=random.choice([0, 1, 7]))
    assert_case_is_exact(outs, case)
    alone = random.randrange(len(outs))
    assert_same_rows(attend(TRITON, case.only(alone))[0], outs[alone], alone)


@interpreted
def test_control_a_prefix_a_token_longer_than_it_is_is_caught(make_case, monkeypatch) -> None:
    case = make_case(tree={"doc": (127, None)}, agents=[("doc", 20, 3)], num_kv_heads=1)
    assert_case_is_exact(attend(TRITON, case), case)
    make = test_attention.Plan.make.__func__

    def longer(cls, pool, agents, **options):
        plan = make(cls, pool, agents, **options)
        plan.tensors.node_table[0, 1] += 1
        return plan

    monkeypatch.setattr(test_attention.Plan, "make", classmethod(longer))
    with pytest.raises(AssertionError, match=r"o\[0\]: max error"):
        assert_case_is_exact(attend(TRITON, case), case)


# -- memory far apart --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", ["prefix", larger("pages"), larger("heads"), larger("tokens")])
@interpreted
def test_memory_more_than_2_to_the_31_elements_apart(make_case, monkeypatch, apart: str) -> None:
    if apart == "prefix":
        test = test_attention.test_prefixes_whose_heads_and_layers_lie_more_than_2_to_the_31_elements_apart
        test(TRITON, make_case, monkeypatch)
    else:
        test_attention.test_suffix_pages_of_which_something_lies_more_than_2_to_the_31_elements_apart(
            TRITON, make_case, apart
        )
