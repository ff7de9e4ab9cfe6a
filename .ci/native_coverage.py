"""Build csrc/ once more, instrumented, in a copy of the tree, and run the tests that use it there.

    python .ci/native_coverage.py FOLDER [arguments of pytest]

The copy is FOLDER/tree, so that the package's own extension stays as it is; gcov's counts lie beside the objects, for
coverage_report.py. The flags that decide how csrc/ rounds are those of setup.py. Not optimised much, and nothing inlined, so
that a count belongs to the line that it stands at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_native.py", "test_rows.py", "test_binding.py", "test_cpu.py", "test_prefix.py", "test_store.py")
"""Those that are about csrc/; the others come to it by the same calls."""


def main(folder: Path, *options: str) -> int:
    tree = folder.resolve() / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)

    # g++, whose gcov reads the counts, whatever else builds the package. Threads count without losing any.
    flags = "-O1 -fno-inline --coverage -fprofile-update=atomic"
    build = os.environ | {"CXX": "g++", "CXXFLAGS": flags, "LDFLAGS": "--coverage"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=build, check=True)

    env = os.environ | {"PYTHONPATH": str(tree)}
    where = subprocess.run(
        [sys.executable, "-c", "import kvkern._C; print(kvkern._C.__file__)"],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if not Path(where).is_relative_to(tree):
        print(f"{where} would be tested, not what was built in {tree}", file=sys.stderr)
        return 1
    tests = [f"tests/{name}" for name in TESTS]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=tree, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
