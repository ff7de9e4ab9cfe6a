"""Drawings of paper_report.py: SVG by matplotlib, words as text, the same bytes for the same data, no display needed."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from paper_words import Cell, digits, median, plain, seconds, seconds_tick

from kvkern.cost import render_bytes

Drawing = Callable[[Axes], None]

BAND = (9, 50)
"""The paper's 9x to 50x."""
POINTS = {255: 8.6, 3774: 49.7}
"""Its prefill / step by tokens."""
TOLERANCE = 0.1
"""Of a predicted makespan."""
SMALLER, FAST = 20, 1
"""A compressed form pays from so many per cent smaller, and so many GB/s."""
LEAST_GAP = 1e-7
"""Where a strip of gaps ends: smaller ones are drawn there."""
ANSWER = 64
"""Tokens of a whole answer in bench_document.py."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#222222", "#888888")
"""Okabe and Ito's, told apart by the colour-blind."""
BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK, GREY = COLOURS
MARKS = "osD^vP*X"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvkern",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "text.color": BLACK,
    "axes.labelcolor": BLACK,
    "legend.frameon": False,
}


# -- figures -----------------------------------------------------------------------------------------------------------


def svg(fig: Figure, name: str) -> str:
    """The figure as text, its ids its own among those of a page."""
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>\s*", "", out.getvalue(), flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)


@contextmanager
def style() -> Iterator[None]:
    """Of all drawings, whatever this machine's own is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def sheet(width: float, height: float) -> Figure:
    fig = Figure(figsize=(width, height))
    FigureCanvasSVG(fig)
    return fig


def place(fig: Figure, draw: Drawing, *, left: float = 0.7, right: float = 0.4, at: float = 0, width: float) -> None:
    """Axes from `at` on, margins in inches: of fixed size, so that ends of lines can be named beside them."""
    across, up = fig.get_size_inches()
    draw(fig.add_axes(((at + left) / across, 0.5 / up, (width - left - right) / across, 1 - 0.85 / up)))


def picture(name: str, title: str, draw: Drawing, *, width: float = 5.2, height: float = 3.3, **margins: float) -> str:
    fig = sheet(width, height)
    place(fig, draw, width=width, **margins)
    fig.axes[0].set_title(title)
    return f'<figure role="img" aria-label="{escape(title)}">{svg(fig, name)}</figure>\n'


def figures(*pictures: str) -> str:
    return f'<div class="figures">\n{"".join(pictures)}</div>\n'


def side_by_side(panels: Sequence[tuple[str, str, Drawing]]) -> str:
    """(title, what it is of, drawing) of each; without any, what says so."""
    width = 5.2
    fig = sheet(width * max(1, len(panels)), 3.4 if panels else 0.5)
    for n, (title, kind, draw) in enumerate(panels):
        place(fig, draw, right=1.4, at=n * width, width=width)
        fig.axes[n].set_title(title)
        fig.axes[n].set_xlabel(f"{fig.axes[n].get_xlabel()}; {kind}")
    if not panels:
        fig.text(0.02, 0.4, "not measured")
    return svg(fig, "f")


# -- axes --------------------------------------------------------------------------------------------------------------


def log_axis(axis: Any, show: Callable[[float], str]) -> None:
    """Logarithmic, with ticks for what is drawn on it by now."""
    axis.axes.autoscale_view()
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))


def counts(ax: Axes, found: Iterable[float], label: str) -> None:
    """A logarithmic x axis with its ticks where something was measured."""
    ticks = sorted(set(found))
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
    ax.set_xlabel(label)


def lines(ax: Axes, named: dict[str, list[tuple[float, float]]], colours: Sequence[str] = COLOURS) -> None:
    """Each with its name beside its end, apart from the others'. On axes whose scales are set."""
    for n, (_, points) in enumerate(named.items()):
        ax.plot(
            *zip(*sorted(points), strict=True),
            color=colours[n % len(colours)],
            marker=MARKS[n % len(MARKS)],
            markersize=4,
            linewidth=1.5,
        )
    name_ends(ax, [(*max(points), name, colours[n % len(colours)]) for n, (name, points) in enumerate(named.items())])


def name_ends(ax: Axes, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """(x, y, name, colour) of each line's end."""
    ax.autoscale_view()
    scale = ax.transData - ax.transAxes
    by_height = sorted((scale.transform((x, y))[1], x, y, name, colour) for x, y, name, colour in ends)
    gap = 12 / (72 * ax.figure.get_size_inches()[1] * ax.get_position().height)
    heights: list[float] = []
    for height, *_ in by_height:
        heights.append(max(height, heights[-1] + gap) if heights else max(height, 0.0))
    for n in reversed(range(len(heights))):
        heights[n] = min(heights[n], heights[n + 1] - gap if n + 1 < len(heights) else 1.02)
    for height, (_, x, y, name, colour) in zip(heights, by_height, strict=True):
        arrow = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.8,
            "linestyle": ":",
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 2,
        }
        where = {"textcoords": "axes fraction", "va": "center", "fontsize": 8, "annotation_clip": False}
        ax.annotate(name, (x, y), (1.07, height), arrowprops=arrow, **where)


def bars(ax: Axes, rows: Sequence[tuple[str, float, str]], label: str, show: Callable[[float], str]) -> None:
    """Rows (name, length, colour) from above; on a logarithmic axis where they are far apart."""
    names, values, colours = zip(*rows, strict=True)
    ax.barh(names, values, color=colours)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    least, most = min((v for v in values if v > 0), default=1), max(values)
    if most > 50 * least:
        ax.set_xscale("log")
        ax.set_xlim(least / 3, most * 15)
        log_axis(ax.xaxis, plain)
        label += ", logarithmic"
    else:
        ax.set_xlim(0, 1.3 * most or 1)
    where = {"textcoords": "offset points", "va": "center", "fontsize": 8}
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    for n, value in enumerate(values):
        ax.annotate(show(value), (max(value, ax.get_xlim()[0]), n), (4, 0), bbox=white, **where)
    ax.set_xlabel(label)


# -- by length ---------------------------------------------------------------------------------------------------------

TIMES = {
    "prefill": "prefill",
    "load_cold": "load, cold",
    "load_warm": "load, warm",
    "attach": "attach",
    "copy_pinned": "from host memory",
    "question": "question",
    "step": "one step",
    "answer": "answer",
}


def ratio_names(cells: Sequence[Cell]) -> dict[str, str]:
    """Names of the ratios that are in the cells."""
    hosts = sorted({int(name[5:]) for cell in cells for name in cell["ratios"] if name.startswith("host_")})
    return {"paper": "paper's", "reader": "reader's", **{f"host_{n}": f"host's, N = {n:,}" for n in hosts}}


def draw_seconds(ax: Axes, cells: Sequence[Cell]) -> None:
    counts(ax, (cell["document"] for cell in cells), "tokens of the document")
    ax.set_yscale("log")
    found = {
        shown: [(cell["document"], median(s)) for cell in cells if (s := cell["seconds"].get(name))]
        for name, shown in TIMES.items()
    }
    lines(ax, {name: points for name, points in found.items() if points})
    log_axis(ax.yaxis, seconds_tick)


def draw_ratios(ax: Axes, cells: Sequence[Cell]) -> None:
    found = {
        shown: [(cell["document"], cell["ratios"][name]) for cell in cells if name in cell["ratios"]]
        for name, shown in ratio_names(cells).items()
    }
    drawn = [(tokens, ratio) for points in found.values() for tokens, ratio in points]
    counts(ax, {*(tokens for tokens, _ in drawn), *POINTS}, "tokens of the document")
    ax.set_yscale("log")
    ax.set_xlim(min(60, *(0.8 * x for x, _ in drawn)), max(4500, *(1.1 * x for x, _ in drawn)))
    ax.set_ylim(min(0.8, *(0.8 * y for _, y in drawn)), max(90, *(1.3 * y for _, y in drawn)))
    log_axis(ax.yaxis, lambda x: f"{plain(x)}x")
    ax.axhspan(*BAND, color="#f3ead2", zorder=0)
    ax.plot(*zip(*POINTS.items(), strict=True), "*", color=BLACK, markersize=11, zorder=5)
    for tokens, ratio in POINTS.items():
        ax.annotate(f"paper: {ratio}x", (tokens, ratio), (-7, 5), textcoords="offset points", ha="right", fontsize=8)
    lines(ax, {name: points for name, points in found.items() if points}, (BLUE, RED, SKY, GREEN, ORANGE, PINK, GREY))


# -- by agents ---------------------------------------------------------------------------------------------------------

STEPS = {"step": "one shared copy", "step_copied": "a copy each"}
"""Samples of a step of all agents, by what they read; those of other names are drawn by their name."""


def draw_agents(ax: Axes, cells: Sequence[Cell]) -> None:
    """Seconds of a token by what each agent reads."""
    counts(ax, (cell["agents"] for cell in cells), "agents on one document")
    ax.set_yscale("log")
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        for name, samples in cell["seconds"].items():
            if name.startswith("step") and (middle := median(samples)) is not None:
                found.setdefault(STEPS.get(name, name), []).append((cell["agents"], middle / cell["agents"]))
    scratch = median([cell["scratch_per_agent_s"] / ANSWER for cell in cells if "scratch_per_agent_s" in cell])
    if scratch is not None:
        ax.axhline(scratch, color=GREY, linestyle="--", linewidth=1.5)
        where = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 8}
        ax.annotate(
            "from scratch, measured for few agents", (1, scratch), (0, -3), xycoords=("axes fraction", "data"), **where
        )
    lines(ax, found)
    log_axis(ax.yaxis, seconds_tick)


def draw_bytes(ax: Axes, cells: Sequence[Cell]) -> None:
    counts(ax, (cell["agents"] for cell in cells), "agents on one document")
    ax.set_yscale("log", base=2)
    names = {"one shared copy": "bytes_per_agent", "a copy each": "bytes_per_agent_copied"}
    lines(ax, {shown: [(cell["agents"], cell[name]) for cell in cells] for shown, name in names.items()})
    log_axis(ax.yaxis, lambda x: render_bytes(x).replace(".0 ", " "))
    ax.yaxis.set_major_locator(LogLocator(base=2, numticks=7))


# -- exactness ---------------------------------------------------------------------------------------------------------


def draw_gaps(ax: Axes, rows: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """A row (name, gaps, colour) a way: a dot for each token that is another."""
    for n, (_, gaps, colour) in enumerate(rows):
        # Apart from each other, and the same at every run.
        ys = [n + 0.5 * ((0.618 * i) % 1 - 0.5) for i in range(len(gaps))]
        ax.plot(
            [max(gap, LEAST_GAP) for gap in gaps], ys, "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0
        )
    ax.set_xscale("log")
    ax.set_xlim(0.5 * max(LEAST_GAP, min(gap for _, gaps, _ in rows for gap in gaps)), None)
    log_axis(ax.xaxis, lambda x: f"{x:.0e}" if x < 1e-3 else plain(x))
    ax.set_yticks(range(len(rows)), [textwrap.fill(name, 44) for name, _, _ in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("gap of the two largest logits from scratch, logarithmic")


# -- compression -------------------------------------------------------------------------------------------------------


def form_colours(cells: Sequence[Cell]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(cell["shape"]["form"] for cell in cells), COLOURS, strict=False))


def draw_sizes(ax: Axes, cells: Sequence[Cell]) -> None:
    colours = form_colours(cells)
    rows = [
        (
            f"{c['shape']['form']} {c['shape']['codec']}",
            100 * (1 - c["verdicts"]["all"]["smaller"]),
            colours[c["shape"]["form"]],
        )
        for c in cells
    ]
    bars(ax, rows, "size, per cent of the plain KV", lambda x: f"{x:.1f} %")
    ax.axvline(100 - SMALLER, color=BLACK, linestyle="--", linewidth=1)


def draw_speeds(ax: Axes, cells: Sequence[Cell]) -> None:
    """Speed of unpacking against the share saved; the corner where a form pays is shaded."""
    colours = form_colours(cells)
    marks = dict(zip(dict.fromkeys(cell["shape"]["codec"] for cell in cells), MARKS, strict=False))
    found = [
        (100 * c["verdicts"]["all"]["smaller"], c["verdicts"]["all"]["bytes_per_s"] / 1e9, c["shape"]) for c in cells
    ]
    ax.set_yscale("log")
    ax.set_xlim(min(0, *(x for x, _, _ in found)) - 2, max(SMALLER + 10, *(x + 3 for x, _, _ in found)))
    ax.set_ylim(min(0.5, *(0.7 * y for _, y, _ in found)), max(3, *(1.4 * y for _, y, _ in found)))
    log_axis(ax.yaxis, plain)
    ax.fill_between([SMALLER, ax.get_xlim()[1]], FAST, ax.get_ylim()[1], color="#f3ead2", zorder=0, linewidth=0)
    ax.annotate(
        "pays", (ax.get_xlim()[1], ax.get_ylim()[1]), (-4, -12), textcoords="offset points", ha="right", fontsize=8
    )
    for x, y, shape in found:
        ax.plot(x, y, marks[shape["codec"]], color=colours[shape["form"]], markersize=6, alpha=0.85)
    handles = [Line2D([], [], color=colour, linewidth=5, label=form) for form, colour in colours.items()]
    handles += [Line2D([], [], color=BLACK, marker=mark, linestyle="", label=codec) for codec, mark in marks.items()]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, handlelength=1)
    ax.set_xlabel("smaller by, per cent")
    ax.set_ylabel("decompress on one core, GB/s")


# -- prices, and the simulator -----------------------------------------------------------------------------------------


def draw_dollars(ax: Axes, ways: Sequence[tuple[float, Cell]]) -> None:
    """(tokens, costs) of every length."""
    counts(ax, (tokens for tokens, _ in ways), "tokens of the document")
    ax.set_yscale("log")
    found = {"prefill": "prefill", "reuse": "reuse", "KV sent (egress)": "egress"}
    drawn = {shown: [(tokens, costs[name]) for tokens, costs in ways if costs[name]] for shown, name in found.items()}
    drawn["load from disk, reuse"] = [(tokens, costs["hosting"][-1]["read"]) for tokens, costs in ways]
    lines(ax, {name: points for name, points in drawn.items() if points})
    log_axis(ax.yaxis, lambda x: f"${plain(x)}")


def draw_policies(ax: Axes, results: Sequence[Cell], value: Callable[[Cell], float], label: str) -> None:
    bars(ax, [(r["policy"], value(r), COLOURS[n]) for n, r in enumerate(results)], label, digits)


def draw_waits(ax: Axes, results: Sequence[Cell]) -> None:
    """From p50 to p99, to the first token and to the whole answer."""
    names = []
    for result in results:
        for shown, name, colour in (("first token", "first", BLUE), ("answer", "answer", RED)):
            ends = [result["estimates"].get(f"{name}_{p}_s", {}).get("value") for p in ("p50", "p99")]
            names.append(f"{result['policy']}: {shown}")
            if None in ends:
                continue
            ax.plot(ends, [len(names) - 1] * 2, "o-", color=colour, markersize=5)
            for x, ha, by in ((ends[0], "right", -6), (ends[1], "left", 6)):
                where = {"textcoords": "offset points", "va": "center", "ha": ha, "fontsize": 8}
                ax.annotate(seconds(x), (x, len(names) - 1), (by, 0), **where)
    ax.set_xscale("log")
    ax.margins(x=0.25)
    log_axis(ax.xaxis, seconds_tick)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("p50 to p99, logarithmic")


def draw_judged(ax: Axes, judged: Sequence[Cell]) -> None:
    """Predicted by measured makespan, over the measured one; runs that the model was fitted on are hollow."""
    ax.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="#f3ead2", zorder=0)
    ax.axhline(1, color=GREY, linewidth=1)
    for run in judged:
        x, y, own = run["measured_s"], run["predicted_s"] / run["measured_s"], run["use"] == "judge"
        ax.plot(x, y, "o", color=BLUE, markerfacecolor=BLUE if own else "white", markersize=6)
        if own:
            ax.annotate(f"{run['agents']:,} agents", (x, y), (6, 5), textcoords="offset points", fontsize=8)
    ax.set_xscale("log")
    ax.margins(x=0.25)
    log_axis(ax.xaxis, seconds_tick)
    far = max(2 * TOLERANCE, *(1.2 * abs(run["predicted_s"] / run["measured_s"] - 1) for run in judged))
    ax.set_ylim(1 - far, 1 + far)
    ax.set_xlabel("measured makespan, logarithmic")
    ax.set_ylabel("predicted / measured")
