"""`rsrouter publish` and `rsrouter audit`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rsrouter.cli.options import Format, OutputFormat


def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A router's folder, or a whole run with router/ in it.")],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to publish.")],
    certificates: Annotated[
        Path | None, typer.Option("--certificates", help="Results table or folder of them; default: those in DIR.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show exactly what would go up; send nothing.")] = False,
    licence: Annotated[str, typer.Option("--licence", help="Licence of the router, as the Hub names it.")] = "apache-2.0",
    title: Annotated[str | None, typer.Option("--title", help="Heading of the card.")] = None,
    format: OutputFormat = Format.text,
) -> None:
    """Publish a router, its pinned experts, certificates and card to the Hub, in one commit.

    Example: rsrouter publish run org/router --dry-run
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
    )
    if format is Format.json:
        typer.echo(json.dumps(done.to_dict()))
        return
    typer.echo(f"{'Would publish' if done.dry_run else 'Published'} to {done.repo_id}:")
    for file in done.files:
        typer.echo(f"  {file.size:>10,}  {file.sha256[:12]}  {file.path}")
    for path in done.deleted:
        typer.echo(f"  {'removed':>10}  {'':12}  {path}")
    if done.dry_run:
        typer.echo("\n--- README.md ---\n" + done.card)
    else:
        typer.echo(f"commit {done.commit}\n{done.url}")


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(publish)
