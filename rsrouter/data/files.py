"""Folders of images and `.npz` files."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import InputError
from rsrouter.data.images import ImageData, from_arrays

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "y")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")


def decode(encoded: bytes, who: str) -> NDArray[np.uint8]:
    """An encoded image as `(C, H, W)`, gray or RGB; InputError for bytes that are none."""
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


def files_digest(paths: Sequence[Path], root: Path) -> str:
    """sha256 over names and contents; several files are read at a time."""
    with ThreadPoolExecutor(4) as pool:
        return names_digest(zip((p.relative_to(root).as_posix() for p in paths), pool.map(_file_digest, paths), strict=True))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names_digest(files: Iterable[tuple[str, str]]) -> str:
    """sha256 over `(name, sha256 of the content)` of several files."""
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def pick(columns: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, where: str) -> str:
    """The column that was asked for, or the first usual one; InputError where there is none."""
    candidates = [wanted] if wanted else [c for c in usual if c in columns]
    if not candidates or candidates[0] not in columns:
        raise InputError(
            f"{where} has no {what} column that is known",
            expected=wanted or f"one of {list(usual)}",
            received=str(list(columns)),
            remedy=f"give {what}=",
        )
    return candidates[0]


def from_folder(folder: Path, name: str, size: int | None) -> ImageData:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [(p, k) for k, c in enumerate(classes) for p in sorted((folder / c).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    labels: list[int] | None = [k for _, k in files]
    if not files:  # images without classes
        files, labels, classes = [(p, -1) for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES], None, []
    paths = [p for p, _ in files]
    return ImageData(
        lambda i: decode(paths[i].read_bytes(), paths[i].name),
        labels,
        length=len(paths),
        name=name,
        size=size,
        fingerprint=lambda: files_digest(paths, folder),
        classes=classes or None,
    )


def from_npz(path: Path, name: str, image: str | None, label: str | None, size: int | None) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file[pick(file.files, image, ("images", "image", "x"), "image", name)]
            has_label = label is not None or any(c in file.files for c in LABEL_COLUMNS)
            labels = file[pick(file.files, label, LABEL_COLUMNS, "label", name)] if has_label else None
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
