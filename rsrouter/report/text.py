"""The headline table for a terminal, within its width."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from rsrouter.report.summary import OTHER, ROUTED, Summary

#: The most that the column of names takes.
_NAME = 24


def summary_tables(summary: Summary, width: int = 80) -> list[RichTable]:
    """Certified accuracy in % by radius, then abstention and ACR, one row per series; as many tables as `width` needs.

    Names are folded, never cut.
    """
    columns = [(f"{r:g}", [f"{100 * s.at[i]:.1f}" for s in summary.series]) for i, r in enumerate(summary.radii)]
    columns.append(("abst.", ["" if s.abstention is None else f"{100 * s.abstention:.1f}" for s in summary.series]))
    if summary.labelled:
        columns.append(("ACR", ["" if s.acr is None else f"{s.acr:.3f}" for s in summary.series]))
    longest = max(len("radius"), *(len(s.name) for s in summary.series))
    for each in range(len(columns), 0, -1):
        each = -(-len(columns) // -(-len(columns) // each))  # even shares: no table of one column
        blocks = [columns[start : start + each] for start in range(0, len(columns), each)]
        tables = [_block(summary, block, min(longest, _NAME)) for block in blocks]
        measure = Console(width=1000)
        if all(Measurement.get(measure, measure.options, table).maximum <= width for table in tables):
            break
    return tables


def _block(summary: Summary, columns: list[tuple[str, list[str]]], name: int) -> RichTable:
    table = RichTable(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("radius", width=name, overflow="fold")
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for k, s in enumerate(summary.series):
        cells = [values[k] for _, values in columns]
        table.add_row(Text(s.name), *cells, style="bold" if s.role in (ROUTED, OTHER) else None)
    return table


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Prints the headline table, natural accuracies, how routed and best single expert stand against the envelope, and notes."""
    console = console or Console()
    for name, note in summary.notes:
        loud = note.startswith(("UNFINISHED", "UNVERIFIED"))
        console.print(Text(f"{'WARNING' if loud else 'note'}: {name}{': ' if name else ''}{note}", style="bold" if loud else ""))
    console.print()
    what = "Certified accuracy" if summary.labelled else "Certified share"
    console.print(Text(f"{what}, % of {len(summary.main):,} images"))
    for k, table in enumerate(summary_tables(summary, console.width)):
        if k:
            console.print()
        console.print(table)
    console.print()
    for natural in summary.natural:
        console.print(Text(natural.words))
    for standing in summary.standings:
        console.print(Text(("best single expert " if standing is summary.best_single else "") + standing.words))


__all__ = ["print_summary", "summary_tables"]
