"""`rsrouter doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from rsrouter.cli.options import Device, Format, OutputFormat, echo_json


def doctor(
    device: Device = "cpu",
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time votes and bf16 for a few seconds.")] = True,
    network: Annotated[bool, typer.Option("--network/--no-network", help="Check that the Hub can be reached.")] = True,
    format: OutputFormat = Format.text,
) -> None:
    """Check device, versions, caches and the Hub, and say what would be slow here. Exit status 1: something is broken.

    Example: rsrouter doctor --device cuda
    """
    from rsrouter.doctor import BAD, GOOD, examine

    report = examine(device, measure=measure, network=network)
    if format is Format.json:
        echo_json({"sections": report.sections, "advice": [asdict(a) for a in report.advice], "healthy": report.healthy})
    else:
        for title, lines in report.sections.items():
            typer.secho(title, bold=True)
            width = max(len(key) for key in lines)
            for key, value in lines.items():
                typer.echo(f"  {key:{width}}  {value}")
        typer.secho("what to do", bold=True)
        for advice in report.advice:
            typer.secho(f"  {advice.level}: ", nl=False, fg={BAD: "red", GOOD: "green"}.get(advice.level, "yellow"))
            typer.echo(advice.what + (f". {advice.do}" if advice.do else ""))
    if not report.healthy:
        sys.exit(1)


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(doctor)
