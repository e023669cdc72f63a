"""`rsrouter demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rsrouter.cli.options import Device, Format, OutputFormat, Seed, echo_json


def demo(
    out: Annotated[Path, typer.Option("--out", help="A new folder, or that of an earlier run to resume.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer images: under a minute on two cores.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    format: OutputFormat = Format.text,
) -> None:
    """Run the whole path on bundled Fashion-MNIST experts, offline: wrap, label, train, certify, report.

    Example: rsrouter demo --out demo
    """
    from rsrouter.demo.flow import RADII, run
    from rsrouter.report import summarise
    from rsrouter.report.text import print_summary

    outcome = run(out, quick=quick, device=device, seed=seed)
    routed = [outcome.routed, outcome.trained, outcome.paper]
    tables = {t.name: t for t in (*routed, *outcome.experts)}
    summary = summarise(tables, routed=[t.name for t in routed], experts=[t.name for t in outcome.experts], radii=RADII)
    if format is Format.json:
        echo_json({**summary.to_dict(), "seconds": outcome.seconds, "report": outcome.report})
        return
    print_summary(summary)
    typer.echo(
        "seconds: "
        + ", ".join(f"{name} {took:.0f}" for name, took in outcome.seconds.items())
        + f"; {sum(outcome.seconds.values()):.0f} in all"
    )
    typer.echo(f"report:  {outcome.report}")


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(demo)
