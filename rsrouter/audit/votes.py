"""Votes drawn again: with the published seed, bit for bit, and with fresh noise, statistically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats
from torch import Tensor

from rsrouter.core.bounds import binom_lower, binom_upper
from rsrouter.core.certificates import entry_radii, group_entries, no_entries, recursion
from rsrouter.core.passes import pass_entries
from rsrouter.core.recompute import StoredVotes, Votes
from rsrouter.core.requests import ESTIMATE, PASS, SELECT, VoteRequest
from rsrouter.core.tree import Tree
from rsrouter.sampling.engine import Engine, image_identity

AUDIT = "audit"
#: Parts of a row that hold votes of its own streams.
_DRAWN = ("select", "estimate", "earlier")

#: How close the counts of one noise stream come on two versions of the same libraries or two processors: rounding moves a
#: few votes, more of them with fewer bits.
ROUNDING_SHARE, ROUNDING_VOTES = {"float32": 0.005, "tf32": 0.005, "bfloat16": 0.01, "float16": 0.005}, 3

#: Outcomes compared in one row, about, for the statement of what the test would detect.
STAGE_TESTS = 10


def rederive(tree: Tree, engine: Engine, image: Tensor, name: object, stored: Votes) -> dict[str, dict[str, NDArray[np.int64]]]:
    """The votes of one row, drawn again from their own streams, in the form of `stored`.

    Earlier looks are prefixes of the estimation stream, so each of them is drawn as well.
    """
    looks = {key: key.rpartition("@")[0] for key in stored.get("earlier", {})}
    wanted: dict[tuple[str, str], dict[int, list[tuple[str, str, str]]]] = {}
    for part, purpose in (("select", SELECT), ("estimate", ESTIMATE), ("earlier", ESTIMATE)):
        for key, counts in stored.get(part, {}).items():
            stage = looks[key] if part == "earlier" else key
            cuts = wanted.setdefault((purpose, tree.stages[stage].network), {})
            cuts.setdefault(int(sum(counts)), []).append((part, key, stage))
    again: dict[str, dict[str, NDArray[np.int64]]] = {part: {} for part in stored if part in _DRAWN}
    identity = [image_identity(image, name)]
    for (purpose, network), cuts in wanted.items():
        start, total = 0, dict[str, NDArray[np.int64]]()
        for cut in sorted(cuts):
            (drawn,) = engine.run(image[None], identity, [VoteRequest(0, network, purpose, start, cut - start)])
            total = {stage: np.asarray(counts + total.get(stage, 0), np.int64) for stage, counts in drawn.items()}
            start = cut
            for part, key, stage in cuts[cut]:
                again[part][key] = total[stage]
    return again


def moved_logits(tree: Tree, engine: Engine, image: Tensor, row: StoredVotes) -> dict[str, float]:
    """How far the stored logits of each deterministic stage are from those of a new pass, in units of what rounding allows.

    Each pass errs by at most the stage's rounding, so two differ by at most twice that.
    """
    requests = [VoteRequest(0, network, PASS, 0, 1) for network in tree.passing]
    far: dict[str, float] = {}
    for found in engine.run(image[None], [b""], requests) if requests else []:
        for name, logits in found.items():
            old, new = row.logits[name], np.where(np.isfinite(logits), logits, np.nan)
            room = 2.0 * tree.stages[name].rounding + 1e-12 * float(np.nan_to_num(np.abs(new)).max())
            apart = np.where(np.isnan(old) & np.isnan(new), 0.0, np.nan_to_num(np.abs(old - new), nan=np.inf))
            far[name] = float((apart / room).max())
    return far


def moved_votes(stored: Votes, again: Mapping[str, Mapping[str, NDArray[np.int64]]]) -> tuple[int, int]:
    """How many votes differ at least, and of how many: half the L1 distance of the counts, summed over stages and looks."""
    moved = total = 0
    for part, stages in stored.items():
        for key, counts in stages.items() if part in _DRAWN else ():
            drawn = again[part].get(key)
            total += int(sum(counts))
            if drawn is None or len(drawn) != len(counts):
                moved += int(sum(counts))
            else:
                moved += int(np.abs(np.asarray(counts) - drawn).sum()) // 2
    return moved, total


def lean(row: StoredVotes, again: Mapping[str, Mapping[str, NDArray[np.int64]]]) -> int:
    """Votes by which the stored counts of one row favour its certificate over those drawn again, summed over stages.

    More votes for the outcome whose lower bound counts; where a stage has none (it deferred), fewer for its strongest outcome.
    """
    favour = 0
    for stage, looks in row.looks.items():
        stored, drawn, k = looks[-1][1], again["estimate"][stage], row.reference.get(stage, -1)
        top = int((stored + drawn).argmax())
        favour += int(stored[k] - drawn[k]) if k >= 0 else int(drawn[top] - stored[top])
    return favour


#: Of the rows in which rounding moved votes, the part that may lean to the certificate in an honest table. A half would be
#: exact for votes of a fixed number; an adaptive plan stops where its votes look good, which adds a little.
HONEST_LEAN = 0.55


def lean_p_value(leans: Sequence[int]) -> float:
    """One-sided p-value that rows lean towards their certificates more often than rounding explains (exact sign test).

    >>> lean_p_value([1, -2, 0, 1]) > 0.1, lean_p_value([3] * 20) < 1e-4
    (True, True)
    """
    up, down = sum(v > 0 for v in leans), sum(v < 0 for v in leans)
    return float(stats.binom.sf(up - 1, up + down, HONEST_LEAN))


def smallest_lean_seen(rows: int, level: float, power: float = 0.95) -> float:
    """The part of `rows` that must have been edited towards the certificate for `lean_p_value` to fall below `level` with
    probability `power`, where rounding moves the others either way; infinite where so few rows cannot show it.

    >>> smallest_lean_seen(5, 0.001)
    inf
    >>> 0.5 < smallest_lean_seen(20, 0.001) < smallest_lean_seen(15, 0.001) <= 1.0
    True
    """
    enough = np.flatnonzero(stats.binom.sf(np.arange(rows + 1) - 1, rows, HONEST_LEAN) < level)
    if not enough.size:
        return float("inf")
    parts = np.linspace(0.0, 1.0, 1001)
    seen = stats.binom.sf(int(enough[0]) - 1, rows, parts + (1.0 - parts) / 2.0)
    return float(parts[np.flatnonzero(seen >= power)[0]])


def hidden_inflation(share: float, moved: float) -> float:
    """By how much a radius grows, relatively, when `moved` of the votes are added to an outcome with `share` of them in truth.

    >>> round(hidden_inflation(0.9, 0.005), 3)
    0.023
    """
    if not share > 0.5:
        return float("inf")
    return float(special.ndtri(min(share + moved, 1.0 - 1e-12)) / special.ndtri(share) - 1.0)


def seen_with_probability(rows: int, audited: int, edited: int) -> float:
    """The chance that at least one of `edited` rows is among `audited` ones drawn at random of `rows` (hypergeometric).

    >>> seen_with_probability(100, 100, 1), round(seen_with_probability(500, 20, 5), 3)
    (1.0, 0.185)
    """
    return float(1.0 - stats.hypergeom.pmf(0, rows, min(edited, rows), audited))


@dataclass(frozen=True)
class FreshRow:
    """What fresh noise says about one row.

    Attributes:
        p_value: the smallest Fisher p-value over the stages and outcomes, times their number (Bonferroni in the row).
        most: the largest radius still plausible, at the level asked for.
        shares: stored and fresh vote share of the outcome that limits the radius.
        votes: stored and fresh number of votes behind them.
        detectable: the smallest inflation of this row's radius that the test would detect.
    """

    p_value: float
    most: float
    shares: tuple[float, float]
    votes: tuple[int, int]
    detectable: float


def fresh_row(
    tree: Tree,
    engine: Engine,
    image: Tensor,
    stored: StoredVotes,
    bound_by: str,
    *,
    votes: int,
    level: float,
    tests: int,
    sampled: set[str],
) -> FreshRow:
    """Draws fresh votes for the sampled stages of one row and compares.

    Two tests, both exact. The counts: Fisher's exact test of stored against fresh votes, outcome by outcome. The
    radius: from fresh Clopper-Pearson bounds *in the publisher's favour* follows the largest radius that is still
    plausible; a published radius above it is too large, whatever its counts say.

    Args:
        stored: the row's votes.
        bound_by: the stage that limits the radius.
        votes: fresh votes per network.
        level: failure probability of the whole audit's test.
        tests: how many rows share it.
        sampled: stages that the row's rule counts.
    """
    networks = list(dict.fromkeys(tree.stages[s].network for s in stored.looks))
    requests = [VoteRequest(0, network, AUDIT, 0, votes) for network in networks]
    drawn: dict[str, NDArray[np.int64]] = {}
    for counts in engine.run(image[None], [image_identity(image, "audit")], requests) if requests else []:
        drawn.update(counts)
    p_values = []
    grouped, c = {}, np.array([stored.c])
    width = max(1, sum(tree.stages[s].num_outcomes for s in stored.looks))
    alpha = level / (tests * width)
    for name in tree.order:
        stage = tree.stages[name]
        if name in stored.logits and name in sampled:
            grouped[name] = group_entries(stage, pass_entries(stage, stored.logits[name][None]), c)
            continue
        if name not in stored.looks or name not in drawn:
            grouped[name] = no_entries(stage, c)
            continue
        old, new = stored.looks[name][-1][1], drawn[name]
        for a, b in zip(old.tolist(), new.tolist(), strict=True):
            if a or b:
                p_values.append(float(stats.fisher_exact([[a, int(old.sum()) - a], [b, votes - b]]).pvalue))
        # bounds the wrong way round: everything as good for the publisher as the fresh votes allow
        # (short of 0 and 1, whose infinite quantiles certify nothing)
        low = np.minimum(binom_upper(new, votes, alpha), 1.0 - 2.0**-53)[None]
        high = np.maximum(binom_lower(new, votes, alpha), 1e-300)[None]
        entry = entry_radii(stage, low, high, np.array([stored.reference[name]]))
        grouped[name] = group_entries(stage, entry, c) if name in sampled else no_entries(stage, c)
    most = float(recursion(tree, grouped)[0][0]) if stored.c >= 0 else 0.0
    p_value = min(1.0, min(p_values) * len(p_values)) if p_values else 1.0
    share, sizes = (0.0, 0.0), (0, 0)
    if bound_by in drawn and stored.reference.get(bound_by, -1) >= 0:
        old, new, k = stored.looks[bound_by][-1][1], drawn[bound_by], stored.reference[bound_by]
        share, sizes = (float(old[k] / old.sum()), float(new[k] / votes)), (int(old.sum()), votes)
    found = (
        smallest_inflation([share[0]], [sizes[0]], [sizes[1]], level / (tests * max(1, len(p_values)))) if sizes[0] else np.inf
    )
    return FreshRow(p_value, most, share, sizes, float(found))


def smallest_inflation(
    shares: Sequence[float], stored: Sequence[int], fresh: Sequence[int], level: float, power: float = 0.95
) -> float:
    """The smallest relative inflation of the radii that fresh votes would show at `level` with probability `power`.

    The model: the true share p of the limiting outcome has `Phi^-1(p) = Phi^-1(stored share) / (1 + inflation)`,
    that is, every radius is published as `1 + inflation` times what it should be. One row: pass lists of one;
    several: the pooled one-sided test over all of them (`pooled_p_value`). Normal approximation.

    Args:
        shares: stored vote share of each row's limiting outcome.
        stored, fresh: numbers of votes behind the stored and the fresh shares.

    Returns:
        The inflation (0.01 is one percent), infinite where no inflation could be seen.
    """
    n, m = np.asarray(stored, dtype=np.float64), np.asarray(fresh, dtype=np.float64)
    p = (np.asarray(shares) * n + 0.5) / (n + 1.0)
    need = float(special.ndtri(1.0 - level) + special.ndtri(power))

    def score(inflation: float) -> float:
        true = special.ndtr(special.ndtri(p) / (1.0 + inflation))
        gap = float((p - true).sum())
        return gap / float(np.sqrt((p * (1 - p) / n + true * (1 - true) / m).sum())) - need

    if not score(100.0) > 0:
        return float("inf")
    return float(optimize.brentq(score, 0.0, 100.0, xtol=1e-6))


def smallest_inflation_seen(rows: Sequence[FreshRow], level: float, power: float = 0.95) -> float:
    """As `smallest_inflation`, for all rows alike, where at least one row's own test has to show it.

    Args:
        level: of each row's test.
    """
    n, m = np.array([r.votes for r in rows], dtype=np.float64).T
    p = (np.array([r.shares[0] for r in rows]) * n + 0.5) / (n + 1.0)
    z = float(special.ndtri(1.0 - level))

    def missed(inflation: float) -> float:
        true = special.ndtr(special.ndtri(p) / (1.0 + inflation))
        score = (p - true) / np.sqrt(p * (1 - p) / n + true * (1 - true) / m)
        return float(np.exp(special.log_ndtr(z - score).sum())) - (1.0 - power)

    if not missed(100.0) < 0:
        return float("inf")
    return float(optimize.brentq(missed, 0.0, 100.0, xtol=1e-6)) if missed(0.0) > 0 else 0.0


def pooled_p_value(rows: Sequence[FreshRow]) -> float:
    """One-sided p-value that the stored shares of the limiting outcomes are larger than the fresh ones, over all rows."""
    use = [r for r in rows if r.votes[0]]
    if not use:
        return 1.0
    n, m = np.array([r.votes for r in use], dtype=np.float64).T
    a, b = np.array([r.shares for r in use]).T
    p = (a * n + b * m + 0.5) / (n + m + 1.0)
    spread = float(np.sqrt((p * (1 - p) * (1 / n + 1 / m)).sum()))
    return float(stats.norm.sf((a - b).sum() / spread)) if spread > 0 else 1.0


def repeated_rows(tables: Sequence[tuple[int, Votes]], level: float = 1e-3) -> list[tuple[int, ...]]:
    """Groups of images with equal votes that chance does not explain.

    Two multinomial draws from the *same* probabilities agree with probability about the product over outcomes of
    1 / sqrt(4 pi n p (1 - p)), so equal votes on a wide distribution are suspicious and unanimous ones are not. A
    group is reported where that probability times the number of pairs is below `level`.

    Args:
        tables: (image id, votes) of every row.
    """
    groups: dict[str, list[int]] = {}
    chance: dict[str, float] = {}
    for idx, votes in tables:
        key = repr([sorted((s, tuple(v)) for s, v in votes.get(p, {}).items()) for p in ("select", "estimate")])
        groups.setdefault(key, []).append(idx)
        if len(groups[key]) == 2:
            log = 0.0
            for counts in (v for p in ("select", "estimate") for v in votes.get(p, {}).values()):
                spread = np.sort([c * (1.0 - c / max(1, sum(counts))) for c in counts])[:-1]  # one outcome follows from the rest
                log -= 0.5 * float(np.log(np.maximum(4.0 * np.pi * spread, 1.0)).sum())
            chance[key] = log
    pairs = len(tables) * (len(tables) - 1) / 2
    return [tuple(g) for k, g in groups.items() if len(g) > 1 and np.exp(chance[k]) * pairs < level]


def same_environment(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, of what decides bits."""
    keys = ("device", "torch", "numpy", "threads", "instructions")
    return [f"{k} {recorded.get(k)} against {here.get(k)}" for k in keys if recorded.get(k) not in (None, here.get(k))]
