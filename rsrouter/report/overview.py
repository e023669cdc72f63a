"""The numbers behind the curves: the statement about a whole table, what each run drew and took, and all of it as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsrouter.report import curves
from rsrouter.report.stages import answering_stages
from rsrouter.report.summary import Summary
from rsrouter.results import Table, csv_cell, printable

Array = NDArray[np.float64]

#: Failure probability of the statement about a whole table.
DELTA = 1e-3


@dataclass(frozen=True)
class WholeTable:
    """With probability at least `1 - delta` over all of a table's noise, at most `wrong` of its rows are wrong.

    Attributes:
        alpha: failure probability of each row.
        delta: of the statement.
        independent: whether each image had its own noise; else Markov's inequality, which says much less.
        wrong: the number of rows.
        lower: `(R,)` lower bound on the true certified accuracy on these images, for all radii at once.
    """

    alpha: float
    delta: float
    independent: bool
    wrong: int
    lower: list[float]


def whole_table(table: Table, radii: ArrayLike, delta: float = DELTA) -> WholeTable | None:
    """The statement about all rows at once (`curves.certified_lower`); None without a recorded alpha, or without labels."""
    about = table.about
    if about is None or not table.labelled:
        return None
    alpha, independent = about.alpha, about.independent_noise
    lower = curves.certified_lower(table, radii, alpha=alpha, delta=delta, independent=independent)
    wrong = curves.wrong_certificates(len(table), alpha, delta=delta, independent=independent)
    return WholeTable(alpha, delta, independent, wrong, lower.tolist())


@dataclass(frozen=True)
class Run:
    """One table in numbers and settings; None (or "") where it does not say.

    Attributes:
        name, role: of the table.
        coverage, least: mean and smallest over the headline radii of accuracy / envelope; of routed tables and the best expert.
        votes: drawn per image, mean.
        saved: share of the votes a fixed plan on the same stages would have drawn.
        seconds: per image, mean, where it ran.
        plan, alpha, rule, noise: settings.
    """

    name: str
    role: str
    coverage: float | None
    least: float | None
    votes: float | None
    saved: float | None
    seconds: float | None
    plan: str
    alpha: float | None
    rule: str
    noise: str


def run_of(table: Table, summary: Summary) -> Run:
    """What a table's rows and metadata say about its run."""
    drawn, fixed, about = table.n_drawn[table.n_drawn > 0], table.fixed_votes, table.about
    seconds = table.time[np.isfinite(table.time) & (table.time > 0)]
    standing = {s.name: s for s in summary.standings}.get(table.name)
    return Run(
        table.name,
        summary.roles[table.name],
        None if standing is None else standing.coverage,
        None if standing is None else standing.least,
        float(drawn.mean()) if len(drawn) else None,
        None if fixed is None or not fixed.sum() else 1.0 - float(table.n_drawn.sum()) / float(fixed.sum()),
        float(seconds.mean()) if len(seconds) else None,
        "" if about is None else f"{about.plan.to_dict()['kind']}, {about.plan.n_max:,}",
        None if about is None else about.alpha,
        ", ".join(sorted({printable(r) for r in set(table.rule.tolist()) if r})),
        "" if about is None else printable(about.noise),
    )


def runs(summary: Summary) -> list[Run]:
    """Every table's run, in drawing order; [] where none says more than its curve does."""
    found = [run_of(table, summary) for table in summary.tables]
    return found if any(r.votes is not None or r.plan for r in found) else []


class Text(str):
    """A cell that somebody else wrote."""


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO(newline="")
    safe = ([csv_cell(cell) if isinstance(cell, Text) else cell for cell in row] for row in rows)
    csv.writer(buffer, lineterminator="\n").writerows(safe)
    return buffer.getvalue().encode()


def _number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.6g}"


def numbers_csv(summary: Summary) -> bytes:
    """The headline table, one row per series and radius: `series role radius accuracy low high surely abstained acr`.

    `surely` is `WholeTable.lower`, cut (never rounded up) to six digits.
    """
    rows: list[Sequence[object]] = [("series", "role", "radius", "accuracy", "low", "high", "surely", "abstained", "acr")]
    tables = {t.name: t for t in summary.tables}
    for s in summary.series:
        sure = whole_table(tables[s.name], summary.radii) if s.name in tables else None
        for i, r in enumerate(summary.radii):
            rows.append(
                (
                    Text(s.name),
                    s.role,
                    _number(float(r)),
                    _number(float(s.at[i])),
                    "" if s.at_low is None else _number(float(s.at_low[i])),
                    "" if s.at_high is None else _number(float(s.at_high[i])),
                    "" if sure is None else _number(np.floor(sure.lower[i] * 1e6) / 1e6),
                    _number(s.abstention),
                    _number(s.acr),
                )
            )
    return _csv(rows)


def curve_csv(summary: Summary) -> bytes:
    """The curves as CSV: `series role radius accuracy low high`, at the headline radii and on the fine grid."""
    rows: list[Sequence[object]] = [("series", "role", "radius", "accuracy", "low", "high")]
    radii, first = np.unique(np.concatenate([summary.radii, summary.grid]), return_index=True)
    for s in summary.series:
        parts = ((s.at, s.fine), (s.at_low, s.low), (s.at_high, s.high))
        ends = [None if a is None or b is None else np.concatenate([a, b])[first] for a, b in parts]
        for i, r in enumerate(radii):
            rows.append((Text(s.name), s.role, _number(float(r)), *("" if e is None else _number(float(e[i])) for e in ends)))
    return _csv(rows)


def shares_csv(summary: Summary) -> bytes:
    """Who answers and what limits the radius, of every table: `table kind name radius share` (of all its images)."""
    rows: list[Sequence[object]] = [("table", "kind", "name", "radius", "share")]
    for table in summary.tables:
        for kind, column in (("expert", table.expert), ("stage", answering_stages(table)), ("bound_by", table.bound_by)):
            if column is None or not any(column):
                continue
            for name, share in curves.shares_by_radius(column, table, summary.radii).items():
                rows += [
                    (Text(table.name), kind, Text(name), _number(float(r)), _number(float(v)))
                    for r, v in zip(summary.radii, share)
                ]
    return _csv(rows)


def report_json(summary: Summary) -> bytes:
    """Every number of the page for programs: the summary, each table's run, and its whole-table statement."""
    sure = {t.name: whole_table(t, summary.radii) for t in summary.tables}
    content: dict[str, Any] = {
        **summary.to_dict(),
        "runs": [asdict(r) for r in (run_of(t, summary) for t in summary.tables)],
        "whole_tables": {name: None if s is None else asdict(s) for name, s in sure.items()},
    }
    # JSON has no word for NaN (the coverage of nothing)
    text = json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=1, allow_nan=False)
    return (text + "\n").encode()
