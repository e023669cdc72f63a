"""One function for every source of data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from rsrouter.core.errors import HubError, InputError
from rsrouter.data.arrays import from_idx, from_npz, idx_files
from rsrouter.data.columns import Reading
from rsrouter.data.dataset_card import DatasetCard, read_card
from rsrouter.data.folders import Found, from_folder, scan
from rsrouter.data.images import ImageData
from rsrouter.data.objects import from_object
from rsrouter.data.pictures import FOREIGN, SUFFIXES
from rsrouter.data.splits import choose, choose_files, synonyms
from rsrouter.data.tables import from_tables, hub_source, local_source
from rsrouter.data.tars import from_tars
from rsrouter.hub import Hub, Reference, is_hub_reference
from rsrouter.inputs import printable
from rsrouter.stored import read_bytes, read_json

TABLES = (".parquet", ".arrow", ".feather")
PLACES = ".npz, .parquet, .arrow, .tar, a picture, a folder, or hf-hub:org/name@revision"


def load_data(
    source: Any,
    *,
    split: str | None = None,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    channels: int | None = None,
    skip_unreadable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    stream: bool = False,
) -> ImageData:
    """Images and labels of a file, a folder, a Hub data set, or an object in memory.

    Args:
        source: `.npz` (`images`, `labels`, optionally `index`), MNIST's idx files, `.parquet`, what `datasets` saves to disk,
            WebDataset `.tar`, a picture, or a folder of any of these; a folder of pictures with one subfolder per class
            (below `train/`, `test/` where there are splits), or with `metadata.jsonl`; `hf-hub:org/name@revision`; or arrays,
            PIL images, a `datasets.Dataset`, a torch data set or loader.
        split, config: which part, where there are several.
        image, label: columns or arrays, where they are not called as usual; `label="none"` takes images without labels.
        classes: class names in the experts' order; default: that of the source, or alphabetical (numbers count as numbers).
        size: resize the short side to `size * 256 / 224` and crop the centre to `size`.
        channels: 1 or 3; default: 1 where all pictures are gray, else 3.
        skip_unreadable: leave out pictures that cannot be decoded (`ImageData.readable`), and record which.
        stream: read a Hub data set piece by piece, as images are asked for, and keep no copy of it.
        revision, token, cache_dir, local_files_only: for Hub data sets; the revision is resolved to a commit hash.

    Returns:
        The data, decoded index by index.

    Raises:
        InputError: nothing there, unknown columns, several splits and none named, damaged files, wrong dtypes or ranges.
        HubError, IntegrityError: a Hub data set that cannot be had.

    >>> import numpy as np
    >>> load_data((np.zeros((2, 28, 28), np.uint8), ["cat", "dog"])).classes
    ('cat', 'dog')
    """
    reading = Reading(split, config, image, label, _names(classes), size, _channels(channels), bool(skip_unreadable))
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= 1 << 14):
        raise InputError(
            "This size cannot be used", expected="a whole number of pixels", received=repr(size), remedy="such as size=224"
        )
    if not isinstance(source, str | os.PathLike):
        return from_object(source, reading)
    text = os.fsdecode(os.fspath(source))
    if is_hub_reference(text):
        hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only, repo_type="dataset")
        return _from_hub(hub, hub.reference(text, revision), reading, stream and not local_files_only)
    if stream:
        raise InputError(
            "Only Hub data sets are streamed",
            expected="hf-hub:org/name@revision",
            received=printable(text),
            remedy="leave stream out: files on this machine are read image by image anyway",
        )
    path = _expanded(text)
    name = printable(path.name or path)
    if path.is_dir():
        return _from_directory(path, name, reading, _local_card(path))
    if not path.is_file():
        there = "a pipe or device, which is never opened" if path.exists() else "nothing there"
        raise InputError(
            "No data there",
            expected=PLACES,
            received=f"{printable(text)}: {there}",
            remedy="check the path; Hub data sets are written hf-hub:org/name",
        )
    return _from_file(path, name, reading)


def _names(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, str) or not all(isinstance(c, str) for c in classes) or not len(classes):
        raise InputError(
            "Class names must be a list of text",
            expected="a list of text",
            received=repr(classes)[:80],
            remedy="such as ['cat', 'dog']",
        )
    return tuple(classes)


def _channels(channels: int | None) -> int | None:
    if channels not in (None, 1, 3) or isinstance(channels, bool):
        raise InputError(
            "This number of channels cannot be used", expected="1 or 3", received=repr(channels), remedy="leave them out"
        )
    return channels


def _expanded(text: str) -> Path:
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, no such home
        raise InputError(
            "No data there", expected=PLACES, received=f"{printable(text)[:200]}: {error}", remedy="check the path"
        ) from error
    return path


def _from_file(path: Path, name: str, reading: Reading) -> ImageData:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return from_npz(path, name, reading)
    if idx_files([path]):
        _whole(reading, name)
        return from_idx(path, name, reading)
    if suffix in TABLES:
        _whole(reading, name)
        return from_tables(local_source([path], path.parent, name), reading)
    if suffix == ".tar":
        _whole(reading, name)
        return from_tars([path], path.parent, name, reading)
    if suffix in SUFFIXES:
        return from_folder(path.parent, Found(pictures=[Path(path.name)]), name, replace(reading, label="none"))
    remedies = {
        ".npy": "numpy.savez(file, images=..., labels=...)",
        ".zip": "unpack it",
        ".gz": "unpack it",
        ".tgz": "unpack it to .tar",
        ".pkl": "pickles are never loaded; write npz or parquet",
        ".pt": "load it and give the tensors, or write npz",
    }
    raise InputError(
        "Unknown kind of data",
        expected=PLACES,
        received=printable(path.name),
        remedy=remedies.get(suffix, "convert it to one of these"),
    )


def _whole(reading: Reading, name: str) -> None:
    """A single file has no parts."""
    if reading.split is not None or reading.config is not None:
        choose("split", reading.split or reading.config, [], name)


def _local_card(root: Path) -> DatasetCard:
    card = root / "README.md"
    if not card.is_file():
        return DatasetCard()
    with contextlib.suppress(InputError):
        return read_card(read_bytes(card, "README.md").decode("utf-8", "replace"))
    return DatasetCard()


def _from_directory(root: Path, name: str, reading: Reading, card: DatasetCard) -> ImageData:
    if (root / "dataset_dict.json").is_file():
        listed = read_json(root / "dataset_dict.json", f"dataset_dict.json of {name}", remedy="save the data set again")
        splits = listed.get("splits") if isinstance(listed, dict) else None
        there = sorted(s for s in splits if isinstance(s, str) and (root / s).is_dir()) if isinstance(splits, list) else []
        split = choose("split", reading.split, there, name)
        return _saved(root / split, root, f"{name}/{split}", replace(reading, split=split))
    if (root / "state.json").is_file():
        _whole(reading, name)
        return _saved(root, root, name, reading)
    found = scan(root)
    tables = [p for p in found.others if p.suffix.lower() in TABLES and p.name != "metadata.parquet"]
    tars = [p for p in found.others if p.suffix.lower() == ".tar"]
    idx = idx_files([root / p for p in found.others if len(p.parts) == 1])
    kinds = [k for k, files in (("parquet or arrow", tables), ("tar", tars), ("idx", idx), ("pictures", found.pictures)) if files]
    if len(kinds) > 1:
        raise InputError(
            f"{name} holds data of several kinds",
            expected="one kind of file",
            received=" and ".join(kinds),
            remedy="name the file, or the folder that holds only the data",
        )
    if tables or tars:
        files, config, split = choose_files(tables or tars, reading.split, reading.config, name, card.files)
        chosen, reading = [root / p for p in files], replace(reading, split=split or None)
        if tars:
            return from_tars(chosen, root, name, reading)
        return from_tables(local_source(chosen, root, name), reading, names=card.names, config=config)
    if idx:
        split = choose("split", reading.split, sorted(idx), name)
        return from_idx(idx[split], f"{name}/{split}", replace(reading, split=split))
    if reading.config is not None:
        choose("configuration", reading.config, [], name)
    if not found.pictures and (
        other := [p for p in found.others if p.suffix.lower() in FOREIGN or p.suffix.lower() in (".zip", ".bin", ".gz")]
    ):
        raise InputError(
            "The data set is empty",
            expected=PLACES,
            received=printable(f"{len(other)} files such as {other[0]}"),
            remedy="convert or unpack them",
        )
    return from_folder(root, found, name, reading)


def _saved(folder: Path, root: Path, name: str, reading: Reading) -> ImageData:
    """What `datasets` saves to disk."""
    state = read_json(folder / "state.json", f"state.json of {name}", remedy="save the data set again")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    files = [folder / n for n in names if isinstance(n, str) and PurePosixPath(n).name == n]
    if not files or len(files) < len(names) or not all(f.is_file() for f in files):
        raise InputError(
            f"{name} is not a saved data set",
            expected="state.json that names .arrow files beside it",
            received=printable(repr(names))[:120],
            remedy="save the data set again with save_to_disk",
        )
    return from_tables(local_source(files, root, name), reading)


def _from_hub(hub: Hub, reference: Reference, reading: Reading, stream: bool) -> ImageData:
    name = f"hf-hub:{reference.repo_id}@{reference.revision}"
    card = DatasetCard()
    try:
        if (readme := hub.try_fetch(reference, "README.md")) is not None:
            card = read_card(read_bytes(readme, "README.md").decode("utf-8", "replace"))
    except HubError:
        if not hub.local_files_only:
            raise
    if stream:
        paths = [PurePosixPath(f) for f in hub.files(reference) if f.endswith(".parquet")]
        if not paths:
            raise InputError(
                f"{name} holds no parquet",
                expected="parquet, which can be read in pieces",
                received="other files",
                remedy="leave stream out",
            )
        files, config, split = choose_files(paths, reading.split, reading.config, name, card.files)
        source = hub_source(hub, reference, [p.as_posix() for p in files], name)
        return from_tables(source, replace(reading, split=split or None), names=card.names, config=config)
    patterns = [f"*{s}*{kind}" for s in (synonyms(reading.split) if reading.split else ("",)) for kind in TABLES[:2]]
    if card.files:
        patterns = _declared(card, reading, name)
    folder = hub.snapshot(reference, patterns)
    if (
        not any(p.suffix in (*TABLES, ".tar") or p.suffix.lower() in SUFFIXES for p in folder.rglob("*"))
        and not hub.local_files_only
    ):
        listed = hub.files(reference)
        kinds = {PurePosixPath(f).suffix.lower() for f in listed}
        if not kinds & {*SUFFIXES, *TABLES, ".tar"}:
            raise InputError(
                f"{name} holds no images that can be read",
                expected="parquet, arrow, tar or pictures",
                received=printable(", ".join(listed[:6])) or "no files",
                remedy=f"hf-hub:{reference.repo_id}@refs/convert/parquet, where the Hub keeps a copy in parquet",
            )
        wanted = (
            (".tar",) if ".tar" in kinds else TABLES if kinds & set(TABLES) else (*SUFFIXES, "metadata.jsonl", "metadata.csv")
        )
        folder = hub.snapshot(reference, [f for f in listed if f.lower().endswith(wanted)])
    if any(p.suffix in (*TABLES, ".tar") for p in folder.rglob("*")) or not (folder / "data").is_dir():
        return _from_directory(folder, name, reading, card)
    return _from_directory(folder / "data", name, reading, card)


def _declared(card: DatasetCard, reading: Reading, name: str) -> list[str]:
    """Patterns of the files that the card declares for a split."""
    configs = sorted(card.files)
    config = (
        "default" if reading.config is None and "default" in configs else choose("configuration", reading.config, configs, name)
    )
    parts = card.files[config]
    return parts[choose("split", reading.split, sorted(parts), name)]
