"""Parquet in the Hub's schema, from this machine's disk or read from the Hub piece by piece."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import InputError
from rsrouter.data.files import IMAGE_COLUMNS, LABEL_COLUMNS, decode, files_digest, names_digest, pick
from rsrouter.data.images import ImageData
from rsrouter.hub import Hub, Reference, explained


@dataclass(frozen=True)
class Source:
    """Parquet files that can be opened, wherever they are.

    Attributes:
        name: of the data set.
        names: of the files, in order.
        open: a file's name to what `pyarrow.parquet` reads.
        fingerprint: sha256 over names and contents.
        reading: wraps every access (turns the Hub client's errors into ours).
    """

    name: str
    names: tuple[str, ...]
    open: Callable[[str], Any]
    fingerprint: Callable[[], str]
    reading: Callable[[], Any] = contextlib.nullcontext


def local_source(paths: Sequence[Path], root: Path, name: str) -> Source:
    """Files on this machine."""
    names = tuple(p.relative_to(root).as_posix() for p in paths)
    return Source(name, names, lambda file: root / file, lambda: files_digest(paths, root))


def hub_source(hub: Hub, reference: Reference, split: str | None, name: str) -> Source:
    """Files of a Hub data set at one commit, of which only what is needed is fetched, and nothing is kept.

    Their fingerprint is that of downloaded files; it comes from the checksums that the Hub holds of them.
    """
    from huggingface_hub import HfApi, HfFileSystem, constants

    paths = parquet_files([PurePosixPath(f) for f in hub.files(reference) if f.endswith(".parquet")], split, name)
    names = tuple(p.as_posix() for p in paths)
    system = HfFileSystem(endpoint=constants.ENDPOINT, token=hub.token)

    def path_of(file: str) -> str:
        return f"{reference.repo_type}s/{reference.repo_id}@{reference.revision}/{file}"

    def reading() -> Any:
        return explained(reference.repo_id, reference.requested)

    def fingerprint() -> str:
        with reading():
            found = HfApi(library_name="rsrouter").get_paths_info(
                reference.repo_id, list(names), revision=reference.revision, repo_type=reference.repo_type, token=hub.token
            )
            checksums = {f.path: lfs.sha256 for f in found if (lfs := getattr(f, "lfs", None)) is not None}
            return names_digest((f, checksums.get(f) or hashlib.sha256(system.cat_file(path_of(f))).hexdigest()) for f in names)

    return Source(name, names, lambda file: system.open(path_of(file), "rb"), fingerprint, reading)


class RowGroups:
    """Encoded images of parquet files, one row group in memory at a time."""

    def __init__(self, source: Source, column: str) -> None:
        self._source, self._column = source, column
        self._groups: list[tuple[str, int]] = []
        self.starts = [0]
        for name in source.names:
            file = self._file(name)
            for group in range(file.num_row_groups):
                self._groups.append((name, group))
                self.starts.append(self.starts[-1] + file.metadata.row_group(group).num_rows)
        self._held: tuple[int, Any] = (-1, None)
        self._opened: tuple[str, Any] = ("", None)

    def _file(self, name: str) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self._source.open(name))

    def __call__(self, i: int) -> NDArray[np.uint8]:
        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        if self._held[0] != group:
            name, number = self._groups[group]
            with self._source.reading():
                if self._opened[0] != name:
                    self._opened = (name, self._file(name))
                self._held = (group, self._opened[1].read_row_group(number, columns=[self._column]).column(0))
        value = self._held[1][i - self.starts[group]].as_py()
        encoded = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(encoded, bytes):
            raise InputError(
                f"Row {i} holds no encoded image",
                expected="bytes, or {'bytes': ...} as on the Hub",
                received=type(encoded).__name__,
                remedy="store the images in the file, not as links",
            )
        return decode(encoded, f"row {i}")


def from_parquet(source: Source, image: str | None, label: str | None, size: int | None) -> ImageData:
    """The images of parquet files.

    Raises:
        InputError: unknown columns, damaged files.
        HubError: a Hub that is not reached.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = source.name
    try:
        with source.reading():
            schema = pq.read_schema(source.open(source.names[0]))
            image_column = pick(schema.names, image, IMAGE_COLUMNS, "image", name)
            has_label = label is not None or any(c in schema.names for c in LABEL_COLUMNS)
            labels = None
            if has_label:
                column = pick(schema.names, label, LABEL_COLUMNS, "label", name)
                parts = [pq.ParquetFile(source.open(file)).read(columns=[column]).column(0).to_numpy() for file in source.names]
                labels = np.concatenate(parts)
            read = RowGroups(source, image_column)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{name} is not readable parquet",
            expected="parquet with an image and a label column",
            received=str(error).splitlines()[0],
            remedy="fetch the file again",
        ) from error
    return ImageData(read, labels, fingerprint=source.fingerprint, name=name, length=read.starts[-1], size=size)


def parquet_files(paths: Sequence[PurePosixPath | Path], split: str | None, name: str) -> list[Any]:
    """Those files, named relative to the data set, that belong to a split.

    Raises:
        InputError: several splits and none named, or no such split.
    """
    paths = sorted(paths)
    if split is not None:
        kept = [p for p in paths if any(part.startswith(split) for part in p.parts)]
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
