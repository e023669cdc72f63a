"""The command line: thin, it parses, calls and prints. One file per group of verbs."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from itertools import pairwise
from typing import Any

import typer

from rsrouter._version import __version__
from rsrouter.cli.options import Format, asked, echo_json, imported, shell_words
from rsrouter.cli.verbs import VERBS, Verbs
from rsrouter.core.errors import RSRouterError

#: Exit codes, the same for every verb.
DONE, FINDINGS, REFUSED, BROKEN, INTERRUPTED = 0, 1, 2, 70, 130

#: Verbs that go on where they were stopped when they are given again.
RESUMING = {"certify", "demo", "heads", "label", "publish", "train", "transfer"}

#: What the parser raises where it refuses a command line (the class's place differs between releases of typer).
_Refused: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="rsrouter",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Route between randomized-smoothing experts, and certify the result.\n\n"
    "In order: wrap, train, certify, report, publish. Start with: rsrouter demo --out DIR --quick",
    epilog="With --format json, stdout holds one JSON value (a result, or an object with the key error) and stderr what people "
    "read.\n\n"
    "Exit codes: 0 done; 1 done, and something was found (audit, doctor, heads check); 2 refused: wrong usage or input, not "
    "found, no access, or an audit that could not check everything; 70 a bug in rsrouter; 130 interrupted.\n\n"
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


def _explained(error: Exception) -> RSRouterError | None:
    """What the machine refused, in the words of our own errors; None for anything else."""
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return RSRouterError(
            "There is not enough memory", received=reason, remedy="fewer images at once, a smaller model, or another --device"
        )
    if isinstance(error, OSError):
        return RSRouterError(
            "A file or folder cannot be used", received=reason, remedy="check path, rights and free space: rsrouter doctor"
        )
    return None


def _misused(error: Any) -> RSRouterError:
    """A command line that the parser refused."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "rsrouter"
    usage = context.get_usage().partition(": ")[2] if context is not None else ""
    return RSRouterError(error.format_message(), expected=" ".join(usage.split()), remedy=f"{path} --help lists every option")


def _refuse(error: RSRouterError, kind: str) -> None:
    texts = {"message": error.message, "expected": error.expected, "received": error.received, "remedy": error.remedy}
    texts["remedy"] = shell_words(texts["remedy"])
    if asked.get("format") is Format.json or _asks_for_json(sys.argv[1:]):
        echo_json({"error": {"kind": kind, **texts}})
    for title, text in zip(("error", "expected", "received", "do"), texts.values(), strict=True):
        if text:
            typer.secho(f"{title:>9}: ", nl=False, err=True, fg="red" if title == "error" else None, bold=True)
            typer.echo(text, err=True)


def _asks_for_json(words: list[str]) -> bool:
    """Whether a command line asks for JSON, also one that cannot be parsed."""
    return "--format=json" in words or ("--format", "json") in pairwise(words)


def _interrupted() -> None:
    verb = next((word for word in sys.argv[1:] if word in VERBS), "")
    goes_on = "; the same command goes on where it stopped" if verb in RESUMING else ""
    typer.echo(f"\nInterrupted{goes_on}.", err=True)
    sys.exit(INTERRUPTED)


def _closed_pipe() -> None:
    """Whoever read our output has seen enough: nothing more is written, and the interpreter's last flush is silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def main() -> None:
    """Entry point: what a user can mend is told without a traceback, exit status 2; anything else is a bug, 70."""
    asked.clear()
    imported.clear()
    try:
        status = app(prog_name="rsrouter", standalone_mode=False)
        sys.stdout.flush()
    except RSRouterError as error:
        _refuse(error, type(error).__name__)
        sys.exit(REFUSED)
    except _Refused as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _refuse(_misused(error), "UsageError")
        sys.exit(REFUSED)
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            _closed_pipe()
        if (told := _explained(error)) is not None:
            _refuse(told, type(told).__name__)
            sys.exit(REFUSED)
        traceback.print_exc()
        typer.secho("This is a bug in rsrouter. Please report it with the lines above.", err=True, bold=True)
        sys.exit(BROKEN)
    else:
        if status == INTERRUPTED:
            _interrupted()
        if isinstance(status, int) and status:
            sys.exit(status)
