"""From tables to the figures of a report: who is routed, who is an expert, and every number the page shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsrouter.core.errors import InputError
from rsrouter.core.types import ABSTAIN
from rsrouter.report import curves
from rsrouter.report.stages import stage_titles
from rsrouter.results import Table, align, printable, read_table, require_sound, unfinished
from rsrouter.results.field import compare_votes

Array = NDArray[np.float64]
Source = Table | str | os.PathLike[str]

ROUTED, EXPERT, OTHER = "routed", "expert", "other"
ROLES = (ROUTED, EXPERT, OTHER)

#: Points of a drawn curve: finer than a screen needs, small enough to inline.
POINTS = 201


@dataclass(frozen=True)
class Series:
    """One line of the figure and one row of the headline table.

    Attributes:
        name: what it is called; unique in its report.
        role: "routed", "expert", "other", "envelope" or "oracle".
        fine: accuracy on `Summary.grid`.
        low, high: `(2, ...)` interval on `Summary.grid`; None for envelope and oracle.
        at: accuracy, lower and upper end at `Summary.radii`.
        acr, abstention: None for envelope and oracle.
    """

    name: str
    role: str
    fine: Array
    low: Array | None
    high: Array | None
    at: Array
    at_low: Array | None
    at_high: Array | None
    acr: float | None = None
    abstention: float | None = None


@dataclass(frozen=True)
class Standing:
    """How one classifier stands against the envelope of the experts, over the headline radii.

    Attributes:
        name, role: of the table.
        least, at: the smallest ratio of its accuracy to the envelope, and the radius where it is.
        coverage, low, high: the mean of the ratios, with a bootstrap interval over images; NaN where they are so few that the
            experts may certify none of a sample.
    """

    name: str
    role: str
    least: float
    at: float
    coverage: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """In one sentence."""
        if np.isnan(self.coverage):
            return f"{self.name}: the experts' envelope is 0 at every radius"
        between = self.between(1) or "too few images for an interval"
        return (
            f"{self.name}: at least {100 * self.least:.1f}% of the experts' envelope (at radius {self.at:g}), "
            f"{100 * self.coverage:.1f}% on average ({between})"
        )

    def between(self, digits: int) -> str:
        """The interval in percent, such as "93.5 to 101.4"; "" where there is none."""
        return "" if np.isnan(self.low) else f"{100 * self.low:.{digits}f} to {100 * self.high:.{digits}f}"


@dataclass(frozen=True)
class Natural:
    """How often a routed classifier with a core answers right, certified or not: no certified figure.

    Attributes:
        name: of the table.
        core: name of the network.
        accuracy, low, high: of all answers, with an interval over images; None without labels.
        share: of the images that the core answered, uncertified.
    """

    name: str
    core: str
    accuracy: float | None
    low: float | None
    high: float | None
    share: float

    @property
    def words(self) -> str:
        """In one sentence."""
        answered = f"the core {self.core} answers {100 * self.share:.1f}% of the images, without a certificate"
        if self.accuracy is None or self.low is None or self.high is None:
            return f"{self.name}: {answered}"
        return (
            f"{self.name}: natural accuracy {100 * self.accuracy:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f}), "
            f"certified or not; {answered}"
        )


@dataclass
class Summary:
    """Everything a report shows, as numbers.

    Attributes:
        tables: the tables over the same images, sorted by image id.
        roles: name to role.
        radii: `(R,)` columns of the headline table.
        grid: `(POINTS,)` radii at which curves are drawn.
        labelled: whether accuracy can be told; without labels every figure is the certified share.
        series: lines in drawing order: routed, other, experts, envelope, oracle.
        standings: of every routed (or other) table, then of the best single expert; empty without experts.
        natural: of every table with a core; no part of any certified figure.
        notes: `(table, sentence)` of what a reader must know: "" where it is about all tables.
        titles: stage names to words for people.
    """

    tables: list[Table]
    roles: dict[str, str]
    radii: Array
    grid: Array
    labelled: bool
    confidence: float
    series: list[Series]
    standings: list[Standing] = field(default_factory=list)
    natural: list[Natural] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def coverage(self) -> dict[str, tuple[float, float, float]]:
        """Routed (or other) name to coverage and its interval."""
        return {s.name: (s.coverage, s.low, s.high) for s in self.standings if s.role != EXPERT}

    @property
    def best_single(self) -> Standing | None:
        """The expert that covers most of the envelope by itself."""
        return next((s for s in self.standings if s.role == EXPERT), None)

    def named(self, *roles: str) -> list[Table]:
        """The tables that have one of `roles`, in order."""
        return [t for t in self.tables if self.roles[t.name] in roles]

    @property
    def main(self) -> Table:
        """The table the page is about: the first routed one, else the first of all."""
        return (self.named(ROUTED) or self.named(OTHER) or self.tables)[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: radii, and per series accuracy, interval, ACR and abstention."""
        return {
            "images": len(self.main),
            "radii": self.radii.tolist(),
            "confidence": self.confidence,
            "quantity": "certified accuracy" if self.labelled else "certified share",
            "series": [
                {
                    "name": s.name,
                    "role": s.role,
                    "accuracy": s.at.tolist(),
                    "low": _listed(s.at_low),
                    "high": _listed(s.at_high),
                    "acr": s.acr,
                    "abstention": s.abstention,
                }
                for s in self.series
            ],
            "natural": [asdict(n) for n in self.natural],
            "notes": [{"table": name, "note": note} for name, note in self.notes],
            "standings": [asdict(s) for s in self.standings],
            "coverage": {name: {"value": v, "low": low, "high": high} for name, (v, low, high) in self.coverage.items()},
        }


def _listed(values: Array | None) -> list[float] | None:
    return None if values is None else values.tolist()


def load_tables(tables: Mapping[str, Source] | Sequence[Source] | Source) -> list[Table]:
    """Tables from paths or tables, as a mapping (its keys are the names), a list, or a single one.

    Raises:
        InputError: none at all, or something that is neither. ResultsError: unreadable files. IntegrityError: tables of ours
            whose rows do not follow from their votes.
    """
    if isinstance(tables, Mapping):
        pairs: list[tuple[str | None, Source]] = [(str(name), source) for name, source in tables.items()]
    elif isinstance(tables, Table | str | os.PathLike):
        pairs = [(None, tables)]
    else:
        pairs = [(None, source) for source in tables]
    loaded: list[Table] = []
    for name, source in pairs:
        if isinstance(source, Table):
            table = source if name is None else source.renamed(name)
        elif isinstance(source, str | os.PathLike):
            table = read_table(source, name=name, check="counts")
        else:
            raise InputError(
                "A report is made of results tables",
                expected="Table or path",
                received=type(source).__name__,
                remedy="pass what read_table returns, or the path of a TSV",
            )
        if table.about is not None and not table.checked:
            table = require_sound(table)
        loaded.append(table.renamed(printable(table.name) or "table"))
    if not loaded or any(len(t) == 0 for t in loaded):
        raise InputError(
            "There is nothing to report",
            expected="at least one results table with rows",
            received=f"{len(loaded)} tables",
            remedy="run certify first",
        )
    taken: dict[str, int] = {}
    unique = []
    for table in loaded:
        taken[table.name] = taken.get(table.name, 0) + 1
        unique.append(table if taken[table.name] == 1 else table.renamed(f"{table.name} ({taken[table.name]})"))
    return unique


def find_roles(tables: Sequence[Table], routed: str | Sequence[str] | None, experts: Sequence[str] | None) -> dict[str, str]:
    """Name to role: by argument, else by the metadata's `role`, else by what the rows show.

    A table that names a rule or several experts was routed; any other is one model: an expert.
    """
    names = [t.name for t in tables]
    asked = {ROUTED: [routed] if isinstance(routed, str) else list(routed or []), EXPERT: list(experts or [])}
    unknown = [n for group in asked.values() for n in group if n not in names]
    if unknown:
        raise InputError(
            "A report was asked about a table it does not have",
            expected=f"one of {names}",
            received=str(unknown),
            remedy="use the names the tables were given under",
        )
    roles = {}
    for table in tables:
        told = table.about.role if table.about else None  # a JSON that is not ours decides nothing
        if table.name in asked[ROUTED]:
            roles[table.name] = ROUTED
        elif table.name in asked[EXPERT]:
            roles[table.name] = EXPERT
        elif told in ROLES:
            roles[table.name] = str(told)
        elif any(table.rule) or len(set(table.expert.tolist())) > 1:
            roles[table.name] = ROUTED
        else:
            roles[table.name] = OTHER if routed and experts else EXPERT
    return roles


def summarise(
    tables: Mapping[str, Source] | Sequence[Source] | Source,
    *,
    routed: str | Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    radii: ArrayLike | None = None,
    confidence: float = 0.95,
    common: bool = False,
) -> Summary:
    """Every number of a report; the arguments and errors of `write_report`."""
    loaded = load_tables(tables)
    roles = find_roles(loaded, routed, experts)
    aligned = align(loaded, common=common)
    labelled = all(t.labelled for t in aligned)
    columns = _columns(aligned) if radii is None else np.unique(curves.check_radii(radii))
    grid = np.linspace(0.0, _last_radius(aligned, columns), POINTS)
    measure = curves.certified_accuracy if labelled else curves.certified_share
    series = []
    by_role = sorted(aligned, key=lambda t: (ROUTED, OTHER, EXPERT).index(roles[t.name]))
    for table in by_role:
        fine, at = (measure(table, r, confidence=confidence) for r in (grid, columns))
        series.append(
            Series(
                table.name,
                roles[table.name],
                fine.accuracy,
                fine.low,
                fine.high,
                at.accuracy,
                at.low,
                at.high,
                curves.average_certified_radius(table) if labelled else None,
                curves.abstention_rate(table),
            )
        )
    summary = Summary(by_role, roles, columns, grid, labelled, confidence, series, notes=notes_of(loaded))
    summary.natural = [_natural(t, confidence) for t in by_role if t.about is not None and t.about.core is not None]
    summary.titles = stage_titles(summary.main.about)
    pool = summary.named(EXPERT)
    if labelled and len(pool) > 1:
        for name, function in (("envelope", curves.envelope), ("oracle", curves.oracle)):
            series.append(Series(_free(name, roles), name, function(pool, grid), None, None, function(pool, columns), None, None))
        best = max(pool, key=lambda t: np.nan_to_num(curves.coverage(t, pool, columns)))
        for table in [*summary.named(ROUTED, OTHER), best]:
            interval = curves.coverage_interval(table, pool, columns, confidence=confidence)
            least, where = curves.least_ratio(table, pool, columns)
            summary.standings.append(
                Standing(table.name, roles[table.name], least, where, curves.coverage(table, pool, columns), *interval)
            )
    return summary


def _natural(table: Table, confidence: float) -> Natural:
    found = curves.natural_accuracy(table, confidence=confidence) if table.labelled else None
    core = table.described().core
    share = float((table.core != ABSTAIN).mean())
    accuracy, low, high = (None, None, None) if found is None else found
    return Natural(table.name, printable(core.name if core else ""), accuracy, low, high, share)


def notes_of(tables: Sequence[Table]) -> list[tuple[str, str]]:
    """What a reader of figures over `tables` must know: unfinished ones, those nobody can recompute, what was unusual in them."""
    notes = [(t.name, f"UNFINISHED: {words}, so every figure is about these only") for t in tables if (words := unfinished(t))]
    notes += [(t.name, note) for t in tables for note in t.notes]
    bare = [t for t in tables if t.about is None]
    lost = [t.name for t in bare if t.ours]
    published = [t.name for t in bare if not t.ours]
    if lost:
        # with or without votes: nobody can say what was asked, at which alpha
        notes.append(
            (
                "",
                f"UNVERIFIED: {_some(lost)}: the JSON that certify writes beside a table is missing, so the radii cannot be "
                "recomputed from votes, and may be anything",
            )
        )
    if published:
        notes.append(("", f"{_some(published)}: no votes are stored, so the radii cannot be recomputed and stand as published"))
    return notes + [("", note) for note in compare_votes(tables)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def plan_radii(table: Table) -> Array | None:
    """The grid of radii that an adaptive plan settled, with 0; None for a plan (or a table) without one."""
    grid = None if table.about is None else table.about.plan.radii
    return None if grid is None else np.unique([0.0, *grid])


def _columns(tables: Sequence[Table]) -> Array:
    """Headline radii: those that any table's plan settled, as far as anything is certified, else round ones."""
    grids = [grid for table in tables if (grid := plan_radii(table)) is not None]
    grid = np.unique(np.concatenate(grids)) if grids else None
    if grid is None or len(grid) > 16:
        round_ones = curves.default_radii(tables)
        settled = round_ones if grid is None else round_ones[round_ones <= grid[-1]]
        return settled if len(settled) > 1 else round_ones
    largest = max(float(t.radius.max()) for t in tables)
    return grid[: max(int(np.sum(grid <= largest)), 2)]


def _last_radius(tables: Sequence[Table], columns: Array) -> float:
    """Where the figure ends: a little past the last headline radius that anything reaches, at most past all.

    Not past the last radius that any plan settled, where each of them names radii: beyond, votes stop where they happen to.
    """
    largest = max(float(t.radius.max()) for t in tables)
    almost_all = max(float(np.quantile(t.radius, 0.995)) for t in tables)
    settled = [0.0 if (grid := plan_radii(t)) is None else float(grid[-1]) for t in tables]
    if min(settled) > 0.0:
        almost_all = min(almost_all, max(settled))
    return max(min(max(almost_all, float(columns[-1])), largest) * 1.03, 1e-3)


def _free(name: str, taken: Mapping[str, str]) -> str:
    return name if name not in taken else f"{name} of the experts"
