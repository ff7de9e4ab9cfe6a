"""bench/exactness.py: equal tokens are counted, another is named with its gap, and KV that was rounded is not the document's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
OWN = ("harness", "bench_engine", "exactness")
TINY = ["--tiny", "--device", "cpu", "--documents", "40", "--questions", "5", "--tokens", "6"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, imported as `python bench/<script>` finds them, and gone afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    with torch.random.fork_rng():
        yield {name: __import__(name) for name in OWN}
    for name in OWN:
        del sys.modules[name]


def ran(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, out: Path, *argv: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["exactness.py", *TINY, *argv, "--out", str(out)])
    scripts["exactness"].main()
    found: dict[str, Any] = json.loads((out / "exactness.json").read_text())
    return found


def test_answers_over_the_document_are_those_from_scratch_and_over_rounded_kv_they_are_compared(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ran(scripts, monkeypatch, tmp_path)
    results = {result["shape"]["way"]: result for result in file["results"]}
    order = "after another system prompt"
    assert list(results) == ["batch 256", "batch 1", *scripts["exactness"].FORMS, order, "bfloat16"]
    assert len(results[order]["flips"]) > 0 and results[order]["equal"] < results[order]["tokens"]
    for way in ("batch 256", "batch 1"):
        assert (results[way]["questions"], results[way]["tokens"], results[way]["equal"]) == (5, 30, 30), way
        assert results[way]["flips"] == []
    for way in scripts["exactness"].FORMS:
        found = results[way]
        assert found["equal"] == found["tokens"] - len(found["flips"]) and found["questions"] == 5
    errors = results["bfloat16"]
    assert all(0 < errors["mean_error"][how] < errors["max_error"][how] < 1 for how in ("kvkern", "sdpa"))
    # What the file holds is not run again.
    capsys.readouterr()
    assert ran(scripts, monkeypatch, tmp_path)["results"] == file["results"] and capsys.readouterr().out == ""


def test_control_an_answer_with_another_token_is_a_flip_with_its_gap(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = scripts["exactness"].answers

    def wrong(subject: Any, *args: Any, **options: Any) -> Any:
        found = right(subject, *args, **options)
        found[2][3] = (found[2][3] + 1) % subject.model.config.vocab_size
        return found

    monkeypatch.setattr(scripts["exactness"], "answers", wrong)
    monkeypatch.setattr(scripts["exactness"], "FORMS", {})
    result = ran(scripts, monkeypatch, tmp_path)["results"][0]
    (flip,) = result["flips"]
    assert (flip["question"], flip["token"]) == (2, 3) and flip["got"] != flip["wanted"] and flip["gap"] > 0
    # The two tokens after it are compared with nothing.
    assert (result["tokens"], result["equal"]) == (28, 27)


@pytest.mark.parametrize("seed", range(3))
def test_rounded_kv_is_within_half_a_step_and_channels_are_finer(scripts: Any, seed: int) -> None:
    x = torch.randn(2, 2, 3, 50, 8, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= 100  # a channel that decides the scale of the tensor
    whole, channels, eight = (form(x) for form in scripts["exactness"].FORMS.values())
    step = x.abs().amax((-3, -2, -1), keepdim=True) / 127
    assert ((whole - x).abs() <= 0.51 * step).all() and len((whole / step).round().unique()) <= 255
    own = x.abs().amax(-2, keepdim=True) / 127
    assert ((channels - x).abs() <= 0.51 * own).all() and (channels - x).norm() < (whole - x).norm()
    assert ((eight - x).abs() <= x.abs() / 16 + step).all() and (eight != x).any()
    zeros = torch.zeros(1, 2, 1, 3, 4)
    assert all(torch.equal(form(zeros), zeros) for form in scripts["exactness"].FORMS.values())
