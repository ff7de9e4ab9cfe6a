"""Compile csrc/ for aarch64 and run its kernels there, where a cross compiler and an emulator can be had.

    python .ci/aarch64.py

Every file but the bindings, with the flags of setup.py and with warnings as errors. Then .ci/aarch64.cpp in qemu: K1, K2 and
exp2 against plain loops in double, and, where this machine has AVX2, bit for bit what the avx2 build gives here.

Says "aarch64: not compiled: ..." and ends with 0 where there is no compiler and none can be installed; any error of the compiler
or of the kernels ends with 1.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}


def flags() -> dict[str, str]:
    """These constants of setup.py."""
    wanted = {"WARNINGS", "ROUNDING", "STANDARD"}
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def installed(tool: str) -> str | None:
    """None where the tool is there, now or before; else why not."""
    if shutil.which(tool):
        return None
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return f"no {tool}, and no apt-get as root to install {PACKAGES[tool]}"
    apt = [
        "apt-get",
        "-qq",
        "-o",
        "Acquire::Retries=0",
        "-o",
        "Acquire::http::Timeout=10",
        "-o",
        "DPkg::Lock::Timeout=10",
    ]
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = [*apt, "install", "-y", "--no-install-recommends", PACKAGES[tool]]
    for command in (install, [*apt, "update"], install):  # lists are asked for only where those here do not do
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if shutil.which(tool):
            return None
    return (
        f"apt-get could not install {PACKAGES[tool]}: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}"
    )


def run(*words: str | Path) -> str:
    """What the command printed; its errors are shown, and end the program."""
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}aarch64: failed with {done.returncode}: {' '.join(map(str, words))}")
    return done.stdout


def compiled(compiler: str, sources: list[Path], folder: Path) -> list[Path]:
    """Objects of these sources, with the flags of setup.py."""
    constants = flags()
    common = f"{constants['STANDARD']} {constants['WARNINGS']} -Werror"
    objects = []
    for source in sources:
        # What judges the kernels is not optimised much: g++ 12 for aarch64 breaks off in its vectoriser there.
        own = constants["ROUNDING"] if source.stem.startswith("isa_") else "-O1" if source.parent.name == ".ci" else ""
        objects.append(folder / f"{source.stem}.o")
        run(compiler, *common.split(), *own.split(), "-c", source, "-o", objects[-1])
    return objects


def program(compiler: str, objects: list[Path], folder: Path) -> Path:
    """.ci/aarch64.cpp, linked with the kernels."""
    own = compiled(compiler, [ROOT / ".ci" / "aarch64.cpp"], folder)
    run(compiler, *own, *objects, "-pthread", "-ldl", "-o", folder / "program")
    return folder / "program"


def bits(said: str) -> list[list[str]]:
    """The name and the hash of each line."""
    return [line.split()[:2] for line in said.splitlines()]


def main() -> None:
    why_not = installed(COMPILER)
    if why_not:
        print(f"aarch64: not compiled: {why_not}")
        return
    sources = sorted(path for path in (ROOT / "csrc").glob("*.cpp") if not path.stem.startswith("bind"))
    with tempfile.TemporaryDirectory() as name:
        built = program(COMPILER, compiled(COMPILER, sources, Path(name)), Path(name))
        print(f"aarch64: compiled: {', '.join(path.name for path in sources)}")
        why_not = installed(EMULATOR)
        if why_not:
            print(f"aarch64: not run: {why_not}")
            return
        # Where the package of the compiler has the libraries.
        there = run(EMULATOR, "-L", "/usr/aarch64-linux-gnu", built, "portable")
    print(f"aarch64: run in {EMULATOR}, agrees with plain loops in double:\n{there}", end="")

    objects = [path for path in (ROOT / "build").glob("ninja*/*.o") if not path.stem.startswith("bind")]
    cpu = Path("/proc/cpuinfo").read_text().split()
    if not objects or not shutil.which("g++") or not {"avx2", "fma"} <= set(cpu):
        print("aarch64: bits not compared: no AVX2 here, or csrc/ is not built")
        return
    with tempfile.TemporaryDirectory() as name:
        here = run(program("g++", objects, Path(name)), "avx2")
    if bits(there) != bits(here):
        sys.exit(f"aarch64: other bits than those of avx2 here:\n{here}")
    print("aarch64: the bits of avx2 here")


if __name__ == "__main__":
    main()
