"""What a results table says about its own run, and whether its rows follow from their votes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import PlanError, ResultsError
from rsrouter.core.plans import Plan
from rsrouter.core.recompute import recompute
from rsrouter.core.terms import Terms
from rsrouter.core.tree import Tree
from rsrouter.core.types import Certificate
from rsrouter.results.rows import RADIUS_DECIMALS
from rsrouter.results.table import Table

#: Relative room for another scipy: its quantiles err by about 1e-12.
_RELATIVE = 1e-9
_STEP = 10.0**-RADIUS_DECIMALS


@dataclass(frozen=True)
class Run:
    """The part of a table's metadata that its certificates depend on.

    Attributes:
        digest: of the smoothed classifier (`RoutedSmooth.digest`).
        terms: as given to certify, nothing left open.
        noise: kind of noise.
        role: "routed" or "expert".
        execution: how the networks ran.
        device, versions, threads, instructions: where.
    """

    digest: str
    terms: Terms
    noise: str
    role: str
    execution: Mapping[str, Any]
    device: str
    versions: Mapping[str, str]
    threads: int | None
    instructions: str | None

    @classmethod
    def of(cls, table: Table) -> Run:
        """The run that made `table`.

        Raises:
            ResultsError: metadata that are missing, incomplete or of another kind.
        """
        data = table.metadata
        try:
            return cls(
                digest=str(data["digest"]),
                terms=Terms.from_dict(data["terms"]),
                noise=str(data["noise"]),
                role=str(data.get("role", "routed")),
                execution=dict(data["execution"]),
                device=str(data["device"]),
                versions={str(k): str(v) for k, v in data["versions"].items()},
                threads=data.get("info", {}).get("threads"),
                instructions=data.get("info", {}).get("instructions"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
            raise ResultsError(
                f"The metadata of table {table.name!r} do not say how it was made",
                expected="digest, terms, noise, execution, device, versions, as `certify` writes them",
                received=f"{type(error).__name__}: {error}",
                remedy="certify with this package; a table of the field cannot be verified",
            ) from error

    @property
    def plan(self) -> Plan:
        """How many votes, and the bound that is valid for that rule."""
        return self.terms.plan

    @property
    def alpha(self) -> float:
        """Failure probability of each certificate."""
        return self.terms.alpha

    @property
    def rule(self) -> str:
        """Which stages are sampled."""
        return self.terms.rule

    @property
    def sides(self) -> str:
        """Sidedness of plurality bounds."""
        return str(self.terms.sides)

    @property
    def seed(self) -> int:
        """What keys the noise."""
        return int(self.terms.seed or 0)

    def split(self, tree: Tree) -> AlphaSplit:
        """How alpha was divided over the stages of `tree`."""
        return AlphaSplit.even(self.alpha, tree.paths)


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


def recompute_rows(table: Table, tree: Tree, run: Run) -> list[Certificate | PlanError]:
    """The certificate of every row from its stored votes (`rsrouter.core.recompute`)."""
    votes = [table.counts(i) for i in range(len(table))]
    return recompute(tree, run.plan, run.split(tree), votes, rule=run.rule, sides=run.sides)


def verify_rows(table: Table, tree: Tree, run: Run) -> list[Mismatch]:
    """Every cell of `table` that does not follow from the votes in its row.

    A published radius must be the recomputed one rounded down to the table's decimals; 1e-9 of it is allowed
    for another version of scipy.

    Args:
        table: with vote counts.
        tree: stages of the classifier it claims to be about.
        run: from `Run.of(table)`.
    """
    found: list[Mismatch] = []
    for i, again in enumerate(recompute_rows(table, tree, run)):
        idx = int(table.idx[i])
        if isinstance(again, PlanError):
            found.append(Mismatch(idx, "counts", str(table.counts_text[i])[:120], str(again)))
            continue
        told = (
            ("predict", int(table.predict[i]), again.predict),
            ("expert", str(table.expert[i]), again.expert or ""),
            ("n_drawn", int(table.n_drawn[i]), again.n_drawn),
            ("seed", table.seed[i], run.seed),
            ("rule", str(table.rule[i]), run.rule if run.role == "routed" else ""),
        )
        found += [Mismatch(idx, column, str(a), str(b)) for column, a, b in told if a != b]
        for column, published, radius in (
            ("radius", float(table.radius[i]), again.radius),
            ("r_router", float(table.r_router[i]), again.r_router),
            ("r_expert", float(table.r_expert[i]), again.r_expert),
        ):
            if not _rounded_down(published, radius):
                found.append(Mismatch(idx, column, f"{published:.8f}", f"{radius:.8f}"))
    return found


def _rounded_down(published: float, radius: float) -> bool:
    if np.isinf(radius) or np.isinf(published):
        return published == radius
    return radius * (1.0 - _RELATIVE) - 1.01 * _STEP <= published <= radius * (1.0 + _RELATIVE)
