"""`rsrouter bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.options import Device, Format, OutputFormat, check_out, data_options, echo_json, read_data, readable_rows


@data_options
def bench(
    device: Device = "cpu",
    router: Annotated[
        str | None, typer.Option("--router", help="A router's folder; default: the demo's pool and a cascade.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Images for it; default: the demo's test slice.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One minute: few votes, timed once; for a first look only.")] = False,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Timed rounds of each pair; default 5.")] = None,
    n_max: Annotated[
        int | None,
        typer.Option(
            "--n-max",
            min=1,
            help="Votes of the fixed plan, and the maximum of the adaptive one; default 100,000 (--peers: 10,000).",
        ),
    ] = None,
    images: Annotated[int | None, typer.Option("--images", min=1, help="Images certified adaptively; default 50.")] = None,
    most: Annotated[
        int | None, typer.Option("--most", min=1, help="Largest product of n and images in the cost table; default 1,000,000.")
    ] = None,
    calls: Annotated[
        bool,
        typer.Option("--calls", help="Measure only calls of certify, the first and later ones, beside the papers' loop."),
    ] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Measure only one certificate, beside the papers' loop and ART (if installed), on one thread, in turn.",
        ),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Measure only peak memory, of processes that draw 10,000, 100,000 and 1,000,000 votes."),
    ] = False,
    architecture: Annotated[
        str | None,
        typer.Option("--architecture", help="With --calls: an architecture with random weights, at 3 x 224 x 224 and few votes."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON here.")] = None,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Measure speed as ratios within one run: to pure forward passes, and to the papers' own loop.

    Takes ten minutes on two otherwise idle cores.

    Examples: rsrouter bench --device cuda

    rsrouter bench --calls --architecture resnet50

    rsrouter bench --peers

    rsrouter bench --memory
    """
    from rsrouter import RoutedSmooth
    from rsrouter.bench import run_bench
    from rsrouter.bench.run import QUICK
    from rsrouter.demo import load_pool, load_slice

    check_out(out)
    if memory:
        _memory(out, format)
        return
    routed = None if router is None else RoutedSmooth.from_pretrained(router)
    given = {"repeats": repeats, "n_max": n_max, "certificates": images, "most": most}
    settings = {**(QUICK if quick else {}), **{key: value for key, value in given.items() if value is not None}}
    slices = load_slice("test") if data is None else read_data(data, reading)
    x = slices.batch(readable_rows(slices, range(min(len(slices), max(50, settings.get("certificates", 50))))))[0]
    pool = load_pool() if routed is None else routed.pool
    if calls:
        rows = _calls(pool, x, architecture, device, settings.get("repeats", 5))
        if out is not None:
            out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        echo_json({"calls": rows}) if format is Format.json else show_calls(rows)
        return
    if peers:
        found = _peers(pool, x, device, settings)
        if out is not None:
            out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        echo_json(found) if format is Format.json else show_peers(found)
        return
    result = run_bench(pool, x, router=None if routed is None else routed.router, device=device, **settings)
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if format is Format.json:
        echo_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """The tables of a bench."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    title = f"{result['device']}, {result['threads']} threads, torch {result['torch']}, {result['seconds']:.0f} s in all"
    table = Table("figure", "median", "lowest", "highest", title=title, title_justify="left")
    for figure in result["figures"]:
        unit = figure["unit"]
        digits = "{:,.0f}" if unit.startswith("votes") else "{:.3f}" if unit in ("s", "") else "{:.2f}"
        table.add_row(
            figure["name"],
            *(digits.format(figure[key]) + (f" {unit}" if unit else "") for key in ("value", "low", "high")),
        )
    console.print(table)
    scaling = Table(
        "network",
        "n",
        "images",
        "seconds",
        "us per vote",
        "peak memory, MB more",
        title="cost against work",
        title_justify="left",
    )
    for row in result["scaling"]:
        scaling.add_row(
            row["network"],
            f"{row['n']:,}",
            f"{row['images']:,}",
            f"{row['seconds']:.2f}",
            f"{row['microseconds_per_vote']:.1f}",
            f"{row['memory_growth_mb']:.0f}",
        )
    console.print(scaling)
    show_calls(result["calls"])


def _calls(pool: Any, images: Any, architecture: str | None, device: str, repeats: int) -> list[dict[str, Any]]:
    import torch

    from rsrouter.bench.calls import call_costs, random_expert
    from rsrouter.sampling.execution import resolve_device

    where = resolve_device(device)
    if architecture is None:
        return call_costs(pool[len(pool) // 2], images, where, repeats=repeats)
    drawn = torch.rand((4, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    return call_costs(random_expert(architecture), drawn, where, votes=(10, 30, 100), n0=10, repeats=repeats)


def _memory(out: Path | None, format: Format) -> None:
    from dataclasses import asdict

    from rsrouter.bench.memory import memory_peaks

    peaks = memory_peaks()
    rows = [{**asdict(peak), "grown": peak.grown} for peak in peaks]
    if out is not None:
        out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if format is Format.json:
        echo_json({"memory": rows})
        return
    typer.echo("one certificate of a linear network, a new process for each n")
    typer.echo(f"{'votes':>12}{'peak before, MB':>18}{'peak after, MB':>18}{'grown, MB':>12}")
    for peak in peaks:
        typer.echo(f"{peak.n:>12,}{peak.before:>18.0f}{peak.peak:>18.0f}{peak.grown:>12.1f}")


def _peers(pool: Any, images: Any, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from rsrouter.bench.peers import compare_peers, missing
    from rsrouter.sampling.execution import resolve_device

    n, where = int(settings.get("n_max", 10_000)), resolve_device(device)
    rows = compare_peers(pool[len(pool) // 2], images, where, n=n, repeats=settings.get("repeats", 5))
    return {"n": n, "peers": [asdict(row) for row in rows], "missing": missing(rows)}


def show_peers(found: dict[str, Any]) -> None:
    """The table of `rsrouter.bench.peers.compare_peers`, and what is missing in it."""
    typer.echo(f"one certificate, {found['n']:,} votes (adaptive: at most), one thread, in turn")
    typer.echo(f"{'network':<20}{'who':<32}{'seconds':>9}{'of the engine, fixed':>28}{'mean radius':>13}")
    for row in found["peers"]:
        spread = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        typer.echo(f"{row['network']:<20}{row['way']:<32}{row['seconds']:>9.3f}{spread:>28}{row['radius']:>13.3f}")
    if found["missing"]:
        typer.echo(found["missing"])


def show_calls(rows: list[dict[str, Any]]) -> None:
    """The table of `call_costs`."""
    from rich.console import Console
    from rich.table import Table

    from rsrouter.bench.calls import break_even

    table = Table(
        "network", "n", "first call, s", "later calls, s", "papers' loop, s", "loop / later calls", title="one image a call"
    )
    for row in rows:
        seconds = (f"{row[key]:.3f}" for key in ("first", "certify", "loop"))
        table.add_row(row["network"], f"{row['n']:,}", *seconds, f"{row['ratio']:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    fewest = break_even(rows)
    console.print(
        "The papers' loop is " + ("faster at all of them." if fewest is None else f"not faster from n = {fewest:,} on.")
    )


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(bench)
