"""`rsrouter heads`: declare last layers, draw their trunk's noisy features once, certify each of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.certify import Revision, in_panels, load_smoothed
from rsrouter.cli.execution import Dtype, ExecutionBatch, ExecutionFile, choose_execution
from rsrouter.cli.options import (
    DEFAULT_RADII,
    DEFAULT_VOTES,
    Device,
    Format,
    OutputFormat,
    Radii,
    data_options,
    echo_json,
    import_words,
    read_data,
    readable_rows,
)
from rsrouter.core.errors import InputError


class Step(StrEnum):
    """What is done: the four steps, in their order."""

    declare = "declare"
    draw = "draw"
    certify = "certify"
    check = "check"


#: Options by the steps that take them, which the titles name.
_PANELS = {
    "declare": ("head", "n", "n0", "alpha", "sides", "seed_from", "execution", "dtype", "execution_batch"),
    "declare, draw and check": ("trunk", "expert", "revision", "device"),
    "draw and check": (
        "data",
        *("split", "config", "image", "label", "classes", "size", "channels", "stream", "skip_unreadable"),
    ),
    "draw": ("start", "count", "every"),
    "certify": ("radii",),
    "certify and check": ("name",),
    "check": ("rows",),
    "Output": ("format",),
}


def _refuse_others(step: Step, context: typer.Context) -> None:
    """Raises InputError where an option was given that only other steps take."""
    for title, options in _PANELS.items():
        steps = [s for s in Step if s.value in title]
        sources = {option: context.get_parameter_source(option) for option in options}
        given = [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if given and steps and step not in steps:
            option = f"--{given[0].replace('_', '-')}"
            raise InputError(
                f"`rsrouter heads {step.value}` takes no {option}",
                expected=f"{option} with {title} alone",
                received=f"{option} with {step.value}",
                remedy="leave it out; votes and alpha are fixed by `rsrouter heads declare`",
            )


@data_options
def heads(
    context: typer.Context,
    step: Annotated[Step, typer.Argument(metavar="STEP", help="declare, draw, certify or check.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the declaration, heads, features and tables.")],
    head: Annotated[
        list[Path] | None,
        typer.Option(
            "--head",
            metavar="FILE",
            help="A last layer: safetensors with weight and bias (repeatable); a head is named after its file.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Noisy copies of each image that the bounds use.")] = DEFAULT_VOTES,
    n0: Annotated[int, typer.Option("--n0", help="Further noisy copies, which select the class.")] = 100,
    alpha: Annotated[float, typer.Option("--alpha", help="Failure probability of all heads together, for each image.")] = 1e-3,
    sides: Annotated[str, typer.Option("--sides", help="one or two.")] = "one",
    seed_from: Annotated[
        str, typer.Option("--seed-from", metavar="TEXT", help="Public text that also enters the derived seed.")
    ] = "",
    execution: ExecutionFile = None,
    dtype: Dtype = None,
    execution_batch: ExecutionBatch = None,
    trunk: Annotated[
        str | None, typer.Option("--trunk", help="The router or pool.json that has the trunk, with --expert.")
    ] = None,
    expert: Annotated[str | None, typer.Option("--expert", help="The expert whose features the heads read.")] = None,
    revision: Revision = None,
    device: Device = "cpu",
    data: Annotated[
        str | None, typer.Option("--data", help="npz, parquet, image folder, hf-hub:org/name@revision, or demo.")
    ] = None,
    start: Annotated[int, typer.Option("--start", min=0, help="First image.")] = 0,
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many images; default: all.")] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Take every k-th image.")] = 1,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of each table that check draws again.")] = 5,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="NAME", help="This head alone (repeatable); default: all.")
    ] = None,
    radii: Radii = DEFAULT_RADII,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Certify several last layers of one frozen trunk on the same noisy copies: its forward passes are paid for once.

    declare fixes heads, votes and alpha before any noise is drawn; draw keeps the trunk's features of every noisy copy; certify
    lets each head vote on them and writes DIR/tables; check draws some rows again. Alpha is shared among the heads, so the best
    one may be chosen after looking. A head that was not declared is refused: it may have seen the noise.

    Examples: rsrouter heads declare run --trunk pool.json --expert sigma_0.5 --head a.safetensors --head b.safetensors --n 10000

    rsrouter heads draw run --trunk pool.json --expert sigma_0.5 --data test.npz --count 200

    rsrouter heads certify run

    rsrouter heads check run --trunk pool.json --expert sigma_0.5 --data test.npz
    """
    from rsrouter.jobs.features import DECLARATION
    from rsrouter.results.declared import Declaration

    _refuse_others(step, context)
    if step is Step.declare:
        declared = _declare(folder, _trunk(trunk, expert, revision), head or [], locals())
        if format is Format.json:
            echo_json({"declaration": declared.digest, **declared.to_dict()})
            return
        typer.echo(f"declaration: {declared.digest}")
        typer.echo(f"{len(declared.heads)} heads, alpha {declared.share:g} each, {declared.n0} + {declared.n} copies an image")
        typer.echo(f"next: rsrouter heads draw {folder} --trunk {trunk} --expert {declared.trunk} --data DATA{_imports()}")
        return
    declared = Declaration.load(folder / DECLARATION)
    if step is Step.certify:
        _certify(folder, declared, name, radii, format)
        return
    smoothed = _trunk(trunk, expert, revision)
    if data is None:
        raise InputError("There are no images", expected="--data DATA", received="no --data", remedy="name the data set")
    images = read_data(data, reading)
    if step is Step.draw:
        _draw(folder, declared, smoothed, images, (start, count, every), device, format)
    else:
        _check(folder, declared, smoothed, images, name, rows, device, format)


def _trunk(source: str | None, expert: str | None, revision: str | None) -> Any:
    if source is None or expert is None:
        raise InputError(
            "No trunk is named",
            expected="--trunk ROUTER_OR_POOL --expert NAME",
            received=f"--trunk {source} --expert {expert}",
            remedy="name the expert whose features the heads read",
        )
    return load_smoothed(source, expert, revision)


def _declare(folder: Path, smoothed: Any, files: list[Path], told: dict[str, Any]) -> Any:
    from rsrouter.core.plans import FixedPlan
    from rsrouter.core.terms import Terms
    from rsrouter.jobs.features import write_declaration
    from rsrouter.jobs.heads import declare_heads, feature_width, save_head
    from rsrouter.router.trunk import read_head

    if len({f.stem for f in files}) < len(files) or not files:
        raise InputError(
            "Every head needs a name of its own",
            expected="--head a.safetensors --head b.safetensors",
            received=str([str(f) for f in files]),
            remedy="a head is named after its file",
        )
    terms = Terms(FixedPlan(told["n0"], told["n"]), told["alpha"], sides=told["sides"])
    run = choose_execution(smoothed.execution, told["execution"], told["dtype"], told["execution_batch"])
    made = declare_heads(
        smoothed.expert,
        {f.stem: f for f in files},
        terms,
        noise=smoothed.noise,
        execution=run,
        seed_from=told["seed_from"],
        device=told["device"],
    )
    write_declaration(folder, made)
    (folder / "heads").mkdir(exist_ok=True)
    for file in files:
        save_head(folder / "heads" / f"{file.stem}.safetensors", *read_head(file, feature_width(smoothed.expert), str(file)))
    return made


def _draw(
    folder: Path, declared: Any, smoothed: Any, images: Any, part: tuple[int, int | None, int], device: str, format: Format
) -> None:
    from rsrouter.jobs import draw_features

    start, count, every = part
    last = len(images) if count is None else min(len(images), start + count)
    order = readable_rows(images, range(start, last, every))
    each = (declared.n0 + declared.n) * declared.features * 4
    typer.echo(f"{len(order)} images, {each * len(order) / 1e6:,.0f} MB of features", err=True)

    def told(at: int, of: int) -> None:
        typer.echo(f"features {at}/{of}", err=True)

    draw_features(declared, smoothed.expert, images, folder, indices=order, device=device, progress=told)
    if format is Format.json:
        echo_json({"declaration": declared.digest, "images": len(order), "folder": folder})
        return
    typer.echo(f"features: {folder / 'features'}")
    typer.echo(f"next: rsrouter heads certify {folder}")


def _imports() -> str:
    return "".join(f" {word}" for word in import_words())


def _chosen(declared: Any, names: list[str] | None) -> list[str]:
    return [declared.named(n).name for n in names] if names else [h.name for h in declared.heads]


def _certify(folder: Path, declared: Any, names: list[str] | None, radii: str, format: Format) -> None:
    from rsrouter.cli.reading import parse_radii
    from rsrouter.jobs import certify_head
    from rsrouter.report import summarise
    from rsrouter.report.text import print_summary

    tables = []
    for head in _chosen(declared, names):
        tables.append(certify_head(folder, folder / "heads" / f"{head}.safetensors", folder / "tables" / f"{head}.tsv"))
    summary = summarise(tables, radii=parse_radii(radii))
    if format is Format.json:
        told = [t.described().heads for t in tables]
        echo_json({**summary.to_dict(), "tables": folder / "tables", "heads": [h.text for h in told if h is not None]})
        return
    print_summary(summary)
    for table in tables:
        if (about := table.described().heads) is not None:
            typer.echo(about.text)
    typer.echo(f"tables: {folder / 'tables'}")


def _check(
    folder: Path, declared: Any, smoothed: Any, images: Any, names: list[str] | None, rows: int, device: str, format: Format
) -> None:
    import secrets

    import numpy as np

    from rsrouter.jobs import redraw_head
    from rsrouter.results import read_table

    rng, found, looked = np.random.default_rng(secrets.randbits(62)), list[str](), 0
    for head in _chosen(declared, names):
        table = read_table(folder / "tables" / f"{head}.tsv")
        if (about := table.described().heads) is None or about.declaration.digest != declared.digest:
            found.append(f"{head}: the table is not of this declaration")
            continue
        chosen = np.sort(rng.choice(len(table), min(rows, len(table)), replace=False)).tolist()
        looked += len(chosen)
        file = folder / "heads" / f"{head}.safetensors"
        found += [f"{head}: {text}" for text in redraw_head(table, smoothed.expert, file, images, chosen, device)]
    if format is Format.json:
        echo_json({"declaration": declared.digest, "rows": looked, "findings": found})
    else:
        for text in found:
            typer.echo(text)
        verdict = f"{len(found)} findings" if found else "every vote is the one that the declaration gives"
        typer.echo(f"{looked} rows drawn again: {verdict}")
    if found:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(in_panels(heads, _PANELS))
