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
import transformers

import kvkern

BENCH = Path(__file__).resolve().parent.parent / "bench"
OWN = ("harness", "peers", "bench_engine", "bench_document", "plot", "claims", "report")
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

    assert {name: len(found) for name, found in agents["seconds"].items()} == {
        "step": 3,
        "step_copied": 3,
        "load_copy": 3,
    }
    assert agents["agents"] == 3 and agents["from_scratch"].keys() == {"1"}  # two would take longer than no time at all
    for kind in ("", "_copied"):
        assert agents[f"step{kind}_per_agent_s"] == pytest.approx(
            statistics.median(agents["seconds"][f"step{kind}"]) / 3
        )
        # A whole answer would take longer than no time at all.
        assert agents[f"extend{kind}_s"] > 0 and agents[f"answer{kind}_s"] is None
    copies = agents["copies"]
    assert copies["measured"] and copies["needed_bytes"] == 3 * (128 + 32) * token <= copies["found_bytes"]
    assert agents["bytes_per_agent"] == 128 * token / 3 + 32 * token
    assert agents["bytes_per_agent_copied"] == (128 + 32) * token
    assert agents["scratch_per_agent_s"] == agents["from_scratch"]["1"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "paper" in printed[0] and "an agent, 1 at once" in printed[1]
    assert not list(tmp_path.rglob("*.kv"))

    # Taken up again: nothing is left to run, no model is made.
    monkeypatch.setattr(scripts["bench_document"], "Source", None)
    assert ran(scripts, monkeypatch, tmp_path / "out", *wanted) == file

    monkeypatch.setattr(scripts["report"], "ROOT", tmp_path)
    lines = scripts["report"].document_table(tmp_path / "out" / "document.json")
    rows = [line for line in lines if line.startswith("| 130 |") or line.startswith("| 3 |")]
    assert len(rows) == 2 and f"{length['ratios']['paper']:.1f}x" in rows[0]
    assert rows[1].count("not measured") == 2 and f"{agents['step_copied_per_agent_s'] * 1e3:.3f} ms" in rows[1]


def test_copies_that_do_not_fit_are_told_and_answers_are_whole_where_there_is_time(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The document is that of its own cell, and is not computed again."""
    published = []
    publish = kvkern.publish

    def counted(model: Any, tokenizer: Any, ids: list[int], **options: Any) -> kvkern.Document:
        published.append(len(ids))
        return publish(model, tokenizer, ids, **options)

    monkeypatch.setattr(kvkern, "publish", counted)
    argv = ["--lengths", "100", "--agents", "2", "3", "--document", "100", "--copies-gib", str(2 * 160 * 512 / 2**30)]
    argv += ["--part-seconds", "1e-9"]
    monkeypatch.setattr(scripts["bench_document"], "PATIENCE", 1e12)
    monkeypatch.setattr(scripts["bench_document"], "SCRATCH_PATIENCE", 1e12)
    shapes: list[tuple[Any, ...]] = []
    generate = transformers.GenerationMixin.generate

    def from_scratch(model: Any, ids: Any, **options: Any) -> Any:
        shapes.append((*ids.shape, options["max_new_tokens"], model.config._attn_implementation))
        return generate(model, ids, **options)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", from_scratch)
    _, two, three = ran(scripts, monkeypatch, tmp_path / "out", *argv)["results"]
    assert [two["copies"]["measured"], three["copies"]["measured"]] == [True, False]
    assert three["copies"] == {"measured": False, "needed_bytes": 3 * 160 * 512, "found_bytes": 2 * 160 * 512}
    assert three["seconds"]["step_copied"] == three["seconds"]["load_copy"] == []
    assert three["step_copied_per_agent_s"] is three["extend_copied_s"] is three["answer_copied_s"] is None
    # All steps, of which those in the samples are some.
    assert two["answer_s"] > sum(two["seconds"]["step"]) and three["answer_s"] > 0 and two["answer_copied_s"] > 0
    assert published.count(100) == 1
    # Document, question and answer without kvkern; the second number of agents asks for none that the first one has measured.
    answer = scripts["bench_document"].ANSWER
    assert shapes == [(1, 116, answer, "sdpa"), (2, 116, answer, "sdpa")]
    assert two["from_scratch"].keys() == {"1", "2"} and three["from_scratch"] == two["from_scratch"]
    assert two["scratch_per_agent_s"] == two["from_scratch"]["2"] / 2
    assert "not measured with copies: 240.0 KiB of 160.0 KiB" in capsys.readouterr().out.splitlines()[2]
    monkeypatch.setattr(scripts["report"], "ROOT", tmp_path)
    lines = scripts["report"].document_table(tmp_path / "out" / "document.json")
    (row,) = [line for line in lines if line.startswith("| 3 |")]
    assert (
        row.count("not measured: 0.0 of 0.0 GiB") == 2 and f"{(three['extend_s'] + three['answer_s']) / 3:.3f} s" in row
    )


def test_control_agents_that_answer_otherwise_over_copies_have_no_time(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that hold another document, whose sums are those that are wanted."""
    load = kvkern.load

    def other(path: Path, model: Any, tokenizer: Any) -> kvkern.Document:
        with load(path, model, tokenizer) as right:
            sums = right.sums
        wrong = kvkern.publish(model, tokenizer, list(range(300, 200, -1)))
        wrong._sums = sums
        return wrong

    monkeypatch.setattr(kvkern, "load", other)
    with pytest.raises(SystemExit, match="wrong result: an agent with a copy"):
        ran(scripts, monkeypatch, tmp_path / "out", "--agents", "3", "--document", "100")
    assert not (tmp_path / "out").exists()


def test_what_others_are_compared_with_comes_first(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    document = scripts["bench_document"]
    monkeypatch.setattr(sys, "argv", ["bench_document.py", "--device", "cpu", "--dtype", "float32"])
    bench = scripts["harness"].Bench.start("document", "", extra=document.options)
    cells = [(cell["part"], cell.get("B", cell["P"])) for cell in document.shapes(bench)]
    lengths = [("length", tokens) for tokens in document.LENGTHS]
    assert sorted(cells) == sorted(lengths + [("agents", agents) for agents in document.AGENTS])
    first = [("length", 255), ("length", 3774), ("agents", 1), ("agents", 64), ("agents", 1024)]
    assert cells[:5] == first and cells[5:9] == [*lengths[1:4], lengths[5]]


@pytest.mark.parametrize(
    ("argv", "sets", "dtype"),
    [
        ([], ["avx512bf16", "avx2"], "bfloat16"),
        ([], ["avx512", "avx2"], "float32"),
        (["--random-qwen3-4b"], ["avx512bf16"], "bfloat16"),
        (["--random-qwen3-4b", "--dtype", "bfloat16"], ["avx2"], "bfloat16"),
        (["--tiny"], ["avx512bf16"], "float32"),
        (["--dtype", "float32"], ["avx512bf16"], "float32"),
    ],
)
def test_a_cpu_takes_bf16_where_it_multiplies_it(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str], sets: list[str], dtype: str
) -> None:
    document = scripts["bench_document"]
    monkeypatch.setattr(sys, "argv", ["bench_document.py", "--device", "cpu", *argv])
    bench = scripts["harness"].Bench.start("document", "", extra=document.options)
    monkeypatch.setattr(document._C, "instruction_sets", lambda: sets)
    assert document.model_dtype(bench) == dtype


def test_a_random_model_is_drawn_once_in_its_dtype(scripts: Any) -> None:
    engine = scripts["bench_engine"]
    made = [
        engine.random_model({**engine.SMALL, "tie_word_embeddings": tied}, torch.device("cpu"), torch.bfloat16)
        for tied in (True, False)
    ]
    assert [model.lm_head.weight is model.model.embed_tokens.weight for model in made] == [True, False]
    for name, weight in made[1].named_parameters():
        assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            assert weight.float().std().item() == pytest.approx(0.2, rel=0.1), name
    assert made[0].model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


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
