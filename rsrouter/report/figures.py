"""The certified-accuracy curve as files: PNG, SVG, CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rsrouter.report.charts import until_zero
from rsrouter.report.summary import EXPERT, OTHER, ROUTED, Summary

#: Okabe and Ito's palette (2008), told apart with every common colour blindness; black is left to the axes.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#555555")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (8, 2, 2, 2), (4, 2, 1, 2, 1, 2), (10, 3), (1, 1.5), (12, 2, 2, 2))
#: Every figure: text stays text, and the same figure gives the same bytes.
FONT: dict[Any, Any] = {"svg.hashsalt": "rsrouter", "svg.fonttype": "none", "font.family": "DejaVu Sans"}


def curve_figure(summary: Summary, title: str) -> Figure:
    """Certified accuracy over radius for every series; a figure without any global state."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    colour = 0
    for series in summary.series:
        x, y = until_zero(summary.grid, 100 * series.fine)
        if series.role == "envelope":
            axes.plot(
                x, y, color="#bbbbbb", linewidth=6, alpha=0.6, label="envelope of the experts", zorder=1, solid_capstyle="round"
            )
        elif series.role == "oracle":
            axes.plot(x, y, color="#666666", linewidth=1.2, dashes=(1, 1.5), label="oracle (knows the label)", zorder=2)
        else:
            wide = series.role in (ROUTED, OTHER)
            (line,) = axes.plot(
                x, y, color=OKABE_ITO[colour % 8], linewidth=2.6 if wide else 1.5, label=series.name, zorder=4 if wide else 3
            )
            if DASHES[colour % 8]:
                line.set_dashes(DASHES[colour % 8])
            if series.low is not None and series.high is not None and (wide or not summary.named(ROUTED)):
                axes.fill_between(
                    summary.grid, 100 * series.low, 100 * series.high, color=OKABE_ITO[colour % 8], alpha=0.15, linewidth=0
                )
            colour += 1
    axes.set_xlabel("L2 radius (pixels in [0, 1])")
    axes.set_ylabel("certified accuracy, %" if summary.labelled else "certified share, %")
    axes.set_xlim(0, summary.grid[-1])
    axes.set_ylim(0, None)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # a name such as $x$ or _x must stand as it is
    axes.set_title(title, fontsize=11, parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles, labels, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def figure_files(summary: Summary, title: str) -> dict[str, bytes]:
    """`curve.svg` and `curve.png` as bytes; the same tables give the same bytes."""
    with rc_context(FONT):
        return save_figure(curve_figure(summary, title), "curve")


def save_figure(figure: Figure, name: str) -> dict[str, bytes]:
    """`name.svg` and `name.png` as bytes; the same figure gives the same bytes."""
    files = {}
    with rc_context(FONT):
        for ending, canvas, metadata in (
            ("svg", FigureCanvasSVG, {"Date": None, "Creator": "rsrouter"}),
            ("png", FigureCanvasAgg, {"Software": "rsrouter"}),
        ):
            buffer = io.BytesIO()
            canvas(figure).print_figure(buffer, format=ending, dpi=200, metadata=metadata)
            files[f"{name}.{ending}"] = buffer.getvalue()
    return files


def curve_csv(summary: Summary) -> bytes:
    """The curves as CSV: `series role radius accuracy low high`, at the headline radii and on the fine grid."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("series", "role", "radius", "accuracy", "low", "high"))
    for s in summary.series:
        radii = np.concatenate([summary.radii, summary.grid])
        rows = [np.concatenate(pair) for pair in ((s.at, s.fine),)]
        ends = [
            np.concatenate([a, b]) if a is not None and b is not None else None
            for a, b in ((s.at_low, s.low), (s.at_high, s.high))
        ]
        order = np.argsort(radii, kind="stable")
        last = None
        for i in order:
            if radii[i] == last:
                continue
            last = radii[i]
            writer.writerow(
                (s.name, s.role, f"{radii[i]:.6g}", f"{rows[0][i]:.6g}", *("" if e is None else f"{e[i]:.6g}" for e in ends))
            )
    return buffer.getvalue().encode()


__all__ = ["DASHES", "EXPERT", "OKABE_ITO", "curve_csv", "curve_figure", "figure_files", "save_figure"]
