"""`rsrouter plan`: what a budget of votes can certify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.jobs import show_patience
from rsrouter.cli.options import Alpha, Format, OutputFormat, echo_json
from rsrouter.cli.reading import parse_numbers, parse_radii
from rsrouter.core.errors import InputError


def plan(
    sigma: Annotated[float | None, typer.Option("--sigma", help="Noise level in [0,1]-pixel units.")] = None,
    n: Annotated[
        list[int] | None, typer.Option("--n", help="Votes; may be repeated. Default 100, 1,000, 10,000, 100,000.")
    ] = None,
    alpha: Alpha = 1e-3,
    radii: Annotated[str | None, typer.Option("--radii", help="Also show the votes that each of these radii needs.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Also simulate the mean votes of adaptive plans.")] = False,
    patience: Annotated[
        str | None,
        typer.Option(
            "--patience",
            metavar="P,P,...",
            help="Also show what these levels of an adaptive plan, .01 to .5, save in votes and cost in certified images.",
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table", help="Show --patience on the images, votes and plan of this table, written by `rsrouter certify`."
        ),
    ] = None,
    format: OutputFormat = Format.text,
) -> None:
    """Show the largest radius each number of votes can certify, what fewer votes cost, and the votes a radius needs.

    Example: rsrouter plan --sigma 0.5 --n 1000 --n 100000 --radii 0.5,1.5

    Example: rsrouter plan --table run/certificates.tsv --patience .01,.1,.5
    """
    from rsrouter.core.budget import budget_table
    from rsrouter.core.patience import LEVELS, patience_of
    from rsrouter.results import read_table, table_patience

    wanted = () if radii is None else parse_radii(radii)
    budgets = tuple(n or (100, 1_000, 10_000, 100_000))
    if sigma is None and table is None:
        raise InputError(
            "There is nothing to plan for",
            expected="--sigma, or --table with certificates",
            received="neither",
            remedy="name the noise level: --sigma 0.5",
        )
    levels = LEVELS if patience is None else parse_numbers(patience, "patience")
    found = None if sigma is None else budget_table(sigma, budgets, alpha, radii=wanted, simulate=simulate)
    if table is not None:
        costs, told = table_patience(read_table(table), levels=levels, radii=wanted), f"patience, on the votes of {table}"
    elif patience is not None and sigma is not None:
        told = f"patience, {max(budgets):,} votes at most, vote share uniform on [1/2, 1]"
        costs = patience_of(sigma, max(budgets), alpha, radii=wanted, levels=levels)
    else:
        costs, told = (), ""
    if format is Format.json:
        echo_json({**({} if found is None else asdict(found)), **({"patience": [asdict(c) for c in costs]} if costs else {})})
        return
    if found is not None:
        _show_budgets(found, simulate)
    show_patience(costs, told)


def _show_budgets(found: Any, simulate: bool) -> None:
    """A `rsrouter.core.budget.BudgetTable`, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sigma {found.sigma:g}, alpha {found.alpha:g}", title_justify="left")
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
