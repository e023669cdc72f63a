"""The hardest and easiest images, as PNG data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rsrouter.core.errors import InputError
from rsrouter.results import Table, format_radius

#: Longer side of a thumbnail in pixels; smaller images stay as they are.
SIDE = 96


@dataclass(frozen=True)
class Thumbnail:
    """One image of the gallery."""

    uri: str
    idx: int
    caption: str
    expert: str
    said: str
    alt: str


def by_id(images: Any, table: Table) -> Mapping[int, Any]:
    """Images by id, none of them read yet.

    Args:
        images: a mapping from image id to `(C, H, W)` (it may read lazily), or `(N, C, H, W)` with one image per row of
            `table`, in its order; floats in [0,1] or bytes, arrays or tensors, C of 1 or 3.
        table: the results they belong to, in the order the caller knows.

    Raises:
        InputError: a sequence of another length.
    """
    if isinstance(images, Mapping):
        return images
    if len(images) != len(table):
        raise InputError(
            "The images do not belong to the table",
            expected=f"{len(table)} images, one per row, or a mapping from image id",
            received=f"{len(images)} images",
            remedy="pass the images that were certified, in that order",
        )
    return {int(i): images[position] for position, i in enumerate(table.idx)}


def _bytes(image: ArrayLike) -> NDArray[np.uint8]:
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise InputError(
            "An image has the wrong shape",
            expected="(C, H, W) with C of 1 or 3",
            received=str(array.shape),
            remedy="pass the images as they were certified",
        )
    if array.dtype != np.uint8:
        if not np.all((array >= 0) & (array <= 1)):
            raise InputError(
                "An image has pixels outside [0, 1]",
                expected="floats in [0, 1], or bytes",
                received=f"{array.min():g} to {array.max():g}",
                remedy="pass the images as they were certified",
            )
        array = np.round(array.astype(np.float64) * 255).astype(np.uint8)
    return np.ascontiguousarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


def data_uri(array: NDArray[np.uint8]) -> str:
    """A PNG of `(H, W)` or `(H, W, 3)` bytes as a data URI."""
    picture = Image.fromarray(array)
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery(
    table: Table,
    images: Mapping[int, Any],
    classes: Sequence[str] | None = None,
    who: Sequence[str] | None = None,
    most: int = 8,
) -> dict[str, list[Thumbnail]]:
    """Images with the largest and smallest radius that are right, with the largest that are wrong, and abstained ones.

    `who` says in words which expert or stage named each row's class; by default its expert.
    """
    who = table.expert.tolist() if who is None else who
    rows = np.array([i for i, idx in enumerate(table.idx) if int(idx) in images], dtype=np.int64)
    by_radius = rows[np.argsort(-table.radius[rows], kind="stable")]
    held = by_radius[~table.abstained[by_radius]]
    right, wrong = held[table.correct[held] != 0], held[table.correct[held] == 0]
    half = min(most, len(right) // 2)
    groups = {
        "easiest": right[: half or most],
        "hardest": right[::-1][:half] if half else right[:0],
        "wrong": wrong[:most],
        "abstained": by_radius[table.abstained[by_radius]][:most],
    }
    return {
        name: [_thumbnail(table, int(i), images, classes, who[int(i)]) for i in chosen]
        for name, chosen in groups.items()
        if len(chosen)
    }


def _thumbnail(table: Table, i: int, images: Mapping[int, Any], classes: Sequence[str] | None, who: str) -> Thumbnail:
    def word(c: int) -> str:
        return classes[c] if classes is not None and 0 <= c < len(classes) else f"class {c}"

    idx, label, predict = int(table.idx[i]), int(table.label[i]), int(table.predict[i])
    caption = "no class" if predict < 0 else f"r = {format_radius(table.radius[i])[:-6]}"  # cut, not rounded up
    said = word(label) if label >= 0 else ""
    if predict >= 0 and label != predict:
        said = f"{word(predict)}, is {word(label)}" if label >= 0 else word(predict)
    expert = who if predict >= 0 else ""
    alt = ", ".join(text for text in (f"image {idx}: {said or 'unlabelled'}", caption, expert) if text)
    return Thumbnail(data_uri(_bytes(images[idx])), idx, caption, expert, said, alt)
