"""Data from every source, one index at a time; bad data is refused with a remedy."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import transforms

from rsrouter.core.errors import HubError, InputError
from rsrouter.data import ImageData, from_arrays, load_data, resize_centre
from rsrouter.data.tables import Tables, local_source
from tests.helpers.hub_server import HubServer

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 3, 6, 5), dtype=np.uint8)
LABELS = np.array([3, 1, 0, 2, 1, 1, 0])


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, rows: slice = slice(None), image: str = "img", label: str | None = "label") -> Path:
    columns: dict[str, object] = {image: [{"bytes": png(p), "path": None} for p in PIXELS[rows]]}
    if label:
        columns[label] = LABELS[rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def holds_the_pixels(data: ImageData) -> None:
    images, labels = data.tensors()
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.from_numpy(PIXELS).float() / 255)
    assert torch.equal((images * 255).round().to(torch.uint8), torch.from_numpy(PIXELS))  # 8-bit pixels survive exactly
    assert labels.tolist() == LABELS.tolist()
    assert torch.equal(data.labels, labels)
    image, label = data[4]
    assert torch.equal(image, images[4])
    assert label == 1
    assert data[-1][1] == 0


def test_eight_bit_images_of_zeros_and_ones_are_doubted() -> None:
    bits = np.eye(4, dtype=np.uint8)[None]
    with pytest.warns(UserWarning, match="nearly black"):
        from_arrays(bits, [0], name="bits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert from_arrays(bits.astype(bool), [0])[0][0].max() == 1
        from_arrays(np.zeros_like(bits), [0])  # black may be meant
        from_arrays(2 * bits, [0])


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=PIXELS, labels=LABELS.astype(np.uint8), index=np.arange(7) + 100)
    data = load_data(tmp_path / "d.npz")
    holds_the_pixels(data)
    assert data.ids.tolist() == list(range(100, 107))
    np.savez(tmp_path / "e.npz", images=PIXELS.transpose(0, 2, 3, 1), labels=LABELS)
    holds_the_pixels(load_data(tmp_path / "e.npz"))


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label")])
def test_parquet_file_and_shards(tmp_path: Path, image: str, label: str) -> None:
    holds_the_pixels(load_data(parquet(tmp_path / "one.parquet", image=image, label=label)))
    parquet(tmp_path / "set" / "test-00000-of-00002.parquet", slice(0, 3), image, label)
    parquet(tmp_path / "set" / "test-00001-of-00002.parquet", slice(3, 7), image, label)
    data = load_data(tmp_path / "set")
    holds_the_pixels(data)
    assert torch.equal(data.batch([6, 0, 3])[0], torch.from_numpy(PIXELS[[6, 0, 3]]).float() / 255)


def test_splits_are_asked_for(tmp_path: Path) -> None:
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(InputError, match="several splits"):
        load_data(tmp_path)
    with pytest.raises(InputError, match="no such split"):
        load_data(tmp_path, split="validation")
    holds_the_pixels(load_data(tmp_path, split="test"))


def test_image_folder(tmp_path: Path) -> None:
    order = np.argsort(LABELS, kind="stable")
    for i, k in enumerate(LABELS):
        (tmp_path / f"class_{k}").mkdir(exist_ok=True)
        (tmp_path / f"class_{k}" / f"{i}.png").write_bytes(png(PIXELS[i]))
    data = load_data(tmp_path)
    assert data.classes == ("class_0", "class_1", "class_2", "class_3")
    assert data.labels.tolist() == sorted(LABELS.tolist())
    assert torch.equal(data.tensors()[0], torch.from_numpy(PIXELS[order]).float() / 255)


def test_folder_without_classes_is_unlabelled(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(PIXELS[i, :1]))
    data = load_data(tmp_path)
    assert not data.labelled
    assert data.labels.tolist() == [-1, -1]
    assert data[0][0].shape == (1, 6, 5)


def test_hub_data_set_at_a_pinned_revision(hub: HubServer, tmp_path: Path) -> None:
    one = parquet(tmp_path / "a" / "test-00000-of-00001.parquet").read_bytes()
    files = {"data/test-00000-of-00001.parquet": one, "data/train-0.parquet": one}
    commit = hub.put("org/set", files, repo_type="dataset", tag="v1")
    data = load_data("hf-hub:org/set@v1", split="test")
    holds_the_pixels(data)
    assert commit in data.name
    hub.put(
        "org/set",
        {"data/test-00000-of-00001.parquet": parquet(tmp_path / "b.parquet", slice(0, 2)).read_bytes()},
        repo_type="dataset",
    )
    hub.requests.clear()
    again = load_data(f"hf-hub:org/set@{commit}", split="test")
    assert hub.requests == []
    assert again.fingerprint == data.fingerprint
    assert len(load_data("hf-hub:org/set", split="test")) == 2
    with pytest.raises(HubError, match="does not exist"):
        load_data("hf-hub:org/none")


def test_hub_data_set_piece_by_piece(hub: HubServer, tmp_path: Path) -> None:
    one, two = (parquet(tmp_path / f"{i}.parquet", rows).read_bytes() for i, rows in enumerate((slice(0, 4), slice(4, 7))))
    files = {"data/test-00000-of-00002.parquet": one, "data/test-00001-of-00002.parquet": two, "data/train-0.parquet": one}
    commit = hub.put("org/set", files, repo_type="dataset")
    data = load_data("hf-hub:org/set", split="test", stream=True)
    assert commit in data.name
    holds_the_pixels(data)
    assert not list((hub.folder / "cache").rglob("*.parquet"))  # no copy is kept
    assert data.fingerprint == load_data(f"hf-hub:org/set@{commit}", split="test").fingerprint
    with pytest.raises(InputError, match="several splits"):
        load_data("hf-hub:org/set", stream=True)
    with pytest.raises(InputError, match="Only Hub data sets"):
        load_data(tmp_path / "0.parquet", stream=True)


def test_a_stream_whose_hub_goes_away(hub: HubServer, tmp_path: Path) -> None:
    hub.put("org/set", {"test.parquet": parquet(tmp_path / "a.parquet").read_bytes()}, repo_type="dataset")
    data = load_data("hf-hub:org/set", stream=True)
    hub.fault("GET", r".*resolve.*", 403, times=None)
    with pytest.raises(HubError) as caught:
        data.image(6)
    assert caught.value.remedy


def test_reads_one_image_at_a_time() -> None:
    read: list[int] = []

    def fetch(i: int) -> np.ndarray:
        read.append(i)
        return PIXELS[i]

    data = ImageData(fetch, LABELS, fingerprint="x", name="probe")
    assert len(data.labels) == 7
    assert read == []
    data.batch([5, 2])
    assert read == [5, 2]
    data.subset(range(3, 5)).batch([1])
    assert read == [5, 2, 4]


def test_parquet_holds_one_row_group(tmp_path: Path) -> None:
    path = parquet(tmp_path / "one.parquet")
    tables = Tables(local_source([path], tmp_path, "one"))
    tables.value("img", 0)
    assert len(tables._held[1]) == 2


def test_fingerprints(tmp_path: Path) -> None:
    base = from_arrays(PIXELS, LABELS)
    assert base.fingerprint == from_arrays(torch.from_numpy(PIXELS), torch.from_numpy(LABELS)).fingerprint
    changed = PIXELS.copy()
    changed[3, 0, 0, 0] ^= 1
    labels = LABELS.copy()
    labels[0] = 0
    others = [
        from_arrays(changed, LABELS),
        from_arrays(PIXELS, labels),
        from_arrays(PIXELS),
        base.subset(range(6)),
        base.subset(range(1, 7)),
        from_arrays(PIXELS.astype(np.float32) / 255, LABELS),
    ]
    assert len({base.fingerprint, *(d.fingerprint for d in others)}) == 7
    path = parquet(tmp_path / "a.parquet")
    first = load_data(path).fingerprint
    assert load_data(path).fingerprint == first
    assert load_data(path, size=4).fingerprint != first
    parquet(path, slice(0, 6))
    assert load_data(path).fingerprint != first


def test_subset_keeps_ids() -> None:
    data = from_arrays(PIXELS, LABELS, ids=range(10, 17)).subset([4, 0])
    assert data.ids.tolist() == [14, 10]
    assert data.labels.tolist() == [1, 3]
    assert data.subset([1]).ids.tolist() == [10]
    with pytest.raises(InputError, match="outside"):
        data.subset([2])


def test_resize_and_crop(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name, shape in (("a", (40, 60)), ("b", (50, 30))):
        Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / "x" / f"{name}.png")
    with pytest.raises(InputError, match="differ in size"):
        load_data(tmp_path).tensors()
    images, _ = load_data(tmp_path, size=16).tensors()
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal((images * 255).round() / 255, images)


@pytest.mark.parametrize("shape", [(40, 60), (50, 30), (256, 256), (17, 23), (300, 451)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_the_fields_own(shape: tuple[int, int], channels: int) -> None:
    array = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(array if channels == 3 else array[..., 0])
    field = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])(image)
    pixels = torch.from_numpy(np.asarray(image).reshape(*shape, -1).transpose(2, 0, 1).copy()).float() / 255
    assert torch.equal((resize_centre(pixels, 224) * 255).round().to(torch.uint8), field)


def test_preprocessing_is_recorded(tmp_path: Path) -> None:
    path = parquet(tmp_path / "one.parquet")
    assert load_data(path).preprocessing is None
    described = load_data(path, size=4).preprocessing
    assert described is not None
    assert (described["resize"], described["crop"]) == (5, 4)


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (PIXELS.astype(np.float32), LABELS, "divide by 255"),
        (PIXELS.astype(np.int64), LABELS, "dtype"),
        (np.full((2, 3, 4, 4), np.nan, np.float32), [0, 1], "not numbers"),
        (np.full((2, 3, 4, 4), -0.1, np.float32), [0, 1], "normalises"),
        (PIXELS[0, 0], [0], "wrong shape"),
        (PIXELS[:, :2], LABELS, "wrong shape"),
        (PIXELS[:0], LABELS[:0], "wrong shape"),
        (PIXELS, LABELS[:-1], "differ in number"),
        (PIXELS, LABELS.astype(float), "class indices"),
        (PIXELS, np.eye(7, dtype=int), "argmax"),
    ],
)
def test_bad_arrays(images: object, labels: object, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        from_arrays(images, labels)
    assert caught.value.remedy


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No data there"):
        load_data(tmp_path / "none.npz")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="Unknown kind"):
        load_data(tmp_path / "a.txt")
    with pytest.raises(InputError, match="empty"):
        load_data(tmp_path)
    np.savez(tmp_path / "a.npz", pictures=PIXELS)
    with pytest.raises(InputError, match="no image column"):
        load_data(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="object arrays"):
        load_data(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(InputError, match="readable"):
        load_data(tmp_path / "c.npz")
    path = parquet(tmp_path / "d.parquet")
    with pytest.raises(InputError, match="label column"):
        load_data(path, label="klass")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="parquet"):
        load_data(path)
    pq.write_table(pa.table({"image": [b"not a picture"], "label": [0]}), path)
    with pytest.raises(InputError, match="not a readable image"):
        load_data(path)[0]
    pq.write_table(pa.table({"image": ["http://x"], "label": [0]}), path)
    with pytest.raises(InputError, match="no encoded image"):
        load_data(path)[0]
