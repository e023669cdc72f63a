"""`rsrouter bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rsrouter.cli.options import Device, Format, OutputFormat


def bench(
    device: Device = "cpu",
    router: Annotated[
        str | None, typer.Option("--router", help="A router's folder; default: the demo's pool and a cascade.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Images for it; default: the demo's test slice.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds of each pair.")] = 5,
    n_max: Annotated[int, typer.Option("--n-max", help="Votes of the fixed plan, and the adaptive plan's most.")] = 100_000,
    images: Annotated[int, typer.Option("--images", help="Images certified adaptively.")] = 50,
    most: Annotated[int, typer.Option("--most", help="Largest n times images in the table of cost against work.")] = 1_000_000,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON here.")] = None,
    format: OutputFormat = Format.text,
) -> None:
    """Speed as ratios measured in one run: against pure forward passes, and against the papers' own loop.

    Example: rsrouter bench --device cuda
    """
    from rich.console import Console
    from rich.table import Table

    from rsrouter import RoutedSmooth
    from rsrouter.bench import run_bench
    from rsrouter.data import load_data
    from rsrouter.demo import load_pool, load_slice

    routed = None if router is None else RoutedSmooth.from_pretrained(router)
    pool = load_pool() if routed is None else routed.pool
    x = (load_slice("test") if data is None else load_data(data)).batch(range(images))[0]
    result = run_bench(
        pool,
        x,
        router=None if routed is None else routed.router,
        device=device,
        repeats=repeats,
        n_max=n_max,
        certificates=images,
        most=most,
    )
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if format is Format.json:
        typer.echo(json.dumps(result))
        return
    console = Console()
    table = Table(
        "figure", "median", "lowest", "highest", title=f"{result['device']}, {result['threads']} threads", title_justify="left"
    )
    for figure in result["figures"]:
        digits = "{:,.0f}" if figure["unit"].startswith("votes") else "{:.3f}"
        table.add_row(
            figure["name"],
            *(digits.format(figure[key]) + (f" {figure['unit']}" if figure["unit"] else "") for key in ("value", "low", "high")),
        )
    console.print(table)
    scaling = Table("n", "images", "seconds", "us per vote", "memory growth, MB", title="cost against work", title_justify="left")
    for row in result["scaling"]:
        scaling.add_row(
            f"{row['n']:,}",
            f"{row['images']:,}",
            f"{row['seconds']:.2f}",
            f"{row['microseconds_per_vote']:.1f}",
            f"{row['memory_growth_mb']:.0f}",
        )
    console.print(scaling)


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(bench)
