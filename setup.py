"""Builds csrc/ into kvkern._C: pybind11, one ninja file, no torch headers. All else is in pyproject.toml."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MAC = sys.platform == "darwin"
STANDARD = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -pthread"
WARNINGS = (
    "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wcast-qual -Wcast-align -Wundef -Wextra-semi"
)
# An error in CI alone: a newer compiler warns of more, and nobody's build shall end there.
WERROR = "-Werror" if os.environ.get("KVKERN_WERROR", "0") == "1" else ""
CXXFLAGS = f"{STANDARD} {WARNINGS} {WERROR}".rstrip()
# A product and a sum are one rounding only where the source says so, never where the compiler likes. AVX2 and what comes
# with it are for the one file that is chosen at run time by what the processor has.
ROUNDING = "-ffp-contract=off -fno-math-errno"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
ISA_FLAGS = {"portable": "", "avx2": AVX2, "avx512": AVX512, "avx512bf16": f"{AVX512} -mavx512bf16"}
FILE_FLAGS = {f"isa_{isa}": f"{ROUNDING} {flags if X86 else ''}".rstrip() for isa, flags in ISA_FLAGS.items()}
LDFLAGS = "-bundle -undefined dynamic_lookup" if MAC else "-shared -pthread"

NINJA = """\
cxx = {cxx}
cxxflags = {cxxflags}
ldflags = {ldflags}
rule compile
  command = $cxx $cxxflags $fileflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule link
  command = $cxx $in $ldflags -o $out
  description = link $out
{edges}
"""


def escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """One build.ninja an extension: only what changed is compiled again, headers included."""

    def build_extension(self, ext: Extension) -> None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = Path("build", f"ninja{suffix}").resolve()
        folder.mkdir(parents=True, exist_ok=True)

        objects = [(escape(str(Path(source).resolve())), f"{Path(source).stem}.o") for source in ext.sources]
        edges = [
            f"build {out}: compile {source}\n  fileflags = {FILE_FLAGS.get(Path(out).stem, '')}"
            for source, out in objects
        ]
        edges.append("build module.so: link " + " ".join(out for _, out in objects))
        includes = [pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
        flags = [CXXFLAGS, *(f"-isystem {shlex.quote(path)}" for path in dict.fromkeys(includes))]
        text = NINJA.format(
            cxx=os.environ.get("CXX") or shutil.which("g++") or "c++",
            cxxflags=" ".join([*flags, os.environ.get("CXXFLAGS", "")]),
            ldflags=" ".join([LDFLAGS, os.environ.get("LDFLAGS", "")]),
            edges="\n".join(edges),
        )
        Path(folder, "build.ninja").write_text(text)

        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "module.so"), str(target))


setup(
    ext_modules=[
        Extension(
            "kvkern._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
