"""Study 2: routing between three small CIFAR-10 experts of one's own (`train_cifar_experts.py`, `train_cifar_networks.py`).

    python examples/study_cifar10.py train --work WORK --experts EXPERTS --data DATA
    python examples/study_cifar10.py choose --work WORK --experts EXPERTS --data DATA --network RUNS/NAME [...] --sigmas ...
    python examples/study_cifar10.py certify --work WORK --experts EXPERTS --data DATA --first 1000 --images 1000 [--part 0/2]
    python examples/study_cifar10.py table --work WORK --experts EXPERTS --out model_cards/cifar10-study

EXPERTS is what `train_cifar_experts.py --out` wrote, DATA as there. `train` trains the routers to compare with: flat ones as in
Dual RS, on 4,000 training images that no expert has seen, and a cascade. `choose` chooses the router of interest over a network
of its own: who is asked, at which noise level, in which order and from which share of votes on. Every choice is made on 1,000
images from training row 48,000 on, and test images are only certified. `certify` is resumable and may run in several processes
(`--part`); `table` takes the shards that are finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from routing_study import (
    BEST,
    PUBLISHED,
    REFERENCE,
    N,
    certify_all,
    chain_arguments,
    choose_chain,
    command_line,
    methods,
    study_tables,
    train_all,
    write_study,
)
from torch import Tensor
from train_cifar_experts import read_cifar

from rsrouter import ExpertPool, load_expert
from rsrouter.data import from_arrays
from rsrouter.sampling import Execution
from rsrouter.training.deferral import DeferralRecipe
from rsrouter.training.heads import HeadRecipe

SEED = 20261130
SIGMAS = (0.25, 0.5, 1.0)
#: The cascade's; and how the heads are trained that `choose --heads` offers beside the networks.
RECIPE = DeferralRecipe(
    copies=4,
    tune_copies=400,
    levels=(1.07, 1.25),
    heads=tuple(HeadRecipe(steps=3000, cross_entropy=w) for w in (0.002, 0.005, 0.03)),
)
#: The routers to compare with.
OTHERS = ("flat", "own", "own-two", "cascade")


def load_pool(folder: Path) -> ExpertPool:
    return ExpertPool([load_expert(folder / f"sigma_{sigma:.2f}", name=f"sigma_{sigma:g}") for sigma in SIGMAS])


def part_of(data: str, name: str, count: int) -> tuple[Tensor, Tensor]:
    images, labels = read_cifar(data, name)
    return torch.from_numpy(np.ascontiguousarray(images[:count])).float().div_(255), torch.from_numpy(labels[:count])


def train(args: argparse.Namespace) -> None:
    unseen, validation = part_of(args.data, "train", 4000), part_of(args.data, "validation", 1000)
    execution = Execution(dtype=args.dtype)
    train_all(load_pool(args.experts), args.work, unseen, unseen, validation, RECIPE, execution, args.only or OTHERS)


def choose(args: argparse.Namespace) -> None:
    choose_chain(
        load_pool(args.experts),
        args.network,
        args.like,
        args.sigmas,
        part_of(args.data, "validation", args.images),
        args.work / BEST,
        heads=(RECIPE, part_of(args.data, "experts", 42_000)) if args.heads else None,
        copies=args.copies,
        sure_copies=args.sure_copies,
        stages=args.stages,
        confidences=args.confidences,
        plan_n=N,
        floor=args.floor,
        execution=Execution(dtype=args.dtype),
    )


def certify(args: argparse.Namespace) -> None:
    images, labels = read_cifar(args.data, "test")
    rows = slice(args.first, args.first + args.images)
    part = tuple(int(v) for v in args.part.split("/"))
    certify_all(
        methods(load_pool(args.experts), args.work, Execution(dtype=args.dtype), args.methods, card=args.card),
        from_arrays(np.ascontiguousarray(images[rows]), labels[rows], name=f"CIFAR-10 test set from row {args.first}"),
        args.work / "tables",
        seed=SEED,
        count=args.images,
        part=(part[0], part[1]),
        n=args.n,
        kept=args.card and args.card / "tables",
    )


def table(args: argparse.Namespace) -> None:
    pool = load_pool(args.experts)
    names = list(methods(pool, args.work, Execution(), card=args.card))
    tables = study_tables(names, args)
    write_study(tables, pool.names, (REFERENCE, PUBLISHED), BEST, args.out, "CIFAR-10", args.report)


def arguments(name: str, verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--experts", type=Path, required=True)
    if name != "table":
        verb.add_argument("--data", required=True)
    if name == "choose":
        chain_arguments(verb, "sigma_0.5")
        verb.add_argument("--heads", action="store_true", help="train heads on the experts' features, too")
    if name == "certify":
        verb.add_argument("--first", type=int, default=0, help="the first row of the test set")
        verb.add_argument("--images", type=int, default=1000)


if __name__ == "__main__":
    command_line(__doc__, {"train": train, "choose": choose, "certify": certify, "table": table}, arguments)
