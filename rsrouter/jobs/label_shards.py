"""Shards of routing labels into one file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import ResultsError
from rsrouter.results.metadata import describe, differences
from rsrouter.training.label_files import has_votes, save_votes


def is_labels(path: Path) -> bool:
    """Whether a file is an archive, as `rsrouter label` writes them, and no table."""
    return path.is_file() and zipfile.is_zipfile(path)


def merge_labels(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Merges what `label_table` wrote for the shards of one job into the file that it writes for the whole, byte for byte.

    Args:
        paths: the shards' files, in any order; one that is named twice does no harm.
        out: where to write. Refused if it exists, unless it is the same result.

    Raises:
        ResultsError: no shards, files that are none, shards of different jobs (with what differs), shards that disagree,
            a missing shard, or `out` is taken.
    """
    out = Path(out)
    if not paths:
        raise ResultsError(
            "There is nothing to merge",
            expected="at least one shard of labels",
            received="none",
            remedy="name the files that `rsrouter label --shard` wrote",
        )
    parts: dict[int, tuple[Path, NDArray[np.int64], NDArray[np.int64]]] = {}
    job: dict[str, Any] = {}
    for path in map(Path, paths):
        metadata, votes, labels = _read_shard(path)
        index = metadata["shard"].pop("index")
        job = job or metadata
        # the number of its own images follows from the shard's index
        if found := differences(job, {**metadata, "images": job["images"]}):
            raise ResultsError(
                f"{path} belongs to another job than {paths[0]}",
                expected="shards of one job",
                received=describe(found),
                remedy="merge only shards of the same label command",
            )
        if index not in parts:
            parts[index] = path, votes, labels
        elif not (np.array_equal(parts[index][1], votes) and np.array_equal(parts[index][2], labels)):
            raise ResultsError(
                f"Two files hold shard {index} and disagree",
                expected=f"the votes of {parts[index][0]}",
                received=f"others in {path}",
                remedy="label this shard again; one of the files is damaged",
            )
    shard = job.pop("shard")
    missing = sorted(set(range(min(shard["count"], shard["images"]))) - set(parts))
    if missing:
        raise ResultsError(
            "Shards are missing",
            expected=f"all {shard['count']} shards",
            received=f"no shard {', '.join(map(str, missing[:20]))}",
            remedy="label them",
        )
    metadata = {**job, "images": shard["images"]}
    if has_votes(out, metadata):
        return out
    first = parts[0][1]
    votes, labels = np.zeros((shard["images"], *first.shape[1:]), dtype=np.int64), np.zeros(shard["images"], dtype=np.int64)
    for index, (_, drawn, classes) in parts.items():
        votes[index :: shard["count"]], labels[index :: shard["count"]] = drawn, classes
    out.parent.mkdir(parents=True, exist_ok=True)
    save_votes(out, votes, labels, metadata)
    return out


def _read_shard(path: Path) -> tuple[dict[str, Any], NDArray[np.int64], NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata, votes, labels = json.loads(str(file["metadata"])), file["votes"], file["labels"]
        shard = {key: int(metadata["shard"][key]) for key in ("index", "count", "images")}
        size = len(range(shard["index"], shard["images"], shard["count"]))
        if not 0 <= shard["index"] < shard["count"] or len(votes) != size or len(labels) != size:
            raise ValueError(f"{len(votes)} images in shard {shard}")
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ResultsError(
            f"{path} is not a shard of labels",
            expected="an npz that `rsrouter label --shard` wrote",
            received=f"{type(error).__name__}: {error}",
            remedy="label this shard again, into a new file",
        ) from error
    return metadata, votes, labels
