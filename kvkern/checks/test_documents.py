"""publish, save, load, ask: a document on disk gives the bits and tokens of the published one, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvkern.checks.assertions import assert_same_bits
from kvkern.checks.serving import Served, assert_same_served, assert_same_tokens, decided, from_scratch, serve
from kvkern.checks.subject import Subject
from kvkern.errors import IdentityError
from kvkern.publish import Document, load

ASKED = 3

Scratch = dict[int, tuple[list[int], list[int]]]
"""Of each question, what transformers reads from scratch, and the tokens that it answers."""


@pytest.fixture(scope="module")
def file(document: Document, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("kvkern") / "document.kv"
    document.save(path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def loaded(subject: Subject, file: Path) -> Iterator[Document]:
    with load(file, subject.model, subject.tokenizer) as document:
        yield document


@pytest.fixture(scope="module")
def questions(subject: Subject, document: Document) -> dict[int, list[int]]:
    return dict(enumerate(document.encode_ids(subject.questions[:ASKED])))


@pytest.fixture(scope="module")
def answers(subject: Subject, loaded: Document, questions: dict[int, list[int]]) -> dict[int, Served]:
    """Of the document from the file."""
    return serve(subject, loaded, questions)


@pytest.fixture(scope="module")
def scratch(subject: Subject, document: Document) -> Scratch:
    prompts = [subject.conversation(document, question) for question in subject.questions[:ASKED]]
    return {i: (prompt, from_scratch(subject, prompt)) for i, prompt in enumerate(prompts)}


def test_blocks(document: Document, loaded: Document) -> None:
    """documents: published, saved and loaded, every bit of K and V"""
    assert_same_bits(loaded.block(), document.block(), "kv")
    assert loaded.identity == document.identity and torch.equal(loaded.token_ids, document.token_ids)
    loaded.check()


def test_loaded_and_published(
    subject: Subject, document: Document, questions: dict[int, list[int]], answers: dict[int, Served]
) -> None:
    """documents: the same logits and tokens after loading as after publishing"""
    assert_same_served(serve(subject, document, questions), answers)


def assert_from_scratch(subject: Subject, answers: dict[int, Served], scratch: Scratch) -> tuple[int, int]:
    """(tokens compared, tokens of transformers); those behind a tie in the model's dtype are not compared."""
    compared = total = 0
    for i, (prompt, reference) in scratch.items():
        n = decided(subject, prompt, reference)
        # Where transformers ends an answer the engine, which was told no end, goes on.
        assert_same_tokens(answers[i].tokens[:n], reference[:n], f"tokens[{i}]")
        compared, total = compared + n, total + len(reference)
    return compared, total


def test_from_scratch(
    subject: Subject, answers: dict[int, Served], scratch: Scratch, record_property: Callable[[str, object], None]
) -> None:
    """documents: after loading, the tokens of transformers' own generate from scratch"""
    compared, total = assert_from_scratch(subject, answers, scratch)
    assert total
    ties = f"; the others follow a tie in {subject.dtype}" if compared < total else ""
    if not compared:
        pytest.skip(f"0 of {total} tokens can be compared{ties}")
    record_property("detail", f"{compared} of {total} tokens compared, of {len(scratch)} questions{ties}")


def test_control_values_zeroed(
    subject: Subject, loaded: Document, questions: dict[int, list[int]], answers: dict[int, Served]
) -> None:
    """control: with the values of the document zeroed the tokens are others"""
    blank = Document(loaded.geometry, loaded.token_ids, device=loaded.device)
    for name in Document.__annotations__:
        setattr(blank, name, getattr(loaded, name))
    blank.block()[:, 0] = loaded.block()[:, 0]
    with blank.publish(identity=loaded.identity):
        wrong = serve(subject, blank, questions)
    with pytest.raises(AssertionError, match=r"tokens\[\d\]: \d+ of \d+ differ"):
        for i in questions:
            assert_same_tokens(wrong[i].tokens, answers[i].tokens, f"tokens[{i}]")


def test_another_model_is_refused(subject: Subject, file: Path) -> None:
    """documents: a model whose weights differ by one bit is refused by name"""
    weight = next(p for p in reversed(list(subject.model.parameters())) if p.dtype == subject.dtype)
    one = weight.detach().view(-1)[:1]
    before = one.clone()
    integer = {2: torch.int16, 4: torch.int32}[one.itemsize]
    one.view(integer).bitwise_xor_(1)
    try:
        with pytest.raises(IdentityError) as refused:
            load(file, subject.model, subject.tokenizer)
    finally:
        one.copy_(before)
    assert refused.value.field == "weights"
    with load(file, subject.model, subject.tokenizer):
        pass  # and with its own weights it is taken
