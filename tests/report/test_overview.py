"""The numbers behind the curves: whole-table statements, runs, and the files beside the page."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from test_page import HOSTILE, tables

from rsrouter.core import AdaptivePlan, FixedPlan, cascade_tree, expert_stage, flat_tree
from rsrouter.report import curves, summarise, write_report
from rsrouter.report.charts import colours
from rsrouter.report.overview import report_json, run_of, runs, whole_table
from rsrouter.report.stages import stage_titles
from rsrouter.report.text import print_summary
from rsrouter.results import Table, TableMetadata
from tests.helpers.report_tables import described, make_table


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_whole_table_needs_alpha_and_labels() -> None:
    table = make_table("t", [1.0] * 50 + [0.2] * 50, [1] * 100, metadata=described(alpha=0.01))
    found = whole_table(table, [0.0, 0.5])
    assert found is not None
    assert stats.binom.sf(found.wrong, 100, 0.01) <= found.delta < stats.binom.sf(found.wrong - 1, 100, 0.01)
    assert found.lower == [(100 - found.wrong) / 100, (50 - found.wrong) / 100]
    shared = make_table("t", [1.0] * 100, [1] * 100, metadata=described(alpha=0.01, noise="sound-shared"))
    dependent = whole_table(shared, [0.0])
    assert dependent is not None
    assert dependent.wrong == 100  # Markov: 1 wrong row in the mean says nothing at 0.001
    assert dependent.lower == [0.0]
    assert whole_table(make_table("t", [1.0], [1]), [0.0]) is None
    assert whole_table(make_table("t", [1.0], [-1], metadata=described(alpha=0.01)), [0.0]) is None


def test_runs_say_what_tables_say() -> None:
    table = make_table("t", [1.0, 0.5], [1, 1], n_drawn=[50, 50], fixed_votes=[100, 100],
                       rule="min", metadata=described(plan=AdaptivePlan(90, [0.5]), noise="sound"))  # fmt: skip
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


def test_few_images_have_no_interval(tmp_path: Path) -> None:
    """Where samples of the images may leave the experts nothing, no interval is told, and nowhere is a NaN."""
    experts = [make_table(name, [1.0, 0.0], [1, 0], abstain=[False, True], expert=[name] * 2) for name in ("a", "b")]
    routed = make_table("r", [1.0, 0.5], [1, 1], rule="tree")
    summary = summarise([routed, *experts], radii=[0.0, 0.5])
    assert summary.standings[0].words.endswith("200.0% on average (too few images for an interval)")
    page = write_report([routed, *experts], tmp_path, radii=[0.0, 0.5]).read_text()
    assert not re.search(r"\bnan\b", page)
    nothing = [make_table(name, [0.0, 0.0], [0, 0], abstain=[True, True], expert=[name] * 2) for name in ("a", "b")]
    assert summarise([routed, *nothing]).standings[0].words == "r: the experts' envelope is 0 at every radius"


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


def test_columns_are_sorted_and_each_there_once() -> None:
    table = make_table("a", [0.6, 2.0], [1, 1])
    assert summarise([table], radii=[1.0, 0.0, 1.0, 0.5]).radii.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("counts", ['{"estimate":{"e":[1,99,0]}}', ""], ids=["votes", "blanked"])
@pytest.mark.parametrize("metadata", [{}, {"name": "routed", "role": "routed"}], ids=["no JSON", "another JSON"])
def test_a_table_whose_json_is_gone_is_not_trusted(tmp_path: Path, counts: str, metadata: dict[str, Any]) -> None:
    """Without its JSON nobody can say what the votes are of: an edited radius must not look like a published table's."""
    bare = make_table("routed", [9.0], [1], counts=counts, metadata=metadata)
    summary = summarise([bare])
    assert [note for _, note in summary.notes if note.startswith("UNVERIFIED: routed:")]
    assert "no votes are stored" not in str(summary.notes)
    assert summary.roles == {"routed": "expert"}  # it does not say itself what it is
    assert "UNVERIFIED" in write_report([bare], tmp_path).read_text()


def test_a_table_of_the_field_stands_as_published() -> None:
    field = replace(make_table("old", [1.0], [1], metadata={}), ours=False)
    notes = str(summarise([field]).notes)
    assert "no votes are stored" in notes
    assert "UNVERIFIED" not in notes


def test_a_run_in_which_one_expert_answers_says_so(tmp_path: Path) -> None:
    routed = make_table("routed", [1.0, 0.5], [1, 1], expert=["big", "big"], rule="tree", n_drawn=[5, 5],
                        metadata=described(plan=FixedPlan(1, 5)))  # fmt: skip
    assert "every image was sent to big" in write_report(routed, tmp_path).read_text()


def chain(answered_by: list[str], **extra: Any) -> Table:
    """A routed table of a two-stage chain on one expert."""
    first, last = expert_stage("e", 0.5, 2, network="e", expert="e"), expert_stage("e:2", 0.5, 2, network="e", expert="e")
    count = len(answered_by)
    return make_table("routed", [1.0] * count, [1] * count, expert=["e"] * count, rule="tree", answered_by=answered_by,
                      bound_by=["e:2"] * count, n_drawn=[20] * count,
                      metadata=described(stages=list(cascade_tree([first, last], (0.8,)).stages.values()), experts=[("e", 0.5)]),
                      **extra)  # fmt: skip


def test_stages_that_read_one_expert_are_told_apart(tmp_path: Path) -> None:
    folder = write_report(chain(["e", "e:2", "e:2", "e"]), tmp_path).parent
    page = (folder / "index.html").read_text()
    assert "by the stage that named the class" in page
    assert "every image" not in page
    assert "e, answers from 80%" in page
    assert "e again" in page
    shares = [r for r in read_csv(folder / "shares.csv") if r["kind"] == "stage" and r["radius"] == "0"]
    assert {r["name"]: float(r["share"]) for r in shares} == {"e": 0.5, "e:2": 0.5}
    only = write_report(chain(["e", "e"]), tmp_path / "only").read_text()
    assert "every image got its class from stage e, answers from 80%." in only


def test_stages_have_names_for_people() -> None:
    stages = [
        expert_stage("sigma_1+sigma_0.5@0.757", 0.757, 2, expert="sigma_1"),
        expert_stage("sigma_1+sigma_0.5@0.757:2", 0.757, 2, network="sigma_1+sigma_0.5@0.757", expert="sigma_1"),
        expert_stage("sigma_0.5/2x2", 0.5, 2, expert="sigma_0.5"),
        expert_stage("sigma_0.5", 0.5, 2),
    ]
    tree = cascade_tree(stages, (0.56, 0.7, 0.6))
    metadata = described(stages=list(tree.stages.values()), experts=[("sigma_0.5", 0.5), ("sigma_1", 1.0)])
    assert list(stage_titles(TableMetadata.read(metadata, "x")).values()) == [
        "head 1 on sigma_1 and sigma_0.5 at noise 0.757, answers from 56%",
        "head 2 on sigma_1 and sigma_0.5 at noise 0.757, answers from 70%",
        "head 3 on sigma_0.5 at noise 0.5, answers from 60%",
        "sigma_0.5",
    ]
    own = [
        expert_stage(f"{name} from sigma_0.5@{sigma}", sigma, 2, expert="sigma_0.5") for name, sigma in (("a", 0.65), ("b", 0.7))
    ]
    for count, wanted in (
        (1, ["a network of its own at noise 0.65"]),
        (2, [f"network {k} of its own at noise {s}" for k, s in ((1, 0.65), (2, 0.7))]),
    ):
        tree = cascade_tree([*own[:count], stages[3]], (0.505,) * count)
        metadata = described(stages=list(tree.stages.values()), experts=[("sigma_0.5", 0.5)])
        found = list(stage_titles(TableMetadata.read(metadata, "x")).values())
        assert found == [*(f"{title}, answers from 50.5%" for title in wanted), "sigma_0.5"]
    flat = flat_tree("router", 1.0, [*stages[3:], expert_stage("sigma_1", 1.0, 2)])
    metadata = described(stages=list(flat.stages.values()), experts=[("sigma_0.5", 0.5), ("sigma_1", 1.0)])
    assert stage_titles(TableMetadata.read(metadata, "x"))["router"] == "router at noise 1"
    metadata["tree"]["stages"][0]["title"] = "the router, certified at 99.9%"  # nobody's to choose
    assert stage_titles(TableMetadata.read(metadata, "x"))["router"] == "router at noise 1"
    assert stage_titles(None) == {}


def test_least_ratio_and_best_single_expert_stand_in_front(tmp_path: Path) -> None:
    a, b = make_table("a", [0.5] * 4, [1, 1, 1, 0]), make_table("b", [2.0] * 4, [1, 1, 0, 0])
    routed = make_table("r", [0.6, 2.0, 0.6, 0.0], [1, 1, 1, 0], rule="tree")
    summary = summarise([routed, a, b], radii=[0.0, 0.5, 1.0])
    assert [(s.name, s.least, s.at) for s in summary.standings] == [("r", 0.5, 1.0), ("b", pytest.approx(2 / 3), 0.0)]
    assert summary.standings[0].coverage == pytest.approx(2.5 / 3)
    page = write_report([routed, a, b], tmp_path, radii=[0.0, 0.5, 1.0]).read_text()
    assert "r has at every radius at least 50% of what the best of 2 experts" in page
    assert "the best single expert, b, 67% and 78%" in page
    assert page.index(">least ratio<") < page.index(">coverage<") < page.index(">ACR<")


def test_an_expert_keeps_its_colour() -> None:
    experts = [("small", 0.25), ("large", 1.0)]
    both = [make_table(n, [1.0], [1], metadata=described("expert", experts=[(n, s)])) for n, s in experts]
    routed = make_table("r", [1.0], [1], rule="tree", metadata=described(experts=experts))
    seen = [colours(summarise(tables)) for tables in ([routed, *both], both, both[::-1], [both[1], routed, both[0]])]
    assert {c["small"] for c in seen} == {"c1"}
    assert {c["large"] for c in seen} == {"c2"}
    assert seen[0]["r"] == "c0"


def test_text_of_others_is_text(tmp_path: Path) -> None:
    names = ["=1+1", "-2", "@x", "+a", "a\x1b[31mb", "\u202ex"]
    tables = [make_table(n, [1.0, 0.5], [1, 1], expert=[n, n], bound_by=[n, n]) for n in names]
    folder = write_report(tables, tmp_path).parent
    for name in ("numbers.csv", "shares.csv", "curve.csv"):
        text = (folder / name).read_text()
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
        for row in csv.reader(text.splitlines()):
            assert not any(cell[:1] in "=+-@" for cell in row[:3] if cell)
    assert "\x1b" not in (folder / "index.html").read_text()


def test_radii_are_the_union_over_tables() -> None:
    a = make_table("a", [3.0], [1], metadata=described("expert", plan=AdaptivePlan(100, [0.25, 0.5])))
    b = make_table("b", [3.0], [1], metadata=described("expert", plan=AdaptivePlan(100, [0.5, 2.0, 4.0])))
    assert summarise([a, b]).radii.tolist() == [0.0, 0.25, 0.5, 2.0]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_terminal_table_fits(width: int) -> None:
    radii = np.arange(0, 4.1, 0.25)
    tables = [make_table(n, [1.0, 4.0], [1, 1]) for n in ("a", "an expert with a very long name indeed, of somebody", "c")]
    summary = summarise([make_table("routed", [2.0, 4.0], [1, 1], rule="tree"), *tables], radii=radii)
    summary.notes.append(("a", "UNFINISHED: 2 of 3 images"))
    file = io.StringIO()
    print_summary(summary, Console(file=file, width=width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(file.getvalue().split())
    assert "…" not in text
    assert "WARNING: a: UNFINISHED: 2 of 3 images" in text
    assert "best single expert" in text
    assert all(f"{r:g}" in text for r in radii)


def test_the_figure_ends_where_the_plan_does() -> None:
    plan = described(plan=AdaptivePlan(100, [0.5, 1.0]))
    cut = summarise(
        [
            make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata=plan),
            make_table("e", [3.0, 2.0, 1.0], [1, 1, 1], metadata=plan),
        ]
    )
    assert cut.grid[-1] == pytest.approx(1.03)
    fixed = make_table("e", [3.0, 2.0, 1.0], [1, 1, 1])  # its votes settle every radius
    assert summarise([make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata=plan), fixed]).grid[-1] > 2.9
    only_zero = make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata=described(plan=AdaptivePlan(100, [0.0])))
    assert summarise([only_zero]).grid[-1] > 2.9
    many = [round(0.02 * i, 2) for i in range(1, 26)]
    fine = summarise([make_table("r", [3.0, 2.0, 0.7], [1, 1, 1], metadata=described(plan=AdaptivePlan(100, many)))])
    assert fine.grid[-1] == pytest.approx(0.515)
    assert 0.0 < fine.radii.max() <= 0.5
    whole = summarise([make_table("r", [3.0, 2.0, 0.7], [1, 1, 1]), make_table("e", [3.0, 2.0, 1.0], [1, 1, 1])])
    assert whole.grid[-1] > 2.9
