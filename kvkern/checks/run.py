"""`kvkern check`: runs the checks in a process of its own, and says what held.

The process runs `pytest --pyargs kvkern.checks` in an empty folder that goes with it, so no settings, plugins or files of the
user's folder get in, and none are left there. It tells what happens over a pipe (see `events`), so that what held before an
interrupt, or before a kernel that takes the process with it, is still known.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvkern import console, errors, opening
from kvkern.errors import KvkernError

# The package of this very file, whatever else is installed; -P keeps the user's folder from shadowing modules.
PYTEST = (
    *(sys.executable, "-P", "-c"),
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import pytest; sys.exit(pytest.main(sys.argv[1:]))",
    str(Path(__file__).resolve().parents[2]),
)
PLUGINS = ("kvkern.checks.options", "kvkern.checks.events")
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
NOT_OURS = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONOPTIMIZE")
"""Variables that would bring the user's settings of pytest in, or take the assertions out."""

PATIENCE_S = 5.0  # for a process that was told to end


@dataclass
class Check:
    """One check; held is None where it was not made, and the message then says why."""

    name: str
    claim: str
    held: bool | None = None
    seconds: float = 0.0
    message: str = "not reached"


@dataclass
class Report:
    """What is known of a run so far."""

    subject: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    checks: list[Check] = field(default_factory=list)
    running: str | None = None
    ended: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        return sum(check.held is False for check in self.checks)

    @property
    def held(self) -> bool:
        """Whether the run came to its end, something held and nothing did not. What is said to be not checked is neither."""
        return not self.ended and not self.failed and any(check.held for check in self.checks)

    def take(self, line: dict[str, Any]) -> None:
        """One event. Raises the KvkernError that was told."""
        if "error" in line:
            kind, name, words = line["error"]
            raise getattr(errors, kind)(name, **words)
        if "checks" in line:
            self.checks = [Check(**check) for check in line["checks"]]
        elif "subject" in line:
            self.subject, self.seed = line["subject"], line["seed"]
        elif "start" in line:
            self.running = line["start"]
        else:
            self.end(line["end"], line["held"], line["seconds"], line["message"])

    def end(self, name: str, held: bool | None, seconds: float, message: str) -> None:
        check = next(check for check in self.checks if check.name == name)
        check.held, check.seconds, check.message = held, seconds, message
        self.running = None

    def close(self, why: str) -> None:
        """The run ends before its end: what was not reached says why."""
        self.ended = why
        for check in self.checks:
            if check.held is None and check.message == "not reached":
                check.message = why


def run(
    *,
    model: str | None = None,
    dtype: opening.Dtype | None = None,
    device: str | None = None,
    backend: str | None = None,
    seed: int | None = None,
    as_json: bool = False,
) -> bool:
    """Check what kvkern promises, with this model on this machine, print what held, and return whether all of it did.

    model    folder of a checkpoint, or its name on the hub; a tiny random one if None
    seed     of all random values; drawn afresh if None

    Raises RequestError, DeviceError, BackendError or what else `opening.open_model` raises where there is nothing to check,
    KvkernError where pytest is not installed or its process ends before a check. After Ctrl-C what held so far is printed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise KvkernError(
            "pytest", found="no package pytest", needed="pytest, which runs the checks", do="pip install kvkern[test]"
        )
    told = {"dtype": dtype, "device": device, "backend": backend}
    if model is not None:
        # A folder by its whole path, for the process runs elsewhere.
        told["model"] = opening.source_of(model).name
    options = [f"--{name}={value}" for name, value in told.items() if value is not None]
    report, started = Report(), time.perf_counter()

    def say() -> None:
        report.seconds = time.perf_counter() - started
        if model is not None:
            report.subject["model"] = model
        console.say(json.dumps(_fields(report)) if as_json else _table(report))

    try:
        with _progress(report) as progress, contextlib.closing(_events(report, options, seed)) as lines:
            for line in lines:
                report.take(line)
                progress()
    except KeyboardInterrupt:
        report.close("interrupted")
        if report.subject:
            say()
        raise
    say()
    return report.held


# -- the process -------------------------------------------------------------------------------------------------------


def _events(report: Report, options: list[str], seed: int | None) -> Generator[dict[str, Any], None, None]:
    """Start the process and yield what it tells. It is ended with this generator, however that ends.

    Where it ends in the middle of a check, that check did not hold. Raises KvkernError where it ends before the first.
    """
    with tempfile.TemporaryDirectory(prefix="kvkern-check-") as work, open(f"{work}/log", "w+b") as log:
        arguments = ["--rootdir", work, "-c", os.devnull, "--basetemp", f"{work}/files", "-p", "no:cacheprovider"]
        for plugin in PLUGINS:
            arguments += ["-p", plugin]
        environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS} | ALONE
        if seed is not None:
            environment["KVKERN_SEED"] = str(seed)
        read, write = os.pipe()
        with open(read, encoding="utf-8") as lines:
            try:
                child = subprocess.Popen(
                    [*PYTEST, *arguments, f"--kvkern-events={write}", *options, "--pyargs", "kvkern.checks"],
                    cwd=work,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[write],
                )
            finally:
                os.close(write)
            try:
                for line in lines:
                    yield json.loads(line)
                status = child.wait()
            finally:
                _end(child)
        if report.running is not None or status not in (0, 1) or not report.subject:
            log.seek(0)
            said = [line.decode(errors="replace").strip() for line in log if line.strip()]
            _ended_early(report, status, said[-1] if said else "nothing was said")


def _ended_early(report: Report, status: int, last: str) -> None:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}: {last}"
    if report.running is None and not any(check.held is not None for check in report.checks):
        raise KvkernError(
            "checks",
            found=f"a process that {how}",
            needed="one that runs the checks",
            do="try a smaller --model, or another --device; if that changes nothing, report it with this line",
        )
    if report.running is not None:
        report.end(report.running, False, 0.0, f"the process {how}")
    report.close(f"the process {how}")


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# -- what is said ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(report: Report) -> Iterator[Any]:
    """On stderr: a bar, or where that is no terminal a line as each check starts."""
    with console.bars() as bars:
        bar = bars("check")
        if not sys.stderr.isatty():
            console.note("check: load the model")

        def progress() -> None:
            done = sum(check.held is not None or check.message != "not reached" for check in report.checks)
            claim = next((check.claim for check in report.checks if check.name == report.running), "")
            note = f"{done} of {len(report.checks)}  {claim}"
            bar(done, len(report.checks) or None, note if len(note) <= 70 else note[:67] + "...")
            if claim and not sys.stderr.isatty():
                console.note(f"check {done + 1:2} of {len(report.checks)}: {claim}")

        yield progress


def _fields(report: Report) -> dict[str, Any]:
    return {
        **report.subject,
        "seed": report.seed,
        "checks": [asdict(check) for check in report.checks],
        "seconds": round(report.seconds, 3),
        "held": report.held,
    }


def _table(report: Report) -> str:
    about, versions = report.subject, report.subject["versions"]
    head = [
        ("model", f"{about['model']}  {about['geometry']}  {about['dtype']}"),
        ("backend", f"{about['backend']} on {about['device']}: {about['backend_why']}"),
        ("kernels", f"in C++ for {about['instruction_set']}, threads: {about['threads']}"),
        ("versions", "  ".join(f"{name} {found or 'not installed'}" for name, found in versions.items())),
    ]
    width = max(len(check.claim) for check in report.checks)
    lines = [console.table(head, width=8), ""]
    for check in report.checks:
        words = check.message.splitlines()
        if check.held is None:
            lines.append(f"{check.claim:<{width}}  not checked: {words[0] if words else ''}")
            words = words[1:]
        else:
            lines.append(f"{check.claim:<{width}}  {'held' if check.held else 'NOT HELD':<8}  {check.seconds:5.1f} s")
        lines += [f"    {line}" for line in words]
    return "\n".join([*lines, "", _verdict(report)])


def _verdict(report: Report) -> str:
    made = sum(check.held is not None for check in report.checks)
    left = len(report.checks) - made
    aside = f", {left} not checked" if left else ""
    again = f"  (the same values again: --seed {report.seed})"
    if report.failed:
        return f"NOT HELD: {report.failed} of {made} checks{aside}, in {report.seconds:.1f} s{again}"
    words = f"held: {made} of {made} checks{aside}, in {report.seconds:.1f} s"
    return f"{words}; {report.ended}" if report.ended else words
