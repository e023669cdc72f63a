"""Files of `datasets`, the Hub and torchvision are read as those read them; what is left out, and what is understood, is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rsrouter.cli import app
from rsrouter.core.errors import HubError, InputError
from rsrouter.data import UnreadableError, contact_sheet, decode, from_arrays, inspect_data, load_data
from rsrouter.data.pictures import FORMATS
from rsrouter.inputs import check_images, check_label_range, check_labels
from tests.helpers.hub_server import HubServer
from tests.helpers.odd_inputs import colour, gray, pets, rotated, shard, table, tree

CARD = """---
configs:
- config_name: plain
  data_files:
  - {split: train, path: "a/one-*"}
  - {split: test, path: ["b/two-*"]}
- config_name: other
  data_files: "c/*"
dataset_info:
  features:
  - {name: img, dtype: image}
  - {name: label, dtype: {class_label: {names: {"0": dog, "1": cat}}}}
---
Text.
"""


def test_a_hub_card_names_files_and_classes(hub: HubServer, tmp_path: Path) -> None:
    def content(value: int) -> bytes:
        return table(tmp_path / f"{value}.parquet", [gray(value)], label=[value % 2]).read_bytes()

    files = {"README.md": CARD, "a/one-0.parquet": content(1), "b/two-0.parquet": content(2), "c/x.parquet": content(3)}
    hub.put("org/set", files, repo_type="dataset")
    for stream in (False, True):
        with pytest.raises(InputError, match=r"several configurations.*other, plain"):
            load_data("hf-hub:org/set", stream=stream)
        with pytest.raises(InputError, match=r"several splits.*test, train"):
            load_data("hf-hub:org/set", config="plain", stream=stream)
        data = load_data("hf-hub:org/set", config="plain", split="test", stream=stream)
        assert (data.image(0)[0, 0, 0] * 255).round() == 2
        assert data.classes == ("dog", "cat")
        assert (data.origin.config, data.origin.split) == ("plain", "test")


def test_pictures_and_shards_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    names = {"data/train/cat/a.png": gray(1), "data/train/dog/a.png": gray(2), "data/test/dog/a.png": gray(3), "README.md": "x"}
    hub.put("org/pictures", names, repo_type="dataset")
    data = load_data("hf-hub:org/pictures", split="test")
    assert (data.labels.tolist(), data.classes) == ([1], ("cat", "dog"))
    hub.put(
        "org/shards", {"x-0.tar": shard(tmp_path / "x.tar", {"0.png": gray(5), "0.cls": b"7"}).read_bytes()}, repo_type="dataset"
    )
    assert load_data("hf-hub:org/shards").labels.tolist() == [7]
    hub.put("org/text", {"data.csv": "a,b\n1,2\n"}, repo_type="dataset")
    with pytest.raises(InputError, match="refs/convert/parquet"):
        load_data("hf-hub:org/text")
    with pytest.raises(InputError, match="leave stream out"):
        load_data("hf-hub:org/shards", stream=True)
    with pytest.raises(HubError):
        load_data("hf-hub:org/nothing")


def test_datasets_gives_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["dog", "cat"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    pictures = [{"bytes": rotated(), "path": None}, {"bytes": colour(9), "path": None}]
    held = datasets.Dataset.from_dict({"image": pictures, "label": [1, 0]}, features=features)
    want = torch.stack([torch.from_numpy(np.asarray(row["image"]).transpose(2, 0, 1).copy()) for row in held]).float() / 255
    held.to_parquet(tmp_path / "a.parquet")
    held.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=held.select([0]), test=held).save_to_disk(tmp_path / "both")
    both = datasets.DatasetDict(train=held.select([0]), test=held)
    for data in (
        load_data(held),
        load_data(both, split="test"),
        load_data(tmp_path / "a.parquet"),
        load_data(tmp_path / "saved"),
        load_data(tmp_path / "both", split="test"),
    ):
        images, labels = data.tensors()
        assert torch.equal(images, want)
        assert (labels.tolist(), data.classes) == ([1, 0], ("dog", "cat"))
    with pytest.raises(InputError, match="several splits"):
        load_data(both)
    with pytest.raises(InputError, match="stream=True"):
        load_data(held.to_iterable_dataset())


class Feature:
    """Stands for `datasets.Image`: the test of the code needs no `datasets`."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


def test_a_table_with_features_needs_no_package() -> None:
    kind = type("Image", (Feature,), {})
    label = type("ClassLabel", (), {"names": ["dog", "cat"]})()

    class Held:
        features, column_names, split = {"image": kind(), "label": label}, ["image", "label"], "test"

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: object) -> object:
            return [1, 0] if i == "label" else {"image": {"bytes": gray(4), "path": None}}

        def with_format(self, kind: None) -> Held:
            return self

        def cast_column(self, name: str, feature: Feature) -> Held:
            assert not feature.decode
            return self

        def select_columns(self, names: list[str]) -> Held:
            return self

    data = load_data(Held())
    assert (data.labels.tolist(), data.classes, data.origin.split) == ([1, 0], ("dog", "cat"), "test")
    assert (data.image(1) * 255).round().unique().tolist() == [4]


def test_postscript_never_reaches_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it was run"))
    with pytest.raises(UnreadableError, match="PostScript"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "x.png")
    assert "EPS" not in FORMATS


def test_every_picture_is_opened_with_named_formats() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in [*root.glob("rsrouter/**/*.py"), *root.glob("examples/**/*.py")]:
        for call in re.findall(r"Image\.open\(.*", path.read_text(encoding="utf-8")):
            assert "formats=" in call, f"{path}: {call}"


def test_notes_count_what_was_done(tmp_path: Path) -> None:
    files = {"x/0.png": rotated(), "x/1.png": gray(3), "x/2.png": colour(), "x/3.png": colour()}
    found = inspect_data(load_data(tree(tmp_path, files)))
    assert found.notes == {"the EXIF orientation is applied": 1, "gray pictures among colour ones get three equal channels": 1}
    assert found.modes == {"PNG RGB": 3, "PNG L": 1}
    assert found.shapes == {"3 x 8 x 8": 4}


def test_inspection_names_what_cannot_be_read(tmp_path: Path) -> None:
    data = load_data(tree(pets(tmp_path), {"dog/b.png": b"", ".git/x": b""}))
    found = inspect_data(data)
    assert (found.images, found.looked_at) == (3, 3)
    assert found.classes == ((0, "cat", 1), (1, "dog", 2))
    assert "dog/b.png" in found.unreadable[2]
    assert found.passed == {"hidden or of the system": (".git",)}
    assert (found.low * 255, found.high * 255) == pytest.approx((1, 2))
    assert found.eight_bit
    assert found.fingerprint == data.fingerprint
    assert inspect_data(data, images=1, fingerprint=False).looked_at == 1
    with pytest.raises(InputError, match="at least 1"):
        inspect_data(data, images=0)


def test_the_sheet_shows_the_first_image_of_each_class(tmp_path: Path) -> None:
    data = load_data(tree(pets(tmp_path / "d"), {"dog/b.png": b""}))
    with Image.open(contact_sheet(data, tmp_path / "s.png", per_class=2)) as sheet:
        assert sheet.size == (2 * 68 + 4, 2 * 82 + 4)
        assert [sheet.getpixel((10, 4 + 82 * row + 14 + 32)) for row in (0, 1)] == [(1, 1, 1), (2, 2, 2)]
    for path in (tmp_path / "s.pdf", tmp_path / "none" / "s.png"):
        with pytest.raises(InputError, match="contact sheet"):
            contact_sheet(data, path)


def test_unreadable_rows_keep_the_numbers_of_others_and_are_recorded(tmp_path: Path) -> None:
    folder = tree(pets(tmp_path), {"cat/b.png": b"", "dog/c.png": gray(3)})
    plain = load_data(folder)
    assert plain.readable() == [0, 1, 2, 3]
    assert plain.preprocessing is None
    with pytest.raises(UnreadableError, match=r"cat/b\.png"):
        plain.tensors()
    data = load_data(folder, skip_unreadable=True)
    with pytest.warns(UserWarning, match="1 unreadable of 3"):
        assert data.readable(range(1, 4)) == [2, 3]
    assert data.preprocessing == {"unreadable": [1]}
    assert data.fingerprint == plain.fingerprint


def test_the_label_column_is_part_of_what_the_data_are(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", [gray()], label=[1], coarse=[0])
    assert load_data(path).fingerprint != load_data(path, label="coarse").fingerprint
    assert load_data(path).fingerprint != load_data(path, channels=3).fingerprint


def test_labels_that_the_experts_do_not_know_are_refused() -> None:
    check_label_range([0, -1, 9], 10)
    for labels, unknown, match in (
        ([0, 10], True, "10 at image 1; 1 of 2"),
        ([-2], True, "-2 at image 0"),
        ([-1], False, "-1 at image 0"),
        ([1, 10], True, "counted from 1"),
    ):
        with pytest.raises(InputError, match=match):
            check_label_range(labels, 10, unknown=unknown)
    with pytest.raises(InputError, match="at image 70"):
        check_label_range([10], 10, ids=[70])
    for bad in (["a"], None, torch.zeros(1), [[1]]):
        with pytest.raises(InputError):
            check_labels(bad, 1, 10)


@pytest.mark.parametrize(
    ("pixels", "remedy"),
    [
        (torch.full((1, 1, 2, 2), 1.02), "clip"),
        (torch.full((1, 1, 2, 2), 200.0), "divide by 255"),
        (torch.full((1, 1, 2, 2), 40_000.0), "65535"),
        (torch.full((1, 1, 2, 2), -2.0), "normalises"),
        (torch.full((1, 1, 2, 2), float("nan")), "repair"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "float"),
        (np.zeros((1, 1, 2, 2)), "load_data"),
    ],
)
def test_advice_about_pixels_is_right(pixels: object, remedy: str) -> None:
    with pytest.raises(InputError) as caught:
        check_images(pixels, (1, 2, 2))
    assert remedy in caught.value.remedy
    assert remedy == "divide by 255" or "divide by 255" not in caught.value.remedy


def test_a_rounding_error_is_clipped_with_a_word() -> None:
    with pytest.warns(UserWarning, match="clipped"):
        clipped = check_images(torch.full((1, 1, 2, 2), 1.0000002), (1, 2, 2))
    assert clipped.max() == 1
    assert from_arrays(np.full((1, 1, 2, 2), 1.0000002, np.float32)).image(0).max() == 1


def test_inspect_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tree(pets(tmp_path / "d"), {"dog/b.png": b"", "cat/notes.txt": "x"})
    result = CliRunner().invoke(app, ["inspect", str(folder), "--contact-sheet", str(tmp_path / "s.png")])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for word in ("0 cat (1), 1 dog (2)", "1 x 8 x 8 (2)", "passed over", "notes.txt", "unreadable  1:", "in steps of 1/255"):
        assert word in result.stdout
    assert "warning: d: passed over" in result.stderr
    result = CliRunner().invoke(app, ["inspect", str(folder), "--classes", "dog,cat", "--format", "json"])
    told = json.loads(result.stdout)
    assert told["classes"] == [{"class": 0, "name": "dog", "images": 2}, {"class": 1, "name": "cat", "images": 1}]
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    result = CliRunner().invoke(app, ["inspect", str(folder), "--classes", str(tmp_path / "names.txt"), "--format", "json"])
    assert json.loads(result.stdout) == told


def test_every_verb_that_reads_data_takes_the_data_options() -> None:
    from typer.main import get_command

    wanted = {"--split", "--config", "--image", "--label", "--classes", "--size", "--channels", "--stream", "--skip-unreadable"}
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for name, verb in verbs.items():
        options = {text for p in verb.params for text in p.opts}
        if "--data" in options or name == "inspect":
            assert wanted <= options, f"{name}: {wanted - options}"


def test_torchvision_data_sets_are_read_by_their_targets(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    held = ImageFolder(str(pets(tmp_path)))
    data = load_data(held)
    assert (data.labels.tolist(), data.classes) == ([0, 1], ("cat", "dog"))
    assert data.image(1).shape == (3, 8, 8)
    with pytest.raises(InputError, match="cannot be read"):
        load_data(SimpleNamespace())
