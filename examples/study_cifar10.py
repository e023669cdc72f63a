"""Study 2: routing between three small CIFAR-10 experts of one's own (`train_cifar_experts.py`).

    python examples/study_cifar10.py train --work WORK --experts EXPERTS --data DATA
    python examples/study_cifar10.py certify --work WORK --experts EXPERTS --data DATA --images 500 [--part 0/2]
    python examples/study_cifar10.py table --work WORK --experts EXPERTS --out model_cards/cifar10-study

EXPERTS is what `train_cifar_experts.py --out` wrote, DATA as there. Heads are trained on training rows 0 to 47,999 (the experts'
own 42,000 and 6,000 that they have not seen), the flat router on 4,000 of the latter, every choice is made on 1,000 images
from row 48,000 on, and test images are only certified. `certify` is resumable and may run in several processes (`--part`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from routing_study import BEST, HEADS, PUBLISHED, REFERENCE, certify_all, command_line, merged, methods, train_all, write_study
from torch import Tensor
from train_cifar_experts import read_cifar

from rsrouter import ExpertPool, load_expert
from rsrouter.data import from_arrays
from rsrouter.sampling import Execution
from rsrouter.training.deferral import DeferralRecipe
from rsrouter.training.heads import HeadRecipe

SEED = 20261123
SIGMAS = (0.25, 0.5, 1.0)
RECIPE = DeferralRecipe(
    copies=6,
    tune_copies=400,
    levels=(1.07, 1.15, 1.25),
    heads=(
        *HEADS,
        HeadRecipe(steps=3000, cross_entropy=0.005),
        HeadRecipe(steps=3000, cross_entropy=0.002),
        HeadRecipe("consistency", steps=3000, consistency=10.0),
        HeadRecipe("consistency", steps=3000, consistency=20.0),
    ),
)


def load_pool(folder: Path) -> ExpertPool:
    return ExpertPool([load_expert(folder / f"sigma_{sigma:.2f}", name=f"sigma_{sigma:g}") for sigma in SIGMAS])


def part_of(data: str, *names: str) -> tuple[Tensor, Tensor]:
    parts = [read_cifar(data, name) for name in names]
    images = np.ascontiguousarray(np.concatenate([p[0] for p in parts]))
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(np.concatenate([p[1] for p in parts]))


def train(args: argparse.Namespace) -> None:
    unseen, heads, validation = (part_of(args.data, *names) for names in (("train",), ("experts", "train"), ("validation",)))
    unseen, validation = (unseen[0][:4000], unseen[1][:4000]), (validation[0][:1000], validation[1][:1000])
    train_all(load_pool(args.experts), args.work, unseen, heads, validation, RECIPE, Execution(dtype=args.dtype), args.only,
              floor=0.0)  # fmt: skip


def certify(args: argparse.Namespace) -> None:
    images, labels = read_cifar(args.data, "test")
    part = tuple(int(v) for v in args.part.split("/"))
    certify_all(
        methods(load_pool(args.experts), args.work, Execution(dtype=args.dtype), args.methods),
        from_arrays(np.ascontiguousarray(images[: args.images]), labels[: args.images], name="CIFAR-10 test set"),
        args.work / "tables",
        seed=SEED,
        count=args.images,
        part=(part[0], part[1]),
        n=args.n,
    )


def table(args: argparse.Namespace) -> None:
    pool = load_pool(args.experts)
    tables = merged(list(methods(pool, args.work, Execution())), args.work / "tables")
    write_study(tables, pool.names, (REFERENCE, PUBLISHED), BEST, args.out, "CIFAR-10", args.report)


def arguments(name: str, verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--experts", type=Path, required=True)
    if name != "table":
        verb.add_argument("--data", required=True)
    if name == "certify":
        verb.add_argument("--images", type=int, default=500)


if __name__ == "__main__":
    command_line(__doc__, {"train": train, "certify": certify, "table": table}, arguments)
