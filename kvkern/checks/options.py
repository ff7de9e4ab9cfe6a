"""The options of `pytest --pyargs kvkern.checks`: a plugin, `-p kvkern.checks.options`.

pytest reads the conftest.py of a package that --pyargs names after it has parsed the command line, too late for its options.
Write --model=FOLDER: after a space pytest takes a folder for one with tests, too, when it looks for its rootdir.
"""

from __future__ import annotations

from typing import Any

OPTIONS = {
    "model": "Folder or name of a causal language model of transformers; by default a tiny random one.",
    "dtype": "auto, float32, float16 or bfloat16; by default float32 on a CPU, the checkpoint's on a GPU.",
    "device": "cpu, cuda or cuda:N; by default a GPU where there is one.",
    "backend": "triton, cpu or torch; by default the device decides.",
}


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("kvkern.checks")
    for name, words in OPTIONS.items():
        group.addoption(f"--{name}", dest=f"kvkern_{name}", default=None, help=words)
