"""One self-contained HTML page from results tables: no network, no fonts, figures inline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsrouter.core.errors import ResultsError
from rsrouter.files import is_leftover, write_atomically
from rsrouter.report import charts, curves
from rsrouter.report.overview import curve_csv, numbers_csv, report_json, runs, shares_csv, whole_table
from rsrouter.report.regret import page_rows
from rsrouter.report.stages import Answering, answered_in_words
from rsrouter.report.stages import answering as who_answered
from rsrouter.report.summary import EXPERT, OTHER, ROUTED, Series, Source, Summary, load_tables, plan_radii, summarise
from rsrouter.report.svg import standalone
from rsrouter.report.thumbnails import by_id, gallery
from rsrouter.results import Table, printable
from rsrouter.results.metadata import flatten

#: Marks a folder as ours, so that a report may be made again over an earlier one.
GENERATOR = "rsrouter report"

#: The page first: it marks the folder as ours. Charts that a report does not have are not there.
CHARTS = ("who.svg", "bound.svg", "votes.svg")
FILES = ("index.html", "curve.svg", "curve.csv", "numbers.csv", "shares.csv", "report.json", *CHARTS)


def write_report(
    tables: Mapping[str, Source] | Sequence[Source] | Source,
    out: str | os.PathLike[str],
    *,
    routed: str | Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    title: str | None = None,
    images: Any = None,
    classes: Sequence[str] | None = None,
    radii: ArrayLike | None = None,
    confidence: float = 0.95,
    common: bool = False,
) -> Path:
    """Writes `out/index.html`, one self-contained page, and beside it the curve (`curve.svg`, `.csv`), the other charts
    (`who.svg`, `bound.svg`, `votes.svg`) and every number (`numbers.csv`, `shares.csv`, `report.json`).

    Args:
        tables: results, as `{name: Table or path}`, a list, or one; ours or the field's TSV.
        out: folder for the report; it may hold an earlier report, which is replaced, but nothing else.
        routed: names of the routed tables; default: the metadata's `role`, else tables that name a rule or several experts.
        experts: names of the experts' own tables; default likewise, and every table that was not routed.
        title: heading of the page.
        images: what was certified, for thumbnails: a mapping from image id to `(C, H, W)`, or `(N, C, H, W)` in the order of
            the (first) routed table's rows; floats in [0,1] or bytes. Only those shown are read.
        classes: names of the classes.
        radii: columns of the headline table; default: every radius that some table's plan settled, else 0, 0.25, ... up to the
            largest certified radius.
        confidence: level of the intervals over images.
        common: compare only the images that all tables hold, instead of refusing tables over different images.

    Returns:
        The path of `index.html`.

    Raises:
        InputError: no tables, tables over different images, images that do not fit.
        ResultsError: a table that cannot be read, or an output folder that holds something else.
        IntegrityError: a table of ours whose rows do not follow from their votes.
    """
    folder = Path(out)
    check_folder(folder)
    loaded = load_tables(tables)
    summary = summarise(loaded, routed=routed, experts=experts, radii=radii, confidence=confidence, common=common)
    title = title or default_title(summary)
    pictures = None
    if images is not None:
        unsorted = next(t for t in loaded if t.name == summary.main.name)
        pictures = gallery(summary.main, by_id(images, unsorted), classes, answered_in_words(summary.main))
    files = {
        "index.html": render(summary, title, pictures).encode(),
        "curve.svg": charts.curve_file(summary, title),
        "curve.csv": curve_csv(summary),
        "numbers.csv": numbers_csv(summary),
        "shares.csv": shares_csv(summary),
        "report.json": report_json(summary),
        **_chart_files(summary),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if name in files:
                write_atomically(folder / name, files[name])
            else:
                (folder / name).unlink(missing_ok=True)  # of an earlier report
    except OSError as error:
        raise ResultsError(
            f"Cannot write the report to {folder}",
            expected="a folder that can be written",
            received=str(error),
            remedy="give another folder, or make room",
        ) from error
    return folder / "index.html"


def check_folder(folder: Path) -> None:
    """Refuses an output folder that holds anything but an earlier report."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ResultsError(
            f"{folder} is not a folder", expected="a folder for the report", received="a file", remedy="give a folder"
        )
    page = folder / "index.html"
    if page.is_file():
        with page.open("rb") as file:
            if f'content="{GENERATOR}"'.encode() in file.read(2048):
                return
    found = sorted(p.name for p in folder.iterdir() if not is_leftover(p, FILES))
    if found:
        raise ResultsError(
            f"{folder} is not empty and was not written by this command",
            expected="an empty folder, or an earlier report",
            received=", ".join(found[:5]),
            remedy="give a folder of its own; nothing was changed",
        )


def default_title(summary: Summary) -> str:
    """A heading from what was compared."""
    routed, pool = summary.named(ROUTED), summary.named(EXPERT)
    data = summary.main.metadata.get("data")
    if isinstance(data, Mapping):
        data = data.get("name")
    over = f" on {data}" if isinstance(data, str) and data else ""
    if routed and pool:
        return f"Routing between {len(pool)} experts{over}" if len(pool) > 1 else f"Routed against one expert{over}"
    return f"Certified accuracy{over}"


def render(summary: Summary, title: str, pictures: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rsrouter.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f}"
    # a bound is cut, not rounded up
    environment.filters["floored"] = lambda value: f"{np.floor(1000 * value + 1e-9) / 10:.1f}"
    environment.filters["signed"] = lambda value: f"{100 * value:+.1f}".replace("-", "\u2212")
    main = summary.main
    colour = charts.colours(summary)
    best, answering = _best(summary), who_answered(main)
    return environment.get_template("report.html.j2").render(
        title=title,
        generator=GENERATOR,
        summary=summary,
        main=main,
        colour=colour,
        best=best,
        tiles=_tiles(summary),
        lead=_lead(summary),
        curve=charts.curve(summary),
        readout=_readout(summary, colour),
        who=_who(main, summary, answering),
        bound=_bound(main, summary, answering),
        votes=_votes(main),
        pictures=pictures or {},
        runs=_differences(summary),
        losses=page_rows(summary),
        grid=plan_radii(main),
        made=[(t.name, summary.roles[t.name], _made(t)) for t in summary.tables],
        sure=whole_table(main, summary.radii),
        every_run=runs(summary),
        only=_only(main, answering),
        titles=summary.titles,
        standings={s.name: s for s in summary.standings},
        notes=summary.notes,
        loud=[(name, note) for name, note in summary.notes if note.startswith(("UNFINISHED", "UNVERIFIED"))],
        printed=[t.name for t in summary.tables if not t.ours],
        zip=zip,
        digits=1 if len(main) >= 2000 else 0,
    )


def _chart_files(summary: Summary) -> dict[str, bytes]:
    """The page's smaller charts as SVG files with the light colours; those that the main table has."""
    main = summary.main
    answering = who_answered(main)
    found = {"who.svg": _who(main, summary, answering), "bound.svg": _bound(main, summary, answering), "votes.svg": _votes(main)}
    return {
        name: standalone(part["chart"], [(who, colour) for who, _, colour in part.get("rows", ())]).encode()
        for name, part in found.items()
        if part and part["chart"]
    }


def _only(table: Table, answering: Answering) -> tuple[str, str] | None:
    """`("expert" or "stage", name)` of what named every image's class; None where several did, or some row does not tell."""
    kind, column = answering
    names = set(column.tolist()) - ({""} if kind == "expert" else set())
    return (kind, str(names.pop())) if len(names) == 1 and any(table.rule) and "" not in names else None


def _best(summary: Summary) -> list[float]:
    """Per headline radius the best figure among the measured series, to be set in bold."""
    return [float(v) for v in np.max([s.at for s in summary.series if s.role not in ("envelope", "oracle")], axis=0)]


def _lead(summary: Summary) -> str:
    main, n, single = summary.main, len(summary.main), summary.best_single
    own = next((s for s in summary.standings if s.name == main.name), None)
    if own is not None and single is not None and own is not single:
        pool = len(summary.named(EXPERT))
        return (
            f"On {n:,} images, {own.name} has at every radius at least {100 * own.least:.0f}% of what the best of {pool} experts "
            f"has there, and {100 * own.coverage:.0f}% on average; the best single expert, {single.name}, "
            f"{100 * single.least:.0f}% and {100 * single.coverage:.0f}%."
        )
    if len(summary.tables) > 1 and not summary.named(ROUTED):
        return f"{len(summary.tables)} models certified on the same {n:,} images, and what choosing between them could gain."
    what = "certified accuracy" if summary.labelled else "share of images with a certified class"
    return f"{main.name}: {what} on {n:,} images."


def _tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """`(figure, what, detail)` of the tiles on top."""
    tiles = []
    main, single = next(s for s in summary.series if s.name == summary.main.name), summary.best_single
    own = next((s for s in summary.standings if s.name == summary.main.name), None)
    if own is not None and single is not None and own is not single:
        alone = f"best single expert: {100 * single.least:.0f}%"
        tiles.append((f"{100 * own.least:.0f}%", "least ratio to the envelope", f"at r\u00a0=\u00a0{own.at:g}; {alone}"))
        alone = f"best single expert: {100 * single.coverage:.0f}%"
        between = own.between(0) and f"{own.between(0)}%; "
        tiles.append((f"{100 * own.coverage:.0f}%", "coverage of the envelope", f"{between}{alone}"))
    for r in _landmarks(summary):
        tiles.append(_tile_at(summary, main, r))
    by_role = {s.role: s for s in summary.series}
    if not summary.named(ROUTED, OTHER) and "oracle" in by_role:
        gain = by_role["oracle"].at - by_role["envelope"].at
        i = int(gain.argmax())
        tiles.append(
            (
                f"+{100 * gain[i]:.1f}",
                f"points at r\u00a0=\u00a0{summary.radii[i]:g}",
                "what choosing the expert by image could add at most",
            )
        )
        return tiles
    if main.abstention is not None:
        tiles.append(
            (f"{100 * main.abstention:.1f}%", "abstained", f"{int(summary.main.abstained.sum())} of {len(summary.main):,} images")
        )
    saved = _votes(summary.main)
    if saved and saved["saved"] is not None and saved["saved"] >= 0.005:
        tiles.append((f"{100 * saved['saved']:.0f}%", "of the votes saved", f"{saved['mean']:,.0f} an image on average"))
    return tiles


def _tile_at(summary: Summary, main: Series, r: float) -> tuple[str, str, str]:
    i = int(np.flatnonzero(summary.radii == r)[0])
    if not summary.named(ROUTED, OTHER):
        main = max((s for s in summary.series if s.role == EXPERT), key=lambda s: float(s.at[i]))
    word = "certified accuracy" if summary.labelled else "certified share"
    low, high = (main.at_low, main.at_high)
    ends = "" if low is None or high is None else f"{100 * low[i]:.1f} to {100 * high[i]:.1f}%"
    who = f"{main.name}; " if len(summary.tables) > 1 and not summary.named(ROUTED, OTHER) else ""
    return f"{100 * main.at[i]:.1f}%", f"{word} at r\u00a0=\u00a0{r:g}", who + ends


def _landmarks(summary: Summary) -> list[float]:
    """Two radii to put on top: 0 (or the smallest) and the one nearest to half of what is reached."""
    radii = summary.radii
    if len(radii) < 3:
        return [float(radii[0])]
    middle = radii[np.abs(radii - radii[-1] / 2).argmin()]
    return [float(radii[0]), float(middle)]


def _readout(summary: Summary, colour: Mapping[str, str]) -> dict[str, Any]:
    """What the page's few lines of script show under the pointer."""
    return {
        "x": [round(float(v), 4) for v in summary.grid],
        "series": [
            {"name": s.name, "c": colour.get(s.name, s.role), "y": [round(100 * float(v), 1) for v in s.fine]}
            for s in summary.series
        ],
    }


def _part_colours(table: Table, summary: Summary, answering: Answering) -> dict[str, str]:
    """A colour for every expert and stage of `table`; an expert with a curve of its own keeps that curve's."""
    colour = charts.colours(summary)
    taken = {t.name: colour[t.name] for t in summary.named(EXPERT)}
    names = sorted(set().union(*(set(c.tolist()) for c in (table.expert, table.bound_by, answering[1]))) - {""})
    parts, experts = {name: taken[name] for name in names if name in taken}, set(table.expert.tolist())
    free = [c for c in (f"c{i}" for i in range(8)) if c not in parts.values()] or ["c7"]
    # routing stages first: they are not experts, so they get the routed line's colour where it is free
    others = sorted((n for n in names if n not in parts), key=lambda n: (n in experts, n))
    return {**parts, **{name: free[i % len(free)] for i, name in enumerate(others)}}


def _stack(
    table: Table,
    summary: Summary,
    answering: Answering,
    column: NDArray[np.object_],
    among: NDArray[np.bool_],
    what: str,
    titles: dict[str, str],
) -> Any:
    """A stacked chart and shares by name; None unless there is more than one name."""
    colour = _part_colours(table, summary, answering)
    names = [name for name in colour if np.any(column == name)]
    if len(names) < 2:
        return None
    count = max(int(among.sum()), 1)
    rows = [(titles.get(n, n), float(np.sum((column == n) & among)) / count, colour[n]) for n in names]
    return {"chart": charts.stacked(table, column, summary.grid, names, colour, what, titles), "rows": rows}


def _who(table: Table, summary: Summary, answering: Answering) -> Any:
    """Share answered by each expert (or stage), of all images."""
    kind, column = answering
    titles = summary.titles if kind == "stage" else {}
    every = np.ones(len(table), bool)
    found = _stack(table, summary, answering, column, every, f"Images certified, by the {kind} that answers", titles)
    return found and {**found, "kind": kind}


def _bound(table: Table, summary: Summary, answering: Answering) -> Any:
    """Which stage limits the radius, of the certified images."""
    what = "Images certified, by the stage that limits the radius"
    return _stack(table, summary, answering, table.bound_by, ~table.abstained, what, summary.titles)


def _votes(table: Table) -> Any:
    """Votes drawn and saved; None where the table does not say."""
    drawn = table.n_drawn
    if not np.any(drawn > 0):
        return None
    fixed = table.fixed_votes
    saved = None if fixed is None or not fixed.sum() else 1.0 - float(drawn.sum()) / float(fixed.sum())
    same = len(set(drawn.tolist())) == 1
    return {
        "mean": float(drawn.mean()),
        "median": float(np.median(drawn)),
        "most": int(drawn.max()),
        "least": int(drawn.min()),
        "total": int(drawn.sum()),
        "saved": saved,
        "fixed": None if fixed is None else float(fixed.mean()),
        "chart": None if same else charts.votes(table, fixed),
    }


def _differences(summary: Summary) -> Any:
    """Paired differences of the other runs from the page's main table; None with a single run."""
    others = [t for t in summary.named(ROUTED, OTHER) if t.name != summary.main.name]
    if not others or not summary.labelled:
        return None
    return [(t.name, *curves.accuracy_difference(summary.main, t, summary.radii, confidence=summary.confidence)) for t in others]


def _made(table: Table) -> list[tuple[str, str]]:
    """The metadata as lines of a table, and where it was read from."""
    lines: list[tuple[str, str]] = []
    for key, value in flatten(table.metadata).items() if table.metadata else ():
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            for position, entry in enumerate(value):
                rest = ", ".join(f"{k} {v}" for k, v in entry.items() if k != "name" and v is not None)
                lines.append((printable(f"{key}.{entry.get('name', position)}"), printable(rest)))
        elif value is not None:
            lines.append((printable(key), printable(", ".join(map(str, value)) if isinstance(value, list) else value)))
    if table.path is not None:
        lines.append(("file", printable(table.path.name)))
    return lines
