"""The command line: thin, it parses, calls and prints. One file per group of verbs."""

from __future__ import annotations

import importlib
import sys

import typer

from rsrouter._version import __version__
from rsrouter.core.errors import RSRouterError

app = typer.Typer(
    name="rsrouter",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Route between randomized-smoothing experts, and certify the result.\n\n"
    "The way through: wrap -> label -> train -> certify -> report -> publish. Start with: rsrouter demo --out DIR",
)

#: each has `register(app)`; in the order in which the verbs are shown
_GROUPS = ("demo", "experts", "train", "certify", "report", "publish", "plan", "bench")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"rsrouter {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Options before the verb."""


for _name in _GROUPS:
    importlib.import_module(f"rsrouter.cli.{_name}").register(app)


def main() -> None:
    """Entry point: errors made for users are printed without a traceback, exit status 2."""
    try:
        app()
    except RSRouterError as error:
        for title, text in (
            ("error", error.message),
            ("expected", error.expected),
            ("received", error.received),
            ("do", error.remedy),
        ):
            if text:
                typer.secho(f"{title:>9}: ", nl=False, err=True, fg="red" if title == "error" else None, bold=True)
                typer.echo(text, err=True)
        sys.exit(2)
