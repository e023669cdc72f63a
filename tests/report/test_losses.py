"""Regret and loss on tables made by hand."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from rsrouter.core.errors import InputError
from rsrouter.report import write_report
from rsrouter.report.charts import lost_file
from rsrouter.report.regret import at_radii, by_stage, losses
from rsrouter.results import Table
from tests.helpers.report_tables import make_table


def tables() -> tuple[Table, list[Table]]:
    # image 0: the right expert, the router's margin bounds; 1: the wrong expert; 2: the tree holds farther than the choice;
    # 3: the routed classifier abstains; 4: nobody is right
    a = make_table("a", [0.4, 0.9, 0.3, 0.6, 0.5], [1, 1, 1, 1, 0])
    b = make_table("b", [1.5, 0.2, 0.8, 2.0, 0.7], [1, 0, 1, 0, 0])
    routed = make_table(
        "r",
        [1.0, 0.2, 0.5, 0.0, 0.4],
        [1, 0, 1, 0, 0],
        abstain=[False, False, False, True, False],
        expert=["b", "b", "a", "a", "b"],
        bound_by=["router", "b", "a", "router", "b"],
        rule="tree",
    )
    return routed, [a, b]


def test_by_hand() -> None:
    found = losses(*tables())
    assert found.oracle.tolist() == [1.5, 0.9, 0.8, 0.6, 0.0]
    assert found.chosen.tolist() == [1.5, 0.0, 0.3, 0.6, 0.0]
    assert found.routed.tolist() == [1.0, 0.0, 0.5, 0.0, 0.0]
    assert found.regret == pytest.approx([0.0, 0.9, 0.5, 0.0, 0.0])
    assert found.loss == pytest.approx([0.5, 0.0, -0.2, 0.6, 0.0])
    assert found.regret + found.loss == pytest.approx(found.oracle - found.routed)
    rows = {r.stage: r for r in by_stage(found)}
    assert list(rows)[-1] == "all"
    assert rows["router"].share == pytest.approx(0.4)
    assert (rows["router"].regret, rows["router"].loss) == pytest.approx((0.0, 0.55))
    assert rows["router"].abstained == pytest.approx(0.2)
    assert (rows["b"].regret, rows["b"].loss) == pytest.approx((0.45, 0.0))
    assert (rows["a"].regret, rows["a"].loss) == pytest.approx((0.5, -0.2))
    assert rows["all"].regret == pytest.approx(found.regret.mean())
    assert sum(r.share for r in rows.values()) == pytest.approx(2.0)
    held = at_radii(found, [0.0, 0.5, 1.0])
    assert held["oracle"].tolist() == [0.8, 0.8, 0.2]
    assert held["chosen"].tolist() == [0.6, 0.4, 0.2]
    assert held["routed"].tolist() == [0.4, 0.4, 0.2]


def test_an_expert_without_a_table_is_refused() -> None:
    routed, experts = tables()
    with pytest.raises(InputError, match="have no table"):
        losses(routed, experts[:1])
    with pytest.raises(InputError, match="different images"):
        losses(routed, [experts[0], experts[1].take(np.array([1, 0, 2, 3, 4]))])
    hidden = make_table("a", [0.1] * 5, [-1] * 5)
    with pytest.raises(InputError, match="without a label"):
        losses(routed, [hidden, experts[1]])


def test_figure_repeats_and_is_text() -> None:
    found = losses(*tables())
    once, again = (lost_file(found, "a_$x$ & <b>", {"router": "the router"}).decode() for _ in range(2))
    assert once == again
    ElementTree.fromstring(once)
    assert "limited by the router, 40% of the images: mean regret 0.000, mean loss 0.550" in once
    assert "a_$x$ &amp; &lt;b&gt;" in once


def test_the_page_has_the_rows(tmp_path: Path) -> None:
    routed, experts = tables()
    page = write_report([routed, *experts], tmp_path / "report").read_text()
    assert "What routing costs" in page
    assert "<td>+0.550</td>" in page
    plain = write_report(experts, tmp_path / "plain").read_text()
    assert "What routing costs" not in plain
