"""A row's bits depend neither on the rows beside it nor on where it is computed: in the kernels, then through the engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import kvkern.plan
from kvkern.checks.cases import Case, assert_case_is_exact, assert_same_rows, attend, decode_case, make_case
from kvkern.checks.serving import (
    Served,
    assert_same_served,
    fold_from_the_right,
    mistake,
    own_token_unseen_in_a_batch,
    serve,
)
from kvkern.checks.subject import Subject
from kvkern.geometry import Geometry
from kvkern.publish import Document

ROWS, PREFIX_TOKENS = 64, 2049
"""Of the kernels' case: two whole segments and one token."""

DECISIVE = 2048
"""lse of the controls: a fold in another order moves the last bit of 1 in 40 of them, and of hardly any o in half precision."""

CAUGHT = r"(o|lse)\[\d+\]: \d+ of \d+ differ, first at"
LOGITS_CAUGHT = r"logits\[\d+\]: \d+ of \d+ differ, first at"


@pytest.fixture
def case(seed: int, geometry: Geometry, device: torch.device) -> Case:
    return decode_case(geometry, device, ROWS, PREFIX_TOKENS)


@pytest.fixture
def decisive(seed: int, geometry: Geometry, device: torch.device) -> Case:
    """So many rows that no draw hides a control's mistake: 96 lse in bf16 hid one in 14 draws of 200."""
    return decode_case(geometry, device, max(ROWS, -(-DECISIVE // geometry.num_qo_heads)), PREFIX_TOKENS)


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_a_row_alone_and_among_others(case: Case, backend: str) -> None:
    """bits: a row alone and among 63 others"""
    among = attend(backend, case)
    for row in (0, random.randrange(1, ROWS - 1), ROWS - 1):
        assert_same_rows(attend(backend, case.only(row))[0], among[row], row)


def test_rows_one_at_a_time_and_together(geometry: Geometry, device: torch.device, backend: str) -> None:
    """bits: a question's rows one at a time, all at once, and among others"""
    tree: dict[str, tuple[int, str | None]] = {"doc": (1100, None), "chapter": (40, "doc"), "letter": (200, None)}
    case = make_case(geometry, device, tree=tree, agents=[("chapter", 30, 20), ("letter", 9, 3), ("doc", 50, 1)])
    among = attend(backend, case, padding=8)[0]
    assert_same_rows(attend(backend, case.only(0))[0], among, 0)
    agent = case.agents[0]
    before = agent.k.shape[0] - agent.rows
    for row in range(agent.rows):
        seen = before + row + 1
        one = type(agent)(agent.node, agent.q[row : row + 1], agent.k[:seen], agent.v[:seen])
        out = attend(backend, replace(case, agents=(one,)))[0]
        assert_same_rows(out, type(out)(*(part[row : row + 1] for part in among)), row)


def test_order_and_placement(case: Case, backend: str) -> None:
    """bits: agents in any order, pages anywhere, segments on 1, 2 or 3 workers"""
    given = attend(backend, case)
    for workers in (1, 2, 3):
        order = random.sample(range(ROWS), ROWS)
        for i, out in zip(order, attend(backend, case.only(*order), workers_per_node=workers), strict=True):
            assert_same_rows(given[i], out, i)


def test_control_fold(subject: Subject, decisive: Case, backend: str) -> None:
    """control: a fold in another order is caught"""
    right = attend(backend, decisive)
    with mistake(subject, fold_from_the_right):
        wrong = attend(backend, decisive, workers_per_node=3)
    assert_case_is_exact(wrong[:4], decisive.only(*range(4)))  # as a result it is right; only its bits are others
    with pytest.raises(AssertionError, match=CAUGHT):
        for i in range(len(wrong)):
            assert_same_rows(right[i], wrong[i], i)


@contextmanager
def segments(case: Case, tokens: int) -> Iterator[None]:
    """Prefixes cut every `tokens` tokens, whatever their length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvkern.plan, "num_segments", lambda n: -(-n // tokens))
        for node in case.nodes():
            patch.setattr(node, "segment_tokens", tokens)
        yield


def test_control_segments(decisive: Case, backend: str) -> None:
    """control: segments whose length follows the batch are caught"""
    among, some = attend(backend, decisive), range(0, len(decisive.agents), 2)
    half = decisive.only(*some)
    with segments(half, 512):
        wrong = attend(backend, half)
    assert_case_is_exact(wrong[:4], half.only(*range(4)))
    with pytest.raises(AssertionError, match=CAUGHT):
        for i, out in zip(some, wrong, strict=True):
            assert_same_rows(out, among[i], i)
    with segments(half, 1024):  # and what makes the mistake makes no other
        for i, out in zip(some, attend(backend, half), strict=True):
            assert_same_rows(out, among[i], i)


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(subject: Subject, document: Document) -> dict[int, list[int]]:
    return dict(enumerate(document.encode_ids(subject.questions)))


@pytest.fixture(scope="module")
def among(subject: Subject, document: Document, questions: dict[int, list[int]]) -> dict[int, Served]:
    """All questions together."""
    return serve(subject, document, questions)


def test_an_agent_alone_and_among_others(
    subject: Subject, document: Document, questions: dict[int, list[int]], among: dict[int, Served]
) -> None:
    """bits: an agent alone and among 16 others, every logit of its answer"""
    assert len(questions) == 17
    for i in (0, 16):
        assert_same_served(serve(subject, document, {i: questions[i]}), among)


def test_agents_in_another_order(
    subject: Subject, document: Document, questions: dict[int, list[int]], among: dict[int, Served]
) -> None:
    """bits: a few of the agents, in another order"""
    some = random.sample(sorted(questions), 5)
    assert_same_served(serve(subject, document, {i: questions[i] for i in some}), among)


def test_control_mask_in_a_batch(
    subject: Subject, document: Document, questions: dict[int, list[int]], among: dict[int, Served]
) -> None:
    """control: an engine whose rows miss a token among others is caught"""
    with mistake(subject, own_token_unseen_in_a_batch):
        wrong = serve(subject, document, {i: questions[i] for i in (0, 1)})
    with pytest.raises(AssertionError, match=LOGITS_CAUGHT):
        assert_same_served(wrong, among)


def test_control_no_rounding_class(
    subject: Subject, document: Document, questions: dict[int, list[int]], among: dict[int, Served]
) -> None:
    """control: an engine without a rounding class (invariant=False) is no evidence"""
    accident = serve(subject, document, {0: questions[0]}, invariant=False)
    with pytest.raises(AssertionError, match="no rounding class was kept to"):
        assert_same_served(accident, among)
