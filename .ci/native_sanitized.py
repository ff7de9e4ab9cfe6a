"""Build csrc/ once more with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree, and run its tests there.

    python .ci/native_sanitized.py FOLDER [arguments of pytest]
    python .ci/native_sanitized.py                               only asks whether g++ has what this needs

The copy is FOLDER/tree, so that the package's own extension stays as it is. A report ends the process that it is about, and the
test with it; it goes to stderr, whatever pytest captures. First the same build has to report a read behind a tensor and an
overflow, in calls that no check can refuse; where it reports neither, a passing test would say nothing.

Torch and Python are as they are elsewhere: their memory comes from the sanitizer's allocator, with bands around each piece, but
only what csrc/ reads and writes is looked at. What they leave behind at the end is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_binding.py", "test_native.py", "test_rows.py", "test_cpu.py", "test_native_bits.py", "test_prefix.py")
LEFT_OUT = (
    "2_to_the_31_elements_apart",  # gigabytes, each with an eighth more to say which are whose
    "1_to_130",  # one claim in hundreds of calls
    "in_any_lane_of_any_group",
    "at_a_time_and_all_at_once",
    "threads_walk_a_long_node",
)
"""Words of those tests that take long and come to no line that others do not come to."""
RUNTIMES = ("libasan.so", "libubsan.so")
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"

CONTROL = """
import sys
import torch
from kvkern import _C
count, stride = {"nothing": (64, 1), "behind": (65, 1), "overflow": (64, 2**62)}[sys.argv[1]]
x, y, pages = torch.zeros(64), torch.zeros(65), torch.zeros(64)
table, seq_lens, row_slot, row_back = (torch.tensor(t, dtype=torch.int32) for t in ([0, 0, 0], [1, 1, 1], [2], [0]))
_C.exp2(x.data_ptr(), y.data_ptr(), count)
_C.append(x.data_ptr(), x.data_ptr(), pages.data_ptr(), pages.data_ptr(), table.data_ptr(), seq_lens.data_ptr(),
          row_slot.data_ptr(), row_back.data_ptr(), rows=1, num_kv_heads=1, row_bytes=4, k_strides=(4, 4), v_strides=(4, 4),
          k_page_strides=(4, 4, 4), v_page_strides=(4, 4, 4), num_pages=1, page_tokens=16, slots=3, table_width=1,
          table_stride=stride)
print(_C.__file__)
"""
CONTROLS = {"nothing": "", "behind": "heap-buffer-overflow", "overflow": "signed integer overflow"}
"""What is done wrong, and what has to be said about it."""


def runtime(name: str) -> str:
    """The path of one of g++'s libraries. Ends the program where there is none."""
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():  # its name alone, where it is not found
        sys.exit(
            f"{name}: not found by g++\n"
            "  do: apt-get install gcc                 (Debian, Ubuntu)\n"
            "      dnf install libasan libubsan        (Fedora)"
        )
    return path


def build(tree: Path) -> None:
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("csrc", "kvkern", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)
    # Instrumented code warns of what the code as it is does not: no warning is an error here.
    env = os.environ | {
        "CXX": "g++",
        "CXXFLAGS": FLAGS,
        "LDFLAGS": "-fsanitize=address,undefined",
        "KVKERN_WERROR": "0",
    }
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=env, check=True)


def controls_fail(tree: Path, env: dict[str, str]) -> bool:
    """Whether a mistake is reported, by its name, and a program without one is not."""
    good = True
    for mistake, words in CONTROLS.items():
        control = [sys.executable, "-c", CONTROL, mistake]
        done = subprocess.run(control, cwd=tree, env=env, capture_output=True, text=True)
        if words:
            right = done.returncode != 0 and words in done.stderr
        else:
            right = done.returncode == 0 and Path(done.stdout.strip()).is_relative_to(tree)
        print(
            f"control: {mistake:10} {'as it should be' if right else 'NOT AS IT SHOULD BE'}: {words or 'no report'}",
            flush=True,
        )
        if not right:
            print(f"status {done.returncode}\n{done.stdout}{done.stderr}", file=sys.stderr)
        good = good and right
    return good


def main(*arguments: str) -> int:
    if not shutil.which("g++"):
        sys.exit(
            "g++: not found in PATH\n  do: apt-get install g++    (Debian, Ubuntu)\n      dnf install gcc-c++    (Fedora)"
        )
    address, _ = (runtime(name) for name in RUNTIMES)
    if not arguments:
        return 0
    tree, options = Path(arguments[0]).resolve() / "tree", arguments[1:]
    build(tree)
    env = os.environ | {
        "PYTHONPATH": str(tree),
        # Before all else, or it refuses to run; and with what throws exceptions, which Python itself does not load.
        "LD_PRELOAD": f"{address} {runtime('libstdc++.so')}",
        # Tests send themselves SIGSEGV, and ask for more memory than there is. Torch's own new and delete are not looked at.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:allocator_may_return_null=1:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    if not controls_fail(tree, env):
        return 1
    chosen = ["-k", " and ".join(f"not {words}" for words in LEFT_OUT), *(f"tests/{name}" for name in TESTS)]
    command = [sys.executable, "-m", "pytest", "--capture=sys", *options, *chosen]
    return subprocess.run(command, cwd=tree, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
