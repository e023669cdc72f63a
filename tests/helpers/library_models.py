"""Small random models of other libraries, written as those libraries write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

NAMES = ("cat", "dog", "bird")
KINDS = ("vit", "convnext", "dinov2", "resnet")


def transformers_folder(folder: Path, kind: str, *, side: int = 32, labels: tuple[str, ...] = NAMES, seed: int = 0) -> Path:
    """A classifier and its image processor, by `save_pretrained`."""
    import transformers as T

    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": side, **names}
    configs = {
        "vit": lambda: T.ViTConfig(intermediate_size=32, patch_size=8, **tiny),
        "dinov2": lambda: T.Dinov2Config(patch_size=8, mlp_ratio=2, **tiny),
        "convnext": lambda: T.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], **names),
        "resnet": lambda: T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **names),
    }
    processors = {
        "vit": lambda: T.ViTImageProcessor(size={"height": side, "width": side}),
        "dinov2": lambda: T.BitImageProcessor(size={"shortest_edge": side + 8}, crop_size={"height": side, "width": side}),
        "convnext": lambda: T.ConvNextImageProcessor(size={"shortest_edge": side}),
        "resnet": lambda: T.ConvNextImageProcessor(size={"shortest_edge": side}),
    }
    torch.manual_seed(seed)
    T.AutoModelForImageClassification.from_config(configs[kind]()).save_pretrained(folder)
    processors[kind]().save_pretrained(folder)
    return folder


def open_clip_folder(folder: Path, *, side: int = 16, turned: bool = False) -> Path:
    """A model of two towers, as `push_to_hf_hub` lays it out; turned: it likes least what it liked most."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    vision = {"image_size": side, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    content = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    state = open_clip.CLIP(**model).state_dict()
    if turned:
        state["visual.proj"] = -state["visual.proj"]
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    return folder
