"""bench/bench_document.py: what a cell holds, that ratios follow from it, that a wrong document has no time. No time is asserted."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import kvkern

BENCH = Path(__file__).resolve().parent.parent / "bench"
OWN = ("harness", "bench_engine", "bench_document", "plot", "report")
TINY = ["--tiny", "--samples", "3", "--device", "cpu", "--part-seconds", "0"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, imported as `python bench/<script>` finds them, and gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    with torch.random.fork_rng():
        yield {name: __import__(name) for name in OWN}
    for name in OWN:
        del sys.modules[name]


def ran(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, out: Path, *argv: str) -> dict[str, Any]:
    """The file after one run; {} where there is none."""
    monkeypatch.setattr(
        sys, "argv", ["bench_document.py", *TINY, *argv, "--out", str(out), "--scratch", str(out.parent)]
    )
    monkeypatch.setattr(scripts["bench_document"], "ANSWER", 12)
    scripts["bench_document"].main()
    path = out / "document.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_cells_by_length_and_by_agents_hold_samples_and_what_follows_from_them(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--lengths", "130", "--agents", "3", "--document", "100"]
    file = ran(scripts, monkeypatch, tmp_path / "out", *wanted)
    assert "failed" not in file
    length, agents = file["results"]
    token = 2 * 2 * 2 * 16 * 4  # layers, K and V, kv heads, head_dim, bytes
    assert length["kv_bytes"] == 256 * token < length["file_bytes"] and length["text"] == "random tokens"
    s = length["seconds"]
    counts = {
        "prefill": 1,
        "save": 1,
        "load_cold": 1,
        "load_warm": 1,
        "attach": 1,
        "question": 1,
        "answer": 1,
        "step": 3,
    }
    assert {name: len(found) for name, found in s.items()} == {
        **counts,
        "forward": 1,
        "copy_pinned": 0,
        "copy_pageable": 0,
    }
    assert all(second > 0 for found in s.values() for second in found)
    assert s["forward"][0] < s["prefill"][0]
    (p,), (a,), (q,), (load,) = s["prefill"], s["answer"], s["question"], s[length["ratios"]["load"]]
    assert length["ratios"]["load"] == ("load_cold" if length["cold"] is True else "load_warm")
    assert length["ratios"]["paper"] == pytest.approx(p / statistics.median(s["step"]))
    assert length["ratios"]["reader"] == pytest.approx((p + q + a) / (load + q + a))
    assert length["ratios"]["host_1"] == pytest.approx(1)
    assert length["ratios"]["host_256"] == pytest.approx(256 * (p + q + a) / (p + 256 * (q + a)))

    assert len(agents["seconds"]["step"]) == 3 and agents["agents"] == 3 and agents["scratch_agents_measured"] == 1
    assert agents["bytes_per_agent"] == 128 * token / 3 + 32 * token
    assert agents["bytes_per_agent_copied"] == (128 + 32) * token
    assert agents["scratch_one_s"] == pytest.approx(sum(agents["scratch_one"].values()))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "paper" in printed[0] and "measured for one" in printed[1]
    assert not list(tmp_path.rglob("*.kv"))

    # Taken up again: nothing is left to run, no model is made.
    monkeypatch.setattr(scripts["bench_document"], "Source", None)
    assert ran(scripts, monkeypatch, tmp_path / "out", *wanted) == file

    monkeypatch.setattr(scripts["report"], "ROOT", tmp_path)
    lines = scripts["report"].document_table(tmp_path / "out" / "document.json")
    rows = [line for line in lines if line.startswith("| 130 |") or line.startswith("| 3 |")]
    assert len(rows) == 2 and f"{length['ratios']['paper']:.1f}x" in rows[0]


def test_a_document_that_does_not_fit_is_told_and_the_next_goes_on(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ran(scripts, monkeypatch, tmp_path / "out", "--lengths", "5000", "40")
    assert [result["document"] for result in file["results"]] == [40]
    (failed,) = file["failed"]
    assert failed["shape"]["P"] == 5000 and failed["reason"].startswith("CapacityError: document")


def test_control_a_file_that_gives_another_document_has_no_time(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, model: Any, tokenizer: Any, *, mmap: bool = False) -> kvkern.Document:
        return kvkern.publish(model, tokenizer, list(range(40)))

    monkeypatch.setattr(kvkern, "load", load)
    with pytest.raises(SystemExit, match="wrong result: a loaded document"):
        ran(scripts, monkeypatch, tmp_path / "out", "--lengths", "40")
    assert not (tmp_path / "out").exists()


def test_no_cell_begins_after_the_seconds(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(scripts, monkeypatch, tmp_path / "out", "--seconds", "0") == {}


def test_a_text_that_is_too_short_is_taken_again_and_said_so(scripts: Any) -> None:
    source = object.__new__(scripts["bench_document"].Source)
    source.random, source.text_ids = False, [5, 6, 7]
    assert source.document(3) == ([5, 6, 7], "gpl-3.txt, of 3 tokens")
    assert source.document(7) == ([5, 6, 7, 5, 6, 7, 5], "gpl-3.txt, of 3 tokens, 3 times over")


def test_a_file_in_memory_is_dropped_or_said_not_to_be(scripts: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert scripts["bench_document"].forget(path) in (True, False, None)
    assert path.read_bytes() == bytes(1 << 20)
