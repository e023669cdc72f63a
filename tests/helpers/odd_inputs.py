"""Small inputs as people have them, built in a folder: pictures in every mode, folders, tables, shards."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

RAMP = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)


def encoded(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def gray(value: int = 7, kind: str = "PNG", mode: str = "L") -> bytes:
    return encoded(Image.new(mode, (8, 8), value), kind)


def colour(red: int = 200, kind: str = "PNG") -> bytes:
    return encoded(Image.new("RGB", (8, 8), (red, 20, 30)), kind)


def rotated(orientation: int = 6) -> bytes:
    """White above, black below, to be turned."""
    array = np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(array, "PNG", exif=exif)


def deep_colour() -> bytes:
    """An RGB PNG of 16 bits a value, which Pillow does not write."""
    rows = b"".join(b"\0" + (np.arange(24) * 1000).astype(">u2").tobytes() for _ in range(8))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tree(root: Path, files: dict[str, bytes | str | None]) -> Path:
    """Files below a folder; None makes a folder."""
    for name, content in files.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def pets(root: Path, **more: bytes | str | None) -> Path:
    """Two classes of one picture each, and what else is named (`__` is a slash, `_dot_` a dot)."""
    named = {k.replace("__", "/").replace("_dot_", "."): v for k, v in more.items()}
    return tree(root, {"cat/a.png": gray(1), "dog/a.png": gray(2), **named})


def one(root: Path, content: bytes, name: str = "x/a.png") -> Path:
    """One class with one picture."""
    return tree(root, {name: content})


def table(at: Path, images: list[Any] | None = None, /, **columns: Any) -> Path:
    """Parquet in the Hub's schema: `img`, unless a column `image` is given."""
    at.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {} if images is None else {"img": [{"bytes": b, "path": None} for b in images]}
    pq.write_table(pa.table({**data, **columns}), at)
    return at


def features(path: Path, names: list[str], column: str = "label") -> Path:
    """Parquet with the column types that `datasets` writes."""
    info = {"info": {"features": {"img": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}}}
    content = pa.table({"img": [{"bytes": gray(k), "path": None} for k in range(2)], column: [0, 1]})
    pq.write_table(content.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    return path


def saved(root: Path, names: list[str] | None = None, **state: Any) -> Path:
    """What `Dataset.save_to_disk` writes."""
    root.mkdir(parents=True, exist_ok=True)
    info = {"info": {"features": {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    content = pa.table({"img": [{"bytes": gray(k), "path": None} for k in range(2)], "label": [0, 1]})
    content = content.replace_schema_metadata({"huggingface": json.dumps(info)} if names else None)
    with pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
        stream.write_table(content)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], **state}))
    return root


def shard(path: Path, files: dict[str, bytes | None], mode: str = "w") -> Path:
    """A tar file; None makes a pipe in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            member.type = tarfile.FIFOTYPE if content is None else tarfile.REGTYPE
            tar.addfile(member, None if content is None else io.BytesIO(content))
    return path


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def idx(root: Path, split: str = "train", count: int = 2, labels: bool = True, packed: bool = False, cut: int = 0) -> Path:
    """MNIST's files."""
    pixels = np.arange(count, dtype=np.uint8).repeat(64) * 9
    content = bytes([0, 0, 8, 3]) + struct.pack(">III", count, 8, 8) + pixels.tobytes()
    second = bytes([0, 0, 8, 1]) + struct.pack(">I", count) + bytes(range(count))
    root.mkdir(parents=True, exist_ok=True)
    for kind, data in (("images-idx3", content[: len(content) - cut]), *((("labels-idx1", second),) if labels else ())):
        name = f"{split}-{kind}-ubyte" + (".gz" if packed else "")
        (root / name).write_bytes(gzip.compress(data) if packed else data)
    return root


def pipe(root: Path, name: str) -> Path:
    """A folder of two classes with a named pipe in it."""
    pets(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(root / name)
    return root


@dataclass(frozen=True)
class Read:
    labels: list[int]
    classes: tuple[str, ...] | None = None
    first: list[int] | None = None  # of the first image, in 1/255
    shape: tuple[int, int, int] | None = None
    warns: str = ""


@dataclass(frozen=True)
class Case:
    build: Callable[[Path], Any]
    outcome: Read | str
    options: dict[str, Any] = field(default_factory=dict)


def case(build: Callable[[Path], Any], outcome: Read | str, **options: Any) -> Case:
    return Case(build, outcome, options)
