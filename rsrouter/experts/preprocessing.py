"""The layers around a classifier inside an expert: resizing and normalisation before it, the order of its classes after it.

All of it is part of the certified function, so that a radius is a distance between images of the data's own size, whatever the
size at which the network looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import CheckpointError
from rsrouter.stored import Stored

Side = Annotated[int, Field(ge=1, le=100_000)]


class Resize(Stored):
    """How an image of the data becomes one of the network's size: it is resized, and its centre is kept.

    Attributes:
        size: `(height, width)` after resizing.
        crop: `(height, width)` of the centre that is kept; None: all.
        interpolation: between pixels.
        antialias: as Pillow and torchvision resize; no matter where the image grows.

    >>> Resize.model_validate({"size": (256, 256), "crop": (224, 224)}).output
    (224, 224)
    """

    size: tuple[Side, Side]
    crop: tuple[Side, Side] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    antialias: bool = True

    @model_validator(mode="after")
    def _crop_inside(self) -> Resize:
        if self.crop is not None and (self.crop[0] > self.size[0] or self.crop[1] > self.size[1]):
            raise ValueError("a crop that is larger than the resized image")
        return self

    @property
    def output(self) -> tuple[int, int]:
        """`(height, width)` that the network sees."""
        return self.crop or self.size


def short_edge(shape: Sequence[int], side: int) -> tuple[int, int]:
    """`(height, width)` of an image whose short edge becomes `side`; the long one is cut off to a whole number.

    >>> short_edge((3, 32, 48), 64)
    (64, 96)
    """
    height, width = shape[-2:]
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def timm_resize(seen: tuple[int, int], data: tuple[int, int], told: Mapping[str, Any]) -> Resize:
    """What timm's transform for evaluation does to images of the size `data` for a network of the size `seen`.

    Args:
        told: `interpolation`, `crop_pct` and `crop_mode`, as in timm's data config.

    Raises:
        CheckpointError: a mode without a counterpart here.

    >>> timm_resize((224, 224), (32, 48), {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}).size
    (256, 384)
    """
    mode = told.get("crop_mode") or "center"
    interpolation: Any = told.get("interpolation") or "bilinear"
    share = told.get("crop_pct") or 0.875
    if mode not in ("center", "squash") or interpolation not in ("nearest", "bilinear", "bicubic"):
        raise CheckpointError(
            "The network's own resizing has no counterpart here",
            expected="crop_mode center or squash, interpolation nearest, bilinear or bicubic",
            received=f"crop_mode {mode}, interpolation {interpolation}",
            remedy=f"say what is to be done: --resize {seen[0]}x{seen[1]}:bicubic",
        )
    size = (math.floor(seen[0] / share), math.floor(seen[1] / share))
    if mode == "center" and size[0] == size[1]:
        size = short_edge(data, size[0])
    elif mode == "center":  # the image covers the size, and keeps its proportions
        ratio = min(data[0] / size[0], data[1] / size[1])
        size = (round(data[0] / ratio), round(data[1] / ratio))
    return Resize(size=size, crop=None if size == seen else seen, interpolation=interpolation)


class Resized(nn.Module):
    """`Resize` as a layer: images `(B, C, H, W)` to `(B, C, h, w)`, each by itself; values are not clamped.

    >>> Resized(Resize(size=(4, 4), crop=(2, 2)))(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 3, 2, 2])
    """

    def __init__(self, resize: Resize) -> None:
        super().__init__()
        self.size, self.crop = tuple(resize.size), None if resize.crop is None else tuple(resize.crop)
        self.interpolation = resize.interpolation
        self.antialias = resize.antialias and resize.interpolation != "nearest"

    def extra_repr(self) -> str:
        return f"size={self.size}, crop={self.crop}, interpolation={self.interpolation}, antialias={self.antialias}"

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.size:
            corners = None if self.interpolation == "nearest" else False
            x = F.interpolate(x, self.size, mode=self.interpolation, align_corners=corners, antialias=self.antialias)
        if self.crop is None:
            return x
        height, width = self.crop
        top, left = (round((full - kept) / 2.0) for full, kept in zip(self.size, self.crop, strict=True))
        return x[..., top : top + height, left : left + width]


class Normalise(nn.Module):
    """`(x - mean) / std` per channel, the usual first layer of a classifier on [0,1] pixels.

    >>> Normalise([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Reordered(nn.Module):
    """Logits `(B, K)` in another order of the classes.

    >>> Reordered([1, 0])(torch.tensor([[3.0, 4.0]]))
    tensor([[4., 3.]])
    """

    order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order, dtype=torch.long), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return logits.index_select(1, self.order)


def has_trunk(module: nn.Module) -> bool:
    """Whether features can be taken: timm's `forward_features`, `forward_head(pre_logits=)`, `get_classifier`. A module
    around others says in `has_features` whether those have them."""
    named = all(callable(getattr(module, name, None)) for name in ("forward_features", "forward_head", "get_classifier"))
    return named and bool(getattr(module, "has_features", True))


class Preprocessed(nn.Sequential):
    """A classifier with what stands around it; features are the classifier's own.

    Args:
        before: layers from pixels to what the classifier takes.
        module: the classifier.
        order: of its logits; None: as they are.
    """

    def __init__(self, before: Sequence[nn.Module], module: nn.Module, order: Sequence[int] | None = None) -> None:
        super().__init__(*before, module, *([] if order is None else [Reordered(order)]))
        self.at = len(before)

    @property
    def has_features(self) -> bool:
        """Whether the classifier exposes features."""
        return has_trunk(self.inner)

    @property
    def inner(self) -> Any:
        """The classifier."""
        return list(self)[self.at]

    def forward_features(self, x: Tensor) -> Tensor:
        """The classifier's features of pixels."""
        for layer in list(self)[: self.at]:
            x = layer(x)
        features: Tensor = self.inner.forward_features(x)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or with `pre_logits` what the last layer reads."""
        pooled: Tensor = self.inner.forward_head(features, pre_logits=True)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def get_classifier(self) -> nn.Module:
        """The last layer, and the order of its classes."""
        head: nn.Module = self.inner.get_classifier()
        after = list(self)[self.at + 1 :]
        return nn.Sequential(head, *after) if after else head


def around(
    module: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    resize: Resize | None = None,
    order: Sequence[int] | None = None,
) -> nn.Module:
    """Pixels in [0,1] to logits: the module with resizing and normalisation before it and the order of classes after it."""
    before: list[nn.Module] = [] if resize is None else [Resized(resize)]
    if mean is not None and std is not None:
        before.append(Normalise(mean, std))
    return Preprocessed(before, module, order) if before or order is not None else module


class ClassifierFeatures:
    """Features of a network that shows its classifier something else than what it is given: those of the classifier.

    Whoever inherits has a `classifier`, and `shown(x)`, what the classifier sees.
    """

    classifier: Any
    shown: Callable[[Tensor], Tensor]

    @property
    def has_features(self) -> bool:
        """Whether the classifier exposes features."""
        return has_trunk(self.classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """The classifier's features of what it is shown."""
        features: Tensor = self.classifier.forward_features(self.shown(x))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """As the classifier's."""
        out: Tensor = self.classifier.forward_head(features, pre_logits=pre_logits)
        return out

    def get_classifier(self) -> nn.Module:
        """The classifier's last layer."""
        head: nn.Module = self.classifier.get_classifier()
        return head
