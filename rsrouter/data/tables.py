"""Parquet in the Hub's schema and arrow files of `datasets`, from this machine or from the Hub piece by piece."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsrouter.core.errors import InputError, RSRouterError
from rsrouter.data.columns import Reading, class_indices, class_names, features_of, find_image, find_label, of_type
from rsrouter.data.digests import files_digest, names_digest, with_labels
from rsrouter.data.images import ImageData, Origin
from rsrouter.data.pictures import PROBED, Pictures, UnreadableError
from rsrouter.hub import Hub, Reference, explained
from rsrouter.inputs import printable


@dataclass(frozen=True)
class Source:
    """Parquet or arrow files that can be opened, wherever they are.

    Attributes:
        name: of the data set.
        names: of the files, in order.
        open: a file's name to what `pyarrow` reads.
        fingerprint: sha256 over names and contents.
        reading: wraps every access (turns the Hub client's errors into ours).
    """

    name: str
    names: tuple[str, ...]
    open: Callable[[str], Any]
    fingerprint: Callable[[], str]
    reading: Callable[[], Any] = contextlib.nullcontext

    @property
    def kind(self) -> str:
        """parquet or arrow."""
        return "arrow" if self.names[0].endswith((".arrow", ".feather")) else "parquet"


def local_source(paths: Sequence[Path], root: Path, name: str) -> Source:
    """Files on this machine."""
    names = tuple(p.relative_to(root).as_posix() for p in paths)
    return Source(name, names, lambda file: root / file, lambda: files_digest(paths, root))


def hub_source(hub: Hub, reference: Reference, names: Sequence[str], name: str) -> Source:
    """Files of a Hub data set at one commit, of which only what is needed is fetched, and nothing is kept.

    Their fingerprint is that of downloaded files; it comes from the checksums that the Hub holds of them.
    """
    from huggingface_hub import HfApi, HfFileSystem, constants

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

    return Source(name, tuple(names), lambda file: system.open(path_of(file), "rb"), fingerprint, reading)


@contextlib.contextmanager
def _damage(source: Source, file: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        with source.reading():
            yield
    except RSRouterError:
        raise
    except (pa.ArrowException, OSError, EOFError, LookupError, ValueError, MemoryError) as error:
        raise InputError(
            f"{printable(source.name)} is not readable {source.kind}",
            expected=f"{source.kind} with an image and a label column",
            received=f"{printable(file)}: {(str(error).splitlines() or [type(error).__name__])[0]}"[:300],
            remedy="fetch the file again",
        ) from error


class Tables:
    """Columns of several files, one row group (or arrow file, which is mapped into memory) at a time.

    Args:
        source: the files; each must have the columns of the first.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._groups: list[tuple[str, int]] = []
        self.starts = [0]
        self.schema: Any = None
        for name in source.names:
            with _damage(source, name):
                file = self._file(name)
                schema = file.schema if source.kind == "arrow" else file.schema_arrow
                self.schema = schema if self.schema is None else self.schema
                if schema.names != self.schema.names and set(schema.names) != set(self.schema.names):
                    raise InputError(
                        f"The files of {printable(source.name)} have different columns",
                        expected=printable(", ".join(self.schema.names)),
                        received=printable(f"{', '.join(schema.names)} in {name}"),
                        remedy="read them apart, or mend that file",
                    )
                for group in range(1 if source.kind == "arrow" else file.num_row_groups):
                    rows = file.num_rows if source.kind == "arrow" else file.metadata.row_group(group).num_rows
                    self._groups.append((name, group))
                    self.starts.append(self.starts[-1] + rows)
        self._held: tuple[int, Any] = (-1, None)
        self._opened: tuple[str, Any] = ("", None)

    def _file(self, name: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.source.kind == "parquet":
            return pq.ParquetFile(self.source.open(name))
        opened = self.source.open(name)
        mapped = pa.memory_map(str(opened)) if isinstance(opened, Path) else opened
        try:
            table = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(mapped).read_all()
        table.validate(full=True)  # what is mapped is not checked while it is read
        return table

    def column(self, name: str) -> list[Any]:
        """A whole column, as one array a file."""
        parts = []
        for file in self.source.names:
            with _damage(self.source, file):
                table = self._file(file)
                parts.append(table.column(name) if self.source.kind == "arrow" else table.read(columns=[name]).column(name))
        return parts

    def where(self, i: int) -> str:
        """Names row i."""
        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        name, _ = self._groups[group]
        first = next(k for k, (file, _) in enumerate(self._groups) if file == name)
        return printable(f"row {i - self.starts[first]} of {name} in {self.source.name}")

    def value(self, column: str, i: int) -> Any:
        """One cell."""
        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        if self._held[0] != group:
            name, number = self._groups[group]
            with _damage(self.source, name):
                if self._opened[0] != name:
                    self._opened = (name, self._file(name))
                table = self._opened[1]
                if self.source.kind == "parquet":
                    table = table.read_row_group(number, columns=[column])
                self._held = (group, table.column(column))
        with _damage(self.source, self._groups[group][0]):
            return self._held[1][i - self.starts[group]].as_py()


def from_tables(
    source: Source, reading: Reading, *, names: Mapping[str, tuple[str, ...]] | None = None, config: str | None = None
) -> ImageData:
    """The images of parquet or arrow files.

    Args:
        source: the files.
        reading: columns, and how images are read.
        names: class names by column, where the files do not hold them.
        config: for the record.

    Raises:
        InputError: unknown columns, damaged files, labels of another kind.
        HubError: a Hub that is not reached.
    """
    name = source.name
    tables = Tables(source)
    with _damage(source, source.names[0]):
        columns, features = list(tables.schema.names), features_of(tables.schema.metadata)
        image = find_image(columns, reading.image, name, [*of_type(features, "Image"), *_encoded(tables.schema)])
        label = find_label(columns, image, reading.label, name, of_type(features, "ClassLabel"))
        labels, classes = None, None
        if label is not None:
            known = class_names(features, label) or (names or {}).get(label)
            labels, classes = class_indices(_label_values(tables, label), known, reading, name)

    def fetch(i: int) -> bytes:
        value = tables.value(image, i)
        encoded = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(encoded, bytes):
            raise UnreadableError(
                f"{tables.where(i)} holds no encoded image",
                expected="bytes, or {'bytes': ...} as on the Hub",
                received="nothing" if encoded is None and not isinstance(value, Mapping) else _kind(value),
                remedy="store the images in the file, not as links",
            )
        return encoded

    probe = range(min(PROBED, tables.starts[1] if len(tables.starts) > 1 else 0))
    return ImageData(
        Pictures(fetch, tables.where, probe, reading.channels),
        labels,
        fingerprint=lambda: with_labels(source.fingerprint(), labels),
        name=printable(name),
        length=tables.starts[-1],
        classes=classes,
        reading=reading,
        origin=Origin(source.kind, config=config, split=reading.split, image=image, label=label),
        who=tables.where,
    )


def _kind(value: Any) -> str:
    return "a link" if isinstance(value, Mapping) and isinstance(value.get("path"), str) else type(value).__name__


def _encoded(schema: Any) -> list[str]:
    import pyarrow as pa

    def holds(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [field.name for field in schema if holds(field.type)]


def _label_values(tables: Tables, label: str) -> Any:
    import pyarrow as pa

    parts = tables.column(label)
    missing = sum(part.null_count for part in parts)
    types = {str(part.type.value_type if pa.types.is_dictionary(part.type) else part.type) for part in parts}
    if missing or len({t.removeprefix("large_") if "string" in t else "int" if "int" in t else t for t in types}) > 1:
        raise InputError(
            f"The labels of {printable(tables.source.name)} are not all of one kind",
            expected="a class for every image (-1 for none)",
            received=f"{missing} missing values in column {label!r}" if missing else f"types {', '.join(sorted(types))}",
            remedy="complete the column, or name another: label= (--label)",
        )
    values = [(p.cast(p.type.value_type) if pa.types.is_dictionary(p.type) else p).to_numpy() for p in parts]
    return np.concatenate(values) if values else np.zeros(0, dtype=np.int64)
