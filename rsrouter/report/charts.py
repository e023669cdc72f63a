"""Every chart of reports, cards and studies: on a page in a wide and a narrow form, and as SVG files of their own.

There is one palette, the colour classes `c0` to `c7` of the style sheet (after Okabe and Ito 2008, told apart with every common
colour blindness). A routed classifier is `c0`; experts take the others in the order of their noise levels, whatever else is in a
report, so that an expert keeps its colour in every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from rsrouter.report import curves
from rsrouter.report.regret import Losses, at_radii, by_stage
from rsrouter.report.summary import EXPERT, OTHER, ROUTED, Series, Summary
from rsrouter.report.svg import Plot, standalone
from rsrouter.results import Table

Array = NDArray[np.float64]

WIDE, NARROW = "wide", "narrow"
_SIZES = {WIDE: (860.0, 430.0), NARROW: (380.0, 360.0)}
_SMALL = {WIDE: (420.0, 280.0), NARROW: (380.0, 270.0)}
RADIUS = "L2 radius (pixels in [0, 1])"


def both(build: Callable[[str], Markup]) -> Markup:
    """The wide and the narrow form of one chart."""
    return Markup("").join(build(form) for form in (WIDE, NARROW))


def colours(summary: Summary) -> dict[str, str]:
    """Series name to colour class: experts by noise level from `c1` on, routed and other runs `c0`, then from `c7` down."""
    order = {e.name: (e.sigma, k) for t in summary.tables if t.about for k, e in enumerate(t.about.experts)}
    experts = [t.name for t in summary.named(EXPERT)]
    known = sorted((name for name in experts if name in order), key=lambda name: order[name])
    found = {name: f"c{1 + i % 7}" for i, name in enumerate([*known, *(name for name in experts if name not in order)])}
    runs = {t.name: f"c{-i % 8}" for i, t in enumerate(summary.named(ROUTED, OTHER))}
    return {s.name: (runs | found)[s.name] for s in summary.series if s.name in runs or s.name in found}


def curve(summary: Summary) -> Markup:
    """Certified accuracy over radius, with intervals and direct labels."""
    what = "Certified accuracy" if summary.labelled else "Share of images with a certified class"
    colour = colours(summary)
    alone = not summary.named(ROUTED, OTHER)

    def build(form: str) -> Markup:
        x = summary.grid
        top = max(float(np.max(s.fine if s.high is None else s.high)) for s in summary.series)
        plot = Plot(
            *_SIZES[form],
            (0.0, float(x[-1])),
            (0.0, min(1.0, np.ceil(top * 10 + 0.05) / 10)),
            margins=(46, 34, 12, 46),
            label=f"{what} by radius: " + "; ".join(_told(s, summary) for s in summary.series),
        )
        plot.linear_axes(RADIUS, what, x_most=9 if form == WIDE else 5)
        key = {s.name: f"s{k}" for k, s in enumerate(summary.series)}  # what the legend switches on and off
        for s in summary.series:
            if s.role in ("envelope", "oracle"):
                plot.line(*until_zero(x, s.fine), f"{s.role} {key[s.name]}", s.name)
        for s in summary.series:
            if s.low is not None and s.high is not None and (s.role != "expert" or alone):
                what_for = f"{s.name}: {100 * summary.confidence:g}% interval over images"
                plot.band(x, s.low, s.high, f"band {colour[s.name]} {key[s.name]}", what_for)
        for s in reversed(summary.series):
            if s.name in colour:
                plot.line(*until_zero(x, s.fine), f"{s.role} {colour[s.name]} d{colour[s.name][1:]} {key[s.name]}", s.name)
        for s in summary.series:
            classes = colour.get(s.name, "quiet")
            classes += f" {key[s.name]}" + (" strong" if s.role == ROUTED else "")
            others = [o.fine for o in summary.series if o is not s]
            if len(s.name) <= (30 if form == WIDE else 18):  # a longer name is the legend's alone: labels are never cut
                plot.label_on_line(x, s.fine, s.name, classes, others, leader=s.role == ROUTED)
        return plot.render(form, f'data-right="{plot.right:g}" data-left="{plot.left:g}" data-xmax="{x[-1]:g}"')

    return both(build)


def until_zero(x: Array, y: Array) -> tuple[Array, Array]:
    """A falling curve up to its first zero: a line along the axis says nothing and hides others."""
    zero = np.flatnonzero(y <= 0.0)
    end = int(zero[0]) + 1 if zero.size else len(y)
    return x[:end], y[:end]


def _told(s: Series, summary: Summary) -> str:
    values = ", ".join(f"{100 * v:.1f}% at {r:g}" for r, v in list(zip(summary.radii, s.at, strict=True))[:5])
    return f"{s.name} {values}"


def stacked(
    table: Table,
    names: NDArray[np.object_],
    grid: Array,
    order: Sequence[str],
    colour: dict[str, str],
    title: str,
    titles: dict[str, str],
) -> Markup:
    """Share of all images certified at r, stacked by name (selected expert, or binding stage); `titles` say it in words."""
    shares = curves.shares_by_radius(names, table, grid)
    present = [name for name in [*order, *(n for n in shares if n not in order)] if name in shares and shares[name].any()]

    def build(form: str) -> Markup:
        total = sum((shares[n] for n in present), np.zeros(len(grid)))
        high = min(1.0, np.ceil(float(total.max()) * 10 + 0.05) / 10) if total.max() > 0 else 1.0
        at_zero = ", ".join(f"{titles.get(n, n)} {100 * shares[n][0]:.0f}%" for n in present)
        plot = Plot(
            *_SMALL[form], (0.0, float(grid[-1])), (0.0, high), margins=(46, 34, 8, 44), label=f"{title}; at radius 0: {at_zero}"
        )
        plot.linear_axes(RADIUS, "images certified", x_most=5)
        base = np.zeros(len(grid))
        for name in present:
            plot.band(
                grid,
                base,
                base + shares[name],
                f"area {colour.get(name, 'c7')}",
                f"{titles.get(name, name)}: {100 * shares[name][0]:.1f}% at radius 0",
            )
            base = base + shares[name]
        return plot.render(form)

    return both(build)


def votes(table: Table, fixed: NDArray[np.int64] | None) -> Markup:
    """Histogram of the votes drawn per image, on a logarithmic axis."""
    drawn = table.n_drawn[table.n_drawn > 0].astype(np.float64)
    low, high = (
        np.floor(np.log10(drawn.min()) * 4) / 4,
        np.ceil(np.log10(max(drawn.max(), 0 if fixed is None else fixed.max())) * 4 + 0.01) / 4,
    )
    edges = np.linspace(low, high, round((high - low) * 8) + 1) if high > low else np.array([low - 0.5, low + 0.5])
    counts, _ = np.histogram(np.log10(drawn), edges)

    def build(form: str) -> Markup:
        tallest = float(counts.max()) * 1.45
        plot = Plot(
            *_SMALL[form],
            (float(edges[0]), float(edges[-1])),
            (0.0, tallest),
            margins=(46, 34, 8, 44),
            label=f"Histogram of votes drawn per image: median {np.median(drawn):,.0f}, mean {drawn.mean():,.0f}, "
            f"largest {drawn.max():,.0f}",
        )
        ticks = [
            (e + np.log10(m), _votes(m * 10.0**e))
            for e in range(int(np.floor(edges[0])), int(np.ceil(edges[-1])) + 1)
            for m in (1, 3)
        ]
        inside = [(v, w) for v, w in ticks if edges[0] - 1e-9 <= v <= edges[-1] + 1e-9]
        plot.axes(inside, [], "votes drawn for one image (logarithmic)", "images")
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True):
            if count:
                x, y = plot.px(a) + 1, plot.py(count)
                plot.raw(
                    f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{max(plot.px(b) - plot.px(a) - 2, 1):.1f}" '
                    f'height="{max(plot.bottom - y, 1):.1f}">'
                    f"<title>{count} images: {10**a:,.0f} to {10**b:,.0f} votes</title></rect>"
                )
        markers = [(float(drawn.mean()), "mean"), *([] if fixed is None else [(float(fixed.mean()), "fixed plan")])]
        for line, (value, word) in enumerate(markers):
            x = plot.px(float(np.log10(value)))
            plot.raw(f'<line class="marker" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.top:.1f}" y2="{plot.bottom:.1f}"/>')
            right = x > (plot.left + plot.right) / 2
            plot.text(
                x - 5 if right else x + 5,
                plot.top + 9 + 17 * line,
                f"{word} {_votes(value)}",
                "onlabel strong",
                "end" if right else "start",
            )
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True):
            if count:  # over the markers' lines
                plot.text((plot.px(a) + plot.px(b)) / 2, plot.py(count) - 4, str(count), "tick onlabel", "middle")
        return plot.render(form)

    return both(build)


def _votes(value: float) -> str:
    if value >= 999_500:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if value >= 1000 else f"{value:.0f}"


def lost(found: Losses, titles: dict[str, str], radii: Array | None = None) -> Markup:
    """Images held by oracle, chosen expert and routed classifier over radius; between them what routing costs (`regret`)."""
    grid = np.linspace(0.0, max(float(found.oracle.max()), float(found.routed.max()), 1e-3), 201) if radii is None else radii
    held = at_radii(found, grid)
    oracle, chosen, routed = (held[name] for name in ("oracle", "chosen", "routed"))
    rows = by_stage(found)
    told = "; ".join(
        f"{titles.get(r.stage, r.stage)} ({100 * r.share:.0f}%): regret {r.regret:.3f}, loss {r.loss:.3f}" for r in rows
    )

    def build(form: str) -> Markup:
        top = min(1.0, np.ceil(float(oracle.max()) * 10 + 0.05) / 10)
        plot = Plot(
            *_SIZES[form], (0.0, float(grid[-1])), (0.0, top), margins=(46, 34, 12, 46), label=f"What routing costs. {told}"
        )
        plot.linear_axes(RADIUS, "images held", x_most=9 if form == WIDE else 5)
        plot.band(grid, chosen, oracle, "area c4", "routing regret: another expert would have held")
        plot.band(grid, routed, chosen, "area c5", "certification loss: the chosen expert alone would have held")
        plot.line(*until_zero(grid, oracle), "oracle", "oracle (knows the label)")
        plot.line(*until_zero(grid, chosen), "expert c2 d1", "the chosen expert alone")
        plot.line(*until_zero(grid, routed), "routed c0", "routed")
        return plot.render(form)

    return both(build)


def curve_file(summary: Summary, title: str) -> bytes:
    """The curve as an SVG file with its legend and standings; the same tables give the same bytes."""
    colour = colours(summary)
    legend = [(s.name, colour.get(s.name, s.role)) for s in summary.series]
    lines = [
        f"{'best single expert, ' if s is summary.best_single else ''}{s.name}: coverage {100 * s.coverage:.1f}% of the "
        f"envelope, least ratio {100 * s.least:.1f}% (at radius {s.at:g})"
        for s in summary.standings
    ]
    return standalone(curve(summary), legend, title, lines).encode()


def lost_file(found: Losses, title: str, titles: dict[str, str] | None = None) -> bytes:
    """`lost` as an SVG file, with regret and loss by the stage that limits the radius below."""
    titles = titles or {}
    legend = [("routing regret", "c4"), ("certification loss", "c5"), ("routed", "c0"), ("the chosen expert alone", "c2")]
    rows = [
        f"limited by {titles.get(r.stage, r.stage)}, {100 * r.share:.0f}% of the images: "
        f"mean regret {r.regret:.3f}, mean loss {r.loss:.3f}"
        for r in by_stage(found)
    ]
    return standalone(lost(found, titles), legend, title, rows).encode()
