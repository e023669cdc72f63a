"""The command line: thin, it parses, calls and prints. One file per group of verbs."""

from __future__ import annotations

import sys
import traceback

import typer

from rsrouter._version import __version__
from rsrouter.cli import bench, certify, demo, doctor, execution, experts, inspect, plan, publish, report, train
from rsrouter.cli.options import Format, asked, echo_json, imported, importing
from rsrouter.core.errors import RSRouterError

#: Exit codes, the same for every verb.
DONE, FINDINGS, REFUSED, BROKEN = 0, 1, 2, 70

#: Verbs that load experts or routers: they take `--import`.
LOADING = {"audit", "bench", "calibrate", "card", "certify", "convert", "label", "predict", "publish", "train", "wrap"}

app = typer.Typer(
    name="rsrouter",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Route between randomized-smoothing experts, and certify the result.\n\n"
    "The way through: wrap -> label -> train -> certify -> report -> publish. Start with: rsrouter demo --out DIR",
    epilog="With --format json, stdout holds one JSON value (a result, or an object with the key error) and stderr what people "
    "read.\n\n"
    "Exit codes: 0 done; 1 done, and something was found (audit, doctor); 2 refused: wrong usage or input, nothing there, no "
    "access, or an audit that could not check everything; 70 a bug in rsrouter; 130 interrupted.\n\n"
    "Shell completion: rsrouter --install-completion",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"rsrouter {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Options before the verb."""


for _group in (demo, inspect, experts, train, certify, report, publish, plan, execution, bench, doctor):  # as verbs are shown
    _group.register(app)
for _verb in app.registered_commands:
    if _verb.callback is not None and (_verb.name or _verb.callback.__name__) in LOADING:
        _verb.callback = importing(_verb.callback)


def _explained(error: Exception) -> RSRouterError | None:
    """What the machine refused, in the words of our own errors; None for anything else."""
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return RSRouterError(
            "The memory does not suffice", received=reason, remedy="fewer images at once, a smaller model, or another --device"
        )
    if isinstance(error, OSError):
        return RSRouterError(
            "A file or folder cannot be used", received=reason, remedy="check path, rights and free space: rsrouter doctor"
        )
    return None


def _refuse(error: RSRouterError) -> None:
    texts = {"message": error.message, "expected": error.expected, "received": error.received, "remedy": error.remedy}
    if asked.get("format") is Format.json:
        echo_json({"error": {"kind": type(error).__name__, **texts}})
    for title, text in zip(("error", "expected", "received", "do"), texts.values(), strict=True):
        if text:
            typer.secho(f"{title:>9}: ", nl=False, err=True, fg="red" if title == "error" else None, bold=True)
            typer.echo(text, err=True)


def main() -> None:
    """Entry point: what a user can mend is told without a traceback, exit status 2; anything else is a bug, 70."""
    asked.clear()
    imported.clear()
    try:
        app(prog_name="rsrouter")
    except RSRouterError as error:
        _refuse(error)
        sys.exit(REFUSED)
    except Exception as error:
        if (told := _explained(error)) is not None:
            _refuse(told)
            sys.exit(REFUSED)
        traceback.print_exc()
        typer.secho("This is a bug in rsrouter. Please report it with the lines above.", err=True, bold=True)
        sys.exit(BROKEN)
