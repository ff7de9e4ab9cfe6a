"""What is said for eyes: results in aligned lines on stdout, notes, errors and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvkern.errors import KvkernError, StoreError

Lines = Sequence[tuple[str, str]]
"""(name, text) of a table; a line that goes on under the one above it has the name ""."""

Update = Callable[..., None]
"""Called with (done, total, note=""); total None while it is not known."""


def say(text: str) -> None:
    """Whole lines on stdout, at once. Raises StoreError where these cannot be written, BrokenPipeError where nobody reads."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StoreError("stdout", found=error.strerror, needed="a place to write to", do="free some space") from None


def note(text: str) -> None:
    """Whole lines on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(lines: Lines, width: int = 0) -> str:
    """Names in a column of at least `width` letters, texts beside them."""
    width = max([width, *(len(name) for name, _ in lines)])
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines)


def result(fields: Mapping[str, Any], lines: Lines, *, as_json: bool) -> None:
    """A result on stdout: one JSON object, or the same in aligned lines."""
    say(json.dumps(fields) if as_json else table(lines))


def error_text(error: KvkernError) -> str:
    return f"{type(error).__name__}: {error}"


def error_fields(error: KvkernError) -> dict[str, str]:
    kind = type(error).__name__
    return {"type": kind, "field": error.field, "found": error.found, "needed": error.needed, "do": error.do}


# -- progress ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bars(*, in_logs: bool = False) -> Iterator[Callable[[str], Update]]:
    """Progress on stderr, a bar for each name as it comes; those before it have then ended.

    in_logs  where stderr is no terminal there is nothing to overwrite: write the bars once, when all have ended, not never
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not (console.is_terminal or in_logs):
        yield lambda what: lambda done, total, note="": None
        return
    progress = Progress(
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn("{task.percentage:>3.0f} %", markup=False),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if console.is_terminal else []),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=console.is_terminal,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    tasks: dict[str, Any] = {}

    def end() -> None:
        for task in progress.tasks:
            if task.total is None:
                progress.update(task.id, completed=1, total=1)
            progress.stop_task(task.id)

    def bar(what: str) -> Update:
        if what not in tasks:
            end()
            tasks[what] = progress.add_task(what, total=None, note="")

        def update(done: float, total: float | None = None, note: str = "") -> None:
            progress.update(tasks[what], completed=done, total=total, note=note)

        return update

    with progress:
        yield bar
        end()


@contextlib.contextmanager
def bar(what: str, unit: str = "", *, in_logs: bool = False) -> Iterator[Update]:
    """One bar. unit: what it counts, "tokens" or "answers"; "bytes" are written as KiB, MiB, GiB."""
    from kvkern.cost import render_bytes

    with bars(in_logs=in_logs) as each:
        update = each(what)

        def counted(done: int, total: int, note: str = "") -> None:
            count = (
                f"{render_bytes(done)} of {render_bytes(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"
            )
            update(done, total, "  ".join(filter(None, (count, note))))

        yield counted if unit else update
