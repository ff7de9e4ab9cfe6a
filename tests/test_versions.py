"""Which versions run: an environment that is meant for another Triton must not quietly be the first one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "KVKERN_EXPECT_TRITON"
"""The version of Triton that this environment was made for; make test-full sets it."""

SAY = "import triton, kvkern, kvkern._C; print(triton.__version__, kvkern.__file__, kvkern._C.__file__, sep='\\n')"


@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} is not set: any version will do")
def test_triton_is_the_expected_one_here_and_in_processes_that_tests_start(tmp_path: Path) -> None:
    expected = os.environ[VARIABLE]
    assert importlib.metadata.version("triton") == expected
    child = subprocess.run([sys.executable, "-c", SAY], cwd=tmp_path, capture_output=True, text=True, check=True)
    version, *files = child.stdout.splitlines()
    assert version == expected
    assert all(Path(file).parent == ROOT / "kvkern" for file in files), files


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_control_another_version_than_the_expected_one_is_caught() -> None:
    node = "tests/test_versions.py::test_triton_is_the_expected_one_here_and_in_processes_that_tests_start"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", node],
        cwd=ROOT,
        env=os.environ | {VARIABLE: "0.0"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == pytest.ExitCode.TESTS_FAILED, child.stdout
    assert "== '0.0'" in child.stdout
