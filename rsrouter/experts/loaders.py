"""From a folder, a file or a Hub repository to an `Expert`, with everything pinned that decides its votes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.experts.checkpoints import LEGACY_SUFFIXES, WeightFile, parse_weights, read_verified
from rsrouter.experts.config import CONFIG, NORMALISATIONS, checked, read_expert_config
from rsrouter.experts.expert import Expert
from rsrouter.experts.fitting import build_fitted, file_width
from rsrouter.experts.probe import Probe
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.registry import canonical_name, input_shape_of, known_architecture
from rsrouter.experts.structure import canonical, structure_of, tensors_digest
from rsrouter.files import sha256_of
from rsrouter.hub import Hub, is_hub_reference
from rsrouter.process import usual_settings

#: folder of the weights that ship with the package (`source="bundled"`)
ASSETS = Path(__file__).resolve().parent.parent / "demo" / "assets"
WEIGHTS = "model.safetensors"
WEIGHT_NAMES = (WEIGHTS, "pytorch_model.bin", "checkpoint.pth.tar")

#: one module per pinned content: entries at several sigmas, and pools loaded twice, hold the weights once
_MODULES: weakref.WeakValueDictionary[bytes, nn.Module] = weakref.WeakValueDictionary()


def check_relative(filename: str, who: str) -> str:
    """A file name from somebody's config: relative, inside its folder; InputError otherwise.

    >>> check_relative("weights/model.safetensors", "The provenance")
    'weights/model.safetensors'
    """
    path = PurePosixPath(filename)
    if not filename or path.is_absolute() or ".." in path.parts or "\\" in filename or ":" in filename or "\0" in filename:
        raise InputError(
            f"{who} names a file outside its folder",
            expected="a relative path without '..'",
            received=repr(filename),
            remedy="do not use this configuration unless you know who wrote it",
        )
    return filename


@dataclass(frozen=True)
class Sources:
    """Where the files of pinned experts are looked for.

    Attributes:
        folder: where relative local locations count from; None: the working directory.
        hub: how the Hub is read: token, cache, offline.
        allow_local: False where the pins come from elsewhere (a router from the Hub): they may then name the Hub and what
            ships with this package, and no file of this machine is opened.
    """

    folder: Path | None = None
    hub: Hub = field(default_factory=Hub)
    allow_local: bool = True

    def check(self, provenance: Provenance, who: str) -> None:
        """Raises IntegrityError where a source is not allowed, before anything is opened."""
        for file in provenance.files():
            if file.source == "local" and not self.allow_local:
                raise IntegrityError(
                    f"{who} is not pinned",
                    expected="a Hub repository at a commit hash",
                    received=f"a local file, {file.location}",
                    remedy="ask its publisher to publish it again with `rsrouter publish`",
                )

    def locate(self, provenance: Provenance) -> Path:
        """The weight file of a plain provenance on this machine, fetched from the Hub where needed.

        Raises:
            InputError: no usable place. IntegrityError: a place that is not allowed.
            HubError: not pinned to a commit, or not to be had.
        """
        self.check(provenance, "An expert")
        filename = check_relative(provenance.filename, "The provenance")
        if provenance.source == "hub":
            return self.hub.fetch_pinned(provenance.location, filename, provenance.revision)
        if provenance.source == "bundled":
            return ASSETS / check_relative(provenance.location, "The provenance") / filename
        return (self.folder or Path()) / provenance.location / filename


def _plain(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    path = sources.locate(provenance)
    data = read_verified(path, provenance.sha256)  # also where the module is in memory: a damaged file must show
    module = _shared(provenance, num_classes, lambda: parse_weights(data, path.name))
    if provenance.tensors and (found := tensors_digest(module)) != provenance.tensors:
        raise IntegrityError(
            f"{path.name} does not hold the weights that were pinned",
            expected=f"tensors with digest {provenance.tensors}",
            received=f"digest {found}",
            remedy="its entry was edited, or an architecture of that name now has other tensors: wrap it again",
        )
    return module


def _shared(provenance: Provenance, num_classes: int, parse: Callable[[], WeightFile]) -> nn.Module:
    """The module of a verified file; equal content of equal architecture is one module, unless somebody changed it."""
    told = (provenance.sha256, provenance.weights_key, provenance.architecture, num_classes, provenance.kwargs)
    key = canonical(told)
    module = _MODULES.get(key)
    if module is None or _TAKEN.get(module) != (tensors_digest(module), structure_of(module).digest):
        name = provenance.filename
        module = build_fitted(provenance.architecture, num_classes, provenance.kwargs, parse(), name, provenance.weights_key)
        _MODULES[key] = module
        _TAKEN[module] = tensors_digest(module), structure_of(module).digest
    return module


_TAKEN: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()

#: how the module of a provenance is built, by `Provenance.loader`; "checkpoint" reads one weight file
LOADERS: dict[str, Callable[[Provenance, int, Sources], nn.Module]] = {"checkpoint": _plain, "rsrouter": _plain}


@usual_settings()
def load_network(provenance: Provenance, num_classes: int, sources: Sources | None = None) -> nn.Module:
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
    return LOADERS[provenance.loader](provenance, num_classes, sources or Sources())


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


def _merge(settings: dict[str, Any], overrides: Mapping[str, Any], checkpoint: WeightFile, who: str) -> dict[str, Any]:
    """Settings of an expert: what the file says, what the user says (which wins), and no guesses."""
    merged = dict(settings)
    if {"mean", "std", "normalisation"} & overrides.keys():  # one statement about the normalisation replaces the whole of it
        for key in ("mean", "std", "normalisation"):
            merged.pop(key, None)
    merged.update(checked(overrides, who))
    # None is a statement about the normalisation and the class names; elsewhere it says nothing
    merged = {key: value for key, value in merged.items() if value is not None or key in ("mean", "std", "labels")}
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
    if "num_classes" not in merged and (width := file_width(checkpoint)) is not None:
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
    **hub_settings: Any,
) -> tuple[dict[str, Any], dict[str, Any], str, WeightFile]:
    """Finds and reads a weight file; arguments and errors as in `load_expert`.

    Returns:
        `(where, settings, sha256, checkpoint)`: the location fields of a `Provenance`, what `config.json` beside it
        says, and the file's digest and content.
    """
    text = os.fspath(source)
    if is_hub_reference(text):
        hub = Hub(**hub_settings)
        reference = hub.reference(text, revision)
        config_path = hub.try_fetch(reference, CONFIG)
        settings = read_expert_config(config_path) if config_path else {}
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
        given = expanded(text)
        if not os.path.exists(given):
            raise CheckpointError(
                "No such checkpoint",
                expected="a folder, a weight file or hf-hub:org/name@revision",
                received=text,
                remedy="check the path; Hub repositories are written hf-hub:org/name",
            )
        path = _find_weights(given, filename) if given.is_dir() else given
        settings = read_expert_config(path.parent / CONFIG)
        folder = Path(os.path.abspath(path.parent))
        where = {"source": "local", "location": str(folder), "revision": None, "filename": path.name}
        if folder.is_relative_to(ASSETS):
            where |= {"source": "bundled", "location": folder.relative_to(ASSETS).as_posix()}
    data = read_verified(path, None)
    return where, settings, sha256_of(data), parse_weights(data, path.name)


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
            a name in `NORMALISATIONS`; `labels`, the class names in order; `licence`; `weights_key`, which of several sets
            of weights in the file is meant.

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
        architecture=canonical_name(merged["architecture"]),
        kwargs=dict(merged.get("kwargs") or {}),
        licence=merged.get("licence"),
        weights_key=merged.get("weights_key"),
    )
    make_expert(provenance, merged)  # checks sigma, shapes and normalisation before any weight is placed
    module = _shared(provenance, merged["num_classes"], lambda: checkpoint)
    return make_expert(provenance, merged, module=module)


def make_expert(
    provenance: Provenance,
    settings: Mapping[str, Any],
    sources: Sources | None = None,
    *,
    probe: Probe | None = None,
    module: nn.Module | None = None,
) -> Expert:
    """A pinned expert.

    Args:
        provenance: where from.
        settings: `sigma`, `num_classes`, `input_shape`, `mean`, `std` and optionally `name` and `labels`.
        sources: where files are looked for.
        probe: logits it gave when it was wrapped.
        module: its module; None: read and verified when first needed.
    """
    num_classes = settings["num_classes"]
    return Expert(
        module,
        sigma=settings["sigma"],
        num_classes=num_classes,
        input_shape=settings["input_shape"],
        mean=settings.get("mean"),
        std=settings.get("std"),
        name=settings.get("name"),
        labels=settings.get("labels"),
        provenance=provenance,
        probe=probe,
        load=None if module is not None else lambda: load_network(provenance, num_classes, sources),
    )


def expanded(text: str) -> Path:
    """A path with `~` as the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~ of a user that does not exist
        return Path(text)
