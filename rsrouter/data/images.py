"""Images with labels, read by index: what every source of data becomes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.data.columns import Reading
from rsrouter.data.pictures import UnreadableError
from rsrouter.data.preprocess import described, resize_centre
from rsrouter.inputs import clip_rounding, pixel_advice


@dataclass(frozen=True)
class Origin:
    """How a source was understood.

    Attributes:
        kind: folder, npz, parquet, ...
        config, split: which part was read; None where there are no parts.
        image, label: columns or arrays.
        passed: reason to the names of files that were passed over.
    """

    kind: str
    config: str | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None
    passed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class ImageData(Sequence[tuple[Tensor, int]]):
    """Images with labels, read by index.

    Attributes:
        name: where the data comes from, for messages and metadata.
        classes: class names by number, or None where the source has none.
        ids: `(N,)` int64, each image's position in its source.
        labelled: whether there are labels.
        origin: how the source was understood.
        unreadable: images that were found to be unreadable, with the reason.

    Args:
        read: index to an image as uint8 `(C, H, W)`, or float32 `(C, H, W)` in [0,1].
        labels: `(N,)` integers; None: unlabelled (every label is -1).
        fingerprint: sha256 of the content, or a function that computes it when first asked for.
        name, classes, ids, origin: as above; default ids 0 ... N - 1.
        length: N, where there are no labels.
        reading: `size`, `channels` and `skip_unreadable` count.
        who: names an image in errors.

    >>> data = ImageData(lambda i: np.full((1, 2, 2), 51 * i, np.uint8), [3, 7], fingerprint="0", name="grays")
    >>> data[1]
    (tensor([[[0.2000, 0.2000],
             [0.2000, 0.2000]]]), 7)
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
        reading: Reading | None = None,
        origin: Origin | None = None,
        who: Callable[[int], str] | None = None,
    ) -> None:
        self._read, self._fingerprint, self.name = read, fingerprint, name
        self.reading, self.origin = reading or Reading(), origin or Origin("arrays")
        count = length if labels is None else len(labels)
        if not count:
            raise InputError(
                "The data set is empty",
                expected="at least one image",
                received=f"0 images in {name}",
                remedy="check the path and the split",
            )
        values = np.full(count, -1) if labels is None else np.asarray(labels)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise InputError(
                "Labels must be class indices",
                expected="(N,) integers",
                received=f"{values.dtype} {values.shape}",
                remedy="give one integer per image",
            )
        self._labels = values.astype(np.int64)
        self.labelled = labels is not None and bool((self._labels != -1).any())
        self.ids = np.arange(count) if ids is None else np.asarray(ids, dtype=np.int64)
        self.classes = None if classes is None else tuple(classes)
        if self.classes is not None and self._labels.max() >= len(self.classes):
            warnings.warn(
                f"{name}: label {self._labels.max()} has no name, there are {len(self.classes)}; class names are left out",
                stacklevel=2,
            )
            self.classes = None
        self.unreadable: dict[int, str] = {}
        self._whole: ImageData | None = None
        self._who = who or (lambda i: f"image {i} of {name}")

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
        """Image i alone, `(C, H, W)` float32 in [0,1].

        Raises:
            UnreadableError: it cannot be decoded (an InputError).
            InputError: pixels of another kind or range.
        """
        pixels = to_unit(self._read(i), self._who(i))
        size = self.reading.size
        if size is not None and tuple(pixels.shape[1:]) != (size, size):
            pixels = resize_centre(pixels, size)
        return pixels

    def readable(self, rows: Iterable[int] | None = None) -> list[int]:
        """The rows that are used: all of them, but for those that cannot be decoded where `skip_unreadable` was asked for.

        Only then is anything read. What is left out is warned about, kept in `unreadable` and told in `preprocessing`; all
        other rows keep their numbers.
        """
        chosen = list(range(len(self))) if rows is None else list(rows)
        if not self.reading.skip_unreadable:
            return chosen
        bad = {}
        for i in chosen:
            try:
                self.image(i)
            except UnreadableError as error:
                bad[i] = f"{error.message}: {error.received}"
        self.unreadable.update(bad)
        if bad:
            few = "; ".join(list(bad.values())[:3])
            warnings.warn(f"{self.name}: {len(bad)} unreadable of {len(chosen)} images are left out: {few}", stacklevel=2)
        if len(bad) == len(chosen):
            raise InputError(
                f"No image of {self.name} can be read",
                expected="pictures",
                received=next(iter(bad.values()), "none"),
                remedy="fetch it again",
            )
        return [i for i in chosen if i not in bad]

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
                remedy="give size= (--size) to resize the short side and crop the centre",
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
        part = ImageData(
            lambda i: self._read(chosen[i]),
            self._labels[chosen] if self.labelled else None,
            fingerprint=lambda: hashlib.sha256(f"{self.fingerprint} rows {where}".encode()).hexdigest(),
            name=self.name,
            classes=self.classes,
            ids=self.ids[chosen],
            length=len(chosen),
            reading=self.reading,
            origin=self.origin,
            who=lambda i: self._who(chosen[i]),
        )
        part._whole = self
        return part

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """What is done between the source and [0,1], for metadata: resizing, channels, rows left out; None: nothing."""
        done: dict[str, Any] = {} if self.reading.size is None else described(self.reading.size)
        if self.reading.channels is not None:
            done["channels"] = self.reading.channels
        if self.unreadable:
            done["unreadable"] = sorted(self.unreadable)
        return done or None

    @property
    def notes(self) -> Mapping[str, int]:
        """What was done to pictures read so far, and to how many of them."""
        return dict(getattr(self._read, "notes", {}) if self._whole is None else self._whole.notes)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the data is: the files or arrays, the labels, and how they are read."""
        digest = self._fingerprint() if callable(self._fingerprint) else self._fingerprint
        for what in ("size", "channels"):
            if (value := getattr(self.reading, what)) is not None:
                digest = hashlib.sha256(f"{digest} {what} {value}".encode()).hexdigest()
        return digest

    def __repr__(self) -> str:
        classes = "" if self.classes is None else f", {len(self.classes)} classes"
        return f"ImageData({self.name!r}, {len(self)} images{classes})"


def to_unit(pixels: NDArray[Any], who: str) -> Tensor:
    """An array of uint8, of booleans, or of floats in [0,1], as float32 in [0,1].

    Args:
        pixels: `(C, H, W)`, 1 or 3 channels.
        who: names it in an error.

    Raises:
        InputError: another shape or dtype, NaN, values outside [0,1] by more than a rounding error.

    >>> to_unit(np.array([[[0, 51, 255]]], dtype=np.uint8), "a picture")
    tensor([[[0.0000, 0.2000, 1.0000]]])
    """
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise InputError(
            f"{who} has the wrong shape",
            expected="(C, H, W) with 1 or 3 channels",
            received=str(pixels.shape),
            remedy="move the channels first; leave transparency out",
        )
    if pixels.dtype == np.uint8:
        return torch.from_numpy(np.array(pixels)).to(torch.float32).div_(255)
    if pixels.dtype == np.bool_:
        return torch.from_numpy(pixels.astype(np.float32))
    if pixels.dtype.kind != "f":
        raise wrong_dtype(pixels, who)
    low, high = float(pixels.min()), float(pixels.max())
    if clip_rounding(low, high, who):
        return torch.from_numpy(np.clip(pixels, 0, 1).astype(np.float32))
    if not (low >= 0.0 and high <= 1.0):
        raise wrong_range(pixels, low, high, who)
    return torch.from_numpy(np.array(pixels, dtype=np.float32))


def wrong_dtype(pixels: NDArray[Any], who: str) -> InputError:
    """The error for pixels that are whole numbers, but not uint8."""
    remedy = "give uint8, or floats in [0,1]"
    if pixels.dtype.kind in "iu" and pixels.size:
        low, high = int(pixels.min()), int(pixels.max())
        if low >= 0 and high <= 255:
            remedy = "convert with .astype('uint8'), as the values are 0 to 255"
        elif low >= 0 and high <= 65535:
            remedy = "16-bit values: (x >> 8).astype('uint8')"
    return InputError(
        f"{who} has the wrong dtype", expected="uint8, or floats in [0,1]", received=str(pixels.dtype), remedy=remedy
    )


def wrong_range(pixels: NDArray[Any], low: float, high: float, who: str) -> InputError:
    """The error for floats in `[low, high]`."""
    missing = bool(np.isnan(pixels).any())
    return InputError(
        f"{who} has pixels that are {'not numbers' if missing else 'outside [0,1]'}",
        expected="floats in [0,1], or uint8",
        received=f"[{low:.9g}, {high:.9g}]",
        remedy=pixel_advice(low, high),
    )
