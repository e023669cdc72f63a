"""Image classifiers of transformers, as `save_pretrained` writes them and the Hub holds them.

transformers 5 renames keys while it loads, so its own `from_pretrained` places the tensors, from bytes that were verified; it
reads no file, and no code comes along. The identity is that of the files: the tensors as they are stored and the model's
configuration, so that it outlives releases that name things otherwise.

What the network sees follows from the repository's image processor: resizing, crop and normalisation become the expert's, and are
compared with what the processor itself makes of an image.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.checkpoints import WeightFile, check_tensor
from rsrouter.experts.config import checked, class_names
from rsrouter.experts.expert import Expert
from rsrouter.experts.loaders import (
    IMPORTERS,
    LOADERS,
    Sources,
    check_tensors,
    make_expert,
    merge,
    read_pinned,
    shared,
    weights_of,
)
from rsrouter.experts.places import SAFE_NAMES, Place
from rsrouter.experts.probe import probe_batch
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.tensors import named_tensors_digest
from rsrouter.experts.transformers_processors import library, preprocessing, quiet
from rsrouter.stored import read_json

LOADER = "transformers"
#: entries of a config.json that decide nothing about the logits
_NOTES = {
    *(
        "architectures",
        "auto_map",
        "dtype",
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "torch_dtype",
    ),
    *("transformers_version", "use_cache", "_commit_hash", "_name_or_path", "_attn_implementation", "attn_implementation"),
}


class TransformersClassifier(nn.Module):
    """Pixels to the logits of a transformers model.

    Args:
        model: its output has `.logits`; where `head` is split off, these are what the head reads.
        head: the last layer; None: it cannot be told apart, and no features are exposed.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.model, self.head = model, head

    @property
    def has_features(self) -> bool:
        """Whether the last layer could be split off."""
        return self.head is not None

    def forward_features(self, x: Tensor) -> Tensor:
        """What the last layer reads, `(B, F)`."""
        features: Tensor = self.model(x).logits
        return features if self.head is None or isinstance(self.head, nn.Linear) else torch.flatten(features, 1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or with `pre_logits` the features as they are."""
        return features if pre_logits else self.get_classifier()(features)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return nn.Identity() if self.head is None else self.head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.get_classifier()(self.forward_features(x))
        return logits


def is_transformers(content: Any) -> bool:
    """Whether a config.json is that of a transformers model.

    >>> is_transformers({"model_type": "vit"}), is_transformers({"architecture": "resnet18"})
    (True, False)
    """
    return isinstance(content, dict) and "pretrained_cfg" not in content and isinstance(content.get("model_type"), str)


def _import(place: Place, config: Path | None, filename: str | None, overrides: Mapping[str, Any]) -> Expert | None:
    if config is None or overrides.get("architecture") is not None:
        return None
    remedy = "fetch the repository again"
    content = read_json(config, config.name, error=CheckpointError, remedy=remedy)
    if not is_transformers(content):
        return None
    name = _architecture(content)
    if filename is None and place.only is None and not any(place.find(known) for known in SAFE_NAMES):
        raise CheckpointError(
            "This transformers model has no safetensors file",
            expected=" or ".join(SAFE_NAMES),
            received="pickled weights (pytorch_model.bin)" if place.find("pytorch_model.bin") else "no weights",
            remedy="save_pretrained where you trust it writes safetensors; on the Hub, ask the repository's owner for them",
        )
    where, sha256, parse = weights_of(place, filename, SAFE_NAMES)
    if not where["filename"].endswith((".safetensors", ".json")):
        raise CheckpointError(
            "Weights of transformers are read from safetensors only",
            expected=" or ".join(SAFE_NAMES),
            received=where["filename"],
            remedy="save_pretrained where you trust it writes them",
        )
    file = parse()
    labels = class_names(content, config.name, remedy)
    count = len(content["id2label"]) if isinstance(content.get("id2label"), dict) else content.get("num_labels", 2)
    known: dict[str, Any] = {"architecture": name, "num_classes": count, **({} if labels is None else {"labels": labels})}
    size = checked({"input_size": overrides.get("input_size")}, "The expert")["input_size"]
    told = "resize" in overrides and bool({"mean", "std", "normalisation"} & overrides.keys())
    known |= preprocessing(place, content, size, told)
    settings = merge(known, {key: value for key, value in overrides.items() if key != "input_size"}, file, where["filename"])
    if settings["num_classes"] != count:
        raise InputError(
            "num_classes contradicts the model's configuration",
            expected=f"{count}, as its id2label says",
            received=str(settings["num_classes"]),
            remedy="leave it out",
        )
    seen = settings["resize"].output if settings.get("resize") is not None else settings["input_shape"][1:]
    provenance = Provenance(
        **where,
        sha256=sha256,
        tensors=named_tensors_digest(file.states[""]),
        loader=LOADER,
        architecture=name,
        kwargs={
            "config": {key: value for key, value in content.items() if key not in _NOTES},
            "input": [settings["input_shape"][0], *seen],
        },
        licence=settings.get("licence") or place.licence(),
    )
    make_expert(provenance, settings)
    return make_expert(provenance, settings, module=shared(provenance, count, lambda: file, _build))


def _architecture(content: Mapping[str, Any]) -> str:
    """The class that the configuration names: one of transformers' image classifiers."""
    name = str(content["model_type"])
    if "auto_map" in content:
        raise CheckpointError(
            "This repository brings its own code, which is never run",
            expected="an architecture of transformers itself",
            received=f"auto_map: {content['auto_map']}"[:200],
            remedy="use a repository whose model_type transformers knows without trust_remote_code",
        )
    if "quantization_config" in content:
        raise CheckpointError(
            "This model is quantised",
            expected="dense weights",
            received=str(content["quantization_config"])[:200],
            remedy="use the repository it was made of",
        )
    library()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    fitting = KNOWN.get(name, ())
    names = [fitting] if isinstance(fitting, str) else list(fitting)
    stated = content.get("architectures") or []
    found = next((a for a in stated if a in names), None)
    if found is None:
        raise CheckpointError(
            "This transformers model is not an image classifier",
            expected=f"architectures: one of {names}" if names else "a model type with an image classifier",
            received=f"model_type {name!r}, architectures {stated}",
            remedy="use a repository with a trained classification head; a bare backbone has no classes",
        )
    return str(found)


def _build(provenance: Provenance, num_classes: int, file: WeightFile) -> nn.Module:
    transformers = library()
    config = dict(provenance.kwargs.get("config") or {})
    name, shape = provenance.architecture, tuple(provenance.kwargs.get("input") or ())
    if name != _architecture({**config, "architectures": [name]}):
        raise CheckpointError(
            "Another class than was pinned", expected=name, received=str(config.get("model_type")), remedy="wrap it anew"
        )
    tensors = dict(file.states[""])
    for key, tensor in tensors.items():
        check_tensor(key, tensor, provenance.filename)
    kind = config.pop("model_type")
    try:
        made = transformers.AutoConfig.for_model(kind, **config, num_labels=num_classes)
        with quiet():
            model, told = getattr(transformers, name).from_pretrained(
                None, config=made, state_dict=tensors, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # a constructor that gets what it was not made for may raise anything
        raise CheckpointError(
            f"transformers cannot load this {name}",
            expected="weights and a configuration that fit",
            received=f"{type(error).__name__}: {str(error).strip()}"[:400],
            remedy="upgrade transformers, or use another repository",
        ) from error
    wrong = {key: sorted(map(str, told[key])) for key in ("missing_keys", "mismatched_keys", "error_msgs") if told.get(key)}
    if wrong:
        raise CheckpointError(
            f"{provenance.filename} does not fit {name}",
            expected="every tensor of the network",
            received="; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:4])}" for key, names in wrong.items())[:400],
            remedy="config.json and weights belong to different models, or the classification head was never trained",
        )
    if left := sorted(map(str, told.get("unexpected_keys") or ())):
        warnings.warn(f"{provenance.filename}: left over: {', '.join(left[:6])}", stacklevel=2)
    return _split(model.eval().requires_grad_(False), shape)


def _split(model: Any, shape: tuple[int, ...]) -> nn.Module:
    """The model with its last layer apart, where that gives the same logits."""
    x = probe_batch(shape)[:2]
    try:
        with torch.inference_mode():
            whole: Tensor = model(x).logits
    except Exception as error:  # a forward pass may raise anything
        raise CheckpointError(
            "Image processor and network disagree",
            expected=f"a network that takes the processor's images, {' x '.join(map(str, shape))}",
            received=f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}",
            remedy="use a repository whose preprocessor_config.json is that of the network; or say what the network sees: "
            "--resize HxW:bicubic with --input-size of the data",
        ) from error
    head = getattr(model, "classifier", None)
    if isinstance(head, nn.Module):
        model.classifier = nn.Identity()
        made = TransformersClassifier(model, head)
        with torch.inference_mode():
            if torch.equal(made(x), whole):
                return made.eval()
        model.classifier = head
    return TransformersClassifier(model, None).eval()


def _load(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    parse = read_pinned(provenance, sources)

    def verified() -> WeightFile:
        file = parse()
        check_tensors(provenance, named_tensors_digest(file.states[""]))
        return file

    return shared(provenance, num_classes, verified, _build)


LOADERS[LOADER] = _load
IMPORTERS.append(_import)
