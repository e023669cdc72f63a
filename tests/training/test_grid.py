"""Heads that read feature maps by cell: what they see, that the file keeps it, and that nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_training import CLASSES, pool
from torch import nn

from rsrouter import Expert, ExpertPool, FixedPlan, InputError, RoutedSmooth, load_expert
from rsrouter.core.terms import Terms
from rsrouter.demo import load_slice
from rsrouter.experts import build_architecture
from rsrouter.experts.preprocessing import Normalise
from rsrouter.router import DeferralRouter, Voter
from rsrouter.router.trunk import ResidualHead, Trunk, has_grid
from rsrouter.sampling.execution import Execution, prepare
from rsrouter.training import DEFERRAL_RECIPES, Training
from rsrouter.training.deferral import head_voters, train_deferral
from rsrouter.training.features import noisy_features

KWARGS = {"width": 8, "blocks": [[16, 2]]}


@pytest.fixture(scope="module")
def resnets(tmp_path_factory: pytest.TempPathFactory) -> ExpertPool:
    """Three small residual networks, pinned in a folder each."""
    torch.manual_seed(5)
    folder, experts = tmp_path_factory.mktemp("resnets"), []
    for sigma in (0.25, 0.5, 1.0):
        network, file = build_architecture("small_resnet", 10, KWARGS), folder / f"{sigma}.safetensors"
        save_file(network.state_dict(), file)
        settings = {"sigma": sigma, "num_classes": 10, "input_shape": (1, 28, 28), "normalisation": "fashion_mnist"}
        experts.append(load_expert(file, architecture="small_resnet", kwargs=KWARGS, name=f"sigma_{sigma:g}", **settings))
    return ExpertPool(experts)


def voters(grid: int) -> DeferralRouter:
    """Two heads on the experts, the first of which is seldom sure."""
    torch.manual_seed(3)
    wide = 2 * (16 * grid**2 + 10)
    heads = {name: build_architecture("residual_head", 10, {"in_features": wide, "hidden": 4}) for name in ("one", "two")}
    for head in heads.values():
        nn.init.normal_(head.layers[2].weight, std=0.05)
    chain = [Voter("sigma_1", 0.7, name, ("sigma_0.5",), grid) for name in ("one", "two")]
    return DeferralRouter(chain, [0.9], {k: h.eval().requires_grad_(False) for k, h in heads.items()})


def test_features_of_cells_are_the_means_of_quadrants(resnets: ExpertPool) -> None:
    expert = resnets["sigma_1"]
    x, _ = load_slice("test").batch(range(3))
    features, logits = Trunk(expert, 2).eval()(x)
    normalised = Normalise(expert.mean, expert.std)(x)
    maps = expert.module.forward_features(normalised)  # 7 x 7: cells overlap in the middle
    assert features.shape == (3, 16 * 4)
    assert torch.allclose(features.view(3, 16, 2, 2)[:, :, 0, 1], maps[:, :, :4, 3:].mean((2, 3)), atol=1e-5)
    whole, same = Trunk(expert).eval()(x)
    assert whole.shape == (3, 16)
    assert torch.equal(logits, same)
    assert torch.allclose(logits, expert.network().eval()(x), atol=1e-4)


class Tokens(nn.Module):
    """As a vision transformer's features: `(B, tokens, F)`."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, CLASSES)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, : 4 * 4].reshape(-1, 4, 4)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean(1) if pre_logits else self.last(x.mean(1))

    def get_classifier(self) -> nn.Module:
        return self.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def test_an_expert_without_a_map_has_no_cells(resnets: ExpertPool) -> None:
    assert has_grid(resnets["sigma_1"], 2)
    assert not has_grid(resnets["sigma_1"], 8)
    flat = pool()[0]
    assert not has_grid(flat, 2)
    with pytest.raises(InputError, match="feature map"):
        Trunk(resnets["sigma_1"], 8).eval()(torch.rand(2, 1, 28, 28))

    tokens = Expert(Tokens(), sigma=0.5, num_classes=CLASSES, input_shape=(1, 8, 8), name="tokens")
    assert not has_grid(tokens, 2)
    with pytest.raises(InputError, match="feature map"):
        Trunk(tokens, 2).eval()(torch.rand(2, 1, 8, 8))


def test_a_router_over_cells_comes_back_as_it_was(resnets: ExpertPool, tmp_path: Path) -> None:
    x, _ = load_slice("test").batch(range(2))
    routed = RoutedSmooth(resnets, voters(2))
    assert routed.tree.order[-1].startswith("sigma_1+sigma_0.5/2x2@0.7")
    before = routed.certify(x, Terms(FixedPlan(20, 200), alpha=0.01, seed=1))
    routed.save_pretrained(tmp_path)
    again = RoutedSmooth.from_pretrained(tmp_path)
    assert again.digest == routed.digest
    assert again.router.to_config() == routed.router.to_config()
    after = again.certify(x, Terms(FixedPlan(20, 200), alpha=0.01, seed=1))
    assert [(c.predict, c.radius, c.counts) for c in before] == [(c.predict, c.radius, c.counts) for c in after]


def test_a_router_without_cells_is_described_as_before(resnets: ExpertPool) -> None:
    assert all("grid" not in v for v in voters(1).to_config()["voters"])
    assert all(v["grid"] == 2 for v in voters(2).to_config()["voters"])
    one = RoutedSmooth(resnets, voters(1))
    assert one.tree.order[-1].startswith("sigma_1+sigma_0.5@0.7")
    described = one.router.to_config()
    assert DeferralRouter.from_config(copy.deepcopy(described)).to_config() == described


@pytest.mark.parametrize(("grid", "head"), [(0, "one"), (True, "one"), (1.5, "one"), (2, None)])
def test_cells_that_cannot_be_read_are_refused(resnets: ExpertPool, grid: Any, head: str | None) -> None:
    heads = {} if head is None else {head: ResidualHead(10, 26, 4)}
    router = DeferralRouter([Voter("sigma_1", 0.7, head, (), grid), "sigma_0.25"], [0.6], heads)
    with pytest.raises(InputError, match="cannot read features"):
        RoutedSmooth(resnets, router)


@pytest.mark.parametrize("grid", [1, 2])
def test_batchnorm_is_folded_whatever_heads_read(resnets: ExpertPool, grid: int) -> None:
    (model,) = voters(grid).bind(resnets).models
    prepared = prepare(model.module, Execution(), torch.device("cpu"), (1, 28, 28))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.module.modules())


def test_a_head_for_other_features_is_refused(resnets: ExpertPool) -> None:
    router = voters(2)
    wrong = DeferralRouter([replace(v, grid=1) for v in router.voters], router.thresholds, dict(router.heads.items()))
    x, _ = load_slice("test").batch(range(1))
    with pytest.raises(InputError, match="does not fit the features"):
        RoutedSmooth(resnets, wrong).certify(x, Terms(FixedPlan(20, 100), alpha=0.01))


def test_heads_are_trained_on_what_votes_are_cast_on(resnets: ExpertPool) -> None:
    """Votes of the bound network are the head's on `noisy_features` of the same noise-free image."""
    x, _ = load_slice("test").batch(range(2))
    router = voters(2)
    seen = noisy_features([resnets["sigma_1"], resnets["sigma_0.5"]], 1e-12, x, 2, seed=0, purpose="train", grid=2)
    (model,) = router.bind(resnets).models
    one, _ = model.module.eval()(x)
    assert torch.allclose(router.heads["one"](seen[:, 0].float()), one, atol=0.05)  # features are kept in float16


def test_training_reads_cells_where_there_are_any(resnets: ExpertPool) -> None:
    recipe = replace(
        DEFERRAL_RECIPES["quick"],
        grid=2,
        copies=2,
        tune_copies=20,
        heads=tuple(replace(h, steps=5) for h in DEFERRAL_RECIPES["quick"].heads),
    )
    train, held = load_slice("train"), load_slice("validation")
    x, y = (torch.as_tensor(v) for v in train.batch(range(40)))
    xv, yv = (torch.as_tensor(v) for v in held.batch(range(30)))
    lines: list[dict[str, Any]] = []
    wanted = {"radii": (0.0, 1.0), "validation": (xv, yv), "floor": 0.0}
    made = train_deferral(Training(resnets, "deferral", x, y, recipe=recipe, log=lines.append, **wanted))
    assert any("head" in line for line in lines)
    for voter in getattr(made, "voters", ()):
        assert voter.grid == (1 if voter.head is None else 2)
    asked = [voter.grid for voter, _ in head_voters(resnets, (0.0, 1.0), recipe, 10_000, 1e-3)]
    assert asked == [2] * len(recipe.heads)
    readers = {
        trunks: {voter.others for voter, _ in head_voters(resnets, (0.0, 1.0), replace(recipe, trunks=trunks), 10_000, 1e-3)}
        for trunks in (1, 2)
    }
    assert readers == {1: {()}, 2: {tuple(e.name for e in list(resnets)[-2:-1])}}
    with pytest.raises(InputError, match="one expert or two"):
        replace(recipe, trunks=0)
    blind = ExpertPool(
        [Expert(Tokens(), sigma=s, num_classes=CLASSES, input_shape=(1, 8, 8), name=f"s{s:g}") for s in (0.5, 1.0)]
    )
    assert [voter.grid for voter, _ in head_voters(blind, (0.0, 1.0), recipe, 10_000, 1e-3)] == [1] * len(recipe.heads)
