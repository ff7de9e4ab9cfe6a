"""Which versions run: an environment that is meant for another Triton must not quietly be the first one.

And which tests run there: all that may depend on it, found in their source.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_users import uses_triton

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


# -- what runs on another Triton ---------------------------------------------------------------------------------------

HELPERS = {
    "direct.py": "def kernels():\n    import triton\n",
    "through.py": "from direct import kernels\n",
    "plain.py": '"""Says triton, and import triton."""\nimport torch\n# import triton\n',
}


def written(folder: Path, source: str) -> bool:
    for name, helper in HELPERS.items():
        (folder / name).write_text(helper)
    (folder / "test_new.py").write_text(source)
    return uses_triton(folder / "test_new.py", (folder,))


@pytest.mark.parametrize(
    "source",
    [
        "import triton.language as tl",
        "def test():\n    from triton import jit",
        "import through",
        "def test():\n    from direct import kernels",
        "def test(attend):\n    attend(backend='triton')",
        "PROGRAM = '''\n    import torch\n    import triton\n'''",
        "import importlib\n\nimportlib.import_module('through')",
        "from torch import compile",
        "import torch\n\nf = torch.compile(print)",
    ],
)
def test_a_test_that_names_triton_itself_or_through_a_helper_is_found(source: str, tmp_path: Path) -> None:
    assert written(tmp_path, source)


@pytest.mark.parametrize(
    "source", ["import plain", '"""As triton does it, see test_triton."""\nimport torch  # triton']
)
def test_control_a_comment_or_a_docstring_names_nothing(source: str, tmp_path: Path) -> None:
    assert not written(tmp_path, source)


def test_those_of_the_kernels_are_marked_and_those_of_csrc_are_not(request: pytest.FixtureRequest) -> None:
    here = Path(__file__).parent
    kernels = [
        *here.glob("test_triton*.py"),
        *here.glob("test_kernel_*.py"),
        here / "test_compile.py",
        here / "test_fuse.py",
    ]
    assert [path.name for path in kernels if not uses_triton(path)] == []
    assert not any(uses_triton(here / name) for name in ("test_native.py", "test_store.py", "test_scheduler.py"))
    assert request.node.get_closest_marker("triton")
