"""Loads stored experts and a stored timm router under the installed versions of torch and timm.

    python tests/experts/timm_versions.py write FOLDER     # with one version
    python tests/experts/timm_versions.py check FOLDER     # with another

`write` makes small random timm networks of several families, a pool of them and a flat and a deferral router over it. `check`
loads all of it, and the pools of the bundled model cards: every digest must be what it was, and every network must still give
its stored logits. Exit status 1 where something differs.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from rsrouter import RoutedSmooth
from rsrouter.experts import Expert, ExpertPool, build_architecture, load_expert, save_expert
from rsrouter.experts.pool import pool_from_dict
from rsrouter.router import DeferralRouter, FlatRouter, Voter

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
#: batch norm with an activation inside, layer norm, attention, windows, depthwise convolutions: each once
FAMILIES = {
    "regnetx_002": {},
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "convnext_atto": {"dims": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
    "efficientnet_lite0": {},
    "mixer_s32_224": {"img_size": 32},
}


def write(folder: Path) -> None:
    """Experts, pool and routers, with the digests that they have here."""
    experts = []
    for i, (name, kwargs) in enumerate(FAMILIES.items()):
        torch.manual_seed(i)
        module = build_architecture(name, 4, kwargs).eval()
        made = Expert(module, sigma=0.25 * (i + 1), num_classes=4, input_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
        experts.append(load_expert(save_expert(made, folder / "experts" / name), name=name))
    pool = ExpertPool(experts)
    pool.save(folder)
    torch.manual_seed(99)
    flat = FlatRouter(build_architecture("resnet10t", len(pool)).eval(), sigma=1.0)
    features = 4 + int(pool["resnet10t"].module.num_features)  # type: ignore[arg-type]
    head = build_architecture("residual_head", 4, {"in_features": features, "hidden": 4})
    deferral = DeferralRouter([Voter("resnet10t", sigma=0.5, head="h"), Voter("regnetx_002")], [0.6], {"h": head})
    told = {"versions": {n: version(n) for n in ("torch", "timm")}, "pool": pool.digest}
    for router in (flat, deferral):
        routed = RoutedSmooth(pool, router)
        routed.save_pretrained(folder / router.kind)
        told[router.kind] = {"router": router.digest, "votes": [m.digest for m in router.bind(pool).models]}
    (folder / "digests.json").write_text(json.dumps(told, indent=2) + "\n")


def check(folder: Path) -> list[str]:
    """What differs here; empty if nothing does."""
    told = json.loads((folder / "digests.json").read_text())
    pool = ExpertPool.load(folder)
    wrong = [] if pool.digest == told["pool"] else ["the pool's digest"]
    for kind in ("flat", "deferral"):
        routed = RoutedSmooth.from_pretrained(folder / kind)
        here = {"router": routed.router.digest, "votes": [m.digest for m in routed.router.bind(routed.pool).models]}
        wrong += [f"{kind}: {key}" for key in here if here[key] != told[kind][key]]
    for config in sorted(CARDS.glob("*/config.json")):
        pool_from_dict(json.loads(config.read_text())["pool"], config.parent)
    return wrong


if __name__ == "__main__":
    action, where = sys.argv[1], Path(sys.argv[2])
    if action == "write":
        where.mkdir(parents=True, exist_ok=True)
        write(where)
    else:
        differences = check(where)
        print(f"timm {version('timm')}, torch {version('torch')}: {', '.join(differences) or 'every digest and logit as stored'}")
        sys.exit(bool(differences))
