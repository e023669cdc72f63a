"""A checkpoint as a folder that can be put on the Hub: safetensors, config.json and a card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.experts.config import CONFIG, SCHEMA_VERSION
from rsrouter.experts.expert import Expert
from rsrouter.experts.loaders import load_expert
from rsrouter.experts.places import WEIGHTS
from rsrouter.experts.registry import find_architecture
from rsrouter.files import sync_folder

_CARD = """# {title}

{about}

| | |
|---|---|
| architecture | `{architecture}` |
| {kind} |
| classes | {num_classes} |
| input | {shape} |
| normalisation | {normalisation} |
| licence | {licence} |
| converted from | {origin} |

```python
{use}
```

The weights were converted without change from the file named above. Whoever publishes them states under which licence, and
who trained them.
"""


_SMOOTHED = """A base classifier for randomized smoothing (Cohen et al. 2019, arXiv 1902.02918), for Gaussian noise of standard
deviation **{sigma:g}** on pixels in [0,1]. It is meant to be smoothed: its own predictions on clean images carry no guarantee."""
_SILENT = (
    """A classifier with a known L2 Lipschitz constant on pixels in [0,1]: one forward pass without noise certifies its answer."""
)
_CORE = """A classifier without a certificate: the core of a router, which answers where nothing is certified (ACES, Horvath et
al. 2022, arXiv 2204.00487). Its predictions carry no guarantee."""
_USE = """from rsrouter import Smooth, load_expert

smoothed = Smooth(load_expert("hf-hub:ORG/NAME"))"""
_USE_CORE = """from rsrouter import ExpertPool, load_expert

pool = ExpertPool([*experts, load_expert("hf-hub:ORG/NAME")])"""


def save_expert(expert: Expert, folder: str | os.PathLike[str], *, origin: dict[str, Any] | None = None) -> Path:
    """Writes an expert as `model.safetensors`, `config.json` and `README.md`; read back and compared before it returns.

    Args:
        expert: of one network whose architecture is registered, or of timm.
        folder: new or empty.
        origin: what it was converted from (`filename`, `sha256`), for config and card.

    Raises:
        InputError: the folder holds something already.
        CheckpointError: a composite expert, or an architecture that cannot be named.
    """
    made = find_architecture(expert.module)
    if made is None or (expert.provenance is not None and expert.provenance.source == "composite"):
        raise CheckpointError(
            f"Expert {expert.name!r} cannot be written as one checkpoint",
            expected="one network of a named architecture",
            received=type(expert.module).__name__,
            remedy="convert its parts; or register_architecture(name, YourModule), and make the module with "
            "build_architecture(name, ...)",
        )
    target = Path(os.path.abspath(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            "The output folder is not empty",
            expected="a new or empty folder",
            received=str(target),
            remedy="choose another --out; nothing is overwritten",
        )
    architecture, kwargs = made
    kwargs.pop("num_classes", None)
    config: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "library_name": "rsrouter",
        "architecture": architecture,
        "kwargs": kwargs,
        "sigma": expert.sigma,
        "num_classes": expert.num_classes,
        "input_shape": list(expert.input_shape),
        "mean": None if expert.mean is None else list(expert.mean),
        "std": None if expert.std is None else list(expert.std),
        "labels": None if expert.labels is None else list(expert.labels),
        "licence": expert.provenance.licence if expert.provenance else None,
    }
    if expert.resize is not None:
        config["resize"] = expert.resize.model_dump(mode="json")
    if expert.order is not None:
        config["order"] = list(expert.order)
    if expert.core:
        config["core"] = True
    if expert.lipschitz is not None:
        config |= {"lipschitz": expert.lipschitz.constants, "rounding": expert.lipschitz.rounding}
    if origin:
        config["converted_from"] = origin
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")  # renamed whole, or nothing; what a killed run left is made anew
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in expert.module.state_dict().items()},
            part / WEIGHTS,
            metadata={"format": "pt"},
        )
        (part / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card(expert, config), encoding="utf-8")
        written = load_expert(part, name=expert.name)
        if written.digest != expert.digest:
            raise IntegrityError(
                "The written expert is not the one that was read",
                expected=f"digest {expert.digest}",
                received=f"digest {written.digest}",
                remedy="please report this; nothing was written",
            )
        for file in part.iterdir():
            with file.open("rb") as stored:
                os.fsync(stored.fileno())
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_folder(target.parent)
    return target


def card(expert: Expert, config: dict[str, Any]) -> str:
    """The README of a converted expert. The licence is the user's statement; none is filled in."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=config["licence"],
        library_name="rsrouter",
        pipeline_tag="image-classification",
        tags=["randomized-smoothing", "certified-robustness", "adversarial-robustness"],
    )
    normalisation = "inside the network, or none"
    if expert.mean is not None and expert.std is not None:
        normalisation = f"mean {list(expert.mean)}, std {list(expert.std)}"
    origin = config.get("converted_from") or {}
    where = f"`{origin['filename']}`, sha256 `{origin['sha256']}`" if origin else "a module in memory"
    noise = "core" if expert.core else "without noise" if expert.lipschitz is not None else f"sigma {expert.sigma:g}"
    about = _CORE if expert.core else _SILENT if expert.lipschitz is not None else _SMOOTHED.format(sigma=expert.sigma)
    text = _CARD.format(
        title=f"{config['architecture']}, {noise}",
        about=about,
        kind=noise.replace(" ", " | ", 1) if noise.startswith("sigma") else f"use | {noise}",
        use=_USE_CORE if expert.core else _USE,
        architecture=config["architecture"],
        num_classes=expert.num_classes,
        shape=" x ".join(map(str, expert.input_shape)),
        normalisation=normalisation,
        licence=config["licence"] or "not stated",
        origin=where,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def convert(source: str | os.PathLike[str], folder: str | os.PathLike[str], **settings: Any) -> Path:
    """A legacy checkpoint (or any other source of `load_expert`) as a Hub-ready folder.

    Args:
        source: `.pth.tar`, `.pt`, a safetensors file, a folder, or `hf-hub:org/name@revision`.
        folder: new or empty.
        **settings: as in `load_expert`; what the file does not carry must be given.

    Returns:
        The folder.

    Raises:
        CheckpointError, InputError, HubError, IntegrityError: as `load_expert` and `save_expert`.
    """
    expert = load_expert(source, **settings)
    assert expert.provenance is not None
    return save_expert(expert, folder, origin={"filename": expert.provenance.filename, "sha256": expert.provenance.sha256})
