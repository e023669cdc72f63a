"""What stands behind the curves: whole-table statements, runs, and the files beside the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from report_tables import make_table
from scipy import stats
from test_page import HOSTILE, tables

from rsrouter.report import curves, summarise, write_report
from rsrouter.report.answering import answering_stages
from rsrouter.report.overview import report_json, run_of, runs, whole_table
from rsrouter.results import Table


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_whole_table_needs_alpha_and_labels() -> None:
    table = make_table("t", [1.0] * 50 + [0.2] * 50, [1] * 100, metadata={"alpha": 0.01})
    found = whole_table(table, [0.0, 0.5])
    assert found is not None
    assert stats.binom.sf(found.wrong, 100, 0.01) <= found.delta < stats.binom.sf(found.wrong - 1, 100, 0.01)
    assert found.lower == [(100 - found.wrong) / 100, (50 - found.wrong) / 100]
    shared = make_table("t", [1.0] * 100, [1] * 100, metadata={"alpha": 0.01, "independent_noise": False})
    dependent = whole_table(shared, [0.0])
    assert dependent is not None
    assert dependent.wrong == 100  # Markov: 1 wrong row in the mean says nothing at 0.001
    assert dependent.lower == [0.0]
    assert whole_table(make_table("t", [1.0], [1]), [0.0]) is None
    assert whole_table(make_table("t", [1.0], [-1], metadata={"alpha": 0.01}), [0.0]) is None
    for alpha in (0.0, 1.0, "0.001", float("nan")):
        assert whole_table(make_table("t", [1.0], [1], metadata={"alpha": alpha}), [0.0]) is None


def test_runs_say_what_tables_say() -> None:
    counts = '{"select":{"a":[6,4]},"estimate":{"a":[30,10]}}'
    table = make_table("t", [1.0, 0.5], [1, 1], n_drawn=[50, 50], counts=counts, rule="min",
                       metadata={"plan": {"kind": "adaptive", "n_max": 90}, "alpha": 0.001, "noise": "sound"})  # fmt: skip
    found = run_of(table, summarise(table))
    assert (found.votes, found.plan, found.alpha, found.rule, found.noise) == (50.0, "adaptive, 90", 0.001, "min", "sound")
    assert found.saved == pytest.approx(0.5)  # 10 selection votes and 90 others
    assert found.coverage is None
    plain = summarise(make_table("field", [1.0], [1]))
    assert runs(plain) == []


def test_files_hold_every_number_of_the_page(tmp_path: Path) -> None:
    folder = write_report(tables(), tmp_path).parent
    summary = summarise(tables())
    main = summary.main
    rows = [r for r in read_csv(folder / "numbers.csv") if r["series"] == main.name]
    assert [float(r["radius"]) for r in rows] == summary.radii.tolist()
    assert [float(r["accuracy"]) for r in rows] == pytest.approx(summary.series[0].at, abs=1e-6)
    sure = whole_table(main, summary.radii)
    assert sure is not None
    for row, bound in zip(rows, sure.lower, strict=True):
        assert bound - 2e-6 < float(row["surely"]) <= bound
    shares = read_csv(folder / "shares.csv")
    for kind, column in (("expert", main.expert), ("bound_by", main.bound_by)):
        total = curves.shares_by_radius(column, main, [0.0])
        found = {r["name"]: float(r["share"]) for r in shares
                 if (r["table"], r["kind"], float(r["radius"])) == (main.name, kind, 0.0)}  # fmt: skip
        assert found == {name: pytest.approx(float(v[0]), abs=1e-6) for name, v in total.items()}
    data = json.loads((folder / "report.json").read_text())
    assert data["whole_tables"][main.name]["wrong"] == sure.wrong
    assert [r["name"] for r in data["runs"]] == [t.name for t in summary.tables]


def test_report_json_has_no_nan() -> None:
    nothing = [make_table(name, [0.0, 0.0], [0, 0], abstain=[True, True], expert=[name] * 2) for name in ("a", "b")]
    routed = make_table("r", [0.0, 0.0], [0, 0], abstain=[True, True], rule="tree")
    assert np.isnan(summarise([routed, *nothing]).coverage["r"][0])
    found = json.loads(report_json(summarise([routed, *nothing])), parse_constant=lambda word: pytest.fail(word))
    assert found["coverage"]["r"]["value"] is None


def test_charts_stand_on_their_own(tmp_path: Path) -> None:
    folder = write_report(tables((HOSTILE, "'\"><img src=x onerror=alert(1)>", "c")), tmp_path).parent
    for name in ("who.svg", "bound.svg", "votes.svg"):
        root = ElementTree.parse(folder / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.get("width", "0")) > 100
        text = (folder / name).read_text()
        assert "<script" not in text
        assert "<img" not in text
        assert text.count("http") == 1, "nothing but the namespace"
    words = "".join(ElementTree.parse(folder / "who.svg").getroot().itertext())
    assert "onerror" in words  # as text of the legend


def test_a_chart_of_an_earlier_report_does_not_stay(tmp_path: Path) -> None:
    assert (write_report(tables(), tmp_path).parent / "votes.svg").exists()
    write_report(make_table("field", [1.0, 0.5], [1, 1]), tmp_path)
    assert not list(tmp_path.glob("votes.svg")) + list(tmp_path.glob("who.svg"))


def test_a_run_in_which_one_expert_answers_says_so(tmp_path: Path) -> None:
    routed = make_table("routed", [1.0, 0.5], [1, 1], expert=["big", "big"], rule="tree", n_drawn=[5, 5],
                        metadata={"plan": {"kind": "fixed", "n": 5}})  # fmt: skip
    assert "every image was sent to big" in write_report(routed, tmp_path).read_text()


def chain(rows: list[tuple[int, int]], **extra: Any) -> Table:
    """A routed table of a two-stage chain on one expert: per row, votes of the first stage's class and of the second's."""
    counts = [json.dumps({"select": {"e": [a, 10 - a, 0], "e:2": [b, 10 - b, 0]}, "estimate": {}}) for a, b in rows]
    stages = [{"name": "e", "kind": "threshold", "tau": 0.8}, {"name": "e:2", "kind": "plurality", "tau": None}]
    return make_table("routed", [1.0] * len(rows), [1] * len(rows), expert=["e"] * len(rows), rule="tree", counts=counts,
                      bound_by=["e:2"] * len(rows), n_drawn=[20] * len(rows), metadata={"stages": stages, **extra})  # fmt: skip


def test_stages_that_read_one_expert_are_told_apart(tmp_path: Path) -> None:
    found = answering_stages(chain([(8, 2), (7, 9), (5, 5), (2, 1)]))
    assert found is not None
    assert found.tolist() == ["e", "e:2", "e:2", "e"]  # at tau the stage answers, with whichever class has the votes
    folder = write_report(chain([(8, 2), (7, 9), (5, 5), (2, 1)]), tmp_path).parent
    page = (folder / "index.html").read_text()
    assert "by the stage that named the class" in page
    assert "every image" not in page
    shares = [r for r in read_csv(folder / "shares.csv") if r["kind"] == "stage" and r["radius"] == "0"]
    assert {r["name"]: float(r["share"]) for r in shares} == {"e": 0.5, "e:2": 0.5}
    only = write_report(chain([(9, 2), (10, 0)]), tmp_path / "only").read_text()
    assert "every image got its class from stage e." in only


def test_who_answers_is_not_guessed() -> None:
    rows = [(8, 2), (7, 9)]
    assert answering_stages(make_table("t", [1.0], [1])) is None
    assert answering_stages(chain(rows, stages=[{"name": "e", "kind": "plurality", "tau": None}])) is None
    router = [{"name": n, "kind": "plurality", "tau": None} for n in ("e", "e:2")]
    assert answering_stages(chain(rows, stages=router)) is None  # a router's outcomes lead to experts: no chain
    other = [{"name": "x", "kind": "threshold", "tau": 0.8}, {"name": "e:2", "kind": "plurality", "tau": None}]
    assert answering_stages(chain(rows, stages=other)) is None  # no votes of the stage


def test_the_figure_ends_where_the_plan_does() -> None:
    plan = {"kind": "adaptive", "n_max": 100, "radii": [0.5, 1.0]}
    cut = summarise(
        [
            make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata={"plan": plan}),
            make_table("e", [3.0, 2.0, 1.0], [1, 1, 1], metadata={"plan": plan}),
        ]
    )
    assert cut.grid[-1] == pytest.approx(1.03)
    fixed = make_table("e", [3.0, 2.0, 1.0], [1, 1, 1])  # its votes settle every radius
    assert summarise([make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata={"plan": plan}), fixed]).grid[-1] > 2.9
    only_zero = make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata={"plan": {**plan, "radii": [0.0]}})
    assert summarise([only_zero]).grid[-1] > 2.9
    many = [round(0.02 * i, 2) for i in range(1, 26)]
    fine = summarise([make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata={"plan": {**plan, "radii": many}})])
    assert fine.grid[-1] == pytest.approx(0.515)
    assert 0.0 < fine.radii.max() <= 0.5
    whole = summarise([make_table("r", [3.0, 2.0, 0.7], [1, 1, 1]), make_table("e", [3.0, 2.0, 1.0], [1, 1, 1])])
    assert whole.grid[-1] > 2.9
