"""paper.json as a page that stands alone, and as the README's figure. What was not measured says so; nothing is written by hand.

    render(paper, claims)   report.html: no script and nothing from elsewhere, figures inline, their words as text
    figure(paper)           one SVG: the three ratios by length, and the time of a step by agents

claims: {id, claim, paper, ours: {machine: text}, how, verdict: {machine: text}}, plain text. The same input gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

import paper_draw as draw
from paper_draw import BAND, TOLERANCE, figures, picture
from paper_words import (
    MISSING,
    Cell,
    Html,
    digits,
    estimated,
    facts,
    heading,
    listed,
    median,
    page,
    sampled,
    says,
    seconds,
    share,
    table,
    times,
)

from kvkern.cost import render_bytes
from kvkern.pricing import dollars

VERDICTS = {"not measured": "none", "told": "none", "does not hold": "bad", "holds in part": "part", "holds": "good"}
"""Words that a verdict may begin with, the longer ones first, and their colours; others are grey."""


# -- the page's parts --------------------------------------------------------------------------------------------------


def absent(paper: Cell, part: str) -> str:
    reason = paper.get("missing", {}).get(part)
    return says(f"{MISSING}: {reason}" if reason else MISSING)


def kinds(results: Iterable[Cell], names: Sequence[str] = ("model", "dtype")) -> dict[str, list[Cell]]:
    """Results by what they are of."""
    found: dict[str, list[Cell]] = {}
    for result in results:
        found.setdefault(", ".join(str(result["shape"].get(name)) for name in names), []).append(result)
    return found


def part_of(paper: Cell, name: str) -> Any:
    return paper.get("parts", {}).get(name) or {}


def cells_of(paper: Cell, part: str, *wanted: str) -> list[Cell]:
    """Results of a part whose shape's part is one of those wanted."""
    return [r for r in part_of(paper, part).get("results", ()) if not wanted or r["shape"].get("part") in wanted]


# -- 1 and 2: the machine, the claims ----------------------------------------------------------------------------------


def machine_text(facts: Cell) -> str:
    threads = facts.get("threads", "?")
    cpu = f"{threads} thread{'' if threads == 1 else 's'} of {facts.get('cpu', '?')}"
    sets = facts.get("instruction_sets")
    cpu += f", {sets[0]}" if sets else ""
    if "gpu" not in facts:
        return cpu
    return f"{facts['gpu']}, driver {facts.get('driver')}, CUDA {facts.get('cuda')}; {cpu}"


def machine(paper: Cell) -> list[str]:
    here, parts = paper.get("machine", {}), paper.get("parts", {})
    named = ("document", "exactness", "compression")
    models = {name: None for part in named for name in kinds(cells_of(paper, part))}
    rows = [
        ("machine", machine_text(here)),
        ("model", "; ".join(models) or MISSING),
        ("versions", ", ".join(f"{name} {version}" for name, version in here.get("versions", {}).items())),
        ("commit", here.get("commit")),
        ("date", here.get("date")),
        ("seconds", ", ".join(f"{part} {seconds(s)}" for part, s in paper.get("seconds", {}).items()) or MISSING),
    ]
    if settings := paper.get("settings"):
        rows.append(("options", ", ".join(f"{name} {value}" for name, value in settings.items())))
    for name, part in parts.items():
        other = part.get("machine") if isinstance(part, dict) else None
        if other and any(other.get(fact) != here.get(fact) for fact in ("gpu", "cpu", "threads", "commit")):
            rows.append((f"of {name}", f"{machine_text(other)}; commit {other.get('commit')}, {other.get('date')}"))
    rows += [(part, f"{MISSING}: {reason}") for part, reason in paper.get("missing", {}).items()]
    return [facts(rows)]


def verdict_html(text: str) -> Html:
    """Its word coloured, what follows plain."""
    word = next((w for w in VERDICTS if re.match(rf"{w}\b", text, re.IGNORECASE)), None)
    cut = len(word) if word else len(re.split(r"[:;,.(]", text)[0])
    return Html(
        f'<span class="word {VERDICTS.get(word or "", "none")}">{escape(text[:cut])}</span>{escape(text[cut:])}'
    )


def by_machine(found: dict[str, str], show: Callable[[str], Html]) -> Html:
    """Of each machine that has something to say, a line; of several with their names."""
    own = {name: text for name, text in found.items() if text != MISSING}
    named = [(f"<small>{escape(name)}:</small> " if len(own) > 1 else "") + show(text) for name, text in own.items()]
    return Html("<br>".join(named) or show(MISSING))


def coded(text: str) -> Html:
    """What stands in backquotes as code."""
    return Html(re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text)))


def claim_rows(claims: Iterable[Cell]) -> Iterator[str | list[Any]]:
    """A heading where another group begins, and each claim."""
    group = None
    for claim in claims:
        if claim.get("group", group) != group:
            group = claim["group"]
            yield group
        beside = "".join(f"<br><small>{coded(claim[name])}</small>" for name in ("how", "means") if claim.get(name))
        ours = by_machine(claim["ours"], coded)
        verdict = by_machine(claim["verdict"], verdict_html)
        yield [Html(coded(claim["claim"]) + beside), claim["paper"], ours, verdict]


def claims_table(claims: Sequence[Cell]) -> list[str]:
    if not claims:
        return [says(MISSING)]
    measured = "Each claim with the paper's number, ours and how it was measured; a verdict follows from the two and a tolerance."
    return [says(measured), table("claim | paper | ours | verdict", claim_rows(claims), "text")]


# -- 3: by length ------------------------------------------------------------------------------------------------------

LENGTH = (
    "Each part is timed by itself, the device idle before and after; a loaded document has to have the digests and the first tokens of the "
    "published one. Loads verify every digest; the question has 16 tokens, up to the first of the answer; the answer is its other "
    "63. Medians, in brackets the spread (largest less smallest sample)."
)

RATIOS = (
    "Ratios: the paper's, prefill / one step; a reader's, (prefill + question + answer) / (load + question + answer); a host's for N "
    "agents, N (prefill + question + answer) / (prefill + N (question + answer))."
)


def reached(cells: Sequence[Cell]) -> str:
    """Which ratio is in the paper's range, by what was measured."""
    above, below = [], []
    for name, shown in draw.ratio_names(cells).items():
        found = {cell["document"]: cell["ratios"][name] for cell in cells if name in cell["ratios"]}
        inside = [f"{tokens:,}" for tokens, ratio in found.items() if ratio >= BAND[0]]
        most = f"at most {times(max(found.values(), default=0))}"
        if inside:
            above.append(f"the {shown} at {listed(inside)} tokens, {most}")
        else:
            below.append(f"the {shown}, {most}")
    told = f"{BAND[0]}x or more: {'; '.join(above) or 'none'}."
    return told + (f" Below that at every length: {'; '.join(below)}." if below else "")


def by_length(paper: Cell) -> list[str]:
    found = [says(LENGTH)]
    groups = kinds(cells_of(paper, "document", "length"))
    for n, (kind, group) in enumerate(groups.items()):
        cells = sorted(group, key=lambda cell: cell["document"])
        used = [name for name in draw.TIMES if any(cell["seconds"].get(name) for cell in cells)]
        found += [
            heading(kind),
            says(RATIOS, reached(cells)),
            figures(
                picture(f"s{n}", "Seconds by length", partial(draw.draw_seconds, cells=cells), right=1.4),
                picture(f"r{n}", "Ratios by length", partial(draw.draw_ratios, cells=cells), right=1.4),
            ),
            table(["tokens", "KV", *(draw.TIMES[name] for name in used)], (length_row(cell, used) for cell in cells)),
            table(
                ["tokens", *(f"{name} ratio" for name in draw.ratio_names(cells).values())],
                (
                    [f"{c['document']:,}", *(times(c["ratios"].get(r, 0)) for r in draw.ratio_names(cells))]
                    for c in cells
                ),
            ),
        ]
    return found if groups else [absent(paper, "document")]


def length_row(cell: Cell, used: Sequence[str]) -> list[str]:
    cold = {True: "", False: ", not cold"}.get(cell.get("cold"), ", cold not confirmed")
    row = [sampled(cell["seconds"].get(name)) + (cold if name == "load_cold" else "") for name in used]
    return [f"{cell['document']:,}", render_bytes(cell["kv_bytes"]), *row]


# -- 4: by agents ------------------------------------------------------------------------------------------------------

AGENTS = (
    "A step makes one token for every agent, all on one document. The dashed line is one agent from scratch: prefill, question "
    "and an answer, divided by the answer's 64 tokens; that is measured for one agent and for no more. Bytes are the document's KV and "
    "the pages of question and answer."
)


def by_agents(paper: Cell) -> list[str]:
    groups = kinds(cells_of(paper, "document", "agents"))
    if not groups:
        return [absent(paper, "document")]
    found = [says(AGENTS)]
    for n, (kind, group) in enumerate(groups.items()):
        cells = sorted(group, key=lambda cell: cell["agents"])
        found += [
            heading(f"{kind}, {listed(f'{tokens:,}' for tokens in sorted({c['document'] for c in cells}))} tokens"),
            says(few_and_many(cells[0], cells[-1])),
            figures(
                picture(f"a{n}", "Seconds of an agent's token", partial(draw.draw_agents, cells=cells), right=1.4),
                picture(f"b{n}", "Bytes an agent", partial(draw.draw_bytes, cells=cells), left=0.9, right=1.4),
            ),
            agents_table(cells),
        ]
    return found


def few_and_many(few: Cell, many: Cell) -> str:
    if few is many:
        return ""
    saved = many["bytes_per_agent_copied"] / many["bytes_per_agent"]
    return (
        f"From {few['agents']:,} to {many['agents']:,} agents a token of one agent goes from {seconds(few['step_per_agent_s'])} to "
        f"{seconds(many['step_per_agent_s'])} over the shared copy; with a copy each, {many['agents']:,} agents would hold "
        f"{times(saved)} the bytes."
    )


def agents_table(cells: Sequence[Cell]) -> str:
    others = list(dict.fromkeys(name for cell in cells for name in cell["seconds"] if name != "step"))
    head = ["agents", "step of all", "an agent", *(f"step, {draw.STEPS.get(name, name)}" for name in others)]
    head += ["bytes an agent", "with a copy each", "one from scratch, whole answer"]

    def row(cell: Cell) -> list[str]:
        return [
            f"{cell['agents']:,}",
            sampled(cell["seconds"]["step"]),
            seconds(cell["step_per_agent_s"]),
            *(sampled(cell["seconds"].get(name)) for name in others),
            render_bytes(cell["bytes_per_agent"]),
            render_bytes(cell["bytes_per_agent_copied"]),
            seconds(cell["scratch_one_s"]) if "scratch_one_s" in cell else MISSING,
        ]

    return table(head, map(row, cells))


# -- 5: exactness ------------------------------------------------------------------------------------------------------

COMPARED = {"shape", "questions", "tokens", "equal", "flips", "seconds", "commit"}

EXACT = (
    "Greedy answers over the document's KV, each token held against the largest logit of transformers' own attention from scratch, up "
    "to an answer's first that is another; what is kept there is the gap of the two largest logits. Rounding alone can turn a gap near "
    "zero; a large gap would be a wrong answer."
)


def exactness(paper: Cell) -> list[str]:
    results = cells_of(paper, "exactness")
    if not results:
        return [absent(paper, "exactness")]
    parts = {name: cells_of(paper, "exactness", name) for name in ("tokens", "rounded", "logits")}
    critics = [result for result in results if result["shape"].get("part") not in parts]
    answers = [result for result in results if "equal" in result]
    found = [says(EXACT, all_equal(parts["tokens"]))]
    gaps = [(way_of(r), [flip["gap"] for flip in r["flips"]], part_colour(r)) for r in answers if r["flips"]]
    if gaps:
        height = 1.1 + 0.28 * len(gaps)
        title = "Gaps where a token is another"
        found.append(figures(picture("g", title, partial(draw.draw_gaps, rows=gaps), width=8, height=height, left=3)))
    for title, cells in (
        ("Reuse against from scratch", parts["tokens"]),
        ("Rounded KV: what is lost", parts["rounded"]),
    ):
        found += [heading(title), compared_table(cells) if cells else says(MISSING)]
    found += [heading("What the critics asked"), critics_table(critics) if critics else says(MISSING)]
    found += [heading("Logits in 16 bits")]
    return [*found, logits_table(parts["logits"]) if parts["logits"] else says(MISSING)]


def all_equal(cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    equal, tokens = sum(r["equal"] for r in cells), sum(r["tokens"] for r in cells)
    gaps = [flip["gap"] for r in cells for flip in r["flips"]]
    most = f", the gap there at most {max(gaps):.2g}" if gaps else ""
    other = f"{len(gaps):,} {'answer has' if len(gaps) == 1 else 'answers have'} another token{most}"
    return f"{equal:,} of {tokens:,} tokens over KV that is not rounded are equal; {other}."


def way_of(result: Cell) -> str:
    shape = result["shape"]
    return f"{shape['way']}, {shape['P']:,} tokens, {shape['dtype']}"


def part_colour(result: Cell) -> str:
    return {"tokens": draw.BLUE, "rounded": draw.ORANGE}.get(result["shape"]["part"], draw.RED)


def compared_row(result: Cell) -> list[str]:
    gaps = sorted(flip["gap"] for flip in result["flips"])
    return [
        way_of(result),
        result["shape"]["model"],
        f"{result['questions']:,}",
        f"{result['tokens']:,}",
        f"{result['equal']:,}",
        share(result["equal"] / result["tokens"]) if result["tokens"] else "",
        f"{len(gaps):,}",
        f"{gaps[0]:.2g} to {gaps[-1]:.2g}" if gaps else "",
    ]


COLUMNS = "way | model | questions | tokens compared | equal | share | answers with another token | gaps there"


def compared_table(cells: Iterable[Cell]) -> str:
    return table(COLUMNS, map(compared_row, cells))


def critics_table(cells: Iterable[Cell]) -> str:
    """What else a result says of itself, such as the error that refuses it, stands behind what it would have cost."""

    def row(result: Cell) -> list[str]:
        beside = {name: x for name, x in result.items() if name not in COMPARED and isinstance(x, str | int | float)}
        told = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in beside.items())
        own = compared_row(result) if "equal" in result else [way_of(result), *[""] * COLUMNS.count("|")]
        return [f"{result['shape']['part']}: {own[0]}", *own[1:], told]

    return table(f"{COLUMNS} | beside", map(row, cells), "text")


def logits_table(cells: Iterable[Cell]) -> str:
    rows = [
        [way_of(r), how, f"{r['questions']:,}", f"{r['max_error'][how]:.3g}", f"{r['mean_error'][how]:.3g}"]
        for r in cells
        for how in r["max_error"]
    ]
    told = says(
        "Logits of an answer's first token by their distance from those in fp64; sdpa is transformers from scratch."
    )
    return told + table("logits | by | questions | largest error | mean error", rows)


# -- 6: compression ----------------------------------------------------------------------------------------------------


def compression(paper: Cell) -> list[str]:
    groups = kinds(cells_of(paper, "compression"), ("model", "dtype", "P"))
    if not groups:
        return [absent(paper, "compression")]
    rule = f"smaller by {draw.SMALLER} % or more, decompressed at more than {draw.FAST} GB/s on one core or faster than the disk"
    found = [
        says(
            "Every layer's K and V is a frame of its own; what is unpacked equals what was packed bit by bit, by its digests. Speeds are "
            "of one core's time, GB are 10^9 bytes before compression. "
            f"A form pays if it is {rule}; the dashed line and the shaded corner say so."
        )
    ]
    found += [
        says(f"{a['shape']['model']}, {a['shape']['dtype']}: {a['text']}.")
        for a in part_of(paper, "compression").get("answers", ())
    ]
    for n, (kind, cells) in enumerate(groups.items()):
        height = 1 + 0.2 * len(cells)
        found += [
            heading(f"{kind} tokens"),
            figures(
                picture(f"z{n}", f"Size: {kind}", partial(draw.draw_sizes, cells=cells), height=height, left=1.4),
                picture(f"v{n}", f"Speed: {kind}", partial(draw.draw_speeds, cells=cells), right=1.2),
            ),
            compression_table(cells),
        ]
    return found


def compression_table(cells: Iterable[Cell]) -> str:
    def row(cell: Cell) -> list[str]:
        verdicts, disk = cell["verdicts"], cell["disk"]
        packing = sum(median(cell["core_seconds"][f"compress_{part}"]) or 0 for part in "KV")
        cold = {True: "", False: " (not cold)"}.get(disk["cold"], " (cold not confirmed)")
        return [
            f"{cell['shape']['form']} {cell['shape']['codec']}",
            *(f"{100 * verdicts[part]['smaller']:.1f} %" for part in ("all", "K", "V")),
            f"{digits(sum(cell['before'].values()) / packing / 1e9)} GB/s",
            f"{digits(verdicts['all']['bytes_per_s'] / 1e9)} GB/s",
            f"{digits(disk['bytes'] / (median(disk['seconds']) or 1) / 1e9)} GB/s{cold}",
            ("yes" if verdicts["all"]["pays"] else "no")
            + ("" if verdicts["all"].get("steady", True) else ", not in every sample"),
        ]

    return table("form | smaller | K | V | compress | decompress | disk | pays", map(row, cells))


# -- 7: prices ---------------------------------------------------------------------------------------------------------


def priced(paper: Cell) -> list[tuple[str, Cell, Cell]]:
    """(name, fields, costs): presets by the list, measured lengths by their seconds where the machine has a price."""
    given, found = part_of(paper, "prices"), []
    for name, fields in given.items():
        for one in fields if isinstance(fields, list) else [fields]:
            label = f"{name}, {one['inputs']['tokens']:,} tokens"
            if one.get("by_seconds"):
                found.append((f"{label}, by seconds", one, one["by_seconds"]))
            if name != "measured" or not one.get("by_seconds"):
                found.append((f"{label}, by list", one, one["by_list"]))
    return found


def prices(paper: Cell) -> list[str]:
    ways = priced(paper)
    if not ways:
        return [absent(paper, "prices")]
    dearer = [name for name, _, costs in ways if costs["egress"] > costs["prefill"]]
    found = [
        says(
            "Dollars of one read. By list: a prefill costs the list price of its tokens, and every other second as much as one of "
            "prefill. By seconds: measured seconds, at an assumed price of the machine's hour.",
            f"To send the KV costs more than to compute it in {len(dearer)} of {len(ways)} rows.",
        )
    ]
    measured = [(one["inputs"]["tokens"], costs) for name, one, costs in ways if name.startswith("measured")]
    if len(measured) > 1:
        shown = partial(draw.draw_dollars, ways=measured)
        found.append(figures(picture("d", "Dollars of a read, measured", shown, left=0.8, right=1.5)))
    head = (
        " | machine's hour | prefill | reuse | + load from CPU memory | + load from disk | KV sent | KV sent / prefill"
    )
    return [
        *found,
        table(f"{head} | cached read | break-even reads | prefill / reuse", (price_row(*way) for way in ways)),
    ]


def price_row(name: str, fields: Cell, costs: Cell) -> list[str]:
    even, ratio = fields["break_even_reads"], fields["speedup"]
    return [
        name,
        dollars(costs["gpu_hour"]),
        dollars(costs["prefill"]),
        dollars(costs["reuse"]),
        *(dollars(tier["read"]) for tier in costs["hosting"][1:]),
        dollars(costs["egress"]),
        times(costs["egress_by_prefill"]),
        dollars(costs["tariff"]),
        "never" if even is None else f"{even:.3f}",
        "" if ratio is None else times(ratio),
    ]


# -- 8: 80 million agents ----------------------------------------------------------------------------------------------

WAITS = {
    "first_p50_s": "first token, p50",
    "first_p99_s": "first token, p99",
    "answer_p50_s": "answer, p50",
    "answer_p99_s": "answer, p99",
}
SHARES = {"queue_mean": "queue, mean", "hit_rate": "hit rate", "utilisation": "share of time in steps"}

CROWD = (
    "Discrete-event simulation: Poisson arrivals with a daily wave, documents of a Zipf popularity, so many replicas as the wave's peak "
    "needs, paid for the whole period. Every number is sampled; ± is one standard error. Prices are assumptions."
)


def simulation(paper: Cell) -> list[str]:
    found = [says(CROWD)]
    titles = {"simulation": "By data sheets", "simulation_measured": "By the steps of this machine"}
    for n, (name, title) in enumerate(titles.items()):
        content = part_of(paper, name)
        found += [
            heading(title),
            *(simulated(content, f"p{n}") if content.get("results") else [absent(paper, name)]),
        ]
    return [*found, heading("Predicted and measured makespan"), *judged(paper)]


def simulated(content: Cell, name: str) -> list[str]:
    results, agents = content["results"], content["inputs"]["workload"]["agents"]
    cost = {r["policy"]: r["dollars"]["per_million_agents"] for r in results}
    least = min(cost, key=lambda policy: cost[policy])
    against = [f"{policy} {times(cost[policy] / cost[least])}" for policy in cost if policy != least and cost[least]]
    height, waits = 1 + 0.35 * len(results), partial(draw.draw_waits, results=results)
    return [
        says(
            f"{agents:,.0f} agents. A step's seconds: {content.get('model_of_steps', {}).get('source', 'unknown')}. Least dear is "
            f"{least}, {dollars(cost[least])} a million agents"
            + (f"; as many times that: {', '.join(against)}." if against else ".")
        ),
        figures(
            draw_bars(f"{name}h", "GPU-hours", results, lambda r: r["gpu_hours"], "hours", height),
            draw_bars(f"{name}c", "Dollars in all", results, lambda r: r["dollars"]["total"], "dollars", height),
            picture(f"{name}w", "How long an agent waits", waits, left=1.4, height=2 * height),
        ),
        policies_table(results),
    ]


def draw_bars(
    name: str, title: str, results: Sequence[Cell], value: Callable[[Cell], float], label: str, height: float
) -> str:
    return picture(name, title, partial(draw.draw_policies, results=results, value=value, label=label), height=height)


def policies_table(results: Sequence[Cell]) -> str:
    def row(label: str, show: Callable[[Cell], str]) -> list[str]:
        return [label, *map(show, results)]

    def estimates(names: dict[str, str], unit: Callable[[float], str]) -> list[list[str]]:
        return [
            row(label, lambda r, name=name: estimated(r["estimates"].get(name), unit)) for name, label in names.items()
        ]

    rows = [row("replicas", lambda r: f"{r['replicas']:,}"), row("GPU-hours", lambda r: digits(r["gpu_hours"]))]
    rows.append(row("of these in steps", lambda r: estimated(r["busy_gpu_hours"])))
    for name in dict.fromkeys(name for r in results for name in r["dollars"]):
        rows.append(row(f"$ {name.replace('_', ' ')}", lambda r, name=name: dollars(r["dollars"][name])))
    rows += [*estimates(WAITS, seconds), *estimates(SHARES, digits)]
    rows.append(row("agents simulated", lambda r: f"{r['agents_simulated']:,}"))
    return table(["", *(r["policy"] for r in results)], rows)


def judged(paper: Cell) -> list[str]:
    runs = part_of(paper, "steps").get("judged", ())
    if not runs:
        return [absent(paper, "steps")]
    own = [abs(run["error"]) for run in runs if run["use"] == "judge"]
    inside = sum(error <= TOLERANCE for error in own)
    worst = f", at worst {share(max(own))} off" if own else ""
    text = f" {inside} of {len(own)} runs that it was not fitted on are within {share(TOLERANCE)}{worst}."
    rows = [
        [f"{run['agents']:,}", run["use"], f"{run['document']:,}", f"{run['question']:,}", f"{run['answer']:,}"]
        + [seconds(run["predicted_s"]), seconds(run["measured_s"]), f"{100 * run['error']:+.1f} %"]
        for run in runs
    ]
    return [
        says(
            "The model of a step is fitted to engine runs of some numbers of agents (hollow), and judged on others (filled): what it "
            f"predicts for all their steps against the time that the engine took.{text}"
        ),
        figures(picture("j", "Predicted makespan over measured", partial(draw.draw_judged, judged=runs))),
        table("agents | run | document | question | answer | predicted | measured | off by", rows),
    ]


# -- all of it ---------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Cell], list[str]]] = {
    "Cost by length": by_length,
    "Cost by agents": by_agents,
    "Exactness": exactness,
    "Lossless compression": compression,
    "Prices": prices,
    "80 million agents": simulation,
}


def render(paper: Cell, claims: Sequence[Cell]) -> str:
    """report.html."""
    with draw.style():
        made = {"The machine": machine(paper), "Claims": claims_table(claims)}
        made |= {title: section(paper) for title, section in SECTIONS.items()}
    about = "arXiv 2606.13361, its claims measured with kvkern on the machine below."
    return page("The paper, measured again", about, ((title, "".join(blocks)) for title, blocks in made.items()))


def figure(paper: Cell) -> str:
    """The README's: ratios by length, and an agent's token by agents, of the first model and dtype."""
    panels = []
    for part, title, drawn in (
        ("length", "Ratios by length", draw.draw_ratios),
        ("agents", "Seconds of an agent's token", draw.draw_agents),
    ):
        for kind, cells in list(kinds(cells_of(paper, "document", part)).items())[:1]:
            panels.append((title, kind, partial(drawn, cells=cells)))
    with draw.style():
        return draw.side_by_side(panels)
