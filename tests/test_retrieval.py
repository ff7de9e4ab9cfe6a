"""A model that says what its document says (retrieval.py), asked through the engine, through generate, and from scratch.

Tokens of a random model may agree by luck of their margins or differ by lack of them; here an answer is right or wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import scratch_answer, tiny_tokenizer, twin
from retrieval import Quiz, accuracy, quiz, retrieval_model

import kvkern
from kvkern.attach import _without_values

AGENTS = 64
DTYPES = [torch.float32, torch.bfloat16]


class Asked:
    """A quiz, the model that can answer it, and its published document."""

    def __init__(self, tokens: int, dtype: torch.dtype, *, agents: int = AGENTS) -> None:
        self.quiz: Quiz = quiz(tokens, agents)
        self.model = retrieval_model(self.quiz.vocab_size, dtype=dtype)
        self.document = kvkern.publish(self.model, None, torch.tensor(self.quiz.document))

    def engine(self, document: Any = None, questions: Sequence[Sequence[int]] | None = None, **options: Any) -> Any:
        """Answers of all agents together, through the engine."""
        engine = kvkern.Engine(self.model, tiny_tokenizer(), memory_bytes=1 << 26, **options)
        answers = engine.ask(
            document or self.document,
            self.quiz.questions if questions is None else questions,
            ordered=True,
            max_new_tokens=len(self.quiz.answers[0]),
            do_sample=False,
            eos_token_id=[],
        )
        return [answer.token_ids for answer in answers]

    def generate(self, document: Any, agents: int) -> list[list[int]]:
        """Answers of the first agents, padded on the left as one batch, through kvkern.generate."""
        questions = self.quiz.questions[:agents]
        width = max(map(len, questions))
        ids = torch.tensor([[0] * (width - len(q)) + q for q in questions])
        mask = torch.tensor([[0] * (width - len(q)) + [1] * len(q) for q in questions])
        new = len(self.quiz.answers[0])
        out = kvkern.generate(
            self.model, document, input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False
        )
        return out[:, width:].tolist()


@pytest.fixture
def asked(request: pytest.FixtureRequest, seed: int) -> Iterator[Asked]:
    case = Asked(*request.param)
    yield case
    assert case.document.references == 1
    case.document.release()


def documents(*, full: Sequence[torch.dtype] = ()) -> Any:
    """Every length and dtype as the fixture's parameters; 4,096 tokens of these dtypes only in the full suite."""
    every = [(tokens, dtype) for tokens in (1024, 4096) for dtype in DTYPES]
    return pytest.mark.parametrize(
        "asked",
        [pytest.param((n, d), marks=[pytest.mark.full] if n == 4096 and d in full else []) for n, d in every],
        ids=lambda case: f"{case[0]}-{str(case[1]).removeprefix('torch.')}",
        indirect=True,
    )


# -- what the document says --------------------------------------------------------------------------------------------


@documents()
def test_64_agents_of_an_engine_say_what_the_document_says(asked):
    assert len(set(map(tuple, asked.quiz.answers))) == AGENTS, "the agents were asked for one answer"
    assert accuracy(asked.engine(backend="cpu"), asked.quiz.answers) == 1.0


@documents(full=DTYPES)
def test_64_agents_say_so_on_the_torch_backend_few_at_a_time(asked):
    found = asked.engine(backend="torch", max_agents=24, max_extend_tokens=64)
    assert accuracy(found, asked.quiz.answers) == 1.0


@documents(full=DTYPES)
def test_generate_says_what_the_document_says(asked):
    assert accuracy(asked.generate(asked.document, 5), asked.quiz.answers[:5]) == 1.0


@documents(full=DTYPES)
def test_transformers_from_scratch_says_what_the_document_says(asked):
    """The model is what it is said to be, without any of our code."""
    stock = twin(asked.model, "sdpa")
    for question, answer in list(zip(asked.quiz.questions, asked.quiz.answers, strict=True))[:3]:
        assert scratch_answer(stock, asked.quiz.document + question, len(answer)) == answer


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_in_three_nodes_says_what_it_says_as_one(dtype):
    """Keys on both sides of every border between nodes: what comes after a node's last token lies in the next node."""
    case = Asked(1024, dtype, agents=1)
    cuts = [0, 500, 517, 1024]
    nodes, whole = [], case.quiz.document
    for begin, end in pairwise(cuts):
        parent = nodes[-1] if nodes else None
        nodes.append(kvkern.publish(case.model, None, torch.tensor(whole[begin:end]), parent=parent))
    places = [cut + offset for cut in cuts[1:-1] for offset in (-5, -2, -1, 0, 1)] + [1, 1019]
    found = case.engine(nodes[-1], [[whole[place]] for place in places])
    assert accuracy(found, [whole[place + 1 : place + 5] for place in places]) == 1.0
    for node in reversed(nodes):
        node.release()
    case.document.release()


def suffix_firsts(case: Asked) -> tuple[list[list[int]], list[list[int]]]:
    """Questions that end with the document's last token, and the suffix's own first tokens, which come after it."""
    last, others = case.quiz.document[-1], sorted(set(range(1, case.quiz.vocab_size)) - set(case.quiz.document))
    words = [random.sample(others, 4 + n) for n in range(16)]
    return [[*some, last] for some in words], [some[:4] for some in words]


@documents(full=DTYPES)
def test_what_comes_after_the_documents_last_token_is_the_suffixs_first(asked):
    """Layer 0 looks one position back, from the suffix into the document: this needs every position to be right."""
    questions, answers = suffix_firsts(asked)
    assert accuracy(asked.engine(questions=questions), answers) == 1.0


# -- the controls ------------------------------------------------------------------------------------------------------


@documents(full=DTYPES)
def test_control_without_the_documents_values_nobody_knows_an_answer(asked):
    with _without_values(asked.document) as blank:
        assert accuracy(asked.engine(blank), asked.quiz.answers) <= 0.05
        assert accuracy(asked.generate(blank, 5), asked.quiz.answers[:5]) <= 0.05


@pytest.mark.parametrize("asked", [(1024, torch.float32)], indirect=True)
def test_control_another_document_gives_none_of_the_answers(asked):
    mixed = random.sample(asked.quiz.document, len(asked.quiz.document))
    with kvkern.publish(asked.model, None, torch.tensor(mixed)) as other:
        assert accuracy(asked.engine(other), asked.quiz.answers) <= 0.05


@pytest.mark.parametrize("asked", [(1024, torch.float32)], indirect=True)
def test_control_a_question_one_position_off_misses_the_border(asked, monkeypatch):
    questions, answers = suffix_firsts(asked)
    monkeypatch.setattr(kvkern.Document, "end", property(lambda self: self.position + self.tokens - 1))
    assert accuracy(asked.engine(questions=questions), answers) <= 0.5


def test_control_accuracy_counts_what_is_missing_as_wrong():
    assert accuracy([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == 1.0
    assert accuracy([[1], [4, 3]], [[1, 2], [3, 4]]) == 0.25
