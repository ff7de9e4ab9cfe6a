"""Answers of `kvkern ask` as they end: to stdout, or to a file of JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvkern import console
from kvkern.errors import StoreError

if TYPE_CHECKING:
    from kvkern.engine import Answer, Engine


class AnswerWriter:
    """Writes each answer as it ends, and counts; `report` says what there is to say of all of them.

    A line is one write, so that Ctrl-C leaves none in part.
    """

    def __init__(self, questions: Sequence[str], output: Path | None, *, ordered: bool, as_json: bool) -> None:
        self.questions, self.output, self.ordered, self.as_json = questions, output, ordered, as_json
        self.answers = self.refused = self.new_tokens = 0
        self.interrupted = False
        self.seconds = 0.0
        self._file: TextIO | None = None

    def __enter__(self) -> AnswerWriter:
        if self.output is not None:
            try:
                self._file = self.output.open("w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise _cannot_write(self.output, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write_all(self, answers: Iterator[Answer]) -> None:
        """Until the last one has ended, or Ctrl-C; then those that have ended are still written."""
        started = time.perf_counter()
        held: dict[int, Answer] = {}
        following = 0
        try:
            with console.bar("ask", "answers") as progress:
                for answer in answers:
                    held[answer.index] = answer
                    while held and (not self.ordered or following in held):
                        self._write(held.pop(following if self.ordered else answer.index))
                        following += 1
                    self.seconds = time.perf_counter() - started
                    speed = f"{self.new_tokens / self.seconds:,.1f} tokens/s"
                    progress(self.answers + self.refused, len(self.questions), speed)
        except KeyboardInterrupt:
            self.interrupted = True
            for index in sorted(held):
                self._write(held[index])
        self.seconds = time.perf_counter() - started

    def _write(self, answer: Answer) -> None:
        if answer.error is None:
            self.answers += 1
            self.new_tokens += len(answer.token_ids)
        else:
            self.refused += 1
            console.note(f"question {answer.index} is refused: {console.error_text(answer.error)}")
        if self._file is not None:
            assert self.output is not None
            try:
                self._file.write(json.dumps(self._fields(answer)) + "\n")
            except OSError as error:
                raise _cannot_write(self.output, error) from None
        elif self.as_json:
            console.say(json.dumps(self._fields(answer)))
        elif answer.error is None:
            console.say(self._lines(answer))

    def _fields(self, answer: Answer) -> dict[str, Any]:
        error = None if answer.error is None else console.error_fields(answer.error)
        return {"index": answer.index, "question": self.questions[answer.index], **vars(answer), "error": error}

    def _lines(self, answer: Answer) -> str:
        text = answer.text.strip().replace("\n", "\n    ")
        ended = f"{len(answer.token_ids):,} new tokens ({answer.finish_reason})"
        reused = f"{answer.prompt_tokens:,} question tokens after {answer.cached_tokens:,} cached"
        return f"[{answer.index}] {self.questions[answer.index].strip()}\n    {text}\n    {ended}  {reused}\n"

    def report(self, engine: Engine) -> None:
        """How many, how long: on stdout if the answers went to a file, else on stderr."""
        from kvkern.cost import render_bytes

        speed = self.new_tokens / self.seconds if self.seconds else 0.0
        known = engine.describe()
        result = {
            "file": None if self.output is None else str(self.output),
            "questions": len(self.questions),
            "answers": self.answers,
            "refused": self.refused,
            "interrupted": self.interrupted,
            "new_tokens": self.new_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(speed, 3),
            "backend": known["backend"],
            "max_agents": known["max_agents"],
            "suffix_tokens": known["suffix_tokens"],
            "memory_bytes": known["memory_bytes"],
        }
        counts = f"{self.answers:,} of {len(self.questions):,} answered" + (
            f", {self.refused:,} refused" if self.refused else ""
        )
        room = f"at most {known['max_agents']:,} agents and {known['suffix_tokens']:,} suffix tokens at once"
        lines = [
            (self.output.name if self.output is not None else "answers", counts + ", interrupted" * self.interrupted),
            ("speed", f"{self.new_tokens:,} new tokens in {self.seconds:.1f} s, {speed:,.1f} tokens/s"),
            ("engine", f"backend {known['backend']}, {room} ({render_bytes(known['memory_bytes'])})"),
        ]
        if self.output is not None:
            console.result(result, lines, as_json=self.as_json)
        else:
            console.note(console.table(lines))


def _cannot_write(path: Path, error: OSError) -> StoreError:
    found = f"{path}: {error.strerror}"
    return StoreError("output", found=found, needed="a file to write", do="free some space, or name another file")
