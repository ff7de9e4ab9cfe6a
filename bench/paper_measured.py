"""Sections of paper_report.py on what was measured here: cost by length and by agents, exactness, compression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import paper_draw as draw
from paper_draw import BAND, figures, picture
from paper_words import (
    MISSING,
    Cell,
    absent,
    cells_of,
    digits,
    heading,
    kinds,
    listed,
    median,
    part_of,
    sampled,
    says,
    seconds,
    share,
    table,
    times,
)

from kvkern.cost import render_bytes

# -- by length ---------------------------------------------------------------------------------------------------------

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


# -- by agents ---------------------------------------------------------------------------------------------------------

AGENTS = (
    "A step makes one token for every agent, all on one document: over one shared copy of its KV, and over a copy each, loaded from the "
    "file; both have to say the same. The dashed line is an agent from scratch, a whole answer by transformers' own generate and "
    "attention over document and question, divided by the answer's 64 tokens; that is measured for few agents, and they run at once. "
    "Bytes are the document's KV and the pages of question and answer."
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


WHOLE = {
    "extend_s": "questions of all",
    "extend_copied_s": "questions, a copy each",
    "answer_s": "answers of all",
    "answer_copied_s": "answers, a copy each",
}


def agents_table(cells: Sequence[Cell]) -> str:
    others = list(dict.fromkeys(name for cell in cells for name in cell["seconds"] if name != "step"))
    wholes = [name for name in WHOLE if any(cell.get(name) is not None for cell in cells)]
    named = {"step_copied": "step, a copy each", "load_copy": "load of each copy"}
    head = [
        "agents",
        "step of all",
        "an agent",
        *(named.get(name, name) for name in others),
        *(WHOLE[w] for w in wholes),
    ]

    def row(cell: Cell) -> list[str]:
        return [
            f"{cell['agents']:,}",
            sampled(cell["seconds"]["step"]),
            seconds(cell["step_per_agent_s"]),
            *(sampled(cell["seconds"].get(name)) for name in others),
            *(MISSING if cell.get(name) is None else seconds(cell[name]) for name in wholes),
            render_bytes(cell["bytes_per_agent"]),
            render_bytes(cell["bytes_per_agent_copied"]),
            ", ".join(f"{seconds(s)} of {n}" for n, s in cell.get("from_scratch", {}).items()) or MISSING,
        ]

    return too_large(cells) + table(
        [*head, "bytes an agent", "with a copy each", "answers from scratch"], map(row, cells)
    )


def too_large(cells: Sequence[Cell]) -> str:
    """Why copies were not measured."""
    found = [(cell["agents"], cell["copies"]) for cell in cells if not cell.get("copies", {}).get("measured", True)]
    told = [
        f"{n:,} agents need {render_bytes(c['needed_bytes'])} of {render_bytes(c['found_bytes'])}" for n, c in found
    ]
    return says(f"A copy each does not fit, and was not measured: {'; '.join(told)}.") if told else ""


# -- exactness ---------------------------------------------------------------------------------------------------------

EXACT = (
    "Greedy answers over the document's KV, each token held against the largest logit of transformers' own attention from scratch, up "
    "to an answer's first that is another; what is kept there is the gap of the two largest logits. Rounding alone can turn a gap near "
    "zero; a large gap would be a wrong answer."
)
CRITICS = (
    "Readers who mean other tokens than the publisher: what kvkern says to the document's file, and what it would cost if it did not "
    "refuse: answers over the KV as it stands, beside those from scratch of what the reader means."
)
LOGITS = (
    "kvkern's logits beside those of transformers from scratch over whole answers, and the distance of both (sdpa: transformers) from "
    "fp64 at an answer's first token, largest and mean."
)


def exactness(paper: Cell) -> list[str]:
    results = cells_of(paper, "exactness")
    if not results:
        return [absent(paper, "exactness")]
    parts = {name: cells_of(paper, "exactness", name) for name in ("tokens", "rounded", "logits")}
    critics = [result for result in results if result["shape"].get("part") not in parts]
    sections = (
        ("Reuse against from scratch", parts["tokens"], "", compared_table),
        ("Rounded KV: what is lost", parts["rounded"], "", compared_table),
        ("What the critics asked", critics, CRITICS, critics_table),
        ("Logits", parts["logits"], LOGITS, logits_table),
    )
    found = [says(EXACT, all_equal(parts["tokens"])), *gaps(results)]
    for title, cells, told, shown in sections:
        found += [heading(title), says(told) + shown(cells) if cells else says(MISSING)]
    return found


def gaps(results: Iterable[Cell]) -> list[str]:
    """A strip of all flips, if there are any."""
    colours = dict.fromkeys(("tokens", "unchanged"), draw.BLUE) | {"rounded": draw.ORANGE}
    rows = [
        (
            f"{way_of(r)}, {r['shape']['dtype']}",
            [flip["gap"] for flip in r["flips"]],
            colours.get(r["shape"]["part"], draw.RED),
        )
        for r in results
        if r.get("flips")
    ]
    if not rows:
        return []
    shown, height = partial(draw.draw_gaps, rows=rows), 1.1 + 0.34 * len(rows)
    return [figures(picture("g", "Gaps where a token is another", shown, width=8, height=height, left=3.4))]


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
    name = f"{shape['part']}: " if shape["part"] in ("template", "tokenizer") else ""
    return f"{name}{shape['way']}, {shape['P']:,} tokens"


COUNTS = "questions | tokens compared | equal | share | answers with another token | gaps there"


def counts(result: Cell) -> list[str]:
    """Of a part that may hold none."""
    if not result.get("tokens") or "equal" not in result:
        return [""] * (1 + COUNTS.count("|"))
    gaps = sorted(flip["gap"] for flip in result["flips"])
    judged, asked = result["questions"], result.get("asked", result["questions"])
    return [
        f"{judged:,}" if judged == asked else f"{judged:,} of {asked:,}",
        f"{result['tokens']:,}",
        f"{result['equal']:,}",
        share(result["equal"] / result["tokens"]),
        f"{len(gaps):,}",
        f"{gaps[0]:.2g} to {gaps[-1]:.2g}" if gaps else "",
    ]


def compared_table(cells: Iterable[Cell]) -> str:
    rows = ([way_of(r), f"{r['shape']['model']}, {r['shape']['dtype']}", *counts(r)] for r in cells)
    return table(f"way | model | {COUNTS}", rows)


def critics_table(cells: Iterable[Cell]) -> str:
    def refused(result: Cell) -> str:
        said = result.get("refused")
        by = ", ".join(str(result[name]) for name in ("error", "field") if name in result)
        return "" if said is None else (by or str(said)) if said else "not refused"

    def row(result: Cell) -> list[str]:
        other = [result.get(name) for name in ("first_tokens_other", "other_tokens")]
        return [way_of(result), refused(result), *counts(result), *("" if n is None else f"{n:,}" for n in other)]

    head = f"the reader's | refused by | {COUNTS} | first tokens other | document's tokens other"
    return table(head, map(row, cells))


def logits_table(cells: Iterable[Cell]) -> str:
    def row(result: Cell) -> list[str]:
        most, mean = result["max_error"], result["mean_error"]
        numbers = [f"{result[name]:,}" if name in result else MISSING for name in ("tokens", "tokens_equal")]
        apart = f"{result['difference']:.3g}" if "difference" in result else MISSING
        errors = "; ".join(f"{how} {most[how]:.3g}, {mean[how]:.3g}" for how in most)
        return [way_of(result), result["shape"]["model"], f"{result['questions']:,}", *numbers, apart, errors]

    return table("logits in | model | questions | tokens | equal | largest difference | from fp64", map(row, cells))


# -- compression -------------------------------------------------------------------------------------------------------


def compression(paper: Cell) -> list[str]:
    groups = kinds(cells_of(paper, "compression"), ("model", "dtype", "P"))
    if not groups:
        return [absent(paper, "compression")]
    found = [
        says(
            "Every layer's K and V is a frame of its own; what is unpacked equals what was packed bit by bit, by its digests. Speeds are "
            "of one core's time, GB are 10^9 bytes before compression. A form pays if it is smaller by "
            f"{draw.SMALLER} % or more (the dashed line) and unpacks at more than {draw.FAST} GB/s on one core (with it, the shaded "
            "corner) or faster than the disk."
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
