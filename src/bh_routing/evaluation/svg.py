"""Plots as SVG text, without a plotting library: points with intervals, lines, bars, heat maps.

Every string that comes from outside is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

# Distinguishable without colour vision too (Okabe & Ito), darkened where needed for lines on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#9a5b91", "#8a6d00", "#3a87b7", "#000000", "#7f7f7f")
MARKS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one name; ``low`` and ``high`` are interval ends of y, or empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    labels: Sequence[str] = ()
    line: bool = False
    points: bool = True


def ticks(low: float, high: float, num: int = 6) -> list[float]:
    """Round numbers between two ends, at most about ``num``.

    Examples
    --------
    >>> ticks(0.3, 4.2, 5)
    [1.0, 2.0, 3.0, 4.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(1, num - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 720,
    height: int = 400,
    percent: bool = False,
    front: Sequence[tuple[float, float]] = (),
    y_from_zero: bool = False,
    x_names: Sequence[str] = (),
) -> str:
    """A plot with axes and a legend. ``front``: a dashed staircase through these points.

    The range is that of the points; an interval that leaves it is cut off at the edge.
    """
    xs = [x for s in series for x in s.x if math.isfinite(x)]
    ys = [y for s in series for y in s.y if math.isfinite(y)]
    if not xs or not ys:
        return _frame(width, 60, title, f'<text x="12" y="44">{escape("nothing to show")}</text>')
    legend_width = 24 + 7 * max(len(s.name) for s in series)
    left, right, top, bottom = 64, min(legend_width + 16, width // 3), 36, 52
    x0, x1 = _padded(min(xs), max(xs))
    y0, y1 = _padded(min(0.0, *ys) if y_from_zero else min(ys), max(ys))
    if y_from_zero and min(ys) >= 0:
        y0 = 0.0

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        y = min(max(y, y0), y1)
        return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = []
    for y in ticks(y0, y1):
        text = f"{y:.3g}%" if percent else f"{y:g}"
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
            f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    marks = list(enumerate(x_names)) if x_names else [(x, f"{x:g}") for x in ticks(x0, x1, 9)]
    for x, name in marks:
        parts.append(
            f'<text x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{escape(str(name))}</text>'
        )
    if front:
        ordered = sorted(front)
        path = f"M{px(ordered[0][0]):.1f},{py(ordered[0][1]):.1f}"
        for (_, before), (x, y) in pairwise(ordered):
            path += f"L{px(x):.1f},{py(before):.1f}L{px(x):.1f},{py(y):.1f}"
        parts.append(f'<path class="front" d="{path}"/>')
    for i, one in enumerate(series):
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[(i // len(COLOURS) + i) % len(MARKS)]
        points = [
            (j, px(x), py(y))
            for j, (x, y) in enumerate(zip(one.x, one.y, strict=True))
            if math.isfinite(x + y)
        ]
        if one.line:
            path = "L".join(f"{x:.1f},{y:.1f}" for _, x, y in points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        for j, x, y in points if one.points else []:
            if one.low:
                parts.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{py(one.low[j]):.1f}" y2="{py(one.high[j]):.1f}" '
                    f'stroke="{colour}"/>'
                )
            label = one.labels[j] if one.labels else f"{one.name}: {one.x[j]:g}, {one.y[j]:.4g}"
            parts.append(_mark(mark, x, y, colour, label))
        legend = top + 8 + 17 * i
        parts.append(
            _mark(mark, width - right + 14, legend, colour, one.name)
            + f'<text x="{width - right + 24}" y="{legend + 4}">{escape(one.name)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>'
        f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{height - bottom}"/>'
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 12}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(16 {(top + height - bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return _frame(width, max(height, top + 17 * len(series) + 10), title, "".join(parts))


def heat(
    rows: Sequence[Sequence[float]], *, title: str, names: Sequence[str], labels: Sequence[Sequence[str]]
) -> str:
    """Rows of cells shaded from white (0) to blue (the largest value); ``labels`` show on hover."""
    top = max((v for row in rows for v in row if math.isfinite(v)), default=0.0) or 1.0
    columns = max(len(row) for row in rows)
    left, width, size = 20 + 7 * max(len(n) for n in names), 720, 18
    cell = (width - left - 10) / columns
    parts = []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = 34 + i * (size + 2)
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for j, value in enumerate(row):
            shade = 0.0 if not math.isfinite(value) else max(0.0, value) / top
            parts.append(
                f'<rect x="{left + j * cell:.2f}" y="{y}" width="{max(0.5, cell - 0.5):.2f}" height="{size}" '
                f'fill="{shaded(shade)}"><title>{escape(labels[i][j])}</title></rect>'
            )
    return _frame(width, 40 + len(rows) * (size + 2), title, "".join(parts))


def shaded(share: float) -> str:
    """A colour from white (0) to blue (1)."""
    share = min(1.0, max(0.0, share))
    return "#" + "".join(f"{round(255 + share * (end - 255)):02x}" for end in (8, 81, 156))


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def _mark(mark: str, x: float, y: float, colour: str, label: str) -> str:
    hover = f"<title>{escape(label)}</title>"
    if mark == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{hover}</circle>'
    shapes = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
    }
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[mark])
    return f'<polygon points="{points}" fill="{colour}">{hover}</polygon>'


def _frame(width: int, height: int, title: str, body: str) -> str:
    # A bold letter is about 0.6 of its size wide: a long title gets smaller letters rather than no end.
    size = min(14.0, round((width - 24) / (0.6 * max(1, len(title))), 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12">'
        "<style>.grid{stroke:#e4e4e4}.axis{stroke:#444}.front{fill:none;stroke:#888;stroke-dasharray:5 4}</style>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="12" y="20" font-size="{size:g}" font-weight="600">{escape(title)}</text>{body}</svg>'
    )
