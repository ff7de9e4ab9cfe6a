"""Names what is missing to build kvkern, before anything is downloaded. Standard library only.

    $ python3 .ci/preflight.py
    kvkern cannot be built here yet:
      g++: not found in PATH
        do: apt-get install g++                (Debian, Ubuntu)
            dnf install gcc-c++                (Fedora)

Exit 0 when all is there, 1 otherwise. Its syntax is old enough for a python that is itself too old to say so.
"""

import os
import shutil
import subprocess
import sys
import sysconfig

OLDEST = (3, 11)
VERSION = "{}.{}".format(*sys.version_info[:2])


def packages(debian, fedora):
    return [f"apt-get install {debian:22} (Debian, Ubuntu)", f"dnf install {fedora:26} (Fedora)"]


def check_python():
    if sys.version_info[:2] >= OLDEST:
        return None
    newer = [f"python3.{minor}" for minor in range(14, 10, -1) if shutil.which(f"python3.{minor}")]
    name = newer[0] if newer else "python3.11"
    do = [] if newer else packages("python3.11", "python3.11")
    return f"python: found {VERSION} at {sys.executable}, needed 3.11 or newer", [*do, f"make PYTHON={name} ..."]


def check_venv():
    try:
        # Debian ships venv without ensurepip, which comes in a package of its own.
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        return f"venv: {error}", packages(f"python{VERSION}-venv", "python3")
    return None


def check_header():
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if os.path.isfile(header):
        return None
    return f"Python.h: not found at {header}", packages(f"python{VERSION}-dev", "python3-devel")


def check_compiler():
    compiler = (os.environ.get("CXX") or "g++").split()
    if not shutil.which(compiler[0]):
        return f"{compiler[0]}: not found in PATH", packages("g++", "gcc-c++")
    probe = "#include <thread>\nstatic_assert(__cplusplus >= 201703L);\nint main() {}\n"
    command = [*compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    run = subprocess.run(command, input=probe, text=True, capture_output=True)
    if run.returncode == 0:
        return None
    said = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[0]
    return f"{compiler[0]}: cannot compile C++17: {said}", packages("g++", "gcc-c++")


def main():
    too_old = check_python()
    checks = [too_old] if too_old else [check_venv(), check_header(), check_compiler()]
    missing = [check for check in checks if check]
    if not missing:
        return 0
    print("kvkern cannot be built here yet:", file=sys.stderr)
    for what, do in missing:
        print(f"  {what}", file=sys.stderr)
        for i, line in enumerate(do):
            print(("    do: " if i == 0 else "        ") + line, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
