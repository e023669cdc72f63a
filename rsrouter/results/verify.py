"""Whether the rows of a table follow from their votes, and whether all of its images are there.

Radii, classes and all other cells but the label and the time are functions of the votes and of what the table's JSON says
about its run. What this cannot tell is whether the votes themselves were drawn, and whether the JSON is true: that takes the
router and the images (`rsrouter.audit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import IntegrityError, ResultsError
from rsrouter.core.recompute import ROOM, Moved, Recomputed, recompute_all
from rsrouter.core.tree import Tree
from rsrouter.core.types import ABSTAIN
from rsrouter.results.about import TableMetadata, TreeRecord
from rsrouter.results.rows import RADIUS_DECIMALS, votes_of
from rsrouter.results.table import Table

_STEP = 10.0**-RADIUS_DECIMALS
#: Votes that are unpacked at once: rows times outcomes.
_CHUNK = 400_000


@dataclass(frozen=True)
class Mismatch:
    """A cell that does not follow from the row's votes.

    Attributes:
        idx: image id.
        column: which cell.
        published, recomputed: the two values, as text.
    """

    idx: int
    column: str
    published: str
    recomputed: str

    def __str__(self) -> str:
        return f"image {self.idx}: {self.column} {self.published} published, {self.recomputed} from its votes"


def verify_rows(table: Table, tree: Tree | None = None) -> list[Mismatch]:
    """Every cell of `table` that does not follow from the votes in its row, and every row that is not of its job.

    A published radius must be the recomputed one rounded down to the table's decimals; 1e-9 of it is allowed for another
    version of scipy.

    Args:
        table: with votes, and metadata of `certify`.
        tree: stages of the classifier that the table should be about; None: those that its own metadata name.

    Raises:
        ResultsError: the table does not say how it was made.
    """
    return _verify(table, tree)[0]


def _verify(table: Table, tree: Tree | None) -> tuple[list[Mismatch], Table]:
    """The mismatches, and the table with what its votes tell besides."""
    about = table.described()
    tree = tree or about.tree.tree
    split = AlphaSplit.even(about.terms.alpha, tree.paths)
    moved = None if about.transfer is None else Moved(AlphaSplit.even(about.transfer.alpha, tree.paths), about.transfer.votes)
    found = [
        Mismatch(int(i), "idx", str(i), f"no image of the {about.num_images} that the job names")
        for i in table.idx[~np.isin(table.idx, about.ids)]
    ]
    size = max(1, _CHUNK // sum(stage.num_outcomes for stage in tree.stages.values()))
    answered, fixed = np.full(len(table), "", dtype=object), np.zeros(len(table), np.int64)
    for start in range(0, len(table), size):
        rows = np.arange(start, min(start + size, len(table)))
        part = table.take(rows)
        votes, odd = votes_of(part.counts_text.tolist())
        again = recompute_all(tree, about.plan, split, votes, rule=about.rule, sides=about.sides, moved=moved)
        found += _compare(part, again, odd)
        answered[rows], fixed[rows] = again.answered_by, again.fixed_votes
    return found, replace(table, answered_by=answered, fixed_votes=fixed, checked=not found)


def _compare(table: Table, again: Recomputed, odd: set[int]) -> Iterator[Mismatch]:
    about = table.described()

    def told(rows: NDArray[np.bool_], column: str, published: Any, recomputed: Any) -> Iterator[Mismatch]:
        for i in np.flatnonzero(rows & sound):
            yield Mismatch(int(table.idx[i]), column, str(published[i]), str(recomputed[i]))

    sound = np.ones(len(table), bool)
    classes = about.tree.tree.classes
    stray = (table.core != ABSTAIN) & ~(np.isin(table.core, classes) & (about.core is not None))
    yield from told(stray, "core", table.core, np.full(len(table), "none" if about.core is None else "a class", dtype=object))
    for i in sorted({*odd, *again.faults}):
        sound[i] = False
        why = again.faults.get(i) if str(table.counts_text[i]) else "no votes, so nothing"
        yield Mismatch(int(table.idx[i]), "counts", str(table.counts_text[i])[:120], str(why or "votes in another notation"))
    count = len(table)
    expert = np.array([name or "" for name in again.expert], dtype=object)
    rule = np.full(count, about.rule if about.role == "routed" else "", dtype=object)
    seed = np.full(count, about.seed, dtype=object)
    for column, published, recomputed in (
        ("predict", table.predict, again.predict),
        ("expert", table.expert, expert),
        ("n_drawn", table.n_drawn, again.n_drawn),
        ("seed", table.seed, seed),
        ("rule", table.rule, rule),
    ):
        yield from told(np.asarray(published != recomputed, dtype=bool), column, published, recomputed)
    bound = np.asarray(table.bound_by != again.bound_by, dtype=bool)
    for at in np.flatnonzero(bound & sound).tolist():
        bound[at] = not again.may_be_bound_by(at, str(table.bound_by[at]))
    yield from told(bound, "bound_by", table.bound_by, again.bound_by)
    for column in ("radius", "r_router", "r_expert"):
        published, radius = getattr(table, column), getattr(again, column)
        yield from told(~_rounded_down(published, radius), column, published, radius)


def _rounded_down(published: NDArray[np.float64], radius: NDArray[np.float64]) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        near = (radius * (1.0 - ROOM) - 1.01 * _STEP <= published) & (published <= radius * (1.0 + ROOM))
    return np.where(np.isinf(radius) | np.isinf(published), published == radius, near)


def other_claims(
    about: TableMetadata,
    tree: Tree,
    *,
    role: str,
    router: str | None,
    experts: Sequence[tuple[str, float, str]],
    kernels: Mapping[str, Any],
    core: tuple[str, str] | None = None,
) -> list[str]:
    """What a table's JSON says about its classifier that is not so, one sentence each.

    Args:
        about: what it says.
        tree: stages of the classifier that the table is about.
        role, router: "routed" and the router's kind, or "expert" and None.
        experts: name, sigma and digest of each, in order.
        kernels: settings that its networks run under.
        core: name and digest of the uncertified network that answers where nothing is certified.
    """
    told, known, wrong = about.tree, TreeRecord.of(tree), list[str]()
    theirs, ours = ({s.name: s.model_dump() for s in record.stages} for record in (told, known))
    for stage in sorted({*theirs, *ours}):
        a, b = theirs.get(stage), ours.get(stage)
        if a is None or b is None:
            wrong.append(f"stage {stage!r} is in the {'table' if b is None else 'router'} alone")
        else:
            wrong += [f"stage {stage}: {k} {a[k]} in the table, {b.get(k)} in the router" for k in a if a[k] != b.get(k)]
    claims = (
        ("root", told.root, known.root),
        ("role", about.role, role),
        ("router", about.router, router),
        ("experts", [(e.name, e.sigma, e.digest) for e in about.experts], list(experts)),
        ("kernels", dict(about.kernels), dict(kernels)),
        ("core", None if about.core is None else (about.core.name, about.core.digest), core),
    )
    return wrong + [f"{what}: {claimed} in the table, {true} in the router" for what, claimed, true in claims if claimed != true]


def require_sound(table: Table, tree: Tree | None = None) -> Table:
    """`table`, marked as checked, if all of its rows follow from their votes.

    Raises:
        IntegrityError: cells that were edited, the first three of them named.
        ResultsError: the table does not say how it was made.
    """
    wrong, checked = _verify(table, tree)
    if wrong:
        rows = len({m.idx for m in wrong})
        raise IntegrityError(
            f"{rows} of {len(table)} rows of table {table.name!r} do not follow from the votes in them",
            expected="every cell as certify writes it",
            received="; ".join(str(w) for w in wrong[:3]),
            remedy="restore the table from where it was certified; if nobody edited it, report a bug",
        )
    return checked


def require_whole(table: Table) -> Table:
    """`table`, if it holds every image of its job: what a card and a publication ask for.

    Raises:
        ResultsError: rows are missing (\"18 of 25\"), or the table does not say how it was made.
    """
    expected = len(table.described().ids)
    if len(table) != expected:
        raise ResultsError(
            f"Table {table.name!r} is unfinished",
            expected=f"{expected} images",
            received=f"{len(table)} of {expected}",
            remedy="run the same certify command again: it goes on where it stopped",
        )
    return table


def unfinished(table: Table) -> str:
    """Words such as \"18 of 25 images\" for a table that lacks rows, \"\" for one that is whole or does not tell."""
    expected = table.expected
    return "" if expected is None or len(table) >= expected else f"{len(table):,} of {expected:,} images"


__all__ = ["Mismatch", "other_claims", "require_sound", "require_whole", "unfinished", "verify_rows"]
