"""What no test enters: a table by file, then every branch of kvkern/ and csrc/, from the counts that make test-full left.

    python .ci/coverage_report.py FOLDER

FOLDER holds coverage.json, of coverage.py, and below tree/ the objects of native_coverage.py with gcov's counts. The report
goes to stdout and to FOLDER/report.txt. There is no bound to reach; but a module of which no line ran is an error.

How it counts:
- A branch is a line and a line that may come next. One that starts in a line that never ran is not listed: the branch that
  would have led there is, or the function. "exit" is the end of the function.
- Processes that tests start count like the tests' own. What a test kills, or what ends by os._exit, leaves no counts.
- The body of a Triton kernel counts where the interpreter ran it, which runs it as Python. Compiled, as on a GPU, it is not
  Python and no line of it counts.
- No GPU is needed: branches whose condition asks for the device stand apart, and tests marked gpu are for them.
- csrc/: attention_impl.h is compiled once for each instruction set and counted for each. Branches that only a C++ exception
  takes are left out, system headers too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ON_DEVICE = re.compile(r"cuda|device\.type|is_cpu|_device_name|DeviceMemory")


class File(NamedTuple):
    """Counts of one file; `unseen` says line by line what no test enters."""

    name: str
    lines: int
    lines_seen: int
    branches: int
    branches_seen: int
    unseen: list[str]
    unseen_on_device: list[str]


def share(seen: int, number: int) -> str:
    return f"{100 * seen / number:5.1f} %" if number else "      -"


# -- kvkern/ -----------------------------------------------------------------------------------------------------------


def python_files(folder: Path) -> Iterator[File]:
    counted = json.loads((folder / "coverage.json").read_text())["files"]
    for path in sorted((ROOT / "kvkern").rglob("*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text().splitlines()
        found = counted.get(name)
        if found is None:
            yield File(name, len(text), 0, 0, 0, [], [])
            continue
        ran, summary = set(found["executed_lines"]), found["summary"]
        entries = [
            (begin, f"{begin} -> {'exit' if end < 0 else end}")
            for begin, end in found["missing_branches"]
            if begin in ran
        ]
        entries += [
            (region["start_line"], f"{region['start_line']} never called")
            for function, region in found["functions"].items()
            if function and region["summary"]["num_statements"] and not region["executed_lines"]
        ]
        unseen: list[str] = []
        on_device: list[str] = []
        for line, what in sorted(entries):
            source = text[line - 1].strip()
            (on_device if ON_DEVICE.search(source) else unseen).append(f"{name}:{what:16}  {source}")
        yield File(
            name,
            summary["num_statements"],
            summary["covered_lines"],
            summary["num_branches"],
            summary["covered_branches"],
            unseen,
            on_device,
        )


# -- csrc/ -------------------------------------------------------------------------------------------------------------


def native_files(folder: Path) -> Iterator[File]:
    counts = sorted((folder / "tree" / "build").glob("ninja*/*.gcda"))
    if not counts:
        raise SystemExit(f"no counts of gcov below {folder}/tree/build: run .ci/native_coverage.py first")
    command = ["gcov", "--json-format", "--branch-probabilities", "--stdout", *(file.name for file in counts)]
    said = subprocess.run(command, cwd=counts[0].parent, capture_output=True, text=True, check=True).stdout
    units = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    for unit in sorted(units, key=lambda unit: unit["data_file"]):
        for found in sorted(unit["files"], key=lambda found: found["file"]):
            path = Path(found["file"])
            if path.parent.name == "csrc" and folder.resolve() in path.parents:
                yield native_file(path, found["lines"], Path(unit["data_file"]).stem)


def native_file(path: Path, lines: list[dict[str, Any]], unit: str) -> File:
    # A template's line comes once for each instance: what one instance enters is entered.
    ran: dict[int, int] = defaultdict(int)
    taken: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for line in lines:
        number = line["line_number"]
        ran[number] += line["count"]
        for i, branch in enumerate(b for b in line["branches"] if not b["throw"]):
            taken[number][i] += branch["count"]

    name = f"csrc/{path.name}" + (f" ({unit.removeprefix('isa_')})" if unit.startswith("isa_") else "")
    text = path.read_text().splitlines()
    unseen = []
    for number in sorted(ran):
        missed = sum(not count for count in taken[number].values())
        if not ran[number] or missed:
            what = f"{missed} of {len(taken[number])} branches" if ran[number] else "never run"
            unseen.append(f"{name}:{number} {what:16}  {text[number - 1].strip()}")
    branches = [count for line in taken.values() for count in line.values()]
    return File(name, len(ran), sum(map(bool, ran.values())), len(branches), sum(map(bool, branches)), unseen, [])


# -- the report --------------------------------------------------------------------------------------------------------


def report(python: list[File], native: list[File]) -> Iterator[str]:
    yield f"{'file':34} {'lines':>7} {'branches':>9}"
    for files, name in ((python, "kvkern/"), (native, "csrc/")):
        total = File(name, *(sum(file[n] for file in files) for n in range(1, 5)), [], [])  # type: ignore[arg-type]
        for file in (*files, total):
            lines, branches = share(file.lines_seen, file.lines), share(file.branches_seen, file.branches)
            yield f"{file.name:34} {lines} {branches:>9}"
    for title, parts in (
        ("branches of kvkern/ that no test enters", [file.unseen for file in python]),
        ("of kvkern/, where a device is asked for; tests marked gpu", [file.unseen_on_device for file in python]),
        ("lines and branches of csrc/ that no test enters", [file.unseen for file in native]),
    ):
        yield f"\n{title}: {sum(map(len, parts))}"
        for part in parts:
            yield from (f"  {line}" for line in part)


def main(folder: Path) -> int:
    python, native = list(python_files(folder)), list(native_files(folder))
    if not native:
        raise SystemExit(f"gcov's counts below {folder}/tree/build name no file of {folder}/tree/csrc")
    text = "\n".join(report(python, native))
    print(text)
    (folder / "report.txt").write_text(text + "\n")
    empty = [file.name for file in python if file.lines and not file.lines_seen]
    if empty:
        print(f"no test runs a line of {', '.join(empty)}", file=sys.stderr)
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
