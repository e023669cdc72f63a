"""`rsrouter certify` and `rsrouter predict`."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from contextlib import closing
from copy import copy
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from rsrouter.cli.execution import Dtype, ExecutionBatch, ExecutionFile, choose_execution
from rsrouter.cli.jobs import (
    Display,
    Estimate,
    RayAddress,
    Shard,
    Threads,
    UseRay,
    Workers,
    parse_shard,
    parse_workers,
    part_of,
    say_estimate,
)
from rsrouter.cli.jobs import ray_address as address_of
from rsrouter.cli.options import (
    DEFAULT_RADII,
    DEFAULT_VOTES,
    Alpha,
    Count,
    Data,
    Device,
    Format,
    OutputFormat,
    Patience,
    Radii,
    Start,
    data_options,
    echo_json,
    read_data,
    readable_rows,
)
from rsrouter.cli.reading import make_plan
from rsrouter.core.errors import InputError
from rsrouter.core.types import ABSTAIN

Source = Annotated[
    str, typer.Argument(metavar="NAME_OR_DIR", help="A router's folder or Hub repository, or a pool.json with --expert.")
]
ExpertName = Annotated[str | None, typer.Option("--expert", help="Certify this expert alone, without the router.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]


#: Which options of `certify` stand together in its help.
CERTIFY_PANELS = {
    "Votes": ("plan", "n", "n0", "radii", "patience", "alpha", "rule", "sides", "seed", "seed_from"),
    "Images": (
        *("data", "start", "count", "every"),
        *("split", "config", "image", "label", "classes", "size", "channels", "stream", "skip_unreadable"),
    ),
    "Workers": ("workers", "threads", "device", "ray", "ray_address", "shard", "estimate"),
    "Execution": ("execution", "dtype", "execution_batch", "batch_size", "expert", "revision"),
    "Output": ("out", "experts", "name", "format"),
}


def in_panels(command: Callable[..., None], panels: dict[str, tuple[str, ...]]) -> Callable[..., None]:
    """The command with its options shown in panels: panel to parameter names, in their order."""
    place = {name: (at, panel) for at, (panel, names) in enumerate(panels.items()) for name in names}
    signature = inspect.signature(command, eval_str=True)

    @wraps(command)
    def verb(**arguments: Any) -> None:
        command(**arguments)

    parameters = []
    for p in signature.parameters.values():
        annotation = p.annotation
        if p.name in place:
            kind, option = get_args(annotation)[:2]
            option = copy(option)
            option.rich_help_panel = place[p.name][1]
            annotation = Annotated[kind, option]
        parameters.append(p.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY))
    # panels appear in the order of their first option
    parameters.sort(key=lambda p: place.get(p.name, (-1, ""))[0])
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    return verb


def load_smoothed(source: str, expert: str | None, revision: str | None) -> Any:
    """The routed classifier of a folder, repository; or one expert of it, or of a pool file."""
    from rsrouter import ExpertPool, RoutedSmooth, Smooth

    if source.endswith((".json", ".toml", ".yaml", ".yml")):
        if expert is None:
            raise InputError(
                "A pool alone has no router",
                expected="--expert NAME, or a router's folder",
                received=source,
                remedy="train a router, or name one expert",
            )
        return Smooth(ExpertPool.load(source)[expert])
    routed = RoutedSmooth.from_pretrained(source, revision=revision)
    return routed if expert is None else Smooth(routed.pool[expert], execution=routed.execution, noise=routed.noise)


@data_options
def certify(
    source: Source,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", help="The table, with its JSON beside it; an unfinished table is resumed.")
    ] = None,
    plan: Annotated[
        str,
        typer.Option(
            "--plan",
            help="adaptive (stops once the radius is settled), fixed (Cohen's CERTIFY), or a plan as JSON, as on cards.",
        ),
    ] = "adaptive",
    n: Annotated[int, typer.Option("--n", help="Votes per stage: the most (adaptive) or exactly (fixed).")] = DEFAULT_VOTES,
    n0: Annotated[int, typer.Option("--n0", help="Selection votes per stage.")] = 100,
    radii: Radii = DEFAULT_RADII,
    patience: Patience = None,
    alpha: Alpha = 1e-3,
    rule: Annotated[str, typer.Option("--rule", help="tree, or min (Dual RS).")] = "tree",
    sides: Annotated[
        str | None,
        typer.Option("--sides", help="Bounds on rivals, one- or two-sided: one or two; default: two, one for an expert."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the noise; default: derived from the classifier.")] = None,
    seed_from: Annotated[
        str,
        typer.Option(
            "--seed-from", metavar="TEXT", help="Public text that also enters the derived seed: a later date, a commit."
        ),
    ] = "",
    device: Device = "cpu",
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Votes per round; changes no vote.")] = None,
    start: Start = 0,
    count: Count = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Take every k-th image, as --skip does in Cohen's code.")] = 1,
    shard: Shard = None,
    workers: Workers = None,
    ray: UseRay = False,
    ray_address: RayAddress = None,
    threads: Threads = None,
    estimate: Estimate = False,
    execution: ExecutionFile = None,
    dtype: Dtype = None,
    execution_batch: ExecutionBatch = None,
    expert: ExpertName = None,
    revision: Revision = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run in reports.")] = None,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts", help="Make --out a run folder: the router, its table, and one of each expert at the radii it can reach."
        ),
    ] = False,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Certify a data set into a results table (TSV and JSON); run it again to resume an unfinished table.

    Examples: rsrouter certify demo/router --data test.npz --out run/certificates.tsv --n 10000 --count 200

    rsrouter certify router --data test.npz --n 10000 --experts --out run
    """
    from rsrouter import RoutedSmooth, Smooth
    from rsrouter.cli.reading import parse_radii
    from rsrouter.core.terms import Terms
    from rsrouter.jobs import certify_table, estimate_table
    from rsrouter.jobs.devices import on_cpu
    from rsrouter.report import summarise
    from rsrouter.report.text import print_summary

    smoothed = load_smoothed(source, expert, revision)
    images = read_data(data, reading, expert=smoothed.experts[0])
    if execution or dtype or execution_batch:
        smoothed = smoothed.with_execution(choose_execution(smoothed.execution, execution, dtype, execution_batch))
    rows = part_of(len(images), start, count, data)[::every]
    terms = Terms(make_plan(plan, n, n0, radii, patience), alpha, rule, sides, seed)
    job: dict[str, Any] = {
        "device": device,
        "batch_size": batch_size,
        "indices": readable_rows(images, rows),
        "shard": parse_shard(shard),
        "workers": parse_workers(workers),
        "ray": address_of(ray, ray_address),
        "threads": threads,
    }
    if estimate:
        say_estimate(estimate_table(smoothed, images, terms, grid=parse_radii(radii), **job), format)
        return
    if out is None:
        raise InputError(
            "There is no output file", expected="--out FILE.tsv", received="no --out", remedy="--out run/certificates.tsv"
        )
    if shard is not None and threads is None and workers is None and job["ray"] is None and on_cpu(device):
        typer.echo("note: shards merge only with equal numbers of threads; set --threads where machines differ", err=True)
    shown = tuple(r for r in parse_radii(radii) if r in (0.0, 0.5, 1.0)) or (0.0,)
    alone = list(smoothed.pool) if experts and isinstance(smoothed, RoutedSmooth) else []
    if experts:
        smoothed.routed.resolve(terms)  # what cannot be certified is refused before the folder is there
        out = _run_folder(source, smoothed, out)

    def filled(what: Any, terms: Terms, path: Path, title: str, name: str | None) -> Any:
        with closing(Display(title, shown)) as display:
            return certify_table(
                what,
                images,
                path,
                terms,
                seed_from=seed_from,
                name=name,
                data={"name": images.name},
                radii=shown,
                progress=display,
                **job,
            )

    tables = [filled(smoothed, terms, out, "certify", name)]
    for k, e in enumerate(alone):
        one = Smooth(e, execution=smoothed.execution, noise=smoothed.noise)
        own = one.routed.within_reach(Terms(terms.plan, alpha, seed=seed))
        title = f"expert {k + 1}/{len(alone)}, {e.name}"
        tables.append(filled(one, own, out.with_name("experts") / f"{e.name}.tsv", title, None))
    summary = summarise(tables, radii=parse_radii(radii))
    if format is Format.json:
        echo_json({**summary.to_dict(), "table": out, "rows": len(tables[0])})
        return
    print_summary(summary)
    typer.echo(f"table: {out}")
    if experts:
        typer.echo(f"next: rsrouter report {out.parent} --out {out.parent / 'report'}")


def _run_folder(source: str, smoothed: Any, out: Path) -> Path:
    """Where a run has its table; the router is copied beside it, where it lies on this machine."""
    from rsrouter import RoutedSmooth
    from rsrouter.serialise import router_folder

    if not isinstance(smoothed, RoutedSmooth):
        raise InputError(
            "--experts needs a router, not one expert",
            expected="a router without --expert",
            received=source,
            remedy="leave --experts or --expert out",
        )
    table = out if out.suffix == ".tsv" else out / "certificates.tsv"
    if table.name != "certificates.tsv":
        raise InputError(
            "A run has its tables under fixed names",
            expected="a folder, or certificates.tsv in one",
            received=str(out),
            remedy="--out run",
        )
    router, given = table.parent / "router", router_folder(Path(source).expanduser())
    if given.is_dir() and given.resolve() != router.resolve():
        if not router.exists():
            router.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(given, router, ignore=shutil.ignore_patterns("certificates", "README.md"))
        elif RoutedSmooth.from_pretrained(router).digest != smoothed.digest:
            raise InputError(
                "The run folder belongs to another router",
                expected=f"{given}",
                received=str(router),
                remedy="give another folder as --out",
            )
    return table


@data_options
def predict(
    source: Source,
    data: Data,
    n: Annotated[int, typer.Option("--n", help="Votes per stage that is asked.")] = 1000,
    alpha: Alpha = 1e-3,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the noise; default: fresh, which the guarantee needs.")
    ] = None,
    device: Device = "cpu",
    start: Start = 0,
    count: Count = None,
    execution: ExecutionFile = None,
    dtype: Dtype = None,
    execution_batch: ExecutionBatch = None,
    expert: ExpertName = None,
    revision: Revision = None,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Print the smoothed classifier's answer for each image, -1 where it abstains; a core's uncertified answer is added.

    Example: rsrouter predict demo/router --data test.npz --count 5
    """
    smoothed, images = load_smoothed(source, expert, revision), read_data(data, reading)
    smoothed = smoothed.with_execution(choose_execution(smoothed.execution, execution, dtype, execution_batch))
    answers, uncertified = dict[int, int](), dict[int, int]()
    rows = readable_rows(images, part_of(len(images), start, count, data))
    for part in (rows[k : k + 256] for k in range(0, len(rows), 256)):
        found = smoothed.predict(images.batch(part)[0], n=n, alpha=alpha, seed=seed, device=device)
        answers.update(zip(part, found.tolist(), strict=True))
        if smoothed.core is not None and (left := [i for i in part if answers[i] == ABSTAIN]):
            uncertified.update(zip(left, smoothed.core.answers(images.batch(left)[0], device).tolist(), strict=True))
    if format is Format.json:
        told = {i: {"answer": a, "core": uncertified.get(i)} for i, a in answers.items()}
        echo_json(answers if smoothed.core is None else told)
        return
    for index, answer in answers.items():
        typer.echo(f"{index}\t{answer}" + (f"\tcore {uncertified[index]}, uncertified" if index in uncertified else ""))


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(in_panels(certify, CERTIFY_PANELS))
    app.command()(predict)
