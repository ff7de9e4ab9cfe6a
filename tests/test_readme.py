"""The README says what the files say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, folder / "bench" / "report.py", "--check"], capture_output=True, text=True)


def test_the_tables_of_the_readme_are_those_of_the_result_files() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def test_control_a_number_written_by_hand_is_caught(tmp_path: Path) -> None:
    for folder in ("bench", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(
        text.replace("| ratio of the seconds | ", "| ratio of the seconds | 9"), encoding="utf-8"
    )
    done = check(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("README.md: ") and "python bench/report.py" in done.stderr
    page = tmp_path / "docs" / "paper.md"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert check(tmp_path).returncode == 0
    page.write_text(page.read_text(encoding="utf-8").replace("does not hold", "holds"), encoding="utf-8")
    done = check(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("docs/paper.md: ")


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {word for word in text.split("`") if "/" in word and word.endswith((".py", ".md")) and " " not in word}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
