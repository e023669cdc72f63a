"""From a folder, a file or a Hub repository to an `Expert`, with everything pinned that decides its votes."""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.checkpoints import LEGACY_SUFFIXES, Checkpoint, fit_state, head_width, parse_checkpoint, read_verified
from rsrouter.experts.expert import Expert, Provenance
from rsrouter.experts.registry import build_architecture, input_shape_of, known_architecture
from rsrouter.files import sha256_of
from rsrouter.hub import Hub, fetch, is_hub_reference
from rsrouter.process import usual_settings

#: folder of the weights that ship with the package (`source="bundled"`)
ASSETS = Path(__file__).resolve().parent.parent / "demo" / "assets"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHT_NAMES = (WEIGHTS, "pytorch_model.bin", "checkpoint.pth.tar")

#: (mean, std) by name, for `normalisation="..."`; "none": the module takes pixels in [0,1] or normalises itself
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {
    "none": None,
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar10_centred": ((0.4914, 0.4822, 0.4465), (1.0, 1.0, 1.0)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagenet_centred": ((0.485, 0.456, 0.406), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "half_gray": ((0.5,), (0.5,)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.286,), (0.353,)),
}

_SETTINGS = ("name", "architecture", "kwargs", "sigma", "num_classes", "input_shape", "mean", "std", "normalisation", "licence")
_CONFIG_KEYS = {*_SETTINGS, "training", "schema_version", "rsrouter_version", "library_name", "description", "converted_from"}
#: one module per pinned content: entries at several sigmas, and pools loaded twice, hold the weights once
_MODULES: weakref.WeakValueDictionary[tuple[object, ...], nn.Module] = weakref.WeakValueDictionary()


def check_relative(filename: str, who: str) -> str:
    """A file name from somebody's config: relative, inside its folder; InputError otherwise."""
    path = PurePosixPath(filename)
    if not filename or path.is_absolute() or ".." in path.parts or "\\" in filename or ":" in filename:
        raise InputError(
            f"{who} names a file outside its folder",
            expected="a relative path without '..'",
            received=repr(filename),
            remedy="do not use this configuration unless you know who wrote it",
        )
    return filename


def locate(provenance: Provenance, folder: Path | None = None) -> Path:
    """The weight file of a provenance on this machine, fetched from the Hub where needed.

    Args:
        provenance: of a plain expert.
        folder: where relative local locations count from; None: the working directory.
    """
    filename = check_relative(provenance.filename, "The provenance")
    if provenance.source == "hub":
        if provenance.revision is None:
            raise InputError(
                f"{provenance.location} is not pinned",
                expected="a commit hash",
                received="revision None",
                remedy="wrap the expert again; wrap resolves the revision",
            )
        return fetch(provenance.location, filename, provenance.revision)
    if provenance.source == "bundled":
        return ASSETS / check_relative(provenance.location, "The provenance") / filename
    if provenance.source == "local":
        return (folder or Path()) / provenance.location / filename
    raise InputError(
        "Unknown source of an expert",
        expected="hub, local or bundled",
        received=repr(provenance.source),
        remedy="the pool may come from a newer rsrouter; upgrade it",
    )


def _plain(provenance: Provenance, num_classes: int, folder: Path | None) -> nn.Module:
    path = locate(provenance, folder)
    data = read_verified(path, provenance.sha256)  # also where the module is in memory: a damaged file must show
    return _shared(provenance, num_classes, lambda: parse_checkpoint(data, path.name))


def _shared(provenance: Provenance, num_classes: int, parse: Callable[[], Checkpoint]) -> nn.Module:
    """The module of a verified file; equal content of equal architecture is one module."""
    key = (provenance.sha256, provenance.architecture, num_classes, json.dumps(provenance.kwargs, sort_keys=True, default=str))
    module = _MODULES.get(key)
    if module is None:
        module = build_architecture(provenance.architecture, num_classes, provenance.kwargs)
        module = fit_state(module, parse().state, architecture=provenance.architecture, filename=provenance.filename)
        _MODULES[key] = module
    return module


#: how the module of a provenance is built, by `Provenance.loader`; "checkpoint" reads one weight file
LOADERS: dict[str, Callable[[Provenance, int, Path | None], nn.Module]] = {"checkpoint": _plain, "rsrouter": _plain}


@usual_settings()
def build_module(provenance: Provenance, num_classes: int, folder: Path | None = None) -> nn.Module:
    """The verified module of a provenance, shared with every other expert of equal content.

    Raises:
        IntegrityError: the file is not the one that was pinned.
        CheckpointError: it cannot be read or does not fit its architecture.
        HubError: it cannot be fetched.
    """
    if provenance.loader not in LOADERS:
        raise InputError(
            "Unknown loader of an expert",
            expected=f"one of {sorted(LOADERS)}",
            received=repr(provenance.loader),
            remedy="the pool may come from a newer rsrouter; upgrade it",
        )
    return LOADERS[provenance.loader](provenance, num_classes, folder)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in an expert's or a timm model's `config.json`; `{}` if there is none. Unknown keys only warn."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} is not JSON", expected="a JSON object", received=str(error), remedy=f"repair {path}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name} is not a JSON object",
            expected="a JSON object",
            received=type(content).__name__,
            remedy=f"repair {path}",
        )
    if "pretrained_cfg" in content:
        return _timm_settings(content)
    if unknown := sorted(content.keys() - _CONFIG_KEYS):
        warnings.warn(f"{path.name}: unknown keys {unknown} are ignored; they may need a newer rsrouter", stacklevel=3)
    return {key: content[key] for key in _SETTINGS if key in content}


def _timm_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's config.json says: architecture, width, input size, normalisation, licence. Not sigma."""
    cfg = content["pretrained_cfg"]
    settings: dict[str, Any] = {
        "architecture": content.get("architecture") or cfg.get("architecture"),
        "kwargs": dict(content.get("model_args") or {}),
    }
    for key, value in (
        ("num_classes", content.get("num_classes", cfg.get("num_classes"))),
        ("input_shape", cfg.get("input_size")),
        ("mean", cfg.get("mean")),
        ("std", cfg.get("std")),
        ("licence", cfg.get("license")),
    ):
        if value is not None:
            settings[key] = value
    return settings


def _find_weights(folder: Path, filename: str | None) -> Path:
    if filename is not None:
        return folder / check_relative(filename, "The argument")
    named = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    others = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", *LEGACY_SUFFIXES} and p not in named)
    if named or len(others) == 1:
        return (named or others)[0]
    raise CheckpointError(
        "The folder has no weight file that can be told apart",
        expected=f"{WEIGHTS}, or exactly one weight file",
        received=f"{[p.name for p in others]} in {folder}",
        remedy="give filename=",
    )


def _merge(settings: dict[str, Any], overrides: Mapping[str, Any], checkpoint: Checkpoint, who: str) -> dict[str, Any]:
    """Settings of an expert: what the file says, what the user says (which wins), and no guesses."""
    if unknown := sorted(overrides.keys() - set(_SETTINGS)):
        raise InputError(
            "Unknown settings of an expert",
            expected=f"some of {list(_SETTINGS)}",
            received=str(unknown),
            remedy="check the spelling",
        )
    merged = dict(settings)
    if {"mean", "std", "normalisation"} & overrides.keys():  # one statement about the normalisation replaces the whole of it
        for key in ("mean", "std", "normalisation"):
            merged.pop(key, None)
    merged.update(overrides)
    arch = checkpoint.metadata.get("arch")
    if "architecture" not in merged and isinstance(arch, str) and known_architecture(arch):
        merged["architecture"] = arch  # the file's own statement
    if (preset := merged.pop("normalisation", None)) is not None:
        if preset not in NORMALISATIONS:
            raise InputError(
                "Unknown normalisation",
                expected=f"one of {sorted(NORMALISATIONS)}",
                received=repr(preset),
                remedy="or give mean and std",
            )
        if {"mean", "std"} & merged.keys():
            raise InputError(
                "Two statements about the normalisation",
                expected="normalisation, or mean and std",
                received=str(sorted({"mean", "std"} & merged.keys())),
                remedy="leave one out",
            )
        merged["mean"], merged["std"] = NORMALISATIONS[preset] or (None, None)
    if "num_classes" not in merged and (width := head_width(checkpoint.state)) is not None:
        merged["num_classes"] = width  # told by the file; the strict fit confirms it
    if "input_shape" not in merged and (shape := input_shape_of(str(merged.get("architecture")))) is not None:
        merged["input_shape"] = shape
    asked = {
        "architecture": "the model's name, such as 'cifar_resnet110'",
        "sigma": "the noise level it was trained with, in [0,1] pixels",
        "num_classes": "the width of the logits",
        "input_shape": "C,H,W, such as 3,32,32",
        "mean": "'cifar10' (or another name), 'none' if it takes raw pixels, or per-channel mean and std",
    }
    if missing := [key for key in asked if key not in merged]:
        if "std" in merged:
            asked["mean"] = "mean as well as std"
        # as people say it: what is missing is a normalisation, unless half of one was given
        names = {"mean": "mean" if "std" in merged else "normalisation"}
        unknown_arch = isinstance(arch, str) and "architecture" in missing
        raise InputError(
            f"{who} does not say everything that decides its votes",
            expected=", ".join(names.get(key, key) for key in missing),
            received=f"known: {sorted(k for k in merged if k != 'name')}"
            + (f"; arch {arch!r} is neither registered nor one of timm's" if unknown_arch else ""),
            remedy="; ".join(f"{names.get(key, key)}: {asked[key]}" for key in missing),
        )
    merged.setdefault("std", None)
    return merged


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[dict[str, Any], dict[str, Any], str, Checkpoint]:
    """Finds and reads a weight file; arguments and errors as in `load_expert`.

    Returns:
        `(where, settings, sha256, checkpoint)`: the location fields of a `Provenance`, what `config.json` beside it
        says, and the file's digest and content.
    """
    text = os.fspath(source)
    if is_hub_reference(text):
        hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        reference = hub.reference(text, revision)
        config_path = hub.try_fetch(reference, CONFIG)
        settings = read_config(config_path) if config_path else {}
        if filename is not None:
            path = hub.fetch(reference, check_relative(filename, "The argument"))
        else:
            path = hub.fetch_first(reference, WEIGHT_NAMES)
        where: dict[str, Any] = {
            "source": "hub",
            "location": reference.repo_id,
            "revision": reference.revision,
            "filename": filename or path.name,
        }
    else:
        given = Path(text).expanduser()
        if not given.exists():
            raise CheckpointError(
                "No such checkpoint",
                expected="a folder, a weight file or hf-hub:org/name@revision",
                received=text,
                remedy="check the path; Hub repositories are written hf-hub:org/name",
            )
        path = _find_weights(given, filename) if given.is_dir() else given
        settings = read_config(path.parent / CONFIG)
        folder = Path(os.path.abspath(path.parent))
        where = {"source": "local", "location": str(folder), "revision": None, "filename": path.name}
        if folder.is_relative_to(ASSETS):
            where |= {"source": "bundled", "location": folder.relative_to(ASSETS).as_posix()}
    data = read_verified(path, None)
    checkpoint = parse_checkpoint(data, path.name)
    return where, settings, sha256_of(data), checkpoint


def load_expert(
    source: str | os.PathLike[str],
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **overrides: Any,
) -> Expert:
    """A pinned expert from a folder (`config.json` and weights), a weight file, or `hf-hub:org/name@revision`.

    Args:
        source: folder or file on disk, or a Hub reference.
        filename: weight file, where the folder or repository has several.
        revision: branch, tag or commit of a Hub repository, instead of `@revision`; resolved to the commit hash.
        token, cache_dir, local_files_only: passed to `huggingface_hub`.
        **overrides: what the files do not say, or say differently: `name`, `architecture`, `kwargs`, `sigma`,
            `num_classes`, `input_shape`, `mean` and `std` (None for both: it normalises itself), or `normalisation`,
            a name in `NORMALISATIONS`; `licence`.

    Returns:
        The expert, with its provenance; equal weights that are already in memory are shared.

    Raises:
        InputError: something that decides the votes is neither in the files nor given. Nothing is guessed.
        CheckpointError: a file that cannot be read, would run code, or does not fit.
        HubError, IntegrityError: see `rsrouter.hub.fetch`.
    """
    where, settings, sha256, checkpoint = open_checkpoint(
        source, filename=filename, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    shown = where["filename"]
    merged = _merge(settings, overrides, checkpoint, shown)
    provenance = Provenance(
        **where,
        sha256=sha256,
        loader="checkpoint",
        architecture=merged["architecture"],
        kwargs=dict(merged.get("kwargs") or {}),
        licence=merged.get("licence"),
    )
    expert = make_expert(provenance, merged)  # checks sigma, shapes and normalisation before any weight is placed
    expert._module = _shared(provenance, expert.num_classes, lambda: checkpoint)
    return expert


def make_expert(provenance: Provenance, settings: Mapping[str, Any], folder: Path | None = None) -> Expert:
    """An expert whose weights are read and verified when first needed.

    Args:
        provenance: where from.
        settings: `sigma`, `num_classes`, `input_shape`, `mean`, `std` and optionally `name`.
        folder: where relative local locations count from.
    """
    num_classes = settings["num_classes"]

    def load() -> nn.Module:
        return build_module(provenance, num_classes, folder)

    shape = settings["input_shape"]
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise InputError(
            "An expert's input_shape is not usable", expected="(C, H, W)", received=repr(shape), remedy="for CIFAR: [3, 32, 32]"
        )
    return Expert(
        None,
        sigma=settings["sigma"],
        num_classes=num_classes,
        input_shape=shape,
        mean=settings.get("mean"),
        std=settings.get("std"),
        name=settings.get("name"),
        provenance=provenance,
        load=load,
    )
