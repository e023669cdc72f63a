"""The radius of one vote, and of a tree of votes.

Theorem (tree certificate). Let every stage j of a routed classifier g be a base model smoothed with
isotropic Gaussian noise of standard deviation sigma_j, with outcome probabilities p_{j,l}(x), and let
`lower <= p <= upper` hold for the probabilities the recursion uses. Define the entry radius of outcome l

    plurality:  e_l = max(0, sigma_j / 2 * (Phi^-1(lo_A) - Phi^-1(hi_l)))   for l != A, and e_A = 0
    threshold:  e_l = max(0, sigma_j * (Phi^-1(tau) - Phi^-1(hi_l)))        for an outcome that wins at tau
                e_defer = max(0, sigma_j * (Phi^-1(lo_A) - Phi^-1(tau)))

and, for a class c,

    U_j(c) = min over outcomes l of max(e_l, V_l(c)),
    V_l(c) = infinity if l answers c, 0 if it answers anything else, U_i(c) if it leads to stage i;

a stage that was not sampled has every e_l = 0, and a deterministic one those of `rsrouter.core.passes`. Then g(x') = c for
every x' with ||x' - x|| < U_root(c).

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
from rsrouter.core.passes import pass_entries
from rsrouter.core.tree import STAGE_TARGET, Stage, Tree
from rsrouter.core.types import ABSTAIN

#: Relative shrinkage of Phi^-1 (scipy's ndtri errs by a few ulp), before `nextafter`.
_NDTRI_SAFETY = 1e-14


# Bounds of exactly 0 or 1 become NaN in the next two and certify nothing: no finite number of votes gives them, only
# rounding does.
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
        float64 array; 0 where nothing is certified (a lower bound of NaN, or not above the upper one, or a bound
        of exactly 0 or 1, which no finite number of votes gives).

    Raises:
        PlanError: no usable sigma.
    """
    if not (np.isfinite(sigma) and sigma > 0):
        raise PlanError(
            "A radius needs a noise level",
            expected="a finite sigma above 0",
            received=repr(sigma),
            remedy="give the standard deviation in [0,1]-pixel units",
        )
    lo = np.asarray(lower, dtype=np.float64)
    if upper is None:
        return _distance(float(sigma), _ndtri_down(lo), np.zeros_like(lo))
    hi = np.asarray(np.minimum(np.asarray(upper, dtype=np.float64), 1.0 - lo))
    return _distance(float(sigma) / 2.0, _ndtri_down(lo), _ndtri_up(hi))


def fixed_reference(stage: Stage, c: NDArray[np.int64]) -> NDArray[np.int64]:
    """Per image the index of the outcome whose lower bound counts, -1 where there is none."""
    if stage.reference is not None:
        reference = np.asarray(stage.reference)
        if (
            reference.dtype.kind not in "iu"
            or reference.shape not in ((), c.shape)
            or np.any((reference < -1) | (reference >= stage.num_outcomes))
        ):
            raise PlanError(
                f"The reference of stage {stage.name!r} is not an outcome per image",
                expected=f"0 to {stage.num_outcomes - 1} (or -1 for none), one or {c.shape}",
                received=str(stage.reference),
                remedy="take the outcome that won the selection votes",
            )
        return np.broadcast_to(reference.astype(np.int64), c.shape)
    same = stage.answers[None, : stage.num_outcomes] == c[:, None]
    return np.where(same.any(1) & (c > ABSTAIN), same.argmax(1), -1)


def entry_radii(stage: Stage, lower: ArrayLike, upper: ArrayLike, reference: NDArray[np.int64]) -> Array:
    """How far away, at least, each target of `stage` takes over: `(N, len(stage.leads_to))`.

    Args:
        stage: the smoothed vote.
        lower: `(N, L)` lower bounds on the outcome probabilities; only the reference's column is read
            (several columns would need a Bonferroni correction among them).
        upper: `(N, L)` upper bounds; the reference's column of a plurality stage is not read.
        reference: `(N,)` outcome indices; -1 means no lower bound may be used.

    Raises:
        PlanError: bounds of another shape.
    """
    lo, hi = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    outcomes = stage.num_outcomes
    if lo.shape != hi.shape or lo.ndim != 2 or lo.shape[1] != outcomes or lo.shape[0] != reference.shape[0]:
        raise PlanError(
            f"Bounds of stage {stage.name!r} have the wrong shape",
            expected=f"({reference.shape[0]}, {outcomes})",
            received=f"{lo.shape} and {hi.shape}",
            remedy="one column per vote outcome, invalid votes included",
        )
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


def group_entries(stage: Stage, entry: Array, c: NDArray[np.int64]) -> Array:
    """The entry radii that the recursion needs: `(N, 1 + len(stage.children))`.

    Column 0 is the smallest entry radius of an outcome that answers something else than `c` (infinite where
    there is none), then one column per child stage: the smallest entry radius of an outcome leading there.
    Nothing is lost: `min over l of max(e_l, V)` with one V is `max(min over l of e_l, V)`.
    """
    wrong = (stage.answers[None, :] != c[:, None]) & (stage.answers[None, :] != STAGE_TARGET)
    columns = [np.where(wrong, entry, np.inf).min(1)]
    for child in stage.children:
        columns.append(entry[:, [k for k, target in enumerate(stage.leads_to) if target == child]].min(1))
    return np.stack(columns, axis=1)


def no_entries(stage: Stage, c: NDArray[np.int64]) -> Array:
    """`group_entries` of a stage that was not sampled: every entry radius is 0."""
    return group_entries(stage, np.zeros((len(c), len(stage.leads_to))), c)


def recursion(tree: Tree, grouped: Mapping[str, Array]) -> tuple[Array, NDArray[np.int64]]:
    """U_root of the theorem from `group_entries` of every stage.

    Returns:
        `radius (N,)` and `bound_by (N,)`, the index in `tree.order` of the stage whose bounds limit it.
    """
    radius: dict[str, Array] = {}
    bound: dict[str, NDArray[np.int64]] = {}
    for code, name in enumerate(tree.order):
        stage = tree.stages[name]
        entry = grouped[name]
        best, by = entry[:, 0], np.full(len(entry), code)
        for column, child in enumerate(stage.children, start=1):
            own = entry[:, column]
            through = np.maximum(own, radius[child])
            tighter = through < best
            by = np.where(tighter, np.where(own >= radius[child], code, bound[child]), by)
            best = np.where(tighter, through, best)
        radius[name], bound[name] = best, by
    return radius[tree.root], bound[tree.root]


def tree_radius(
    stages: Sequence[Stage] | Mapping[str, Stage] | Tree,
    root: str | None,
    lower: Mapping[str, ArrayLike],
    upper: Mapping[str, ArrayLike],
    c: ArrayLike,
    *,
    sampled: Mapping[str, NDArray[np.bool_]] | None = None,
    logits: Mapping[str, ArrayLike] | None = None,
) -> tuple[Array, NDArray[np.object_]]:
    """Certified L2 radius of a routed classifier: the recursion of this module's theorem, vectorised.

    Args:
        stages: the tree's stages (with `reference` per image where a stage routes).
        root: name of the first stage; None: the tree's own root, or the first stage.
        lower: stage name to `(N, L)` lower bounds on its outcome probabilities. A stage that is missing was
            not sampled: its entry radii are 0, never an error.
        upper: stage name to `(N, L)` upper bounds, the same keys.
        c: `(N,)` class to certify, fixed by selection votes; where it is negative the radius is 0.
        sampled: stage name to `(N,)` booleans, for stages sampled only for some images.
        logits: deterministic stage name to `(N, k)` logits of its forward pass; one that is missing was not run.

    Returns:
        `radius (N,)` float64 (0 where nothing is certified) and `bound_by (N,)`, the name of the stage that
        limits it.

    Raises:
        PlanError: bounds, classes, references or masks that do not fit the tree.
    """
    if isinstance(stages, Tree):
        tree = stages if root is None or root == stages.root else Tree.of(_below(stages, root), root)
    else:
        tree = Tree.of(list(stages.values()) if isinstance(stages, Mapping) else list(stages), root)
    classes = np.atleast_1d(np.asarray(c))
    if classes.dtype.kind not in "iu" or classes.ndim != 1:
        raise PlanError(
            "The certified class must be an integer per image",
            expected="int array (N,)",
            received=f"{classes.dtype} {classes.shape}",
            remedy="pass class indices",
        )
    classes = classes.astype(np.int64)
    grouped: dict[str, Array] = {}
    for name in tree.order:
        stage = tree.stages[name]
        if logits is not None and name in logits:
            grouped[name] = group_entries(stage, pass_entries(stage, logits[name]), classes)
            continue
        if name not in lower or name not in upper:
            grouped[name] = no_entries(stage, classes)
            continue
        entry = entry_radii(stage, lower[name], upper[name], fixed_reference(stage, classes))
        mask = None if sampled is None else sampled.get(name)
        if mask is not None:
            mask = np.asarray(mask)
            if mask.dtype != np.bool_ or mask.shape != classes.shape:
                raise PlanError(
                    f"The mask of stage {name!r} does not fit",
                    expected=f"booleans {classes.shape}",
                    received=f"{mask.dtype} {mask.shape}",
                    remedy="True where the stage was sampled",
                )
            entry = np.where(mask[:, None], entry, 0.0)
        grouped[name] = group_entries(stage, entry, classes)
    radius, by = recursion(tree, grouped)
    return np.where(classes > ABSTAIN, radius, 0.0), np.array(tree.order, dtype=object)[by]


def _below(tree: Tree, root: str) -> list[Stage]:
    """The stages that can be reached from `root`."""
    names, todo = [], [root]
    while todo:
        name = todo.pop()
        if name in tree.stages and name not in names:
            names.append(name)
            todo.extend(tree.stages[name].children)
    return [tree.stages[name] for name in names]
