"""Stages that cost no votes: one forward pass of a network whose Lipschitz constant is known.

Let f map inputs to k logits, and let `|(f_a - f_b)(x) - (f_a - f_b)(y)| <= K_ab |x - y|` for every pair of logits; an L2
constant L of f gives `K_ab = sqrt(2) L` (THEORY.md, Theorem 5). The logits that were computed differ from f's by at most
`rho = Stage.rounding` each, so a difference of two of them by at most `2 rho`. With logits z at x, outcome l cannot win closer
than

    plurality:  e_l = max(0, max over m of (z_m - z_l - 2 rho) / K_lm)
    threshold   (l wins where it leads every other logit by at least tau > 0, otherwise the stage defers):
                e_l = max(0, max over m of (tau - (z_l - z_m) - 2 rho) / K_lm)
                e_defer = max(0, max over a of min over m of (z_a - z_m - tau - 2 rho) / K_am)

These hold for certain: such a stage spends no alpha, and a maximum over all rivals needs no correction. Logits that are not
finite certify nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsrouter.core.bounds import Array
from rsrouter.core.errors import PlanError
from rsrouter.core.tree import Stage

#: Relative room for the subtractions and the division below, done in float64.
_ROOM = 1e-12


def check_logits(stage: Stage, logits: ArrayLike) -> Array:
    """`(N, k)` float64 logits of a deterministic stage, k one less than its outcomes.

    Raises:
        PlanError: another shape, or a stage that votes.
    """
    z = np.asarray(logits, dtype=np.float64)
    if stage.lipschitz is None or z.ndim != 2 or z.shape[1] != stage.num_outcomes - 1:
        raise PlanError(
            f"Logits do not fit stage {stage.name!r}",
            expected=f"(N, {stage.num_outcomes - 1}) of a stage with a Lipschitz constant",
            received=f"{z.shape}" + ("" if stage.lipschitz is not None else " for a stage that votes"),
            remedy="hand over what one forward pass of the stage's network gives",
        )
    return z


def _read(stage: Stage, logits: ArrayLike) -> tuple[Array, Array, NDArray[np.bool_], Array]:
    """Logits `(N, k)`, by how much each leads the best of the others, which rows are finite, how wrong a lead may be `(N, 1)`."""
    z = check_logits(stage, logits)
    fine: NDArray[np.bool_] = np.asarray(np.isfinite(z).all(1))
    z = np.where(fine[:, None], z, 0.0)
    first = z.argmax(1)
    rest = z.copy()
    rest[np.arange(len(z)), first] = -np.inf
    best = np.repeat(z.max(1, keepdims=True), z.shape[1], axis=1)
    best[np.arange(len(z)), first] = rest.max(1)
    wrong = 2.0 * stage.rounding * (1.0 + _ROOM) + _ROOM * np.abs(z).max(1, initial=0.0)
    return z, z - best, fine, wrong[:, None]


def pass_entries(stage: Stage, logits: ArrayLike) -> Array:
    """How far away, at least, each target of a deterministic stage takes over: `(N, len(stage.leads_to))`.

    The invalid outcome never wins, since f is real-valued; where the computed logits are not finite all radii are 0.

    >>> stage = Stage("gate", 0.0, leads_to=(0, 1, -1), lipschitz=1.0)
    >>> pass_entries(stage, [[3.0, 1.0], [float("nan"), 1.0]]).round(3).tolist()
    [[0.0, 1.414, inf], [0.0, 0.0, 0.0]]
    """
    z, lead, fine, wrong = _read(stage, logits)
    tau = 0.0 if stage.tau is None else float(stage.tau)
    pairs, k = stage.pairs, z.shape[1]
    if isinstance(stage.lipschitz, tuple):
        entry, kept = np.empty_like(z), np.full_like(z, np.inf)
        for one in range(k):
            others = np.arange(k) != one
            gap = z[:, [one]] - z[:, others]
            entry[:, one] = ((tau - gap - wrong) / pairs[one, others]).max(1)
            kept[:, one] = ((gap - tau - wrong) / pairs[one, others]).min(1)
    else:
        entry, kept = (tau - lead - wrong) / pairs[0, 1], (lead - tau - wrong) / pairs[0, 1]
    columns = [entry, np.full((len(entry), 1), np.inf)]
    if stage.tau is not None:
        columns.append(kept.max(1, keepdims=True))
    radii = np.concatenate(columns, axis=1) * (1.0 - _ROOM)
    return np.where(fine[:, None], np.maximum(radii, 0.0), 0.0)


def pass_targets(stage: Stage, logits: ArrayLike) -> NDArray[np.int64]:
    """`(N,)` index into `leads_to` of the target that the computed logits choose; the invalid one where they are not finite.

    >>> stage = Stage("gate", 0.0, "threshold", 1.5, (0, 1, -1, "next"), lipschitz=1.0)
    >>> pass_targets(stage, [[3.0, 1.0], [2.0, 1.0], [float("inf"), 1.0]]).tolist()
    [0, 3, 2]
    """
    _, lead, fine, _ = _read(stage, logits)
    top = lead.argmax(1)
    if stage.tau is not None:
        top = np.where(lead.max(1) >= stage.tau, top, len(stage.leads_to) - 1)
    return np.where(fine, top, stage.num_outcomes - 1)


def pass_possible(stage: Stage, logits: ArrayLike) -> NDArray[np.bool_]:
    """Which targets may be what f itself decides, given that the computed logits err by `Stage.rounding`: certain, no alpha.

    Returns:
        `(N, len(stage.leads_to))`; every target where the logits are not finite.
    """
    _, lead, fine, wrong = _read(stage, logits)
    tau = 0.0 if stage.tau is None else float(stage.tau)
    columns = [lead >= tau - wrong, np.zeros((len(lead), 1), bool)]
    if stage.tau is not None:
        columns.append(np.asarray(~(lead >= tau + wrong).any(1, keepdims=True)))
    return np.where(fine[:, None], np.concatenate(columns, axis=1), True)


__all__ = ["check_logits", "pass_entries", "pass_possible", "pass_targets"]
