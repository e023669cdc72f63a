"""Tables, shards, arrays and objects as people have them, each with the outcome it must have."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from rsrouter.data import load_data
from tests.helpers.odd_inputs import (
    RAMP,
    Case,
    Read,
    case,
    features,
    gray,
    idx,
    npz,
    one,
    pets,
    saved,
    shard,
    table,
    tree,
)

GRAY = np.full((2, 8, 8), 7, np.uint8)
LINES = '{"file_name": "a.png", "label": %s}\n{"file_name": "b.png", "label": %s}\n'
PAIR = {"a.png": gray(1), "b.png": gray(2)}


CAT_DOG = ("cat", "dog")

TABLES: dict[str, Case] = {
    # parquet and arrow
    "unknown label column": case(lambda p: table(p / "a.parquet", [gray()], character=[0]), "Received: img, character"),
    "unknown label column, named": case(lambda p: table(p / "a.parquet", [gray()], character=[4]), Read([4]), label="character"),
    "unknown label column, none wanted": case(
        lambda p: table(p / "a.parquet", [gray()], character=[0]), Read([-1]), label="none"
    ),
    "usual names": case(lambda p: table(p / "a.parquet", [gray()], Class=[4]), Read([4])),
    "only images": case(lambda p: table(p / "a.parquet", [gray()]), Read([-1])),
    "only images and paths": case(lambda p: table(p / "a.parquet", [gray()], path=["x"]), Read([-1])),
    "several label columns": case(
        lambda p: table(p / "a.parquet", [gray()], fine_label=[4], coarse_label=[1], label_id=[2]), Read([4], warns="label_id")
    ),
    "an image column by its type": case(
        lambda p: table(p / "a.parquet", None, scan=[{"bytes": gray(), "path": None}], label=[1]), Read([1], None, [7])
    ),
    "no image column": case(lambda p: table(p / "a.parquet", None, a=[1], label=[1]), "no image column"),
    "a label column that is not there": case(
        lambda p: table(p / "a.parquet", [gray()], label=[1]), "no label column 'klass'", label="klass"
    ),
    "an image column that is not there": case(
        lambda p: table(p / "a.parquet", [gray()], label=[1]), "no image column 'x'", image="x"
    ),
    "names of classes": case(lambda p: features(p / "a.parquet", ["dog", "cat"]), Read([0, 1], ("dog", "cat"))),
    "names of classes, by column type": case(
        lambda p: features(p / "a.parquet", ["dog", "cat"], "mood"), Read([0, 1], ("dog", "cat"))
    ),
    "names in the experts' order": case(
        lambda p: features(p / "a.parquet", ["dog", "cat"]), Read([1, 0], CAT_DOG), classes=["cat", "dog"]
    ),
    "names that the experts do not have": case(
        lambda p: features(p / "a.parquet", ["dog", "cat"]), "not given: cat", classes=["dog"]
    ),
    "too few names": case(lambda p: features(p / "a.parquet", ["dog"]), Read([0, 1], warns="has no name")),
    "labels as text": case(lambda p: table(p / "a.parquet", [gray(), gray()], label=["dog", "cat"]), Read([1, 0], CAT_DOG)),
    "labels as numbers in text": case(
        lambda p: table(p / "a.parquet", [gray(), gray()], label=["10", "2"]), Read([1, 0], warns="2 -> 0")
    ),
    "labels as a dictionary": case(
        lambda p: table(p / "a.parquet", [gray(), gray()], label=pa.array(["dog", "cat"]).dictionary_encode()),
        Read([1, 0], CAT_DOG),
    ),
    "truth values": case(lambda p: table(p / "a.parquet", [gray(), gray()], label=[True, False]), Read([1, 0])),
    "labels missing": case(lambda p: table(p / "a.parquet", [gray(), gray()], label=[1, None]), "1 missing values"),
    "labels -1": case(lambda p: table(p / "a.parquet", [gray()], label=[-1]), Read([-1])),
    "float labels": case(lambda p: table(p / "a.parquet", [gray()], label=[0.5]), "class indices"),
    "labels beyond int64": case(
        lambda p: table(p / "a.parquet", [gray()], label=pa.array([2**64 - 1], pa.uint64())), "class indices"
    ),
    "lists as labels": case(lambda p: table(p / "a.parquet", [gray()], label=[[1, 2]]), "missing or no names|class indices"),
    "a link as the image": case(
        lambda p: table(p / "a.parquet", None, image=[{"bytes": None, "path": "/etc/passwd"}], label=[0]),
        "row 0 of .*no encoded image",
    ),
    "no image in a row": case(
        lambda p: table(p / "a.parquet", None, image=pa.array([None], pa.binary()), label=[0]), "no encoded image"
    ),
    "garbage in a row": case(
        lambda p: table(p / "a.parquet", [gray(), b"x"], label=[0, 0]), r"row 1 of a\.parquet .*not a readable image"
    ),
    "not parquet": case(lambda p: one(p, b"PAR1", "a.parquet") / "a.parquet", "not readable parquet"),
    "no rows": case(
        lambda p: table(p / "a.parquet", None, img=pa.array([], pa.binary()), label=pa.array([], pa.int64())), "empty"
    ),
    "shards of different columns": case(
        lambda p: (table(p / "test-0.parquet", [gray()], label=[0]), table(p / "test-1.parquet", [gray()], y=[0]))[0].parent,
        "different columns",
    ),
    "shards of different labels": case(
        lambda p: (
            (table(p / "test-0.parquet", [gray()], label=[0]), table(p / "test-1.parquet", [gray()], label=["x"]))[0].parent
        ),
        "not all of one kind",
    ),
    "parquet and pictures": case(lambda p: table(pets(p) / "a.parquet", [gray()], label=[0]).parent, "several kinds"),
    "hidden parquet": case(
        lambda p: tree(table(p / "a.parquet", [gray(9)], label=[0]).parent, {"._a.parquet": b"x", ".cache/b.parquet": b"x"}),
        Read([0], None, [9]),
    ),
    "saved to disk": case(lambda p: saved(p / "s", ["dog", "cat"]), Read([0, 1], ("dog", "cat"), [0])),
    "saved splits": case(
        lambda p: tree(
            (saved(p / "s" / "train"), saved(p / "s" / "test"))[0].parent, {"dataset_dict.json": '{"splits": ["train", "test"]}'}
        ),
        Read([0, 1]),
        split="test",
    ),
    "saved splits, none named": case(
        lambda p: tree(
            (saved(p / "s" / "train"), saved(p / "s" / "test"))[0].parent, {"dataset_dict.json": '{"splits": ["train", "test"]}'}
        ),
        "several splits",
    ),
    "saved, pointing outside": case(lambda p: saved(p / "s", _data_files=[{"filename": "../x.arrow"}]), "not a saved data set"),
    "saved, odd state": case(lambda p: saved(p / "s", _data_files=7), "not a saved data set"),
    "saved, no JSON": case(lambda p: tree(p, {"state.json": "{"}), "not JSON"),
    "arrow with a name that is not UTF-8": case(
        lambda p: (
            one(p, (saved(p / "s") / "data-00000-of-00001.arrow").read_bytes().replace(b"bytes", b"by\xffes"), "x/a.arrow")
            / "x"
            / "a.arrow"
        ),
        "not readable arrow",
    ),
    "arrow that is none": case(lambda p: one(p, b"ARROW1", "a.arrow") / "a.arrow", "not readable arrow"),
    # shards
    "shards": case(
        lambda p: shard(p / "a.tar", {"0.png": gray(1), "0.cls": b"4\n", "1.png": gray(2), "1.cls": b"3"}),
        Read([4, 3], None, [1]),
    ),
    "shards with JSON": case(
        lambda p: shard(p / "a.tar", {"0.png": gray(1), "0.json": b'{"label": "cat"}'}), Read([0], ("cat",))
    ),
    "a shard's label missing": case(
        lambda p: shard(p / "a.tar", {"0.png": gray(1), "0.cls": b"4", "1.png": gray(2)}), "without a label"
    ),
    "a shard with a pipe": case(
        lambda p: shard(p / "a.tar", {"0.png": gray(1), "0.cls": b"4", "1.png": None}), Read([4], warns="pipes or devices")
    ),
    "a compressed shard": case(lambda p: shard(p / "a.tar", {"0.png": gray(1)}, "w:gz"), "not a readable tar"),
    "shards of two splits": case(
        lambda p: (shard(p / "train-000.tar", {"0.png": gray(1)}), shard(p / "val-000.tar", {"0.png": gray(2)}))[0].parent,
        "several splits",
    ),
    # npz and idx
    "labels as targets": case(lambda p: npz(p / "a.npz", images=GRAY, targets=[0, 1]), Read([0, 1], None, [7], (1, 8, 8))),
    "labels of a split": case(lambda p: npz(p / "a.npz", images=GRAY, y_test=[0, 1]), Read([0, 1])),
    "labels of an unknown name": case(lambda p: npz(p / "a.npz", images=GRAY, mood=[0, 1]), "images, mood"),
    "channels last": case(
        lambda p: npz(p / "a.npz", x=np.zeros((2, 8, 8, 3), np.uint8), Y=[0, 1]), Read([0, 1], None, [0], (3, 8, 8))
    ),
    "Keras's MNIST": case(
        lambda p: npz(p / "a.npz", x_train=GRAY, y_train=[0, 1], x_test=GRAY[:1], y_test=[1]), Read([1]), split="test"
    ),
    "Keras's MNIST, no split named": case(
        lambda p: npz(p / "a.npz", x_train=GRAY, y_train=[0, 1], x_test=GRAY[:1], y_test=[1]), "several splits"
    ),
    "MedMNIST": case(
        lambda p: npz(p / "a.npz", train_images=GRAY, train_labels=[[0], [1]], val_images=GRAY[:1], val_labels=[[1]]),
        Read([1]),
        split="validation",
    ),
    "a split of an npz without": case(lambda p: npz(p / "a.npz", images=GRAY, labels=[0, 1]), "no such split", split="test"),
    "one-hot labels": case(lambda p: npz(p / "a.npz", images=GRAY, labels=np.eye(2, dtype=int)), "argmax"),
    "text labels": case(lambda p: npz(p / "a.npz", images=GRAY, labels=["dog", "cat"]), Read([1, 0], CAT_DOG)),
    "a rounding error": case(
        lambda p: npz(p / "a.npz", images=np.full((1, 1, 8, 8), 1.0000002, np.float32), labels=[0]),
        Read([0], None, [255], warns="clipped"),
    ),
    "an overshoot": case(lambda p: npz(p / "a.npz", images=np.full((1, 1, 8, 8), 1.02, np.float32), labels=[0]), "clip them"),
    "floats to 255": case(lambda p: npz(p / "a.npz", images=GRAY.astype(float) * 30, labels=[0, 1]), "divide by 255"),
    "normalised pixels": case(lambda p: npz(p / "a.npz", images=GRAY.astype(float) - 8.5, labels=[0, 1]), "normalises"),
    "NaN": case(lambda p: npz(p / "a.npz", images=np.full((1, 1, 8, 8), np.nan), labels=[0]), "not numbers"),
    "16-bit arrays": case(lambda p: npz(p / "a.npz", images=RAMP[None], labels=[0]), ">> 8"),
    "truth values as pixels": case(lambda p: npz(p / "a.npz", images=GRAY[:1] > 0, labels=[0]), Read([0], None, [255])),
    "objects": case(lambda p: npz(p / "a.npz", images=np.array([{}], dtype=object)), "object arrays"),
    "one image": case(lambda p: npz(p / "a.npz", images=np.zeros((3, 8, 8), np.uint8)), "batch dimension"),
    "transparency in arrays": case(
        lambda p: npz(p / "a.npz", images=np.zeros((2, 8, 8, 4), np.uint8), labels=[0, 1]), "wrong shape"
    ),
    "not a zip": case(lambda p: one(p, b"PK", "a.npz") / "a.npz", "not a readable .npz"),
    "npy": case(lambda p: one(p, b"\x93NUMPY", "a.npy") / "a.npy", "numpy.savez"),
    "a pickle": case(lambda p: one(p, b"x", "data_batch_1.pkl") / "data_batch_1.pkl", "never loaded"),
    "idx": case(lambda p: idx(p / "m"), Read([0, 1], None, [0], (1, 8, 8))),
    "idx, packed": case(lambda p: idx(p / "m", packed=True), Read([0, 1])),
    "idx, two splits": case(lambda p: (idx(p / "m"), idx(p / "m", "t10k", 1))[0], Read([0]), split="test"),
    "idx, two splits, none named": case(lambda p: (idx(p / "m"), idx(p / "m", "t10k", 1))[0], "several splits"),
    "idx without labels": case(lambda p: idx(p / "m", labels=False), "no labels"),
    "idx cut short": case(lambda p: idx(p / "m", cut=5), "where the head announces"),
    "one picture": case(lambda p: one(p, gray(9)) / "x" / "a.png", Read([-1], None, [9])),
    # objects in memory
    "an array of NHWC": case(lambda p: np.zeros((2, 8, 8, 3), np.uint8), Read([-1, -1], None, [0], (3, 8, 8))),
    "images and labels": case(lambda p: (torch.zeros(2, 1, 8, 8), torch.tensor([1, 0])), Read([1, 0], None, [0])),
    "a PIL image": case(lambda p: Image.new("L", (8, 8), 9), Read([-1], None, [9], (1, 8, 8))),
    "PIL images": case(lambda p: [Image.new("L", (8, 8), 9), Image.new("RGB", (8, 8))], Read([-1, -1], None, [9], (3, 8, 8))),
    "PIL images and labels": case(lambda p: [(Image.new("L", (8, 8), 9), 4)], Read([4], None, [9])),
    "dictionaries": case(lambda p: [{"image": Image.new("L", (8, 8), 9), "label": "cat"}], Read([0], ("cat",), [9])),
    "arrays by name": case(lambda p: {"x": GRAY, "y": [1, 0]}, Read([1, 0], None, [7])),
    "a torch data set": case(
        lambda p: torch.utils.data.TensorDataset(torch.zeros(2, 1, 8, 8), torch.tensor([1, 0])), Read([1, 0], None, [0])
    ),
    "a loader": case(
        lambda p: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.zeros(3, 1, 8, 8), torch.tensor([1, 0, 2])), batch_size=2
        ),
        Read([1, 0, 2], None, [0]),
    ),
    "a loader that shuffles": case(
        lambda p: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(3, 1, 8, 8)), shuffle=True), "shuffles"
    ),
    "some labels": case(lambda p: [(GRAY[0], 1), (GRAY[0], None)], "Some items have labels"),
    "an iterator": case(lambda p: iter([1]), "cannot be read"),
    "nothing in memory": case(lambda p: [], "empty"),
    "None": case(lambda p: None, "cannot be read"),
    "a number": case(lambda p: 7, "cannot be read"),
    "a loaded data set, told again": case(lambda p: load_data(GRAY[:, None]), "loaded already", size=4),
}
