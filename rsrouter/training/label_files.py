"""Routing labels on disk: votes that `rsrouter label` drew, or the radii of certification tables."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.budget import largest_radius
from rsrouter.core.errors import InputError, ResultsError
from rsrouter.core.types import ABSTAIN
from rsrouter.experts.pool import ExpertPool
from rsrouter.files import write_atomically
from rsrouter.inputs import check_labels
from rsrouter.results import Table, align, read_table
from rsrouter.training.labels import Labels, target_radii
from rsrouter.training.resume import writing

#: The kind of a file that holds tables' radii instead of votes.
TABLES = "routing-labels-tables"
#: Votes behind a published table, where nothing else is said.
TABLE_VOTES = 100_000
#: Published tables round radii to three digits.
ROUNDING = 1.005


def has_votes(path: Path, metadata: dict[str, Any]) -> bool:
    """Whether `path` holds the routing labels that `metadata` describe.

    Raises:
        ResultsError: it holds something else.
    """
    if not path.exists():
        return False
    found, _ = _read(path, "votes")
    if found != metadata:
        different = sorted(k for k in {*found, *metadata} if found.get(k) != metadata.get(k))
        raise ResultsError(
            "The file holds other labels",
            expected="a new file, or the same job to resume",
            received=f"{path}: other {', '.join(different)}",
            remedy="choose another --out; nothing was overwritten",
        )
    return True


def save_votes(path: Path, votes: NDArray[np.int64], labels: NDArray[np.int64], metadata: dict[str, Any]) -> None:
    """Writes `votes (N, K, classes + 1)`, `labels (N,)` and their metadata, whole or not at all.

    Raises:
        ResultsError: the disk refuses.
    """
    _save(path, metadata, votes=votes, labels=labels)


def _save(path: Path, metadata: dict[str, Any], **arrays: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, metadata=np.array(json.dumps(metadata)), **arrays)  # type: ignore[arg-type]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())


def _read(path: Path, *names: str) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Metadata and arrays; without names, those of the file's kind."""
    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"]))
            kind = metadata.get("kind")
            names = names or (("idx", "labels", "radius", "predict") if kind == TABLES else ("votes", "labels"))
            return metadata, [file[name] for name in names]
    except (OSError, EOFError, KeyError, ValueError, AttributeError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise ResultsError(
            "Not a file of routing labels",
            expected="an npz that `rsrouter label` wrote",
            received=f"{path}: {error}",
            remedy="label again, into a new file",
        ) from error


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
    metadata, (votes, labels) = _read(Path(path), "votes", "labels")
    _check_experts(metadata, pool)
    if len(votes) != metadata.get("images"):
        raise ResultsError(
            "The labels are unfinished",
            expected=f"{metadata.get('images')} images",
            received=str(len(votes)),
            remedy="run the same `rsrouter label` again; it resumes where it stopped",
        )
    return votes.astype(np.int64), labels.astype(np.int64), metadata


def labels_from_tables(paths: Sequence[str | Path]) -> tuple[NDArray[np.int64], NDArray[np.int64], Labels]:
    """Routing labels from certification tables, one per expert, in the pool's order; published tables will do.

    Args:
        paths: TSV tables `idx label predict radius correct time ...` of the same images (those that all of them hold).

    Returns:
        Image indices `(N,)`, true classes `(N,)`, and `Labels` (radius 0 where the table abstains or is wrong).

    Raises:
        InputError: tables without labels. ResultsError: tables that cannot be read or do not fit together.
    """
    return _labels_of([read_table(path) for path in paths])


def _labels_of(read: Sequence[Table]) -> tuple[NDArray[np.int64], NDArray[np.int64], Labels]:
    tables = align(read, common=True)
    if not tables or not all(t.labelled for t in tables):
        raise InputError(
            "Routing labels need the true classes",
            expected="tables with a correct column of 0 and 1",
            received=str([t.name for t in tables]),
            remedy="certify labelled images",
        )
    right = np.stack([(t.correct == 1) & (t.predict != ABSTAIN) for t in tables], axis=1)
    radius = np.where(right, np.stack([t.radius for t in tables], axis=1), 0.0)
    return tables[0].idx, tables[0].label, Labels(radius, np.stack([t.predict for t in tables], axis=1))


def store_tables(
    pool: ExpertPool,
    tables: Mapping[str, str | Path],
    out: str | Path,
    *,
    n: int = TABLE_VOTES,
    alpha: float = 1e-3,
    unseen: bool | None = None,
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Writes the routing labels that certification tables hold into an npz file, for `load_labels`.

    Args:
        pool: the experts.
        tables: each expert's table (see `labels_from_tables`), by the expert's name.
        out: the file; it must not exist.
        n, alpha: votes and failure probability behind the tables: no radius may be larger than unanimous votes reach.
        unseen: as in `rsrouter.jobs.label_table`.

    Returns:
        The metadata, and every expert's mean radius `(K,)`.

    Raises:
        InputError: not one table for each expert, tables without labels, classes outside the pool's, or a radius that the
            expert cannot reach (another expert's table, or more votes).
        ResultsError: `out` exists, or a table cannot be read.
    """
    path = Path(out)
    if sorted(tables) != sorted(pool.names):
        raise InputError(
            "Routing labels need one table for each expert",
            expected=f"a table for each of {', '.join(pool.names)}",
            received=", ".join(map(str, tables)) or "none",
            remedy=" ".join(f"--tables {name}=PATH" for name in pool.names),
        )
    if path.exists():
        raise ResultsError("The file exists", expected="a new file", received=str(path), remedy="choose another --out")
    read = [read_table(tables[name]) for name in pool.names]
    for expert, table in zip(pool, read, strict=True):
        most, found = largest_radius(expert.sigma, n, alpha), float(table.radius.max(initial=0.0))
        if found > most * ROUNDING:
            fitting = [e.name for e in pool if found <= largest_radius(e.sigma, n, alpha) * ROUNDING]
            raise InputError(
                f"{tables[expert.name]} cannot be the table of {expert.name}",
                expected=f"radii of at most {most:.3f}: sigma {expert.sigma:g}, {n:,} votes, alpha {alpha:g}",
                received=f"a radius of {found:.3f}",
                remedy=(f"it may belong to {' or '.join(fitting)}" if fitting else "name the expert that it belongs to")
                + ", or say how many votes it was made with (--n, --alpha)",
            )
        if (table.predict >= pool.num_classes).any():
            raise InputError(
                f"{tables[expert.name]} answers with classes that {expert.name} does not have",
                expected=f"classes 0 to {pool.num_classes - 1}",
                received=str(int(table.predict.max())),
                remedy="use tables of these experts",
            )
    idx, target, labels = _labels_of(read)
    check_labels(target, len(idx), pool.num_classes)
    metadata = {
        "kind": TABLES,
        "experts": list(pool.names),
        "sigmas": list(pool.sigmas),
        "digests": [e.digest for e in pool],
        "tables": {name: Path(tables[name]).name for name in pool.names},
        "n": n,
        "alpha": alpha,
        "unseen": unseen,
        "source": f"certification tables, rows {int(idx.min())} to {int(idx.max())}",
        "images": len(idx),
    }
    _save(path, metadata, idx=idx, labels=target, radius=labels.radius, predict=labels.predict)
    return metadata, labels.radius.mean(0)


def load_labels(
    path: str | Path, pool: ExpertPool, rows: range | None = None, *, plan_n: int = 10_000, alpha: float = 1e-3
) -> tuple[Labels, NDArray[np.int64], dict[str, Any]]:
    """Routing labels, true classes `(N,)` and metadata of a file that `rsrouter label` or `store_tables` wrote.

    Args:
        path: the file.
        pool: the experts it was made with.
        rows: of tables: the images that are wanted, by their index in the tables; None: all.
        plan_n, alpha: of votes: the certification that the targets are for (`target_radii`).

    Raises:
        ResultsError: not such a file, unfinished, made with other experts, or tables that lack some of `rows`.
    """
    metadata, arrays = _read(Path(path))
    if metadata.get("kind") != TABLES:
        votes, target, metadata = load_votes(path, pool)
        return target_radii(votes, target, pool.sigmas, plan_n=plan_n, alpha=alpha), target, metadata
    _check_experts(metadata, pool)
    idx, target, radius, predict = arrays
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
