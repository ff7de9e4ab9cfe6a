"""Numbers, sentences and tables of paper_report.py, as text and as HTML."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

Cell = dict[str, Any]
"""An object of paper.json."""

MISSING = "not measured"
CSS = """
body{margin:0 auto;max-width:68rem;padding:1rem;background:#fff;color:#1a1a1a;font:16px/1.5 system-ui,"DejaVu Sans",sans-serif}
h1,h2,h3{line-height:1.2}h2{margin-top:2.5rem;border-bottom:2px solid #ddd}
p{max-width:46rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;margin:.5rem 0 1rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}thead th{border-bottom:2px solid #888}
td{white-space:nowrap;font-variant-numeric:tabular-nums}.text td{white-space:normal}.text td:first-child{min-width:14rem}
tbody th{padding-top:1rem}
th:first-child,td:first-child,.text th,.text td{text-align:left}
.figures{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;min-width:0;max-width:100%}svg{display:block;max-width:100%;height:auto}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;overflow-wrap:anywhere}dt{font-weight:600}dd{margin:0}
@media(max-width:40rem){dl{display:block}dd{margin:0 0 .4rem}}
small{color:#444}.word{border-radius:.3rem;padding:.05rem .4rem;font-weight:600;white-space:nowrap}
.good{background:#cdeee2;color:#00402e}.part{background:#fbe8bf;color:#4d3500}.bad{background:#f9d8c6;color:#5c2800}
.none{background:#e6e6e6;color:#333}
""".strip()

# -- numbers -----------------------------------------------------------------------------------------------------------


def digits(x: float) -> str:
    """Three of them or more, never an exponent."""
    if not x:
        return "0"
    return f"{x:,.{min(12, max(0, 2 - math.floor(math.log10(abs(x)))))}f}"


def seconds(x: float) -> str:
    if x >= 1:
        return f"{digits(x)} s"
    return f"{digits(x * 1e3)} ms" if x >= 1e-3 else f"{digits(x * 1e6)} µs"


def plain(x: float) -> str:
    """A tick: 0.01, 1, 10,000."""
    return f"{x:,.0f}" if round(x, 9) >= 1 else f"{x:.6f}".rstrip("0")


def seconds_tick(x: float) -> str:
    """1 s, 100 ms."""
    return f"{plain(x)} s" if x >= 1 else f"{plain(x * 1e3)} ms" if x >= 1e-3 else f"{plain(x * 1e6)} µs"


def times(x: float) -> str:
    return f"{digits(x)}x"


def median(samples: Sequence[float] | None) -> float | None:
    return statistics.median(samples) if samples else None


def share(x: float) -> str:
    return f"{100 * x:.4g} %"


def sampled(samples: Sequence[float] | None) -> str:
    """The median, and of several the spread: the largest less the smallest."""
    middle = median(samples)
    if middle is None or not samples:
        return MISSING
    spread = f" ({100 * (max(samples) - min(samples)) / middle:.0f} %)" if len(samples) > 1 and middle else ""
    return seconds(middle) + spread


def estimated(found: Cell | None, show: Callable[[float], str] = digits) -> str:
    """A simulated value, and its standard error as a share of it."""
    if found is None or found["value"] is None:
        return ""
    error = f" ± {100 * found['error'] / abs(found['value']):.2g} %" if found["error"] and found["value"] else ""
    return show(found["value"]) + error


def listed(words: Iterable[Any]) -> str:
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


# -- HTML --------------------------------------------------------------------------------------------------------------


class Html(str):
    """Text that is escaped already."""


def safe(text: Any) -> str:
    return text if isinstance(text, Html) else escape(str(text))


def table(head: str | Sequence[str], rows: Iterable[str | Sequence[Any]], kind: str = "") -> str:
    """Columns of a line "a | b" or a list; a row that is text is a heading; kind "text" sets every column to the left."""
    names = head.split(" | ") if isinstance(head, str) else head
    cells = "".join(f"<th>{safe(name)}</th>" for name in names)

    def line(row: str | Sequence[Any]) -> str:
        if isinstance(row, str):
            return f'<tr><th colspan="{len(names)}">{safe(row)}</th></tr>\n'
        return f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in row)}</tr>\n"

    lines = "".join(map(line, rows))
    return f'<div class="wide"><table class="{kind}"><thead><tr>{cells}</tr></thead>\n<tbody>{lines}</tbody></table></div>\n'


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """Names, and what each is."""
    return f"<dl>{''.join(f'<dt>{safe(name)}</dt><dd>{safe(value)}</dd>' for name, value in rows)}</dl>\n"


def heading(text: str) -> str:
    return f"<h3>{safe(text)}</h3>\n"


def says(*sentences: str) -> str:
    return f"<p>{safe(' '.join(sentences))}</p>\n"


def page(title: str, about: str, sections: Iterable[tuple[str, str]]) -> str:
    """A file that stands alone, from (heading, HTML) of its sections."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>\n{html}</section>\n" for heading, html in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>\n'
        f"<style>\n{CSS}\n</style></head>\n<body><h1>{escape(title)}</h1>\n{says(about)}{body}</body></html>\n"
    )


# -- paper.json --------------------------------------------------------------------------------------------------------


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
