"""A figure of curves as SVG text: panels side by side, logarithmic x, linear y from 0. The same data give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 34, 40
FONT = 'font-family="system-ui, sans-serif"'


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with x > 0; one point is a dot, none is left out."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    curves: Sequence[Curve]


def svg(panels: Sequence[Panel], *, x_label: str, y_label: str, columns: int = 2) -> str:
    """All panels, and one legend of the curves by their names."""
    rows = -(-len(panels) // columns)
    legend = {curve.name: curve for panel in panels for curve in panel.curves}
    width, height = columns * WIDTH, rows * HEIGHT + 16 + 20 * -(-len(legend) // 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'{FONT} font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for n, panel in enumerate(panels):
        parts.append(f'<g transform="translate({n % columns * WIDTH} {n // columns * HEIGHT})">')
        parts += _panel(panel, x_label, y_label)
        parts.append("</g>")
    for n, curve in enumerate(legend.values()):
        x, y = LEFT + n % 3 * (width - LEFT) / 3, rows * HEIGHT + 16 + n // 3 * 20
        parts.append(_stroke(f"M{x:.1f} {y:.1f}h28", curve))
        parts.append(_text(x + 34, y + 4, curve.name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, x_label: str, y_label: str) -> list[str]:
    xs = [x for curve in panel.curves for x, _ in curve.points]
    ys = [y for curve in panel.curves for _, y in curve.points]
    if not xs:
        return [_text(WIDTH / 2, HEIGHT / 2, f"{panel.title}: not measured", "middle")]
    low, high = math.log2(min(xs)), math.log2(max(xs))
    step = _step(max(ys))
    top = step * math.ceil(max(ys) / step)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 20, panel.title, "start", bold=True)]
    for n in range(round(top / step) + 1):
        x, y = at(min(xs), n * step)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{n * step:g}", "end"))
    for x in sorted(set(xs)):
        parts.append(_text(at(x, 0)[0], HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 32, x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 12 {middle:g})">{_text(12, middle + 4, y_label, "middle")}</g>')
    for curve in panel.curves:
        places = [at(*point) for point in sorted(curve.points)]
        if len(places) > 1:
            parts.append(_stroke("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), curve))
        if not curve.dashed:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>' for x, y in places]
    return parts


def _step(largest: float) -> float:
    """1, 2 or 5 times a power of ten, so that there are 3 to 7 lines."""
    power = 10.0 ** math.floor(math.log10(max(largest, 1e-9) / 3))
    return next(power * k for k in (1, 2, 5, 10) if largest / (power * k) <= 6)


def _stroke(path: str, curve: Curve) -> str:
    dash = ' stroke-dasharray="6 4"' if curve.dashed else ""
    return f'<path d="{path}" fill="none" stroke="{curve.colour}" stroke-width="2"{dash}/>'


def _text(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222"{weight}>{escape(text)}</text>'
