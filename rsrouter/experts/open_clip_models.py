"""Zero-shot classifiers of open_clip: a pinned image tower, and the text features of given class names as its last layer.

The text side runs once, when the expert is wrapped: each class is the mean of its prompts' features (Radford et al. 2021, arXiv
2103.00020), times the model's logit scale. These features become a weight file of their own beside the pool, pinned like any
other, so that nothing of the text side is needed again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.checkpoints import WeightFile
from rsrouter.experts.composite import composite, networks
from rsrouter.experts.config import checked
from rsrouter.experts.expert import Expert
from rsrouter.experts.loaders import (
    IMPORTERS,
    LOADERS,
    Sources,
    check_tensors,
    fitted,
    make_expert,
    merge,
    read_pinned,
    shared,
    weights_of,
)
from rsrouter.experts.places import Place
from rsrouter.experts.preprocessing import Resize, short_edge
from rsrouter.experts.provenance import Channels, Part, Provenance
from rsrouter.experts.registry import register_architecture
from rsrouter.experts.tensors import tensors_digest
from rsrouter.files import sha256_of
from rsrouter.process import fixed_kernels
from rsrouter.stored import Stored, read_json, validated

#: the package that builds image towers, and so the name of their loader
LOADER = "open_clip_torch"
CONFIG = "open_clip_config.json"
SAFE_NAMES = ("open_clip_model.safetensors", "model.safetensors", "model.safetensors.index.json")
TEMPLATES = ("a photo of a {}.",)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # what open_clip takes by default
_REMEDY = "fetch the repository again"


class ZeroShot(nn.Module):
    """An image tower and text features: pixels to logits. Features are the tower's, at length 1.

    Args:
        tower: images to `(B, F)`.
        head: `(B, F)` to logits, the scaled text features as its weight.
    """

    def __init__(self, tower: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    def forward_features(self, x: Tensor) -> Tensor:
        """Image features at length 1, `(B, F)`."""
        features = self.tower(x)
        return F.normalize(features[0] if isinstance(features, tuple) else features, dim=-1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or with `pre_logits` the features as they are."""
        logits: Tensor = features if pre_logits else self.head(features)
        return logits

    def get_classifier(self) -> nn.Module:
        """The text features as a layer."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class _Preprocess(Stored):
    size: int | tuple[int, int] | None = None
    mean: Channels = _MEAN
    std: Channels = _STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"


class _Config(Stored):
    """`open_clip_config.json`."""

    model_cfg: dict[str, Any]
    preprocess_cfg: Annotated[_Preprocess, Field(default_factory=_Preprocess)]


def library() -> Any:
    """open_clip, or CheckpointError with the pip command."""
    try:
        import open_clip
    except ImportError as error:
        raise CheckpointError(
            "This model needs open_clip",
            expected="open_clip_torch",
            received=str(error),
            remedy='pip install "rsrouter[open-clip]"',
        ) from error
    return open_clip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about a model that is made before its weights are placed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _import(place: Place, config: Path | None, filename: str | None, overrides: Mapping[str, Any]) -> Expert | None:
    if overrides.get("architecture") is not None:
        return None
    if config is not None:  # repositories of open_clip may hold the same model for transformers
        content = read_json(config, config.name, error=CheckpointError, remedy=_REMEDY)
        if not isinstance(content, dict) or content.get("model_type") not in ("clip", "siglip"):
            return None
    own = place.find(CONFIG)
    if own is None:
        return None
    content = read_json(own, CONFIG, error=CheckpointError, remedy=_REMEDY)
    if isinstance(content, dict) and isinstance(content.get("preprocess_cfg"), dict):
        known = {k: v for k, v in content["preprocess_cfg"].items() if k in _Preprocess.model_fields}
        content = {"model_cfg": content.get("model_cfg"), "preprocess_cfg": known}
    read = validated(_Config, content, CONFIG, error=CheckpointError, remedy=_REMEDY)
    names = overrides.get("labels")
    if not isinstance(names, list | tuple) or len(names) < 2:
        raise InputError(
            "A zero-shot classifier needs the names of its classes",
            expected="at least two names, in the order of the data's labels",
            received=repr(names),
            remedy="--class-names cat,dog (or a file with a name a line), and --template 'a photo of a {}.'",
        )
    library()
    where, sha256, parse = weights_of(place, filename, SAFE_NAMES)
    if not where["filename"].endswith((".safetensors", ".json")):
        raise CheckpointError(
            "Weights of open_clip are read from safetensors only",
            expected=" or ".join(SAFE_NAMES),
            received=where["filename"],
            remedy="push_to_hf_hub of open_clip writes them",
        )
    tower_args = _tower_arguments(read.model_cfg)
    seen = read.preprocess_cfg.size or tower_args["vision_cfg"].get("image_size", 224)
    seen = (seen, seen) if isinstance(seen, int) else (int(seen[0]), int(seen[1]))
    data = checked({"input_size": overrides.get("input_size")}, CONFIG)["input_size"] or seen
    settings: dict[str, Any] = {
        "architecture": "zero_shot",
        "num_classes": len(names),
        "input_shape": (3, *data),
        "mean": read.preprocess_cfg.mean,
        "std": read.preprocess_cfg.std,
    }
    if "resize" not in overrides:
        settings["resize"] = _resize(read.preprocess_cfg, seen, (int(data[0]), int(data[1])))
    file = parse()
    templates = tuple(overrides.get("templates") or TEMPLATES)
    said = {key: value for key, value in overrides.items() if key not in ("input_size", "templates")}
    settings = merge(settings, said, file, where["filename"])
    licence = settings.get("licence") or place.licence()
    origin = Provenance(**where, sha256=sha256, loader=LOADER, architecture="open_clip_image", kwargs=tower_args, licence=licence)
    tower = shared(origin, 2, lambda: file, _tower)
    origin = origin.model_copy(update={"tensors": tensors_digest(tower)})
    weight = _text_features(place, read.model_cfg, file, [str(n) for n in names], templates)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    head.weight.copy_(weight)
    data_of_head = save({"weight": weight.contiguous()}, metadata={"format": "pt"})
    beside = f"head-{tensors_digest(head)[:16]}.safetensors"
    head_origin = Provenance(
        source="local",
        location=".",
        filename=beside,
        sha256=sha256_of(data_of_head),
        tensors=tensors_digest(head),
        loader="checkpoint",
        architecture="zero_shot_head",
        kwargs={"width": weight.shape[1]},
        licence=licence,
    )
    parts = [
        Part(role=role, num_classes=count, mean=None, std=None, provenance=found)
        for role, count, found in (("tower", 2, origin), ("head", len(names), head_origin))
    ]
    whole = composite("zero_shot", {"templates": list(templates)}, parts)
    assert whole is not None
    expert = make_expert(whole, settings, module=ZeroShot(tower, head).eval())
    expert.beside = {beside: data_of_head}
    return expert


def _tower_arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the image tower, as open_clip's configuration has it; nothing that would read other files."""
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(model.get("embed_dim"), int) or not isinstance(text, dict):
        raise CheckpointError(
            f"{CONFIG} describes no model",
            expected="embed_dim, vision_cfg and text_cfg",
            received=str(sorted(model)),
            remedy=_REMEDY,
        )
    if text.get("hf_model_name"):
        raise CheckpointError(
            "The text side of this model is fetched from another repository",
            expected="a text tower of open_clip itself",
            received=f"hf_model_name {text['hf_model_name']!r}",
            remedy="use a model whose repository holds all of it",
        )
    vision = {key: value for key, value in vision.items() if key != "timm_model_pretrained"}
    return {"embed_dim": model["embed_dim"], "vision_cfg": vision, "quick_gelu": bool(model.get("quick_gelu", False))}


def _resize(told: _Preprocess, seen: tuple[int, int], data: tuple[int, int]) -> Resize | None:
    if seen == data:
        return None
    if told.resize_mode not in ("shortest", "squash") or told.interpolation not in ("bicubic", "bilinear"):
        raise CheckpointError(
            "The model's own resizing has no counterpart here",
            expected="resize_mode shortest or squash, interpolation bicubic or bilinear",
            received=f"{told.resize_mode}, {told.interpolation}",
            remedy=f"say what is to be done: --resize {seen[0]}x{seen[1]}:bicubic",
        )
    size = short_edge(data, seen[0]) if told.resize_mode == "shortest" and seen[0] == seen[1] else seen
    crop = None if size == seen else seen
    return Resize.model_validate({"size": size, "crop": crop, "interpolation": told.interpolation})


def _open_clip_image(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False) -> nn.Module:
    library()
    from open_clip.model import _build_vision_tower

    fields = {**vision_cfg, "timm_model_pretrained": False}
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    tower: nn.Module = _build_vision_tower(embed_dim, fields, quick_gelu)
    return tower


def _zero_shot_head(num_classes: int, width: int) -> nn.Module:
    return nn.Linear(width, num_classes, bias=False)


def _tower(provenance: Provenance, num_classes: int, file: WeightFile) -> nn.Module:
    tensors = file.states[""]
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    return fitted(provenance, num_classes, WeightFile({"": own or tensors}))


@torch.inference_mode()
def _text_features(
    place: Place, model: Mapping[str, Any], file: WeightFile, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """`(classes, F)` float32: the mean of each class's prompts at length 1, times the logit scale."""
    if bad := [t for t in templates if "{}" not in t]:
        raise InputError(
            "A template has no place for the class", expected="text with {}", received=bad[0], remedy="such as 'a photo of a {}.'"
        )
    open_clip = library()
    with TemporaryDirectory() as folder, _quiet():
        here = Path(folder)
        (here / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}), encoding="utf-8")
        if model["text_cfg"].get("hf_tokenizer_name"):
            for found in filter(None, map(place.find, _TOKENIZER)):
                shutil.copyfile(found, here / found.name)
        try:
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            whole = open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=False, pretrained_image=False
            )
            whole.load_state_dict(file.states[""], strict=True)
        except Exception as error:  # a constructor that gets what it was not made for may raise anything
            raise CheckpointError(
                "open_clip cannot load this model",
                expected=f"{CONFIG}, tokenizer and weights that fit",
                received=f"{type(error).__name__}: {str(error).strip()}"[:400],
                remedy="use another repository, or upgrade open_clip_torch",
            ) from error
        whole.eval()
        with fixed_kernels():
            rows = []
            for name in names:
                prompts = tokenizer([template.replace("{}", name) for template in templates])
                features = F.normalize(whole.encode_text(prompts), dim=-1).mean(0)
                rows.append(F.normalize(features, dim=-1))
            scaled: Tensor = torch.stack(rows) * whole.logit_scale.exp()
    return scaled.float().clone()


def _load_tower(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    tower = shared(provenance, num_classes, read_pinned(provenance, sources), _tower)
    check_tensors(provenance, tensors_digest(tower))
    return tower


def _load(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    tower, head = networks(provenance, sources)
    return ZeroShot(tower, head).eval()


register_architecture("open_clip_image", _open_clip_image)
register_architecture("zero_shot_head", _zero_shot_head)
LOADERS[LOADER] = _load_tower
LOADERS["zero_shot"] = _load
IMPORTERS.insert(0, _import)
