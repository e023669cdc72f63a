"""`rsrouter inspect`: what was understood of a data set, before votes are spent on it."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.options import Format, OutputFormat, check_out, data_options, echo_json, read_data, told_warnings

#: Classes, files and pictures that are listed before the rest is counted.
SHOWN = 12


@data_options
def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="File, folder or hf-hub:org/name@revision, as any --data takes it.")
    ],
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="How many images to decode, spread evenly; default 1000.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Decode every image.")] = False,
    fingerprint: Annotated[
        bool, typer.Option("--fingerprint/--no-fingerprint", help="Also compute the sha256 that tables record; reads all files.")
    ] = True,
    contact_sheet: Annotated[
        Path | None, typer.Option("--contact-sheet", metavar="FILE.png", help="Write a picture with a few images of each class.")
    ] = None,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Show how a data set is read: part, classes, sizes, range, and what is passed over, with the reason.

    Example: rsrouter inspect cifar10/ --split test --contact-sheet sheet.png
    """
    from rsrouter.data import contact_sheet as draw
    from rsrouter.data import inspect_data
    from rsrouter.data.inspection import LOOKED_AT

    check_out(contact_sheet, "--contact-sheet")
    source = read_data(data, reading)
    with told_warnings():
        found = inspect_data(source, images=None if every else images or LOOKED_AT, fingerprint=fingerprint)
        sheet = None if contact_sheet is None else draw(source, contact_sheet)
    if format is Format.json:
        echo_json({**found.to_dict(), "contact_sheet": sheet})
        return
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    for title, text in _lines(found, sheet):
        indent = " " * 15
        typer.echo(textwrap.fill(text, width, initial_indent=f"{title:>13}  ", subsequent_indent=indent, break_on_hyphens=False))


def _lines(found: Any, sheet: Path | None) -> Iterator[tuple[str, str]]:
    yield "data", f"{found.name} ({found.kind})"
    if found.config not in (None, "default"):
        yield "configuration", found.config
    yield "split", found.split or "the only one"
    if found.image is not None:
        yield (
            "columns",
            f"images from {found.image!r}, labels from {found.label!r}" if found.label else f"images from {found.image!r}",
        )
    looked = "" if found.looked_at == found.images else f"; {found.looked_at:,} of them were decoded for what follows"
    yield "images", f"{found.images:,}{looked}"
    yield "classes", _classes(found.classes)
    yield "sizes", _counts(found.shapes, "channels x height x width")
    if found.modes:
        yield "files", _counts(found.modes, "format and mode")
    if found.shapes:
        steps = ", in steps of 1/255" if found.eight_bit else ", finer than 1/255"
        yield "pixels", f"float32 from {found.low:g} to {found.high:g}{steps}"
    for note, count in found.notes.items():
        yield "note", f"{note} ({count:,})"
    for reason, names in found.passed.items():
        yield "passed over", f"{len(names):,} {reason}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    if found.unreadable:
        few = "; ".join(f"{i} ({why})" for i, why in list(found.unreadable.items())[:3])
        yield "unreadable", f"{len(found.unreadable):,}: {few}"
    if found.preprocessing:
        yield "preprocessing", ", ".join(f"{k} {v}" for k, v in found.preprocessing.items())
    if found.fingerprint is not None:
        yield "fingerprint", found.fingerprint
    if sheet is not None:
        yield "contact sheet", str(sheet)


def _classes(classes: tuple[tuple[int, str, int], ...]) -> str:
    real = [c for c in classes if c[0] >= 0]
    absent = sum(count for number, _, count in classes if number < 0)
    told = [f"{number} {name} ({count:,})" if name != str(number) else f"{number} ({count:,})" for number, name, count in real]
    more = [f"and {len(told) - SHOWN} more"] if len(told) > SHOWN + 1 else []
    shown = told[:SHOWN] if more else told
    head = f"{len(real)}: " if real else ""
    return head + ", ".join([*shown, *more, *([f"no label ({absent:,})"] if absent else [])])


def _counts(counts: Mapping[str, int], what: str) -> str:
    listed = [f"{key} ({count:,})" for key, count in list(counts.items())[:4]]
    more = [f"and {len(counts) - 4} others"] if len(counts) > 4 else []
    return f"{', '.join([*listed, *more]) or 'none could be decoded'}, {what}" if counts else "no image could be decoded"


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(inspect)
