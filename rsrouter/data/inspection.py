"""Inspection of a data set: parts, classes, sizes, range, what was passed over; and a sheet of images by class."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.data.images import ImageData
from rsrouter.data.pictures import MODE, UnreadableError
from rsrouter.files import write_atomically

#: Images that are looked at where nothing else is said.
LOOKED_AT = 1000
#: Side of a picture on a contact sheet, images of each class on it, and most classes.
SIDE, PER_CLASS, MOST_CLASSES = 64, 8, 100


@dataclass(frozen=True)
class Inspection:
    """What was understood of a data set.

    Attributes:
        name, kind, config, split, image, label: the source, and which part and columns were read.
        images, looked_at: how many there are, and how many were decoded for what follows.
        classes: name (or number) and count of each class, by number; -1 is not a label.
        shapes: `C x H x W` to how many images have it.
        modes: Pillow's format and mode, to how many.
        low, high: least and largest pixel, in [0,1].
        eight_bit: whether every pixel is a multiple of 1/255.
        notes: what was done to pictures, and to how many.
        passed: why files were passed over, and which.
        unreadable: images that cannot be decoded, and why.
        preprocessing: as it stands in metadata.
        fingerprint: sha256 of the data; None where it was not asked for.
    """

    name: str
    kind: str
    config: str | None
    split: str | None
    image: str | None
    label: str | None
    images: int
    looked_at: int
    classes: tuple[tuple[int, str, int], ...]
    shapes: Mapping[str, int]
    modes: Mapping[str, int]
    low: float
    high: float
    eight_bit: bool
    notes: Mapping[str, int]
    passed: Mapping[str, tuple[str, ...]]
    unreadable: Mapping[int, str]
    preprocessing: Mapping[str, Any] | None
    fingerprint: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            **asdict(self),
            "classes": [{"class": k, "name": name, "images": count} for k, name, count in self.classes],
            "passed": {k: list(v) for k, v in self.passed.items()},
        }


def inspect_data(data: ImageData, *, images: int | None = LOOKED_AT, fingerprint: bool = True) -> Inspection:
    """Decodes images of a data set and says what was understood; an image that cannot be decoded is named, not raised.

    Args:
        data: the data set.
        images: how many are decoded, spread evenly; None: all.
        fingerprint: whether to compute it, which reads all files.

    Raises:
        InputError: pixels of another kind or range.

    >>> from rsrouter.data import from_arrays
    >>> found = inspect_data(from_arrays(np.zeros((3, 8, 8), np.uint8), [0, 1, 1], classes=["cat", "dog"]))
    >>> found.classes, found.shapes
    (((0, 'cat', 1), (1, 'dog', 2)), {'1 x 8 x 8': 3})
    """
    chosen = _spread(len(data), images)
    before = Counter(data.notes)
    shapes: Counter[str] = Counter()
    unreadable: dict[int, str] = {}
    low, high, eight_bit = float("inf"), float("-inf"), True
    for i in chosen:
        try:
            pixels = data.image(i)
        except UnreadableError as error:
            unreadable[i] = f"{error.message}: {error.received}"
            continue
        shapes[" x ".join(map(str, pixels.shape))] += 1
        low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
        eight_bit = eight_bit and bool((((pixels * 255).round() / 255) == pixels).all())
    noted = Counter(data.notes) - before
    counts = Counter(data.labels.tolist())
    numbers = range(len(data.classes)) if data.classes is not None else sorted(k for k in counts if k >= 0)
    listed = [(k, data.classes[k] if data.classes is not None else str(k), counts[k]) for k in numbers]
    listed += [(k, "no label" if k == -1 else str(k), counts[k]) for k in sorted(counts) if k < 0]
    origin = data.origin
    return Inspection(
        name=data.name,
        kind=origin.kind,
        config=origin.config,
        split=origin.split,
        image=origin.image,
        label=origin.label,
        images=len(data),
        looked_at=len(chosen),
        classes=tuple(listed),
        shapes=dict(shapes.most_common()),
        modes={k.removeprefix(MODE): v for k, v in noted.most_common() if k.startswith(MODE)},
        low=low if shapes else float("nan"),
        high=high if shapes else float("nan"),
        eight_bit=eight_bit,
        notes={k: v for k, v in noted.items() if not k.startswith(MODE)},
        passed=origin.passed,
        unreadable=unreadable,
        preprocessing=data.preprocessing,
        fingerprint=data.fingerprint if fingerprint else None,
    )


def _spread(count: int, most: int | None) -> list[int]:
    if most is not None and most < 1:
        raise InputError("Inspection needs images", expected="at least 1", received=str(most), remedy="leave the number out")
    return list(range(count)) if most is None or most >= count else [k * count // most for k in range(most)]


def contact_sheet(data: ImageData, path: str | Path, *, per_class: int = PER_CLASS) -> Path:
    """A PNG with the first images of every class, a row each, under the class's number and name.

    Args:
        data: the data set.
        path: the file, ending in `.png`; it is replaced.
        per_class: images of each class; of at most `MOST_CLASSES` classes.

    Raises:
        InputError: another suffix, or no folder there.
    """
    from PIL import Image, ImageDraw

    path = Path(path).expanduser()
    if path.suffix.lower() != ".png" or not path.parent.is_dir() or path.is_dir():
        raise InputError(
            "The contact sheet cannot be written",
            expected="a .png file in a folder that exists",
            received=str(path),
            remedy="such as sheet.png",
        )
    labels = data.labels.numpy()
    numbers = [int(k) for k in np.unique(labels)][:MOST_CLASSES]
    text, gap = 14, 4
    sheet = Image.new("RGB", (per_class * (SIDE + gap) + gap, len(numbers) * (SIDE + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, number in enumerate(numbers):
        top = gap + row * (SIDE + text + gap)
        rows = np.flatnonzero(labels == number)
        name = "no label" if number < 0 else f"{number}" if data.classes is None else f"{number} {data.classes[number]}"
        draw.text((gap, top), f"{name[:60]} ({len(rows)})".encode("ascii", "replace").decode(), fill="black")
        for column, i in enumerate(rows[:per_class]):
            place = (gap + column * (SIDE + gap), top + text)
            try:
                sheet.paste(_thumbnail(data.image(int(i))), place)
            except UnreadableError:
                draw.rectangle((*place, place[0] + SIDE - 1, place[1] + SIDE - 1), outline="red")
                draw.text((place[0] + 6, place[1] + 24), "unreadable", fill="red")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    return path


def _thumbnail(pixels: Tensor) -> Any:
    from PIL import Image

    array = (pixels * 255).round().byte().numpy()
    image = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).convert("RGB")
    scale = SIDE / max(image.size)
    filter_ = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), filter_)
