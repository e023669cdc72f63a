"""Measures what an adaptive plan saves: certify published tables again from binomial votes, fixed against adaptive.

    python examples/replay_adaptive.py --tables DIR

DIR holds tables in the field's format (`idx label predict radius correct time`), each named `<method>_<sigma>.tsv`, in folders
or not; Cohen et al. 2019's and SmoothAdv's are public. Each row's radius is inverted to the vote share that gave
it (n = 100,000, alpha = 0.001, one-sided), votes are drawn at that share, and the real `CertifyPolicy` decides
what to draw and what to certify. The fixed run's votes begin with the adaptive run's, as they do in the engine.

The floor is Wald's (1945): the votes that any sequential test needs on average to tell a row's share from the cell's lower edge
with error alpha, or from its upper edge with error beta, whichever are more, and n at most. A plan may stay below it: near an
edge it stops once the votes that are left cannot reach the cell. `--patience` replays other levels beta: what a user who stops
earlier saves in votes and pays in certified accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from rsrouter.core import AdaptivePlan, AlphaSplit, CertifyPolicy, FixedPlan, Plan, Stage, Tree
from rsrouter.core.patience import wald_floor


def read_shares(path: Path, sigma: float, n: int, alpha: float, abstained: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Vote share of the predicted class, and whether it is the label, per row.

    A row that abstained does not say its share. `abstained="spread"` continues the density of the shares just above
    one half below it; `"half"` puts all of them at one half exactly, the costliest place there is.
    """
    lowest = n // 2
    bounds = stats.beta.ppf(alpha, np.arange(lowest, n + 1), n - np.arange(lowest, n + 1) + 1)
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    radius = np.array([float(row[3]) for row in rows])
    answered = np.array([int(row[2]) >= 0 for row in rows]) & (radius > 0)
    # the count whose Clopper-Pearson bound gives the row's radius
    count = lowest + np.searchsorted(bounds, special.ndtr(radius / sigma))
    share = np.where(answered, np.minimum(count, n) / n, 0.5)
    if abstained == "spread":
        near = answered & (share < 0.55)
        width = min(0.4, (~answered).sum() * (0.55 - share[answered].min()) / max(1, near.sum()))
        share[~answered] = np.linspace(0.5 - width, share[answered].min(), (~answered).sum())
    return share, np.array([row[4].strip() == "1" for row in rows])


def certify(
    tree: Tree, plan: Plan, share: NDArray[np.float64], votes: dict[int, NDArray[np.int64]], alpha: float
) -> CertifyPolicy:
    """Runs the policy on cumulative top-class counts `votes[n] (N,)`."""
    policy = CertifyPolicy(tree, plan, AlphaSplit.even(alpha, tree.paths), len(share), sides="one")
    name = tree.root
    while not policy.done.all():
        requests = policy.next_requests(np.flatnonzero(~policy.done).tolist())
        answers = []
        for r in requests:
            if r.purpose == "select":
                top = r.count  # the selected class is the published one
            else:
                top = int(votes[r.start + r.count][r.image] - (votes[r.start][r.image] if r.start else 0))
            answers.append({name: np.array([top, r.count - top])})
        policy.update(requests, answers)
    return policy


def draw(rng: np.random.Generator, share: NDArray[np.float64], looks: list[int]) -> dict[int, NDArray[np.int64]]:
    """Cumulative counts at every number of votes in `looks`, one stream per row."""
    counts, total, drawn = {}, np.zeros(len(share), np.int64), 0
    for look in sorted(set(looks)):
        total = total + rng.binomial(look - drawn, share)
        counts[look], drawn = total, look
    return counts


def certified_accuracy(policy: CertifyPolicy, correct: NDArray[np.bool_], radii: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per cent of rows certified at each radius with the right class; r = 0 asks for a certificate at all."""
    kept = (policy.radius[:, None] >= radii) & (policy.radius[:, None] > 0) & correct[:, None]
    return 100.0 * np.asarray(kept.mean(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--step", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--abstained", choices=("spread", "half"), default="spread")
    parser.add_argument("--growth", type=float)
    parser.add_argument("--first", type=int)
    parser.add_argument("--last-share", type=float)
    parser.add_argument("--beta", type=float)
    parser.add_argument(
        "--patience", type=lambda text: [float(v) for v in text.split(",")], help="levels beta, such as .01,.1,.5"
    )
    parser.add_argument("--rows", type=int, help="only so many rows of each table, evenly spread")
    parser.add_argument("--bound")
    parser.add_argument("--spending")
    args = parser.parse_args()
    chosen = {
        k: v
        for k, v in vars(args).items()
        if k in ("growth", "first", "last_share", "beta", "bound", "spending") and v is not None
    }
    print(f"n = {args.n}, alpha = {args.alpha}, grid {args.step}; {chosen or 'default plan'}")
    print("table                  rows   beta   votes   / floor   most points lost (at r)   ACR kept   mean looks")
    for path in sorted(args.tables.rglob("*_*.tsv")):
        sigma = float(path.stem.rpartition("_")[2])
        share, correct = read_shares(path, sigma, 100_000, 1e-3, args.abstained)
        if args.rows is not None:
            part = np.linspace(0, len(share) - 1, min(args.rows, len(share))).astype(int)
            share, correct = share[part], correct[part]
        tree = Tree.of([Stage("expert", sigma, leads_to=(0, 1))])
        reach = FixedPlan(100, args.n).reach(tree, AlphaSplit.even(args.alpha, tree.paths), "one")
        grid = np.arange(0.0, reach, args.step)
        plans = [
            AdaptivePlan(args.n, grid, **{**chosen, **more}) for more in ([{"beta": b} for b in args.patience or ()] or [{}])
        ]
        votes = draw(np.random.default_rng(args.seed), share, [*plans[0].looks, args.n])
        fixed = certify(tree, FixedPlan(100, args.n), share, votes, args.alpha)
        full = np.array([fixed.drawn(i) for i in range(len(share))])
        for plan in plans:
            floor = wald_floor(share, special.ndtr(grid / sigma), args.n, args.alpha, plan.beta)
            adaptive = certify(tree, plan, share, votes, args.alpha)
            drawn = np.array([adaptive.drawn(i) for i in range(len(share))])
            loss = certified_accuracy(fixed, correct, grid) - certified_accuracy(adaptive, correct, grid)
            looks = np.searchsorted(plan.looks, drawn - plan.n0) + 1
            worst = f"{loss.max():6.3f} (r = {grid[loss.argmax()]:.2f})"
            print(
                f"{path.stem:21s} {len(share):6d}   {plan.beta:4.2f}  {drawn.sum() / full.sum():6.1%}"
                f"   {drawn.sum() / floor.sum():6.2f}"
                f"    {worst}        {adaptive.radius.sum() / fixed.radius.sum():6.3f}     {looks.mean():.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
