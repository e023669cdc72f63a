"""The card and the curve that stand beside published tables: their figures must be the tables' own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rsrouter._version import __version__
from rsrouter.audit.state import State
from rsrouter.core.errors import RSRouterError
from rsrouter.publish.card import render_card
from rsrouter.publish.claims import other_lines, other_metrics, other_percentages, other_rows, read_card
from rsrouter.publish.files import FIGURE, README
from rsrouter.results import read_table
from rsrouter.serialise import Saved
from rsrouter.smooth import RoutedSmooth
from rsrouter.stored import read_bytes

_MADE = re.compile(r"Made with rsrouter (\S+)\.\s")
_TITLE = re.compile(rb'<text x="8" y="-9" font-weight="bold">[^<]*</text>')


def check_card(state: State, folder: Path, paths: Sequence[Path], routed: RoutedSmooth | None) -> None:
    """README.md and the curve in `folder`, if it has them, against what the tables at `paths` give.

    Compared are the model-index, every table with columns of radii, and the generated lines about certified accuracy. Other
    text is the author's; percentages in it that no table gives are told as a caveat.
    """
    present = [name for name in (README, FIGURE) if (folder / name).is_file()]
    checks = {README: "card", FIGURE: "curve"}
    if routed is None:
        for name in present:
            state.skip(checks[name], "", "the router could not be loaded")
        return
    if not present:
        return
    try:
        tables = [read_table(path) for path in sorted(paths, key=lambda path: path.name)]
        saved = Saved(routed.pool, routed.router, routed.execution, routed.noise)
        rendered = render_card(saved, "org/name", tables, figure=FIGURE)
        text = read_bytes(folder / README, README).decode().replace("\r\n", "\n") if README in present else ""
        given = read_card(text) if README in present else None
    except (RSRouterError, UnicodeDecodeError) as error:
        for name in present:
            state.skip(checks[name], "", f"its figures could not be compared with the tables: {error}")
        return
    made = _MADE.search(text)
    other_version = None if made is None or made[1] == __version__ else f"made by rsrouter {made[1]}, this is {__version__}"
    if given is not None:
        data, body = given
        wrong = [*other_metrics(data, rendered), *(f"table row: {row}" for row in other_rows(body, rendered))]
        lines = other_lines(body, rendered)
        if other_version and lines and not wrong:
            state.skip("card", "", f"metrics and rows are the tables' own, but its text was {other_version}")
        else:
            found = [(None, claim) for claim in (wrong if other_version else [*wrong, *lines])]
            state.add(
                "card", "", found, "the card says what the tables do not" if found else "the card's figures are the tables' own"
            )
        if stray := other_percentages(body, rendered):
            state.warn("", f"the card's own text names figures that are in no table: {', '.join(stray[:5])}")
    if FIGURE in present:
        from rsrouter.report.charts import curve_file

        assert rendered.summary is not None
        drawn = (read_bytes(folder / FIGURE, FIGURE), curve_file(rendered.summary, "title"))
        same = len({_TITLE.sub(b"", picture, count=1) for picture in drawn}) == 1
        if not same and other_version:
            state.skip("curve", "", f"it was {other_version}")
        else:
            differs = [] if same else [(None, f"{FIGURE} is not the curve of these tables")]
            state.add("curve", "", differs, "the curve is the tables' own" if same else "another curve than the tables give")
