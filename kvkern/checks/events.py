"""A pytest plugin for `kvkern check`: what happens, as lines of JSON on a file descriptor.

    {"checks": [{"name": ..., "claim": ...}, ...]}      all that will run, in order
    {"error": [type, field, {...}]}                     a KvkernError where the model was opened; nothing runs then
    {"subject": {...}, "seed": 1}                       what is checked, see `Subject.describe`
    {"start": name}                                     and, when it has ended:
    {"end": name, "held": true, "seconds": 0.3, "message": ""}

held is null where a check was skipped; the message then says why, and where one held, what was found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import KvkernError

OPTION = "--kvkern-events"
PACKAGE = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: Any) -> None:
    parser.addoption(OPTION, type=int, default=None, help="File descriptor to write events to.")


def pytest_configure(config: pytest.Config) -> None:
    fd = config.getoption(OPTION)
    if fd is not None:
        config.pluginmanager.register(Events(config, fd))


class Events:
    def __init__(self, config: pytest.Config, fd: int) -> None:
        self.config, self.fd = config, fd
        self.seconds = 0.0
        self.held: bool | None = True
        self.messages: list[str] = []

    def tell(self, **line: Any) -> None:
        os.write(self.fd, (json.dumps(line) + "\n").encode())

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tell(checks=[{"name": name_of(item), "claim": claim_of(item)} for item in session.items])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        if session.testsfailed:
            return  # files that cannot be imported; pytest says so and runs nothing
        from kvkern.checks.conftest import the_seed, the_subject

        try:
            subject = the_subject(self.config)
        except KvkernError as error:
            fields = {"found": error.found, "needed": error.needed, "do": error.do}
            self.tell(error=[type(error).__name__, error.field, fields])
            pytest.exit("the model cannot be opened", returncode=1)
        self.tell(subject=subject.describe(), seed=the_seed(self.config))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.seconds, self.held, self.messages = 0.0, True, []
        self.tell(start=name_of(item))
        result = yield
        self.messages += [str(value) for key, value in item.user_properties if key == "detail"]
        self.tell(end=name_of(item), held=self.held, seconds=round(self.seconds, 3), message="\n".join(self.messages))
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        self.seconds += call.duration
        if call.excinfo is not None:
            self.held = None if report.skipped and self.held else False
            self.messages.append(message_of(call.excinfo))
        return report


def name_of(item: pytest.Item) -> str:
    return f"{item.path.name}::{item.name}"


def claim_of(item: Any) -> str:
    """The first line of the check's docstring, with its parameters filled in."""
    words = (item.function.__doc__ or item.name).strip().splitlines()[0]
    return words.format(**item.callspec.params) if hasattr(item, "callspec") else words


def message_of(excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """An assertion's own words, a refusal whole, and of any other exception where in kvkern it came from."""
    # `pytest.raises` and the like raise in pytest's own files, where nobody looks for a check.
    ours = [entry for entry in excinfo.traceback if Path(str(entry.path)).is_relative_to(PACKAGE)]
    error, place = excinfo.value, (ours or list(excinfo.traceback))[-1]
    where = f"{Path(str(place.path)).name}:{place.lineno + 1}"
    words = str(error).strip()
    if isinstance(error, pytest.skip.Exception):
        return words
    if isinstance(error, KvkernError):
        return f"{type(error).__name__}: {words}"
    if isinstance(error, AssertionError) and words:
        return words.splitlines()[0]
    return f"{type(error).__name__} at {where}: {words.splitlines()[0] if words else 'no words'}"
