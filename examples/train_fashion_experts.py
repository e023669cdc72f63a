"""Train Fashion-MNIST experts by the methods that lead at some radius: one recipe each, resumable at any moment.

    python examples/train_fashion_experts.py train --data DIR --out RUNS --name NAME --recipe cat-rs --sigma 0.5
    python examples/train_fashion_experts.py queue --data DIR --out RUNS --jobs JOBS.json
    python examples/train_fashion_experts.py export --out RUNS --to EXPERTS NAME[=FOLDER] [NAME[=FOLDER] ...]
    python examples/train_fashion_experts.py slices --data DIR --to IMAGES

DIR holds the four `*-ubyte.gz` files of Fashion-MNIST (Xiao et al. 2017, MIT licence); Debian's package
`dataset-fashion-mnist` puts them under `/usr/share/datasets/fashion-mnist`. JOBS.json is a list of objects, each the
fields of `Settings`; several processes may work on one queue, and the file is read again before each job.

    official train rows      0 .. 51,999   the experts' training images
    official train rows 52,000 .. 57,999   the slice `train` of the bundled images; not read in training
    official train rows 58,000 .. 58,999   the slice `validation`, on which routers are chosen; not read in training
    official train rows 59,000 .. 59,999   every choice here (best state, settings, which expert) is made on these
    official test rows       0 .. 999      the slice `test`

Recipes and how a run goes on: `expert_training.py`.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expert_training import Task, command_line
from torch import Tensor

EXPERT_ROWS, CHOICE_ROWS = slice(0, 52_000), slice(59_000, 60_000)
#: The images that ship with the package.
SLICES = {
    "train": ("train", slice(52_000, 58_000)),
    "validation": ("train", slice(58_000, 59_000)),
    "test": ("t10k", slice(0, 1_000)),
}


def read_idx(folder: Path, split: str, rows: slice) -> tuple[Tensor, Tensor]:
    """Images `(N, 1, 28, 28)` float32 in [0,1] and labels `(N,)` of rows of one split in the IDX format."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(images[rows].copy()).float().div_(255), torch.from_numpy(labels[rows].astype(np.int64))


def read(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and those on which the best state is chosen."""
    return *read_idx(Path(folder), "train", EXPERT_ROWS), *read_idx(Path(folder), "train", CHOICE_ROWS)


TASK = Task("Fashion-MNIST, official training rows 0 to 51,999", (1, 28, 28), (0.286,), (0.353,), read, {"licence": "Apache-2.0"})


def slices(args: argparse.Namespace) -> None:
    """Cuts the images that ship with the package."""
    args.to.mkdir(parents=True, exist_ok=True)
    for name, (split, rows) in SLICES.items():
        x, y = read_idx(args.data, split, rows)
        images = (x * 255).round().to(torch.uint8).numpy()
        np.savez_compressed(args.to / f"{name}.npz", images=images, labels=y.numpy(), index=np.arange(rows.start, rows.stop))
        print(name, images.shape, f"{(args.to / f'{name}.npz').stat().st_size / 1e6:.2f} MB")


def add_slices(verbs: Any) -> None:
    verb = verbs.add_parser("slices", help="cut the images that ship with the package")
    verb.add_argument("--data", type=Path, required=True)
    verb.add_argument("--to", type=Path, required=True)
    verb.set_defaults(run=slices)


def main(argv: list[str] | None = None) -> None:
    command_line(TASK, __doc__, argv, add_slices)


if __name__ == "__main__":
    main()
