"""Reading tables, ours and the field's; bad rows are named by line; shards merge into what one run writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rsrouter.core.errors import InputError, IntegrityError, ResultsError
from rsrouter.results import ResultsWriter, align, merge_tables, read_table
from tests.helpers.fake_rows import FIXED, METADATA, SEED, described, make_row, run_job

FIELD = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    "0\t3\t-1\t0.0\t0\t0:00:14.114881\n"
    "20\t8\t8\t0.36\t1\t0:00:13.996586\n"
    "40\t8\t1\t1.2\t0\t1 day, 0:00:01\n"
)


def field_table(folder: Path, text: str = FIELD) -> Path:
    path = folder / "sigma_0.25.tsv"
    path.write_text(text)
    return path


def test_the_fields_table(tmp_path: Path) -> None:
    table = read_table(field_table(tmp_path))
    assert (table.name, table.ours, table.metadata, len(table)) == ("sigma_0.25", False, {}, 3)
    assert table.idx.tolist() == [0, 20, 40]
    assert table.predict.tolist() == [-1, 8, 1]
    assert table.correct.tolist() == [0, 1, 0]
    assert table.radius.tolist() == [0.0, 0.36, 1.2]
    assert table.time.tolist() == [14.114881, 13.996586, 86401.0]
    assert table.abstained.tolist() == [True, False, False]
    assert table.n_drawn.tolist() == [-1, -1, -1]
    assert table.counts(0) == {"select": {}, "estimate": {}}
    assert np.isnan(table.r_router).all()


def test_the_fields_table_without_a_last_newline_and_with_carriage_returns(tmp_path: Path) -> None:
    table = read_table(field_table(tmp_path, FIELD.rstrip("\n").replace("\n", "\r\n")), name="theirs")
    assert table.idx.tolist() == [0, 20, 40]
    assert table.name == "theirs"


def test_our_table(tmp_path: Path) -> None:
    run_job(tmp_path / "certificates.tsv", range(20), {**METADATA, "name": "routed run"})
    table = read_table(tmp_path / "certificates.tsv")
    rows = [make_row(i) for i in range(20)]
    assert table.name == "routed run"
    assert table.about.plan == FIXED
    assert table.predict.tolist() == [r.predict for r in rows]
    assert table.expert.tolist() == [r.expert for r in rows]
    assert table.seed.tolist() == [SEED] * 20
    assert table.correct.tolist() == [r.correct for r in rows]
    assert table.counts(4)["estimate"] == {k: tuple(v) for k, v in rows[4].counts["estimate"].items()}  # type: ignore[index]


@pytest.mark.parametrize("text", ["", "a,b,c\n1,2,3\n", FIELD.split("\n")[0] + "\n"])
def test_not_a_table(tmp_path: Path, text: str) -> None:
    with pytest.raises(ResultsError):
        read_table(field_table(tmp_path, text))


def test_missing_binary_and_truncated(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no such"):
        read_table(tmp_path / "none.tsv")
    with pytest.raises(ResultsError, match="Cannot read"):
        read_table(tmp_path)
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="UTF-8"):
        read_table(tmp_path / "b.tsv")
    path = tmp_path / "certificates.tsv"
    run_job(path, range(5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ResultsError, match="truncated"):
        read_table(path)
    path.write_bytes(whole[: whole.rfind(b"\t") - 2] + b"\n")
    with pytest.raises(ResultsError, match="Line 6"):
        read_table(path)
    path.write_bytes(whole.replace(b'"select"', b'"selekt"', 1))
    with pytest.raises(ResultsError, match="counts"):
        read_table(path)


def test_align(tmp_path: Path) -> None:
    a = read_table(field_table(tmp_path))
    b = a.take(np.array([2, 0, 1])).renamed("shuffled")
    x, y = align([a, b])
    assert x.idx.tolist() == y.idx.tolist() == [0, 20, 40]
    assert y.predict.tolist() == a.predict.tolist()
    less = a.take(np.array([1, 2]))
    with pytest.raises(InputError, match="different images"):
        align([a, less])
    assert [t.idx.tolist() for t in align([a, less], common=True)] == [[20, 40], [20, 40]]
    with pytest.raises(InputError, match="no image in common"):
        align([a.take(np.array([0])), less], common=True)
    (tmp_path / "sigma_0.25.tsv").write_text(FIELD.replace("20\t8\t8\t0.36\t1", "20\t7\t8\t0.36\t0"))
    with pytest.raises(InputError, match="label"):
        align([a, read_table(tmp_path / "sigma_0.25.tsv")])


def shards(folder: Path, count: int, images: int = 23) -> list[Path]:
    paths = []
    for index in range(count):
        path = folder / f"shard-{index}-of-{count}.tsv"
        run_job(path, range(index, images, count), described(ids=range(images), shard={"index": index, "count": count}))
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_merge_into_what_one_run_writes(tmp_path: Path, count: int) -> None:
    run_job(tmp_path / "one.tsv", range(23), described(ids=range(23)))
    paths = shards(tmp_path, count)
    random.Random(count).shuffle(paths)
    # a shard that was done twice changes nothing
    out = merge_tables([*paths, paths[0]], tmp_path / "out" / "merged.tsv")
    assert out.read_bytes() == (tmp_path / "one.tsv").read_bytes()
    assert out.with_suffix(".json").read_bytes() == (tmp_path / "one.json").read_bytes()
    # and again, over its own result
    assert merge_tables(paths, out) == out


def test_overlapping_shards_agree_but_for_time(tmp_path: Path) -> None:
    for name, seconds in (("a", 3.0), ("b", 2.0)):
        with ResultsWriter(tmp_path / f"{name}.tsv", described(ids=[1])) as writer:
            writer.append(make_row(1, seconds=seconds))
    for order in (["a", "b"], ["b", "a"]):
        out = merge_tables([tmp_path / f"{n}.tsv" for n in order], tmp_path / f"{order[0]}-first.tsv")
        assert read_table(out).time.tolist() == [2.0]


def test_shards_that_disagree(tmp_path: Path) -> None:
    paths = shards(tmp_path, 2)
    text = paths[0].read_text()
    copy = tmp_path / "copy.tsv"
    cells = text.split("\n")[1].split("\t")
    assert cells[1] == "-1"
    cells[1], cells[4] = "2", str(int(cells[2] == "2"))
    copy.write_text(text.replace(text.split("\n")[1], "\t".join(cells), 1))
    copy.with_suffix(".json").write_text(paths[0].with_suffix(".json").read_text())
    with pytest.raises(ResultsError, match="disagree about image 0") as caught:
        merge_tables([*paths, copy], tmp_path / "out.tsv")
    assert "label '-1'" in caught.value.expected
    assert "'2'" in caught.value.received
    assert not (tmp_path / "out.tsv").exists()
    # what follows from the votes cannot differ: such a shard is not merged at all
    copy.write_text(text.replace("\ttree\t", "\tmin\t", 1))
    with pytest.raises(IntegrityError, match="image 0: rule min published, tree from its votes"):
        merge_tables([*paths, copy], tmp_path / "out.tsv")


def test_shards_of_another_run(tmp_path: Path) -> None:
    paths = shards(tmp_path, 2)
    metadata = json.loads(paths[1].with_suffix(".json").read_text())
    paths[1].with_suffix(".json").write_text(json.dumps({**metadata, "terms": {**metadata["terms"], "alpha": 0.01}}))
    with pytest.raises(ResultsError, match=r"terms.alpha: 0\.001 against 0\.01"):
        merge_tables(paths, tmp_path / "out.tsv")
    paths[1].with_suffix(".json").write_text(json.dumps({**metadata, "shard": {"index": 1, "count": 3}}))
    with pytest.raises(ResultsError, match="cut differently"):
        merge_tables(paths, tmp_path / "out.tsv")
    paths[1].with_suffix(".json").write_text(json.dumps({**metadata, "shard": "second"}))
    with pytest.raises(ResultsError, match="shard: input should be an object"):
        merge_tables(paths, tmp_path / "out.tsv")
    paths[1].with_suffix(".json").unlink()
    with pytest.raises(ResultsError, match="no metadata"):
        merge_tables(paths, tmp_path / "out.tsv")


def test_missing_and_unfinished_shards(tmp_path: Path) -> None:
    paths = shards(tmp_path, 3)
    with pytest.raises(ResultsError, match="no shard 1"):
        merge_tables([paths[0], paths[2]], tmp_path / "out.tsv")
    with pytest.raises(ResultsError, match="no such"):
        merge_tables([*paths[:2], tmp_path / "none.tsv"], tmp_path / "out.tsv")
    lines = paths[1].read_text().splitlines(keepends=True)
    paths[1].write_text("".join(lines[:-1]))
    with pytest.raises(ResultsError, match="every image") as caught:
        merge_tables(paths, tmp_path / "out.tsv")
    assert (caught.value.expected, caught.value.received) == ("23 rows", "22 rows (shard 1: 7 of 8)")
    assert len(read_table(merge_tables(paths, tmp_path / "out.tsv", partial=True))) == 22


def test_merging_overwrites_nothing(tmp_path: Path) -> None:
    paths = shards(tmp_path, 2)
    with pytest.raises(ResultsError, match="one of its shards"):
        merge_tables(paths, paths[0])
    other = tmp_path / "other.tsv"
    other.write_text("mine")
    with pytest.raises(ResultsError, match="something else"):
        merge_tables(paths, other)
    assert other.read_text() == "mine"
    with pytest.raises(ResultsError, match="nothing to merge"):
        merge_tables([], tmp_path / "out.tsv")


def test_shards_of_more_parts_than_images(tmp_path: Path) -> None:
    paths = shards(tmp_path, 30)[:23]  # the other seven hold no image
    run_job(tmp_path / "one.tsv", range(23), described(ids=range(23)))
    assert merge_tables(paths, tmp_path / "out.tsv").read_bytes() == (tmp_path / "one.tsv").read_bytes()
    with pytest.raises(ResultsError, match="no shard 22"):
        merge_tables(paths[:-1], tmp_path / "less.tsv")


def test_a_shard_that_has_only_begun(tmp_path: Path) -> None:
    paths = shards(tmp_path, 2)
    header = paths[1].read_text().splitlines(keepends=True)[0]
    paths[1].write_text(header)
    with pytest.raises(ResultsError, match="shard 1: 0 of 11"):
        merge_tables(paths, tmp_path / "out.tsv")
    assert len(read_table(merge_tables(paths, tmp_path / "out.tsv", partial=True))) == 12


def with_info(path: Path, device: str, **info: object) -> Path:
    metadata = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**metadata, "device": device, "info": info}))
    return path


@pytest.mark.parametrize("key", ["threads", "instructions"])
def test_shards_whose_sums_were_rounded_otherwise(tmp_path: Path, key: str) -> None:
    a, b = shards(tmp_path, 2)
    with_info(a, "cpu", threads=1, instructions="AVX2", host="a")
    with_info(b, "cpu", **{"threads": 1, "instructions": "AVX2", "host": "b", key: 9})
    with pytest.raises(ResultsError, match=f"info.{key}: .* against 9"):
        merge_tables([a, b], tmp_path / "out.tsv")
    # on an accelerator neither decides anything
    for path in (a, b):
        with_info(path, "GPU", threads=1 if path is a else 2, host="same")
    out = merge_tables([a, b], tmp_path / "out.tsv")
    assert json.loads(out.with_suffix(".json").read_text())["info"] == {"host": "same"}


def test_a_table_that_does_not_tell_its_instructions_is_not_refused_for_it(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    run_job(path, range(2), {**METADATA, "info": {"threads": 1}})
    run_job(path, range(3), {**METADATA, "info": {"threads": 1, "instructions": "AVX2"}})
    with pytest.raises(ResultsError, match=r"info\.threads: 1 against 2"):
        run_job(path, range(4), {**METADATA, "info": {"threads": 2}})
    assert len(read_table(path)) == 3
