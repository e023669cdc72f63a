"""Images and labels that are arrays: in memory, in `.npz` files, and in MNIST's idx files."""

from __future__ import annotations

import gzip
import hashlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.data.columns import IMAGE_COLUMNS, LABEL_COLUMNS, NONE, Reading, class_indices, find_image, find_label
from rsrouter.data.images import ImageData, Origin, wrong_dtype, wrong_range
from rsrouter.data.splits import choose, is_split
from rsrouter.inputs import ROUNDING, printable

#: No array is larger; a file that says it is is not believed.
MOST_BYTES = 1 << 36


def from_arrays(
    images: object,
    labels: Any = None,
    *,
    name: str = "arrays",
    ids: Sequence[int] | NDArray[Any] | None = None,
    classes: Sequence[str] | None = None,
    reading: Reading | None = None,
    origin: Origin | None = None,
) -> ImageData:
    """Arrays or tensors as a data set.

    Args:
        images: `(N, C, H, W)`, `(N, H, W, C)` or `(N, H, W)`; uint8, booleans, or floats in [0,1].
        labels: `(N,)` or `(N, 1)` integers, names of classes, or None.
        name: for messages and metadata.
        ids: each image's position in its source.
        classes: names of the classes, by number.
        reading: how images are read further; `classes` in it gives the experts' order.
        origin: where they are from.

    Raises:
        InputError: another dtype or shape, values outside the range, NaN, or counts that differ.

    >>> image, label = from_arrays(np.zeros((2, 8, 8, 3), np.uint8), [0, 1])[1]
    >>> tuple(image.shape), label
    ((3, 8, 8), 1)
    """
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim == 3 and (array.shape[2] == 3 or (labels is None and array.shape[0] in (1, 3))):
        raise _wrong_shape(array, name, "one image needs a batch dimension too: images[None]")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or 0 in array.shape or array.shape[1] not in (1, 3):
        raise _wrong_shape(array, name, "stack the images; one image needs a batch dimension too; leave transparency out")
    if array.dtype.kind not in "fb" and array.dtype != np.uint8:
        raise wrong_dtype(array, f"The array of {name}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            first = next(i for i, image in enumerate(array) if not (image.min() >= -ROUNDING and image.max() <= 1 + ROUNDING))
            raise wrong_range(array[first], low, high, f"image {first} of {name}")
    elif array.dtype == np.uint8 and array.max() == 1:
        warnings.warn(
            f"the uint8 images of {name} hold no value above 1 and are read as values of 0 to 255, so all are nearly black: "
            "where 1 means white, give booleans or floats",
            stacklevel=2,
        )
    reading = reading or Reading()
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    known: tuple[str, ...] | None = None if classes is None else tuple(classes)
    if given is not None:
        given = np.asarray(given)
        if given.shape[:1] != (len(array),):
            raise InputError(
                "Images and labels differ in number",
                expected=f"{len(array)} labels",
                received=f"shape {given.shape}",
                remedy="give one label per image",
            )
        given, known = class_indices(given, known, reading, name)

    def fingerprint() -> str:
        digest = hashlib.sha256(repr((str(array.dtype), array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"unlabelled" if given is None else np.ascontiguousarray(given).tobytes())
        return digest.hexdigest()

    def read(i: int) -> NDArray[Any]:
        return with_channels(array[i], reading.channels, f"image {i} of {name}")

    return ImageData(
        read, given, fingerprint=fingerprint, name=name, ids=ids, length=len(array), classes=known, reading=reading, origin=origin
    )


def with_channels(array: NDArray[Any], channels: int | None, who: str) -> NDArray[Any]:
    """`(C, H, W)` with that many channels; gray ones are repeated, colour ones are not made gray.

    >>> with_channels(np.zeros((1, 4, 4), np.uint8), 3, "a picture").shape
    (3, 4, 4)
    """
    if channels is None or len(array) == channels:
        return array
    if channels == 1:
        raise InputError(
            f"{who} is in colour",
            expected="one channel",
            received=str(array.shape),
            remedy="rsrouter does not convert arrays to gray: convert them first",
        )
    return np.repeat(array, channels, axis=0)


def _wrong_shape(array: NDArray[Any], name: str, remedy: str) -> InputError:
    return InputError(
        f"Images of {name} have the wrong shape",
        expected="(N, C, H, W) with 1 or 3 channels, N at least 1",
        received=str(array.shape),
        remedy=remedy,
    )


def from_npz(path: Path, name: str, reading: Reading) -> ImageData:
    """The arrays of an `.npz` file: `images` and `labels`, or those of a split (`x_test`, `test_images`).

    Raises:
        InputError: unknown names, several splits and none named, a damaged file, objects in it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            files = list(file.files)
            columns, split = _columns(files, reading, name)
            image = columns[find_image(list(columns), reading.image, name)]
            found = find_label(list(columns), image, reading.label, name)
            label = None if found is None else columns[found]
            for part in (image, label or image):
                _check_size(path, part, name)
            pixels, labels = file[image], None if label is None else file[label]
            ids = file["index"] if "index" in files and file["index"].shape == (len(pixels),) else None
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError) as error:
        raise InputError(
            f"{name} is not a readable .npz file",
            expected="arrays `images` and `labels`",
            received=(str(error).splitlines() or [type(error).__name__])[0][:200],
            remedy="write it with numpy.savez; object arrays are not read",
        ) from error
    if ids is not None and ids.dtype.kind not in "iu":
        ids = None
    origin = Origin("npz", split=split, image=image, label=label)
    return from_arrays(pixels, labels, name=name, ids=ids, reading=replace(reading, split=split), origin=origin)


def _columns(files: Sequence[str], reading: Reading, name: str) -> tuple[dict[str, str], str | None]:
    """Plain names (`images`, `y`) to arrays of the split that is read (`test_images`, `y_test`), and that split."""
    everything = {f: f for f in files}
    if reading.image is not None:
        return everything, None
    parts: dict[str, dict[str, str]] = {}
    for file in files:
        words = file.lower().split("_")
        for split, rest in ((words[0], words[1:]), (words[-1], words[:-1])):
            if is_split(split) and (base := "_".join(rest)) in (*IMAGE_COLUMNS, *LABEL_COLUMNS):
                parts.setdefault(split, {})[base] = file
                break
    splits = sorted(s for s, arrays in parts.items() if set(arrays) & set(IMAGE_COLUMNS))
    whole = {f: f for f in files if not any(f in arrays.values() for arrays in parts.values())}
    if splits and not (reading.split is None and any(f.lower() in IMAGE_COLUMNS for f in whole)):
        split = choose("split", reading.split, splits, name)
        return {**parts[split], **({reading.label: reading.label} if reading.label in everything else {})}, split
    if reading.split is not None:
        choose("split", reading.split, splits, name)
    labels = [(base, f) for arrays in parts.values() for base, f in arrays.items() if base in LABEL_COLUMNS]
    if len(labels) == 1 and reading.label is None and not any(f.lower() in LABEL_COLUMNS for f in whole):
        return {**whole, **dict(labels)}, None  # images and y_test, say
    return everything, None


def _check_size(path: Path, array: str, name: str) -> None:
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist() if info.filename in (array, f"{array}.npy"))
    if size > MOST_BYTES:
        raise InputError(
            f"{name} is too large for one array",
            expected=f"at most {MOST_BYTES >> 30} GiB",
            received=f"{size >> 30} GiB",
            remedy="use parquet",
        )


_IDX = re.compile(r"(?P<head>.*)images?[-._]idx3[-._]ubyte(?P<gz>\.gz)?$", re.IGNORECASE)


def idx_files(paths: Sequence[Path]) -> dict[str, Path]:
    """MNIST's files of images among those paths, by split.

    >>> sorted(idx_files([Path("t10k-images-idx3-ubyte.gz"), Path("train-images.idx3-ubyte"), Path("notes.txt")]))
    ['t10k', 'train']
    """
    found = {p: m["head"].strip("-._") for p in paths if (m := _IDX.fullmatch(p.name))}
    return {head.rsplit("-", 1)[-1] if is_split(head.rsplit("-", 1)[-1]) else head: p for p, head in found.items()}


def from_idx(images: Path, name: str, reading: Reading) -> ImageData:
    """Images in MNIST's idx form; their labels stand beside them.

    Raises:
        InputError: a damaged file, or no labels there (`label="none"` takes the images alone).
    """
    partner = re.sub(r"images?([-._])idx3", lambda m: f"labels{m[1]}idx1", images.name)
    beside = images.with_name(partner)
    labels = None
    if reading.label != NONE:
        if not beside.is_file():
            raise InputError(
                f"{name} has no labels",
                expected=printable(partner),
                received="no such file",
                remedy=f"fetch it, or label={NONE!r} (--label {NONE})",
            )
        labels = _idx(beside, 1)
    return from_arrays(_idx(images, 3), labels, name=name, reading=reading, origin=Origin("idx", split=reading.split))


def _idx(path: Path, dims: int) -> NDArray[np.uint8]:
    who = printable(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dims)
            shape = tuple(int.from_bytes(head[k : k + 4], "big") for k in range(4, len(head), 4))
            size = int(np.prod(shape, dtype=object))
            if head[:4] != bytes([0, 0, 8, dims]) or len(shape) != dims or size > MOST_BYTES:
                raise ValueError(f"the head says {head[:16].hex()}")
            content = file.read(size + 1)
            if len(content) != size:
                raise ValueError(f"{len(content)} bytes where the head announces {size}")
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise InputError(
            f"{who} is not a readable idx file",
            expected=f"uint8 of {dims} dimensions",
            received=str(error),
            remedy="fetch the file again",
        ) from error
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
