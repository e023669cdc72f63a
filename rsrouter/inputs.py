"""Checks of images, labels, ids and seeds at the public boundary."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsrouter.core.errors import InputError

#: Float pixels that leave [0,1] by no more are rounding errors, and are clipped with a warning.
ROUNDING = 1e-6


def printable(text: object) -> str:
    r"""Text of others as it may be printed: control characters, and bytes of a file name that are no UTF-8, are escaped.

    >>> printable("cat\x1b[31m\udcff")
    'cat\\x1b[31m\\udcff'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def pixel_advice(low: float, high: float) -> str:
    """What to do about float pixels in `[low, high]` that are not in [0,1].

    >>> pixel_advice(0.0, 255.0), pixel_advice(-0.01, 1.02)
    ('divide by 255', 'clip them to [0,1]: resizing overshoots by as much')
    """
    if not (low > float("-inf") and high < float("inf")):  # NaN as well
        return "repair the file, or leave the image out"
    if low >= -0.05 and high <= 1.1:
        return "clip them to [0,1]: resizing overshoots by as much"
    if low >= 0 and 16 <= high <= 255:
        return "divide by 255"
    if low >= 0 and 255 < high <= 65535:
        return "divide by 65535 if these are 16-bit values"
    if low >= 0:
        return "bring them to [0,1]: divide by the value of white"
    return "give raw pixels in [0,1], not normalised ones: each expert normalises them itself"


def clip_rounding(low: float, high: float, who: str) -> bool:
    """Whether pixels in `[low, high]` leave [0,1] by a rounding error only, which is said in a warning."""
    if (low >= 0.0 and high <= 1.0) or not (low >= -ROUNDING and high <= 1.0 + ROUNDING):
        return False
    warnings.warn(f"{who}: pixels leave [0,1] by a rounding error (at most {ROUNDING:g}) and are clipped", stacklevel=3)
    return True


def check_images(images: object, shape: tuple[int, ...]) -> Tensor:
    """The images as a float32 tensor, with pixels that leave [0,1] by a rounding error clipped.

    Args:
        images: float tensor `(N, C, H, W)` in [0,1].
        shape: `(C, H, W)` that the experts take.

    Raises:
        InputError: no tensor, another shape or dtype, NaN or Inf, pixels outside [0,1].

    >>> check_images(torch.zeros(2, 3, 8, 8), (3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """
    wanted = f"a float tensor (N, {', '.join(map(str, shape))}) in [0,1]"
    if not isinstance(images, Tensor):
        raise InputError(
            "Images must be a tensor",
            expected=wanted,
            received=type(images).__name__,
            remedy="rsrouter.load_data(images).tensors()[0] takes arrays, pictures and data sets",
        )
    if not images.is_floating_point():
        eight_bit = images.dtype == torch.uint8
        remedy = "images.float() / 255" if eight_bit else "give floats in [0,1]; 8-bit values are divided by 255"
        raise InputError("Images must hold floats", expected=wanted, received=str(images.dtype), remedy=remedy)
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
    images = images.detach()
    if images.numel():
        low, high = (float(v) for v in torch.aminmax(images))
        if low >= 0.0 and high <= 1.0:
            return images.to(torch.float32)
        if clip_rounding(low, high, "images"):
            images = images.clamp(0, 1)
        else:
            what = "NaN or Inf pixels" if not torch.isfinite(images).all() else f"pixels in [{low:.9g}, {high:.9g}]"
            raise InputError(
                "Pixels must be finite and lie in [0,1]", expected=wanted, received=what, remedy=pixel_advice(low, high)
            )
    return images.to(torch.float32)


def check_labels(labels: object, count: int, num_classes: int) -> Tensor:
    """Class indices as an int64 tensor `(count,)`.

    Raises:
        InputError: another number of labels, no whole numbers, or a label outside 0 ... `num_classes` - 1.

    >>> check_labels([0, 2], 2, 3).tolist()
    [0, 2]
    """
    wanted = f"{count} integers in [0, {num_classes - 1}]"
    try:
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            "Labels must be class indices", expected=wanted, received=type(labels).__name__, remedy="one class index per image"
        ) from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tuple(tensor.shape) != (count,):
        raise InputError(
            "Labels do not fit the images",
            expected=wanted,
            received=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            remedy="one class index per image",
        )
    tensor = tensor.to(torch.int64)
    check_label_range(tensor.tolist(), num_classes, unknown=False)
    return tensor


def check_label_range(
    labels: Iterable[Any], num_classes: int, *, ids: Sequence[int] | None = None, unknown: bool = True, name: str = ""
) -> None:
    """Refuses labels that the experts do not know, which would count as wrong answers without a word.

    Args:
        labels: whole numbers.
        num_classes: C of the experts.
        ids: of the images, for the message; default their positions.
        unknown: whether -1 may stand for an image without a label.
        name: of the data set, for the message.

    Raises:
        InputError: a label outside 0 ... C - 1; the first one and how many are named.

    >>> check_label_range([0, -1, 9], 10)
    >>> check_label_range([0, 10], 10)
    Traceback (most recent call last):
    ...
    rsrouter.core.errors.InputError: Labels are out of range. ...
    """
    least = -1 if unknown else 0
    listed = [int(v) for v in labels]
    if not (bad := [i for i, v in enumerate(listed) if not least <= v < num_classes]):
        return
    first = bad[0] if ids is None else int(ids[bad[0]])
    of = f" of {printable(name)}" if name else ""
    hint = "are they counted from 1?" if min(listed) >= 1 and max(listed) == num_classes else "check the label column"
    raise InputError(
        f"Labels{of} are out of range",
        expected=f"classes from 0 to {num_classes - 1}, as the experts have {num_classes}" + (", or -1 if unknown" * unknown),
        received=f"{listed[bad[0]]} at image {first}; {len(bad)} of {len(listed)} labels in all",
        remedy=f"{hint} (--label), or give the classes in the experts' order (--classes)",
    )


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


def check_count(name: str, value: object, remedy: str = "leave it out") -> int:
    """A whole number of at least 1, or InputError.

    >>> check_count("threads", 2)
    2
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise InputError(f"{name} must be a whole number", expected=f"{name} >= 1", received=repr(value), remedy=remedy)
    return int(value)
