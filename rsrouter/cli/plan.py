"""`rsrouter plan`: what a budget of votes can certify."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from rsrouter.cli.options import Alpha, Format, OutputFormat, echo_json, parse_radii


def plan(
    sigma: Annotated[float, typer.Option("--sigma", help="Noise level in [0,1]-pixel units.")],
    n: Annotated[
        list[int] | None, typer.Option("--n", help="Votes; may be repeated. Default 100, 1,000, 10,000, 100,000.")
    ] = None,
    alpha: Alpha = 1e-3,
    radii: Annotated[str | None, typer.Option("--radii", help="Also show the votes that each of these radii needs.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Also simulate the mean votes of adaptive plans.")] = False,
    format: OutputFormat = Format.text,
) -> None:
    """Show the largest radius each number of votes can certify, what fewer votes cost, and the votes a radius needs.

    Example: rsrouter plan --sigma 0.5 --n 1000 --n 100000 --radii 0.5,1.5
    """
    from rich.console import Console
    from rich.table import Table

    from rsrouter.core.budget import budget_table

    wanted = () if radii is None else parse_radii(radii)
    found = budget_table(sigma, tuple(n or (100, 1_000, 10_000, 100_000)), alpha, radii=wanted, simulate=simulate)
    if format is Format.json:
        echo_json(asdict(found))
        return
    table = Table(title=f"sigma {sigma:g}, alpha {alpha:g}", title_justify="left")
    for heading in (
        "votes",
        "largest radius",
        "mean radius ratio",
        "fewest for the top class",
        *(["mean votes, adaptive"] * simulate),
    ):
        table.add_column(heading, justify="right")
    for row in found.rows:
        cells = [
            f"{row.n:,}",
            f"{row.largest_radius:.4f}",
            f"{row.mean_ratio:.3f}",
            "never" if row.smallest_count is None else f"{row.smallest_count:,}",
        ]
        if simulate:
            cells.append("" if row.adaptive_votes is None else f"{row.adaptive_votes:,.0f}")
        table.add_row(*cells)
    Console().print(table)
    typer.echo(f"mean radius ratio: against {found.n_ref:,} votes, vote share uniform on [1/2, 1]")
    for radius, needed in found.needed:
        typer.echo(
            f"radius {radius:g} needs " + ("more votes than can be drawn" if needed is None else f"{needed:,} unanimous votes")
        )


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(plan)
