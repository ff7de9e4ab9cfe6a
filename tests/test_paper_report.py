"""bench/paper_report.py: the page is whole, needs nothing else, holds the medians it names, and says what was not measured."""

from __future__ import annotations

import copy
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvkern import pricing

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import paper_measured
import paper_report
from paper_words import digits, seconds

MODEL = 'm<&>"x'
VOID = {"meta", "br"}


def length(tokens: int, prefill: list[float], ratio: float) -> dict[str, Any]:
    times = {"prefill": prefill, "load_cold": [0.25, 0.5, 0.75], "load_warm": [0.125], "attach": [], "copy_pinned": []}
    times |= {"question": [0.0625, 0.0627], "step": [0.02, 0.021, 0.022], "answer": [1.5], "forward": [0.1]}
    ratios = {"paper": ratio, "reader": 1.25, "load": "load_cold", "host_1": 1.0, "host_16": 2.0}
    shape = {"part": "length", "P": tokens, "model": MODEL, "dtype": "float32"}
    return {
        "shape": shape,
        "document": tokens,
        "kv_bytes": tokens * 1024,
        "cold": None,
        "seconds": times,
        "ratios": ratios,
    }


def agents(count: int, **times: list[float]) -> dict[str, Any]:
    shape = {"part": "agents", "B": count, "P": 3774, "model": MODEL, "dtype": "float32"}
    copies = {"measured": count == 1, "needed_bytes": 3 << 30, "found_bytes": 2 << 30}
    sizes: dict[str, Any] = {"copies": copies, "extend_s": 0.75, "answer_s": None}
    sizes |= {
        "bytes_per_agent": 2.0**20 / count,
        "bytes_per_agent_copied": 2.0**20,
        "scratch_per_agent_s": 6.4,
        "from_scratch": {"1": 6.4},
    }
    return {
        "shape": shape,
        "agents": count,
        "document": 3774,
        "seconds": times,
        "step_per_agent_s": 0.5 / count,
        **sizes,
    }


def answers(part: str, way: str, equal: int, *gaps: float, **beside: Any) -> dict[str, Any]:
    shape = {"part": part, "P": 255, "way": way, "model": MODEL, "dtype": "float32"}
    return {
        "shape": shape,
        "questions": 7,
        "tokens": 224,
        "equal": equal,
        "flips": [{"gap": g} for g in gaps],
        **beside,
    }


def packed(form: str, smaller: float, speed: float) -> dict[str, Any]:
    verdict = {"smaller": smaller, "bytes_per_s": speed, "pays": smaller >= 0.2, "steady": True}
    return {
        "shape": {"model": MODEL, "P": 255, "dtype": "bfloat16", "form": form, "codec": "lz4"},
        "before": {"K": 10**9, "V": 10**9},
        "core_seconds": {"compress_K": [2.0], "compress_V": [3.0]},
        "disk": {"bytes": 10**9, "seconds": [0.5], "cold": True},
        "verdicts": {"all": verdict, "K": verdict, "V": verdict},
    }


def policy(name: str, total: float) -> dict[str, Any]:
    waits = {"first_p50_s": 0.1, "first_p99_s": 0.3, "answer_p50_s": 2.5, "answer_p99_s": None}
    return {
        "policy": name,
        "replicas": 3,
        "gpu_hours": total / 3,
        "busy_gpu_hours": {"value": total / 6, "error": 0.01},
        "dollars": {"gpu": total, "egress": 0.0, "total": total, "per_million_agents": total / 80},
        "estimates": {key: {"value": value, "error": None} for key, value in waits.items()},
        "agents_simulated": 12345,
    }


def priced(tokens: int) -> dict[str, Any]:
    inputs, origin, _ = pricing.gather({"tokens": tokens, "gpu_hour": 3.0}, preset_name="list")
    return pricing.fields(inputs, origin)


def judged(use: str, measured: float) -> dict[str, Any]:
    sizes = {"agents": 64, "document": 512, "question": 16, "answer": 24}
    return {"use": use, **sizes, "predicted_s": 10.0, "measured_s": measured, "error": 10 / measured - 1}


PAPER: dict[str, Any] = {
    "machine": {"cpu": "a CPU", "threads": 2, "versions": {"torch": "2.13"}, "commit": "abc", "date": "2026-11-27"},
    "settings": {"full": False},
    "seconds": {"document": 75.0},
    "missing": {"simulation_measured": "stopped <early>"},
    "parts": {
        "document": {
            "machine": {"cpu": "another CPU", "threads": 4},
            "results": [
                length(3774, [8.0, 9.0, 12.0], 428.6),
                length(255, [0.4, 0.375], 18.5),
                agents(16, step=[0.5, 0.625], step_unheard_of=[4.0], step_copied=[], load_copy=[]),
                agents(1, step=[0.03125], step_copied=[0.0275, 0.0325]),
            ],
        },
        "exactness": {
            "results": [
                answers("tokens", "batch 256", 223, 0.00031),
                answers("rounded", "int8 per tensor", 100, 0.0, 0.5),
                answers(
                    "order",
                    "after another system prompt",
                    51,
                    2.25,
                    refused=True,
                    error="RequestError",
                    field="token_ids",
                ),
                answers(
                    "template",
                    "another",
                    224,
                    refused=True,
                    error="IdentityError",
                    field="template",
                    first_tokens_other=3,
                ),
                answers("unchanged", "the same", 224, refused=False, asked=1000),
                {
                    "shape": {"part": "unheard of", "P": 255, "way": "else", "model": MODEL, "dtype": "float32"},
                    "other": 1,
                },
                {
                    "shape": {"part": "logits", "P": 255, "way": "bfloat16", "model": MODEL, "dtype": "float32"},
                    "questions": 7,
                    "max_error": {"kvkern": 0.145, "sdpa": 0.155},
                    "mean_error": {"kvkern": 0.0236, "sdpa": 0.0237},
                    "difference": 0.0875,
                },
            ]
        },
        "compression": {
            "results": [packed("plain", 0.125, 2.5e9), packed("planes", 0.3, 0.75e9)],
            "answers": [{"shape": {"model": MODEL, "dtype": "bfloat16"}, "text": "none of 2 pays"}],
        },
        "steps": {"judged": [judged("fit", 9.9), judged("judge", 10.5), judged("judge", 8.0)]},
        "simulation": {
            "inputs": {"workload": {"agents": 80_000_000}},
            "model_of_steps": {"source": "data sheets"},
            "results": [policy("prefill", 4000.0), policy("shared", 40.0)],
        },
        "prices": {
            "paper": pricing.fields(*pricing.gather({}, preset_name="paper")[:2]),
            "measured": [priced(3774), priced(7500)],
        },
    },
}

CLAIMS: list[dict[str, Any]] = [
    {
        "id": "a",
        "claim": "1 < 2",
        "paper": "8.6x",
        "ours": {"here": "18.5x"},
        "how": "`x.py`",
        "verdict": {"here": "holds: more"},
    },
    {
        "id": "b",
        "claim": "b",
        "paper": "",
        "ours": {"A": "1", "B": "2"},
        "how": "",
        "verdict": {"A": "does not hold", "B": "told"},
    },
    {"id": "c", "claim": "c", "paper": "3", "ours": {"A": "not measured"}, "how": "", "verdict": {"A": "not measured"}},
]


class Reader(HTMLParser):
    """What is open, what is referred to, and the cells of all tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name.split(":")[-1] in ("href", "src")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def page() -> str:
    return paper_report.render(PAPER, CLAIMS)


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    return Reader(page)


def test_every_tag_is_closed(read: Reader) -> None:
    assert read.open == [] and {"table", "svg", "h2"} <= read.tags
    with pytest.raises(AssertionError, match=r"</p> in"):  # control
        Reader("<p><b>text</p>")


def test_the_page_needs_nothing_else(page: str, read: Reader) -> None:
    assert not read.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert all(link.startswith("#") and link[1:] in read.ids for link in read.links) and read.links
    assert all(name in read.ids for name in re.findall(r"url\(#([^)]*)\)", page))
    assert len(read.ids) == len(set(read.ids)), "two figures share an id"
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/2000/svg"}, "of the name space alone"
    assert Reader('<a href="https://example.com">x</a>').links == ["https://example.com"]  # control


CELLS = """
9.00 s (44 %) | 388 ms (6 %) | 500 ms (100 %), cold not confirmed | 125 ms | 62.6 ms (0 %) | 21.0 ms (10 %) | 1.50 s
429x | 18.5x | 1.25x | 2.00x
562 ms (22 %) | 31.2 ms | 30.0 ms (17 %) | 4.00 s | not measured | 750 ms | 64.0 KiB | 1.0 MiB | 6.40 s of 1
223 | 99.55 % | 0.00031 to 0.00031 | 0 to 0.5 | 7 of 1,000 | 0.0875 | kvkern 0.145, 0.0236; sdpa 0.155, 0.0237
12.5 % | 0.400 GB/s | 2.50 GB/s | 0.750 GB/s | 2.00 GB/s | yes
$0.0189 | $0.000380 | $0.0489 | 1.021 | 49.7x
$4,000 | $40.00 | $0.500 | 667 ± 0.0015 % | 100 ms | 2.50 s | 12,345
10.5 s | 8.00 s | +25.0 % | -4.8 %
"""
"""By length, its ratios, by agents, exactness, compression, prices, the simulator, its judge."""


@pytest.mark.parametrize("cell", CELLS.strip().replace("\n", " | ").split(" | "))
def test_a_table_holds_the_median(read: Reader, cell: str) -> None:
    assert cell in read.cells


def test_the_same_input_gives_the_same_bytes(page: str) -> None:
    assert paper_report.render(copy.deepcopy(PAPER), CLAIMS) == page
    assert paper_report.figure(PAPER) == paper_report.figure(PAPER)


def test_text_is_escaped(page: str, read: Reader) -> None:
    assert MODEL not in page and "<early>" not in page and "1 < 2" not in page
    words = "".join(read.words)
    assert f"{MODEL}, float32" in words and "stopped <early>" in words and "1 < 2" in words


def test_a_verdict_has_a_colour_and_its_word(page: str, read: Reader) -> None:
    for kind, word in (("good", "holds"), ("bad", "does not hold"), ("none", "told"), ("none", "not measured")):
        assert f'<span class="word {kind}">{word}</span>' in page and f".{kind}{{background" in page
    assert "holds: more" in read.cells and "A: does not holdB: told" in read.cells
    assert paper_report.verdict_html("unheard of: why") == '<span class="word none">unheard of</span>: why'
    assert 'good">holds</span>' not in paper_report.verdict_html("holdsome"), "a word, not its beginning"


@pytest.mark.parametrize("name", paper_report.SECTIONS)
def test_a_missing_part_says_so_and_has_no_figure(name: str) -> None:
    section = paper_report.SECTIONS[name]
    for paper in ({}, {"parts": {"document": {"results": []}, "steps": {}}}):
        found = "".join(section(paper))
        assert "not measured" in found and "<svg" not in found and "<table" not in found
    assert "not measured: it &lt;broke&gt;" in "".join(
        section({"missing": dict.fromkeys(("document", "exactness", "compression", "prices", "steps"), "it <broke>")})
    )


def test_what_is_to_be_read_off_follows_from_the_numbers(read: Reader) -> None:
    words = "".join(read.words)
    assert (
        "9x or more: the paper's at 255 and 3,774 tokens, at most 429x. Below that at every length: the reader's, at most 1.25x"
        in words
    )
    slow = [length(255, [0.1], 8.6)]
    assert paper_measured.reached(slow).startswith(
        "9x or more: none. Below that at every length: the paper's, at most 8.60x"
    )
    assert "223 of 224 tokens over KV that is not rounded are equal; 1 answer has another token" in words
    assert "1 of 2 runs that it was not fitted on are within 10 %, at worst 25 % off" in words


def test_who_is_refused_is_told_by_which_error(read: Reader) -> None:
    assert {"IdentityError, template", "RequestError, token_ids", "not refused"} <= set(read.cells)


def test_copies_that_do_not_fit_are_told_with_what_they_need(read: Reader) -> None:
    assert "A copy each does not fit, and was not measured: 16 agents need 3.0 GiB of 2.0 GiB." in "".join(read.words)


def test_what_is_unheard_of_is_told_by_its_name(read: Reader) -> None:
    assert "step_unheard_of" in "".join(read.words) and "else, 255 tokens" in read.cells


def test_the_figure_stands_alone_and_says_where_nothing_was_measured() -> None:
    text = paper_report.figure(PAPER)
    root = ElementTree.fromstring(text)
    words = "".join(root.itertext())
    assert (
        root.tag.endswith("}svg")
        and "Ratios by length" in words
        and f"tokens of the document; {MODEL}, float32" in words
    )
    assert "paper: 49.7x" in words and "prefill" in words and "from host memory" not in words
    nothing = ElementTree.fromstring(paper_report.figure({}))
    assert "not measured" in "".join(nothing.itertext())


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0"), (999.6, "1,000"), (12.345, "12.3"), (0.00012345, "0.000123"), (-2.5, "-2.50")]
)
def test_three_digits_and_no_exponent(x: float, text: str) -> None:
    assert digits(x) == text


@pytest.mark.parametrize(("x", "text"), [(90, "90.0 s"), (0.25, "250 ms"), (0.00025, "250 µs"), (0.001, "1.00 ms")])
def test_seconds_have_a_unit(x: float, text: str) -> None:
    assert seconds(x) == text
