"""Files of which two readers would see different things are refused by every reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.results.about import TableMetadata
from rsrouter.results.reading import parse_rows
from rsrouter.results.rows import HEADER, Row
from rsrouter.stored import parse_json

CELLS = Row(idx=10, label=1, predict=1, radius=0.5, time=1.0, seed=7).to_line().rstrip("\n").split("\t")


def read(header: str, cells: list[str]) -> None:
    parse_rows([header, "\t".join(cells)], path=Path("t.tsv"), metadata={}, name="t")


def test_a_plain_row_is_read() -> None:
    read(HEADER.rstrip("\n"), CELLS)


@pytest.mark.parametrize(
    ("at", "text", "column"),
    [
        (0, "1_0", "idx"),
        (1, "١", "label"),
        (3, "0.5_0", "radius"),
        (3, " 0.5", "radius"),
        (10, "0_0", "n_drawn"),
        (11, "٧", "seed"),
    ],
)
def test_numbers_that_python_alone_reads(at: int, text: str, column: str) -> None:
    cells = [text if i == at else cell for i, cell in enumerate(CELLS)]
    with pytest.raises(ResultsError, match=f"{column} in plain digits"):
        read(HEADER.rstrip("\n"), cells)


def test_a_column_that_certify_does_not_write() -> None:
    with pytest.raises(ResultsError, match="and no other"):
        read(HEADER.rstrip("\n") + "\tcertified_radius", [*CELLS, "9.9"])


def test_a_key_that_stands_twice() -> None:
    assert parse_json('{"a": {"b": 1}}', "x") == {"a": {"b": 1}}
    with pytest.raises(InputError, match="the key 'b' stands in it twice"):
        parse_json('{"a": {"b": 1, "b": 2}}', "x")


def test_a_job_that_names_an_image_twice() -> None:
    demo = Path(__file__).parents[2] / "model_cards/demo/certificates/certificates.json"
    content = json.loads(demo.read_text())
    size = content["num_images"]
    TableMetadata.read(content, "the demo")
    start, _, step = content["indices"][0]
    twice = [[start, start + step * size // 2, step]] * 2
    count = sum(len(range(*run)) for run in twice)
    with pytest.raises(ResultsError, match="name an image twice"):
        TableMetadata.read({**content, "indices": twice, "num_images": count}, "the demo")
