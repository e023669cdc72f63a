"""`rsrouter transfer`: a certified table for the same router run in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.certify import ExpertName, Revision, load_smoothed
from rsrouter.cli.execution import Dtype, ExecutionBatch, ExecutionFile, choose_execution
from rsrouter.cli.options import (
    DEFAULT_RADII,
    Alpha,
    Data,
    Device,
    Format,
    OutputFormat,
    Radii,
    data_options,
    echo_json,
    read_data,
)


@data_options
def transfer(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="A table written by `rsrouter certify`; it is only read.")],
    router: Annotated[str, typer.Option("--router", help="The router (or pool.json with --expert) that the table is about.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The new table, with its JSON beside it; an unfinished one is resumed.")],
    execution: ExecutionFile = None,
    dtype: Dtype = None,
    execution_batch: ExecutionBatch = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run through torch.compile.")] = False,
    votes: Annotated[int, typer.Option("--votes", min=1, help="Paired draws for each network and certified image.")] = 10_000,
    alpha: Alpha = 1e-3,
    device: Device = "cpu",
    own_device: Annotated[str, typer.Option("--own-device", help="Where the table's own execution runs.")] = "cpu",
    expert: ExpertName = None,
    revision: Revision = None,
    radii: Radii = DEFAULT_RADII,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Carry a table over to another dtype, batch, compiler or device for a fraction of its votes; alphas add.

    Example: rsrouter transfer run/certificates.tsv --router run/router --data test.npz --dtype bfloat16 --out run/bfloat16.tsv
    """
    from dataclasses import replace

    from rsrouter.cli.reading import parse_radii
    from rsrouter.jobs import transfer_table
    from rsrouter.report import summarise
    from rsrouter.report.text import print_summary
    from rsrouter.results import read_table
    from rsrouter.sampling.execution import Execution

    smoothed = load_smoothed(router, expert, revision)
    own = Execution.from_dict(read_table(table).described().execution, f"the metadata of {table.name}")
    chosen = replace(choose_execution(own, execution, dtype, execution_batch), compile=compile or own.compile)
    images = read_data(data, reading)
    made = transfer_table(smoothed, images, table, out, chosen, votes=votes, alpha=alpha, device=device, own_device=own_device)
    summary = summarise(made, radii=parse_radii(radii))
    if format is Format.json:
        echo_json({**summary.to_dict(), "table": out, "rows": len(made)})
        return
    print_summary(summary)
    typer.echo(f"table: {out}")


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(transfer)
