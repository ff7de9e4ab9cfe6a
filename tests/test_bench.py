"""bench/bench_layer.py on one small cell: what its file holds, and that it is taken up again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


def layer(out: Path) -> subprocess.CompletedProcess[str]:
    """One cell in a process of its own."""
    script = "import bench_layer\nbench_layer.main()\n"
    shape = ["--cell", "3", "100", "20", "--heads", "4", "2", "64", "--samples", "3", "--device", "cpu"]
    command = [sys.executable, "-c", script, *shape, "--out", str(out)]
    return subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False)


@pytest.mark.full
def test_a_cell_keeps_every_sample_and_is_not_run_again(tmp_path: Path) -> None:
    done = layer(tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "layer.json").read_text()
    (result,) = json.loads(text)["results"]
    assert {"device", "cpu", "versions", "commit"} <= json.loads(text)["machine"].keys()
    assert {name: len(samples) for name, samples in result["seconds"].items()} == {"kvkern": 3, "gemm": 3}
    assert result["flop"] == 4 * 3 * 4 * 64 * 120 and result["bytes"] == 2 * 2 * 64 * 2 * (100 + 3 * 20)
    again = layer(tmp_path)
    assert again.returncode == 0 and again.stdout == "", again.stdout + again.stderr
    assert (tmp_path / "layer.json").read_text() == text
