"""Study 2b: routing between experts that others published, known only by their certification tables (CIFAR-10).

    python examples/study_published_tables.py trunks --data DIR_OR_HUB_NAME --work WORK
    python examples/study_published_tables.py heads  --data DIR_OR_HUB_NAME --tables TABLES --work WORK
    python examples/study_published_tables.py votes  --data DIR_OR_HUB_NAME --tables TABLES --work WORK --images 1000
    python examples/study_published_tables.py table  --tables TABLES --work WORK --out model_cards/published-tables-study

TABLES holds `sigma_*.tsv` in the field's format (Salman et al. 2019 publish Cohen's ResNet-110 tables: all 10,000 test
images, n0 = 100, n = 100,000, alpha = 0.001). DATA is CIFAR-10 in the schema of the Hub's `uoft-cs/cifar10`. The rows of the
test split are dealt by `row % 10`: 0 to 5 train the router, 6 makes every choice, 7 to 9 are only evaluated.

`trunks` trains two small noisy classifiers on the *training* split (the router's frozen trunks, at sigma 1.0 and 0.5), `heads`
trains routing heads on them from the tables' radii and chooses among them on the validation rows, `votes` draws the router's
100 selection votes and 1,000 to 10,000 estimation votes on evaluation rows (resumable), `table` computes every method on
those votes.

Everything printed is an ESTIMATE OF ROUTING QUALITY, never a certificate: the tables saw the PNG images, the router here sees
a JPEG re-encoding of them; and the tables print radii rounded to the nearest of three digits.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from published_tables import (
    ALPHA,
    COARSE,
    COVERED,
    FINE,
    FLAT,
    LOOKS,
    N0,
    N,
    entries,
    estimate,
    flat_of,
    methods,
    read_tables,
    rows_of,
    sigma_of,
    table_paths,
    two_level,
    votes_that_pay,
    write,
)
from torch import Tensor, nn

from rsrouter.core.certify import VoteRequest
from rsrouter.core.tree import Tree
from rsrouter.experts import Expert, ExpertPool, build_architecture
from rsrouter.experts.identity import unique_digest
from rsrouter.report import curves
from rsrouter.results import Table
from rsrouter.router import FlatRouter, HeadedTrunk
from rsrouter.sampling import Engine, Execution, VoteModel, image_identity
from rsrouter.training import Labels, Training
from rsrouter.training.chains import Goal
from rsrouter.training.features import noisy_features
from rsrouter.training.flat import RECIPES, train_flat
from rsrouter.training.label_files import labels_from_tables
from rsrouter.training.simulated import SimulatedVotes

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
KWARGS = {"in_channels": 3, "width": 24, "blocks": [[48, 2], [64, 2], [96, 2]]}
TRAIN, VALIDATION, EVALUATION = tuple(range(6)), (6,), (7, 8, 9)
BLOCK = 10
GO_ON = "finer"
#: Recipe and consistency weight of candidate heads; shares of images that prefer another expert than the largest.
CANDIDATES = (("utility", 0.5), ("utility", 2.0), ("coverage", 0.5), ("coverage", 2.0))
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7)


# ---- data -----------------------------------------------------------------------------------------------------------


def read_images(data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `(N, 3, 32, 32)` uint8 and labels `(N,)` of a whole split."""
    from datasets import load_dataset

    table = load_dataset(data, split=split)
    images = np.stack([np.asarray(image.convert("RGB")) for image in table["img"]])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), np.asarray(table["label"], dtype=np.int64)


def as_pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).float().div_(255)


# ---- trunks: small noisy classifiers of our own, trained on the training split ---------------------------------------


def trunks(args: argparse.Namespace) -> None:
    from noise_training import fit, save_expert

    from rsrouter.experts.small_resnet import SmallResNet

    torch.set_num_threads(1)
    images, labels = read_images(args.data, "train")
    for sigma in (COARSE, FINE):
        folder = args.work / f"trunk_{sigma:.2f}"
        if (folder / "config.json").exists():
            continue
        torch.manual_seed(0)
        weights = fit(
            SmallResNet(10, **KWARGS),
            torch.from_numpy(images),
            torch.from_numpy(labels),
            sigma=sigma,
            weight=1.0,
            mean=MEAN,
            std=STD,
            folder=folder,
            epochs=args.epochs,
            shift=4,
            autocast=True,
        )
        save_expert(folder, weights, {"architecture": "small_resnet", "kwargs": KWARGS, "sigma": sigma, "num_classes": 10,
                                      "input_shape": [3, 32, 32], "mean": list(MEAN), "std": list(STD)})  # fmt: skip


# ---- heads: trained from the tables' radii, chosen on the validation rows --------------------------------------------


def stand_ins(names: Sequence[str], trunk: Expert) -> ExpertPool:
    """A pool with an expert of every name: training asks a pool for names and the trunk's network only."""
    shape, classes = trunk.input_shape, trunk.num_classes
    blank = [
        Expert(nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), classes)), sigma=sigma, num_classes=classes,
               input_shape=shape, name=name)
        for name, sigma in ((n, sigma_of(n) if n != GO_ON else FINE) for n in names)
    ]  # fmt: skip
    return ExpertPool([*blank, trunk])


def train_head(
    trunk: Expert,
    names: Sequence[str],
    train: tuple[Tensor, np.ndarray],
    validation: tuple[Tensor, np.ndarray],
    recipe: str,
    **settings: float,
) -> nn.Module:
    """A head on `trunk` that names one of `names`, from radii `(N, len(names))`; the package's own flat training."""
    pool = stand_ins(names, trunk)
    width = trunk.module.num_features + trunk.num_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = build_architecture("mlp_head", len(names), {"in_features": width})
    router = FlatRouter(head, sigma=trunk.sigma, experts=names, trunk=trunk.name)

    def labels(radius: np.ndarray) -> Labels:
        whole = np.zeros((len(radius), len(pool)))
        for k, name in enumerate(names):
            whole[:, pool.names.index(name)] = radius[:, k]
        return Labels(whole, np.zeros(whole.shape, dtype=np.int64))

    made = replace(RECIPES[recipe], redraw=12, radius_weight="none", **settings)  # as the committed table was made
    training = Training(pool, router, train[0], torch.zeros(len(train[0]), dtype=torch.int64), radii=COVERED.tolist())
    train_flat(training, router, made, labels(train[1]), (validation[0], labels(validation[1])))
    return router.module


@torch.inference_mode()
def shifted(head: nn.Module, largest: int, features: Tensor, share: float) -> nn.Module:
    """The head with one bias moved, so that `share` of the held-out images prefer another expert than the `largest`.

    Cross-entropy weighs images alike, coverage does not: the operating point is chosen on validation images.
    """
    logits = torch.stack([head(each.float()).mean(0) for each in features])
    others = logits.clone()
    others[:, largest] = -torch.inf
    margin = logits[:, largest] - others.max(1).values
    moved = build_architecture("mlp_head", head.layers[-1].out_features, {"in_features": head.layers[0].in_features})
    moved.load_state_dict(head.state_dict())
    with torch.no_grad():
        moved.layers[-1].bias[largest] -= margin.quantile(share)
    return moved.eval().requires_grad_(False)


@torch.inference_mode()
def head_votes(features: Tensor, head: nn.Module) -> np.ndarray:
    """`(N, L + 1)` votes of a head on cached features, none of them invalid."""
    size = head.layers[-1].out_features + 1
    return np.stack([np.bincount(head(each.float()).argmax(1).numpy(), minlength=size) for each in features])


def load_trunk(work: Path, sigma: float) -> Expert:
    from safetensors.torch import load_file

    folder = work / f"trunk_{sigma:.2f}"
    config = json.loads((folder / "config.json").read_text())
    module = build_architecture("small_resnet", 10, config["kwargs"])
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return Expert(module.eval(), sigma=sigma, num_classes=10, input_shape=(3, 32, 32), mean=MEAN, std=STD,
                  name=f"trunk_{sigma:.2f}")  # fmt: skip


def heads(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    paths = table_paths(args.tables)
    idx, _, labels = labels_from_tables(list(paths.values()))
    tables = read_tables(paths)
    images, _ = read_images(args.data, "test")
    parts = {name: rows_of(idx, part) for name, part in (("train", TRAIN), ("validation", VALIDATION))}
    pixels = {name: as_pixels(images[idx[rows]]) for name, rows in parts.items()}
    trunk = {sigma: load_trunk(args.work, sigma) for sigma in (COARSE, FINE)}
    chosen, log = choose(trunk, list(paths), pixels, {n: labels.radius[r] for n, r in parts.items()},
                         [t.take(parts["validation"]) for t in tables], args.copies,
                         load_heads(args.work) if args.keep else None)  # fmt: skip
    save_heads(args.work, chosen)
    (args.work / "choice.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log, indent=1))


def choose(
    trunk: Mapping[float, Expert],
    names: Sequence[str],
    pixels: Mapping[str, Tensor],
    radius: Mapping[str, np.ndarray],
    held_out: Sequence[Table],
    copies: int,
    kept: Mapping[str, nn.Module] | None = None,
) -> tuple[dict[str, nn.Module], dict[str, object]]:
    """Trains every candidate head and chooses, by simulated votes on validation rows, among them and their operating points.

    With `kept` heads nothing is trained: only their operating points are chosen.
    """
    features = {
        sigma: noisy_features([t], sigma, pixels["validation"], copies, seed=0, purpose="tune") for sigma, t in trunk.items()
    }
    fine = list(names[:-1])
    two = {part: np.stack([r[:, -1], r[:, :-1].max(1)], axis=1) for part, r in radius.items()}
    rng = np.random.default_rng(0)
    # coverage alone is won by always naming the largest expert: radii that few images reach weigh as much as small ones
    goal = Goal(tuple(COVERED.tolist()), curves.envelope(held_out, COVERED), floor=0.915, strictness=1.0)

    def make(sigma: float, over: Sequence[str], labels: Mapping[str, np.ndarray], recipe: str, **settings: float) -> nn.Module:
        return train_head(trunk[sigma], over, (pixels["train"], labels["train"]),
                          (pixels["validation"], labels["validation"]), recipe, **settings)  # fmt: skip

    def simulated(sigma: float, head: nn.Module) -> SimulatedVotes:
        return SimulatedVotes.draw(head_votes(features[sigma], head), sigma, N, N0, rng)

    def score(tree: Tree, votes: Mapping[str, SimulatedVotes]) -> float:
        found = estimate(tree, held_out, {s: v.selection for s, v in votes.items()}, {s: v.counts for s, v in votes.items()})
        return goal.score(curves.certified_accuracy(found, COVERED).accuracy)

    log: dict[str, object] = {}
    paper = make(COARSE, names, radius, "dual-rs-head") if kept is None else kept["flat-dual-rs"]
    log["flat-dual-rs"] = {"score": score(flat_of(names), {"router": simulated(COARSE, paper)})}
    jobs = {
        "flat": (COARSE, list(names), radius, len(names) - 1),
        "coarse": (COARSE, [names[-1], GO_ON], two, 0),
        "fine": (FINE, fine, {p: r[:, :-1] for p, r in radius.items()}, len(fine) - 1),
    }
    pools: dict[str, list[tuple[dict[str, object], nn.Module, SimulatedVotes]]] = {stage: [] for stage in jobs}
    for recipe, consistency in CANDIDATES if kept is None else (("kept", None),):
        for stage, (sigma, over, labels, largest) in jobs.items():
            if kept is None:
                head = make(sigma, over, labels, recipe, consistency=consistency)
            else:
                head = kept["flat-coverage" if stage == "flat" else stage]
            for share in SHARES:
                moved = shifted(head, largest, features[sigma], share)
                setting = {"recipe": recipe, "consistency": consistency, "not the largest": share}
                pools[stage].append((setting, moved, simulated(sigma, moved)))

    def best(stage: str, value: Callable[[SimulatedVotes], float]) -> tuple[float, dict[str, object], nn.Module, SimulatedVotes]:
        scored = [(value(votes), setting, head, votes) for setting, head, votes in pools[stage]]
        return max(scored, key=lambda entry: entry[0])

    value, setting, flat, _ = best("flat", lambda votes: score(flat_of(names), {"router": votes}))
    log["flat-coverage"] = {"score": value, **setting}
    # one stage after the other, twice: every pair would be as many evaluations squared
    tree, second = two_level(names), pools["fine"][0][2]
    for _ in range(2):
        _, upper, coarse, first = best("coarse", lambda votes: score(tree, {"coarse": votes, "fine": second}))  # noqa: B023
        value, lower, finer, second = best("fine", lambda votes: score(tree, {"coarse": first, "fine": votes}))  # noqa: B023
    log["two-level"] = {"score": value, "coarse": upper, "fine": lower}
    return {"flat-dual-rs": paper, "flat-coverage": flat, "coarse": coarse, "fine": finer}, log


def save_heads(work: Path, chosen: Mapping[str, nn.Module]) -> None:
    from safetensors.torch import save_file

    save_file({f"{n}.{k}": v.contiguous() for n, h in chosen.items() for k, v in h.state_dict().items()},
              work / "heads.safetensors")  # fmt: skip


def load_heads(work: Path) -> dict[str, nn.Module]:
    from safetensors.torch import load_file

    stored = load_file(work / "heads.safetensors")
    made = {}
    for name in dict.fromkeys(key.split(".")[0] for key in stored):
        state = {k.removeprefix(name + "."): v for k, v in stored.items() if k.startswith(name + ".")}
        outcomes, width = state["layers.2.weight"].shape[0], state["layers.0.weight"].shape[1]
        made[name] = build_architecture("mlp_head", outcomes, {"in_features": width})
        made[name].load_state_dict(state)
        made[name].eval().requires_grad_(False)
    return made


# ---- votes ----------------------------------------------------------------------------------------------------------


def vote_models(trunk: Mapping[float, Expert], made: Mapping[str, nn.Module]) -> list[VoteModel]:
    """Two networks: every head of one noise level votes in the same forward pass."""
    models = []
    for sigma, stages in ((COARSE, (*FLAT, "coarse")), (FINE, ("fine",))):
        parts = [made[s] for s in stages]
        digest = trunk[sigma].digest + "".join(s + unique_digest(p) for s, p in zip(stages, parts, strict=True))
        widths = tuple(p.layers[-1].out_features for p in parts)
        network = HeadedTrunk(trunk[sigma], parts, with_expert=False)
        models.append(VoteModel(f"level_{sigma:g}", network, sigma, stages, widths, digest))
    return models


def votes(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    paths = table_paths(args.tables)
    tables = read_tables(paths)
    images, _ = read_images(args.data, "test")
    rows = rows_of(tables[0].idx, EVALUATION)[: args.images]
    models = vote_models({sigma: load_trunk(args.work, sigma) for sigma in (COARSE, FINE)}, load_heads(args.work))
    engine = Engine(models, (3, 32, 32), seed=0, execution=Execution(dtype="bfloat16"))
    folder = args.work / "votes"
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(rows), BLOCK):
        target, block = folder / f"{start:05d}.npz", rows[start : start + BLOCK]
        if target.exists():
            continue
        began = time.time()
        held = [t.take(block) for t in tables]
        found = draw(engine, models, as_pixels(images[tables[0].idx[block]]), held)
        temporary = folder / f".{start:05d}.{os.getpid()}.npz"
        np.savez_compressed(temporary, idx=tables[0].idx[block], **found)
        os.replace(temporary, target)
        print(start, f"{time.time() - began:.1f} s", flush=True)


def draw(
    engine: Engine, models: Sequence[VoteModel], x: Tensor, held: Sequence[Table], n0: int = N0, looks: Sequence[int] = LOOKS
) -> dict[str, np.ndarray]:
    """`select/STAGE` and `estimate/STAGE` counts `(N, L + 1)`; the fine level is left out where it cannot matter.

    It cannot where the coarse stage names the largest expert and going on enters no closer than that expert holds:
    an unsampled stage contributes 0, so leaving it out is sound whatever the reason.
    """
    found: dict[str, np.ndarray] = {}
    identity = [image_identity(each) for each in x]

    def run(model: VoteModel, purpose: str, counts: np.ndarray) -> None:
        requests = [VoteRequest(i, model.name, purpose, 0, int(n)) for i, n in enumerate(counts) if n]
        drawn = engine.run(x, identity, requests) if requests else []
        for stage, width in zip(model.stages, model.widths, strict=True):
            whole = found.setdefault(f"{purpose}/{stage}", np.zeros((len(x), width + 1), dtype=np.int64))
            for r, c in zip(requests, drawn, strict=True):
                whole[r.image] = c[stage]

    for model in models:
        run(model, "select", np.full(len(x), n0))
    n = votes_that_pay(held, {key.removeprefix("select/"): v for key, v in found.items()}, looks)
    run(models[0], "estimate", n)
    stage = two_level([t.name for t in held]).stages["coarse"]
    reference = found["select/coarse"].argmax(1)
    entry = entries(stage, found["estimate/coarse"], reference, np.zeros(len(x), dtype=np.int64), ALPHA / 2)
    needed = (reference != 0) | (entry[:, 1] < held[-1].radius)
    run(models[1], "estimate", np.where(needed, n, 0))
    return found


# ---- the table ------------------------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    blocks = [dict(np.load(file)) for file in sorted((args.work / "votes").glob("[0-9]*.npz"))]
    found = {key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]}
    experts = [t.take(np.searchsorted(t.idx, found["idx"])) for t in read_tables(table_paths(args.tables))]
    print(write(args.out, experts, methods(experts, found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for run, options in ((trunks, "de"), (heads, "dtc"), (votes, "dti"), (table, "to")):
        one = verbs.add_parser(run.__name__)
        one.add_argument("--work", type=Path, required=True)
        if "d" in options:
            one.add_argument("--data", required=True, help="uoft-cs/cifar10, or a folder with its parquet files")
        if "t" in options:
            one.add_argument("--tables", type=Path, required=True, help="folder with sigma_*.tsv")
        if "e" in options:
            one.add_argument("--epochs", type=int, default=6)
        if "c" in options:
            one.add_argument("--copies", type=int, default=100, help="noisy copies of each validation image")
            one.add_argument("--keep", action="store_true", help="train no head again, only choose the operating points")
        if "i" in options:
            one.add_argument("--images", type=int, default=1000)
        if "o" in options:
            one.add_argument("--out", type=Path, required=True)
        one.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
