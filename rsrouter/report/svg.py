"""Small charts as SVG text that follows the page's colours (CSS variables), light or dark.

Marks carry classes, never colours: `c0` to `c7` are the colour-blind safe series colours of the page's style
sheet. Every text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

Array = NDArray[np.float64]


def number(value: float) -> str:
    """A coordinate with one decimal, without a trailing `.0`."""
    return f"{value:.1f}".removesuffix(".0")


def nice_step(span: float, most: int) -> float:
    """A step of 1, 2, 2.5 or 5 times a power of ten that gives at most `most` intervals."""
    raw = max(span, 1e-12) / most
    power = 10.0 ** np.floor(np.log10(raw))
    return float(next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * 0.999))


class Plot:
    """An SVG chart under construction: linear axes, marks in data coordinates.

    Args:
        width, height: of the view box, in CSS pixels at full size.
        x, y: data ranges `(low, high)`.
        label: what the chart shows, for those who cannot see it.
        margins: left, top, right, bottom.
    """

    def __init__(
        self,
        width: float,
        height: float,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        label: str,
        margins: tuple[float, float, float, float] = (46, 14, 14, 44),
    ) -> None:
        self.width, self.height, self.x, self.y, self.label = width, height, x, y, label
        self.left, self.top = margins[0], margins[1]
        self.right, self.bottom = width - margins[2], height - margins[3]
        self._parts: list[str] = []
        self.boxes: list[tuple[float, float, float, float]] = []

    def px(self, x: float) -> float:
        """Horizontal pixel of a data value."""
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def py(self, y: float) -> float:
        """Vertical pixel of a data value."""
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - self.top)

    def raw(self, markup: str) -> None:
        """Adds markup that is already safe."""
        self._parts.append(markup)

    def text(self, x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> None:
        """Text at a pixel position."""
        self.raw(f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" class="{escape(classes)}">{escape(text)}</text>')

    def axes(
        self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_title: str, y_title: str
    ) -> None:
        """Grid lines, tick labels and titles."""
        for value, word in y_ticks:
            y = number(self.py(value))
            self.raw(f'<line class="grid" x1="{number(self.left)}" x2="{number(self.right)}" y1="{y}" y2="{y}"/>')
            self.text(self.left - 8, self.py(value) + 4, word, "tick", "end")
        for value, word in x_ticks:
            x = number(self.px(value))
            self.raw(f'<line class="tickmark" x1="{x}" x2="{x}" y1="{number(self.bottom)}" y2="{number(self.bottom + 5)}"/>')
            self.text(self.px(value), self.bottom + 19, word, "tick", "middle")
        self.raw(f'<path class="axis" d="M{number(self.left)} {number(self.bottom)}H{number(self.right)}"/>')
        self.text((self.left + self.right) / 2, self.height - 5, x_title, "title", "middle")
        self.text(0, self.top - 14, y_title, "title")

    def linear_axes(self, x_title: str, y_title: str, *, x_most: int = 8, percent: bool = True) -> None:
        """Axes with round ticks; `percent` writes shares as percentages."""
        step = nice_step(self.x[1] - self.x[0], x_most)
        xs = np.arange(self.x[0], self.x[1] + step * 1e-9, step)
        step_y = nice_step(self.y[1] - self.y[0], 5)
        ys = np.arange(self.y[0], self.y[1] + step_y * 1e-9, step_y)
        self.axes(
            [(float(v), f"{v:g}") for v in np.round(xs, 9)],
            [(float(v), f"{100 * v:g}%" if percent else f"{v:,.0f}") for v in np.round(ys, 9)],
            x_title,
            y_title,
        )

    def points(self, x: Array, y: Array) -> str:
        """Path commands through data points."""
        return "M" + "L".join(f"{number(self.px(a))} {number(self.py(b))}" for a, b in zip(x, y, strict=True))

    def line(self, x: Array, y: Array, classes: str, title: str = "") -> None:
        """A line through data points."""
        hint = f"<title>{escape(title)}</title>" if title else ""
        self.raw(f'<path class="line {escape(classes)}" d="{self.points(x, y)}">{hint}</path>')

    def band(self, x: Array, low: Array, high: Array, classes: str, title: str = "") -> None:
        """The area between two lines."""
        hint = f"<title>{escape(title)}</title>" if title else ""
        back = self.points(x[::-1], low[::-1]).replace("M", "L", 1)
        self.raw(f'<path class="{escape(classes)}" d="{self.points(x, high)}{back}Z">{hint}</path>')

    def label_on_line(
        self, x: Array, y: Array, text: str, classes: str, others: Sequence[Array], *, leader: bool = False, size: float = 12.5
    ) -> None:
        """Writes `text` beside the line where it is farthest from the `others` (same x) and from earlier labels.

        Where every place is taken nothing is written, unless with `leader`: then it stands apart, up to the right, and
        a thin line leads from it to the curve.
        """
        width, height = (0.6 if leader else 0.56) * size * len(text), size * 1.1
        px, py = (np.array([project(v) for v in values]) for project, values in ((self.px, x), (self.py, y)))
        obstacles = np.array([[self.py(v) for v in other] for other in others]).reshape(len(others), len(x))
        best, where = 0.0, None
        for i in range(2, len(x) - 2, 2):
            if y[i] <= self.y[0] + 0.015 * (self.y[1] - self.y[0]):
                continue
            for away in (0.0, -1.0, 30.0, 60.0, 90.0, 120.0) if leader else (0.0, -1.0):
                left, base = (px[i] - 6 - width, py[i] + 5 + height) if away < 0 else (px[i] + 5 + 0.5 * away, py[i] - 5 - away)
                box = (left, base - height, left + width, base)
                if box[0] < self.left + 3 or box[2] > self.right - 1 or box[1] < self.top - 2 or box[3] > self.bottom - 3:
                    continue
                inside = (px >= box[0] - 4) & (px <= box[2] + 4)
                gap = min(_gap(obstacles[:, inside], box[1], box[3]), 2 * _gap(py[None, inside], box[1], box[3]) + 4, 26.0)
                gap = min([gap, *(max(box[0] - b[2], b[0] - box[2], box[1] - b[3], b[1] - box[3]) - 2 for b in self.boxes)])
                if away > 0 and gap < 4:
                    continue
                score = (
                    min(gap, 12.0) + gap / 10 - 4.0 * abs(i / len(x) - 0.35) - 0.05 * max(away, 0.0) + (1.5 if away == 0 else 0.0)
                )
                if score > best:
                    best, where = score, (box, i, away)
        if where is not None:
            box, i, away = where
            self.boxes.append(box)
            if away > 0:
                start = f"M{number(px[i])} {number(py[i])}"
                self.raw(f'<path class="leader {escape(classes)}" d="{start}L{number(box[0] + 6)} {number(box[3] + 2)}"/>')
                self.raw(f'<circle class="dot {escape(classes)}" cx="{number(px[i])}" cy="{number(py[i])}" r="3.2"/>')
            self.text(box[0], box[3] - 2, text, f"onlabel {classes}")

    def render(self, classes: str = "", marks: str = "") -> Markup:
        """The finished `<svg>`."""
        return Markup(
            f'<svg class="chart {classes}" viewBox="0 0 {number(self.width)} {number(self.height)}" role="img" '
            f'aria-label="{escape(self.label)}" {marks}>' + "".join(self._parts) + "</svg>"
        )


@cache
def style_sheet() -> str:
    """The page's style sheet: the one palette of every chart."""
    return files("rsrouter.report").joinpath("templates", "report.css").read_text(encoding="utf-8")


def standalone(chart: Markup, legend: Sequence[tuple[str, str]] = (), title: str = "", lines: Sequence[str] = ()) -> str:
    """The wide form of a chart as a file of its own, with the light colours of the page's style sheet.

    Args:
        chart: what `charts` made, its wide form first.
        legend: names and colour classes, written below.
        title: written above.
        lines: written below the legend.
    """
    body = str(chart).split("</svg>", 1)[0].removeprefix("<svg ")
    width, height = (float(v) for v in body.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split())
    marks, x, below = [], 8.0, height + 16
    for name, colour in legend:
        room = 34 + 7.2 * len(name)
        if x > 8 and x + room > width:
            x, below = 8.0, below + 18
        marks.append(f'<rect class="key {escape(colour)}" x="{number(x)}" y="{number(below - 10)}" width="12" height="12"/>')
        marks.append(f'<text x="{number(x + 17)}" y="{number(below)}">{escape(name)}</text>')
        x += room
    for line in lines:
        below += 19
        marks.append(f'<text x="8" y="{number(below)}" class="title">{escape(line)}</text>')
    tall, above = (below + 8 if marks else height), (28 if title else 0)
    head = f'<text x="8" y="-9" font-weight="bold">{escape(title)}</text>' if title else ""
    style = style_sheet()
    root = style[style.index(":root") : style.index("}") + 1]
    rules = dict.fromkeys(line.strip() for line in style.splitlines() if line.strip().startswith(("svg ", ".c0 ", ".c4 ")))
    css = "\n".join([root, *rules, "svg { background: #fff; font-family: sans-serif; }"])
    new = f'viewBox="0 {number(-above)} {number(width)} {number(tall + above)}"'
    body = body.replace(f'viewBox="0 0 {number(width)} {number(height)}"', new, 1)
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{number(width)}" height="{number(tall + above)}" '
    return (start + body).replace(">", f"><style>{css}</style>{head}", 1) + "".join(marks) + "</svg>"


def _gap(lines: Array, top: float, bottom: float) -> float:
    """Smallest vertical distance between lines (pixels) and the strip from `top` to `bottom`; negative inside."""
    if lines.size == 0:
        return 100.0
    # segments, not points: a curve that drops within one step crosses everything between
    ends = np.stack([lines[:, :-1], lines[:, 1:]]) if lines.shape[1] > 1 else np.stack([lines, lines])
    return float(np.maximum(top - ends.max(0), ends.min(0) - bottom).min())
