"""docs/paper.md and its verdicts: claims of arXiv 2606.13361 against what files hold; and the command that measures them all."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
OWN = (
    "harness",
    "plot",
    "claims",
    "paper_words",
    "paper_draw",
    "paper_measured",
    "paper_report",
    "report",
    "bench_paper",
)


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of bench/, imported as `python bench/<script>` finds them, and gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield {name: __import__(name) for name in OWN}
        for name in OWN:
            del sys.modules[name]


@pytest.fixture(scope="module")
def claims(scripts: dict[str, ModuleType]) -> Any:
    return scripts["claims"]


def length(tokens: int, **seconds: float) -> dict[str, Any]:
    """A cell of document.json; a second where nothing else is said."""
    parts = ("prefill", "load_cold", "load_warm", "question", "answer", "step")
    given = {part: [seconds.get(part, 1.0)] for part in parts} | {
        "save": [1.0],
        "attach": [],
        "copy_pinned": [],
        "forward": [1.0],
    }
    paper = given["prefill"][0] / given["step"][0]
    hosts = {f"host_{n}": 1.5 for n in (1, 16, 256, 1024)}
    return {
        "shape": {"part": "length", "P": tokens, "model": "a-model", "dtype": "bfloat16"},
        "backend": "cpu",
        "document": tokens,
        "kv_bytes": 1000 * tokens,
        "file_bytes": 1000 * tokens + 100,
        "cold": True,
        "seconds": given,
        "ratios": {"paper": paper, "reader": 1.25, "load": "load_cold", **hosts},
    }


MACHINE = {
    "device": "cpu",
    "cpu": "A CPU",
    "threads": 2,
    "instruction_sets": ["avx2"],
    "python": "3.11",
    "versions": {"torch": "2", "kvkern": "0", "triton": "3", "transformers": "5"},
    "commit": "abc",
    "date": "2026-01-01",
}


def document(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"bench": "document", "machine": MACHINE, "results": list(cells)}


def tokens(part: str, way: str, questions: int, equal: int, compared: int) -> dict[str, Any]:
    shape = {"part": part, "P": 255, "way": way, "model": "a-model", "dtype": "float32", "new": 32}
    return {
        "shape": shape,
        "questions": questions,
        "tokens": compared,
        "equal": equal,
        "answer_tokens": 32 * questions,
        "refused": True,
    }


def folder_of(tmp_path: Path, name: str, **files: Any) -> Path:
    folder = tmp_path / "results" / name
    folder.mkdir(parents=True)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def by_key(claims: Any, found: list[Any], key: str) -> dict[str, Any]:
    (row,) = [row for row in claims.rows(found) if row["id"] == key]
    return row


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "paper", "holds", "fails"),
    [
        ("printed", {"digits": 2}, 1.02, [1.0205, 1.0151, 1.0249], [1.0251, 1.0149, 2.0]),
        ("equal", {}, 1.0, [1.0], [0.9999999, 1.0000001]),
        ("equal", {"tolerance": 0.1}, -10.0, [-9.1, -10.9], [-8.9, -11.1, 10.0]),
        ("at least", {"tolerance": 0.1}, 50.0, [45.0, 1e9], [44.9, 0.0]),
        ("at most", {}, 0.02, [0.02, 0.0], [0.0201]),
        ("below", {}, 1.0, [0.999], [1.0, 1.1]),
    ],
)
def test_a_verdict_turns_at_the_stated_tolerance(
    claims: Any, kind: str, options: dict[str, Any], paper: float, holds: list[float], fails: list[float]
) -> None:
    rule = claims.Rule(kind, **options)
    assert [rule.verdict(paper, ours) for ours in holds] == ["holds"] * len(holds)
    assert [rule.verdict(paper, ours) for ours in fails] == ["does not hold"] * len(fails)


@pytest.mark.parametrize("kind", ["printed", "equal", "at least", "at most", "below", "told"])
def test_what_was_not_measured_never_holds(claims: Any, kind: str) -> None:
    rule = claims.Rule(kind)
    assert rule.verdict(1.0, None) == rule.verdict(1.0, math.nan) == rule.verdict(None, None) == "not measured"
    assert rule.verdict(None, 1.0) == "told" and rule.text()


def test_claims_are_told_apart_and_know_what_is_missing(claims: Any) -> None:
    keys = [claim.key for claim in claims.CLAIMS]
    assert len(set(keys)) == len(keys) > 25
    empty = claims.Found("nothing")
    for claim in claims.CLAIMS:
        assert claim.group in claims.ABOUT and claim.ours(empty) is None, claim.key
        assert claims.judged(claim, empty) == ("not measured", "not measured"), claim.key


# -- the paper's own inputs --------------------------------------------------------------------------------------------


def test_every_figure_of_the_paper_follows_from_its_inputs_but_the_tariff_of_a_short_document(claims: Any) -> None:
    found = claims.findings([])
    own = [row for row in claims.rows(found) if row["ours"] and found[0].name in row["verdict"]]
    verdicts = {row["id"]: row["verdict"][found[0].name] for row in own}
    assert len(verdicts) == 9 and {key for key, verdict in verdicts.items() if verdict != "holds"} == {"tariff-255"}
    printed = {row["id"]: (row["paper"], row["ours"][found[0].name]) for row in own}
    assert printed["crowd-usd"] == ("$1.51 M", "$1.51 M") and printed["bytes"] == ("147,456", "147,456")


def test_control_another_input_turns_a_verdict(claims: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = claims.pricing.preset
    monkeypatch.setattr(claims.pricing, "preset", lambda name: preset(name) | {"prefill_price": 5.1, "egress_gb": 0.08})
    found = claims.findings([])
    for key in ("prefill-usd", "egress-usd", "egress-list", "crowd-usd"):
        assert by_key(claims, found, key)["verdict"][found[0].name] == "does not hold", key
    assert by_key(claims, found, "bytes")["verdict"][found[0].name] == "holds"


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_machines_numbers_come_from_its_file_and_its_verdicts_from_them(claims: Any, tmp_path: Path) -> None:
    cells = [length(255, prefill=2.0, step=0.25), length(3774, prefill=60.0, step=1.0, load_cold=3.0)]
    folder = folder_of(tmp_path, "a", document=document(*cells), other={"bench": "other"}, demo={"ratio": 71.25})
    found = claims.findings([folder])
    (one,) = found[1:]
    assert one.file == "bench/results/a/document.json" and one.name == "a-model, bfloat16; 2 threads of A CPU (avx2)"
    ours = {row["id"]: (row["ours"].get(one.name), row["verdict"].get(one.name)) for row in claims.rows(found)}
    assert ours["step-255"] == ("8.0x", "holds")  # 8.6 less a tenth is 7.74
    assert ours["step-3774"] == ("60.0x", "holds") and ours["reader-3774"] == ("1.25x", "does not hold")
    assert ours["even-3774"] == ("1.02", "holds")  # 60 / 59 = 1.0169
    assert ours["even-255"] == ("1.14", "does not hold")  # 2 / 1.75 = 1.1429, above 1.13 and half a percent
    assert ours["prefill-3774"] == ("60.00 s", "told")
    assert ours["tariff-own-255"] == ("12.5 %", "does not hold") and ours["disk-own"] == ("6.667 %", "holds")
    # 3,774,000 bytes at $0.09 for 10^9 against 60 s at $0.10 an hour
    assert ours["egress-own"] == ("0.2x", "does not hold")
    assert ours["tokens"] == ("not measured", "not measured") and ours["bytes"] == (None, None)
    found[1].prices = {"measured": [{"inputs": {"tokens": 255}, "break_even_reads": None, "by_seconds": None}]}
    assert claims.judged(next(c for c in claims.CLAIMS if c.key == "even-255"), one) == ("never", "does not hold")
    assert ours["demo"][1] == "not measured", "the demo is of the model of paper.json"


def test_paper_json_gives_every_claim_of_a_machine(claims: Any, tmp_path: Path) -> None:
    exact = [
        tokens("tokens", "batch 256", 10, 320, 320),
        tokens("tokens", "file", 10, 320, 320),
        tokens("rounded", "int8 per tensor", 2, 16, 18),
        tokens("rounded", "int8 per channel", 2, 64, 64),
        tokens("rounded", "fp8 e4m3 per tensor", 2, 32, 34),
        tokens("order", "after another system prompt", 2, 16, 18),
        tokens("template", "another marker", 2, 48, 50),
        tokens("tokenizer", "numbers cut into digits", 1, 32, 32),
        tokens("tokenizer", "a word more", 1, 0, 1),
    ]
    exact += [
        {"shape": {"part": "logits", "P": 255, "way": dtype}, "difference": 0.015625}
        for dtype in ("float16", "bfloat16", "float32")
    ]
    totals = {"prefill": 100.0, "shared": 10.0, "copies": 20.0, "ship": 300.0}
    crowd = {"results": [{"policy": name, "dollars": {"total": total}} for name, total in totals.items()]}
    saved = {"above_1_gb_per_s": True, "smaller": 0.25}
    kept = [{"shape": {"dtype": dtype}, "verdicts": {"all": saved}} for dtype in ("bfloat16", "float16", "float32")]
    steps = {
        "judged": [{"use": "fit", "error": 0.5}, {"use": "judge", "error": -0.0625}, {"use": "judge", "error": 0.03}]
    }
    parts = {
        "document": document(length(255, prefill=2.0), length(3774, prefill=2.0)),
        "exactness": {"results": exact},
        "compression": {"results": kept},
        "steps": steps,
        "simulation": crowd,
        "simulation_measured": crowd,
    }
    plain = folder_of(tmp_path, "plain", document=parts["document"])
    parts["prices"] = claims.presets() | {"measured": claims.prices(plain / "document.json", 1.0)}
    folder = folder_of(tmp_path, "b", paper={"parts": parts, "settings": {"model": "a-model"}}, demo={"ratio": 71.25})
    found = claims.findings([folder])
    (one,) = found[1:]
    ours = {row["id"]: row["ours"][one.name] for row in claims.rows(found) if one.name in row["ours"]}
    assert "not measured" not in ours.values(), ours
    assert (
        ours["tokens"] == "100 % (640 tokens of 20 answers)"
        and ours["int8"] == "25 %"
        and ours["order"] == "25 %"
        and ours["fp8"] == "50 %"
    )
    assert ours["crowd-shared"] == "10.0x" and ours["crowd-ship-prefill"] == "3.00x" and ours["crowd-copies"] == "2.00x"
    assert ours["predicted"] == "6.25 %" and ours["logits-16"] == "0.0156" and ours["demo"] == "71.2x"
    assert ours["refused"] == "100 %" and ours["template"] == "75 %" and ours["tokenizer"] == "50 %"
    one.exactness["results"][1]["equal"] -= 1
    assert by_key(claims, found, "tokens")["verdict"][one.name] == "does not hold", "one token of 640 is enough"
    one.exactness["results"][5]["refused"] = False
    assert by_key(claims, found, "refused")["verdict"][one.name] == "does not hold"


def test_the_page_has_a_column_for_each_file_and_every_number_of_it(claims: Any, tmp_path: Path) -> None:
    a = folder_of(tmp_path, "a", document=document(length(255, prefill=9.5)))
    b = folder_of(tmp_path, "b", document=document(length(3774, prefill=33.0)))
    found = claims.findings([a, b])
    text = claims.page(found)
    assert "| B | a-model, bfloat16; 2 threads of A CPU (avx2) | `bench/results/a/document.json` |" in text
    assert "| C | a-model, bfloat16; 2 threads of A CPU (avx2) (b/document) |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| Prefill of 255 tokens")]
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["8.6x", "9.5x: **holds**", "not measured"], row
    for group, about in claims.ABOUT.items():
        assert f"## {group}" in text and about in text
    for made in claims.rows(found):
        assert f"| {made['claim']} |" in text
    widths = [len(re.findall(r"\|", line)) for line in text.splitlines() if line.startswith("|")]
    assert min(widths) >= 4


# -- the command -------------------------------------------------------------------------------------------------------


class Parts:
    """Scripts that write a line and a file, in the place of those that measure."""

    def __init__(self, scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paper, self.log, self.out = scripts["bench_paper"], tmp_path / "log", tmp_path / "out"
        self.failing: set[str] = set()
        self.contents: dict[str, Any] = {part.name: {"results": []} for part in self.paper.PARTS}
        self.contents["document"] = document(length(255, prefill=10.0))
        monkeypatch.setattr(self.paper, "ROOT", tmp_path)
        monkeypatch.setattr(scripts["report"], "ROOT", tmp_path)
        monkeypatch.setattr(self.paper, "command", self.command)

    def command(self, part: Any, chosen: Any, folder: Path) -> list[str]:
        if part.name in self.failing:
            return [sys.executable, "-c", "raise SystemExit(3)"]
        code = (
            f"open({str(self.log)!r}, 'a').write({part.name + chr(10)!r});"
            f"open({str(folder / part.file)!r}, 'w').write({json.dumps(self.contents[part.name])!r})"
        )
        return [sys.executable, "-c", code]

    def run(self, *argv: str) -> int:
        status: int = self.paper.main(["--out", str(self.out), *argv])
        return status

    def ran(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def file(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "paper.json").read_text())
        return found


@pytest.fixture
def parts(scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    return Parts(scripts, tmp_path, monkeypatch)


def test_a_part_that_fails_is_named_and_measured_by_the_next_run(
    parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    parts.failing = {"exactness", "steps"}
    assert parts.run() == 1
    file = parts.file()
    assert (
        parts.ran() == ["document", "compression", "simulation"] == [name for name in file["parts"] if name != "prices"]
    )
    assert file["missing"] == {
        "exactness": "exactness.py ended with status 3",
        "steps": "simulate.py ended with status 3",
        "simulation_measured": "needs steps, which is not there",
    }
    assert "exactness: not measured: exactness.py ended with status 3" in capsys.readouterr().err
    assert file["settings"]["machine_hour"] == parts.paper.claims.MACHINE_HOUR["cpu"]
    (priced,) = file["parts"]["prices"]["measured"]
    assert priced["inputs"]["tokens"] == 255 and priced["inputs"]["gpu_hour"] == file["settings"]["machine_hour"]
    html = (parts.out / "report.html").read_text()
    assert "10.0x" in html and "not measured" in html and "<svg" in (parts.out / "paper.svg").read_text()
    parts.failing = set()
    assert parts.run() == 0 and parts.file()["missing"] == {}
    # Those that limit themselves are asked whether they have cells left; the others are there or not.
    assert parts.ran()[3:] == ["document", "exactness", "compression", "steps", "simulation_measured"]
    assert set(parts.file()["seconds"]) == set(parts.contents)


def test_again_forgets_and_only_measures_what_it_names(parts: Parts) -> None:
    assert parts.run("--only", "document", "simulation") == 0 and parts.ran() == ["document", "simulation"]
    assert parts.file()["missing"]["exactness"] == "not run"
    assert parts.run("--only", "simulation", "--again") == 0 and parts.ran() == ["document", "simulation", "simulation"]
    assert "document" not in parts.file()["parts"]


def test_the_seconds_of_a_part_are_of_all_runs_that_its_file_is_of(parts: Parts) -> None:
    assert parts.run("--only", "document") == 0
    (folder,) = (parts.paper.ROOT / "build" / "paper").iterdir()
    (folder / "seconds.json").write_text('{"document": 1000.0}')
    assert parts.run("--only", "document") == 0 and parts.file()["seconds"]["document"] > 1000
    (folder / "document.json").unlink()
    assert parts.run("--only", "document") == 0 and parts.file()["seconds"]["document"] < 1000


def test_a_stopped_run_writes_nothing_and_keeps_what_was_measured(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = parts.paper.subprocess.run

    def stopped(command: list[str], **options: Any) -> Any:
        if "exactness.json" in command[-1]:
            raise KeyboardInterrupt
        return right(command, **options)

    with monkeypatch.context() as patch:
        patch.setattr(parts.paper.subprocess, "run", stopped)
        assert parts.run() == 130 and not (parts.out / "paper.json").exists() and parts.ran() == ["document"]
    assert parts.run() == 0 and parts.ran().count("simulation") == 1


def test_every_part_is_asked_in_its_own_scripts_words(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    paper = scripts["bench_paper"]
    chosen = paper.options().parse_args(["--model", "/models/one", "--dtype", "bfloat16", "--full", "--device", "cpu"])
    lines = {part.name: paper.command(part, chosen, tmp_path)[1:] for part in paper.PARTS}
    assert [Path(line[0]).name for line in lines.values()] == [part.script for part in paper.PARTS]
    assert all(Path(line[0]).is_file() for line in lines.values())
    assert (
        "--seconds" not in lines["exactness"] and "--full" in lines["exactness"] and "--full" not in lines["document"]
    )
    for name in ("document", "exactness", "compression", "steps"):
        assert lines[name][lines[name].index("--model") + 1] == "/models/one", name
    assert "--model" not in lines["simulation"] and "--gpu-hour" not in lines["simulation"]
    assert lines["simulation_measured"][-4:] == ["--steps", str(tmp_path / "steps.json"), "--gpu-hour", "0.1"]


@pytest.mark.full
def test_all_of_it_runs_on_small_models(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = scripts["bench_paper"]
    monkeypatch.setattr(paper, "here", lambda: tmp_path / "here")
    assert paper.main(["--tiny", "--again", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    file = json.loads((tmp_path / "out" / "paper.json").read_text())
    assert file["missing"] == {} and set(file["parts"]) == {part.name for part in paper.PARTS} | {"prices"}
    found = scripts["claims"].of_paper(file)
    verdicts = {row["id"]: row["verdict"].get(found.name) for row in scripts["claims"].rows([found])}
    assert verdicts["tokens"] == "holds" and verdicts["crowd-ship"] == "holds"
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
