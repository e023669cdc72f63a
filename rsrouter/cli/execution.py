"""How networks run: options that several verbs share, and `rsrouter calibrate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.options import Device, Format, OutputFormat, data_options, read_data, readable_rows
from rsrouter.core.errors import InputError

ExecutionFile = Annotated[
    Path | None,
    typer.Option("--execution", help="How networks run: a file from `rsrouter calibrate`, or a table's JSON to run as it did."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32 (tf32 or ieee: with that precision on CUDA), bfloat16 or float16; for int8 use --execution."
    ),
]
ExecutionBatch = Annotated[
    int | None,
    typer.Option("--execution-batch", min=1, help="Rows per forward pass; like --dtype it may change votes."),
]
#: `--dtype` of calibrate that measures all candidates
FASTEST = "fastest"


def choose_execution(base: Any, file: Path | None, dtype: str | None, batch: int | None) -> Any:
    """The `Execution` that options ask for: a file's in the place of `base`, then single settings.

    Raises:
        InputError: a file that holds none, an unknown dtype.
    """
    from rsrouter import Execution

    chosen = base if file is None else Execution.load(file)
    chosen = chosen if dtype is None else chosen.with_numbers(dtype)
    return chosen if batch is None else replace(chosen, batch=batch)


@data_options
def calibrate(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_POOL", help="A router's folder or Hub repository, or a pool.json.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the execution; default: print it.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Store it in the router's config.json, for every verb to use.")] = False,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help=f"float32, bfloat16, float16, {FASTEST} of the first two, or int8 (with --data)."),
    ] = "float32",
    data: Annotated[
        str | None, typer.Option("--data", help="For int8: images to measure the layers' ranges on; not those to certify.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="For int8: how many of them, evenly spread.")] = 64,
    ways: Annotated[
        bool,
        typer.Option(
            "--ways",
            help="Also choose float32 precision and graphs (CUDA) or one thread per pass (CPU); like --dtype it changes bits.",
        ),
    ] = False,
    device: Device = "cpu",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds of each candidate.")] = 3,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Measure which batch size (and dtype, and way of running) is fastest on this machine, and store it; tables record what they
    used.

    Example: rsrouter calibrate demo-run/router --dtype fastest --ways --out execution.json

    Example: rsrouter calibrate pool.json --dtype int8 --data train.npz --out int8.json
    """
    from rsrouter import Execution, ExpertPool, RoutedSmooth
    from rsrouter.router.base import vote_model
    from rsrouter.sampling.calibrate import DTYPES, measure_ranges
    from rsrouter.sampling.calibrate import calibrate as measure
    from rsrouter.serialise import router_folder, store_execution

    pool_file = source.endswith((".json", ".toml", ".yaml", ".yml"))
    folder = Path(source).expanduser()
    if save and (pool_file or not folder.is_dir()):
        raise InputError(
            "--save needs a router's folder", expected="a folder with config.json", received=source, remedy="use --out FILE"
        )
    if out is not None and out.exists():
        raise InputError("The file exists", expected="a new --out", received=str(out), remedy="nothing was overwritten")
    if pool_file:
        pool, base = ExpertPool.load(source), Execution()
        models = [vote_model(e) for e in pool]
    else:
        routed = RoutedSmooth.from_pretrained(source)
        pool, base = routed.pool, routed.execution
        models = list(routed.routed.models)
    dtypes = DTYPES if dtype == FASTEST else (dtype,)
    if dtype == "int8":
        alone = [] if pool_file else [vote_model(e) for e in pool if e.sigma > 0]  # for tables of each expert
        base = measure_ranges([*models, *alone], _ranging(data, reading, count), base=base)
        dtypes = ("float32", "int8")  # beside each other
    chosen, timings = measure(models, pool.input_shape, device=device, base=base, dtypes=dtypes, ways_too=ways, repeats=repeats)
    if dtype == "int8":
        chosen = max((t for t in timings if t.execution.dtype == dtype), key=lambda t: t.rows_per_second).execution
    measured = [
        {
            **{key: getattr(t.execution, key) for key in ("dtype", "batch", "precision", "graphs", "threads")},
            "rows_per_second": round(t.rows_per_second, 1),
        }
        for t in timings
    ]
    if out is not None:
        chosen.save(out, device=device, networks=[m.name for m in models], measured=measured)
    if save:
        store_execution(router_folder(folder), chosen)
    if format is Format.json:
        from rsrouter.cli.options import echo_json

        echo_json({"execution": chosen.to_dict(), "measured": measured})
        return
    for row, timing in zip(measured, timings, strict=True):
        best = "  <- fastest" if timing.execution == chosen else ""
        way = (
            ("one thread a pass" if row["threads"] else f"{row['precision']}{', graphs' if row['graphs'] else ''}")
            if ways
            else ""
        )
        typer.echo(
            f"{row['dtype']:>9}  batch {row['batch']:>5}  {way:<17} {row['rows_per_second']:>10,.0f} rows/s through all networks"
            + best
        )
    typer.echo(f"stored in {router_folder(folder) / 'config.json'}" if save else f"execution: {out or chosen.to_dict()}")


def _ranging(data: str | None, reading: dict[str, Any], count: int) -> Any:
    """The images that ranges are measured on.

    Raises:
        InputError: none are named.
    """
    if data is None:
        raise InputError(
            "int8 needs images to measure ranges on",
            expected="--data with images like those to certify, but not those",
            received="no --data",
            remedy="--data train.npz",
        )
    images = read_data(data, reading, demo="train")
    rows = readable_rows(images, range(0, len(images), max(1, len(images) // count)))[:count]
    return images.batch(rows)[0]


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(calibrate)
