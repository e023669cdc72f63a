"""Images and labels from files, folders, arrays and Hub data sets, one index at a time.

`load_data` takes an `.npz` file, parquet in the Hub's schema, a folder of images by class, or
`hf-hub:org/name@revision`. What it returns decodes an image when it is asked for, so ImageNet is never held in memory.
Pixels are float32 in [0,1]; an 8-bit pixel k is exactly the float nearest to k/255.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.hub import Hub, is_hub_reference

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "y")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")


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
        remedy = "divide by 255" if 1.0 < high <= 255 and low >= 0 else "give raw pixels; each expert normalises them itself"
        raise InputError(
            f"{who} has pixels outside [0,1]",
            expected="floats in [0,1], or uint8",
            received=f"[{low:g}, {high:g}]",
            remedy=remedy,
        )
    return torch.from_numpy(np.array(pixels, dtype=np.float32))


def resize_centre(pixels: Tensor, size: int) -> Tensor:
    """The field's test transform: short side to `size * 256 / 224`, centre crop of `size`. Rounded to 8 bits."""
    from torchvision.transforms.v2 import functional as tv

    _, height, width = pixels.shape
    short = round(size * 256 / 224)
    new = (short, round(width * short / height)) if height <= width else (round(height * short / width), short)
    eight_bit = (pixels * 255).round().to(torch.uint8)
    resized: Tensor = tv.center_crop(tv.resize(eight_bit, list(new), antialias=True), [size, size])
    return resized.to(torch.float32).div_(255)


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


def _decode(encoded: bytes, who: str) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            gray = image.mode in {"L", "1", "LA", "I", "I;16"}
            array = np.asarray(image.convert("L" if gray else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{who} is not a readable image",
            expected="PNG, JPEG or another format that Pillow reads",
            received=str(error),
            remedy="fetch the file again",
        ) from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _files_digest(paths: Sequence[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(root).as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _pick(columns: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, where: str) -> str:
    candidates = [wanted] if wanted else [c for c in usual if c in columns]
    if not candidates or candidates[0] not in columns:
        raise InputError(
            f"{where} has no {what} column that is known",
            expected=wanted or f"one of {list(usual)}",
            received=str(list(columns)),
            remedy=f"give {what}=",
        )
    return candidates[0]


class _Parquet:
    """Encoded images of parquet files, one row group in memory at a time."""

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        import pyarrow.parquet as pq

        self.column, self.groups, self.starts = column, [], [0]
        for path in paths:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                self.groups.append((path, group))
                self.starts.append(self.starts[-1] + file.metadata.row_group(group).num_rows)
        self._held: tuple[int, Any] = (-1, None)

    def __call__(self, i: int) -> NDArray[np.uint8]:
        import pyarrow.parquet as pq

        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        if self._held[0] != group:
            path, number = self.groups[group]
            self._held = (group, pq.ParquetFile(path).read_row_group(number, columns=[self.column]).column(0))
        value = self._held[1][i - self.starts[group]].as_py()
        encoded = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(encoded, bytes):
            raise InputError(
                f"Row {i} holds no encoded image",
                expected="bytes, or {'bytes': ...} as on the Hub",
                received=type(encoded).__name__,
                remedy="store the images in the file, not as links",
            )
        return _decode(encoded, f"row {i}")


def _from_parquet(
    paths: Sequence[Path], root: Path, name: str, image: str | None, label: str | None, size: int | None
) -> ImageData:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(paths[0])
        image_column = _pick(schema.names, image, IMAGE_COLUMNS, "image", name)
        has_label = label is not None or any(c in schema.names for c in LABEL_COLUMNS)
        labels = None
        if has_label:
            column = _pick(schema.names, label, LABEL_COLUMNS, "label", name)
            labels = np.concatenate([pq.read_table(p, columns=[column]).column(0).to_numpy() for p in paths])
        read = _Parquet(paths, image_column)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{name} is not readable parquet",
            expected="parquet with an image and a label column",
            received=str(error).splitlines()[0],
            remedy="fetch the file again",
        ) from error
    return ImageData(read, labels, fingerprint=lambda: _files_digest(paths, root), name=name, length=read.starts[-1], size=size)


def _from_folder(folder: Path, name: str, size: int | None) -> ImageData:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [(p, k) for k, c in enumerate(classes) for p in sorted((folder / c).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    labels: list[int] | None = [k for _, k in files]
    if not files:  # images without classes
        files, labels, classes = [(p, -1) for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES], None, []
    paths = [p for p, _ in files]
    return ImageData(
        lambda i: _decode(paths[i].read_bytes(), paths[i].name),
        labels,
        length=len(paths),
        name=name,
        size=size,
        fingerprint=lambda: _files_digest(paths, folder),
        classes=classes or None,
    )


def _from_npz(path: Path, name: str, image: str | None, label: str | None, size: int | None) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file[_pick(file.files, image, ("images", "image", "x"), "image", name)]
            has_label = label is not None or any(c in file.files for c in LABEL_COLUMNS)
            labels = file[_pick(file.files, label, LABEL_COLUMNS, "label", name)] if has_label else None
            ids = file["index"] if "index" in file.files else None
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{name} is not a readable .npz file",
            expected="arrays `images` and `labels`",
            received=str(error),
            remedy="write it with numpy.savez; object arrays are not read",
        ) from error
    data = from_arrays(images, labels, name=name, ids=ids)
    data._size = size
    return data


def load_data(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    image: str | None = None,
    label: str | None = None,
    size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> ImageData:
    """Images and labels of a file, a folder or a Hub data set.

    Args:
        source: `.npz` (`images` uint8, `labels`, optionally `index`), `.parquet`, a folder with parquet files, a folder
            of images in one subfolder per class (classes in alphabetical order), or `hf-hub:org/name@revision`.
        split: which parquet files: those whose name, or folder, begins with it.
        image, label: column or array names, where they are not the usual ones.
        size: resize the short side to `size * 256 / 224` and crop the centre to `size`.
        revision, token, cache_dir, local_files_only: for Hub data sets; the revision is resolved to a commit hash.

    Returns:
        The data, decoded index by index.

    Raises:
        InputError: nothing there, unknown columns, damaged files, wrong dtypes or ranges.
        HubError, IntegrityError: a Hub data set that cannot be had.
    """
    text = os.fspath(source)
    if is_hub_reference(text):
        hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only, repo_type="dataset")
        reference = hub.reference(text, revision)
        pattern = f"*{split}*.parquet" if split else "*.parquet"
        folder = hub.snapshot(reference, [pattern])
        name = f"hf-hub:{reference.repo_id}@{reference.revision}"
        return _from_parquet(_parquet_files(folder, split, name), folder, name, image, label, size)
    path = Path(text).expanduser()
    if path.is_dir():
        if next(path.rglob("*.parquet"), None) is not None:
            return _from_parquet(_parquet_files(path, split, path.name), path, path.name, image, label, size)
        return _from_folder(path, path.name, size)
    if not path.is_file():
        raise InputError(
            "No data there",
            expected=".npz, .parquet, a folder, or hf-hub:org/name@revision",
            received=text,
            remedy="check the path; Hub data sets are written hf-hub:org/name",
        )
    if path.suffix == ".parquet":
        return _from_parquet([path], path.parent, path.name, image, label, size)
    if path.suffix == ".npz":
        return _from_npz(path, path.name, image, label, size)
    raise InputError(
        "Unknown kind of data",
        expected=".npz, .parquet or a folder",
        received=path.suffix or path.name,
        remedy="convert it to one of these",
    )


def _parquet_files(folder: Path, split: str | None, name: str) -> list[Path]:
    paths = sorted(folder.rglob("*.parquet"))
    if split is not None:
        kept = [p for p in paths if any(part.startswith(split) for part in p.relative_to(folder).parts)]
    else:
        kept = paths
    splits = sorted({p.name.split("-")[0].split(".")[0] for p in paths})
    if not kept or (split is None and len(splits) > 1):
        raise InputError(
            f"{name} has several splits" if kept else f"{name} has no such split",
            expected=f"one of {splits}",
            received=repr(split),
            remedy="give split=",
        )
    return kept
