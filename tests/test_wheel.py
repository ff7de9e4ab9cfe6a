"""The wheel that users get: built without a network, complete, and of use outside the source tree."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kvkern")


def run(*command: object, cwd: Path, **env: str) -> str:
    # Nothing may be fetched, and no setting of the surrounding pip may help.
    alone = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | alone | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder: Path) -> None:
    """A copy of the sources -> folder/wheels/kvkern-*.whl -> folder/site. A copy, so that no old build/ is packed."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.kv"))
        elif source.exists():
            shutil.copy(source, tree / name)
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "wheels", tree, cwd=folder)
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel_in(folder), cwd=folder)
    shutil.rmtree(tree)


def wheel_in(folder: Path) -> Path:
    (wheel,) = (folder / "wheels").glob("kvkern-*.whl")
    return wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the installed package, made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "wheel"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            build(folder)
            (folder / "done").touch()
    return folder


def test_the_wheel_holds_every_module_the_data_the_types_and_one_extension(built: Path) -> None:
    with zipfile.ZipFile(wheel_in(built)) as wheel:
        names = set(wheel.namelist())
    package = ROOT / "kvkern"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in [*package.rglob("*.py"), *package.glob("data/*"), package / "py.typed", package / "_C.pyi"]
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.startswith("kvkern/data/") for name in wanted)
    assert {"kvkern/checks/conftest.py", "kvkern/checks/test_bits.py"} < wanted <= names, sorted(wanted - names)
    assert len([name for name in names if name.endswith(".so")]) == 1
    strangers = [name for name in names if not name.startswith("kvkern/") and ".dist-info/" not in name]
    assert not strangers


def test_the_wheel_says_what_it_needs(built: Path) -> None:
    with zipfile.ZipFile(wheel_in(built)) as wheel:
        (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    needs = metadata.get_all("Requires-Dist") or []
    assert metadata["Name"] == "kvkern" and metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0" and "Apache License" in licence
    assert "torch>=2.11" in needs
    assert any(need.startswith("triton") and "Linux" in need for need in needs)
    assert "kvkern = kvkern.cli:main" in scripts


SMOKE = """
import sys
from pathlib import Path
import torch
import kvkern
from kvkern import _C

site = Path(sys.argv[1])
for module in (kvkern, _C):
    assert site in Path(module.__file__).resolve().parents, module.__file__

torch.manual_seed(0)
q = torch.randn(2, 4, 32)
k_prefix, v_prefix = torch.randn(2, 40, 2, 32)
k_suffix, v_suffix = torch.randn(2, 2, 5, 2, 32)
seq_lens = torch.tensor([5, 3], dtype=torch.int32)
out = kvkern.attend(q, k_prefix, v_prefix, k_suffix, v_suffix, seq_lens)
for agent, length in enumerate(seq_lens.tolist()):
    k = torch.cat([k_prefix, k_suffix[agent, :length]]).repeat_interleave(2, 1).double()
    v = torch.cat([v_prefix, v_suffix[agent, :length]]).repeat_interleave(2, 1).double()
    weights = torch.einsum("hd,nhd->hn", q[agent].double(), k).mul(32**-0.5).softmax(-1)
    torch.testing.assert_close(out[agent].double(), torch.einsum("hn,nhd->hd", weights, v), atol=1e-5, rtol=1e-5)
print("attended")
"""


def test_the_installed_wheel_attends_outside_the_source_tree(built: Path, tmp_path: Path) -> None:
    site = built / "site"
    said = run(sys.executable, "-c", SMOKE, site.resolve(), cwd=tmp_path, PYTHONPATH=str(site), OMP_NUM_THREADS="1")
    assert said.split() == ["attended"]


def test_the_installed_command_runs_outside_the_source_tree(built: Path, tmp_path: Path) -> None:
    site = built / "site"
    said = run(site / "bin" / "kvkern", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "publish" in said and "ask" in said


def test_plain_pytest_finds_the_checks_of_the_installed_wheel_and_knows_their_options(
    built: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    command += ["--pyargs", "kvkern.checks", "--model=none"]
    said = run(*command, "-p", "kvkern.checks.options", cwd=tmp_path, PYTHONPATH=str(built / "site"))
    for path in (built / "site" / "kvkern" / "checks").glob("test_*.py"):
        assert f"{path.name}::test_control" in said, said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        AssertionError, match="unrecognized arguments: --model"
    ):  # a control: it is the plugin that knows
        run(*command, cwd=tmp_path, PYTHONPATH=str(built / "site"))
