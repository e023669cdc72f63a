"""`rsrouter publish` and `rsrouter audit`: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.options import (
    Device,
    Format,
    Licence,
    OutputFormat,
    Revision,
    Title,
    check_out,
    data_options,
    echo_json,
    imported,
    read_data,
)

NO_TABLES = "note: no certificates beside the router; give --certificates, or a run folder with router/ in it"


def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A router's folder, or a whole run with router/ in it.")],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to publish.")],
    certificates: Annotated[
        Path | None, typer.Option("--certificates", help="Results table or folder of them; default: those in DIR.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show exactly what would go up; send nothing.")] = False,
    with_experts: Annotated[
        str | None,
        typer.Option(
            "--with-experts", metavar="ORG/PREFIX", help="First upload experts on this machine to the Hub, as ORG/PREFIX-NAME."
        ),
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="The commit's message.")] = None,
    licence: Licence = "apache-2.0",
    title: Title = None,
    format: OutputFormat = Format.text,
) -> None:
    """Publish a router, its pinned experts, certificates and card to the Hub, in one commit.

    Run it again to resume: experts that are on the Hub already are not sent again. A dry run ends with status 2 where the
    publication would be refused.

    Examples: rsrouter publish run org/router --dry-run

    rsrouter publish run org/router --with-experts org/expert
    """
    from rsrouter.publish import publish as send

    done = send(
        folder,
        repo_id,
        certificates=certificates,
        private=private or None,
        create_pr=pull_request,
        dry_run=dry_run,
        licence=licence,
        title=title,
        message=message,
        with_experts=with_experts,
        imports=imported,
    )
    if format is Format.json:
        echo_json(done.to_dict())
        if done.refused is not None:
            typer.echo(done.refused, err=True)
            raise typer.Exit(2)
        return
    for expert in done.experts:
        words = "would send" if done.dry_run else "sent" if expert.sent else "is there already"
        typer.echo(f"{expert.repo_id}: {words}, {sum(f.size for f in expert.files):,} bytes  {expert.commit or ''}")
    typer.echo(f"{'Would publish' if done.dry_run else 'Published'} to {done.repo_id}:")
    for file in done.files:
        typer.echo(f"  {file.size:>10,}  {file.sha256[:12]}  {file.path}")
    for path in done.deleted:
        typer.echo(f"  {'removed':>10}  {'':12}  {path}")
    if not any(file.path.endswith(".tsv") for file in done.files):
        typer.echo(NO_TABLES, err=True)
    if done.dry_run:
        typer.echo("\n--- README.md ---\n" + done.card)
        if done.refused is not None:
            typer.echo("\nThe publication itself would be refused:\n" + done.refused, err=True)
            raise typer.Exit(2)
    else:
        typer.echo(f"commit {done.commit}\n{done.url}")


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A router's folder, or a whole run with router/ in it.")],
    out: Annotated[Path, typer.Option("--out", help="A new or empty folder.")],
    name: Annotated[str, typer.Option("--name", help="Name that the card's snippet uses, ORG/NAME or a path.")],
    certificates: Annotated[Path | None, typer.Option("--certificates", help="Results table or folder of them.")] = None,
    licence: Licence = "apache-2.0",
    title: Title = None,
    format: OutputFormat = Format.text,
) -> None:
    """Write what `publish` would send to a folder on this machine; experts need not be on the Hub.

    Example: rsrouter card run --out model_cards/mine --name org/router
    """
    from rsrouter.publish import write_card

    path = write_card(folder, out, name, certificates=certificates, licence=licence, title=title, imports=imported)
    if format is Format.json:
        echo_json({"card": path, "files": sorted(p.relative_to(out) for p in Path(out).rglob("*") if p.is_file())})
        return
    typer.echo(f"Card: {path}")
    if not any((path.parent / "certificates").glob("*.tsv")):
        typer.echo(NO_TABLES, err=True)


@data_options
def audit(
    source: Annotated[str, typer.Argument(metavar="NAME_OR_DIR", help="A router's folder, a whole run, or a Hub repository.")],
    data: Annotated[
        str | None, typer.Option("--data", help="The certified images: npz, parquet, folder, hf-hub:org/name@revision, or demo.")
    ] = None,
    rows: Annotated[str, typer.Option("--rows", help="Rows per table to draw again, test and attack: a number, or all.")] = "20",
    table: Annotated[list[Path] | None, typer.Option("--table", help="Results table (repeatable); default: those found.")] = None,
    fresh_votes: Annotated[int, typer.Option("--fresh-votes", help="Fresh votes per network and row.")] = 2000,
    attack_steps: Annotated[int, typer.Option("--attack-steps", help="Gradient steps per row; 0: no attack.")] = 20,
    level: Annotated[float, typer.Option("--level", help="Failure probability of each statistical check.")] = 1e-3,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, to repeat an audit; default: fresh entropy.")] = None,
    revision: Revision = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON report here.")] = None,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Check a router and its certificates. Exit status 0: all checked, nothing found; 1: findings; 2: checks could not be made.

    Example: rsrouter audit org/router --data test.npz --rows 20
    """
    from rsrouter.audit import audit as check
    from rsrouter.inputs import check_count

    check_out(out)
    images: Any = None if data is None else read_data(data, reading)
    report = check(
        source,
        data=images,
        rows=None if rows == "all" else check_count("--rows", int(rows) if rows.isdecimal() else rows, "a number, or all"),
        tables=table,
        revision=revision,
        fresh_votes=fresh_votes,
        attack_steps=attack_steps,
        level=level,
        seed=seed,
        device=device,
        progress=lambda what, at, of: typer.echo(f"{what} {at + 1}/{of}", err=True) if at % 10 == 0 else None,
    )
    if out is not None:
        out.write_text(report.to_json(), encoding="utf-8")
    if format is Format.json:
        echo_json(report.to_dict())
    else:
        typer.echo(str(report))
    sys.exit(report.exit_status)  # an exit code survives every way of being called


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(publish)
    app.command()(card)
    app.command()(audit)
