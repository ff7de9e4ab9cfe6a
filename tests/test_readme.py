"""The README says what the files say."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/report.py, imported as `python bench/report.py` finds it, with its --check on; gone afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    yield importlib.import_module("report")
    for name in ("plot", "claims", "report"):
        del sys.modules[name]


def test_the_tables_of_the_readme_are_those_of_the_result_files() -> None:
    command = [sys.executable, ROOT / "bench" / "report.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("README.md", "| ratio of the seconds | ", "| ratio of the seconds | 9"),
        ("docs/paper.md", "**does not hold**", "**holds**"),
        ("bench/results/nvidia-h100-80gb-hbm3/document.json", '"commit": "', '"commit": "9'),
    ],
)
def test_control_a_number_written_by_hand_is_caught(
    report: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    old: str,
    new: str,
) -> None:
    for folder in ("bench/results", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    stale = "" if name.endswith(".json") else f"{name}: "  # a commit stands in no table: this one has to pass
    assert report.main() == (1 if stale else 0)
    told = capsys.readouterr().err
    assert told.startswith(stale) and (not stale or "python bench/report.py" in told)


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {word for word in text.split("`") if "/" in word and word.endswith((".py", ".md")) and " " not in word}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_script_of_bench_is_in_the_map_and_every_script_of_the_map_is_there() -> None:
    _, rows = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## The benchmarks\n")
    named = {
        word for line in rows.splitlines() if line.startswith("|") for word in line.split("`") if word.endswith(".py")
    }
    assert named == {path.name for path in (ROOT / "bench").glob("*.py")}
