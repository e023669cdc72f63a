"""Finds the columns of images and labels, and numbers the classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import InputError
from rsrouter.inputs import printable
from rsrouter.stored import parse_json

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "picture", "photo", "x", "data", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = (
    *("label", "labels", "fine_label", "target", "targets", "y", "class", "classes", "cls", "category", "class_label"),
    *("class_id", "label_id", "class_idx", "label_idx", "digit", "gt", "ground_truth"),
)
_PLACES = """index indices idx id ids image_id img_id row key __key__ __url__ __local_path__ __index_level_0__ path file file_name
filename file_path url width height size md5 sha256 hash split"""
#: Columns that say which image it is, not what is on it.
NO_LABELS = frozenset(_PLACES.split())
#: `label="none"` takes images without labels.
NONE = "none"
#: A larger number is a name, no class index.
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Reading:
    """How a source is to be read; the arguments of `load_data`, passed whole."""

    split: str | None = None
    config: str | None = None
    image: str | None = None
    label: str | None = None
    classes: tuple[str, ...] | None = None
    size: int | None = None
    channels: int | None = None
    skip_unreadable: bool = False


def find_image(columns: Sequence[str], wanted: str | None, where: str, typed: Sequence[str] = ()) -> str:
    """The column of images: the one that was asked for, else one of a usual name, else the only one of image type.

    Args:
        columns: all names.
        wanted: what was asked for.
        where: names the source.
        typed: those whose type says that they hold images.

    Raises:
        InputError: none, or an unknown one; the columns there are are listed.

    >>> find_image(["img", "fine_label"], None, "x.parquet")
    'img'
    """
    if wanted is not None:
        return _known(columns, wanted, "image", where)
    usual = [c for name in IMAGE_COLUMNS for c in columns if c.lower() == name]
    found = [c for c in usual if c in typed] or usual or list(typed)
    if not found or (not usual and len(found) > 1):
        raise InputError(
            f"{where} has no image column with a known name",
            expected=f"one of {', '.join(IMAGE_COLUMNS[:5])}, ...",
            received=_listed(columns),
            remedy="name it: image= (--image)",
        )
    if len(found) > 1:
        _also(where, "images", found)
    return found[0]


def find_label(columns: Sequence[str], image: str, wanted: str | None, where: str, typed: Sequence[str] = ()) -> str | None:
    """The column of labels, as `find_image`; None where `label="none"`, or where no column could be one.

    >>> find_label(["img", "Class"], "img", None, "x.parquet")
    'Class'
    """
    if wanted is not None:
        return None if wanted == NONE and NONE not in columns else _known(columns, wanted, "label", where)
    usual = [c for name in LABEL_COLUMNS for c in columns if c.lower() == name and c != image]
    found = [*usual, *(c for c in typed if c not in usual and c != image)]
    if len(found) > 1:
        _also(where, "labels", found)
    if found:
        return found[0]
    if any(c != image and c.lower() not in NO_LABELS and c.lower() not in IMAGE_COLUMNS for c in columns):
        raise InputError(
            f"{where} has no label column with a known name",
            expected=f"one of {', '.join(LABEL_COLUMNS[:6])}, ...",
            received=_listed(columns),
            remedy=f"name it: label= (--label); --label {NONE} takes the images without labels",
        )
    return None


def _known(columns: Sequence[str], wanted: str, what: str, where: str) -> str:
    if wanted in columns:
        return wanted
    raise InputError(
        f"{where} has no {what} column {printable(wanted)!r}",
        expected=f"one of {_listed(columns)}",
        received=printable(repr(wanted)),
        remedy=f"check {what}= (--{what})",
    )


def _listed(columns: Sequence[str]) -> str:
    names = [printable(c) for c in columns[:20]]
    return ", ".join(names) + (f", and {len(columns) - 20} more" if len(columns) > 20 else "") if names else "no column"


def _also(where: str, what: str, found: Sequence[str]) -> None:
    rest = ", ".join(map(printable, found[1:]))
    warnings.warn(f"{where}: {what} are taken from {printable(found[0])!r}; also there: {rest} (--{what[:-1]})", stacklevel=4)


def features_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Column types that `datasets` writes into parquet and arrow files; empty where there are none that can be read."""
    text = (metadata or {}).get(b"huggingface")
    if text is None or len(text) > 1 << 24:
        return {}
    try:
        content = parse_json(text, "column types")
    except InputError:
        return {}
    info = content.get("info") if isinstance(content, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    return {k: v for k, v in features.items() if isinstance(v, dict)} if isinstance(features, dict) else {}


def of_type(features: Mapping[str, Any], kind: str) -> list[str]:
    """Columns of type `"ClassLabel"` or `"Image"`."""
    return [name for name, feature in features.items() if feature.get("_type") == kind]


def class_names(features: Mapping[str, Any], column: str | None) -> tuple[str, ...] | None:
    """Names of the classes of a ClassLabel column, in the order of its numbers."""
    names = features.get(column or "", {}).get("names")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        return None
    return tuple(map(printable, names))


def class_order(names: Iterable[str], where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Class numbers of names: alphabetical, as torchvision's ImageFolder has them; numbers count as numbers.

    Returns:
        Name to class index, and the name of every index.

    >>> class_order(["dog", "cat"], "pets")
    ({'cat': 0, 'dog': 1}, ('cat', 'dog'))
    """
    ordered = sorted(set(names))
    if (numbers := as_numbers(ordered)) is not None:
        by_number = sorted(ordered, key=numbers.__getitem__)
        first, last = numbers[by_number[0]], numbers[by_number[-1]]
        if first == 0 and last < MOST_CLASSES:
            if by_number != ordered or last >= len(ordered):
                gap = f"; no class {_gap(numbers.values())}" if last >= len(ordered) else ""
                _mapping(where, "are numbers and count as such", numbers, by_number, gap)
            known = {number: name for name, number in numbers.items()}
            return numbers, tuple(printable(known.get(k, str(k))) for k in range(last + 1))
        ranks = {name: k for k, name in enumerate(by_number)}
        _mapping(where, "are numbers that do not begin at 0, and are counted from 0", ranks, by_number, "")
        return ranks, tuple(map(printable, by_number))
    ranks = {name: k for k, name in enumerate(ordered)}
    if ordered != sorted(ordered, key=_natural):
        _mapping(where, "are in alphabetical order, as in torchvision, not in that of their numbers", ranks, ordered, "")
    return ranks, tuple(map(printable, ordered))


def as_numbers(names: Iterable[str]) -> dict[str, int] | None:
    """Names as numbers, where all of them are different whole numbers; else None.

    >>> as_numbers(["0", "11", "2"]), as_numbers(["0", "cat"])
    ({'0': 0, '11': 11, '2': 2}, None)
    """
    listed = list(names)
    numbers = {n: int(n) for n in listed if re.fullmatch(r"[0-9]{1,9}", n)}
    return numbers if numbers and len(numbers) == len(set(numbers.values())) == len(listed) else None


def _gap(numbers: Iterable[int]) -> int:
    there = set(numbers)
    return next(k for k in range(len(there) + 1) if k not in there)


def _natural(name: str) -> list[tuple[int, Any]]:
    return [(0, int(part)) if part.isascii() and part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _mapping(where: str, how: str, ranks: Mapping[str, int], ordered: Sequence[str], more: str) -> None:
    shown = ", ".join(f"{printable(n)} -> {ranks[n]}" for n in ordered[:12]) + (", ..." if len(ordered) > 12 else "")
    warnings.warn(
        f"{where}: class names {how}: {shown}{more}. If the experts count otherwise, give the names in their order: "
        "classes= (--classes)",
        stacklevel=4,
    )


def chosen_order(names: Iterable[str], wanted: tuple[str, ...], where: str) -> dict[str, int]:
    """Class numbers where the names were given in order.

    Raises:
        InputError: a name twice, or names of the source that are not among them.
    """
    ranks = {name: k for k, name in enumerate(wanted)}
    missing = sorted(set(names) - set(ranks))
    if len(ranks) < len(wanted) or missing:
        raise InputError(
            f"The classes given do not fit {where}",
            expected="each name of the source once",
            received=f"not given: {_listed(missing)}" if missing else "a name twice",
            remedy="check classes= (--classes)",
        )
    return ranks


def class_indices(
    values: NDArray[Any], names: tuple[str, ...] | None, reading: Reading, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Labels as class indices.

    Args:
        values: `(N,)` whole numbers, booleans, or names of classes.
        names: of the classes, by number, if the source has them.
        reading: `classes` gives the names in the experts' order.
        where: names the source.

    Returns:
        `(N,)` int64 and the names.

    Raises:
        InputError: labels that are missing or of another type; classes that do not fit.

    >>> class_indices(np.array(["dog", "cat"]), None, Reading(), "pets")
    (array([1, 0]), ('cat', 'dog'))
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind in "SOU" and values.ndim == 1:
        listed = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values.tolist()]
        if wrong := [(i, v) for i, v in enumerate(listed) if not isinstance(v, str)]:
            raise InputError(
                f"{where} has labels that are missing or no names",
                expected="a class for every image",
                received=f"{printable(repr(wrong[0][1]))[:60]} at image {wrong[0][0]}; {len(wrong)} in all",
                remedy=f"complete the labels, or take another column (--label); --label {NONE} takes none",
            )
        if names is not None and set(listed) <= set(names):
            ranks, known = {n: k for k, n in enumerate(names)}, names
        elif reading.classes is not None:
            ranks, known = chosen_order(listed, reading.classes, where), reading.classes
        else:
            ranks, known = class_order(listed, where)
        values, names = np.array([ranks[v] for v in listed], dtype=np.int64), known
    if values.ndim != 1 or values.dtype.kind not in "iub" or (values.dtype.kind == "u" and values.size and values.max() >= 2**63):
        one_hot = values.ndim == 2 and values.shape[1] > 1
        raise InputError(
            "Labels must be class indices",
            expected="(N,) integers, or names",
            received=f"{values.dtype} {values.shape}",
            remedy="give labels.argmax(1)" if one_hot else "give one whole number or name per image",
        )
    labels = values.astype(np.int64)
    wanted = reading.classes
    if wanted is None or wanted == names:
        return labels, names
    if names is not None:
        used = [names[k] for k in np.unique(labels[(labels >= 0) & (labels < len(names))])]
        ranks = chosen_order(used, wanted, where)
        table = np.array([ranks.get(n, -1) for n in names])
        inside = (labels >= 0) & (labels < len(names))
        return np.where(inside, table[np.where(inside, labels, 0)], labels), wanted
    if len(labels) and labels.max() >= len(wanted):
        raise InputError(
            f"The classes given do not fit {where}",
            expected=f"at least {int(labels.max()) + 1} names, as the largest label is {int(labels.max())}",
            received=f"{len(wanted)} names",
            remedy="check classes= (--classes)",
        )
    return labels, wanted
