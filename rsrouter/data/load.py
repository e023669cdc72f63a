"""One function for every source of data."""

from __future__ import annotations

import os
from pathlib import Path

from rsrouter.core.errors import InputError
from rsrouter.data.files import from_folder, from_npz
from rsrouter.data.images import ImageData
from rsrouter.data.parquet import from_parquet, hub_source, local_source, parquet_files
from rsrouter.hub import Hub, is_hub_reference


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
    stream: bool = False,
) -> ImageData:
    """Images and labels of a file, a folder or a Hub data set.

    Args:
        source: `.npz` (`images` uint8, `labels`, optionally `index`), `.parquet`, a folder with parquet files, a folder
            of images in one subfolder per class (classes in alphabetical order), or `hf-hub:org/name@revision`.
        split: which parquet files: those whose name, or folder, begins with it.
        image, label: column or array names, where they are not the usual ones.
        size: resize the short side to `size * 256 / 224` and crop the centre to `size`.
        stream: read a Hub data set piece by piece, as images are asked for, and keep no copy of it.
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
        name = f"hf-hub:{reference.repo_id}@{reference.revision}"
        if stream and not local_files_only:
            return from_parquet(hub_source(hub, reference, split, name), image, label, size)
        pattern = f"*{split}*.parquet" if split else "*.parquet"
        return _parquet_folder(hub.snapshot(reference, [pattern]), split, name, image, label, size)
    if stream:
        raise InputError(
            "Only Hub data sets are streamed",
            expected="hf-hub:org/name@revision",
            received=text,
            remedy="leave stream out: files on this machine are read image by image anyway",
        )
    path = Path(text).expanduser()
    if path.is_dir():
        if next(path.rglob("*.parquet"), None) is not None:
            return _parquet_folder(path, split, path.name, image, label, size)
        return from_folder(path, path.name, size)
    if not path.is_file():
        raise InputError(
            "No data there",
            expected=".npz, .parquet, a folder, or hf-hub:org/name@revision",
            received=text,
            remedy="check the path; Hub data sets are written hf-hub:org/name",
        )
    if path.suffix == ".parquet":
        return from_parquet(local_source([path], path.parent, path.name), image, label, size)
    if path.suffix == ".npz":
        return from_npz(path, path.name, image, label, size)
    raise InputError(
        "Unknown kind of data",
        expected=".npz, .parquet or a folder",
        received=path.suffix or path.name,
        remedy="convert it to one of these",
    )


def _parquet_folder(
    folder: Path, split: str | None, name: str, image: str | None, label: str | None, size: int | None
) -> ImageData:
    chosen = parquet_files([p.relative_to(folder) for p in folder.rglob("*.parquet")], split, name)
    return from_parquet(local_source([folder / p for p in chosen], folder, name), image, label, size)
