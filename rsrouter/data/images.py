"""Images with labels, read by index: what every source of data becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.data.preprocess import described, resize_centre


class ImageData(Sequence[tuple[Tensor, int]]):
    """Images with labels, read by index.

    Args:
        read: index to an image as uint8 `(C, H, W)`, or float32 `(C, H, W)` in [0,1].
        labels: `(N,)` integers; None: unlabelled (every label is -1).
        fingerprint: sha256 of the content, or a function that computes it when first asked for.
        name: where the data comes from, for messages and metadata.
        classes: class names, if the source has them.
        ids: each image's position in its source; default 0 ... N - 1.
        length: N, where there are no labels.
    """

    def __init__(
        self,
        read: Callable[[int], NDArray[Any]],
        labels: Sequence[int] | NDArray[Any] | None,
        *,
        fingerprint: str | Callable[[], str],
        name: str,
        classes: Sequence[str] | None = None,
        ids: Sequence[int] | NDArray[Any] | None = None,
        length: int | None = None,
        size: int | None = None,
    ) -> None:
        self._read, self._fingerprint, self.name, self._size = read, fingerprint, name, size
        count = length if labels is None else len(labels)
        if not count:
            raise InputError(
                "The data set is empty",
                expected="at least one image",
                received=f"0 images in {name}",
                remedy="check the path and the split",
            )
        self.labelled = labels is not None
        values = np.full(count, -1) if labels is None else np.asarray(labels)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise InputError(
                "Labels must be class indices",
                expected="(N,) integers",
                received=f"{values.dtype} {values.shape}",
                remedy="give one integer per image",
            )
        self._labels = values.astype(np.int64)
        self.ids = np.arange(count) if ids is None else np.asarray(ids, dtype=np.int64)
        self.classes = None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:  # type: ignore[override]
        """Image `(C, H, W)` as float32 in [0,1], and its label (-1: none)."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = i % len(self)
        return self.image(i), int(self._labels[i])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[i] for i in range(len(self)))

    def image(self, i: int) -> Tensor:
        """Image i alone, `(C, H, W)` float32 in [0,1]."""
        pixels = to_unit(self._read(i), f"image {i} of {self.name}")
        if self._size is not None and tuple(pixels.shape[1:]) != (self._size, self._size):
            pixels = resize_centre(pixels, self._size)
        return pixels

    @property
    def labels(self) -> Tensor:
        """`(N,)` int64."""
        return torch.from_numpy(self._labels.copy())

    def batch(self, rows: Iterable[int] | slice) -> tuple[Tensor, Tensor]:
        """`(B, C, H, W)` images and `(B,)` labels of some rows.

        Raises:
            InputError: images of different sizes.
        """
        chosen = list(range(*rows.indices(len(self)))) if isinstance(rows, slice) else [int(r) for r in rows]
        images = [self.image(i) for i in chosen]
        if len(shapes := {tuple(image.shape) for image in images}) > 1:
            raise InputError(
                f"The images of {self.name} differ in size",
                expected="one size (C, H, W)",
                received=str(sorted(shapes)[:4]),
                remedy="give size= to resize the short side and crop the centre",
            )
        labels = torch.from_numpy(self._labels[chosen].copy())
        return (torch.stack(images) if images else torch.empty(0, *self.image(0).shape)), labels

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images and labels in memory; meant for small data sets and subsets."""
        return self.batch(slice(None))

    def subset(self, rows: Iterable[int] | slice) -> ImageData:
        """The data of some rows, with their positions in the source kept in `ids`."""
        chosen = list(range(*rows.indices(len(self)))) if isinstance(rows, slice) else [int(r) for r in rows]
        if bad := [r for r in chosen if not 0 <= r < len(self)]:
            raise InputError(
                "Rows outside the data", expected=f"0 to {len(self) - 1}", received=str(bad[:4]), remedy="check the range"
            )
        where = hashlib.sha256(np.asarray(chosen, dtype=np.int64).tobytes()).hexdigest()
        return ImageData(
            lambda i: self._read(chosen[i]),
            self._labels[chosen] if self.labelled else None,
            fingerprint=lambda: hashlib.sha256(f"{self.fingerprint} rows {where}".encode()).hexdigest(),
            name=self.name,
            classes=self.classes,
            ids=self.ids[chosen],
            length=len(chosen),
            size=self._size,
        )

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """What is done to every image between decoding and [0,1], for metadata; None: nothing."""
        return None if self._size is None else described(self._size)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the data is: the files, or the arrays, and how they are read."""
        digest = self._fingerprint() if callable(self._fingerprint) else self._fingerprint
        return digest if self._size is None else hashlib.sha256(f"{digest} size {self._size}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"ImageData({self.name!r}, {len(self)} images)"


def to_unit(pixels: NDArray[Any], who: str) -> Tensor:
    """A `(C, H, W)` array of uint8, or of floats in [0,1], as float32 in [0,1]; InputError for anything else."""
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise InputError(
            f"{who} has the wrong shape",
            expected="(C, H, W) with 1 or 3 channels",
            received=str(pixels.shape),
            remedy="move the channels first",
        )
    if pixels.dtype == np.uint8:
        return torch.from_numpy(np.array(pixels)).to(torch.float32).div_(255)
    if pixels.dtype.kind != "f":
        raise InputError(
            f"{who} has the wrong dtype",
            expected="uint8, or floats in [0,1]",
            received=str(pixels.dtype),
            remedy="convert with .astype('uint8') if the values are 0 to 255",
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0.0 and high <= 1.0):
        missing = bool(np.isnan(pixels).any())
        remedy = "divide by 255" if 1.0 < high <= 255 and low >= 0 else "give raw pixels; each expert normalises them itself"
        raise InputError(
            f"{who} has pixels that are {'not numbers' if missing else 'outside [0,1]'}",
            expected="floats in [0,1], or uint8",
            received=f"[{low:g}, {high:g}]",
            remedy="repair the file, or leave the image out" if missing else remedy,
        )
    return torch.from_numpy(np.array(pixels, dtype=np.float32))


def from_arrays(
    images: object, labels: Any = None, *, name: str = "arrays", ids: Sequence[int] | NDArray[Any] | None = None
) -> ImageData:
    """Images `(N, C, H, W)` or `(N, H, W)` or `(N, H, W, C)`, uint8 or floats in [0,1], and `(N,)` integer labels or None.

    Raises:
        InputError: another dtype or shape, values outside the range, NaN, or counts that differ.
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or len(array) == 0:
        raise InputError(
            f"Images of {name} have the wrong shape",
            expected="(N, C, H, W), N at least 1",
            received=str(array.shape),
            remedy="stack the images; one image needs a batch dimension too",
        )
    for i in range(1 if array.dtype == np.uint8 else len(array)):
        to_unit(array[i], f"image {i} of {name}")
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    if given is not None and np.shape(given) != (len(array),):
        raise InputError(
            "Images and labels differ in number",
            expected=f"{len(array)} labels",
            received=f"shape {np.shape(given)}",
            remedy="give one label per image",
        )

    def fingerprint() -> str:
        digest = hashlib.sha256(repr((str(array.dtype), array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"unlabelled" if given is None else np.asarray(given).astype(np.int64).tobytes())
        return digest.hexdigest()

    return ImageData(
        lambda i: array[i],
        None if given is None else np.asarray(given),
        fingerprint=fingerprint,
        name=name,
        ids=ids,
        length=len(array),
    )
