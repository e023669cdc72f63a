"""A card's figures are the tables' own, or the audit says which are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rsrouter import ExpertPool
from rsrouter.audit import AuditReport, audit
from rsrouter.jobs import certify_table
from rsrouter.publish import write_card
from tests.helpers import small_router as small


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    router = small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))
    router.save_pretrained(folder / "router")
    certify_table(router, small.images(8), folder / "certificates.tsv", small.PLAN, data={"name": "bright-columns"})
    return write_card(folder, folder / "card", "org/router", title="Certified everywhere").parent


def of(report: AuditReport, name: str) -> str:
    return next((c.status for c in report.checks if c.name == name), "absent")


def audited(staged: Path, tmp_path: Path, **texts: bytes) -> AuditReport:
    """The audit of the staged folder with another README.md or curve.svg."""
    (tmp_path / "certificates").mkdir()
    for path in staged.rglob("*"):
        inside = path.relative_to(staged)
        if path.is_file() and not inside.is_relative_to("experts"):
            (tmp_path / inside).write_bytes(texts.get(path.stem, path.read_bytes()))
    (tmp_path / "experts").symlink_to(staged / "experts")
    return audit(tmp_path, seed=1)


def test_an_honest_card_passes(staged: Path) -> None:
    report = audit(staged, seed=1)
    assert (of(report, "card"), of(report, "curve"), report.findings, report.caveats) == ("passed", "passed", (), ())


FORGED = {
    "value": (r"value: [\d.]+", "value: 99.9", "value 99.9 in the card"),
    "value, behind a byte order mark": (r"\A---((?s:.*?))value: [\d.]+", "\ufeff---\\1value: 99.9", "value 99.9 in the card"),
    "radius": (r"radius: 0\.25\n", "radius: 5.0\n", "at radius 5.0 is"),
    "n": (r"votes: 1000", "votes: 9000", "n 9000 in the card, 1000 by the tables"),
    "alpha": (r"alpha: 0\.001", "alpha: 0.00001", "alpha 1e-05 in the card, 0.001"),
    "dataset": (r"(?m)^      name: bright-columns", "      name: ImageNet", "dataset ImageNet in the card"),
    "an argument that is named like the value": (
        r"value: ([\d.]+)((?s:.*?))args:\n",
        r"value: 99.9\2args:\n        metric_value: \1\n",
        "value 99.9 in the card",
    ),
    "a cell": (r"(?m)^(\| routed \| 8 \| )[\d.]+", r"\g<1>99.9", "routed | 8 | 99.9"),
    "a column's radius": (r"\| r = 0 \|", "| r = 9 |", "| r = 9 |"),
    "a table elsewhere, without markers": (r"<!-- rsrouter:\w+ -->|\| [\d.]+ \([\d.-]+\)", "| 99.9 (99.8-99.9)", "99.9 (99.8"),
    "alpha in the text": (r"alpha = 0\.001\.", "alpha = 0.00001.", "it says 'alpha = 0.00001."),
    "the choice of images": (r"all 8 images", "all 9 images", "all 9 images"),
    "a line that is gone": (r"(?m)^.*The seed follows.*\n", "", "it leaves out 'The seed follows"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_figure_that_does_not_follow_is_named(staged: Path, tmp_path: Path, name: str) -> None:
    pattern, new, told = FORGED[name]
    text, count = re.subn(pattern, new, (staged / "README.md").read_text())
    assert count
    report = audited(staged, tmp_path, README=text.encode())
    assert (report.exit_status, of(report, "card"), of(report, "curve")) == (1, "failed", "passed")
    assert any(told in str(f) for f in report.findings), str(report)


def test_another_curve_is_found(staged: Path, tmp_path: Path) -> None:
    curve = (staged / "certificates" / "curve.svg").read_bytes()
    report = audited(staged, tmp_path, curve=re.sub(rb"L[\d.]+", b"L1", curve))
    assert [f.check for f in report.findings] == ["curve"]


def test_the_rest_of_the_text_is_the_authors(staged: Path, tmp_path: Path) -> None:
    text = (staged / "README.md").read_text().replace("\n", "\r\n") + "\r\nOur best, certified at 99.9%.\r\n"
    report = audited(staged, tmp_path, README=text.encode())
    assert report.findings == ()
    assert report.caveats == ("the card's own text names figures that are in no table: 99.9%",)


@pytest.mark.parametrize("old", ["Made with rsrouter", "---\nbase"])
def test_a_card_that_cannot_be_compared_is_not_called_true(staged: Path, tmp_path: Path, old: str) -> None:
    text = (staged / "README.md").read_text().replace("alpha = 0.001.", "alpha = 0.001, ")
    assert old in text
    report = audited(
        staged, tmp_path, README=text.replace(old, "Made with rsrouter 0.0. " if "Made" in old else "---\n[: \nbase").encode()
    )
    assert (report.exit_status, of(report, "card"), report.findings) == (2, "skipped", ())
