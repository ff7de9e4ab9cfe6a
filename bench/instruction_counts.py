"""Instructions per multiply-add of K1 and K2: a figure that does not move with the machine's load.

    python bench/instruction_counts.py [--check]   beside the committed figures; --check: exit 1 where one grew by more than 5 %
    python bench/instruction_counts.py --write     new figures to be committed, bench/results/instruction_counts.json

Of every instruction set, what stands in the objects of csrc/: the inner loops of scores and of weighing, as objdump shows them,
for one to three vectors of rows. Of those that valgrind can run, what is executed too: callgrind counts a call of K1 or K2 on one
thread over two numbers of tokens, and the difference is their loops with softmax and packing. Valgrind knows no AVX-512.

    avx2 score 3x8 fp32           | <instructions> / <multiply-adds> = <quotient>  (<change> %)
    avx2 K1 144 rows fp32         | <instructions> / <multiply-adds> = <quotient>  (<change> %)
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, machine

from kvkern import _C
from kvkern.errors import UnsupportedError

RESULT = ROOT / "bench" / "results" / "instruction_counts.json"
OBJECTS = ROOT / "build" / f"ninja{sysconfig.get_config_var('EXT_SUFFIX')}"
SETS = ("portable", "avx2", "avx512", "avx512bf16")
EMULATED = ("portable", "avx2")
GREW = 0.05

# What a call is given; HEADS, GROUP and HEAD_DIM of instruction_counts.cpp.
HEADS, GROUP, HEAD_DIM = 2, 4, 128
CALLS = [("K1", dtype, rows, (128, 256)) for dtype in ("fp32", "bf16") for rows in (1, 36)]
CALLS += [("K2", dtype, 8, (64, 192)) for dtype in ("fp32", "bf16")]
ENTRY = {"K1": "kvkern::prefix_attention*", "K2": "kvkern::suffix_attention*"}

LOOP = re.compile(r"(score_block|weigh)<float __vector\((\d+)\), (\d), [^<>]*(Single|Pair)(?:, (\d+))?>\(")
PRODUCT = re.compile(r"(mulps|vfn?madd\d+ps|vdpbf16ps) .*%([xyz])mm")
LANES = {"x": 4, "y": 8, "z": 16}

Figures = dict[str, dict[str, Any]]


def tool(name: str) -> str:
    """Its path, or an UnsupportedError that says what to install."""
    path, package = shutil.which(name), {"objdump": "binutils", "valgrind": "valgrind"}.get(name, "g++")
    if path is None:
        do = f"apt-get install {package} (Debian, Ubuntu), dnf install {package.replace('g++', 'gcc-c++')} (Fedora)"
        raise UnsupportedError(name, found="not in PATH", needed="to count instructions", do=do)
    return path


def said(*words: str | Path) -> str:
    """stdout, then stderr of a program that succeeds."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode != 0:
        found = f"exit {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}"
        raise UnsupportedError(Path(words[0]).name, found=found, needed="exit 0", do=" ".join(map(str, words)))
    return done.stdout + done.stderr


def figure(instructions: int, multiply_adds: int) -> dict[str, Any]:
    return {
        "instructions": instructions,
        "multiply_adds": multiply_adds,
        "quotient": round(instructions / multiply_adds, 6),
    }


def multiply_adds(instruction: str) -> int:
    """Of one instruction: a lane each, two a lane where it multiplies pairs of bf16."""
    product = PRODUCT.match(instruction)
    return LANES[product[2]] * (2 if product[1] == "vdpbf16ps" else 1) if product else 0


def inner_loops(lines: list[tuple[int, str]]) -> list[list[str]]:
    """Of (address, instruction): from a jump's target to the jump back to it, where no other such loop lies between."""
    loops, addresses, newest = [], [address for address, _ in lines], -1
    for at, (_, text) in enumerate(lines):
        jump = re.match(r"j\w+ +([0-9a-f]+)\b", text)
        target = int(jump[1], 16) if jump else -1
        if target in addresses[: at + 1] and (begin := addresses.index(target)) > newest:
            loops.append([text for _, text in lines[begin : at + 1]])
            newest = begin
    return loops


def main_loops(disassembled: str) -> Figures:
    """Of each form of score_block, at its most keys, and of weigh: the inner loop with the most multiply-adds."""
    keys: dict[str, int] = {}
    found: Figures = {}
    for function in re.split(r"\n(?=[0-9a-f]+ <)", disassembled):
        form = LOOP.search(function.partition(">:\n")[0])
        if not form:
            continue
        name = f"{form[1].partition('_')[0]} {form[3]}x{form[2]} {'fp32' if form[4] == 'Single' else 'bf16 pairs'}"
        lines = [(int(line[1], 16), line[2]) for line in re.finditer(r"^ *([0-9a-f]+):\t(.*)", function, re.M)]
        counts = [(sum(map(multiply_adds, loop)), len(loop)) for loop in inner_loops(lines)]
        most, length = max(counts, default=(0, 0))
        if most and int(form[5] or 0) >= keys.get(name, 0):
            keys[name] = int(form[5] or 0)
            found[name] = figure(length, most)
    if {name.split()[0] for name in found} != {"score", "weigh"}:
        needed, do = "inner loops of score_block and weigh", "see how csrc/attention_impl.h names them, and set LOOP"
        raise UnsupportedError("objdump", found=", ".join(found) or "none", needed=needed, do=do)
    return found


def executed(driver: Path, isa: str, kernel: str, *sizes: str | int) -> int:
    """Instructions of one call. Counted twice, and refused if the counts differ."""
    words = ["--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect={ENTRY[kernel]}"]
    run = [tool("valgrind"), *words, "--collect-atstart=no", driver, isa, kernel, *map(str, sizes)]
    first, second = (int(re.findall(r"Collected : (\d+)", said(*run))[0]) for _ in range(2))
    if first != second or first == 0:
        do = " ".join(map(str, run))
        raise UnsupportedError("callgrind", found=f"{first}, then {second}", needed="one count, twice", do=do)
    return first


def calls(driver: Path, isa: str) -> Figures:
    """Of each call: what it executes for more tokens than for fewer, and the multiply-adds of the rows that there are."""
    found = {}
    for kernel, dtype, rows, (few, many) in CALLS:
        more = executed(driver, isa, kernel, dtype, rows, many) - executed(driver, isa, kernel, dtype, rows, few)
        name = f"{isa} {kernel} {rows * GROUP} rows {dtype}"
        found[name] = figure(more, rows * GROUP * HEADS * (many - few) * 2 * HEAD_DIM)
    return found


def measure(emulated: list[str]) -> tuple[dict[str, str], Figures]:
    """What the objects of csrc/ are compiled with, and the figures; executed are those of `emulated`."""
    objdump, _ = tool("objdump"), tool("valgrind")
    if not (OBJECTS / "build.ninja").exists():
        raise UnsupportedError("csrc", found="not built", needed=str(OBJECTS), do="python setup.py build_ext --inplace")
    objects = [OBJECTS / name for name in ("dispatch.o", *(f"isa_{isa}.o" for isa in SETS))]
    variables = dict(re.findall(r"^(\w+) = (.*)$", (OBJECTS / "build.ninja").read_text(), re.M))
    compiler = variables["cxx"].split()
    tool(compiler[0])
    said(sys.executable, "-m", "ninja", "-C", OBJECTS, *(path.name for path in objects))
    # Where Python lies and what is warned of change no instruction.
    flags = re.sub(r"-isystem \S+|-W\S+", "", variables["cxxflags"]).split()
    built = {"compiler": said(*compiler, "--version").splitlines()[0], "flags": " ".join(flags)}

    found: Figures = {}
    for isa in SETS:
        loops = main_loops(said(objdump, "-dC", "--no-show-raw-insn", OBJECTS / f"isa_{isa}.o"))
        found |= {f"{isa} {name}": loops[name] for name in sorted(loops)}
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder, "instruction_counts")
        said(*compiler, *flags, "-I", ROOT / "csrc", Path(__file__).with_suffix(".cpp"), *objects, "-ldl", "-o", driver)
        for isa in emulated:
            found |= calls(driver, isa)
    return built, found


def compare(now: Figures, before: Figures) -> tuple[list[str], list[str]]:
    """A line for each figure, and what is to be told: names of those that grew by more than 5 % or are not found any more."""
    lines, told = [], []
    for name, value in now.items():
        line = f"{name:36} | {value['instructions']:>8} / {value['multiply_adds']:>8} = {value['quotient']:.4f}"
        if name not in before:
            lines.append(f"{line}  (new)")
            continue
        change = (
            value["instructions"]
            * before[name]["multiply_adds"]
            / value["multiply_adds"]
            / before[name]["instructions"]
            - 1
        )
        lines.append(f"{line}  ({change:+.1%})")
        if change > GREW:
            told.append(f"{name}: grew by {change:.1%}, from {before[name]['quotient']:.4f} to {value['quotient']:.4f}")
    told += [f"{name}: not found any more" for name in before if name not in now]
    return lines, told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure grew by more than 5 %%")
    parser.add_argument("--write", action="store_true", help="write the file of committed figures")
    options = parser.parse_args()
    if platform.machine() != "x86_64" or sys.platform != "linux":
        print(
            f"instruction counts: not measured on {sys.platform} {platform.machine()}, only on linux x86_64",
            file=sys.stderr,
        )
        return 0
    emulated = [isa for isa in EMULATED if isa in _C.instruction_sets()]
    try:
        built, now = measure(emulated)
    except UnsupportedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    committed = json.loads(RESULT.read_text()) if RESULT.exists() else {"figures": {}}
    # What this processor cannot execute is not missed.
    before = {
        name: value for name, value in committed["figures"].items() if " K" not in name or name.split()[0] in emulated
    }
    lines, told = compare(now, before)
    print("\n".join(lines))
    print("\n".join(told) or f"{len(before)} committed figures: none grew by more than {GREW:.0%}")
    other = [f"{built[key]} here, {committed.get(key)} there" for key in built if committed.get(key) != built[key]]
    if before and other:
        print(
            f"the committed figures are of another build ({'; '.join(other)}): growth need not be the source's, and is no failure"
        )
    if options.write:
        facts = machine(torch.device("cpu"))
        content = {**built, **{key: facts[key] for key in ("commit", "date", "cpu")}, "figures": now}
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return int(options.check and bool(told) and not other)


if __name__ == "__main__":
    sys.exit(main())
