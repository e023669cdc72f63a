"""Study 1: how near one routed classifier comes to the best expert at every radius (Fashion-MNIST, bundled experts).

    python examples/study_fashion_mnist.py train --work WORK [--data DIR]
    python examples/study_fashion_mnist.py certify --work WORK [--data DIR --images 2000] [--part 0/2]
    python examples/study_fashion_mnist.py table --work WORK --out model_cards/fashion-mnist-study

`train` trains every router and makes every choice on validation images that nothing was trained on: the bundled 1,000, and with
`--data DIR` (the four `*-ubyte.gz` files) 1,000 more for the deferral router. Its heads are trained on the bundled 6,000 images
that no expert has seen, and with `--data` also on the experts' own 52,000. `certify` certifies every method on test images, with
shared votes, resumable, in any number of processes (`--part`); without `--data` on the bundled 1,000. `table` writes tables,
figure and report.
`--dtype bfloat16` runs networks at twice the speed where the processor has it; the function certified is then the bfloat16 one.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from routing_study import BEST, PUBLISHED, REFERENCE, certify_all, command_line, merged, methods, train_all, write_study
from torch import Tensor

from rsrouter.data import from_arrays
from rsrouter.demo import load_pool, load_slice
from rsrouter.sampling import Execution
from rsrouter.training.deferral import DeferralRecipe
from rsrouter.training.heads import HeadRecipe

SEED = 20261122
TRAINING_ROWS = 58_000
RECIPE = DeferralRecipe(
    copies=8,
    tune_copies=600,
    levels=(1.15, 1.2),
    heads=tuple(
        HeadRecipe(steps=3000, hidden=56, **how)
        for how in ({"cross_entropy": 0.03}, {"cross_entropy": 0.1}, {"cross_entropy": 0.1, "tilt": 3.0}, {"cross_entropy": 0.2})
    ),
    grid=2,
)


def read_idx(folder: Path, split: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Images `(N, 1, 28, 28)` uint8 and labels `(N,)` of one split in the IDX format."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[rows]
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[rows]
    return images.copy(), labels.astype(np.int64)


def bundled(name: str) -> tuple[Tensor, Tensor]:
    data = load_slice(name)
    x, y = data.batch(range(len(data)))
    return x, torch.as_tensor(y)


def train(args: argparse.Namespace) -> None:
    unseen, validation = bundled("train"), bundled("validation")
    heads, chosen_on = unseen, validation
    if args.data is not None:
        images, labels = read_idx(args.data, "train", slice(None))
        pixels, classes = torch.from_numpy(images).float().div_(255), torch.from_numpy(labels)
        heads, chosen_on = (
            (pixels[:TRAINING_ROWS], classes[:TRAINING_ROWS]),
            (pixels[TRAINING_ROWS:], classes[TRAINING_ROWS:]),
        )
    train_all(load_pool(), args.work, unseen, heads, validation, RECIPE, Execution(dtype=args.dtype), args.only, chosen_on)


def certify(args: argparse.Namespace) -> None:
    if args.data is None:
        x, y = bundled("test")
        rows = slice(args.first, args.first + args.images)
        images, labels = (x[rows] * 255).round().to(torch.uint8).numpy(), y[rows].numpy()
    else:
        images, labels = read_idx(args.data, "t10k", slice(args.first, args.first + args.images))
    part = tuple(int(v) for v in args.part.split("/"))
    certify_all(
        methods(load_pool(), args.work, Execution(dtype=args.dtype), args.methods),
        from_arrays(images, labels, name="Fashion-MNIST test set" + (f" from row {args.first}" if args.first else "")),
        args.work / "tables",
        seed=SEED,
        count=len(labels),
        part=(part[0], part[1]),
    )


def table(args: argparse.Namespace) -> None:
    pool = load_pool()
    names = list(methods(pool, args.work, Execution()))
    tables = merged(names, args.work / "tables")
    write_study(tables, pool.names, (REFERENCE, PUBLISHED), BEST, args.out, "Fashion-MNIST", args.report)


def arguments(name: str, verb: argparse.ArgumentParser) -> None:
    if name != "table":
        verb.add_argument("--data", type=Path, default=None)
    if name == "certify":
        verb.add_argument("--images", type=int, default=1000)
        verb.add_argument("--first", type=int, default=0, help="first test row; other rows need a WORK of their own")


if __name__ == "__main__":
    command_line(__doc__, {"train": train, "certify": certify, "table": table}, arguments)
