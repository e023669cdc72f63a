"""A results table in memory, and tables brought over the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.core.types import ABSTAIN
from rsrouter.results.about import TableMetadata, understood
from rsrouter.results.rows import COLUMNS, Row, parse_counts


@dataclass(frozen=True)
class Table:
    """A results table in memory; every array has one entry per image, in file order.

    Attributes:
        name: what to call it in a report.
        metadata: content of the JSON beside it, empty for a table of the field; `about` is the same, checked.
        idx, label, predict, correct, n_drawn: int64; -1 where unknown (predict -1 is abstention).
        radius, r_router, r_expert: float64, L2 in [0,1]-pixel units; r_router and r_expert NaN where unknown.
        time: float64 seconds.
        expert, rule, bound_by: text, "" where unknown.
        seed: Python ints or None.
        core: int64; class that an uncertified core network answers where the image got no certificate, -1 elsewhere.
        counts_text: the vote counts as JSON text, "" where unknown; `counts(i)` parses one.
        path: where it was read from, None if it was not.
        notes: what was unusual about the file and how it was understood, a sentence each.
        checked: whether every row was seen to follow from its votes (`rsrouter.results.verify`).
        answered_by, fixed_votes: of a checked table: the stage whose selection votes named each image's class, and the votes
            that a fixed plan would have drawn on the same networks.
        ours: whether it was written by this package. The field prints radii with three significant digits,
            to the *nearest*, so its tables may overstate a radius by half a digit.
    """

    name: str
    metadata: dict[str, Any]
    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.int64]
    time: NDArray[np.float64]
    expert: NDArray[np.object_]
    rule: NDArray[np.object_]
    r_router: NDArray[np.float64]
    r_expert: NDArray[np.float64]
    n_drawn: NDArray[np.int64]
    seed: NDArray[np.object_]
    bound_by: NDArray[np.object_]
    core: NDArray[np.int64]
    counts_text: NDArray[np.object_] = field(repr=False)
    path: Path | None = None
    ours: bool = True
    notes: tuple[str, ...] = ()
    checked: bool = False
    answered_by: NDArray[np.object_] | None = None
    fixed_votes: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.idx)

    @classmethod
    def of(
        cls, rows: Sequence[Row], *, path: Path, metadata: dict[str, Any], order: Sequence[int], earlier: Table | None = None
    ) -> Table:
        """The table of `rows`, and of those of `earlier`, in the order of the ids in `order`: what `read_table` reads at `path`
        once they are written there."""
        texts = dict(zip(COLUMNS, zip(*(row.cells() for row in rows), strict=True) if rows else [()] * len(COLUMNS), strict=True))
        texts["counts_text"] = texts.pop("counts")
        arrays: dict[str, Any] = {}
        for column in ARRAYS:
            convert, dtype = _TYPES.get(column, (str, object))
            made = np.empty(len(rows), dtype=dtype)
            made[:] = [convert(text) for text in texts[column]]
            arrays[column] = made if earlier is None else np.concatenate([getattr(earlier, column), made])
        place = {idx: at for at, idx in enumerate(order)}
        sequence = np.argsort([place[idx] for idx in arrays["idx"].tolist()])
        name = metadata.get("name")
        called = name if isinstance(name, str) and name else path.stem
        return cls(name=called, metadata=metadata, path=path, **{c: a[sequence] for c, a in arrays.items()})

    @cached_property
    def about(self) -> TableMetadata | None:
        """What the table's own JSON says about its run; None where it has none, or another program's.

        Raises:
            ResultsError: the JSON is of this package, and of another version, or damaged.
        """
        return understood(self.metadata, f"The metadata of table {self.name!r}")

    def described(self) -> TableMetadata:
        """`about`, of a table that must have it.

        Raises:
            ResultsError: the table does not say how it was made.
        """
        if self.about is None:
            raise ResultsError(
                f"Table {self.name!r} does not say how it was made",
                expected="the JSON that `certify` writes beside a table",
                received="none" if not self.metadata else f"a JSON of another kind, with {sorted(self.metadata)[:8]}",
                remedy="certify with this package; a table of the field cannot be verified",
            )
        return self.about

    @property
    def abstained(self) -> NDArray[np.bool_]:
        """`(N,)` whether the image got no class."""
        return np.equal(self.predict, ABSTAIN)

    @property
    def natural(self) -> NDArray[np.bool_] | None:
        """`(N,)` whether the certified class, or else the core's uncertified answer, is right; None without a core.

        This is no certified accuracy, at no radius.
        """
        if self.about is None or self.about.core is None:
            return None
        return np.asarray((np.where(self.abstained, self.core, self.predict) == self.label) & (self.label >= 0))

    @property
    def labelled(self) -> bool:
        """Whether every image's label is known."""
        return bool(np.all(self.correct >= 0))

    def counts(self, i: int) -> dict[str, dict[str, tuple[int, ...]]]:
        """Votes of row `i`: `{"select": {stage: votes}, "estimate": {stage: votes}}`; empty where unknown."""
        text = str(self.counts_text[i])
        return parse_counts(text) if text else {"select": {}, "estimate": {}}

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Table:
        """The table of some rows (positions or a mask), in that order."""
        known = [name for name in (*ARRAYS, "answered_by", "fixed_votes") if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name)[rows] for name in known})

    def renamed(self, name: str) -> Table:
        """The same table under another name."""
        return replace(self, name=name)

    @property
    def expected(self) -> int | None:
        """How many rows the finished table has; None where its metadata do not tell."""
        return None if self.about is None else len(self.about.ids)


ARRAYS = (
    "idx",
    "label",
    "predict",
    "radius",
    "correct",
    "time",
    "expert",
    "rule",
    "r_router",
    "r_expert",
    "n_drawn",
    "seed",
    "bound_by",
    "core",
    "counts_text",
)

_TYPES: dict[str, tuple[Callable[[str], Any], Any]] = {
    **dict.fromkeys(("idx", "label", "predict", "correct", "n_drawn"), (int, np.int64)),
    **dict.fromkeys(("radius", "time", "r_router", "r_expert"), (float, np.float64)),
    "seed": (lambda text: int(text) if text else None, object),
    "core": (lambda text: int(text) if text else ABSTAIN, np.int64),
}


def align(tables: Sequence[Table], *, common: bool = False) -> list[Table]:
    """The tables with their rows sorted by image id, over the same images.

    Args:
        tables: one or more.
        common: keep only the images that every table holds, instead of refusing.

    Raises:
        InputError: tables over different images, or that disagree about an image's label.
    """
    if not tables:
        return []
    shared = set(tables[0].idx.tolist()).intersection(*(table.idx.tolist() for table in tables[1:]))
    if not common and any(len(table) != len(shared) for table in tables):
        raise InputError(
            "The tables are over different images",
            expected="the same image ids in every table",
            received=", ".join(f"{table.name}: {len(table)} images" for table in tables) + f"; {len(shared)} in all of them",
            remedy="certify the same images with each, or compare only the images they share (common)",
        )
    if not shared:
        raise InputError(
            "The tables have no image in common",
            expected="at least one shared image id",
            received=", ".join(table.name for table in tables),
            remedy="certify the same images with each",
        )
    keep = np.array(sorted(shared), dtype=np.int64)
    aligned = []
    for table in tables:
        order = np.argsort(table.idx, kind="stable")
        aligned.append(table.take(order[np.searchsorted(table.idx[order], keep)]))
    first = aligned[0]
    for other in aligned[1:]:
        clash = np.flatnonzero((first.label != other.label) & (first.label >= 0) & (other.label >= 0))
        if clash.size:
            i = int(clash[0])
            raise InputError(
                "Two tables disagree about a label",
                expected=f"image {first.idx[i]} to be class {first.label[i]} as in {first.name}",
                received=f"class {other.label[i]} in {other.name}",
                remedy="are both over the same data set and split?",
            )
    return aligned
