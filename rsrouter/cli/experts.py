"""`rsrouter wrap`, `rsrouter convert` and `rsrouter select`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rsrouter.cli.options import (
    DEFAULT_RADII,
    Format,
    OutputFormat,
    Radii,
    checkpoint_options,
    data_options,
    echo_json,
    read_data,
    readable_rows,
)
from rsrouter.cli.reading import parse_label_map, parse_numbers, parse_radii
from rsrouter.core.errors import InputError

Source = Annotated[list[str] | None, typer.Argument(help="A spec (.toml, .yaml), or checkpoints: file, folder, hf-hub:org/name.")]
Sigma = Annotated[str | None, typer.Option(help="Noise level in [0,1] pixels; with several sources one each, such as 0.25,0.5.")]


@checkpoint_options
@data_options
def wrap(
    source: Source = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The pool file to write.")] = Path("pool.json"),
    sigma: Sigma = None,
    denoiser: Annotated[
        str | None, typer.Option(help="A denoiser before --classifier: hf-hub:org/name@rev or a folder (diffusers), or a file.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="The classifier behind --denoiser; the options about a checkpoint apply to it.")
    ] = None,
    core: Annotated[
        str | None,
        typer.Option(
            "--core", help="An accurate, uncertified network that answers where the router would abstain; given like SOURCE."
        ),
    ] = None,
    timestep: Annotated[
        str | None,
        typer.Option(help="Time step of the denoiser: first (whose noise is at least 2 sigma, the default) or nearest."),
    ] = None,
    diffusion: Annotated[
        str | None, typer.Option(help='Schedule of a denoiser file, as JSON: \'{"schedule": "cosine", "steps": 4000, ...}\'.')
    ] = None,
    denoiser_architecture: Annotated[
        str | None, typer.Option("--denoiser-architecture", help="openai_unet, dncnn, ...; not for diffusers.")
    ] = None,
    denoiser_kwargs: Annotated[
        str | None, typer.Option("--denoiser-kwargs", help="Its arguments, as JSON: '{\"image_size\": 32, ...}'.")
    ] = None,
    denoiser_filename: Annotated[
        str | None, typer.Option("--denoiser-filename", help="Its weight file, where a folder or repository has several.")
    ] = None,
    denoiser_licence: Annotated[
        str | None, typer.Option("--denoiser-licence", help="Licence of its weights, if their model card does not say.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Labelled images on which to measure noisy accuracy.")] = None,
    images: Annotated[int, typer.Option("--images", help="How many images, spread evenly over the data.")] = 300,
    label_map: Annotated[
        str | None,
        typer.Option(
            "--label-map",
            help="Reorder classes by name: first (as the first expert has them), names in order, or a JSON file of new names.",
        ),
    ] = None,
    format: OutputFormat = Format.text,
    *,
    settings: dict[str, Any],
    reading: dict[str, Any],
) -> None:
    """Pin checkpoints into a pool: commit hashes, sha256, sigma, normalisation. Nothing is guessed.

    Examples: rsrouter wrap experts.toml --data cifar10/ --split test

    rsrouter wrap a/checkpoint.pth.tar b/checkpoint.pth.tar --sigma 0.25,0.5 --architecture cifar_resnet110
    --normalisation cifar10

    rsrouter wrap hf-hub:org/vit@main --sigma 0.25,0.5 --input-size 32 --out pool.json

    rsrouter wrap timm/resnet18.a1_in1k --sigma 0.25

    rsrouter wrap hf-hub:org/clip --sigma 0.25 --class-names cat,dog --template "a photo of a {}."

    rsrouter wrap a.pth b.pth --sigma 0.25,0.5 --core accurate.pth --architecture cifar_resnet110 --normalisation cifar10

    rsrouter wrap --denoiser hf-hub:org/ddpm-cifar10 --classifier clean/model.safetensors --sigma 0.25,0.5,1
    """
    from rsrouter.experts import wrap as wrap_spec
    from rsrouter.experts.parts import parts_of

    about = {
        "source": denoiser,
        "filename": denoiser_filename,
        "architecture": denoiser_architecture,
        "kwargs": _json(denoiser_kwargs, "--denoiser-kwargs"),
        "licence": denoiser_licence,
    }
    of_denoiser = {key: value for key, value in about.items() if value is not None}
    call = {"timestep": timestep, "diffusion": _json(diffusion, "--diffusion")}
    call = {key: value for key, value in call.items() if value is not None}
    spec: Any = source[0] if source else None
    if of_denoiser or classifier is not None or call or not source:
        spec = _denoised_spec(source or [], of_denoiser, classifier, call, sigma, settings)
    elif len(source) > 1 or not source[0].endswith((".toml", ".yaml", ".yml")):
        sigmas: list[Any] = [None] * len(source)
        if sigma is not None:
            sigmas = list(parse_numbers(sigma, "sigma"))
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
    elif settings or sigma is not None or core is not None:
        raise InputError(
            "A spec and flags were given",
            expected="one of the two",
            received=str(sorted(settings) or ["sigma" if sigma is not None else "core"]),
            remedy="write them under [defaults] in the spec, and core = true into the [[expert]] of a core",
        )
    if core is not None:
        spec = [*spec, {"source": core, **settings, "core": True}]
    x = y = None
    if data is not None:
        found = read_data(data, reading, "validation")
        step = max(1, len(found) // max(1, images))
        x, y = found.batch(readable_rows(found, list(range(0, len(found), step))[:images]))
    if out.exists():
        raise InputError(
            "The pool file is there already",
            expected="a new file",
            received=str(out),
            remedy="choose another --out, or delete it; nothing is overwritten",
        )
    wrapped = wrap_spec(spec, images=x, labels=y, label_map=None if label_map is None else parse_label_map(label_map))
    wrapped.pool.save(out)
    checks = {c.name: c for c in wrapped.checks}
    if format is Format.json:
        echo_json(
            {
                "pool": out,
                "digest": wrapped.pool.digest,
                "warnings": wrapped.warnings,
                "experts": [
                    {
                        "name": e.name,
                        "sigma": e.sigma,
                        "core": e.core,
                        "digest": e.digest,
                        "noisy_accuracy": checks[e.name].accuracy if e.name in checks else None,
                    }
                    for e in wrapped.pool.members
                ],
            }
        )
        return
    for expert in wrapped.pool.members:
        origin = expert.provenance
        where = "" if origin is None else f"{origin.location}@{origin.revision[:12]}" if origin.revision else origin.filename
        parts: list[str] = []
        if origin is not None and origin.source == "composite":
            where, parts = "", [role for role, _ in parts_of(origin, expert.sigma)]
        what = "  accuracy" if expert.core else "  noisy accuracy"
        accuracy = f"{what} {checks[expert.name].accuracy:.1%}" if expert.name in checks else ""
        noise = "core, uncertified" if expert.core else f"sigma {expert.sigma:<6g}"
        typer.echo(f"{expert.name:24} {noise} digest {expert.digest[:12]}{where and '  ' + where}{accuracy}")
        for part in parts:
            typer.echo(f"    {part}")
    for warning in wrapped.warnings:
        typer.secho(f"warning: {warning}", err=True, fg="yellow")
    typer.echo(f"Pool: {out}")


def _json(text: str | None, option: str) -> Any:
    from rsrouter.stored import parse_json

    return None if text is None else parse_json(text, option, remedy="an object in quotes: '{\"steps\": 1000}'")


def _denoised_spec(
    source: list[str],
    denoiser: dict[str, Any],
    classifier: str | None,
    call: dict[str, Any],
    sigma: str | None,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """The spec of one denoiser before one classifier, an expert at each sigma."""
    given = [*source, *(["--denoiser"] if "source" in denoiser else []), *(["--classifier"] if classifier else [])]
    if source or "source" not in denoiser or classifier is None:
        raise InputError(
            "Nothing to wrap" if not given else "A denoiser and a classifier go together",
            expected="--denoiser REF --classifier REF --sigma 0.25,0.5,1, or checkpoints, or a spec",
            received=", ".join(given) or "no source",
            remedy="give both and no other source; plain experts can stand beside it in a spec",
        )
    if sigma is None:
        raise InputError(
            "A denoised expert needs its sigma",
            expected="--sigma, one or several",
            received="none",
            remedy="--sigma 0.25,0.5,1: an expert at each, from the same two networks",
        )
    part = {"source": classifier, **settings}
    return [{"kind": "denoised", "sigma": parse_numbers(sigma, "sigma"), "denoiser": denoiser, "classifier": part, **call}]


@checkpoint_options
def convert(
    source: Annotated[str, typer.Argument(help="A legacy checkpoint: .pth.tar, .pt, safetensors, a folder, or hf-hub:org/name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder: model.safetensors, config.json, README.md.")],
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0,1] pixels; a checkpoint does not carry it.")] = None,
    format: OutputFormat = Format.text,
    *,
    settings: dict[str, Any],
) -> None:
    """Turn a checkpoint into a folder that can be put on the Hub: safetensors, config and a card.

    Example: rsrouter convert noise_0.25/checkpoint.pth.tar --out cohen-0.25 --architecture cifar_resnet110 --sigma 0.25
    --normalisation cifar10 --licence mit
    """
    from rsrouter.experts import convert as convert_checkpoint

    if sigma is not None:
        settings["sigma"] = sigma
    folder = convert_checkpoint(source, out, **settings)
    if format is Format.json:
        echo_json({"folder": folder, "files": sorted(p.name for p in folder.iterdir())})
        return
    typer.echo(f"Written: {folder}. Put it on the Hub with: hf upload ORG/NAME {folder}")


def select(
    tables: Annotated[list[str], typer.Argument(help="A results table per candidate, over the same images: PATH or NAME=PATH.")],
    k: Annotated[int, typer.Option("--k", "-k", help="How many experts to choose.")],
    radii: Radii = DEFAULT_RADII,
    common: Annotated[bool, typer.Option("--common", help="Use only the images that all tables hold.")] = False,
    format: OutputFormat = Format.text,
) -> None:
    """Choose the K experts over which a perfect router would certify most (greedy, at least 63% of the best choice).

    Example: rsrouter select 0.12=a.tsv 0.25=b.tsv 0.50=c.tsv 1.00=d.tsv --k 3 --radii 0:1:0.25
    """
    from rsrouter.cli.report import named_tables
    from rsrouter.experts.select import held_radii, select_experts
    from rsrouter.report.summary import load_tables

    loaded = load_tables(named_tables(tables))
    held = held_radii(loaded, common=common)
    found = select_experts(held, k, parse_radii(radii), names=[t.name for t in loaded])
    if format is Format.json:
        echo_json(
            {
                "chosen": found.names,
                "values": found.values,
                "bound": found.bound,
                "radii": found.grid,
                "oracle": found.curve,
                "oracle_all": found.curve_all,
                "images": len(held),
            }
        )
        return
    for name, value in zip(found.names, found.values, strict=True):
        typer.echo(f"{name:24} mean certified by an oracle router up to here {value:.1%}")
    typer.echo(f"{'radius':24} " + " ".join(f"{r:6g}" for r in found.grid))
    for title, curve in (("oracle over the chosen", found.curve), ("oracle over all", found.curve_all)):
        typer.echo(f"{title:24} " + " ".join(f"{100 * v:6.1f}" for v in curve))
    typer.echo(f"No {k} candidates reach more than {found.bound:.1%} ({len(held)} images).")


def register(app: typer.Typer) -> None:
    """Adds the three commands to the program."""
    app.command()(wrap)
    app.command()(convert)
    app.command()(select)
