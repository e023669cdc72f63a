"""`rsrouter report` and `rsrouter merge`: parse, call, print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from zipfile import is_zipfile

import typer

from rsrouter.cli.options import Format, OutputFormat, data_options, echo_json, read_data
from rsrouter.cli.reading import parse_radii
from rsrouter.core.errors import InputError


def named_tables(sources: list[str]) -> dict[str, str] | list[str]:
    """`NAME=PATH`, `PATH` or run folders; a mapping where every table is named, else a list with the names applied."""
    pairs = [pair for source in sources for pair in _tables_of(source)]
    if all(name for name, _ in pairs):
        names = [str(name) for name, _ in pairs]
        if len(set(names)) < len(names):
            raise InputError(
                "Two tables have one name", expected="a name for each table", received=", ".join(names), remedy="rename one"
            )
        return dict(zip(names, (path for _, path in pairs), strict=True))
    return [path for _, path in pairs] if not any(name for name, _ in pairs) else _mixed(pairs)


def _tables_of(source: str) -> list[tuple[str | None, str]]:
    """One table, or those of a run's folder."""
    from rsrouter.serialise import find_tables

    if not Path(source).is_dir():
        return [_split(source)]
    found = find_tables(Path(source))
    if not found:
        raise InputError(
            "There are no tables there",
            expected="a run: certificates.tsv, and experts/*.tsv beside it",
            received=source,
            remedy="rsrouter certify ROUTER --data DATA --experts --out RUN fills one",
        )
    return [(None, str(path)) for path in found]


def _split(source: str) -> tuple[str | None, str]:
    name, sign, path = source.partition("=")
    # a file whose own name has an equals sign is a file
    return (None, source) if not sign or not name or Path(source).exists() else (name, path)


def _mixed(pairs: list[tuple[str | None, str]]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name, path in pairs:
        key = name or Path(path).stem
        if key in named:
            raise InputError("Two tables have one name", expected="a name for each table", received=key, remedy="write NAME=PATH")
        named[key] = path
    return named


class _Lazy(Mapping[int, Any]):
    """Images of a data set by index, read when they are asked for."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self._data):
            raise KeyError(index)
        return self._data.image(index)

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < len(self._data)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._data)))

    def __len__(self) -> int:
        return len(self._data)


def _check_certified(source: Any, tables: Iterable[Any]) -> None:
    """Refuses images that are not those of the tables, which would stand beside the wrong rows."""
    for table in tables:
        stored = None if table.about is None else table.about.data.get("fingerprint")
        if stored is not None and stored != source.fingerprint:
            raise InputError(
                f"The images are not those of the table {table.name!r}",
                expected=f"the data set that was certified, {table.about.data.get('name')}",
                received=f"{source.name}, whose content has another fingerprint",
                remedy="give the --data, --split and rows of the certify command, or leave --data out",
            )


@data_options
def report(
    tables: Annotated[
        list[str],
        typer.Argument(help="Results tables: PATH or NAME=PATH, rsrouter's or Cohen's TSV; or a run's folder.", metavar="TABLE"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("report"),
    routed: Annotated[
        list[str] | None, typer.Option(help="Name of a routed table (may be repeated); default: from its metadata.")
    ] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Name of an expert's own table (may be repeated).")] = None,
    data: Annotated[str | None, typer.Option("--data", help="The data set that was certified, to show images of it.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    radii: Annotated[
        str | None,
        typer.Option(help="Radii in the table's columns: '0,0.25,0.5' or 'start:stop:step'; default: the plan's grid."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Level of the intervals over images.")] = 0.95,
    common: Annotated[bool, typer.Option("--common", help="Compare only the images that all tables hold.")] = False,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Make one self-contained page (and SVG, PNG, CSV) from results tables.

    Examples: rsrouter report run --data test.npz --out run/report

    rsrouter report routed=run/certificates.tsv cohen=published/sigma_0.50.tsv --out run/report
    """
    from rsrouter.report import summarise, write_report
    from rsrouter.report.summary import load_tables

    loaded = load_tables(named_tables(tables))
    chosen = None if radii is None else parse_radii(radii)
    images, classes = None, None
    if data is not None:
        source = read_data(data, reading)
        _check_certified(source, loaded)
        images, classes = _Lazy(source), source.classes
    options: dict[str, Any] = {"routed": routed, "experts": expert, "radii": chosen, "confidence": confidence, "common": common}
    page = write_report(loaded, out, title=title, images=images, classes=classes, **options)
    summary = summarise(loaded, **options)
    if format is Format.json:
        echo_json({"report": page, **summary.to_dict()})
        return
    from rsrouter.report.text import print_summary

    print_summary(summary)
    typer.echo(f"Report: {page}")


def merge(
    tables: Annotated[
        list[Path], typer.Argument(help="The shards' tables, each with its JSON beside it, or their labels.", metavar="TABLE")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The merged table, or labels.")],
    partial: Annotated[bool, typer.Option("--partial", help="Accept missing shards and rows.")] = False,
    format: OutputFormat = Format.text,
) -> None:
    """Merge the shards of one run (of certify or label) into one file, byte for byte what an unsharded run writes.

    Example: rsrouter merge run/shard-*.tsv --out run/certificates.tsv
    """
    from rsrouter.results import merge_tables

    if all(path.is_file() and is_zipfile(path) for path in tables):  # an archive, as `label` writes them, and no table
        from rsrouter.jobs import merge_labels

        if partial:
            raise InputError(
                "Labels can be merged only when all shards are there",
                expected="all shards",
                received="--partial",
                remedy="label the missing shards",
            )
        path = merge_labels(tables, out)
        if format is Format.json:
            echo_json({"labels": path})
            return
        typer.echo(f"Merged {len(tables)} files of labels into {path}")
        return
    path = merge_tables(tables, out, partial=partial)
    rows = path.read_bytes().count(b"\n") - 1
    if format is Format.json:
        echo_json({"table": path, "rows": rows})
        return
    typer.echo(f"Merged {rows} rows into {path}")


def register(app: typer.Typer) -> None:
    """Adds both commands to the program."""
    app.command()(report)
    app.command()(merge)
