"""`rsrouter label` and `rsrouter train`."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

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
    import_words,
    read_data,
    readable_rows,
    told_warnings,
)
from rsrouter.cli.reading import parse_numbers, parse_radii
from rsrouter.core.errors import InputError
from rsrouter.core.titles import stage_titles

Pool = Annotated[str, typer.Argument(metavar="POOL", help="pool.json or a spec file, as `rsrouter wrap` writes it.")]


def _part(source: str, start: int, count: int | None, reading: dict[str, Any], demo: str, expert: Any) -> tuple[Any, Any, str]:
    """Images, labels and name of a part of a data set; InputError where a label is missing."""
    import torch

    data = read_data(source, reading, demo, expert)
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
        list[str] | None,
        typer.Option(
            "--tables", metavar="NAME=PATH", help="Instead of --data: one expert's certification table; once for each expert."
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", help="Votes per expert and image (default 100); with --tables, the votes behind them (100,000)."),
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="Failure probability of the certificates in --tables.")] = 1e-3,
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
    """Draw every expert's votes on every image, for `rsrouter train --labels`; started again, it resumes.

    Example: rsrouter label pool.json --data train.npz --count 1000 --unseen --out labels.npz
    """
    from rsrouter import Execution, ExpertPool
    from rsrouter.jobs import label_table
    from rsrouter.training.label_files import TABLE_VOTES, load_votes, store_tables
    from rsrouter.training.labels import target_radii

    experts = ExpertPool.load(pool)
    if bool(data) == bool(tables):
        raise InputError(
            "Labels come from images or from tables",
            expected="--data, or --tables NAME=PATH once per expert",
            received="both" if data else "neither",
            remedy="--tables needs no images and no votes",
        )
    if tables:
        named = _pairs(tables, "=", "--tables", "--tables sigma_0.25=sigma_0.25.tsv")
        metadata, mean = store_tables(experts, named, out, n=TABLE_VOTES if n is None else n, alpha=alpha, unseen=unseen)
        _told(experts.names, mean, metadata, out, unseen, format)
        return
    images = read_data(data, reading, "train", experts.experts[0])
    rows = part_of(len(images), start, count, data)
    with closing(Display("label")) as display:
        metadata = label_table(
            experts,
            images,
            out,
            n=100 if n is None else n,
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


def _pairs(texts: Iterable[str], sign: str, option: str, example: str) -> dict[str, str]:
    """`KEY<sign>VALUE` texts as a mapping; InputError for anything else, or a key that is named twice."""
    pairs = [text.strip().partition(sign) for text in texts]
    found = {key: value for key, _, value in pairs}
    if len(found) != len(pairs) or not all(key and between and value for key, between, value in pairs):
        received = " ".join(map(str, texts))
        raise InputError(f"{option} cannot be read", expected=example, received=received, remedy="name each only once")
    return found


def _by_radius(text: str | None, option: str) -> float | dict[float, float] | None:
    """`"0.95"`, or by radius `"0:0.98,1:0.95"`; InputError for anything else."""
    if text is None:
        return None
    if ":" not in text:
        expected = "one number such as 0.95, or by radius: 0:0.98,1:0.95"
        numbers = parse_numbers(text, option, expected)
        if len(numbers) != 1:
            raise InputError(
                f"--{option} cannot be read", expected=expected, received=text, remedy="say which radius each is for"
            )
        return numbers[0]
    pairs = _pairs(text.split(","), ":", f"--{option}", f"--{option} 0:0.98,1:0.95")
    return {parse_numbers(key, option)[0]: parse_numbers(value, option)[0] for key, value in pairs.items()}


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
        str | None,
        typer.Argument(metavar="[POOL]", help="pool.json or a spec file; default with --from: that router's own pool."),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="Training images, preferably unseen by every expert; demo: the bundled ones.")
    ] = "",
    out: Out = Path("router"),
    kind: Annotated[str, typer.Option("--kind", help="auto, deferral, cascade or flat.")] = "auto",
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation", help="Images on which choices are made; default: the last fifth of --data (none for a flat router)."
        ),
    ] = None,
    radii: Radii = DEFAULT_RADII,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Flat: utility, coverage, dual-rs, dual-rs-weak, dual-rs-head; others: deferral, deferral-confidence, "
            "deferral-grid, deferral-sure, deferral-whole, quick.",
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="For a flat router: the file that `rsrouter label` wrote.")
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option("--floor", help="Wanted least ratio to the best expert, such as 0.95, or by radius: 0:0.98,1:0.95."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Weights of radii, such as 0:2,0.5:1; others have weight 1.")
    ] = None,
    never_below: Annotated[
        list[str] | None,
        typer.Option(
            "--never-below", metavar="NAME@RADIUS", help="Certify no less than this expert at this radius (repeatable)."
        ),
    ] = None,
    core_at: Annotated[
        float | None,
        typer.Option("--core-at", help="The core answers where no class has this share of the last stage's votes, such as 0.6."),
    ] = None,
    parent: Annotated[
        str | None, typer.Option("--from", help="Folder or Hub repository of a router to train further, also over other experts.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of --from.")] = None,
    start: Start = 0,
    count: Count = None,
    n: Annotated[int, typer.Option("--n", help="Votes per stage of the certification that the router is tuned for.")] = 10_000,
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
    """Train a router over frozen experts for the radii you care about; a killed training resumes when started again.

    Examples: rsrouter train pool.json --data train.npz --validation validation.npz --radii 0:2:0.25 --out router

    rsrouter train pool.json --data train.npz --kind deferral --recipe quick --out first-try

    rsrouter train pool-with-core.json --data train.npz --core-at 0.6 --out accurate
    """
    from rsrouter import Execution, ExpertPool, FlatRouter, RoutedSmooth, Training, train_router
    from rsrouter.serialise import resolve_source
    from rsrouter.training.label_files import load_labels

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
        at = None if reference is None else reference.revision
        old = RoutedSmooth.from_pretrained(parent if reference is None else reference.repo_id, revision=at)
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
    images, classes, name = _part(data, start, count, reading, "train", experts.experts[0])
    notes["data"] = name
    chosen = None
    if validation is not None:
        held, held_classes, notes["validation_data"] = _part(
            validation,
            0,
            None,
            {**reading, "split": validation_split or reading["split"]},
            "validation",
            experts.experts[0],
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
    wishes: dict[str, Any] = {}
    if (least := _by_radius(floor, "floor")) is not None:
        wishes["floor"] = least
    if (counts := _by_radius(weights, "weights")) is not None:
        wishes["weights"] = counts if isinstance(counts, dict) else dict.fromkeys(parse_radii(radii), counts)
    if never_below:
        turned = ["@".join(reversed(text.rsplit("@", 1))) for text in never_below]  # one expert for each radius
        named = _pairs(turned, "@", "--never-below", "--never-below sigma_1@1.0, one expert for each radius")
        wishes["never_below"] = {parse_numbers(radius, "never-below")[0]: who for radius, who in named.items()}
    training = Training(
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
        notes=notes,
        parent=old,
        core_at=core_at,
        show=True,
        **wishes,
    )
    with told_warnings():
        warnings.filterwarnings("ignore", message="no head could be trained")  # it is told below
        routed = train_router(training)
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    if format is Format.json:
        doubts = [line["doubt"] for line in lines if "doubt" in line]
        echo_json({"out": out, "kind": routed.router.kind, "digest": routed.router.digest, "doubts": doubts, "last": lines[-1]})
        return
    for text in (*_found(lines, kind, routed.router.kind), *_explain(routed)):
        typer.echo(text)
    typer.echo(f"{routed.router.kind} router: {out}")
    typer.echo(f"next: {_next(routed, out, n, radii, alpha)}")


def _found(lines: Sequence[dict[str, Any]], kind: str, trained: str) -> list[str]:
    """What the log says about the choice: candidates, chain, frontier."""
    texts, last = [], lines[-1]
    no_head = next((line["no_head"] for line in lines if "no_head" in line), None)
    texts += [line["fewer_heads"] for line in lines if "fewer_heads" in line]
    if no_head is not None:
        texts.append(f"{no_head}; what follows chooses without heads")
    elif kind == "deferral" and trained != kind:
        texts.append("no trained head was worth asking on the validation images: plain experts in a row did better")
    for line in lines:
        for who, score in line.get("candidates", {}).items():
            ratios = f"coverage {line['coverages'][who]:.3f}, least ratio {line['leasts'][who]:.3f}"
            texts.append(f"{who}: score {score:.3f}, {ratios}" + (" <- chosen" if who == line["chosen"] else ""))
        if "candidates" in line:
            texts.append("score: weighted coverage less 5 times what the weakest radius lacks to its floor")
    if "coverage" not in last:
        return texts
    if "chain" in last:
        texts.append(f"chain: {_chain(last['chain'])}")
    texts.append(f"on {last['images']} validation images (simulated), as shares of the experts' envelope:")
    rows = [("this router", last)] + (
        [(f"{last['best_expert']['name']} alone", last["best_expert"])] if "best_expert" in last else []
    )
    texts += [f"  {who}: coverage {row['coverage']:.3f}, least ratio {row['least']:.3f}" for who, row in rows]
    if last["shortfall"] > 0:
        texts.append(f"  the floor is missed by {last['shortfall']:.3f} at the weakest radius")
    if "frontier" in last:
        texts.append("frontier (coverage, least ratio), and where the choice stopped:")
        points = {(p["coverage"], p["least"]): p["chain"] for p in (*last["frontier"], last)}
        for (coverage, least), chain in sorted(points.items(), reverse=True):
            texts.append(f"  {'*' if chain == last['chain'] else ' '} {coverage:.3f}  {least:.3f}  {_chain(chain)}")
    return texts


def _chain(chain: Sequence[Sequence[Any]]) -> str:
    return " -> ".join(who if tau is None else f"{who} ({tau:g})" for who, tau in chain)


def _next(routed: Any, out: Path, n: int, radii: str, alpha: float) -> str:
    """The command that certifies what was trained as it was meant: with its votes, at the radii that these can reach."""
    from rsrouter.core.bounds import AlphaSplit
    from rsrouter.core.plans import AdaptivePlan

    grid = parse_radii(radii)
    reach = AdaptivePlan(n, grid).reach(routed.tree, AlphaSplit.even(alpha, routed.tree.paths), "two")
    reached = radii if max(grid) <= reach else ",".join(f"{r:g}" for r in grid if r <= reach)
    words = ["rsrouter", "certify", str(out), "--data", "TEST", "--n", str(n), "--radii", reached]
    words += ["--alpha", f"{alpha:g}"] if alpha != 1e-3 else []
    return shlex.join([*words, "--experts", *import_words(), "--out", f"{out}-run"])


def _explain(routed: Any) -> list[str]:
    """What heads are and what tables call them, and which experts nobody asks."""
    voters = getattr(routed.router, "voters", None)
    if voters is None:
        return []
    stages = [routed.tree.stages[name] for name in reversed(routed.tree.order)]
    titles = stage_titles(stages, routed.pool.names)
    asks = list(zip(voters, stages, strict=True))
    lines = [f"{v.head}: {titles[s.name]} ({s.name!r} in tables)" for v, s in asks if v.head is not None]
    asked = {name for v in voters for name in (v.expert, *v.others)}
    if unused := [name for name in routed.pool.names if name not in asked]:
        lines.append(f"not asked: {', '.join(unused)} (nothing on the validation images was gained by it)")
    return lines


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(label)
    app.command()(train)
