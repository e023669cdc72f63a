"""Settings stored beside weights: `config.json` of our own experts, of timm and of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.preprocessing import Resize
from rsrouter.experts.provenance import Channels, Name, Order, Width
from rsrouter.stored import Stored, read_json, validated

CONFIG = "config.json"
SCHEMA_VERSION = 2

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


class Settings(Stored):
    """What decides an expert's votes beside its weights; every entry may be left out, and is then asked for elsewhere.

    Attributes:
        name, architecture, kwargs, sigma, num_classes, input_shape, mean, std, labels, licence: as in `Expert` and
            `Provenance`.
        normalisation: a name in `NORMALISATIONS`, instead of `mean` and `std`.
        weights_key: which of several sets of weights in the file is meant.
        resize, order: as in `Expert`.
        input_size: `(height, width)` of the data, where `input_shape` is what the network sees.
        templates: of an open_clip model's prompts, with `{}` for the class name.
        lipschitz, rounding: as in `Expert`, for one that is not smoothed.
        core: as in `Expert`, for the network that answers where nothing is certified.
    """

    name: Name | None = None
    architecture: Name | None = None
    kwargs: dict[str, Any] | None = None
    sigma: float | None = None
    num_classes: Width | None = None
    input_shape: Annotated[tuple[Width, ...], Field(max_length=3)] | None = None
    mean: Channels | None = None
    std: Channels | None = None
    normalisation: Name | None = None
    labels: Annotated[tuple[Name, ...], Field(max_length=1_000_000)] | None = None
    licence: Name | None = None
    weights_key: Name | None = None
    resize: Resize | None = None
    order: Order | None = None
    input_size: tuple[Width, Width] | None = None
    templates: Annotated[tuple[Name, ...], Field(min_length=1, max_length=10_000)] | None = None
    lipschitz: Literal["compute"] | float | Annotated[tuple[Channels, ...], Field(max_length=1_000)] | None = None
    rounding: float | None = None
    core: bool | None = None


class ExpertConfig(Settings):
    """`config.json` of an expert; `training`, `description` and `converted_from` are for readers."""

    schema_version: int | None = None
    rsrouter_version: Name | None = None
    library_name: Name | None = None
    description: str | None = None
    training: Any = None
    converted_from: Any = None


#: names of settings, as Python and spec files take them
SETTINGS = tuple(Settings.model_fields)

#: under which `read_expert_config` gives what timm does to images of another size
EVAL = "timm_eval"


class _TimmCfg(Stored):
    architecture: Name | None = None
    num_classes: Width | None = None
    input_size: tuple[Width, Width, Width] | None = None
    mean: Channels | None = None
    std: Channels | None = None
    license: Name | None = None
    label_names: tuple[Name, ...] | None = None
    interpolation: Name | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    crop_mode: Name | None = None


class _TimmConfig(Stored):
    architecture: Name | None = None
    model_args: dict[str, Any] | None = None
    num_classes: Width | None = None
    label_names: tuple[Name, ...] | None = None
    pretrained_cfg: _TimmCfg


def given(model: Settings) -> dict[str, Any]:
    """The settings that were said, also where they are None (`mean=None`: the module normalises itself)."""
    return {key: getattr(model, key) for key in SETTINGS if key in model.model_fields_set}


def read_expert_config(path: Path) -> dict[str, Any]:
    """The settings in an expert's, a timm model's or a transformers model's `config.json`; `{}` if there is none.

    Raises:
        CheckpointError: not JSON, not an object, or entries of another kind; written by an unreleased version.
    """
    if not path.is_file():
        return {}
    remedy = f"repair {path}"
    content = read_json(path, path.name, error=CheckpointError, remedy=remedy)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name} is not a JSON object", expected="a JSON object", received=type(content).__name__, remedy=remedy
        )
    if "pretrained_cfg" in content:
        return _timm_settings(content, path.name, remedy)
    labels = {} if (names := class_names(content, path.name, remedy)) is None else {"labels": names}
    if "model_type" in content or "transformers_version" in content:
        return labels
    own = {key: value for key, value in content.items() if key not in ("id2label", "label2id")}
    config = validated(ExpertConfig, own, path.name, error=CheckpointError, remedy=remedy)
    if config.schema_version not in (None, SCHEMA_VERSION):
        newer = config.schema_version > SCHEMA_VERSION
        raise CheckpointError(
            f"{path.name} has an unsupported schema version",
            expected=f"schema_version {SCHEMA_VERSION}",
            received=f"{config.schema_version}" + ("" if newer else ", made by an unreleased version"),
            remedy="upgrade rsrouter" if newer else "write it again with `rsrouter convert`",
        )
    return {**labels, **given(config)}


def class_names(content: Mapping[str, Any], what: str, remedy: str) -> tuple[str, ...] | None:
    """Class names in the order of their numbers, where the config has them; transformers' LABEL_0, LABEL_1 are none."""
    found = content.get("id2label")
    if found is None:
        return None
    try:
        names = {int(key): value for key, value in found.items()}
        ordered = tuple(names[i] for i in range(len(names)))
        if not all(isinstance(name, str) for name in ordered):
            raise ValueError("names that are not text")
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{what} has class names that cannot be read",
            expected='id2label: {"0": "cat", "1": "dog", ...}',
            received=f"{type(error).__name__}: {error}"[:200],
            remedy=remedy,
        ) from error
    return None if ordered == tuple(f"LABEL_{i}" for i in range(len(ordered))) else ordered


def _timm_settings(content: Mapping[str, Any], what: str, remedy: str) -> dict[str, Any]:
    """What timm's config.json says: architecture, width, input size, normalisation, names, licence. Not sigma."""
    cfg = content["pretrained_cfg"]
    known = {key: content[key] for key in _TimmConfig.model_fields if key in content}
    if isinstance(cfg, dict):
        known["pretrained_cfg"] = {key: cfg[key] for key in _TimmCfg.model_fields if key in cfg}
    read = validated(_TimmConfig, known, what, error=CheckpointError, remedy=remedy)
    inner = read.pretrained_cfg
    settings = {
        "architecture": read.architecture or inner.architecture,
        "kwargs": read.model_args or {},
        "num_classes": read.num_classes or inner.num_classes,
        "input_shape": inner.input_size,
        "mean": inner.mean,
        "std": inner.std,
        "labels": read.label_names or inner.label_names,
        "licence": inner.license,
        EVAL: {"interpolation": inner.interpolation, "crop_pct": inner.crop_pct, "crop_mode": inner.crop_mode},
    }
    return {key: value for key, value in settings.items() if value is not None}


def checked(settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Settings as a person or a spec gives them, known ones.

    Raises:
        InputError: unknown ones, or of another kind.

    >>> checked({"sigma": 1, "architecture": "resnet18"}, "the expert")
    {'architecture': 'resnet18', 'sigma': 1}
    """
    if unknown := sorted(set(map(str, settings)) - set(SETTINGS)):
        raise InputError(
            "Unknown settings of an expert",
            expected=f"some of {list(SETTINGS)}",
            received=str(unknown),
            remedy="check the spelling",
        )
    numbers = {key: value for key, value in settings.items() if key in _NUMBERS}  # `Expert` says what is wrong with them
    texts = {key: value for key, value in settings.items() if key not in _NUMBERS}
    if isinstance(texts.get("resize"), Resize):
        texts["resize"] = texts["resize"].model_dump(mode="json")
    return {**given(validated(Settings, texts, what, error=InputError, remedy="see rsrouter.load_expert")), **numbers}


_NUMBERS = frozenset({"sigma", "num_classes", "input_shape", "mean", "std", "labels"})
