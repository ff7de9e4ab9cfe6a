"""What every benchmark shares: correctness before time, all samples kept, the machine written down.

A script makes a `Bench`, checks each shape against the oracle, times kvkern, its peers and the roofs in one process, and
writes JSON: card or CPU, driver, versions, commit, date, and every sample in seconds. `report.py` makes tables of the files.

An error of a CUDA kernel ends its process's use of the device. `Bench.trial` blames it on the entry that made it, so that
another run goes on without that one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkern import _C

ROOT = Path(__file__).resolve().parent.parent

CRASHED = 75
"""Exit status of a script that is to be run again: an entry broke the device for its process. sysexits.h's EX_TEMPFAIL."""
CASE = "case"
"""The entry that is blamed where no other is: operands, roofs."""
WHOLE = (CASE, "kvkern")
"""Entries without which a cell has no time."""


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a number was measured."""
    versions = {name: _version(name) for name in ("kvkern", "torch", "triton", "transformers")}
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_sets": _C.instruction_sets(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return facts | _gpu(device) if device.type == "cuda" else facts


@functools.cache
def _gpu(device: torch.device) -> dict[str, Any]:
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"gpu": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda}


def here() -> Path:
    """The folder for results of this machine, named for its CPU, the best instruction set that runs and the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = f"{_cpu_name()} {_C.instruction_sets()[0]} {cores} cores"
    return ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _commit() -> str | None:
    """As $KVKERN_COMMIT says, since the checkout around copied files may be of another; else of the checkout."""
    if named := os.environ.get("KVKERN_COMMIT"):
        return named
    commit = _first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _first_line("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit


@dataclass
class Bench:
    """One script's run: its name, its options, and the results so far."""

    name: str
    options: argparse.Namespace
    device: torch.device
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)
    """What else the file holds, by its key."""

    @classmethod
    def start(
        cls, name: str, doc: str | None, *, extra: Callable[[argparse.ArgumentParser], None] | None = None
    ) -> Bench:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--backend", default=None, help="a kvkern backend; by default the device decides")
        parser.add_argument("--samples", type=int, default=15, help="timed runs of each entry")
        parser.add_argument("--out", type=Path, default=None, help="folder for the JSON file")
        named = here()
        parser.add_argument(
            "--here", dest="out", action="store_const", const=named, help=f"--out {named.relative_to(ROOT)}"
        )
        if extra is not None:
            extra(parser)
        options = parser.parse_args()
        return cls(name, options, torch.device(options.device))

    def time(self, run: Callable[[], Any]) -> list[float]:
        """Seconds of each timed run, after two that are not counted."""
        for _ in range(2):
            run()
        return [self.once(run) for _ in range(self.options.samples)]

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one run."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self.device)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            return begin.elapsed_time(end) / 1e3
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        """Wait for the device; raises what an entry did to it, however late that shows."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(self, shape: dict[str, Any], entries: dict[str, list[float]], *, flop: float, bytes_moved: float) -> None:
        """Keep a shape's samples, and print one aligned line."""
        self.results.append({"shape": shape, "seconds": entries, "flop": flop, "bytes": bytes_moved})
        ours = statistics.median(entries["kvkern"])
        spread = 100 * (max(entries["kvkern"]) - min(entries["kvkern"])) / ours
        peers = "  ".join(
            f"{statistics.median(samples) / ours:.2f}x {name}" for name, samples in entries.items() if name != "kvkern"
        )
        print(
            f"{self.name:8s} {shown(shape):58s} | {ours * 1e6:10.0f} us ({spread:3.0f} %) | "
            f"{flop / ours / 1e9:8.1f} GFLOP/s {bytes_moved / ours / 1e9:7.1f} GB/s | {peers}",
            flush=True,
        )

    @property
    def path(self) -> Path | None:
        """The JSON file, if there is to be one."""
        return None if self.options.out is None else self.options.out / f"{self.name}.json"

    def resume(self) -> None:
        """Take up the cells that the file holds; those that failed are run again. One file is of one machine."""
        if self.path is None:
            return
        now = machine(self.device)  # asked in any case: a device that an entry broke later may not tell its name
        if not self.path.exists():
            return
        held = json.loads(self.path.read_text())
        facts = ["device", "gpu", "cpu", "threads", "versions"]
        if self.device.type == "cpu":
            facts.append("instruction_sets")  # CPUs of one name differ in them
        for fact in facts:
            if held["machine"].get(fact) != now.get(fact):
                raise SystemExit(
                    f"{self.path} {fact}: found {held['machine'].get(fact)}, needed {now.get(fact)}\n"
                    "  do: give another folder as --out"
                )
        self.results, self.failed = held.pop("results"), held.pop("failed", [])
        self.beside = {key: value for key, value in held.items() if key not in ("bench", "machine")}

    def has(self, shape: dict[str, Any]) -> bool:
        return any(result["shape"] == shape for result in self.results)

    def fail(self, shape: dict[str, Any], error: BaseException) -> None:
        """Keep why a cell has no time."""
        self._forget(shape)
        self.failed.append({"shape": shape, "reason": reason(error)})
        print(f"{self.name:8s} {shown(shape)} | no time: {reason(error)}", flush=True)

    def _forget(self, shape: dict[str, Any]) -> None:
        self.failed = [cell for cell in self.failed if cell["shape"] != shape]

    def keep(self, shape: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a cell, with the commit that it was measured at: a file may be taken up by a later one."""
        self._forget(shape)
        self.results.append({"shape": shape, **result, "commit": _commit()})

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"bench": self.name, "machine": machine(self.device), "results": self.results} | self.beside
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content | ({"failed": self.failed} if self.failed else {}), indent=1) + "\n")
        os.replace(partial, self.path)

    # -- entries that break the device ---------------------------------------------------------------------------------

    @property
    def _trying(self) -> Path | None:
        """A small file beside the JSON file, there while an entry is tried: it outlives a process that dies of the entry."""
        return None if self.path is None else self.path.with_suffix(".trying")

    @contextlib.contextmanager
    def trial(self, shape: dict[str, Any], entry: str) -> Iterator[None]:
        """Around the first run of an entry in a cell. Raises Crashed where that broke the device, else what the entry raised."""
        trying = self._trying
        if trying is not None:
            trying.parent.mkdir(parents=True, exist_ok=True)
            trying.write_text(json.dumps({"shape": shape, "entry": entry}) + "\n")
        try:
            yield
            self.synchronize()
        except Exception as error:
            self.blame(shape, entry, error)
            raise
        finally:
            if trying is not None:
                trying.unlink()

    def blame(self, shape: dict[str, Any], entry: str, error: BaseException) -> None:
        """Raise Crashed, kept in the file, if the device is broken after `error`; else return."""
        if not self._broken():
            return
        self._crash(shape, entry, reason(error))
        again = (
            "run again: that goes on without it"
            if self.path is not None
            else "with --out, running again goes on without it"
        )
        print(f"{self.name:8s} {shown(shape)} | {entry} broke the device: {reason(error)} | {again}", flush=True)
        raise Crashed(CRASHED)

    def _broken(self) -> bool:
        """Asked twice, since an error that passes is told once."""
        for _ in range(2):
            try:
                self.synchronize()
            except RuntimeError:
                continue
            return False
        return True

    def _crash(self, shape: dict[str, Any], entry: str, why: str) -> None:
        self.beside.setdefault("crashed", []).append({"shape": shape, "entry": entry, "reason": why})
        if entry in WHOLE:
            self.fail(shape, Broken(f"{entry} broke the device: {why}"))
        self.save()

    def take_up_trial(self) -> None:
        """After `resume`: an entry that was being tried when the process ended counts as crashed."""
        trying = self._trying
        if trying is None or not trying.exists():
            return
        with contextlib.suppress(json.JSONDecodeError):  # ended while this was written
            left = json.loads(trying.read_text())
            self._crash(left["shape"], left["entry"], "the process ended, or was stopped, in its first run")
            print(f"{self.name:8s} {shown(left['shape'])} | {left['entry']} ended the run before this one", flush=True)
        trying.unlink()

    def left_out(self, shape: dict[str, Any]) -> dict[str, str]:
        """Why entries are not to be tried in this cell: they crashed in it, or in two others."""
        found: dict[str, str] = {}
        crashed = self.beside.get("crashed", [])
        for entry in {crash["entry"]: None for crash in crashed}:
            cells = [crash for crash in crashed if crash["entry"] == entry]
            here = [crash for crash in cells if crash["shape"] == shape]
            if here:
                found[entry] = f"broke the device: {here[0]['reason']}"
            elif len({shown(crash["shape"]) for crash in cells}) > 1 and entry not in WHOLE:
                found[entry] = (
                    f"broke the device in {len(cells)} cells, at {shown(cells[0]['shape'])}: {cells[0]['reason']}"
                )
        return found

    def finish(self) -> None:
        self.save()
        if self.path is not None:
            print(f"wrote {self.path}")


def shown(shape: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())


def reason(error: BaseException) -> str:
    """Of a failure, what a file keeps."""
    return f"{type(error).__name__}: {error}"[:300]


class Crashed(SystemExit):
    """Ends a script whose device is broken, with the status CRASHED."""


class Broken(RuntimeError):
    """An entry that a cell needs broke the device."""


class WrongResult(SystemExit):
    """Ends a script, or takes its time from one entry."""


def gate(o: Tensor, reference: Tensor, plain: Tensor) -> None:
    """No time from a wrong result: FlashAttention's rule, the error against fp64 at most twice that of plain torch."""
    error = (o.double().cpu() - reference).abs().max().item()
    allowed = 2 * (plain.double().cpu() - reference).abs().max().item() + 1e-6
    if not error <= allowed:
        raise WrongResult(f"wrong result: error {error:.3g}, allowed {allowed:.3g}; no time is reported")
