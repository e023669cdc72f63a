"""Routing labels on disk: drawn in blocks and gone on with after a crash, or read from certification tables."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.core.types import ABSTAIN
from rsrouter.experts.pool import ExpertPool
from rsrouter.files import write_atomically
from rsrouter.results import align, read_table
from rsrouter.training.labels import Labels, target_radii

#: The kind of a file that holds tables' radii instead of votes.
TABLES = "routing-labels-tables"


def has_votes(path: Path, metadata: dict[str, Any]) -> bool:
    """Whether `path` holds the routing labels that `metadata` describe.

    Raises:
        ResultsError: it holds something else.
    """
    if not path.exists():
        return False
    found, _, _ = _read(path)
    if found != metadata:
        different = sorted(k for k in {*found, *metadata} if found.get(k) != metadata.get(k))
        raise ResultsError(
            "The file holds other labels",
            expected="a new file, or the same job to go on with",
            received=f"{path}: other {', '.join(different)}",
            remedy="choose another --out; nothing was overwritten",
        )
    return True


def save_votes(path: Path, votes: NDArray[np.int64], labels: NDArray[np.int64], metadata: dict[str, Any]) -> None:
    """Writes `votes (N, K, classes + 1)`, `labels (N,)` and their metadata, whole or not at all.

    Raises:
        ResultsError: the disk refuses.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, votes=votes, labels=labels, metadata=np.array(json.dumps(metadata)))
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise ResultsError(
            f"Cannot write {path}",
            expected="room on the disk and permission to write",
            received=str(error),
            remedy="make room and run the same command again: no vote is drawn twice",
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], NDArray[np.int64], NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["metadata"])), file["votes"].astype(np.int64), file["labels"].astype(np.int64)
    except (OSError, KeyError, ValueError) as error:
        raise _not_labels(path, error) from error


def _not_labels(path: Path, error: Exception) -> ResultsError:
    return ResultsError(
        "Not a file of routing labels",
        expected="an npz that `rsrouter label` wrote",
        received=f"{path}: {error}",
        remedy="label again, into a new file",
    )


def _check_experts(metadata: dict[str, Any], pool: ExpertPool) -> None:
    if metadata.get("digests") != [e.digest for e in pool]:
        raise ResultsError(
            "The labels were made with other experts",
            expected=str(list(pool.names)),
            received=str(metadata.get("experts")),
            remedy="label again with this pool",
        )


def load_votes(path: str | Path, pool: ExpertPool) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, Any]]:
    """Votes `(N, K, classes + 1)`, true classes `(N,)` and metadata of a file that `rsrouter.jobs.label_table` wrote.

    Raises:
        ResultsError: not such a file, unfinished, or made with other experts.
    """
    metadata, votes, labels = _read(Path(path))
    _check_experts(metadata, pool)
    if len(votes) != metadata["images"]:
        raise ResultsError(
            "The labels are unfinished",
            expected=f"{metadata['images']} images",
            received=str(len(votes)),
            remedy="run the same `rsrouter label` again; it goes on where it stopped",
        )
    return votes, labels, metadata


def labels_from_tables(paths: Sequence[str | Path]) -> tuple[NDArray[np.int64], NDArray[np.int64], Labels]:
    """Routing labels from certification tables, one per expert, in the pool's order; published tables will do.

    Args:
        paths: TSV tables `idx label predict radius correct time ...` of the same images (those that all of them hold).

    Returns:
        Image indices `(N,)`, true classes `(N,)`, and `Labels` (radius 0 where the table abstains or is wrong).

    Raises:
        InputError: tables without labels. ResultsError: tables that cannot be read or do not fit together.
    """
    tables = align([read_table(path) for path in paths], common=True)
    if not tables or not all(t.labelled for t in tables):
        raise InputError(
            "Routing labels need the true classes",
            expected="tables with a correct column of 0 and 1",
            received=str(list(paths)),
            remedy="certify labelled images",
        )
    right = np.stack([(t.correct == 1) & (t.predict != ABSTAIN) for t in tables], axis=1)
    radius = np.where(right, np.stack([t.radius for t in tables], axis=1), 0.0)
    return tables[0].idx, tables[0].label, Labels(radius, np.stack([t.predict for t in tables], axis=1))


def store_tables(
    pool: ExpertPool, paths: Sequence[str | Path], out: str | Path, *, unseen: bool | None = None
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Writes the routing labels that certification tables hold into an npz file, for `load_labels`.

    Args:
        pool: the experts, in the order of the tables.
        paths: see `labels_from_tables`.
        out: the file; it must not exist.
        unseen: as in `rsrouter.jobs.label_table`.

    Returns:
        The metadata, and every expert's mean radius `(K,)`.

    Raises:
        InputError: not one table for each expert, or tables without labels.
        ResultsError: `out` exists, or a table cannot be read.
    """
    path = Path(out)
    if len(paths) != len(pool):
        raise InputError(
            "Routing labels need one table for each expert",
            expected=f"{len(pool)} tables, for {', '.join(pool.names)}",
            received=str(len(paths)),
            remedy="--tables once per expert, in the order of their sigmas",
        )
    if path.exists():
        raise ResultsError("The file exists", expected="a new file", received=str(path), remedy="choose another --out")
    idx, target, labels = labels_from_tables(paths)
    metadata = {
        "kind": TABLES,
        "experts": list(pool.names),
        "sigmas": list(pool.sigmas),
        "digests": [e.digest for e in pool],
        "tables": [Path(p).name for p in paths],
        "unseen": unseen,
        "source": f"certification tables, rows {int(idx.min())} to {int(idx.max())}",
        "images": len(idx),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez_compressed(
        temporary, idx=idx, labels=target, radius=labels.radius, predict=labels.predict, metadata=np.array(json.dumps(metadata))
    )
    os.replace(temporary, path)
    return metadata, labels.radius.mean(0)


def load_labels(
    path: str | Path, pool: ExpertPool, rows: range | None = None, *, plan_n: int = 10_000, alpha: float = 1e-3
) -> tuple[Labels, NDArray[np.int64], dict[str, Any]]:
    """Routing labels, true classes `(N,)` and metadata of a file that `store_votes` or `store_tables` wrote.

    Args:
        path: the file.
        pool: the experts it was made with.
        rows: of tables: the images that are wanted, by their index in the tables; None: all.
        plan_n, alpha: of votes: the certification that the targets are for (`target_radii`).

    Raises:
        ResultsError: not such a file, unfinished, made with other experts, or tables that lack some of `rows`.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
            if metadata.get("kind") == TABLES:
                idx, target, radius, predict = (file[name] for name in ("idx", "labels", "radius", "predict"))
    except (OSError, KeyError, ValueError) as error:
        raise _not_labels(Path(path), error) from error
    if metadata.get("kind") != TABLES:
        votes, target, metadata = load_votes(path, pool)
        return target_radii(votes, target, pool.sigmas, plan_n=plan_n, alpha=alpha), target, metadata
    _check_experts(metadata, pool)
    if rows is not None:
        where = {int(i): position for position, i in enumerate(idx)}
        missing = [i for i in rows if i not in where]
        if missing:
            raise ResultsError(
                "The tables lack some of the images",
                expected=f"rows {rows.start} to {rows.stop - 1}",
                received=f"{len(missing)} of them missing, the first {missing[0]}",
                remedy="train on the images that the tables hold (--start, --count)",
            )
        chosen = np.array([where[i] for i in rows], dtype=np.int64)
        target, radius, predict = target[chosen], radius[chosen], predict[chosen]
    return Labels(radius, predict), target.astype(np.int64), metadata
