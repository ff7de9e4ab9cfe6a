"""arXiv 2606.13361 measured again, all of it by one command: `make bench-paper`, or

    python -m bench.bench_paper [--model PATH] [--dtype bfloat16] [--device cuda] [--full] [--tiny] [--only PART ...] [--out FOLDER]

Runs the scripts below one after another, each with a limit on its time, and writes to bench/results/<machine>/ (--out)

    paper.json     what each of them wrote, with all samples, versions, the machine, and prices by the measured seconds
    report.html    tables and figures, one file that needs no other
    paper.svg      the README's figure

and then docs/paper.md and the README's tables as `bench/report.py` makes them of every machine's files. By default SmolLM2 of the
demo: about 20 minutes on two cores, too few to judge all of a thousand answers from scratch; run again, it goes on with them.
--full asks every question over the long document too, for hours.

    document      bench_document.py: a document's cost by its length and by its agents
    exactness     exactness.py: answers beside those from scratch
    compression   compression.py: how far the KV compresses without loss
    steps         simulate.py --measure: seconds of a step, fitted and judged on this machine
    simulation    simulate.py: 80 million agents, by steps from data sheets; simulation_measured: by the steps of this machine

What the scripts write lies in build/paper/ until all of it is there, so a run that was stopped goes on where it was; --again starts
anew. A part that fails is left out with the reason, and the rest is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m bench.bench_paper`

import claims
import report
import torch
from harness import ROOT, here, machine

from kvkern import console
from kvkern.demo_model import demo_model

BENCH = Path(__file__).resolve().parent
AGENTS_TINY = (
    "--fit-agents",
    "2",
    "4",
    "8",
    "--judge-agents",
    "3",
    "6",
    "--measure-document",
    "64",
    "--measure-answer",
    "4",
)


@dataclass(frozen=True)
class Part:
    """One script: its arguments beside those that all take, and the file that it writes.

    needs    a part whose file it reads
    limited  it takes --seconds
    """

    name: str
    script: str
    seconds: float
    arguments: tuple[str, ...] = ()
    needs: str = ""
    limited: bool = True

    @property
    def file(self) -> str:
        return f"{self.name}.json"


PARTS = (
    Part("document", "bench_document.py", 300),
    Part("exactness", "exactness.py", 440),
    Part("compression", "compression.py", 150, ("--dtypes", "bfloat16", "float16", "float32")),
    Part("steps", "simulate.py", 150, ("--measure",), limited=False),
    Part("simulation", "simulate.py", 90, limited=False),
    Part("simulation_measured", "simulate.py", 90, needs="steps", limited=False),
)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder of a model; by default the demo's")
    parser.add_argument(
        "--dtype", default=None, choices=("float32", "bfloat16", "float16"), help="of document and exactness"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=here(), help="folder of paper.json and report.html (default: this machine's)"
    )
    parser.add_argument("--machine-hour", type=float, default=None, help="dollars for an hour of this machine")
    parser.add_argument(
        "--only", nargs="+", default=None, choices=[part.name for part in PARTS], help="measure these alone"
    )
    parser.add_argument("--full", action="store_true", help="every question over the long document too")
    parser.add_argument("--again", action="store_true", help="forget what an earlier run has measured")
    parser.add_argument(
        "--tiny", action="store_true", help="small random models and crowds: to see that all of it runs"
    )
    return parser


def machine_hour(chosen: argparse.Namespace) -> float:
    given: float | None = chosen.machine_hour
    return claims.MACHINE_HOUR[torch.device(chosen.device).type] if given is None else given


def command(part: Part, chosen: argparse.Namespace, folder: Path) -> list[str]:
    """A part's command line."""
    found = [sys.executable, str(BENCH / part.script), *part.arguments]
    if part.script == "simulate.py":
        if part.name == "steps":
            found += ["--steps", str(folder / part.file), *(("--model", chosen.model) if chosen.model else ())]
            return found + list(AGENTS_TINY if chosen.tiny else ())
        found += ["--json", str(folder / part.file)]
        if part.needs:
            found += ["--steps", str(folder / f"{part.needs}.json"), "--gpu-hour", str(machine_hour(chosen))]
        return found + (["--agents", "100000", "--sampled-agents", "20000"] if chosen.tiny else [])
    found += ["--out", str(folder), "--device", chosen.device]
    if part.limited and not (chosen.full and part.name == "exactness"):
        found += ["--seconds", str(part.seconds)]
    if chosen.tiny:
        return [*found, "--tiny"]
    found += ["--model", chosen.model] if chosen.model else []
    if part.name != "compression":  # which takes every dtype that it can
        found += ["--dtype", chosen.dtype] if chosen.dtype else []
    return found + (["--full"] if chosen.full and part.name == "exactness" else [])


def measure(chosen: argparse.Namespace, folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Run the parts that are wanted: (seconds of each, why one is missing). A part that goes on counts its earlier runs too."""
    spent_file = folder / "seconds.json"
    spent: dict[str, float] = json.loads(spent_file.read_text()) if spent_file.exists() else {}
    missing: dict[str, str] = {}
    wanted = [part for part in PARTS if chosen.only is None or part.name in chosen.only]
    for n, part in enumerate(wanted, 1):
        # A script that takes up its own file is asked again: it may have cells left.
        file = folder / part.file
        if file.exists() and not part.limited:
            continue
        begun = file.exists() or file.with_suffix(".begun").exists()
        if part.needs and not (folder / f"{part.needs}.json").exists():
            missing[part.name] = f"needs {part.needs}, which is not there"
            continue
        console.say(f"== {n} of {len(wanted)}: {part.name}, about {part.seconds / 60:.0f} minutes at most")
        began = time.perf_counter()
        try:
            status = subprocess.run(command(part, chosen, folder), cwd=ROOT).returncode
        finally:
            before = spent.get(part.name, 0.0) if begun else 0.0
            spent[part.name] = before + time.perf_counter() - began
            spent_file.write_text(json.dumps(spent) + "\n")
        if status:
            missing[part.name] = f"{part.script} ended with status {status}"
    return spent, missing


def gathered(
    chosen: argparse.Namespace, folder: Path, spent: dict[str, float], missing: dict[str, str]
) -> dict[str, Any]:
    """paper.json of what lies in the folder."""
    parts: dict[str, Any] = {}
    for part in PARTS:
        if (folder / part.file).exists():
            parts[part.name] = json.loads((folder / part.file).read_text())
        else:
            missing.setdefault(part.name, "not run")
    device = torch.device(chosen.device)
    hour = machine_hour(chosen)
    parts["prices"] = claims.presets()
    if "document" in parts:
        parts["prices"]["measured"] = claims.prices(folder / "document.json", hour)
    return {
        "bench": "paper",
        "machine": machine(device),
        "settings": {
            "model": "tiny" if chosen.tiny else Path(chosen.model or demo_model()).name,
            "dtype": chosen.dtype,
            "full": chosen.full,
            "machine_hour": hour,
        },
        "seconds": spent,
        "missing": missing,
        "parts": parts,
    }


def write(path: Path, text: str) -> None:
    """Whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = options().parse_args(argv)
    name = "tiny" if chosen.tiny else Path(chosen.model or demo_model()).name
    folder = ROOT / "build" / "paper" / f"{here().name}-{chosen.device}-{name}{'-full' if chosen.full else ''}"
    if chosen.again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        spent, missing = measure(chosen, folder)
    except KeyboardInterrupt:
        console.note("stopped: the same command goes on where it was")
        return 130
    paper = gathered(chosen, folder, spent, missing)
    chosen.out.mkdir(parents=True, exist_ok=True)
    write(chosen.out / "paper.json", json.dumps(paper, indent=1) + "\n")
    for path, text in report.paper_pages(chosen.out / "paper.json").items():
        write(path, text)
    kept = ROOT / "bench" / "results"
    if chosen.out.resolve().parent == kept:
        report.rewrite()
    console.say(
        f"{sum(spent.values()) / 60:.1f} minutes; wrote {chosen.out / 'paper.json'} and {chosen.out / 'report.html'}"
    )
    for part, why in missing.items():
        console.note(f"{part}: not measured: {why}")
    return 1 if missing and chosen.only is None else 0


if __name__ == "__main__":
    sys.exit(main())
