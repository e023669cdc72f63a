"""The checks that need the images: votes again, fresh votes, attacks, on some rows of a table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsrouter.audit.attack import attack
from rsrouter.audit.state import Settings, State, environment
from rsrouter.audit.votes import (
    ROUNDING_SHARE,
    ROUNDING_VOTES,
    STAGE_TESTS,
    FreshRow,
    fresh_row,
    hidden_inflation,
    lean,
    lean_p_value,
    moved_logits,
    moved_votes,
    pooled_p_value,
    rederive,
    same_environment,
    seen_with_probability,
    smallest_inflation,
    smallest_inflation_seen,
    smallest_lean_seen,
)
from rsrouter.core.errors import PlanError
from rsrouter.core.recompute import StoredVotes, read_votes
from rsrouter.core.types import ABSTAIN
from rsrouter.data import ImageData
from rsrouter.results import Table, TableMetadata
from rsrouter.sampling.engine import Engine
from rsrouter.sampling.execution import Execution
from rsrouter.sampling.noise import SHARED, STREAMS
from rsrouter.sampling.paired import pairs_of
from rsrouter.smooth import RoutedSmooth, Smooth


@dataclass(frozen=True)
class Chosen:
    """The rows of a table that are looked at.

    Attributes:
        rows: `(row number, its stored votes)`.
        pixels: row number to image `(C, H, W)`.
    """

    state: State
    table: Table
    run: TableMetadata
    subject: Smooth | RoutedSmooth
    rows: list[tuple[int, StoredVotes]]
    pixels: dict[int, Tensor]

    def engine(self) -> Engine:
        """Draws the votes of the published seed."""
        return self.subject.engine(self.run.seed, self.state.settings.device)


def audit_rows(state: State, table: Table, run: TableMetadata, subject: Smooth | RoutedSmooth, images: ImageData) -> None:
    settings = state.settings
    rng = np.random.default_rng([settings.seed, int.from_bytes(hashlib.sha256(table.name.encode()).digest()[:4], "little")])
    count = len(table) if settings.rows is None else min(settings.rows, len(table))
    chosen = np.sort(rng.choice(len(table), count, replace=False))
    chance = [seen_with_probability(len(table), count, edited) for edited in (1, 5)]
    if count < len(table):
        state.warn(
            table.name,
            f"votes of {count} of {len(table)} rows are looked at: one edited row would be among them with probability "
            f"{chance[0]:.2f}, one of five with {chance[1]:.2f}. Audit all rows (--rows all) before a publication",
        )
    rows: list[tuple[int, StoredVotes]] = []
    for i in chosen.tolist():
        try:
            rows.append((i, read_votes(subject.tree, run.plan, table.counts(i))))
        except PlanError:
            continue  # reported with the radii
    if not rows:
        for check in ("votes", "fresh", "attack"):
            state.skip(check, table.name, "none of the rows has votes that can be read")
        return
    pixels = {i: images.image(int(table.idx[i])) for i, _ in rows}
    picked = Chosen(state, table, run, subject, rows, pixels)
    if run.transfer is not None:
        _transfer(picked)
    if subject.tree.passing:
        _passes(picked)
    _votes(picked)
    _fresh(picked)
    _attack(picked)


def _transfer(chosen: Chosen) -> None:
    """Paired draws again: those of the table's own execution and of the one that it was carried over to."""
    state, table, run, subject, rows, pixels = chosen.state, chosen.table, chosen.run, chosen.subject, chosen.rows, chosen.pixels
    told = run.transfer
    assert told is not None
    here = environment(state.settings.device)
    other = subject.with_execution(Execution.recorded(told.execution, told.device, f"the transfer of {table.name}"))
    wanted = [
        (run.device, run.versions, run.threads, run.instructions, subject.execution.threads),
        (told.device, told.versions, told.threads, told.instructions, other.execution.threads),
    ]
    differs = [
        d
        for device, versions, threads, instructions, fixed in wanted
        for d in same_environment(
            {"device": device, "torch": versions.get("torch"), "threads": threads, "instructions": instructions},
            {**here, "threads": fixed or here["threads"]},
        )
    ]
    if differs:
        state.warn(table.name, f"its paired draws cannot be made again here ({'; '.join(dict.fromkeys(differs))})")
        state.skip("transfer", table.name, "; ".join(dict.fromkeys(differs)))
        return
    engines = [chosen.engine(), other.engine(run.seed, state.settings.device)]
    found: list[tuple[int | None, str]] = []
    drawn = 0
    for i, _ in rows:
        idx, counts = int(table.idx[i]), table.counts(i)
        stored = {stage: list(pair) for stage, pair in counts.get("moved", {}).items()}
        if not stored:
            continue
        drawn += told.votes
        again = pairs_of(subject.tree, counts, engines, pixels[i], idx, told.votes)
        if any(again.get(stage) != pair for stage, pair in stored.items()):
            found.append((idx, f"disagreements {stored} in the table, {again} drawn again"))
    state.add("transfer", table.name, found, f"{drawn:,} pairs of {len(rows)} rows drawn again, compared bit for bit")


def _passes(chosen: Chosen) -> None:
    """Logits of the stages that do not vote again: on any machine, to the rounding that the stages state."""
    state, table, subject, rows, pixels = chosen.state, chosen.table, chosen.subject, chosen.rows, chosen.pixels
    engine = chosen.engine()
    found: list[tuple[int | None, str]] = []
    for i, row in rows:
        far = moved_logits(subject.tree, engine, pixels[i], row)
        wrong = {name: times for name, times in far.items() if not times <= 1.0}
        found += [
            (int(table.idx[i]), f"the logits of stage {name} are {times:.3g} times as far from a new pass as rounding allows")
            for name, times in wrong.items()
        ]
    stages = ", ".join(s for s in subject.tree.order if not subject.tree.stages[s].votes)
    state.add("passes", table.name, found, f"logits of {stages} computed again for {len(rows)} rows, to their rounding")


def _votes(chosen: Chosen) -> None:
    """Votes again from the published seed."""
    state, table, run, subject, rows, pixels = chosen.state, chosen.table, chosen.run, chosen.subject, chosen.rows, chosen.pixels
    here = environment(state.settings.device)
    recorded = {
        "device": run.device,
        "torch": run.versions.get("torch"),
        "numpy": run.versions.get("numpy"),
        "threads": run.threads,
        "instructions": run.instructions,
    }
    here["threads"] = subject.execution.threads or here["threads"]
    drawn_as = Execution.recorded(run.execution, run.device)
    differs, share = same_environment(recorded, here), ROUNDING_SHARE[drawn_as.rounding]
    stream = STREAMS[drawn_as.stream]
    if run.stream != stream:
        unlike = f"the table says its noise streams are {run.stream}, this version's are {stream}: use its version"
        state.warn(table.name, f"{unlike}; until then its votes are only compared with fresh ones")
        state.skip("votes", table.name, unlike)
        return
    engine = chosen.engine()
    named, results = True, list[tuple[int, int, int]]()
    for at, (i, row) in enumerate(rows):
        state.tell("votes", at, len(rows))
        idx, stored = int(table.idx[i]), table.counts(i)
        again = rederive(subject.tree, engine, pixels[i], idx if named else None, stored)
        moved, drawn = moved_votes(stored, again)
        if at == 0 and moved > ROUNDING_VOTES:
            # certify without ids names an image by its content alone
            other = rederive(subject.tree, engine, pixels[i], None, stored)
            if moved_votes(stored, other)[0] < moved:
                named, again = False, other
                moved, drawn = moved_votes(stored, again)
        results.append((moved, drawn, lean(row, again)))
    total, most = sum(d for _, d, _ in results), max(m / max(1, d) for m, d, _ in results)
    exact = not differs or not any(moved for moved, _, _ in results)
    found: list[tuple[int | None, str]] = []
    for (i, _), (moved, drawn, _) in zip(rows, results, strict=True):
        if moved > (0 if exact else max(ROUNDING_VOTES, int(share * drawn))):
            found.append((int(table.idx[i]), f"{moved} of {drawn} votes are not those that seed {run.seed} gives for this image"))
    how, part = "bit for bit", 0.0
    if not exact:
        part, leans = smallest_lean_seen(len(rows), state.settings.level), [favour for _, _, favour in results]
        if (p := lean_p_value(leans)) < state.settings.level:
            up, of = sum(v > 0 for v in leans), sum(v != 0 for v in leans)
            found.append((None, f"{up} of {of} rows lean towards their certificates, which rounding does not do (p = {p:.1g})"))
        hidden = [hidden_inflation(s, share) for s in _shares(table, rows)]
        worth = f"{100 * float(np.median(hidden)):.1f}% of radius" if hidden else "an unknown part of radius"
        where = "any number of them (too few to show a direction)" if not np.isfinite(part) else f"less than {part:.0%} of them"
        state.warn(
            table.name,
            f"its JSON names another machine ({'; '.join(differs)}), so votes are compared to rounding: up to {share:.1%} of "
            f"a row's votes, worth {worth} (median), could have been added in {where}. Audit on a machine of that kind",
        )
        how = f"to rounding, up to {share:.1%} of a row's votes, of which {most:.2%} moved at most ({'; '.join(differs)})"
    state.add(
        "votes",
        table.name,
        found,
        f"{total:,} votes of {len(rows)} rows drawn again from their seed, compared {how}",
        exact=exact,
        differs=differs,
        votes=total,
        moved_share=most,
        rows_seen_from=None if exact or not np.isfinite(part) else part,
    )


def _shares(table: Table, rows: list[tuple[int, StoredVotes]]) -> list[float]:
    """Vote share of the outcome that limits the radius, of every certified row."""
    shares = []
    for i, row in rows:
        stage = str(table.bound_by[i])
        if int(table.predict[i]) != ABSTAIN and stage in row.looks and row.reference.get(stage, -1) >= 0:
            counts = row.looks[stage][-1][1]
            shares.append(float(counts[row.reference[stage]] / counts.sum()))
    return shares


def _fresh(chosen: Chosen) -> None:
    """Fresh noise against counts and radii.

    An adaptive plan stops where its votes look decided, so a test at its last look pays for all of its looks; and
    the shares at stopping lean, if only slightly, so they are not pooled over rows.
    """
    state, table, run, subject, rows, pixels = chosen.state, chosen.table, chosen.run, chosen.subject, chosen.rows, chosen.pixels
    settings, looks = state.settings, len(run.plan.looks)
    each = settings.level / 3 / len(rows) / looks
    # streams of their own, also where the table shared one between its images
    engine = Engine(
        subject.routed.models,
        pixels[rows[0][0]].shape,
        seed=settings.seed,
        device=settings.device,
        execution=subject.execution,
        noise=run.noise.removesuffix(SHARED),
    )
    found: list[tuple[int | None, str]] = []
    results: list[FreshRow] = []
    for at, (i, stored) in enumerate(rows):
        state.tell("fresh", at, len(rows))
        on_path = {s for s, _ in stored.path}
        sampled = {s for s in (*stored.looks, *stored.logits) if run.rule != "min" or s in on_path}
        row = fresh_row(
            subject.tree,
            engine,
            pixels[i],
            stored,
            str(table.bound_by[i]),
            votes=settings.fresh_votes,
            level=settings.level / 3 / looks,
            tests=len(rows),
            sampled=sampled,
        )
        results.append(row)
        idx = int(table.idx[i])
        if row.p_value < each:
            found.append((idx, f"stored votes do not agree with fresh ones (p = {row.p_value:.1g}, Fisher)"))
        if int(table.predict[i]) != ABSTAIN and float(table.radius[i]) > row.most:
            found.append((idx, f"radius {table.radius[i]:.6f} published; fresh votes allow at most {row.most:.6f}"))
    use = [r for r in results if r.votes[0]]
    pooled, together = None, float("inf")
    if looks == 1 and use and not run.noise.endswith(SHARED):
        pooled = pooled_p_value(use)
        shares, stored_votes, fresh_votes = [r.shares[0] for r in use], [r.votes[0] for r in use], [r.votes[1] for r in use]
        together = smallest_inflation(shares, stored_votes, fresh_votes, settings.level / 3)
        if pooled < settings.level / 3:
            text = f"over all audited rows stored votes favour the certified class more than fresh ones do (p = {pooled:.1g})"
            found.append((None, text))
    elif use:
        together = smallest_inflation_seen(use, each / STAGE_TESTS)
    single = float(np.median([r.detectable for r in use])) if use else float("inf")
    state.add(
        "fresh",
        table.name,
        found,
        f"{settings.fresh_votes:,} fresh votes a network on {len(rows)} rows; radii inflated by {_percent(together)} in all of "
        f"them, or by {_percent(single)} in one (median), would have been seen with probability 95%",
        detectable_all_rows=_finite(together),
        detectable_one_row=_finite(single),
        p_value=pooled,
        level=settings.level,
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if np.isfinite(value) else "any amount (not detectable)"


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _attack(chosen: Chosen) -> None:
    """Looks for another answer inside the certified balls."""
    state, table, run, subject, rows, pixels = chosen.state, chosen.table, chosen.run, chosen.subject, chosen.rows, chosen.pixels
    settings = state.settings
    if settings.attack_steps < 1:
        state.skip("attack", table.name, "switched off (attack_steps=0)")
        return
    certified = [i for i, _ in rows if int(table.predict[i]) != ABSTAIN]
    if not certified:
        state.add("attack", table.name, [], "every audited row abstains: there is no ball to search", searched=0, undecided=0)
        return
    x = torch.stack([pixels[i] for i in certified])
    c = torch.from_numpy(table.predict[certified].astype(np.int64))
    radius = torch.from_numpy(table.radius[certified])
    parts = []
    for start in range(0, len(certified), 16):
        state.tell("attack", start, len(certified))
        part = slice(start, start + 16)
        parts.append(
            attack(
                subject.tree,
                subject.routed.models,
                x[part],
                c[part],
                radius[part],
                steps=settings.attack_steps,
                seed=(settings.seed + start) % 2**62,
                eight_bit=run.noise.startswith("sound"),
            )
        )
    points = torch.cat(parts)
    distance = (points.double() - x.double()).flatten(1).norm(dim=1)
    inside = (distance < radius).numpy()
    alpha = min(settings.level, run.alpha)
    found: list[tuple[int | None, str]] = []
    answers = _predict(subject, points, settings, alpha, 0)
    doubtful = np.flatnonzero(inside & (answers != ABSTAIN) & (answers != c.numpy()))
    confirmed = _predict(subject, points[doubtful], settings, alpha, 1) if len(doubtful) else np.zeros(0, np.int64)
    for k, again in zip(doubtful.tolist(), confirmed.tolist(), strict=True):
        if again == answers[k]:
            found.append(
                (
                    int(table.idx[certified[k]]),
                    f"answers {again} instead of {int(c[k])} at distance {float(distance[k]):.6f}, inside radius "
                    f"{float(radius[k]):.6f}; twice, each with error probability {alpha:g}",
                )
            )
    state.add(
        "attack",
        table.name,
        found,
        f"{int(inside.sum())} certified balls searched with {settings.attack_steps} gradient steps; "
        f"{'no' if not found else len(found)} flips, {int((answers == ABSTAIN).sum())} points undecided",
        searched=int(inside.sum()),
        undecided=int((answers == ABSTAIN).sum()),
    )


def _predict(subject: Smooth | RoutedSmooth, points: Tensor, settings: Settings, alpha: float, turn: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(f"{settings.seed} predict {turn}".encode()).digest()[:7], "little")
    return subject.predict(points, n=settings.predict_votes, alpha=alpha, seed=seed, device=settings.device)
