"""The page: self-contained, harmless, complete, and never over something else."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rsrouter.core import AdaptivePlan
from rsrouter.core.errors import InputError, ResultsError
from rsrouter.report import summarise, write_report
from rsrouter.report.page import FILES
from rsrouter.report.thumbnails import gallery
from rsrouter.results import Table
from tests.helpers.report_tables import described, make_table

N = 60
HOSTILE = "<script>alert(1)</script>"


def tables(names: tuple[str, str, str] = ("routed", "sigma-0.25", "sigma-1.00"), *, labelled: bool = True) -> list[Table]:
    """A routed run and two experts over the same images, one good at small radii and one at large."""
    rng = np.random.default_rng(0)
    easy = rng.uniform(size=N)
    small, large = np.minimum(easy, 0.9), 2 * np.maximum(easy - 0.4, 0.0)
    pick = large > small
    correct = (rng.uniform(size=N) < 0.9).astype(int) if labelled else np.full(N, -1)
    plan = AdaptivePlan(1000, [0.0, 0.25, 0.5, 1.0])
    chosen = np.where(pick, names[2], names[1]).tolist()
    routed = make_table(
        names[0], np.where(pick, large, small).tolist(), correct.tolist(), abstain=(easy < 0.1).tolist(), expert=chosen,
        rule="tree", bound_by=["router" if e > 0.5 else names[1] for e in easy], n_drawn=rng.integers(100, 900, N).tolist(),
        fixed_votes=[2010] * N,
        metadata=described(plan=plan, experts=[(names[1], 0.25), (names[2], 1.0)]),
    )  # fmt: skip
    experts = [
        make_table(
            name,
            radius.tolist(),
            correct.tolist(),
            abstain=(radius == 0).tolist(),
            expert=[name] * N,
            metadata=described("expert", plan=plan),
        )
        for name, radius in ((names[1], small), (names[2], large))
    ]
    return [routed, *experts]


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = ("meta", "link", "img", "br", "path", "line", "rect", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_whole_report(tmp_path: Path) -> None:
    images = np.random.default_rng(0).uniform(size=(N, 3, 8, 8))
    page_path = write_report(tables(), tmp_path / "report", images=images, classes=["cat", "dog"])
    assert page_path == tmp_path / "report" / "index.html"
    beside = ["bound.svg", "curve.csv", "curve.svg", "index.html", "numbers.csv", "report.json", "shares.csv"]
    assert sorted(p.name for p in page_path.parent.iterdir()) == [*beside, "votes.svg", "who.svg"]
    page = Page(page_path.read_text())
    headings = (
        "Certified accuracy by radius, In numbers, What it took, Who answers, What limits the radius, Votes drawn, Images, "
        "Largest certified radius, Smallest certified radius, Abstained, What the numbers mean, How it was made"
    )
    for heading in headings.split(", "):
        assert heading in page.text
    # every number of the summary stands on the page
    summary = summarise(tables())
    for series in summary.series:
        assert series.name in page.text
        for value in series.at:
            assert value == 0 or f"{100 * value:.1f}" in page.text
    assert summary.radii.tolist() == [0.0, 0.25, 0.5, 1.0]
    assert "versions.torch" in page.text
    assert "9.9" in page.text
    assert "Certified, but wrong" in page.text
    assert len(page.all("img")) >= 20
    # nothing comes from elsewhere, everything has words for those who cannot see it
    assert not re.search(r"https?://", page_path.read_text())
    assert all((a["src"] or "").startswith("data:image/png;base64,") and a["alt"] for a in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("svg") if a.get("role") == "img")
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert [a["href"] for a in page.all("link")] == ["data:,"]
    assert page.all("html")[0]["lang"] == "en"
    assert page_path.stat().st_size < 3_000_000


def test_files_beside_the_page(tmp_path: Path) -> None:
    folder = write_report(tables(), tmp_path).parent
    assert ElementTree.parse(folder / "curve.svg").getroot().tag.endswith("svg")
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    summary = summarise(tables())
    for series in summary.series:
        by_radius = {float(r["radius"]): float(r["accuracy"]) for r in rows if r["series"] == series.name}
        assert [by_radius[r] for r in summary.radii] == pytest.approx(series.at, abs=1e-6)


def test_the_same_tables_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tables(), tmp_path / name)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_hostile_names_are_harmless(tmp_path: Path) -> None:
    hostile = tables((HOSTILE, "'\"><img src=x onerror=alert(1)>", "$\\frac{&amp;"))
    hostile[0].metadata["comment"] = "</script><script>alert(2)</script>"
    hostile[0].metadata["x<b>"] = {"y": "<i>"}
    path = write_report(hostile, tmp_path / "r", title="</title><script>alert(3)</script>", images=np.zeros((N, 1, 4, 4)),
                        classes=["<u>", "</script>"])  # fmt: skip
    page = Page(path.read_text())
    assert len(page.all("script")) == 2
    assert all((a["src"] or "").startswith("data:") for a in page.all("img"))
    assert not page.all("i") or all(set(a) == {"class"} for a in page.all("i"))
    assert not page.all("u")
    assert not page.all("b") or "alert" not in str(page.all("b"))
    assert HOSTILE in page.text
    assert "<script" not in (tmp_path / "r" / "curve.svg").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    assert data is not None
    assert json.loads(data[1])["series"][0]["name"] == HOSTILE


def test_roles() -> None:
    routed, a, b = tables()
    assert [s.role for s in summarise([routed, a, b]).series] == ["routed", "expert", "expert", "envelope", "oracle"]
    # the field's tables say nothing: each is an expert
    plain = [make_table(n, [1.0, 0.5], [1, 0]) for n in ("x", "y")]
    assert [s.role for s in summarise(plain).series] == ["expert", "expert", "envelope", "oracle"]
    told = summarise({"x": plain[0], "y": plain[1]}, routed="y", experts=["x"])
    assert [(s.name, s.role) for s in told.series] == [("y", "routed"), ("x", "expert")]
    # what rows show: a rule, or several experts
    assert summarise(make_table("z", [1.0, 1.0], [1, 1], expert=["a", "b"])).roles == {"z": "routed"}
    with pytest.raises(InputError, match="does not have"):
        summarise(plain, routed="nobody")


def test_names_are_made_unique_and_free() -> None:
    envelope, again = (make_table("envelope", [1.0], [1]) for _ in range(2))
    names = [s.name for s in summarise([envelope, again]).series]
    assert names == ["envelope", "envelope (2)", "envelope of the experts", "oracle"]


def test_a_single_table_of_the_field(tmp_path: Path) -> None:
    path = tmp_path / "sigma_0.25.tsv"
    path.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.377\t1\t0:00:14.1\n20\t8\t-1\t0.0\t0\t0:00:14.0\n")
    text = Page(write_report(path, tmp_path / "report").read_text()).text
    assert "rounded to the nearest" in text
    assert "sigma_0.25" in text
    assert "50.0" in text


def test_without_labels_it_says_certified_share(tmp_path: Path) -> None:
    text = Page(write_report(tables(labelled=False), tmp_path).read_text()).text
    assert "Certified share by radius" in text
    assert "Labels are unknown" in text
    assert "oracle" not in text.split("What the numbers mean")[0]


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_tables_and_nothing_certified(tmp_path: Path, n: int) -> None:
    nothing = [
        make_table(name, [0.0] * n, [0] * n, abstain=[True] * n, n_drawn=[5] * n, expert=[name] * n) for name in ("a", "b")
    ]
    Page(write_report(nothing, tmp_path / "nothing").read_text())
    Page(write_report(make_table("one", [0.3] * n, [1] * n), tmp_path / "one").read_text())


def test_several_runs_are_compared_in_pairs(tmp_path: Path) -> None:
    routed, a, b = tables()
    worse = make_table(
        "worse", (routed.radius * 0.5).tolist(), routed.correct.tolist(), abstain=routed.abstained.tolist(), rule="min"
    )
    text = Page(write_report([routed, worse, a, b], tmp_path).read_text()).text
    assert "Runs side by side" in text
    assert "routed minus" in text


def test_the_whole_tables_statement(tmp_path: Path) -> None:
    text = Page(write_report(tables(), tmp_path).read_text()).text
    assert "at most 2 of 60 rows are wrong" in text  # P(Binomial(60, 0.001) > 2) is 3e-5 < 0.001 < P(> 1)
    claimed = round(60 * summarise(tables()).series[0].at[0])
    assert f"routed, at least {int(1000 * (claimed - 2) / 60) / 10:.1f}" in text  # cut, not rounded up


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    first = write_report(tables(), tmp_path / "r", title="first").read_text()
    assert "first" in first
    assert "second" in write_report(tables(), tmp_path / "r", title="second").read_text()
    for name, content in (("index.html", "<html>mine</html>"), ("notes.txt", "mine")):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(ResultsError, match="not written by this command"):
            write_report(tables(), folder)
        assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(name, content)]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResultsError, match="not a folder"):
        write_report(tables(), tmp_path / "file")


def test_bad_tables_leave_no_folder(tmp_path: Path) -> None:
    routed, a, b = tables()
    out = tmp_path / "out"
    with pytest.raises(InputError, match="different images"):
        write_report([routed, a.take(np.arange(10)), b], out)
    with pytest.raises(ResultsError, match="no such"):
        write_report([tmp_path / "none.tsv"], out)
    with pytest.raises(InputError, match="nothing to report"):
        write_report([], out)
    with pytest.raises(InputError, match="made of results tables"):
        write_report([3], out)  # type: ignore[list-item]
    with pytest.raises(InputError, match="radii"):
        write_report([routed], out, radii=[-1.0])
    assert not out.exists()
    assert "10 images" in Page(write_report([routed, a.take(np.arange(10)), b], out, common=True).read_text()).text


@pytest.mark.parametrize(
    ("images", "match"),
    [(np.zeros((3, 1, 4, 4)), "belong"), (np.zeros((N, 4, 4)), "shape"), (np.full((N, 1, 4, 4), 2.0), "outside"),
     (np.full((N, 1, 4, 4), np.nan), "outside"), (np.zeros((N, 2, 4, 4)), "shape")],
)  # fmt: skip
def test_images_that_do_not_fit(tmp_path: Path, images: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        write_report(tables(), tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()


def test_a_caption_never_says_more_than_was_certified() -> None:
    table = make_table("one", [0.996, 2.25999999], [1, 1])
    found = gallery(table, {i: np.zeros((1, 4, 4)) for i in range(2)})
    assert {t.caption for group in found.values() for t in group} == {"r = 0.99", "r = 2.25"}


def test_images_by_id_and_bytes_are_enough(tmp_path: Path) -> None:
    images = {i: np.full((3, 120, 200), i, np.uint8) for i in range(5)}
    page = Page(write_report(tables(), tmp_path, images=images).read_text())
    assert 1 <= len(page.all("img")) <= 5
