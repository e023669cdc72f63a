"""Checks of images, labels and ids at the public boundary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rsrouter.core.errors import InputError


def check_images(images: object, shape: tuple[int, ...]) -> Tensor:
    """The images as a float32 tensor `(N, C, H, W)`, or InputError: shape, dtype, NaN or Inf, pixels outside [0,1]."""
    wanted = f"a float tensor (N, {', '.join(map(str, shape))}) in [0,1]"
    if not isinstance(images, Tensor):
        raise InputError(
            "Images must be a tensor", expected=wanted, received=type(images).__name__, remedy="torch.from_numpy(array)"
        )
    if not images.is_floating_point():
        raise InputError("Images must hold floats", expected=wanted, received=str(images.dtype), remedy="images.float() / 255")
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape):
        size = " x ".join(map(str, shape[1:]))
        remedies = {
            3: "one image needs a batch dimension too: image[None]; channels come first",
            4: f"resize or crop the images to {size} (`--size` does, to a square), or use experts of this size; channels first",
        }
        raise InputError(
            "Images have the wrong shape",
            expected=wanted,
            received=str(tuple(images.shape)),
            remedy=remedies.get(images.ndim, "stack the images into one tensor; channels come first"),
        )
    if images.numel():
        low, high = (float(v) for v in torch.aminmax(images.detach()))
        if not (low >= 0.0 and high <= 1.0):
            what = "NaN or Inf pixels" if not torch.isfinite(images).all() else f"pixels in [{low:g}, {high:g}]"
            raise InputError(
                "Pixels must be finite and lie in [0,1]",
                expected=wanted,
                received=what,
                remedy="divide 8-bit pixels by 255, and do not normalise: each expert does that itself",
            )
    return images.detach().to(torch.float32)


def check_labels(labels: object, count: int, num_classes: int) -> Tensor:
    """Class indices as an int64 tensor `(N,)`, or InputError."""
    tensor = torch.as_tensor(labels)
    wanted = f"{count} integers in [0, {num_classes - 1}]"
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tuple(tensor.shape) != (count,):
        raise InputError(
            "Labels do not fit the images",
            expected=wanted,
            received=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            remedy="one class index per image",
        )
    tensor = tensor.to(torch.int64)
    if count and not (int(tensor.min()) >= 0 and int(tensor.max()) < num_classes):
        raise InputError(
            "Labels are out of range",
            expected=wanted,
            received=f"[{int(tensor.min())}, {int(tensor.max())}]",
            remedy="check num_classes and the data set's label order",
        )
    return tensor


def check_ids(ids: Sequence[object] | None, count: int) -> list[object]:
    """One id per image (None where the content alone names it), or InputError."""
    if ids is None:
        return [None] * count
    listed = list(ids) if isinstance(ids, Iterable) else None
    if listed is None or len(listed) != count:
        raise InputError(
            "There must be one id per image",
            expected=f"{count} ids",
            received=repr(ids) if listed is None else f"{len(listed)}",
            remedy="pass the images' indices in their data set",
        )
    return [int(i) if hasattr(i, "__index__") else i for i in listed]


def check_seed(seed: object) -> int:
    """A seed as an int, or InputError."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise InputError("A seed must be a whole number", expected="an integer", received=repr(seed), remedy="leave it out")
    return int(seed)
