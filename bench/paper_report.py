"""paper.json as a page that stands alone, and as the README's figure. What was not measured says so; nothing is written by hand.

    render(paper, claims)   report.html: no script and nothing from elsewhere, figures inline, their words as text
    figure(paper)           one SVG: seconds by length, and the three ratios

claims: {id, claim, paper, ours: {machine: text}, how, verdict: {machine: text}}, plain text. The same input gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from html import escape
from typing import Any

import paper_draw as draw
from paper_draw import TOLERANCE, figures, picture
from paper_measured import by_agents, by_length, compression, exactness
from paper_words import (
    MISSING,
    Cell,
    Html,
    absent,
    cells_of,
    digits,
    estimated,
    facts,
    heading,
    kinds,
    page,
    part_of,
    says,
    seconds,
    share,
    table,
    times,
)

from kvkern.pricing import dollars

VERDICTS = {"not measured": "none", "told": "none", "does not hold": "bad", "holds in part": "part", "holds": "good"}
"""Words that a verdict may begin with, the longer ones first, and their colours; others are grey."""


# -- the machine, the claims -------------------------------------------------------------------------------------------


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


# -- prices ------------------------------------------------------------------------------------------------------------


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


# -- 80 million agents -------------------------------------------------------------------------------------------------

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
    """The README's: seconds by length, and the three ratios, of the first model and dtype."""
    panels = []
    for kind, cells in list(kinds(cells_of(paper, "document", "length")).items())[:1]:
        for title, drawn in (("Seconds by length", draw.draw_seconds), ("Ratios by length", draw.draw_ratios)):
            panels.append((title, kind, partial(drawn, cells=sorted(cells, key=lambda cell: cell["document"]))))
    with draw.style():
        return draw.side_by_side(panels)
