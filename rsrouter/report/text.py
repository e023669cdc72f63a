"""The headline table for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from rsrouter.report.summary import Summary


def summary_table(summary: Summary) -> RichTable:
    """Certified accuracy in % by radius, then abstention and ACR, one row per series."""
    what = "Certified accuracy" if summary.labelled else "Certified share"
    table = RichTable(title=f"{what}, % of {len(summary.main):,} images", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("radius", no_wrap=True)
    for r in summary.radii:
        table.add_column(f"{r:g}", justify="right", no_wrap=True)
    table.add_column("abst.", justify="right", no_wrap=True)
    table.add_column("ACR", justify="right", no_wrap=True)
    for s in summary.series:
        tail = ("" if s.abstention is None else f"{100 * s.abstention:.1f}", "" if s.acr is None else f"{s.acr:.3f}")
        table.add_row(Text(s.name), *(f"{100 * v:.1f}" for v in s.at), *tail, style="bold" if s.role == "routed" else None)
    return table


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Prints the headline table and the coverage."""
    console = console or Console()
    table = summary_table(summary)
    # figures that are cut off are worse than a line that wraps
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    console.print(table)
    for name, (value, low, high) in summary.coverage.items():
        console.print(
            Text(
                f"{name}: {100 * value:.1f}% of the experts' envelope (interval over images {100 * low:.1f} to {100 * high:.1f}%)"
            )
        )
