"""An engine that keeps the logits its tokens were chosen from, mistakes to run it with, and what transformers says from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvkern import backends, plain
from kvkern.backends import Backend
from kvkern.checks.assertions import assert_same_bits
from kvkern.checks.subject import Subject
from kvkern.engine import Engine, Request
from kvkern.geometry import PAGE
from kvkern.publish import Document

NEW_TOKENS = 4
"""Of an answer."""

GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
"""The largest logit alone: what a model's own settings make of logits is not what is compared."""


class Served(NamedTuple):
    """What an engine made of one question: the logits of each new token [new, vocabulary], and the tokens.

    invariant  whether the engine kept to a measured rounding class
    """

    logits: Tensor
    tokens: tuple[int, ...]
    invariant: bool


class _Recorder(Engine):
    """Keeps the logits that each token was chosen from."""

    rows: dict[int, list[Tensor]]

    def _choose(self, requests: list[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            self.rows.setdefault(request.index, []).append(row.clone())
        super()._choose(requests, logits)


def serve(
    subject: Subject, document: Document, questions: Mapping[int, Sequence[int]], *, invariant: bool = True
) -> dict[int, Served]:
    """Ask all questions (token ids of suffixes) together, greedily, each to the last of its NEW_TOKENS."""
    pages = sum(-(-(len(ids) + NEW_TOKENS) // PAGE) for ids in questions.values()) + len(questions) // 8 + 1
    engine = _Recorder(
        subject.model,
        subject.tokenizer,
        max_agents=len(questions),
        memory_bytes=pages * PAGE * subject.geometry.token_bytes(),
        invariant=invariant,
        backend=subject.backend.name,
        debug=True,
    )
    engine.rows = {}
    options: dict[str, Any] = {**GREEDY, "max_new_tokens": NEW_TOKENS, "eos_token_id": []}
    requests = {i: engine.submit(document, ids, index=i, **options) for i, ids in questions.items()}
    while engine.scheduler.unfinished:
        engine.step()
    served = {}
    for i, request in requests.items():
        assert request.answer is not None and request.answer.error is None
        served[i] = Served(torch.stack(engine.rows[i]), request.answer.token_ids, engine.rounding is not None)
    assert engine.pool.free_pages == engine.pool.num_pages, "pages: some were not given back"
    return served


def assert_same_served(a: Mapping[int, Served], b: Mapping[int, Served]) -> None:
    """Of all questions that are in both: the same logits to the bit, from engines that promise it, and the same tokens."""
    shared = sorted(a.keys() & b.keys())
    assert shared, "no question is in both"
    for i in shared:
        assert a[i].invariant and b[i].invariant, (
            f"logits[{i}]: no rounding class was kept to, so equal bits prove nothing"
        )
        assert_same_bits(a[i].logits, b[i].logits, f"logits[{i}]")
        assert_same_tokens(a[i].tokens, b[i].tokens, f"tokens[{i}]")


def assert_same_tokens(found: Sequence[int], needed: Sequence[int], name: str) -> None:
    differ = [i for i, (a, b) in enumerate(zip(found, needed, strict=False)) if a != b]
    assert not differ, (
        f"{name}: {len(differ)} of {len(needed)} differ, first at {differ[0]}: {found[differ[0]]} != {needed[differ[0]]}"
    )
    assert len(found) == len(needed), f"{name}: {len(found)} tokens, needed {len(needed)}"


# -- mistakes that every check of bits must catch ----------------------------------------------------------------------


@contextmanager
def mistake(subject: Subject, make: Callable[[Backend], Backend]) -> Iterator[None]:
    """The subject's backend with a mistake in it, wherever an operator asks for a backend."""
    choose, wrong = backends.choose, make(subject.backend)
    backends.choose = lambda name, device: wrong
    try:
        yield
    finally:
        backends.choose = choose


def fold_from_the_right(backend: Backend) -> Backend:
    """The last two segments of three are folded first; each segment lies in its own slot."""

    def prefix(q: Tensor, *tables: Tensor, **options: Any) -> plain.State:
        state = backend.prefix_attention(q, *tables, **options)
        assert state.m.shape[0] >= 3, "the plan leaves fewer than three states: the mistake enters nothing"
        first, second = (plain.State(*(part[i] for part in state)) for i in (1, 2))
        folded, nothing = plain.fold(first, second), (float("-inf"), 0.0, 0.0)
        for part, whole, none in zip(state, folded, nothing, strict=True):
            part[1], part[2] = whole, none
        return state

    return backend._replace(prefix_attention=prefix)


def own_token_unseen_in_a_batch(backend: Backend) -> Backend:
    """Among others a row does not see its own token."""

    def suffix(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, slot: Tensor, back: Tensor, *rest, **kw):  # type: ignore[no-untyped-def]
        agents = int(slot[slot >= 0].unique().numel())
        return backend.suffix_attention(q, k, v, table, lens, slot, back + int(agents > 1), *rest, **kw)

    return backend._replace(suffix_attention=suffix)


# -- from scratch ------------------------------------------------------------------------------------------------------


@contextmanager
def _own_attention(model: Any, name: str) -> Iterator[None]:
    """The model under one of transformers' own attentions."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def from_scratch(subject: Subject, prompt: Sequence[int]) -> list[int]:
    """NEW_TOKENS greedy tokens after the prompt, fewer where the answer ends, by transformers' own generate and attention."""
    ids = torch.tensor([list(prompt)], device=subject.device)
    with _own_attention(subject.model, "sdpa"):
        out = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            **GREEDY,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.no_grad()
def decided(subject: Subject, prompt: Sequence[int], tokens: Sequence[int]) -> int:
    """How many of transformers' own tokens after the prompt its dtype decides: all in fp32, else those before a tie.

    A tie: the two largest logits are closer than twice what two of transformers' own attentions differ by.
    """
    if subject.dtype == torch.float32:
        return len(tokens)
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=subject.device)
    logits = []
    for name in ("sdpa", "eager"):
        with _own_attention(subject.model, name):
            logits.append(subject.model(ids, logits_to_keep=len(tokens), use_cache=False).logits[0].float())
    noise = (logits[0] - logits[1]).abs().max()
    largest = logits[0].topk(2).values
    ties = (largest[:, 0] - largest[:, 1] <= 2 * noise).nonzero()
    return int(ties[0]) if ties.numel() else len(tokens)
