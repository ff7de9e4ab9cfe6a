"""Names what is missing to build kvkern, before anything is downloaded. Standard library only; runs on any python.

    $ python3 .ci/preflight.py
    kvkern cannot be built here yet:
      g++: not found in PATH
        do: apt-get install g++        (Debian, Ubuntu)
            dnf install gcc-c++        (Fedora)
"""

from __future__ import print_function

import os
import subprocess
import sys

OLDEST = (3, 11)
HERE = "python%d.%d" % sys.version_info[:2]


def find(program):
    """Path of a program, or None: shutil.which is not in python 2."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = os.path.join(folder, program)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def packages(debian, fedora):
    return [
        "apt-get install %-18s (Debian, Ubuntu)" % debian,
        "dnf install %-22s (Fedora)" % fedora,
    ]


def check_python():
    if sys.version_info[:2] >= OLDEST:
        return None
    newer = ["python3.%d" % minor for minor in range(14, 10, -1)]
    found = [name for name in newer if find(name)]
    do = ["make PYTHON=%s" % found[0]] if found else packages("python3.11", "python3.11") + ["make PYTHON=python3.11"]
    return "python: found %s at %s, needed 3.11 or newer" % (HERE[6:], sys.executable), do


def check_venv():
    try:
        import ensurepip  # noqa: F401  (Debian ships venv without it, in two packages)
        import venv  # noqa: F401
    except ImportError as error:
        return "venv: %s" % error, packages(HERE + "-venv", "python3")
    return None


def check_header():
    import sysconfig

    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if os.path.isfile(header):
        return None
    return "Python.h: not found at %s" % header, packages(HERE + "-dev", "python3-devel")


def check_compiler():
    compiler = os.environ.get("CXX") or "g++"
    if not find(compiler.split()[0]) and not os.path.isfile(compiler.split()[0]):
        return "%s: not found in PATH" % compiler, packages("g++", "gcc-c++")
    probe = b"#include <thread>\nstatic_assert(__cplusplus >= 201703L);\nint main() {}\n"
    command = compiler.split() + ["-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = run.communicate(probe)[0].decode("utf-8", "replace").strip()
    if run.returncode:
        said = output.splitlines()[0] if output else "exit status %d" % run.returncode
        return "%s: cannot compile C++17: %s" % (compiler, said), packages("g++", "gcc-c++")
    return None


def main():
    checks = [check_python()]
    if checks[0] is None:
        checks += [check_venv(), check_header(), check_compiler()]
    missing = [check for check in checks if check]
    if not missing:
        return 0
    print("kvkern cannot be built here yet:", file=sys.stderr)
    for what, do in missing:
        print("  " + what, file=sys.stderr)
        for i, line in enumerate(do):
            print(("    do: " if i == 0 else "        ") + line, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
