"""Images held in memory: arrays, PIL images, `datasets.Dataset`, torch data sets and loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.data.arrays import from_arrays, with_channels
from rsrouter.data.columns import Reading, class_indices, class_names, find_image, find_label, of_type
from rsrouter.data.folders import picture_bytes
from rsrouter.data.images import ImageData, Origin
from rsrouter.data.pictures import Pictures, spread
from rsrouter.data.splits import choose


def from_object(source: Any, reading: Reading) -> ImageData:
    """A data set from an object in memory.

    Args:
        source: an array or tensor of images; a pair `(images, labels)`; a PIL image; a list of images, of
            `(image, label)` or of dictionaries; `datasets.Dataset` or `DatasetDict`; a torch data set or loader.
        reading: as for files.

    Raises:
        InputError: something else, or a loader that shuffles.
    """
    if isinstance(source, ImageData):
        if reading != Reading():
            raise InputError(
                "The images are loaded already",
                expected="no further settings",
                received=str(reading),
                remedy="give them to the first load_data",
            )
        return source
    if isinstance(source, Tensor | np.ndarray):
        return from_arrays(source, reading=reading)
    if _is_picture(source):
        return _from_items([source], None, reading, "a picture", None)
    if isinstance(source, Mapping):
        if source and all(_is_table(v) for v in source.values()):  # DatasetDict
            split = choose("split", reading.split, sorted(map(str, source)), "The data set")
            return from_object(source[split], replace(reading, split=None))
        return _from_mapping(source, reading)
    if _is_table(source):
        return _from_datasets(source, reading)
    if isinstance(source, torch.utils.data.DataLoader):
        return _from_loader(source, reading)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor | np.ndarray) and np.ndim(source[0]) > 2:
        return from_arrays(source[0], source[1], reading=reading)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, str | bytes):
        return _from_sequence(source, reading)
    raise _unknown(source)


def _unknown(source: Any) -> InputError:
    streamed = type(source).__name__ == "IterableDataset"
    return InputError(
        "Images cannot be read from this",
        expected="a path, hf-hub:org/name, arrays, PIL images, datasets.Dataset, a torch data set or loader",
        received=type(source).__name__,
        remedy="list(source.take(n)), or load_data('hf-hub:org/name', stream=True)" if streamed else "see load_data",
    )


def _is_picture(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "getexif")


def _is_table(value: Any) -> bool:
    return hasattr(value, "column_names") and hasattr(value, "features")


def _from_mapping(source: Mapping[Any, Any], reading: Reading) -> ImageData:
    """Arrays by name, as `np.load` gives them."""
    names = [n for n in source if isinstance(n, str)]
    image = find_image(names, reading.image, "The mapping")
    label = find_label(names, image, reading.label, "The mapping")
    origin = Origin("arrays", image=image, label=label)
    return from_arrays(source[image], None if label is None else source[label], reading=reading, origin=origin)


def _from_datasets(source: Any, reading: Reading) -> ImageData:
    if not hasattr(source, "__len__"):
        raise _unknown(source)
    columns, features = list(source.column_names), {}
    for name, feature in source.features.items():
        features[name] = {"_type": type(feature).__name__, "names": list(getattr(feature, "names", None) or [])}
    where = "The data set"
    image = find_image(columns, reading.image, where, of_type(features, "Image"))
    label = find_label(columns, image, reading.label, where, of_type(features, "ClassLabel"))
    plain = source.with_format(None)
    if features[image]["_type"] == "Image":
        plain = plain.cast_column(image, type(source.features[image])(decode=False))
    labels, classes = None, None
    if label is not None:
        values = list(plain.select_columns([label])[label])
        array = np.array(values) if all(isinstance(v, int) for v in values) else np.array(values, dtype=object)
        labels, classes = class_indices(array, class_names(features, label), reading, where)

    def item(i: int) -> Any:
        value = plain[i][image]
        if isinstance(value, Mapping):
            held, path = value.get("bytes"), value.get("path")
            value = held if held is not None or not path else picture_bytes(Path(path), path)
        return value

    split = getattr(source, "split", None)
    origin = Origin("datasets", split=None if split is None else str(split), image=image, label=label)
    return _lazy(item, len(source), labels, classes, reading, origin, "datasets.Dataset")


def _from_loader(loader: Any, reading: Reading) -> ImageData:
    from torch.utils.data import RandomSampler

    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise InputError(
            "The loader shuffles",
            expected="images in one order: their numbers are their ids",
            received="shuffle=True",
            remedy="DataLoader(..., shuffle=False), or give the data set itself",
        )
    images, labels = [], []
    for batch in loader:
        part, label = _pair(batch, reading)
        if not isinstance(part, Tensor):
            raise _unknown(batch)
        images.append(part)
        labels.append(label)
    if not images or len({tuple(i.shape[1:]) for i in images}) > 1:
        raise InputError(
            "The batches of the loader do not fit together",
            expected="images of one size",
            received=str(sorted({tuple(i.shape[1:]) for i in images})) if images else "no batch",
            remedy="resize in the data set",
        )
    known = None if any(v is None for v in labels) else torch.cat([torch.as_tensor(v) for v in labels])
    classes = getattr(loader.dataset, "classes", None)
    return from_arrays(torch.cat(images), known, name="DataLoader", classes=classes, reading=reading)


def _pair(item: Any, reading: Reading) -> tuple[Any, Any]:
    """Image and label of one item or batch."""
    if isinstance(item, Mapping):
        names = [n for n in item if isinstance(n, str)]
        image = find_image(names, reading.image, "An item")
        label = find_label(names, image, reading.label, "An item")
        return item[image], None if label is None else item[label]
    if isinstance(item, tuple | list) and len(item) == 2 and not _is_picture(item[1]):
        return item[0], item[1]
    if isinstance(item, tuple | list) and len(item) == 1:
        return item[0], None
    return item, None


def _from_sequence(source: Sequence[Any], reading: Reading) -> ImageData:
    """A torch data set, or a list. Labels are those it lists (`targets`), else each item is read once for its own."""
    count = len(source)
    if not count:
        raise InputError(
            "The data set is empty", expected="at least one image", received=type(source).__name__, remedy="check it"
        )
    listed = getattr(source, "targets", None)
    if listed is not None and len(listed) == count and getattr(source, "target_transform", None) is None:
        labels: list[Any] | None = [int(v) for v in listed]
    else:
        labels = [_pair(source[i], reading)[1] for i in range(count)]
        absent = [v is None for v in labels]
        if all(absent):
            labels = None
        elif any(absent):
            raise InputError(
                "Some items have labels and others have none",
                expected="all or none",
                received=f"none at {absent.index(True)}",
                remedy="mend it",
            )
    return _from_items(source, labels, reading, type(source).__name__, getattr(source, "classes", None))


def _from_items(source: Sequence[Any], labels: list[Any] | None, reading: Reading, name: str, classes: Any) -> ImageData:
    known: tuple[str, ...] | None = tuple(map(str, classes)) if isinstance(classes, list | tuple) else None
    indices: NDArray[np.int64] | None = None
    if labels is not None:
        values = [v.item() if isinstance(v, Tensor | np.generic) else v for v in labels]
        array = np.array(values) if all(isinstance(v, int) for v in values) else np.array(values, dtype=object)
        indices, known = class_indices(array, known, reading, name)
    return _lazy(lambda i: _pair(source[i], reading)[0], len(source), indices, known, reading, Origin("memory"), name)


def _lazy(
    item: Any,
    count: int,
    labels: NDArray[np.int64] | None,
    classes: tuple[str, ...] | None,
    reading: Reading,
    origin: Origin,
    name: str,
) -> ImageData:
    """Items that are pictures (bytes or PIL) or arrays, taken one at a time."""

    def who(i: int) -> str:
        return f"image {i} of {name}"

    pictures = Pictures(item, who, spread(count), reading.channels)

    def read(i: int) -> NDArray[Any]:
        value = item(i)
        if isinstance(value, bytes) or _is_picture(value):
            return pictures(i)
        return with_channels(_chw(value, who(i)), reading.channels, who(i))

    def fingerprint() -> str:
        digest = hashlib.sha256(b"items" if labels is None else np.ascontiguousarray(labels).tobytes())
        for i in range(count):
            value = item(i)
            array = value if isinstance(value, bytes) else np.asarray(value)
            digest.update(
                array
                if isinstance(array, bytes)
                else f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
            )
        return digest.hexdigest()

    data = ImageData(
        read, labels, fingerprint=fingerprint, name=name, length=count, classes=classes, reading=reading, origin=origin, who=who
    )
    read.notes = pictures.notes  # type: ignore[attr-defined]
    return data


def _chw(value: Any, who: str) -> NDArray[Any]:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{who} is not an array", expected="(C, H, W)", received=type(value).__name__, remedy="stack its rows"
        ) from error
    if (
        array.dtype.kind in "iu"
        and not isinstance(value, Tensor | np.ndarray)
        and array.size
        and array.min() >= 0
        and array.max() <= 255
    ):
        array = array.astype(np.uint8)  # nested lists, as `datasets` stores arrays
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
        return array.transpose(2, 0, 1)
    return array
