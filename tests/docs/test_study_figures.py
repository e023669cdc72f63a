"""Figures that a study's README repeats are those of its table.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).resolve().parents[2] / "model_cards"
MARKED = re.compile(r"<!-- figures of (\S*table.json) -->\n(.*?)<!-- /figures -->", flags=re.DOTALL)
FIGURE = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.])")


def numbers(value: Any) -> Iterator[float]:
    """Every number of a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def ratios(study: dict[str, Any]) -> Iterator[float]:
    """The best method's accuracy over the published envelope, radius by radius."""
    for routed, best in zip(
        study["methods"]["deferral"]["accuracy"], study.get("published", {}).get("envelope", []), strict=False
    ):
        yield routed / best


def unknown(text: str, study: dict[str, Any]) -> list[str]:
    """Decimal figures of `text` that are no number of the study, as it is or in percent, to the digits shown."""
    known = [0.001, *(abs(n) for n in (*numbers(study), *ratios(study)))]  # alpha, and what was counted
    known += [100 * n for n in known]
    odd = []
    for figure in FIGURE.findall(text):
        digits = len(figure.partition(".")[2])
        if not any(abs(n - float(figure)) <= 0.5001 * 10.0**-digits for n in known):
            odd.append(figure)
    return odd


@pytest.mark.parametrize("name", ["fashion-mnist-study", "cifar10-study", "denoised-study"])
def test_a_study_says_what_its_table_holds(name: str) -> None:
    parts = MARKED.findall((STUDIES / name / "README.md").read_text(encoding="utf-8"))
    assert parts[0][0] == "table.json"
    for file, text in parts:
        study = json.loads((STUDIES / name / file).read_text(encoding="utf-8"))
        assert len(FIGURE.findall(text)) > 8
        assert unknown(text, study) == []
        assert unknown("covers 3.217 of it, least .1013579", study) == ["3.217", ".1013579"]
