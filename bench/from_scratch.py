"""Greedy decoding from scratch by transformers' own attention, and answers beside it, token by token.

What a forward has said stands in a file while a script is not done (`Begun`), and judges every answer to the same text (`Scratch`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from harness import Bench, machine

from kvkern.publish import Document

SAVED_S = 20.0
"""Seconds between two writes of what is begun, and between two lines of progress."""


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation("kvkern")


class Begun:
    """Answers and verdicts so far, in a file beside the results until all is done: what a run left, the next need not repeat.

    answers  by part: token ids of the answer to each of its first questions
    said     by model, tokens so far and question: the tokens that greedy decoding from scratch gives, as far as it is known, and
             at each the gap between its logit and the next
    """

    def __init__(self, bench: Bench) -> None:
        self.path = None if bench.path is None else bench.path.with_suffix(".begun")
        self.facts = {fact: machine(bench.device).get(fact) for fact in ("device", "gpu", "cpu", "threads", "versions")}
        self.answers: dict[str, list[list[int]]] = {}
        self.said: dict[str, list[list[Any]]] = {}
        self.saved = time.monotonic()
        if self.path is not None and self.path.exists():
            held = json.loads(self.path.read_text())
            if held["facts"] == self.facts:
                self.answers, self.said = held["answers"], held["said"]

    def save(self) -> None:
        self.saved = time.monotonic()
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".begun.partial")
        partial.write_text(json.dumps({"facts": self.facts, "answers": self.answers, "said": self.said}))
        os.replace(partial, self.path)

    def tick(self, text: Callable[[], str]) -> None:
        """Every so many seconds: write the file, and a line for who waits."""
        if time.monotonic() - self.saved > SAVED_S:
            self.save()
            print(f"exact    {text()}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def first_other(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Where the two part, or the shorter ends."""
    pairs = enumerate(zip(found, wanted, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(found), len(wanted)))


class Scratch:
    """Greedy decoding from scratch by transformers' own attention, as far as answers have asked what it says.

    A token of it depends on those before alone. So what one way's answer has brought to light judges another way's too, up
    to where the two part; only beyond what is known is there another forward.
    """

    def __init__(self, model: Any, name: str, begun: Begun) -> None:
        self.model, self.name, self.begun = model, name, begun

    def key(self, ids: Sequence[int], suffix: Sequence[int]) -> str:
        return hashlib.sha256(json.dumps([self.name, list(ids), list(suffix)]).encode()).hexdigest()

    def knows(self, key: str, answer: Sequence[int]) -> bool:
        """Whether an answer can be judged without a forward."""
        tokens, _ = self.begun.said.get(key, ([], []))
        return first_other(answer, tokens) < len(tokens) or len(tokens) >= len(answer)

    @torch.no_grad()
    def says(self, ids: Sequence[int], suffix: Sequence[int], answer: Sequence[int]) -> tuple[list[int], list[float]]:
        """Its tokens and gaps, at least as far as the answer's first that is another."""
        key = self.key(ids, suffix)
        if not self.knows(key, answer):
            with attention(self.model, "sdpa"):
                whole = torch.tensor([[*ids, *suffix, *answer[:-1]]], device=self.model.device)
                logits = self.model(whole, logits_to_keep=len(answer), use_cache=False).logits[0].float()
            top = logits.topk(2)
            tokens, gaps = top.indices[:, 0].tolist(), (top.values[:, 0] - top.values[:, 1]).tolist()
            known = first_other(answer, tokens) + 1
            self.begun.said[key] = [tokens[:known], gaps[:known]]
        tokens, gaps = self.begun.said[key]
        return tokens, gaps


def never() -> bool:
    return False


def compared(
    scratch: Scratch,
    document: Document,
    suffixes: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    late: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Every token of every answer beside the one from scratch, up to an answer's first that is another.

    late  asked before a forward, after the first answer: whether to judge no more
    """
    ids = document.path_token_ids().tolist()
    questions, answer_tokens, tokens, equal, flips = 0, 0, 0, 0, []
    for n, (suffix, answer) in enumerate(zip(suffixes, found, strict=True)):
        if n and late() and not scratch.knows(scratch.key(ids, suffix), answer):
            break
        wanted, gaps = scratch.says(ids, suffix, answer)
        first = first_other(answer, wanted)
        questions, answer_tokens = n + 1, answer_tokens + len(answer)
        tokens, equal = tokens + min(first + 1, len(answer)), equal + first
        if first < len(answer):
            flip = {"question": n, "token": first, "got": answer[first], "wanted": wanted[first]}
            flips.append({**flip, "gap": gaps[first]})
        scratch.begun.tick(lambda n=n: f"{n + 1} of {len(found)} answers judged, {len(flips)} flips")  # type: ignore[misc]
    others = sum(flip["token"] == 0 for flip in flips)
    return {
        "questions": questions,
        "answer_tokens": answer_tokens,
        "tokens": tokens,
        "equal": equal,
        "first_tokens_other": others,
        "flips": flips,
    }
