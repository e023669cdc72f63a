"""The radius of one vote, and of a tree of votes.

Theorem (tree certificate). Let every stage j of a routed classifier g be a base model smoothed with
isotropic Gaussian noise of standard deviation sigma_j, with outcome probabilities p_{j,l}(x), and let
`lower <= p <= upper` hold for the probabilities the recursion uses. Define the entry radius of outcome l

    plurality:  e_l = max(0, sigma_j / 2 * (Phi^-1(lo_A) - Phi^-1(hi_l)))   for l != A, and e_A = 0
    threshold:  e_l = max(0, sigma_j * (Phi^-1(tau) - Phi^-1(hi_l)))        for an outcome that wins at tau
                e_defer = max(0, sigma_j * (Phi^-1(lo_A) - Phi^-1(tau)))

and, for a class c,

    U_j(c) = min over outcomes l of max(e_l, V_l(c)),
    V_l(c) = infinity if l answers c, 0 if it answers anything else, U_i(c) if it leads to stage i.

Then g(x') = c for every x' with ||x' - x|| < U_root(c).

Proof. Phi^-1(p_{j,l}(.)) is 1/sigma_j-Lipschitz (Salman et al. 2019, Lemma 2). At distance r a plurality
outcome l != A can only win if p_l(x') >= p_A(x'), hence Phi^-1(lo_A) - r/sigma <= Phi^-1(hi_l) + r/sigma,
that is r >= e_l; a threshold outcome only if Phi^-1(hi_l) + r/sigma >= Phi^-1(tau), and deferral only if
Phi^-1(lo_A) - r/sigma < Phi^-1(tau). So the outcome l that wins at the root at x' has e_l <= r < U_root(c),
hence V_l(c) > r, and V_l(c) is infinite (g answers c) or belongs to a stage i with U_i(c) > r: descend.

Failure probability: at most the maximum over root-to-leaf paths of the sum of the stages' alphas
(`AlphaSplit`; the proof, the assumptions and the history are in THEORY.md). Assumptions: isotropic Gaussian
noise; base models that are deterministic, or random independently per vote; the tree, the alphas and the
sidedness fixed before any vote, c and every reference A by selection votes that enter no bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rsrouter.core.bounds import Array
from rsrouter.core.errors import PlanError
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import ABSTAIN

#: Relative shrinkage of Phi^-1 (scipy's ndtri errs by a few ulp), before `nextafter`.
_NDTRI_SAFETY = 1e-14


def _ndtri_down(p: Array) -> Array:
    z = special.ndtri(p)
    with np.errstate(invalid="ignore"):
        return np.asarray(z - np.abs(z) * _NDTRI_SAFETY)


def _ndtri_up(p: Array) -> Array:
    z = special.ndtri(p)
    with np.errstate(invalid="ignore"):
        return np.asarray(z + np.abs(z) * _NDTRI_SAFETY)


def _distance(scale: float, near: Array, far: Array) -> Array:
    """`max(0, scale * (near - far))`, rounded down; NaN and inf - inf give 0."""
    with np.errstate(invalid="ignore"):
        raw = scale * (near - far)
    down = np.nextafter(raw, -np.inf)
    return np.where(down > 0.0, np.where(np.isposinf(raw), np.inf, down), 0.0)


def vote_radius(sigma: float, lower: ArrayLike, upper: ArrayLike | None = None) -> Array:
    """Certified L2 radius of one plurality vote (Cohen et al. 2019, Theorem 1).

    Args:
        sigma: noise level in [0,1]-pixel units.
        lower: lower bound on the top class's probability, any shape.
        upper: upper bound on every rival's probability; None is one-sided, `1 - lower`, where
            R = sigma * Phi^-1(lower).

    Returns:
        float64 array; 0 where nothing is certified (a lower bound of NaN, or not above the upper one).
    """
    if not (np.isfinite(sigma) and sigma > 0):
        raise PlanError("A radius needs a noise level", expected="a finite sigma above 0", received=repr(sigma),
                        remedy="give the standard deviation in [0,1]-pixel units")
    lo = np.asarray(lower, dtype=np.float64)
    if upper is None:
        return _distance(float(sigma), _ndtri_down(lo), np.zeros_like(lo))
    hi = np.minimum(np.asarray(upper, dtype=np.float64), 1.0 - lo)
    return _distance(float(sigma) / 2.0, _ndtri_down(lo), _ndtri_up(hi))


def _reference(stage: Stage, c: NDArray[np.int64], answers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Per image the index of the outcome whose lower bound counts, -1 where there is none."""
    if stage.reference is not None:
        reference = np.broadcast_to(np.asarray(stage.reference, dtype=np.int64), c.shape)
        if np.any((reference < -1) | (reference >= stage.num_outcomes)):
            raise PlanError(f"The reference of stage {stage.name!r} is not an outcome",
                            expected=f"0 to {stage.num_outcomes - 1} (or -1 for none)", received=str(stage.reference),
                            remedy="take the outcome that won the selection votes")
        return reference
    same = answers[None, : stage.num_outcomes] == c[:, None]
    return np.where(same.any(1), same.argmax(1), -1)


def entry_radii(stage: Stage, lower: ArrayLike, upper: ArrayLike, reference: NDArray[np.int64]) -> Array:
    """How far away, at least, each target of `stage` takes over: `(N, len(stage.leads_to))`.

    Args:
        stage: the smoothed vote.
        lower: `(N, L)` lower bounds on the outcome probabilities; only the reference's column is read
            (several columns would need a Bonferroni correction among them).
        upper: `(N, L)` upper bounds.
        reference: `(N,)` outcome indices; -1 means no lower bound may be used.
    """
    lo, hi = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    outcomes = stage.num_outcomes
    if lo.shape != hi.shape or lo.ndim != 2 or lo.shape[1] != outcomes or lo.shape[0] != reference.shape[0]:
        raise PlanError(f"Bounds of stage {stage.name!r} have the wrong shape",
                        expected=f"({reference.shape[0]}, {outcomes})", received=f"{lo.shape} and {hi.shape}",
                        remedy="one column per vote outcome, invalid votes included")
    rows = np.arange(len(reference))
    chosen = np.maximum(reference, 0)
    z_top = np.where(reference >= 0, _ndtri_down(lo[rows, chosen]), np.nan)
    z_hi = _ndtri_up(hi)
    if stage.kind == "plurality":
        entry = _distance(stage.sigma / 2.0, z_top[:, None], z_hi)
        entry[rows, chosen] = np.where(reference >= 0, 0.0, entry[rows, chosen])
        return entry
    z_tau = float(special.ndtri(stage.tau))
    slack = abs(z_tau) * _NDTRI_SAFETY
    entry = _distance(stage.sigma, np.full_like(z_hi, z_tau - slack), z_hi)
    defer = _distance(stage.sigma, z_top, np.full_like(z_top, z_tau + slack))
    return np.concatenate([entry, defer[:, None]], axis=1)


def tree_radius(
    stages: Sequence[Stage] | Mapping[str, Stage] | Tree,
    root: str | None,
    lower: Mapping[str, ArrayLike],
    upper: Mapping[str, ArrayLike],
    c: ArrayLike,
    *,
    sampled: Mapping[str, NDArray[np.bool_]] | None = None,
) -> tuple[Array, NDArray[np.object_]]:
    """Certified L2 radius of a routed classifier: the recursion of this module's theorem, vectorised.

    Args:
        stages: the tree's stages (with `reference` per image where a stage routes).
        root: name of the first stage; None: the tree's own root, or the first stage.
        lower: stage name to `(N, L)` lower bounds on its outcome probabilities. A stage that is missing was
            not sampled: it contributes 0, never an error.
        upper: stage name to `(N, L)` upper bounds, the same keys.
        c: `(N,)` class to certify, fixed by selection votes; where it is negative the radius is 0.
        sampled: stage name to `(N,)` booleans, for stages sampled only for some images.

    Returns:
        `radius (N,)` float64 (0 where nothing is certified) and `bound_by (N,)`, the name of the stage that
        limits it.
    """
    tree = stages if isinstance(stages, Tree) else Tree.of(
        list(stages.values()) if isinstance(stages, Mapping) else list(stages), root
    )
    root = tree.root if root is None else root
    classes = np.atleast_1d(np.asarray(c))
    if classes.dtype.kind not in "iu":
        raise PlanError("The certified class must be an integer", expected="int array (N,)", received=str(classes.dtype),
                        remedy="pass class indices")
    classes = classes.astype(np.int64)
    size = len(classes)
    names = tuple(tree.order)
    radius: dict[str, Array] = {}
    bound: dict[str, NDArray[np.int64]] = {}
    rows = np.arange(size)
    for code, name in enumerate(names):
        stage = tree.stages[name]
        if name not in lower or name not in upper:
            radius[name], bound[name] = np.zeros(size), np.full(size, code)
            continue
        entry = entry_radii(stage, lower[name], upper[name], _reference(stage, classes, stage.answers))
        value = np.where(stage.answers[None, :] == classes[:, None], np.inf, 0.0)
        by = np.full(value.shape, code)
        for column, target in enumerate(stage.leads_to):
            if isinstance(target, str):
                value[:, column], by[:, column] = radius[target], bound[target]
        by = np.where(entry >= value, code, by)
        total = np.maximum(entry, value)
        tightest = total.argmin(axis=1)
        radius[name], bound[name] = total[rows, tightest], by[rows, tightest]
        if sampled is not None and name in sampled:
            radius[name] = np.where(sampled[name], radius[name], 0.0)
            bound[name] = np.where(sampled[name], bound[name], code)
    result = np.where((classes > ABSTAIN) & ~np.isnan(radius[root]), radius[root], 0.0)
    return result, np.array(names, dtype=object)[bound[root]]
