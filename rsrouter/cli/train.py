"""`rsrouter label` and `rsrouter train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from rsrouter.cli.execution import Dtype, ExecutionBatch, ExecutionFile, choose_execution
from rsrouter.cli.jobs import (
    Display,
    RayAddress,
    Shard,
    Threads,
    UseRay,
    Workers,
    parse_shard,
    parse_workers,
    part_of,
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
    Out,
    OutputFormat,
    Radii,
    Seed,
    Start,
    data_options,
    echo_json,
    parse_radii,
    read_data,
    readable_rows,
)
from rsrouter.core.errors import InputError

Pool = Annotated[str, typer.Argument(metavar="POOL", help="pool.json or a spec file, as `rsrouter wrap` writes it.")]


@contextmanager
def _votes_bar(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar over votes; it ends its line before an error is told."""
    pause = 0.1 if sys.stderr.isatty() else 30.0  # a line each: a log does not want ten a second
    with tqdm(desc=title, total=total, unit="vote", unit_scale=True, file=sys.stderr, mininterval=pause) as bar:

        def step(count: int) -> None:
            bar.update(count)

        yield step


def _part(source: str, start: int, count: int | None, reading: dict[str, Any]) -> tuple[Any, Any, str]:
    """Images, labels and name of a part of a data set; InputError where a label is missing."""
    import torch

    data = read_data(source, reading)
    rows = part_of(len(data), start, count, source)
    images, labels = data.batch(readable_rows(data, rows))
    classes = torch.as_tensor(labels)
    if len(classes) and int(classes.min()) < 0:
        raise InputError(
            "Training needs labels", expected="a class for every image", received=source, remedy="use a labelled data set"
        )
    return images, classes, f"{data.name}, images {rows.start} to {rows.stop - 1}"


@data_options
def label(
    pool: Pool,
    out: Out,
    data: Data = "",
    tables: Annotated[
        list[Path] | None, typer.Option("--tables", help="Instead of --data: each expert's own certification table, by sigma.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Votes per expert and image.")] = 100,
    start: Start = 0,
    count: Count = None,
    unseen: Annotated[bool | None, typer.Option("--unseen/--seen", help="Whether no expert was trained on these images.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    shard: Shard = None,
    workers: Workers = None,
    ray: UseRay = False,
    ray_address: RayAddress = None,
    threads: Threads = None,
    execution: ExecutionFile = None,
    dtype: Dtype = None,
    execution_batch: ExecutionBatch = None,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Draw every expert's votes on every image, for `rsrouter train --labels`; started again, it goes on.

    Example: rsrouter label pool.json --data train.npz --count 1000 --unseen --out labels.npz
    """
    from rsrouter import Execution, ExpertPool
    from rsrouter.jobs import label_table
    from rsrouter.training.label_files import load_votes, store_tables
    from rsrouter.training.labels import target_radii

    experts = ExpertPool.load(pool)
    if bool(data) == bool(tables):
        raise InputError(
            "Labels come from images or from tables",
            expected="--data, or --tables once per expert",
            received="both" if data else "neither",
            remedy="--tables needs no images and no votes",
        )
    if tables:
        metadata, mean = store_tables(experts, tables, out, unseen=unseen)
        _told(experts.names, mean, metadata, out, unseen, format)
        return
    images = read_data(data, reading)
    rows = part_of(len(images), start, count, data)
    with closing(Display("label")) as display:
        metadata = label_table(
            experts,
            images,
            out,
            n=n,
            seed=seed,
            unseen=unseen,
            source=f"{images.name}, images {rows.start} to {rows.stop - 1}",
            device=device,
            execution=choose_execution(Execution(), execution, dtype, execution_batch),
            indices=readable_rows(images, rows),
            shard=parse_shard(shard),
            progress=display,
            workers=parse_workers(workers),
            ray=address_of(ray, ray_address),
            threads=threads,
        )
    votes, target, _ = load_votes(out, experts)
    mean = target_radii(votes, target, experts.sigmas).radius.mean(0)
    _told(experts.names, mean, metadata, out, unseen, format)


def _told(names: Sequence[str], mean: Any, metadata: dict[str, Any], out: Path, unseen: bool | None, format: Format) -> None:
    """Prints what was labelled."""
    if unseen is None:
        typer.echo("note: say --unseen or --seen; experts look better than they are on images they were trained on", err=True)
    if format is Format.json:
        echo_json({**metadata, "mean_radius": dict(zip(names, mean.tolist(), strict=True)), "out": out})
        return
    for who, value in zip(names, mean, strict=True):
        typer.echo(f"{who}: mean radius {value:.3f}")
    typer.echo(f"labels: {out}")


@data_options
def train(
    pool: Annotated[
        str | None, typer.Argument(metavar="[POOL]", help="pool.json or a spec file; with --from that router's own pool.")
    ] = None,
    data: Annotated[str, typer.Option("--data", help="Training images, best ones that no expert has seen.")] = "",
    out: Out = Path("router"),
    kind: Annotated[str, typer.Option("--kind", help="auto, deferral, cascade or flat.")] = "auto",
    validation: Annotated[
        str | None, typer.Option("--validation", help="Images that choices are made on; default: the last fifth.")
    ] = None,
    radii: Radii = DEFAULT_RADII,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Flat: utility, coverage, dual-rs; others: deferral, deferral-grid, quick.")
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="Of a flat router: what `rsrouter label` wrote.")] = None,
    parent: Annotated[
        str | None, typer.Option("--from", help="Folder or Hub repository of a router to go on from, over other experts too.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of --from.")] = None,
    start: Start = 0,
    count: Count = None,
    n: Annotated[int, typer.Option("--n", help="Votes per stage of the certification this is tuned for.")] = 10_000,
    alpha: Alpha = 1e-3,
    seed: Seed = 0,
    device: Device = "cpu",
    execution: ExecutionFile = None,
    dtype: Dtype = None,
    execution_batch: ExecutionBatch = None,
    validation_split: Annotated[
        str | None, typer.Option("--validation-split", help="Split of --validation; default: that of --split.")
    ] = None,
    format: OutputFormat = Format.text,
    *,
    reading: dict[str, Any],
) -> None:
    """Train a router over frozen experts for the radii you care about; a killed run goes on when started again.

    Examples: rsrouter train pool.json --data train.npz --validation validation.npz --radii 0:2:0.25 --out router

    rsrouter train pool.json --data train.npz --kind deferral --recipe quick --out first-try
    """
    from rsrouter import Execution, ExpertPool, FlatRouter, RoutedSmooth
    from rsrouter.serialise import resolve_source
    from rsrouter.training import DEFERRAL_RECIPES, train_router
    from rsrouter.training.label_files import load_labels
    from rsrouter.training.work import expected_votes

    if not data:
        raise InputError(
            "Training needs images",
            expected="--data",
            received="none",
            remedy="npz, parquet, a folder of images or a Hub data set",
        )
    router, old = kind, None
    notes: dict[str, Any] = {}
    if parent is not None:
        folder, reference = resolve_source(parent, revision)
        old = RoutedSmooth.from_pretrained(*((parent,) if reference is None else (reference.repo_id, reference.revision)))
        experts = old.pool if pool is None else ExpertPool.load(pool)
        notes["parent"] = {
            "name": folder.resolve().name if reference is None else reference.repo_id,
            "revision": None if reference is None else reference.revision,
            "digest": old.router.digest,
        }
        if kind == "auto" and isinstance(old.router, FlatRouter):
            router = "flat"
    elif pool is None:
        raise InputError(
            "Training needs experts", expected="POOL, or --from", received="neither", remedy="rsrouter wrap writes pool.json"
        )
    else:
        experts = ExpertPool.load(pool)
    images, classes, name = _part(data, start, count, reading)
    notes["data"] = name
    chosen = None
    if validation is not None:
        held, held_classes, notes["validation_data"] = _part(
            validation, 0, None, {**reading, "split": validation_split or reading["split"]}
        )
        chosen = (held, held_classes)
    routing = None
    if labels is not None:
        routing, target, metadata = load_labels(labels, experts, range(start, start + len(images)), plan_n=n, alpha=alpha)
        if target.tolist() != classes.tolist():
            raise InputError(
                "Labels and images do not fit",
                expected=metadata["source"],
                received=name,
                remedy="train on the images that were labelled",
            )
        notes["labels"] = {k: metadata[k] for k in ("kind", "n", "seed", "unseen", "source", "tables") if k in metadata}
    held = len(chosen[0]) if chosen is not None else 0 if router == "flat" else len(images) // 5
    given = DEFERRAL_RECIPES.get(recipe or "deferral")
    count_of = len(images) if chosen is not None or router == "flat" else len(images) - held
    total = expected_votes(
        experts, router, given, count_of, held, parse_radii(radii), plan_n=n, alpha=alpha, labelled=routing is not None
    )
    with _votes_bar("experts' votes", total) as step:
        routed = train_router(
            experts,
            router,
            images,
            classes,
            radii=parse_radii(radii),
            seed=seed,
            out=out,
            recipe=recipe,
            routing_labels=routing,
            validation=chosen,
            plan_n=n,
            alpha=alpha,
            device=device,
            execution=choose_execution(Execution() if old is None else old.execution, execution, dtype, execution_batch),
            votes=step,
            notes=notes,
            parent=old,
        )
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    if format is Format.json:
        echo_json({"out": out, "kind": routed.router.kind, "digest": routed.router.digest, "last": lines[-1]})
        return
    last = lines[-1]
    for line in lines:
        if "chosen" in line:
            for who, score in line["candidates"].items():
                chosen_word = " <- chosen" if who == line["chosen"] else ""
                typer.echo(f"{who}: score {score:.3f}, coverage {line['coverages'][who]:.3f} (on {line['on']}){chosen_word}")
            weakest = f"what the weakest radius lacks to {line['floor']:g} of the envelope"
            typer.echo(f"score: coverage less {line['strictness']:g} times {weakest}")
    if kind == "deferral" and routed.router.kind != kind:
        typer.echo("no trained head was worth asking on the validation images: plain experts in a row did better")
    if "chain" in last:
        typer.echo("chain: " + " -> ".join(who if tau is None else f"{who} ({tau:g})" for who, tau in last["chain"]))
        typer.echo(f"coverage of the experts' envelope on {last['images']} validation images (simulated): {last['coverage']:.3f}")
    for text in _explain(routed):
        typer.echo(text)
    typer.echo(f"{routed.router.kind} router: {out}")
    if getattr(routed.router, "thresholds", ()):
        typer.echo(f"its thresholds are tuned for `rsrouter certify --n {n}` (that command's default is {DEFAULT_VOTES})")


def _explain(routed: Any) -> list[str]:
    """What heads are and what tables call them, and which experts nobody asks."""
    voters = getattr(routed.router, "voters", None)
    if voters is None:
        return []
    lines, asked = [], set()
    for voter, stage in zip(voters, reversed(routed.tree.order), strict=True):
        asked |= {voter.expert, *voter.others}
        if voter.head is not None:
            sigma = routed.tree.stages[stage].sigma
            experts = " and ".join((voter.expert, *voter.others))
            lines.append(f"{voter.head}: a head on {experts}, smoothed at {sigma:g}; tables and reports call it {stage}")
    if unused := [name for name in routed.pool.names if name not in asked]:
        lines.append(f"not asked: {', '.join(unused)} (nothing on the validation images was gained by it)")
    return lines


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(label)
    app.command()(train)
