"""Where a routed classifier loses against its experts: by choosing the wrong one, or by certifying the choice.

Per image, with every radius counted as 0 where the answer is wrong or missing,

    oracle radius    the largest radius of any expert's own table,
    chosen radius    that of the expert the router picked,
    routed radius    the routed certificate's,

    routing regret      = oracle - chosen   (>= 0; a better router would win it),
    certification loss  = chosen - routed   (what the routed certificate pays for being routed; below 0 where the tree
                                             certificate, or another noise level, holds farther than the expert alone),

so regret + loss = oracle - routed. Grouped by `bound_by`, the stage whose votes limit the radius, they tell whether a better
router, more votes, or another certificate would pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsrouter.core.errors import InputError
from rsrouter.report import curves
from rsrouter.report.summary import EXPERT, ROUTED, Summary
from rsrouter.results import Table

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Losses:
    """Per image, in [0,1]-pixel L2 units; 0 where there is no correct answer.

    Attributes:
        oracle, chosen, routed: `(N,)` radii, see the module's text.
        expert: `(N,)` name of the expert that was picked, "" for none.
        bound_by: `(N,)` name of the stage that limits the routed radius, "" where unknown.
        predict_abstains: `(N,)` whether the routed classifier gave no class.
    """

    oracle: Array
    chosen: Array
    routed: Array
    expert: NDArray[np.object_]
    bound_by: NDArray[np.object_]
    predict_abstains: NDArray[np.bool_]

    @property
    def regret(self) -> Array:
        """`(N,)` routing regret, 0 or more."""
        return self.oracle - self.chosen

    @property
    def loss(self) -> Array:
        """`(N,)` certification loss; negative where routing holds farther than the chosen expert alone."""
        return self.chosen - self.routed


@dataclass(frozen=True)
class StageLosses:
    """The images whose radius one stage limits.

    Attributes:
        stage: its name; "all" for every image.
        share: of all images.
        routed, regret, loss: means over those images.
        abstained: how many of them got no class, as a share of all images.
    """

    stage: str
    share: float
    routed: float
    regret: float
    loss: float
    abstained: float


def _held(table: Table) -> Array:
    return np.where(curves.certified_correct(table, [0.0])[:, 0], table.radius, 0.0)


def losses(routed: Table, experts: Sequence[Table]) -> Losses:
    """Routing regret and certification loss of every image.

    Args:
        routed: the routed classifier's table.
        experts: each expert's own table over the same images in the same order (`results.align`), named as in `routed.expert`.

    Raises:
        InputError: unknown labels, other images, or an expert without a table.
    """
    names = [t.name for t in experts]
    missing = sorted({str(e) for e in routed.expert if e} - set(names))
    if missing or not names:
        raise InputError(
            "A routed table names experts that have no table",
            expected=f"tables called {sorted({str(e) for e in routed.expert if e})}",
            received=str(names),
            remedy="certify each expert alone on the same images, or rename the tables",
        )
    if any(not np.array_equal(t.idx, routed.idx) for t in experts):
        raise InputError(
            "The tables are over different images",
            expected="the same image ids in the same order",
            received=", ".join(f"{t.name}: {len(t)} images" for t in (routed, *experts)),
            remedy="use rsrouter.results.align",
        )
    held = np.stack([_held(t) for t in experts], axis=1)
    picked = np.array([names.index(str(e)) if e else -1 for e in routed.expert], dtype=np.int64)
    chosen = np.where(picked >= 0, held[np.arange(len(held)), picked], 0.0)
    return Losses(held.max(1), chosen, _held(routed), routed.expert, routed.bound_by, routed.abstained)


def by_stage(found: Losses) -> list[StageLosses]:
    """Means by the stage that limits the radius, the most frequent first, then a row "all" over every image."""

    def row(stage: str, mask: NDArray[np.bool_]) -> StageLosses:
        return StageLosses(
            stage,
            float(mask.mean()),
            float(found.routed[mask].mean()),
            float(found.regret[mask].mean()),
            float(found.loss[mask].mean()),
            float((mask & found.predict_abstains).mean()),
        )

    labels = np.array([str(b) or "unknown" for b in found.bound_by], dtype=object)
    rows = [row(name, labels == name) for name in dict.fromkeys(labels.tolist())]
    return [*sorted(rows, key=lambda r: -r.share), row("all", np.ones(len(labels), dtype=bool))]


def at_radii(found: Losses, radii: ArrayLike) -> dict[str, Array]:
    """`(R,)` shares of images held at r by the oracle, the chosen expert, and the routed classifier.

    The differences are regret and loss in points of certified accuracy. At r = 0: any correct certificate, radius above 0.
    """
    edges = np.maximum(curves.check_radii(radii), np.nextafter(0.0, 1.0))
    return {
        name: np.asarray((values[:, None] >= edges).mean(0))
        for name, values in (("oracle", found.oracle), ("chosen", found.chosen), ("routed", found.routed))
    }


def page_rows(summary: Summary) -> list[StageLosses] | None:
    """`by_stage` of the page's main table; None where it is not routed, or labels or some expert's table are missing."""
    pool = summary.named(EXPERT)
    asked = {str(e) for e in summary.main.expert if e}
    if summary.roles[summary.main.name] != ROUTED or not summary.labelled or not asked or not asked <= {t.name for t in pool}:
        return None
    return by_stage(losses(summary.main, pool))
