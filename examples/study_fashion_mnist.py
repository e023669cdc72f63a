"""Study 1: how near one routed classifier comes to the best expert at every radius (Fashion-MNIST, bundled experts and router).

    python examples/study_fashion_mnist.py train --work WORK
    python examples/train_demo_router.py --network RUNS/NAME [...] --sigmas ... --n 100000 --out WORK/deferral
    python examples/study_fashion_mnist.py certify --work WORK --data DIR --first 2000 --images 2000 [--part 0/2]
    python examples/study_fashion_mnist.py table --work WORK --out model_cards/fashion-mnist-study [--published TABLES]

`train` trains the routers to compare with on the bundled images that no expert has seen: flat ones as in Dual RS and a cascade.
The router of interest is the one in WORK/deferral, whose networks and chain the study's README names; the bundled router, of the
same kind but smaller and chosen for fewer votes, stands beside it. `certify` certifies every method on test images, with shared
votes, resumable, in any number of processes (`--part`); DIR holds the four `*-ubyte.gz` files, without it the bundled 1,000 test
images are taken. `table` writes tables, figure and report over the shards that are finished; TABLES is a folder of published
tables of the whole test set (`idx label predict radius correct time`), whose envelope on the same images then stands beside.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from routing_study import (
    BEST,
    PUBLISHED,
    REFERENCE,
    Method,
    certify_all,
    command_line,
    methods,
    study_tables,
    train_all,
    write_study,
)
from torch import Tensor

from rsrouter.data import from_arrays
from rsrouter.demo import load_pool, load_router, load_slice
from rsrouter.results import read_table
from rsrouter.sampling import Execution
from rsrouter.training.deferral import DeferralRecipe

SEED = 20261122
RECIPE = DeferralRecipe(tune_copies=400)
#: The routers to compare with: trained here, and the one that ships with the package.
OTHERS, BUNDLED = ("flat", "own", "cascade"), "bundled router"


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


def every(work: Path, execution: Execution, part: str = "all", card: Path | None = None) -> dict[str, Method]:
    """All methods by name; the last is the router of interest."""
    found = methods(load_pool(), work, execution, part, card=card)
    chosen = found.pop(BEST, None)
    if part != "best":
        found[BUNDLED] = (load_router(execution), "tree")
    return found if chosen is None else found | {BEST: chosen}


def train(args: argparse.Namespace) -> None:
    unseen, validation = bundled("train"), bundled("validation")
    execution = Execution(dtype=args.dtype)
    train_all(load_pool(), args.work, unseen, unseen, validation, RECIPE, execution, args.only or OTHERS)


def certify(args: argparse.Namespace) -> None:
    if args.data is None:
        x, y = bundled("test")
        rows = slice(args.first, args.first + args.images)
        images, labels = (x[rows] * 255).round().to(torch.uint8).numpy(), y[rows].numpy()
    else:
        images, labels = read_idx(args.data, "t10k", slice(args.first, args.first + args.images))
    part = tuple(int(v) for v in args.part.split("/"))
    certify_all(
        every(args.work, Execution(dtype=args.dtype), args.methods, args.card),
        from_arrays(images, labels, name="Fashion-MNIST test set" + (f" from row {args.first}" if args.first else "")),
        args.work / "tables",
        seed=SEED,
        count=len(labels),
        part=(part[0], part[1]),
        n=args.n,
        kept=args.card and args.card / "tables",
    )


def table(args: argparse.Namespace) -> None:
    names = list(every(args.work, Execution(), card=args.card))
    tables = study_tables(names, args)
    published = []
    for path in sorted(args.published.glob("*.tsv")) if args.published else ():
        whole = read_table(path)
        published.append(whole.take(np.flatnonzero(np.isin(whole.idx, tables[BEST].idx + args.first))))
    write_study(tables, load_pool().names, (REFERENCE, PUBLISHED), BEST, args.out, "Fashion-MNIST", args.report, published)


def arguments(name: str, verb: argparse.ArgumentParser) -> None:
    if name != "table":
        verb.add_argument("--data", type=Path, default=None)
    if name == "certify":
        verb.add_argument("--images", type=int, default=1000)
    if name == "table":
        verb.add_argument("--published", type=Path, default=None)
    if name != "train":
        verb.add_argument("--first", type=int, default=0, help="first test row; other rows need a WORK of their own")


if __name__ == "__main__":
    command_line(__doc__, {"train": train, "certify": certify, "table": table}, arguments)
