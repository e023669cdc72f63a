"""Training and tuning routers on small hand-made experts: seconds, and every statement can fail."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rsrouter import (
    CascadeRouter,
    Expert,
    ExpertPool,
    FixedPlan,
    FlatRouter,
    InputError,
    Recipe,
    ResultsError,
    RoutedSmooth,
    train_router,
)
from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.certify import CertifyPolicy
from rsrouter.data import from_arrays
from rsrouter.experts import build_architecture, register_architecture
from rsrouter.experts.identity import module_digest
from rsrouter.jobs import Running, label_table
from rsrouter.router import DeferralRouter, ResidualHead, Voter
from rsrouter.sampling import Execution
from rsrouter.training import DeferralRecipe, Training, good_sets, label_votes, train_deferral, tune_cascade, utility_loss
from rsrouter.training.chains import TAUS, accuracy, chain_radius, goal_of, search_chain
from rsrouter.training.heads import HeadRecipe, as_stored
from rsrouter.training.label_files import labels_from_tables, load_votes
from rsrouter.training.labels import radii_from_votes, target_radii
from rsrouter.training.simulated import SimulatedVotes
from rsrouter.training.train import expert_passes

SHAPE, CLASSES, RADII = (1, 4, 4), 3, (0.0, 0.25, 0.5, 1.0)
QUICK = DeferralRecipe(copies=6, tune_copies=40, levels=(1.1,), heads=(HeadRecipe(hidden=8, steps=60),), stages=2)
RECIPE_OF = {"auto": QUICK, "deferral": QUICK, "flat": Recipe(epochs=3), "cascade": None}


class Columns(nn.Module):
    """Brightness of columns 0 to 2 as features, scaled as logits; exposes its features like a timm model."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(scale * torch.eye(4)[:CLASSES])
            self.fc.bias.zero_()

    def forward_features(self, x: Tensor) -> Tensor:
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean(2).flatten(1)
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def columns(num_classes: int, scale: float) -> nn.Module:
    return Columns(scale)


register_architecture("columns_for_tests", columns)


def pool() -> ExpertPool:
    def module(s: float) -> nn.Module:
        return build_architecture("columns_for_tests", CLASSES, {"scale": 4.0 * s})

    return ExpertPool(
        [Expert(module(s), sigma=s, num_classes=CLASSES, input_shape=SHAPE, name=f"s{s:g}") for s in (0.25, 0.5, 1.0)]
    )


def images(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    x = 0.3 + 0.2 * torch.rand((count, *SHAPE), generator=generator)
    for i, label in enumerate(labels):
        x[i, 0, :, label] += (0.05, 0.2, 0.45)[i // CLASSES % 3]
    return x.clamp(0, 1), labels


def quick(**settings: Any) -> Training:
    settings = {"radii": RADII, "validation": images(40, 1), "recipe": QUICK, "plan_n": 1000, **settings}
    return Training(pool(), "deferral", *images(), **settings)


def test_simulated_chain_is_what_the_policy_certifies() -> None:
    rng = np.random.default_rng(0)
    experts = pool()
    n, n0, count = 1000, 50, 60
    shares = {name: rng.dirichlet([0.3] * CLASSES, size=count) for name in experts.names}
    voters = {
        name: SimulatedVotes(rng.multinomial(n, shares[name]), rng.multinomial(n0, shares[name]), n, n0, experts[name].sigma)
        for name in experts.names
    }
    for names in (("s0.5", "s1"), ("s1", "s0.5", "s0.25"), ("s0.5", "s1", "s0.5")):
        taus = (0.6, 0.8)[: len(names) - 1]
        c, radius = chain_radius(voters, tuple(zip(names, (*taus, None), strict=True)), 0.01)
        tree = CascadeRouter(taus, names).bind(experts).tree
        policy = CertifyPolicy(tree, FixedPlan(n0, n), AlphaSplit.even(0.01, tree.paths), count)
        on = {network: [s for s in tree.stages.values() if s.network == network] for network in tree.networks}
        while live := [i for i in range(count) if not policy.done[i]]:
            requests = policy.next_requests(live)
            answers = []
            for r in requests:
                source = voters[r.network].selection if r.purpose == "select" else voters[r.network].counts
                answers.append({s.name: np.append(source[r.image], 0) for s in on[r.network]})
            policy.update(requests, answers)
        certificates = [policy.certificate(i) for i in range(count)]
        assert [x.radius for x in certificates] == pytest.approx(radius.tolist(), abs=1e-9)
        assert policy.c.tolist() == c.tolist()
        assert max(radius) > 0.3


def test_search_finds_the_best_of_all_short_chains() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(90) % CLASSES
    voters = {}
    for k, sigma in enumerate((0.25, 0.5, 1.0)):
        right = np.eye(CLASSES)[labels] * (6.0 - 2 * k) + 0.5
        voters[f"s{sigma:g}"] = SimulatedVotes.draw(
            np.stack([rng.multinomial(40, rng.dirichlet(a)) for a in right]), sigma, 1000, 50, rng
        )
    goal = goal_of(voters, labels, RADII, 0.001)
    chain, score = search_chain(voters, labels, goal, 0.001, max_stages=2)
    every = [((a, None),) for a in voters] + [((a, t), (b, None)) for a, b, t in product(voters, voters, TAUS) if a != b]
    best = max(goal.score(accuracy(*chain_radius(voters, each, 0.001), labels, goal.radii)) for each in every)
    assert score == best
    assert goal.score(accuracy(*chain_radius(voters, chain, 0.001), labels, goal.radii)) == score


def test_targets_are_not_capped_by_few_votes() -> None:
    votes = np.zeros((2, 1, CLASSES + 1), dtype=np.int64)
    votes[:, 0, 0] = 100, 90
    votes[1, 0, 1] = 10
    labels = np.array([0, 0])
    capped = radii_from_votes(votes, labels, (1.0,), 1e-3).radius[:, 0]
    target = target_radii(votes, labels, (1.0,), plan_n=10_000).radius[:, 0]
    assert capped[0] < 1.6 < 3.0 < target[0]
    assert capped[1] < target[1] < 1.3
    assert target_radii(votes, np.array([1, 1]), (1.0,)).radius[:, 0].tolist() == [0.0, 0.0]


def test_utility_ignores_experts_that_agree() -> None:
    good = good_sets(np.array([[1.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]), [0.5])
    logits = torch.tensor([[2.0, -1.0, 0.0]] * 3)
    swapped = logits[:, [1, 0, 2]]
    assert torch.allclose(utility_loss(logits, good), utility_loss(swapped, good))
    assert utility_loss(logits, good)[1:].tolist() == [0.0, 0.0]
    assert (
        utility_loss(torch.tensor([[0.0, 0.0, 5.0]]), good[:1]).item()
        > utility_loss(torch.tensor([[5.0, 0.0, 0.0]]), good[:1]).item()
    )


@pytest.mark.parametrize("kind", ["auto", "cascade", "flat"])
def test_experts_are_unchanged_to_the_bit(kind: str, tmp_path: Path) -> None:
    experts = pool()
    before = [module_digest(e.module) for e in experts]
    requires = [p.requires_grad for e in experts for p in e.module.parameters()]
    options = {"radii": RADII, "recipe": RECIPE_OF[kind], "validation": images(40, 1), "plan_n": 1000}
    routed = train_router(experts, kind, *images(), out=tmp_path / "router", **options)
    assert [module_digest(e.module) for e in experts] == before
    assert [p.requires_grad for e in experts for p in e.module.parameters()] == requires
    lines = [json.loads(line) for line in (tmp_path / "router" / "training.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == routed.router.kind
    assert lines[0]["validation"] == "given"
    again = RoutedSmooth.from_pretrained(tmp_path / "router")
    x, _ = images(4, 2)
    plan = FixedPlan(20, 200)
    assert again.certify(x, plan) == routed.certify(x, plan)


@pytest.mark.parametrize("kind", ["auto", "deferral", "cascade", "flat"])
def test_the_votes_of_a_training_are_known_beforehand(kind: str) -> None:
    drawn: list[int] = []
    recipe = RECIPE_OF[kind]
    train_router(pool(), kind, *images(60), radii=RADII, recipe=recipe, validation=images(40, 1), votes=drawn.append)
    training = Training(pool(), kind, *images(60), radii=RADII, recipe=recipe, validation=images(40, 1))
    assert sum(drawn) == expert_passes(training.checked()) > 0


@pytest.mark.parametrize("kind", ["auto", "cascade", "flat"])
def test_a_router_records_the_execution_it_was_trained_for(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts vote under it while thresholds are chosen, the file keeps it, and a child router inherits it."""
    from rsrouter.sampling import engine
    from rsrouter.training import features

    ran: set[str] = set()
    prepare = engine.prepare
    for module in (engine, features):
        monkeypatch.setattr(module, "prepare", lambda m, how, *rest: (ran.add(how.dtype), prepare(m, how, *rest))[1])
    how = Execution(dtype="bfloat16", batch=40)
    options = {"radii": RADII, "recipe": RECIPE_OF[kind], "validation": images(40, 1), "plan_n": 1000}
    routed = train_router(pool(), kind, *images(), execution=how, out=tmp_path / "router", **options)
    assert ran == {"bfloat16"}
    assert routed.execution == RoutedSmooth.from_pretrained(tmp_path / "router").execution == how
    child = train_router(pool(), kind, *images(), parent=routed, **options)
    assert child.execution == how


def test_an_unfinished_training_of_another_execution_is_refused(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    options = {"radii": RADII, "out": tmp_path / "r", "plan_n": 1000, "votes": stop}
    with pytest.raises(KeyboardInterrupt):
        train_router(pool(), "cascade", *images(), **options)
    with pytest.raises(ResultsError, match=r"unfinished.*other execution"):
        train_router(pool(), "cascade", *images(), execution=Execution(dtype="bfloat16"), **options)


def test_training_repeats_and_the_seed_matters() -> None:
    def trained(seed: int) -> str:
        return train_router(pool(), "flat", *images(), radii=RADII, recipe=Recipe(epochs=3), seed=seed).router.digest

    assert trained(0) == trained(0)
    assert trained(0) != trained(1)


def test_deferral_training_repeats() -> None:
    results = [train_deferral(quick()) for _ in range(2)]
    assert results[0].digest == results[1].digest


def test_heads_are_stored_in_half_the_space_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_a_head(simulated: dict[str, SimulatedVotes], *_: object, **__: object) -> tuple[object, float]:
        return ((next(name for name in simulated if name.startswith("level")), None),), 1.0

    monkeypatch.setattr("rsrouter.training.deferral.search_chain", take_a_head)
    router = train_deferral(quick())
    assert isinstance(router, DeferralRouter)
    RoutedSmooth(pool(), router).save_pretrained(tmp_path)
    kept = load_file(tmp_path / "router.safetensors")
    trained = dict(router.modules.named_parameters())
    assert trained
    assert {kept[name].dtype for name in trained} == {torch.float16}
    again = RoutedSmooth.from_pretrained(tmp_path).router
    assert again.digest == router.digest
    assert all(torch.equal(p, trained[name]) and p.dtype == torch.float32 for name, p in again.modules.named_parameters())


def test_what_float16_cannot_hold_is_stored_as_it_is(tmp_path: Path) -> None:
    head = nn.Linear(2, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e6, 0.1], [float("nan"), 2.0], [1.0, -0.0]]))
        head.bias.copy_(torch.tensor([0.5, -0.0, 1e-7]))
    before = [p.detach().clone() for p in head.parameters()]
    as_stored(head)
    assert torch.equal(head.weight.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(head.bias, before[1].half().float())
    assert torch.signbit(head.bias[1])


def test_deferral_router_with_shared_and_fused_networks(tmp_path: Path) -> None:
    experts = pool()
    torch.manual_seed(0)
    heads = {"near": head(CLASSES, 7), "far": head(CLASSES, 14)}
    with torch.no_grad():
        heads["far"].layers[2].weight.normal_(std=0.1)  # type: ignore[union-attr]
    router = DeferralRouter(
        [Voter("s0.5", 0.3, "near"), Voter("s1", 0.7, "far", ("s0.5",)), "s0.25", Voter("s0.5", 0.3)], [0.9, 0.6, 0.55], heads
    )
    routed = RoutedSmooth(experts, router)
    x, _ = images(6, 3)
    plan = FixedPlan(20, 300)
    certificates = routed.certify(x, plan)
    assert any(c.predict >= 0 for c in certificates)
    assert set(routed.tree.networks) == {"s0.5@0.3", "s1+s0.5@0.7", "s0.25"}
    routed.save_pretrained(tmp_path)
    assert RoutedSmooth.from_pretrained(tmp_path).certify(x, plan) == certificates


def head(classes: int, width: int) -> nn.Module:
    return build_architecture("residual_head", classes, {"in_features": width, "hidden": 4})


def test_residual_head_starts_as_the_expert() -> None:
    x = torch.randn(5, 7)
    assert torch.equal(ResidualHead(CLASSES, 7)(x), x[:, -CLASSES:])


def test_repeated_expert_votes_once() -> None:
    routed = RoutedSmooth(pool(), CascadeRouter((0.9, 0.6), ("s0.5", "s1", "s0.5")))
    certificates = routed.certify(images(5)[0], FixedPlan(20, 300))
    assert all(c.counts["s0.5"] == c.counts["s0.5:2"] for c in certificates if "s0.5" in c.counts)
    assert all(c.n_drawn <= 2 * 320 for c in certificates)


def test_stored_labels_resume_and_refuse(tmp_path: Path) -> None:
    experts, (x, y) = pool(), images(20)
    whole = label_votes(experts, x, n=30)
    path = tmp_path / "labels.npz"

    class Stop(Exception):
        pass

    def stop(running: Running) -> None:
        if running.finished == 8:
            raise Stop

    data = from_arrays(x, y)
    with pytest.raises(Stop):
        label_table(experts, data, path, n=30, block=8, progress=stop)
    with pytest.raises(ResultsError, match="routing labels"):
        load_votes(path, experts)
    label_table(experts, data, path, n=30, block=8)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    votes, target, metadata = load_votes(path, experts)
    assert np.array_equal(votes, whole)
    assert target.tolist() == y.tolist()
    assert metadata["unseen"] is None
    with pytest.raises(ResultsError, match="other labels"):
        label_table(experts, data, path, n=31)
    assert np.array_equal(load_votes(path, experts)[0], whole)


def test_labels_from_published_tables(tmp_path: Path) -> None:
    head_line = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    (tmp_path / "a.tsv").write_text(head_line + "0\t1\t1\t0.5\t1\t0:00:01\n2\t0\t1\t0.7\t0\t0:00:01\n4\t2\t-1\t0.0\t0\t0:00:01\n")
    (tmp_path / "b.tsv").write_text(head_line + "0\t1\t1\t0.9\t1\t0:00:01\n2\t0\t0\t0.2\t1\t0:00:01\n4\t2\t2\t0.1\t1\t0:00:01\n")
    idx, labels, routing = labels_from_tables([tmp_path / "a.tsv", tmp_path / "b.tsv"])
    assert idx.tolist() == [0, 2, 4]
    assert labels.tolist() == [1, 0, 2]
    assert routing.radius.tolist() == [[0.5, 0.9], [0.0, 0.2], [0.0, 0.1]]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    experts, (x, y) = pool(), images(20)
    with pytest.raises(InputError, match="Unknown kind"):
        train_router(experts, "oracle", x, y, radii=RADII)
    with pytest.raises(InputError, match="radii"):
        train_router(experts, "cascade", x, y, radii=[])
    with pytest.raises(InputError, match="another kind"):
        train_router(experts, "flat", x, y, radii=RADII, recipe=QUICK)
    with pytest.raises(InputError, match="two experts"):
        tune_cascade(Training(ExpertPool([experts[0]]), "cascade", x, y, radii=RADII))
    with pytest.raises(InputError, match="twice in a row"):
        CascadeRouter((0.6, 0.7), ("s1", "s1", "s0.5")).bind(experts)
    with pytest.raises(InputError, match="do not fit"):
        DeferralRouter([Voter("s1", None, "lost"), "s0.5"], [0.6])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ResultsError, match="already holds"):
        train_router(experts, "cascade", x, y, radii=RADII, out=tmp_path)
    flat = FlatRouter(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), sigma=1.0)
    short = radii_from_votes(label_votes(experts, x[:5], n=10), y[:5].numpy(), experts.sigmas, 0.1)
    with pytest.raises(InputError, match="Routing labels"):
        train_router(experts, flat, x, y, radii=RADII, routing_labels=short)
