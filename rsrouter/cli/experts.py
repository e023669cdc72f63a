"""`rsrouter wrap`, `rsrouter convert` and `rsrouter select`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.options import DEFAULT_RADII, Format, OutputFormat, Radii, parse_radii
from rsrouter.core.errors import InputError

Source = Annotated[list[str], typer.Argument(help="A spec (.toml, .yaml), or checkpoints: file, folder, hf-hub:org/name@rev.")]
Architecture = Annotated[str | None, typer.Option(help="cifar_resnet110, resnet50, ...: a registered name or one of timm's.")]
Sigma = Annotated[str | None, typer.Option(help="Noise level in [0,1] pixels; with several sources one each, such as 0.25,0.5.")]
Normalisation = Annotated[str | None, typer.Option(help="cifar10, imagenet, none, ...; or give --mean and --std.")]
Numbers = Annotated[str | None, typer.Option(help="One number per channel, such as 0.49,0.48,0.45.")]
Classes = Annotated[int | None, typer.Option("--num-classes", help="Width of the logits, where the file does not tell.")]
Shape = Annotated[str | None, typer.Option("--input-shape", help="C,H,W, such as 3,32,32.")]
Filename = Annotated[str | None, typer.Option(help="Weight file, where a folder or repository has several.")]
Licence = Annotated[str | None, typer.Option(help="Licence of the weights, as their publisher states it.")]


def _numbers(text: str, what: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"--{what} cannot be read", expected="numbers separated by commas", received=repr(text), remedy="such as 0.25,0.5"
        ) from error


def _settings(
    filename: str | None,
    architecture: str | None,
    normalisation: str | None,
    mean: str | None,
    std: str | None,
    num_classes: int | None,
    input_shape: str | None,
    licence: str | None,
) -> dict[str, Any]:
    """What was said on the command line; what was not said is asked for by `load_expert`."""
    given: dict[str, Any] = {
        "filename": filename,
        "architecture": architecture,
        "normalisation": normalisation,
        "num_classes": num_classes,
        "licence": licence,
        "mean": None if mean is None else _numbers(mean, "mean"),
        "std": None if std is None else _numbers(std, "std"),
        "input_shape": None if input_shape is None else [int(v) for v in _numbers(input_shape, "input-shape")],
    }
    return {key: value for key, value in given.items() if value is not None}


def wrap(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The pool file to write.")] = Path("pool.json"),
    sigma: Sigma = None,
    filename: Filename = None,
    architecture: Architecture = None,
    normalisation: Normalisation = None,
    mean: Numbers = None,
    std: Numbers = None,
    num_classes: Classes = None,
    input_shape: Shape = None,
    licence: Licence = None,
    data: Annotated[str | None, typer.Option(help="Labelled images on which to measure noisy accuracy.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data.")] = None,
    images: Annotated[int, typer.Option("--images", help="How many images, spread evenly over the data.")] = 300,
    format: OutputFormat = Format.text,
) -> None:
    """Pins checkpoints into a pool: commit hashes, sha256, sigma, normalisation. Nothing is guessed.

    Examples: rsrouter wrap experts.toml --data cifar10/ --split test

    rsrouter wrap a/checkpoint.pth.tar b/checkpoint.pth.tar --sigma 0.25,0.5 --architecture cifar_resnet110
    --normalisation cifar10
    """
    from rsrouter.data import load_data
    from rsrouter.experts import wrap as wrap_spec

    settings = _settings(filename, architecture, normalisation, mean, std, num_classes, input_shape, licence)
    spec: Any = source[0]
    if len(source) > 1 or not source[0].endswith((".toml", ".yaml", ".yml")):
        sigmas: list[Any] = [None] * len(source)
        if sigma is not None:
            sigmas = list(_numbers(sigma, "sigma"))
            if len(source) == 1 and len(sigmas) > 1:
                sigmas = [sigmas]
        if len(sigmas) != len(source):
            raise InputError(
                "Sources and sigmas differ in number",
                expected=f"{len(source)} sigmas",
                received=str(sigma),
                remedy="--sigma 0.25,0.5 in the order of the sources",
            )
        spec = [{"source": s, **settings, **({} if v is None else {"sigma": v})} for s, v in zip(source, sigmas, strict=True)]
    elif settings or sigma is not None:
        raise InputError(
            "A spec and flags were given",
            expected="one of the two",
            received=str(sorted(settings) or ["sigma"]),
            remedy="write them under [defaults] in the spec",
        )
    x = y = None
    if data is not None:
        found = load_data(data, split=split)
        step = max(1, len(found) // max(1, images))
        x, y = found.batch(list(range(0, len(found), step))[:images])
    if out.exists():
        raise InputError(
            "The pool file is there already",
            expected="a new file",
            received=str(out),
            remedy="choose another --out, or delete it; nothing is overwritten",
        )
    wrapped = wrap_spec(spec, images=x, labels=y)
    wrapped.pool.save(out)
    checks = {c.name: c for c in wrapped.checks}
    if format is Format.json:
        typer.echo(
            json.dumps(
                {
                    "pool": str(out),
                    "digest": wrapped.pool.digest,
                    "warnings": list(wrapped.warnings),
                    "experts": [
                        {
                            "name": e.name,
                            "sigma": e.sigma,
                            "digest": e.digest,
                            "noisy_accuracy": checks[e.name].accuracy if e.name in checks else None,
                        }
                        for e in wrapped.pool
                    ],
                }
            )
        )
        return
    for expert in wrapped.pool:
        origin = expert.provenance
        where = "" if origin is None else f"{origin.location}@{origin.revision[:12]}" if origin.revision else origin.filename
        accuracy = f"  noisy accuracy {checks[expert.name].accuracy:.1%}" if expert.name in checks else ""
        typer.echo(f"{expert.name:24} sigma {expert.sigma:<6g} {expert.digest[:12]}  {where}{accuracy}")
    for warning in wrapped.warnings:
        typer.secho(f"warning: {warning}", err=True, fg="yellow")
    typer.echo(f"Pool: {out}")


def convert(
    source: Annotated[str, typer.Argument(help="A legacy checkpoint: .pth.tar, .pt, safetensors, a folder, or hf-hub:org/name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder: model.safetensors, config.json, README.md.")],
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0,1] pixels; a checkpoint does not carry it.")] = None,
    filename: Filename = None,
    architecture: Architecture = None,
    normalisation: Normalisation = None,
    mean: Numbers = None,
    std: Numbers = None,
    num_classes: Classes = None,
    input_shape: Shape = None,
    licence: Licence = None,
) -> None:
    """Turns a checkpoint into a folder that can be put on the Hub: safetensors, config and a card.

    Example: rsrouter convert noise_0.25/checkpoint.pth.tar --out cohen-0.25 --architecture cifar_resnet110 --sigma 0.25
    --normalisation cifar10 --licence mit
    """
    from rsrouter.experts import convert as convert_checkpoint

    settings = _settings(filename, architecture, normalisation, mean, std, num_classes, input_shape, licence)
    if sigma is not None:
        settings["sigma"] = sigma
    folder = convert_checkpoint(source, out, **settings)
    typer.echo(f"Written: {folder}. Put it on the Hub with: hf upload ORG/NAME {folder}")


def select(
    tables: Annotated[list[str], typer.Argument(help="A results table per candidate, over the same images: PATH or NAME=PATH.")],
    k: Annotated[int, typer.Option("--k", "-k", help="How many experts to choose.")],
    radii: Radii = DEFAULT_RADII,
    format: OutputFormat = Format.text,
) -> None:
    """Chooses the K experts over which a perfect router would certify most (greedy, at least 63% of the best choice).

    Example: rsrouter select 0.12=a.tsv 0.25=b.tsv 0.50=c.tsv 1.00=d.tsv --k 3 --radii 0:1:0.25
    """
    import numpy as np

    from rsrouter.cli.report import named_tables
    from rsrouter.experts import select_experts
    from rsrouter.report.summary import load_tables

    loaded = load_tables(named_tables(tables))
    common = sorted(set.intersection(*(set(t.idx.tolist()) for t in loaded)))
    if not common:
        raise InputError(
            "The tables share no image",
            expected="tables over the same images",
            received=str([t.name for t in loaded]),
            remedy="label or certify the candidates on one data set",
        )
    columns = []
    for table in loaded:
        row = {int(i): r if c == 1 else 0.0 for i, r, c in zip(table.idx, table.radius, table.correct, strict=True)}
        columns.append([row[i] for i in common])
    found = select_experts(np.array(columns).T, k, parse_radii(radii), names=[t.name for t in loaded])
    if format is Format.json:
        typer.echo(
            json.dumps(
                {
                    "chosen": found.names,
                    "values": found.values,
                    "bound": found.bound,
                    "radii": found.grid,
                    "oracle": found.curve,
                    "oracle_all": found.curve_all,
                    "images": len(common),
                }
            )
        )
        return
    for name, value in zip(found.names, found.values, strict=True):
        typer.echo(f"{name:24} mean certified by an oracle router up to here {value:.1%}")
    typer.echo(f"{'radius':24} " + " ".join(f"{r:6g}" for r in found.grid))
    for title, curve in (("oracle over the chosen", found.curve), ("oracle over all", found.curve_all)):
        typer.echo(f"{title:24} " + " ".join(f"{100 * v:6.1f}" for v in curve))
    typer.echo(f"No {k} candidates reach more than {found.bound:.1%} ({len(common)} images).")


def register(app: typer.Typer) -> None:
    """Adds the three commands to the program."""
    app.command()(wrap)
    app.command()(convert)
    app.command()(select)
