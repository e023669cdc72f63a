"""From a folder, a file or a Hub repository to an `Expert`, with everything pinned that decides its votes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.experts.checkpoints import WeightFile
from rsrouter.experts.config import CONFIG, EVAL, NORMALISATIONS, checked, read_expert_config
from rsrouter.experts.expert import Expert
from rsrouter.experts.fitting import build_fitted, file_width
from rsrouter.experts.places import ASSETS, WEIGHT_NAMES, Place, check_relative, open_place, read_weights
from rsrouter.experts.preprocessing import timm_resize
from rsrouter.experts.probe import Probe
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.registry import canonical_name, input_shape_of, known_architecture
from rsrouter.experts.structure import structure_of
from rsrouter.experts.tensors import canonical, tensors_digest
from rsrouter.hub import Hub
from rsrouter.process import usual_settings

#: one module per pinned content: entries at several sigmas, and pools loaded twice, hold the weights once
_MODULES: weakref.WeakValueDictionary[bytes, nn.Module] = weakref.WeakValueDictionary()


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

    def locate(self, provenance: Provenance, beside: str | None = None) -> Path:
        """The weight file of a plain provenance on this machine, fetched from the Hub where needed; or a file beside it.

        Raises:
            InputError: no usable place. IntegrityError: a place that is not allowed.
            HubError: not pinned to a commit, or not to be had.
        """
        self.check(provenance, "An expert")
        filename = check_relative(provenance.filename, "The provenance")
        if beside is not None:
            filename = PurePosixPath(filename).with_name(check_relative(beside, "An index")).as_posix()
        if provenance.source == "hub":
            return self.hub.fetch_pinned(provenance.location, filename, provenance.revision)
        if provenance.source == "bundled":
            return ASSETS / check_relative(provenance.location, "The provenance") / filename
        return (self.folder or Path()) / provenance.location / filename


def read_pinned(provenance: Provenance, sources: Sources) -> Callable[[], WeightFile]:
    """The verified weights of a plain provenance, to be parsed when they are needed.

    Raises:
        IntegrityError: not what was pinned. CheckpointError, HubError: not to be had.
    """
    path = sources.locate(provenance)
    return read_weights(path, provenance.sha256, lambda name: sources.locate(provenance, name))[1]


def check_tensors(provenance: Provenance, found: str) -> None:
    """Raises IntegrityError where the tensors that were read are not those that were pinned."""
    if provenance.tensors and found != provenance.tensors:
        raise IntegrityError(
            f"{provenance.filename} does not hold the weights that were pinned",
            expected=f"tensors with digest {provenance.tensors}",
            received=f"digest {found}",
            remedy="its entry was edited, or an architecture of that name now has other tensors: wrap it again",
        )


def _plain(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    # read also where the module is in memory: a damaged file must show
    module = shared(provenance, num_classes, read_pinned(provenance, sources))
    check_tensors(provenance, tensors_digest(module))
    return module


def fitted(provenance: Provenance, num_classes: int, file: WeightFile) -> nn.Module:
    """The module of a registered architecture with a file's weights."""
    name = provenance.filename
    return build_fitted(provenance.architecture, num_classes, provenance.kwargs, file, name, provenance.weights_key)


def shared(
    provenance: Provenance,
    num_classes: int,
    parse: Callable[[], WeightFile],
    build: Callable[[Provenance, int, WeightFile], nn.Module] = fitted,
) -> nn.Module:
    """The module of verified weights; equal content of equal architecture is one module, unless somebody changed it."""
    told = (provenance.sha256, provenance.weights_key, provenance.architecture, num_classes, provenance.kwargs)
    key = canonical(told)
    module = _MODULES.get(key)
    if module is None or _TAKEN.get(module) != (tensors_digest(module), structure_of(module).digest):
        module = build(provenance, num_classes, parse())
        _MODULES[key] = module
        _TAKEN[module] = tensors_digest(module), structure_of(module).digest
    return module


_TAKEN: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()

#: how the module of a provenance is built, by `Provenance.loader`; "checkpoint" reads one weight file
LOADERS: dict[str, Callable[[Provenance, int, Sources], nn.Module]] = {"checkpoint": _plain, "rsrouter": _plain}

#: what reads a model of another library: given its place, its config.json if it has one, the weight file that was named and
#: what the user says, an expert, or None where it is none of that library's
IMPORTERS: list[Callable[[Place, Path | None, str | None, Mapping[str, Any]], Expert | None]] = []


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


def merge(settings: dict[str, Any], overrides: Mapping[str, Any], checkpoint: WeightFile, who: str) -> dict[str, Any]:
    """Settings of an expert: what the file says, what the user says (which wins), and no guesses.

    Raises:
        InputError: something that decides the votes is said nowhere, or twice.
    """
    merged = dict(settings)
    if {"mean", "std", "normalisation"} & overrides.keys():  # one statement about the normalisation replaces the whole of it
        for key in ("mean", "std", "normalisation"):
            merged.pop(key, None)
    merged.update(checked(overrides, who))
    # None is a statement about the normalisation and the class names; elsewhere it says nothing
    merged = {key: value for key, value in merged.items() if value is not None or key in ("mean", "std", "labels", "resize")}
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
    if merged.get("lipschitz") is not None or merged.get("core"):
        merged.setdefault("sigma", 0)  # one forward pass without noise
    if missing := [key for key in asked if key not in merged]:
        if "std" in merged:
            asked["mean"] = "mean as well as std"
        # as people say it: what is missing is a normalisation, unless half of one was given
        names = {"mean": "mean" if "std" in merged else "normalisation"}
        unknown_arch = isinstance(arch, str) and "architecture" in missing
        raise InputError(
            f"{who} lacks settings that its votes depend on",
            expected=", ".join(names.get(key, key) for key in missing),
            received=f"known: {sorted(k for k in merged if k != 'name')}"
            + (f"; arch {arch!r} is neither registered nor one of timm's" if unknown_arch else ""),
            remedy="; ".join(f"{names.get(key, key)}: {asked[key]}" for key in missing),
        )
    if "templates" in merged:
        raise InputError(
            f"{who} takes no templates",
            expected="an open_clip model",
            received=str(merged["architecture"]),
            remedy="leave --template out; prompts make the classes of a zero-shot classifier only",
        )
    merged.setdefault("std", None)
    return _sized(merged, who)


def _sized(merged: dict[str, Any], who: str) -> dict[str, Any]:
    """The settings with the data's size as `input_shape`, and how the network's is made of it."""
    data, told = merged.pop("input_size", None), merged.pop(EVAL, None)
    if data is None:
        return merged
    channels, *seen = merged["input_shape"]
    if "resize" not in merged:
        if told is None and tuple(seen) != tuple(data):
            raise InputError(
                f"{who} does not say how images of another size are resized",
                expected=f"how {data[0]} x {data[1]} becomes {seen[0]} x {seen[1]}",
                received="--input-size alone",
                remedy=f"--resize {seen[0]}x{seen[1]}:bicubic (or bilinear), as the network was trained; --resize none: it sees "
                "them as they are",
            )
        merged["resize"] = None if tuple(seen) == tuple(data) else timm_resize(tuple(seen), tuple(data), told)
    return {**merged, "input_shape": (channels, *data)}


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
    place = open_place(source, revision, **hub_settings)
    found = _read(place, place.find(CONFIG), filename)
    return found[0], found[1], found[2], found[3]()


def _read(
    place: Place, config: Path | None, filename: str | None
) -> tuple[dict[str, Any], dict[str, Any], str, Callable[[], WeightFile]]:
    where, sha256, parse = weights_of(place, filename)
    if place.folder is not None:
        config = Path(where["location"]) / CONFIG if where["source"] == "local" else ASSETS / where["location"] / CONFIG
    return where, read_expert_config(config) if config is not None else {}, sha256, parse


def weights_of(
    place: Place, filename: str | None, names: Sequence[str] = WEIGHT_NAMES
) -> tuple[dict[str, Any], str, Callable[[], WeightFile]]:
    """The weight file of a place (`Place.weights`): the location fields of a `Provenance`, its digest, and what parses it."""
    name, path = place.weights(filename, names)
    sha256, parse = read_weights(path, None, lambda shard: _need(place, PurePosixPath(name).with_name(shard).as_posix()))
    return place.where(name), sha256, parse


def _need(place: Place, name: str) -> Path:
    found = place.find(name)
    if found is None:
        raise CheckpointError("A shard is missing", expected=name, received="no such file", remedy="fetch the repository again")
    return found


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
            a name in `NORMALISATIONS`; `labels`, the class names in order; `lipschitz` and `rounding`; `core`; `licence`
            (else what the model card's metadata say);
            `weights_key`, which of several sets of weights in the file is meant; `input_size`, `(height, width)` of the data
            where the network sees images of another size, and `resize`, a `Resize` (or its settings), where the files do not
            say how; `templates`, of an open_clip model's prompts.

    Returns:
        The expert, with its provenance; equal weights that are already in memory are shared.

    Raises:
        InputError: something that decides the votes is neither in the files nor given. Nothing is guessed.
        CheckpointError: a file that cannot be read, would run code, or does not fit.
        HubError, IntegrityError: see `rsrouter.hub.fetch`.
    """
    place = open_place(source, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config = place.find(CONFIG)
    for importer in IMPORTERS:
        if (expert := importer(place, config, filename, overrides)) is not None:
            return expert
    where, settings, sha256, parse = _read(place, config, filename)
    checkpoint, shown = parse(), where["filename"]
    merged = merge(settings, overrides, checkpoint, shown)
    provenance = Provenance(
        **where,
        sha256=sha256,
        loader="checkpoint",
        architecture=canonical_name(merged["architecture"]),
        kwargs=dict(merged.get("kwargs") or {}),
        licence=merged.get("licence") or place.licence(),
        weights_key=merged.get("weights_key"),
    )
    early = {**merged, "lipschitz": 1.0} if merged.get("lipschitz") == "compute" else merged
    make_expert(provenance, early)  # checks sigma, shapes and normalisation before any weight is placed
    module = shared(provenance, merged["num_classes"], lambda: checkpoint)
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
        settings: `sigma`, `num_classes`, `input_shape`, `mean`, `std` and optionally `resize`, `order`, `name` and `labels`.
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
        resize=settings.get("resize"),
        order=settings.get("order"),
        name=settings.get("name"),
        labels=settings.get("labels"),
        provenance=provenance,
        probe=probe,
        lipschitz=settings.get("lipschitz"),
        rounding=settings.get("rounding"),
        core=bool(settings.get("core")),
        load=None if module is not None else lambda: load_network(provenance, num_classes, sources),
    )
