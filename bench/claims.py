"""arXiv 2606.13361 claim by claim: the paper's number, what is measured or computed here, and a verdict.

A verdict is a function of the two numbers, a rule and a stated tolerance; no number of ours stands in this file. `findings`
takes them from bench/results/: a machine's paper.json, and beside it document.json and demo.json of other models and machines.
`page` is docs/paper.md, `rows` the same for tables. Paper and rules are the constants below.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvkern import pricing

MISSING = "not measured"
SHORT, LONG = 255, 3774
"""Tokens of the paper's documents."""

File = dict[str, Any]


# -- what was found ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one machine gave for one model. Every part may be missing.

    kind     "arithmetic" for what follows from the paper's inputs alone, else "machine"
    prices   by name: kvkern.pricing.fields
    """

    name: str
    kind: str = "machine"
    file: str = ""
    document: File = field(default_factory=dict)
    exactness: File = field(default_factory=dict)
    compression: File = field(default_factory=dict)
    steps: File = field(default_factory=dict)
    simulation: File = field(default_factory=dict)
    simulation_measured: File = field(default_factory=dict)
    prices: File = field(default_factory=dict)
    demo: File = field(default_factory=dict)

    def length(self, tokens: int) -> File:
        """A document's cell by its tokens; {} where there is none."""
        cells = [r for r in self.document.get("results", ()) if r["shape"]["part"] == "length"]
        return next((cell for cell in cells if cell["document"] == tokens), {})

    def seconds(self, tokens: int, part: str) -> float | None:
        samples = self.length(tokens).get("seconds", {}).get(part)
        return statistics.median(samples) if samples else None

    def ratio(self, tokens: int, name: str) -> float | None:
        found: float | None = self.length(tokens).get("ratios", {}).get(name)
        return found

    def answers(self, part: str, way: str = "") -> list[File]:
        """Cells of exactness.json that compare tokens."""
        cells = [r for r in self.exactness.get("results", ()) if r["shape"]["part"] == part]
        return [r for r in cells if r["shape"]["way"].startswith(way) and "tokens" in r]

    def measured_prices(self, tokens: int) -> File:
        """Of a document of so many tokens by seconds of this machine."""
        return next((p for p in self.prices.get("measured", ()) if p["inputs"]["tokens"] == tokens), {})


def prices(document: str | Path, machine_hour: float) -> list[File]:
    """kvkern.pricing.fields for every length that document.json holds: its seconds, an hour of the machine, list prices beside."""
    cells = json.loads(Path(document).read_text())["results"]
    found = []
    for tokens in sorted(cell["document"] for cell in cells if cell["shape"]["part"] == "length"):
        inputs, origin, _ = pricing.gather({"tokens": tokens, "gpu_hour": machine_hour}, measured=str(document))
        found.append(pricing.fields(inputs, origin))
    return found


def presets() -> File:
    """kvkern.pricing.fields of the paper's two documents."""
    found = {}
    for name in ("paper", "paper-255"):
        inputs, origin, _ = pricing.gather({}, preset_name=name)
        found[name] = pricing.fields(inputs, origin)
    return found


MACHINE_HOUR = {"cpu": 0.10, "cuda": 3.0}
"""Dollars for an hour of the machine, assumed where nothing else is said: two cores, one H100."""


def named(model: str, dtype: str, facts: File) -> str:
    """A column: the model and where it ran."""
    where = facts.get("gpu") or f"{facts['threads']} threads of {facts['cpu']} ({facts['instruction_sets'][0]})"
    return f"{model}, {dtype}; {where}"


def findings(folders: Sequence[Path]) -> list[Found]:
    """Of all machines; the arithmetic on the paper's inputs first."""
    found = [Found("arithmetic on the paper's inputs", "arithmetic", "kvkern/data/cost.toml", prices=presets())]
    for folder in folders:
        demo = read(folder / "demo.json")
        for path in sorted(folder.glob("*.json")):
            if path.stem == "paper":
                made = of_paper(read(path))
                made.demo = demo
            elif path.stem.split("-")[0] == "document":
                file = read(path)
                made = of_document(file, prices(path, MACHINE_HOUR[file["machine"]["device"]]))
            else:
                continue
            made.file = f"bench/results/{folder.name}/{path.name}"
            if any(made.name == other.name for other in found):
                made.name += f" ({folder.name}/{path.stem})"
            found.append(made)
    return found


def of_paper(paper: File) -> Found:
    parts = paper["parts"]
    names = ("document", "exactness", "compression", "steps", "simulation", "simulation_measured", "prices")
    given = {name: parts[name] for name in names if name in parts}
    name = _of(parts["document"]) if "document" in parts else paper["settings"]["model"]
    dtypes = {
        result["shape"]["dtype"]
        for result in parts.get("exactness", {}).get("results", ())
        if "dtype" in result["shape"]
    }
    return Found(name + (f"; answers in {' and '.join(sorted(dtypes))}" if dtypes else ""), **given)


def of_document(file: File, by_seconds: list[File]) -> Found:
    return Found(_of(file), document=file, prices={"measured": by_seconds})


def _of(document: File) -> str:
    shape = document["results"][0]["shape"]
    return named(shape["model"], shape["dtype"], document["machine"])


def read(path: Path) -> File:
    """A result file; {} where there is none."""
    found: File = json.loads(path.read_text()) if path.exists() else {}
    return found


# -- rules -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """When a claim holds. tolerance is a share of the paper's number; digits are those that it prints."""

    kind: str
    tolerance: float = 0.0
    digits: int = 0

    def verdict(self, paper: float | None, ours: float | None) -> str:
        """ "holds", "does not hold", "told" where there is nothing to judge by, or "not measured"."""
        if ours is None or math.isnan(ours):
            return MISSING
        if self.kind == "told" or paper is None:
            return "told"
        held = {
            "printed": round(ours, self.digits) == paper,
            "equal": abs(ours - paper) <= self.tolerance * abs(paper),
            "at least": ours >= paper * (1 - self.tolerance),
            "at most": ours <= paper * (1 + self.tolerance),
            "below": ours < paper,
        }[self.kind]
        return "holds" if held else "does not hold"

    def text(self) -> str:
        """What the verdict asks for, for a reader."""
        within = f", {100 * self.tolerance:g} % allowed" if self.tolerance else ""
        return {
            "printed": "the same in every printed digit",
            "equal": "the same" + within,
            "at least": "as large or larger" + within,
            "at most": "as small or smaller" + within,
            "below": "smaller",
            "told": "no number to hold it against",
        }[self.kind]


TOLD = Rule("told")
FASTER = Rule("at least", tolerance=0.1)


OTHER_READERS = ("order", "template", "tokenizer")
"""Parts of exactness.json in which the document's KV is not what the reader means."""


# -- numbers of ours ---------------------------------------------------------------------------------------------------

Get = Callable[[Found], float | None]


def priced(preset: str, *names: str) -> Get:
    """A field of pricing.fields, of a preset of the paper."""

    def get(found: Found) -> float | None:
        value: Any = found.prices.get(preset)
        for name in names:
            value = None if value is None else value[name]
        return None if value is None else float(value)

    return get


def of_seconds(tokens: int, *names: str | int) -> Get:
    """The same by measured seconds of this length."""

    def get(found: Found) -> float | None:
        value: Any = found.measured_prices(tokens) or None
        for name in names:
            value = None if value is None else value[name]
        return None if value is None else float(value)

    return get


def break_even(tokens: int) -> Get:
    """Reads; inf where reuse takes as long as prefill, which a file has as null."""

    def get(found: Found) -> float | None:
        own = found.measured_prices(tokens)
        return None if not own else math.inf if own["break_even_reads"] is None else float(own["break_even_reads"])

    return get


def divided(above: Get, below: Get) -> Get:
    def get(found: Found) -> float | None:
        a, b = above(found), below(found)
        return None if a is None or not b else a / b

    return get


def millions(of: Get) -> Get:
    return divided(of, lambda found: 1e6)


def share_equal(part: str, way: str = "") -> Get:
    """Tokens equal, of all that were compared."""

    def get(found: Found) -> float | None:
        cells = found.answers(part, way)
        return sum(c["equal"] for c in cells) / sum(c["tokens"] for c in cells) if cells else None

    return get


def compared(part: str) -> Callable[[Found], str]:
    """How many tokens of how many answers."""

    def text(found: Found) -> str:
        cells = found.answers(part)
        return f"{sum(c['tokens'] for c in cells):,} tokens of {sum(c['questions'] for c in cells):,} answers"

    return text


def share_kept(part: str, way: str = "") -> Get:
    """Tokens of the answers that stand before their first other one: what a reader would have got of them."""

    def get(found: Found) -> float | None:
        cells = found.answers(part, way)
        return sum(c["equal"] for c in cells) / sum(c["answer_tokens"] for c in cells) if cells else None

    return get


def share_refused(found: Found) -> float | None:
    """Of readers who mean other tokens than the document's."""
    cells = [cell for part in OTHER_READERS for cell in found.answers(part)]
    return sum(bool(c["refused"]) for c in cells) / len(cells) if cells else None


def logit_difference(dtype: str) -> Get:
    def get(found: Found) -> float | None:
        for cell in found.exactness.get("results", ()):
            if cell["shape"]["part"] == "logits" and cell["shape"]["way"] == dtype:
                value: float | None = cell.get("difference")
                return value
        return None

    return get


def dollars_of(policy: str, part: str = "simulation") -> Get:
    """Of the simulated period, all told."""

    def get(found: Found) -> float | None:
        results = getattr(found, part).get("results", ())
        return next((float(result["dollars"]["total"]) for result in results if result["policy"] == policy), None)

    return get


def worst_prediction(found: Found) -> float | None:
    """Largest error of a makespan that was not fitted."""
    errors = [abs(line["error"]) for line in found.steps.get("judged", ()) if line["use"] == "judge"]
    return max(errors) if errors else None


def best_compression(dtype: str) -> Get:
    """Share that the smallest form saves which unpacks above 1 GB/s on a core; where none does, of the smallest."""

    def get(found: Found) -> float | None:
        cells = [c["verdicts"]["all"] for c in found.compression.get("results", ()) if c["shape"]["dtype"] == dtype]
        fast = [c for c in cells if c["above_1_gb_per_s"]]
        return max((c["smaller"] for c in fast or cells), default=None)

    return get


def demo_ratio(found: Found) -> float | None:
    value: float | None = found.demo.get("ratio")
    return value


# -- claims ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One number of the paper, or none where it leaves a question open.

    shown    how a number is written
    how      where ours is from
    means    in plain words
    printed  what stands in the paper's place, where that is not its number alone
    counted  what our number was counted over
    """

    key: str
    group: str
    text: str
    paper: float | None
    shown: Callable[[float], str]
    rule: Rule
    ours: Get
    how: str
    means: str = ""
    kind: str = "machine"
    printed: str = ""
    counted: Callable[[Found], str] = lambda found: ""


def times(digits: int = 1) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}x"


def fixed(digits: int, before: str = "", after: str = "") -> Callable[[float], str]:
    return lambda value: f"{before}{value:,.{digits}f}{after}"


def percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def small(value: float) -> str:
    return f"{value:.3g}"


BY_LENGTH = "`bench/bench_document.py`, medians"
BY_TOKENS = "`bench/exactness.py`"
PRESET = "`kvkern cost --preset paper`"

CLAIMS: tuple[Claim, ...] = (
    # what reuse saves
    Claim("step-255", "Reuse against prefill", f"Prefill of {SHORT} tokens takes this many times one step over resident KV", 8.6,
          times(), FASTER, lambda f: f.ratio(SHORT, "paper"), BY_LENGTH,
          "One step gives one token. It is the paper's measure of reuse, and no whole answer."),
    Claim("step-3774", "Reuse against prefill", f"The same of {LONG:,} tokens", 49.7, times(), FASTER,
          lambda f: f.ratio(LONG, "paper"), BY_LENGTH),
    Claim("reader-255", "Reuse against prefill", f"A reader of {SHORT} tokens who loads the KV from disk, asks and gets 64 tokens", 8.6,
          times(2), FASTER, lambda f: f.ratio(SHORT, "reader"), BY_LENGTH,
          "(prefill + question + answer) / (load + question + answer). The paper leaves out the load, the question and the answer.",
          printed="8.6x"),
    Claim("reader-3774", "Reuse against prefill", f"The same of {LONG:,} tokens", 49.7, times(2), FASTER,
          lambda f: f.ratio(LONG, "reader"), BY_LENGTH,
          printed="49.7x"),
    Claim("host-3774", "Reuse against prefill", f"A host of 1,024 agents one after another, {LONG:,} tokens", 49.7, times(2),
          FASTER, lambda f: f.ratio(LONG, "host_1024"), BY_LENGTH,
          "N (prefill + question + answer) / (prefill + N (question + answer)): whole answers, the load is gone.",
          printed="49.7x"),
    Claim("demo", "Reuse against prefill", f"A host of 256 agents at once, {LONG:,} tokens, whole answers", 49.7, times(), FASTER,
          demo_ratio, "`make demo`: seconds an agent from scratch, by reuse",
          "Agents that run together share every read of the document's KV, which the paper's measure has no part in."),
    Claim("even-3774", "Reuse against prefill", f"Reads after which publishing {LONG:,} tokens pays: N* = prefill / (prefill - step)", 1.02,
          fixed(2), Rule("at most", 0.005), break_even(LONG), BY_LENGTH),
    Claim("even-255", "Reuse against prefill", f"The same of {SHORT} tokens", 1.13, fixed(2), Rule("at most", 0.005),
          break_even(SHORT), BY_LENGTH),
    Claim("prefill-3774", "Reuse against prefill", f"Seconds to prefill {LONG:,} tokens (the paper: Qwen3-4B on an Apple M1 Pro)", 14.71,
          fixed(2, after=" s"), TOLD, lambda f: f.seconds(LONG, "prefill"), BY_LENGTH, "Another machine or model: told, not judged."),
    Claim("seconds-3774", "Reuse against prefill", "Seconds of one step over them", 0.296, fixed(3, after=" s"), TOLD,
          lambda f: f.seconds(LONG, "step"), BY_LENGTH),
    # exactness
    Claim("tokens", "Exactness", "Greedy tokens by reuse that are those from scratch", 1.0, percent, Rule("equal"),
          share_equal("tokens"), f"{BY_TOKENS}: batches of 256 and of 1, and another process over the .kv file, together",
          "From scratch is transformers' own attention. An answer is compared up to its first other token; each such token is in "
          "the file with the gap between the two largest logits.", printed="100 % (24 tokens)",
          counted=compared("tokens")),
    Claim("logits-16", "Exactness", "Largest difference of a logit, fp16", 0.02, small, Rule("at most"),
          logit_difference("float16"), BY_TOKENS),
    Claim("logits-bf16", "Exactness", "The same in bf16, which has 8 times the rounding of fp16", None, small, TOLD,
          logit_difference("bfloat16"), BY_TOKENS),
    Claim("logits-32", "Exactness", "The same in fp32", 0.02, small, Rule("at most"), logit_difference("float32"), BY_TOKENS),
    Claim("int8", "Exactness", "Tokens kept over uniform int8 KV", 1.0, percent, Rule("below"),
          share_kept("rounded", "int8 per tensor"), f"{BY_TOKENS}: tokens of an answer before its first other one",
          "A KV rounded to int8 is not token-exact: the claim holds if fewer than all are kept.", printed="50 % (32 tokens)"),
    Claim("channel", "Exactness", "The same, int8 with a scale for each channel", None, percent, TOLD,
          share_kept("rounded", "int8 per channel"), BY_TOKENS),
    Claim("fp8", "Exactness", "The same, fp8 e4m3", None, percent, TOLD, share_kept("rounded", "fp8"), BY_TOKENS),
    Claim("refused", "Exactness", "Readers who mean other tokens, and are refused", 1.0, percent, Rule("equal"), share_refused,
          BY_TOKENS, "Another prompt before the document, another chat template, a tokenizer of another revision: KV holds for its tokens "
          "and those before them, and for no others. The three lines that follow say what it would cost to take it nevertheless.",
          printed="open"),
    Claim("order", "Exactness", "Tokens kept if the KV were taken after another system prompt", None, percent, TOLD,
          share_kept("order"), BY_TOKENS),
    Claim("template", "Exactness", "Tokens kept if it were taken under another chat template", None, percent, TOLD,
          share_kept("template"), BY_TOKENS),
    Claim("tokenizer", "Exactness", "Tokens kept if it were taken by a tokenizer of another revision", None, percent, TOLD,
          share_kept("tokenizer"), BY_TOKENS, "Where the other revision cuts document and question as before, nothing is lost."),
    # money, by list prices
    Claim("bytes", "Money, by the paper's inputs", "Bytes of KV of one token, Qwen3-4B in 16 bits", 147456, fixed(0), Rule("equal"),
          priced("paper", "inputs", "token_bytes"), PRESET, kind="arithmetic"),
    Claim("gb", "Money, by the paper's inputs", f"GB of KV of {LONG:,} tokens", 0.54, fixed(2), Rule("printed", digits=2),
          priced("paper", "kv_gb"), PRESET,
          "It follows with a GB of 1,024 million bytes; of 10^9 bytes it would be 0.56.", "arithmetic"),
    Claim("prefill-usd", "Money, by the paper's inputs", "Dollars to prefill them at $5 a million tokens", 0.0189, fixed(4, "$"),
          Rule("printed", digits=4),
          priced("paper", "by_list", "prefill"), PRESET, kind="arithmetic"),
    Claim("egress-usd", "Money, by the paper's inputs", "Dollars to ship the KV at $0.09 a GB", 0.049, fixed(3, "$"),
          Rule("printed", digits=3),
          priced("paper", "by_list", "egress"), PRESET, kind="arithmetic"),
    Claim("egress-list", "Money, by the paper's inputs", "Shipping against prefill by list prices", 2.6, times(), Rule("printed", digits=1),
          priced("paper", "by_list", "egress_by_prefill"), PRESET, "Above 1, shipping costs more than it saves.", "arithmetic"),
    Claim("crowd-usd", "Money, by the paper's inputs", "80 million agents by prefill, millions of dollars", 1.51, fixed(2, "$", " M"),
          Rule("printed", digits=2),
          millions(priced("paper", "by_list", "agents_prefill")), PRESET, kind="arithmetic"),
    Claim("crowd-reuse-usd", "Money, by the paper's inputs", "The same by reuse", 0.03, fixed(2, "$", " M"), Rule("printed", digits=2),
          millions(priced("paper", "by_list", "agents_reuse")), PRESET, "Loads, questions, answers and hosting are not in it.",
          "arithmetic"),
    Claim("tariff-3774", "Money, by the paper's inputs", f"A step over {LONG:,} tokens as a share of prefill: a tariff of 0.1x pays", 0.1,
          percent,
          Rule("at most"), divided(priced("paper", "by_list", "reuse"), priced("paper", "by_list", "prefill")), PRESET, kind="arithmetic"),
    Claim("tariff-255", "Money, by the paper's inputs", f"The same over {SHORT} tokens", 0.1, percent, Rule("at most"),
          divided(priced("paper-255", "by_list", "reuse"), priced("paper-255", "by_list", "prefill")), "`kvkern cost --preset paper-255`",
          "By the paper's own seconds a tariff of 0.1x does not pay for a short document.", "arithmetic"),
    # money, by measured seconds
    Claim("tariff-own-3774", "Money, by measured seconds", f"A step over {LONG:,} tokens as a share of prefill", 0.1, percent,
          Rule("at most"), divided(of_seconds(LONG, "by_seconds", "reuse"), of_seconds(LONG, "by_seconds", "prefill")), BY_LENGTH),
    Claim("tariff-own-255", "Money, by measured seconds", f"The same over {SHORT} tokens", 0.1, percent, Rule("at most"),
          divided(of_seconds(SHORT, "by_seconds", "reuse"), of_seconds(SHORT, "by_seconds", "prefill")), BY_LENGTH),
    Claim("egress-own", "Money, by measured seconds", f"Shipping {LONG:,} tokens against prefill", 1.0, times(),
          Rule("at least"), of_seconds(LONG, "by_seconds", "egress_by_prefill"),
          f"{BY_LENGTH}; an hour of the machine at ${MACHINE_HOUR['cpu']:.2f} (CPU) or ${MACHINE_HOUR['cuda']:.2f} (GPU), assumed",
          "The claim is that shipping costs more than it saves. It rests on what a second of the machine costs.",
          printed="above 1x"),
    Claim("disk-own", "Money, by measured seconds", f"Loading {LONG:,} tokens from disk and one step, as a share of prefill", 1.0, percent,
          Rule("below"), divided(of_seconds(LONG, "by_seconds", "hosting", 2, "read"),
                                  of_seconds(LONG, "by_seconds", "prefill")), BY_LENGTH,
          "Hosting pays where a load is cheaper than a prefill.", printed="below 100 %"),
    # the crowd
    Claim("crowd-shared", "80 million agents, simulated", "Dollars with a prefill every time against one shared copy", 49.7, times(),
          FASTER, divided(dollars_of("prefill"), dollars_of("shared")), "`bench/simulate.py`: whole answers, queues, loads and storage",
          "The paper's ratio has no questions, answers, queues or loads in it; those cost the same in both ways."),
    Claim("crowd-copies", "80 million agents, simulated", "A copy of the KV for each agent against one shared copy", None, times(2), TOLD,
          divided(dollars_of("copies"), dollars_of("shared")), "`bench/simulate.py`"),
    Claim("crowd-ship", "80 million agents, simulated", "Shipping the KV to every reader against one shared copy", 1.0, times(),
          Rule("at least"), divided(dollars_of("ship"), dollars_of("shared")), "`bench/simulate.py`: egress; the reader's machine is free"),
    Claim("crowd-ship-prefill", "80 million agents, simulated", "Shipping the KV against a prefill every time", 2.6, times(2), FASTER,
          divided(dollars_of("ship"), dollars_of("prefill")), "`bench/simulate.py`",
          "By list prices it is 2.6; by GPU hours a prefill is far cheaper than its list price, so that shipping looks worse.",
          printed="2.6x"),
    Claim("crowd-own", "80 million agents, simulated", "Prefill every time against one shared copy, by steps measured on this machine",
          49.7, times(), FASTER, divided(dollars_of("prefill", "simulation_measured"), dollars_of("shared", "simulation_measured")),
          "`bench/simulate.py --steps`"),
    Claim("predicted", "80 million agents, simulated", "Largest error of a predicted makespan, of batches it was not fitted on", 0.1,
          percent, Rule("at most"), worst_prediction,
          "`bench/simulate.py --measure`, on this machine: fitted on 16, 128, 512 agents, judged on 64, 256, 1,024",
          printed="our aim: 10 %"),
    # open
    Claim("compress-16", "Open in the paper", "Lossless compression of bf16 KV: smaller by, at more than 1 GB/s on one core", 0.2, percent,
          Rule("at least"), best_compression("bfloat16"), "`bench/compression.py`", "It pays from 20 % on, by a rule of ours.",
          printed="our rule: 20 %"),
    Claim("compress-fp16", "Open in the paper", "The same of fp16, the paper's dtype", 0.2, percent, Rule("at least"),
          best_compression("float16"), "`bench/compression.py`", printed="our rule: 20 %"),
    Claim("compress-32", "Open in the paper", "The same of fp32", 0.2, percent, Rule("at least"), best_compression("float32"),
          "`bench/compression.py`", printed="our rule: 20 %"),
)  # fmt: skip


# -- pages -------------------------------------------------------------------------------------------------------------


def judged(claim: Claim, found: Found) -> tuple[str, str]:
    """(our number as text, verdict)."""
    value = claim.ours(found)
    text = MISSING if value is None or math.isnan(value) else "never" if math.isinf(value) else claim.shown(value)
    if text != MISSING and (over := claim.counted(found)):
        text += f" ({over})"
    return text, claim.rule.verdict(claim.paper, value)


def rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """Each claim as text: id, group, claim, paper, ours and verdict by machine, rule, how, means."""
    made = []
    for claim in CLAIMS:
        own = {one.name: judged(claim, one) for one in found if one.kind == claim.kind}
        made.append(
            {
                "id": claim.key,
                "group": claim.group,
                "claim": claim.text,
                "paper": claim.printed or ("" if claim.paper is None else claim.shown(claim.paper)),
                "ours": {name: text for name, (text, _) in own.items()},
                "verdict": {name: verdict for name, (_, verdict) in own.items()},
                "rule": claim.rule.text(),
                "how": claim.how,
                "means": claim.means,
            }
        )
    return made


def counted(made: Sequence[dict[str, Any]], name: str) -> str:
    """How many claims hold on one machine."""
    verdicts = [row["verdict"][name] for row in made if name in row["verdict"]]
    words = ("holds", "does not hold", "told", MISSING)
    return ", ".join(f"{verdicts.count(word)} {word}" for word in words if word in verdicts)


HEAD = """\
# The paper, measured again

arXiv 2606.13361, "Can I Buy Your KV Cache?", claim by claim: its number, ours, and a verdict. `python bench/report.py` makes this page
from the files named below; `make bench-paper` measures a machine and makes its file. A verdict follows from the two numbers and the
rule in the last column: *holds*, *does not hold*, *told* where there is nothing to judge by, or *not measured*. Prices of machines are
assumptions, named where they enter.
"""

ABOUT = {
    "Reuse against prefill": "The paper measures Qwen3-4B in fp16 on an Apple M1 Pro, and divides a prefill by one step over KV that is in "
    "memory. A step is one token; whoever reads a document also loads it, asks, and waits for a whole answer. So three ratios stand "
    "side by side.",
    "Exactness": "The paper compares 24 tokens of one answer. Here each answer is held against transformers' own attention over document, "
    "question and answer, from scratch.",
    "Money, by the paper's inputs": "What follows from the paper's own seconds and prices by the formulas of `kvkern/cost.py`, and "
    "nothing of it is measured here.",
    "Money, by measured seconds": "The same formulas with seconds of a machine, and an hour of it at an assumed price, in place of "
    "the list price of a token.",
    "80 million agents, simulated": "The paper multiplies one read by 80 million. The simulator lets them come within a day, by a wave, to "
    "documents of a Zipf popularity, and has replicas that answer in whole steps, queue, load and evict. Its step is by arithmetic from "
    "data sheets of an H100, not measured; its prices are assumed.",
    "Open in the paper": "What the paper leaves to others. Payment is left open here too.",
}


def page(found: Sequence[Found]) -> str:
    """docs/paper.md: a table for each group, a column for each file that has a number in it."""
    made, letter = rows(found), {one.name: chr(ord("A") + n) for n, one in enumerate(found)}
    lines = [HEAD, "| | what | file | claims |", "|---|---|---|---|"]
    lines += [f"| {letter[one.name]} | {one.name} | `{one.file}` | {counted(made, one.name)} |" for one in found]
    for group in dict.fromkeys(row["group"] for row in made):
        own = [row for row in made if row["group"] == group]
        told = [name for name in letter if any(row["verdict"].get(name, MISSING) != MISSING for row in own)]
        lines += ["", f"## {group}", "", ABOUT[group], ""]
        lines.append("| | the paper | " + "".join(f"{letter[name]} | " for name in told) + "holds if |")
        lines.append("|---" * (3 + len(told)) + "|")
        for row in own:
            cells = [_cell(row, name) for name in told]
            lines.append("| " + " | ".join([row["claim"], row["paper"] or "no number", *cells, row["rule"]]) + " |")
        lines += ["", f"Measured by: {'; '.join(dict.fromkeys(row['how'] for row in own))}.", ""]
        lines += [f"- {row['claim']}: {row['means']}" for row in own if row["means"]]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], name: str) -> str:
    text, verdict = row["ours"].get(name, MISSING), row["verdict"].get(name, MISSING)
    return MISSING if verdict == MISSING else text if verdict == "told" else f"{text}: **{verdict}**"
