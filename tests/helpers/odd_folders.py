"""Folders and pictures as people have them, each with the outcome it must have."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from tests.helpers.odd_inputs import (
    RAMP,
    Case,
    Read,
    case,
    colour,
    deep_colour,
    encoded,
    gray,
    one,
    pets,
    pipe,
    rotated,
    table,
    tree,
)

GRAY = np.full((2, 8, 8), 7, np.uint8)
LINES = '{"file_name": "a.png", "label": %s}\n{"file_name": "b.png", "label": %s}\n'
PAIR = {"a.png": gray(1), "b.png": gray(2)}


CAT_DOG = ("cat", "dog")
BOTH = Read([0, 1], CAT_DOG, [1])

FOLDERS: dict[str, Case] = {
    # folders beside the classes, and files beside the pictures
    "two classes": case(pets, BOTH),
    "a notebook's checkpoints": case(lambda p: pets(p, _dot_ipynb_checkpoints=None), BOTH),
    "checkpoints with pictures in them": case(lambda p: tree(pets(p), {".ipynb_checkpoints/a.png": gray(9)}), BOTH),
    "git": case(lambda p: tree(pets(p), {".git/HEAD": "x", ".git/a.png": gray(9)}), BOTH),
    "a Mac's archive": case(lambda p: tree(pets(p), {"__MACOSX/cat/._a.png": b"\0\5\x16\7", ".DS_Store": b"x"}), BOTH),
    "resource forks beside pictures": case(lambda p: tree(pets(p), {"cat/._a.png": b"\0\5\x16\7"}), BOTH),
    "thumbnails of Windows": case(lambda p: tree(pets(p), {"cat/Thumbs.db": b"x", "desktop.ini": "x"}), BOTH),
    "a NAS's folders": case(lambda p: tree(pets(p), {"@eaDir/a.png": gray(9), "#recycle/a.png": gray(9)}), BOTH),
    "an empty folder": case(lambda p: pets(p, bird=None), "without pictures"),
    "a folder of text": case(lambda p: tree(pets(p), {"annotations/cat.xml": "<x/>"}), "without pictures"),
    "an empty folder, classes given": case(lambda p: pets(p, bird=None), BOTH, classes=["cat", "dog"]),
    "an empty class, classes given": case(
        lambda p: pets(p, bird=None), Read([1, 2], ("bird", "cat", "dog")), classes=["bird", "cat", "dog"]
    ),
    "classes in the experts' order": case(pets, Read([0, 1], ("dog", "cat"), [2]), classes=["dog", "cat"]),
    "a class that is not there": case(pets, "no folder for a class", classes=["cat", "wolf"]),
    "a class twice": case(pets, "do not fit", classes=["cat", "cat"]),
    "classes as text": case(pets, "Class names must be a list of text", classes="cat"),
    "one of the classes": case(pets, Read([0], ("dog",), [2], warns="not asked for"), classes=["dog"]),
    "a note among pictures": case(lambda p: tree(pets(p), {"cat/notes.txt": "x"}), Read([0, 1], CAT_DOG, warns=r"notes\.txt")),
    "a picture beside the classes": case(
        lambda p: tree(pets(p), {"a.png": gray(9)}), Read([0, 1], CAT_DOG, warns="beside the class")
    ),
    "formats that are not read": case(lambda p: tree(pets(p), {"cat/b.eps": "%!PS"}), Read([0, 1], CAT_DOG, warns="not read")),
    "a folder of folders": case(lambda p: pets(p / "inner").parent, "one folder of folders"),
    "nested pictures": case(lambda p: tree(pets(p), {"cat/b/c.png": gray(3)}), Read([0, 0, 1], CAT_DOG)),
    "no class folders": case(lambda p: tree(p, PAIR), Read([-1, -1], None, [1], warns="without labels")),
    "no class folders, said": case(lambda p: tree(p, PAIR), Read([-1, -1]), label="none"),
    "an empty data set": case(lambda p: tree(p, {"x": None}), "empty"),
    "nothing at all": case(lambda p: p / "none", "No data there"),
    "a path with a NUL": case(lambda p: "a\0b", "No data there"),
    "a path too long": case(lambda p: "a" * 5000, "No data there"),
    "no such home": case(lambda p: "~nobody-of-that-name/x", "No data there"),
    "a pipe as a class's picture": case(lambda p: pipe(p, "cat/b.png"), Read([0, 1], CAT_DOG, warns="pipes or devices")),
    "a pipe as the data": case(lambda p: pipe(p, "x.npz") / "x.npz", "never opened"),
    "a pipe as parquet": case(lambda p: pipe(p, "x.parquet") / "x.parquet", "never opened"),
    "a device": case(lambda p: "/dev/zero", "never opened"),
    "a link to a device": case(
        lambda p: (pets(p), (p / "cat" / "b.png").symlink_to("/dev/zero"))[0], Read([0, 1], CAT_DOG, warns="pipes or devices")
    ),
    "a link to nothing": case(lambda p: (pets(p), (p / "cat" / "b.png").symlink_to("gone"))[0], r"cat/b\.png cannot be read"),
    "links in a circle": case(lambda p: (pets(p), (p / "cat" / "up").symlink_to(p))[0], BOTH),
    "a linked class": case(
        lambda p: (pets(p / "a"), tree(p / "b", {"cat/a.png": gray(1)}), (p / "b" / "dog").symlink_to(p / "a" / "dog"))[1], BOTH
    ),
    "a name that is not UTF-8": case(
        lambda p: (
            os.makedirs(os.fsencode(p) + b"/d\xffg"),
            tree(p, {"cat/a.png": gray(1), os.fsdecode(b"d\xffg/a.png"): gray(2)}),
        )[1],
        Read([0, 1], ("cat", r"d\udcffg")),
    ),
    "a name with a terminal escape": case(
        lambda p: tree(p, {"a\x1b[31m/a.png": gray(1), "b/a.png": gray(2)}), Read([0, 1], (r"a\x1b[31m", "b"))
    ),
    # numbers as names
    "numbers from 0": case(lambda p: tree(p, {f"{k}/a.png": gray(k) for k in range(12)}), Read([*range(12)], warns="10 -> 10")),
    "numbers from 0 to 9": case(lambda p: tree(p, {f"{k}/a.png": gray(k) for k in range(10)}), Read([*range(10)])),
    "numbers, one of them empty": case(
        lambda p: tree(p, {"0/a.png": gray(0), "1": None, "2/a.png": gray(2)}), Read([0, 2], ("0", "1", "2"), [0])
    ),
    "numbers with noughts": case(lambda p: tree(p, {f"{k:03}/a.png": gray(k) for k in range(12)}), Read([*range(12)])),
    "numbers with a gap": case(
        lambda p: tree(p, {f"{k}/a.png": gray(k) for k in (0, 1, 3)}), Read([0, 1, 3], warns="no class 2")
    ),
    "numbers from 1": case(lambda p: tree(p, {f"{k}/a.png": gray(k) for k in (1, 2, 10)}), Read([0, 1, 2], warns="10 -> 2")),
    "names with numbers": case(
        lambda p: tree(p, {f"c{k}/a.png": gray(k) for k in (1, 2, 10)}),
        Read([0, 1, 2], ("c1", "c10", "c2"), warns="alphabetical"),
    ),
    # splits
    "splits, none named": case(lambda p: (pets(p / "train"), pets(p / "test"))[0].parent, "several splits"),
    "splits, one named": case(
        lambda p: (pets(p / "train"), tree(p, {"test/dog/a.png": gray(9)}))[1], Read([1], CAT_DOG, [9]), split="test"
    ),
    "a synonym": case(lambda p: (pets(p / "train"), pets(p / "val"))[0].parent, BOTH, split="validation"),
    "no such split": case(lambda p: pets(p / "train").parent, "no such split", split="test"),
    "a split of a folder without": case(pets, "no such split", split="test"),
    "splits beside other folders": case(
        lambda p: tree(pets(p / "train").parent, {"extra/x/a.png": gray(9)}), "splits and others"
    ),
    "a class called train": case(
        lambda p: tree(p, {"car/a.png": gray(1), "train/a.png": gray(2)}), Read([0, 1], ("car", "train"))
    ),
    # metadata files
    "metadata": case(lambda p: tree(p, {**PAIR, "metadata.jsonl": LINES % (1, 0)}), Read([1, 0], None, [1])),
    "metadata with names": case(lambda p: tree(p, {**PAIR, "metadata.jsonl": LINES % ('"dog"', '"cat"')}), Read([1, 0], CAT_DOG)),
    "metadata as CSV": case(
        lambda p: tree(p, {**PAIR, "metadata.csv": "\ufefffile_name,label\na.png,1\nb.png,0\n"}), Read([1, 0])
    ),
    "metadata without labels": case(
        lambda p: tree(p, {**PAIR, "metadata.jsonl": '{"file_name": "a.png"}'}), Read([-1], warns="metadata file")
    ),
    "metadata, unknown column": case(
        lambda p: tree(p, {**PAIR, "metadata.jsonl": (LINES % (1, 0)).replace("label", "mood")}), "no label column"
    ),
    "metadata, a missing picture": case(lambda p: tree(p, {"a.png": gray(), "metadata.jsonl": LINES % (1, 0)}), "not there"),
    "metadata that points outside": case(
        lambda p: (
            tree(p, {"x.png": gray(), "d/a.png": gray(), "d/metadata.jsonl": '{"file_name": "../x.png", "label": 0}'}) / "d"
        ),
        "not there",
    ),
    "metadata, no JSON": case(lambda p: tree(p, {**PAIR, "metadata.jsonl": "{"}), "not JSON"),
    "metadata, deep": case(lambda p: tree(p, {**PAIR, "metadata.jsonl": "[" * 100_000}), "nested too deep|not JSON"),
    "metadata, a list": case(lambda p: tree(p, {**PAIR, "metadata.jsonl": "[1]"}), "not a list of pictures"),
    "metadata, a label missing": case(lambda p: tree(p, {**PAIR, "metadata.jsonl": LINES % (1, "null")}), "missing"),
    "metadata, CSV with cells too many": case(
        lambda p: tree(p, {**PAIR, "metadata.csv": "file_name,label\na.png,1,2\n"}), "is not a table"
    ),
    "metadata, not UTF-8": case(lambda p: tree(p, {**PAIR, "metadata.csv": b"file_name,label\n\xff,1\n"}), "not CSV"),
    # pictures
    "16-bit gray": case(lambda p: one(p, encoded(RAMP)), Read([0], ("x",), [0, 4, 8, 12], (1, 8, 8), "high byte")),
    "16-bit TIFF": case(lambda p: one(p, encoded(RAMP, "TIFF"), "x/a.tif"), Read([0], ("x",), [0, 4, 8], warns="high byte")),
    "16-bit PGM": case(
        lambda p: one(p, b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes(), "x/a.pgm"),
        Read([0], ("x",), [0, 4, 8], warns="high byte"),
    ),
    "10-bit PGM": case(
        lambda p: one(p, b"P5 8 8 1023\n" + (RAMP >> 6).astype(">u2").tobytes(), "x/a.pgm"),
        Read([0], ("x",), [0, 4, 8], warns="high byte"),
    ),
    "16-bit colour": case(lambda p: one(p, deep_colour()), Read([0], ("x",), [0, 11, 23], (3, 8, 8))),
    "16-bit in parquet": case(
        lambda p: table(p / "a.parquet", [encoded(RAMP)], label=[3]), Read([3], None, [0, 4], warns="high byte")
    ),
    "32-bit TIFF": case(lambda p: one(p, encoded(RAMP.astype(np.int32), "TIFF"), "x/a.tif"), "white is not known"),
    "float TIFF": case(
        lambda p: one(p, encoded((RAMP / np.float32(64512)).astype(np.float32), "TIFF"), "x/a.tif"), Read([0], ("x",), [0, 4, 8])
    ),
    "float TIFF up to 255": case(lambda p: one(p, encoded(RAMP.astype(np.float32), "TIFF"), "x/a.tif"), "floats outside"),
    "1-bit PNG": case(lambda p: one(p, encoded(RAMP > 2000)), Read([0], ("x",), [0, 0, 255], (1, 8, 8))),
    "1-bit PBM": case(lambda p: one(p, b"P1\n2 1\n0 1\n", "x/a.pbm"), Read([0], ("x",), [255, 0])),
    "CMYK": case(
        lambda p: one(p, encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), "x/a.tif"),
        Read([0], ("x",), [255], (3, 8, 8)),
    ),
    "palette": case(
        lambda p: one(p, encoded(Image.new("RGB", (8, 8), (9, 8, 7)).quantize(4))), Read([0], ("x",), [9], (3, 8, 8))
    ),
    "palette of grays": case(lambda p: one(p, gray(77, "GIF"), "x/a.gif"), Read([0], ("x",), [77], (1, 8, 8))),
    "transparency": case(lambda p: one(p, encoded(Image.new("RGBA", (8, 8), (9, 8, 7, 0)))), Read([0], ("x",), [9], (3, 8, 8))),
    "transparent gray": case(lambda p: one(p, encoded(Image.new("LA", (8, 8), (9, 0)))), Read([0], ("x",), [9], (1, 8, 8))),
    "LAB": case(lambda p: one(p, encoded(Image.new("LAB", (8, 8)), "TIFF"), "x/a.tif"), Read([0], ("x",), [0], (3, 8, 8))),
    "rotated": case(lambda p: one(p, rotated()), Read([0], ("x",), [0, 0, 0, 0, 255, 255, 255, 255], (3, 8, 8))),
    "rotated in parquet": case(
        lambda p: table(p / "a.parquet", [rotated()], label=[0]), Read([0], None, [0, 0, 0, 0, 255, 255, 255, 255])
    ),
    "not rotated": case(lambda p: one(p, rotated(1)), Read([0], ("x",), [255] * 8)),
    "several frames": case(
        lambda p: one(
            p, encoded(Image.new("L", (8, 8), 5), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)]), "x/a.gif"
        ),
        Read([0], ("x",), [5], warns="the first is taken"),
    ),
    "every suffix": case(
        lambda p: tree(
            p,
            {
                "x/0.tif": gray(0, "TIFF"),
                "x/1.gif": gray(1, "GIF"),
                "x/2.bmp": gray(2, "BMP"),
                "x/3.TGA": gray(3, "TGA"),
                "x/4.pgm": gray(4, "PPM"),
                "x/5.jfif": gray(5, "JPEG"),
                "x/6.JPEG": gray(6, "JPEG"),
                "x/7.png": gray(7),
            },
        ),
        Read([0] * 8, ("x",), [0]),
    ),
    "WebP, AVIF, JPEG 2000": case(
        lambda p: tree(p, {"x/0.webp": colour(9, "WEBP"), "x/1.avif": colour(9, "AVIF"), "x/2.jp2": colour(9, "JPEG2000")}),
        Read([0] * 3, ("x",), shape=(3, 8, 8)),
    ),
    "a gray picture among colour ones": case(
        lambda p: tree(p, {"x/0.png": gray(3), "x/1.png": colour()}), Read([0, 0], ("x",), [3], (3, 8, 8))
    ),
    "colour among many gray ones": case(
        lambda p: tree(p, {**{f"x/{k:02}.png": gray(3) for k in range(40)}, "x/01x.png": colour()}), "in colour"
    ),
    "all as gray": case(
        lambda p: tree(p, {"x/0.png": gray(3), "x/1.png": colour()}), Read([0, 0], ("x",), [3], (1, 8, 8)), channels=1
    ),
    "all as colour": case(lambda p: one(p, gray(3)), Read([0], ("x",), [3], (3, 8, 8)), channels=3),
    "channels that cannot be": case(pets, "number of channels cannot be used", channels=2),
    "a size that cannot be": case(pets, "size cannot be used", size=0),
    "several sizes": case(
        lambda p: tree(p, {"x/0.png": gray(), "x/1.png": encoded(np.zeros((9, 8), np.uint8))}), "differ in size"
    ),
    "truncated": case(
        lambda p: one(p, encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")[:2000]), "truncated"
    ),
    "an empty file": case(lambda p: tree(pets(p), {"dog/b.png": b""}), r"dog/b\.png is not a readable image.*empty file"),
    "text": case(lambda p: tree(pets(p), {"dog/b.png": "hello"}), "no format that is known"),
    "an LFS pointer": case(lambda p: tree(pets(p), {"dog/b.png": "version https://git-lfs.github.com/spec/v1\n"}), "LFS pointer"),
    "a web page": case(lambda p: tree(pets(p), {"dog/b.png": "<!DOCTYPE html><html>"}), "web page"),
    "PostScript called PNG": case(
        lambda p: tree(pets(p), {"dog/b.png": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}), "PostScript"
    ),
    "PostScript in parquet": case(lambda p: table(p / "a.parquet", [b"%!PS-Adobe-3.0 EPSF-3.0\n"], label=[0]), "PostScript"),
    "a bomb": case(lambda p: one(p, b"P5 20000 20000 255\n"), "not a readable image.*Bomb"),
    "one unreadable, skipped": case(
        lambda p: tree(pets(p), {"cat/b.png": b""}), Read([0, 1], CAT_DOG, [1], warns=r"1 unreadable of 3"), skip_unreadable=True
    ),
    "none readable, skipped": case(lambda p: one(p, b""), "No image of", skip_unreadable=True),
}
