"""A killed training goes on to the same bits; a parent's parameters are kept where shapes allow; auto compares kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import CLASSES, QUICK, RADII, SHAPE, head, images, pool
from torch import Tensor, nn

from rsrouter import CascadeRouter, Expert, ExpertPool, FlatRouter, InputError, Recipe, ResultsError, RoutedSmooth, train_router
from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.certify import CertifyPolicy
from rsrouter.core.plans import FixedPlan
from rsrouter.core.tree import expert_stage, flat_tree
from rsrouter.experts import build_architecture
from rsrouter.router import DeferralRouter, Voter
from rsrouter.training import DeferralRecipe, Labels, ResumeStore, good_sets, label_votes, train, utility_loss
from rsrouter.training.cascade import parent_chain
from rsrouter.training.chains import goal_of, improve_thresholds, replay
from rsrouter.training.features import noisy_features
from rsrouter.training.flat import FlatCurve
from rsrouter.training.flat_network import adapt_flat
from rsrouter.training.heads import HeadRecipe, train_head
from rsrouter.training.label_files import load_labels, store_tables
from rsrouter.training.losses import envelope_weights
from rsrouter.training.simulated import SimulatedVotes

SHORT = Recipe(epochs=12, redraw=5, check=2, patience=4)


class Killed(Exception):
    pass


def killer(after: int) -> Callable[..., None]:
    left = [after]

    def step(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return step


@pytest.fixture
def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("always_save")
@pytest.mark.parametrize("backbone", [False, True])
def test_a_killed_flat_training_ends_at_the_same_bits(tmp_path: Path, backbone: bool) -> None:
    def run(out: Path, progress: Callable[..., None] | None = None) -> None:
        torch.manual_seed(0)
        own = FlatRouter(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), sigma=0.5)
        router: FlatRouter | str = own if backbone else "flat"
        train_router(
            pool(), router, *images(), radii=RADII, recipe=SHORT, out=out, validation=images(40, 1), plan_n=1000,
            label_n=30, progress=progress,
        )  # fmt: skip

    run(tmp_path / "whole")
    for epochs in (3, 3):
        with pytest.raises(Killed):
            run(tmp_path / "killed", killer(epochs))
        assert not (tmp_path / "killed" / "config.json").exists()
        assert len((tmp_path / "killed" / "training.jsonl").read_text().splitlines()) > 0
    seen: list[int] = []
    run(tmp_path / "killed", lambda epoch, *_: seen.append(epoch))
    assert seen[0] > 8  # the two killed runs' epochs were not done again
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.usefixtures("always_save")
def test_a_killed_deferral_training_ends_at_the_same_bits(tmp_path: Path) -> None:
    passes: list[int] = []

    def run(out: Path, votes: Callable[[int], None] | None = None) -> None:
        train_router(
            pool(), "auto", *images(), radii=RADII, recipe=QUICK, out=out, validation=images(40, 1), plan_n=1000,
            label_n=10, votes=votes,
        )  # fmt: skip

    run(tmp_path / "whole", passes.append)
    kills = 0
    while True:  # after every unit of work: in the tuning votes, in the features of a level, in the flat candidate's labels
        try:
            run(tmp_path / "killed", killer(0))
            break
        except Killed:
            kills += 1
            assert kills <= len(passes)
    assert kills == len(passes) > 4
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.usefixtures("always_save")
def test_an_unfinished_folder_is_not_used_for_something_else(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_router(pool(), "flat", *images(), radii=RADII, recipe=SHORT, out=tmp_path, progress=killer(2))
    with pytest.raises(ResultsError, match="other radii, seed"):
        train_router(pool(), "flat", *images(), radii=(0.0, 1.0), recipe=SHORT, out=tmp_path, seed=1)
    state = next(p for p in (tmp_path / ".state").iterdir() if p.suffix == ".pt")
    state.write_bytes(b"not what was written")
    with pytest.raises(ResultsError, match="cannot be read"):
        train_router(pool(), "flat", *images(), radii=RADII, recipe=SHORT, out=tmp_path)


def test_features_in_parts_are_the_features(tmp_path: Path) -> None:
    experts, (x, _) = pool(), images(30)

    def draw(store: ResumeStore, progress: Callable[[int], None] | None = None) -> Tensor:
        many = x.repeat(40, 1, 1, 1)
        return noisy_features([experts[2]], 0.5, many, 3, seed=1, purpose="train", progress=progress, store=store)

    whole = draw(ResumeStore())
    with pytest.raises(Killed):
        draw(ResumeStore(tmp_path, every=0.0), killer(1))
    assert torch.equal(draw(ResumeStore(tmp_path, every=0.0)), whole)
    counted: list[int] = []
    assert torch.equal(draw(ResumeStore(tmp_path, every=0.0), counted.append), whole)
    assert counted == []


def test_votes_are_drawn_once_in_a_run() -> None:
    experts, (x, _) = pool(), images(20)
    drawn: list[int] = []
    kept: dict[str, Any] = {"progress": drawn.append, "store": ResumeStore()}
    first = label_votes(experts, x, n=20, **kept)
    count = sum(drawn)
    assert np.array_equal(label_votes(experts, x, n=20, **kept), first)
    assert sum(drawn) == count
    label_votes(experts, x, n=21, **kept)
    label_votes(experts, x, n=20, seed=1, **kept)
    label_votes(experts, x, n=20, purpose="tune", **kept)
    assert sum(drawn) == count * 3 + count // 20 * 21
    assert np.array_equal(label_votes(experts, x, n=20), first)


def flat_parent(experts: ExpertPool) -> FlatRouter:
    torch.manual_seed(3)
    return FlatRouter(build_architecture("mlp_head", 3, {"in_features": 7, "hidden": 8}), sigma=1.0, trunk="s1")


def expert(sigma: float) -> Expert:
    module = build_architecture("columns_for_tests", CLASSES, {"scale": 4.0 * sigma})
    return Expert(module, sigma=sigma, num_classes=CLASSES, input_shape=SHAPE, name=f"s{sigma:g}")


def test_a_flat_router_follows_its_experts() -> None:
    experts = pool()
    old = flat_parent(experts)
    before = {k: v.clone() for k, v in old.module.state_dict().items()}
    grown_pool, shrunk_pool = ExpertPool([*experts, expert(0.12)]), ExpertPool([experts[0], experts[2]])
    grown, shrunk = adapt_flat(old, experts, grown_pool, 0), adapt_flat(old, experts, shrunk_pool, 0)
    same = adapt_flat(old, experts, experts, 0)
    assert grown is not None
    assert shrunk is not None
    assert same is not None
    x = torch.rand(5, 7)
    for new, names in ((grown, grown_pool.names), (shrunk, shrunk_pool.names), (same, experts.names)):
        assert new.order(ExpertPool([*experts, expert(0.12)])) == tuple(names)
        kept = [n for n in names if n in experts.names]
        to, of = [names.index(n) for n in kept], [experts.names.index(n) for n in kept]
        for key, tensor in new.module.state_dict().items():  # every layer keeps its bits, the last one row by row
            if key.startswith("layers.2"):
                assert torch.equal(tensor[to], before[key][of])
            else:
                assert torch.equal(tensor, before[key])
        # a product of another width rounds otherwise: the same logits, not the same bits
        torch.testing.assert_close(new.module(x)[:, to], old.module(x)[:, of])
        new.bind(ExpertPool([*experts, expert(0.12)]))
    assert {k: v.tolist() for k, v in old.module.state_dict().items()} == {k: v.tolist() for k, v in before.items()}
    assert adapt_flat(old, experts, ExpertPool([experts[0], experts[1]]), 0) is None  # the trunk is gone
    plain = FlatRouter(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), sigma=1.0)
    wider = adapt_flat(plain, experts, grown_pool, 0)
    assert wider is not None
    assert torch.equal(wider.module[1].weight[1:], plain.module[1].weight)
    odd = FlatRouter(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU()), sigma=1.0)
    assert adapt_flat(odd, experts, grown_pool, 0) is None


def test_training_goes_on_from_a_parent_over_other_experts(tmp_path: Path) -> None:
    experts = pool()
    parent = RoutedSmooth(experts, flat_parent(experts))
    digest = parent.router.digest
    grown = ExpertPool([*experts, expert(0.12)])
    still = Recipe(epochs=1, lr=1e-9, weight_decay=0.0)
    routed = train_router(grown, "flat", *images(), radii=RADII, recipe=still, parent=parent, label_n=30)
    fresh = train_router(grown, "flat", *images(), radii=RADII, recipe=still, label_n=30)
    x = torch.rand(5, 7)
    old = parent.router.module(x)  # type: ignore[attr-defined]
    assert torch.allclose(routed.router.module(x)[:, 1:], old, atol=1e-5)  # type: ignore[attr-defined]
    assert not torch.allclose(fresh.router.module(x)[:, 1:], old, atol=1e-2)  # type: ignore[attr-defined]
    assert parent.router.digest == digest


def test_heads_start_from_the_parents() -> None:
    torch.manual_seed(0)
    features = (3.0 + 2.0 * torch.randn(40, 4, 7)).half()
    labels = torch.arange(40) % CLASSES
    parent = head(CLASSES, 7)
    with torch.no_grad():
        for tensor in parent.parameters():
            tensor.normal_(std=0.3)
    still = HeadRecipe("consistency", hidden=4, steps=1, lr=1e-9, weight_decay=0.0)
    x = torch.rand(6, 7) + 2.0
    parents = {"level0_c2": head(CLASSES, 14), "level0_c5": parent}
    warm = train_head(features, labels, CLASSES, recipe=still, seed=0, parents=parents)
    cold = train_head(features, labels, CLASSES, recipe=still, seed=0)
    assert torch.allclose(warm(x), parent(x), atol=1e-4)  # type: ignore[operator]
    assert torch.allclose(cold(x), x[:, -CLASSES:], atol=1e-4)


def test_a_cascade_is_searched_further_from_its_parent() -> None:
    experts = pool()
    old = CascadeRouter((0.9, 0.6), ("s0.5", "s1", "s0.25"))
    assert parent_chain(old, experts, experts) == (("s0.5", 0.9), ("s1", 0.6), ("s0.25", None))
    assert parent_chain(old, experts, ExpertPool([experts[0], experts[1]])) == (("s0.5", 0.9), ("s0.25", None))
    assert parent_chain(old, experts, ExpertPool([experts[1], experts[2]])) == (("s0.5", 0.9), ("s1", None))
    assert parent_chain(old, experts, ExpertPool([experts[1], expert(0.12)])) is None
    rng = np.random.default_rng(2)
    labels = np.arange(60) % CLASSES
    voters = {
        f"s{s:g}": SimulatedVotes.draw(
            np.stack([rng.multinomial(40, rng.dirichlet(a)) for a in np.eye(CLASSES)[labels] * 4 + 0.4]), s, 1000, 50, rng
        )
        for s in (0.25, 0.5, 1.0)
    }
    goal = goal_of(voters, labels, RADII, 0.001)
    start = (("s0.5", 0.9), ("s1", 0.6), ("s0.25", None))
    found, score = improve_thresholds(voters, labels, goal, 0.001, start)
    assert [name for name, _ in found] == ["s0.5", "s1", "s0.25"]
    before = improve_thresholds(voters, labels, goal, 0.001, found)
    assert before == (found, score)  # no single threshold improves it
    x, y = images()
    routed = train_router(
        experts, "cascade", x, y, radii=RADII, validation=images(40, 1), plan_n=1000, parent=RoutedSmooth(experts, old)
    )
    assert isinstance(routed.router, CascadeRouter)


def test_deferral_trains_on_from_its_parents_heads(tmp_path: Path) -> None:
    experts, (x, y) = pool(), images()
    recipe = DeferralRecipe(copies=6, tune_copies=20, levels=(1.1,), heads=(HeadRecipe(hidden=8, steps=200),), stages=2)
    torch.manual_seed(1)
    heads = {"level0_2": build_architecture("residual_head", CLASSES, {"in_features": 14, "hidden": 8})}
    with torch.no_grad():
        heads["level0_2"].layers[2].weight.normal_(std=0.5)
    old = DeferralRouter([Voter("s1", 0.7, "level0_2", ("s0.5",)), "s0.25"], [0.6], heads)
    losses = []
    for name, parent in (
        ("fresh", None),
        ("on", RoutedSmooth(experts, old)),
        ("other", RoutedSmooth(experts, flat_parent(experts))),
    ):
        out = tmp_path / name
        train_router(
            experts, "deferral", x, y, parent=parent, radii=RADII, recipe=recipe, validation=images(40, 1), plan_n=1000, out=out
        )
        lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0]
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]  # a flat parent has no head to start from


def test_auto_takes_what_scores_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"radii": RADII, "recipe": QUICK, "validation": images(40, 1), "plan_n": 1000, "label_n": 20}
    log = tmp_path / "a" / "training.jsonl"
    routed = train_router(pool(), "auto", *images(), out=tmp_path / "a", **options)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    choice = next(line for line in lines if "chosen" in line)
    assert choice["chosen"] == routed.router.kind == max(choice["candidates"], key=choice["candidates"].get)
    assert set(choice["candidates"]) & {"cascade", "deferral"}
    epochs = [line for line in lines if "validation_loss" in line]
    assert all(len(line["validation"]) == len(RADII) and line["coverage"] >= 0 for line in epochs)
    assert epochs
    look = FlatCurve.look
    monkeypatch.setattr(FlatCurve, "look", lambda self, module: {**look(self, module), "score": 9.0})
    assert train_router(pool(), "auto", *images(), **options).router.kind == "flat"
    monkeypatch.setattr(FlatCurve, "look", lambda self, module: {**look(self, module), "score": -9.0})
    assert train_router(pool(), "auto", *images(), **options).router.kind != "flat"


def test_the_simulated_curve_is_what_the_policy_certifies() -> None:
    rng = np.random.default_rng(5)
    count, n, n0 = 30, 500, 40
    tree = flat_tree("router", 0.5, [expert_stage(name, s, CLASSES) for name, s in (("a", 0.25), ("b", 1.0))])
    shares = {"router": rng.dirichlet([0.5] * 2, count), **{k: rng.dirichlet([0.3] * CLASSES, count) for k in "ab"}}
    voters = {
        k: SimulatedVotes(rng.multinomial(n, v), rng.multinomial(n0, v), n, n0, tree.stages[k].sigma) for k, v in shares.items()
    }
    for rule in ("tree", "min"):
        c, radius = replay(tree, voters, 0.01, rule=rule)
        policy = CertifyPolicy(tree, FixedPlan(n0, n), AlphaSplit.even(0.01, tree.paths), count, rule=rule)
        while live := [i for i in range(count) if not policy.done[i]]:
            requests = policy.next_requests(live)
            policy.update(
                requests,
                [
                    {
                        r.network: np.append(
                            (voters[r.network].selection if r.purpose == "select" else voters[r.network].counts)[r.image], 0
                        )
                    }
                    for r in requests
                ],
            )
        certificates = [policy.certificate(i) for i in range(count)]
        assert radius.tolist() == [x.radius for x in certificates]
        assert c.tolist() == [x.predict for x in certificates]
        assert (radius > 0).any()


def test_weights_of_radii_follow_the_envelope() -> None:
    good = good_sets(np.array([[1.0, 0.0], [1.0, 0.2], [0.3, 0.0], [0.0, 0.4]]), [0.1, 0.9, 2.0])
    # held by the best expert: 3/4, 1/2, none
    assert envelope_weights(good).tolist() == pytest.approx((np.array([4 / 3, 2.0, 0.0]) * 3 / (4 / 3 + 2)).tolist())
    logits = torch.tensor([[0.0, 1.0]] * 4)
    parts = [utility_loss(logits, good[:, [r]]) for r in range(3)]
    weights = envelope_weights(good)
    assert torch.allclose(utility_loss(logits, good, weights), sum(w * p for w, p in zip(weights, parts, strict=True)) / 3)
    labels = Labels(np.ones((60, 3)) * [0.2, 0.4, 0.6], np.zeros((60, 3), dtype=np.int64))
    with pytest.raises(InputError, match="weighting"):
        Recipe(weighting="odd")
    with pytest.raises(InputError, match="Routing labels"):
        train_router(pool(), "flat", *images(), radii=RADII, routing_labels=labels._replace(radius=labels.radius * np.nan))


def test_labels_from_tables_train_without_a_vote(tmp_path: Path) -> None:
    experts = pool()
    rng = np.random.default_rng(0)
    tables = {}
    for k, name in enumerate(experts.names):
        lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
        for i in reversed(range(70)):  # tables need not be sorted
            right = int(rng.random() < 0.7)
            lines.append(f"{i}\t{i % CLASSES}\t{i % CLASSES if right else (i + 1) % CLASSES}\t{0.1 * (k + 1)}\t{right}\t0:00:01")
        tables[name] = tmp_path / f"{name}.tsv"
        tables[name].write_text("\n".join(lines) + "\n")
    metadata, mean = store_tables(experts, tables, tmp_path / "labels.npz", unseen=True)
    assert metadata["images"] == 70
    assert mean.argmax() == 2
    routing, target, metadata = load_labels(tmp_path / "labels.npz", experts, range(5, 65))
    assert target.tolist() == [i % CLASSES for i in range(5, 65)]
    assert set(np.unique(routing.radius[:, 1])) == {0.0, 0.2}
    x, _ = images()
    drawn: list[int] = []
    train_router(
        experts, "flat", x, torch.from_numpy(target), radii=RADII, recipe=SHORT, routing_labels=routing, votes=drawn.append
    )
    assert drawn == []
    with pytest.raises(ResultsError, match="lack some"):
        load_labels(tmp_path / "labels.npz", experts, range(20, 80))
    with pytest.raises(ResultsError, match="other experts"):
        load_labels(tmp_path / "labels.npz", ExpertPool([experts[0], experts[1]]))
    with pytest.raises(InputError, match="one table for each"):
        store_tables(experts, {n: tables[n] for n in experts.names[:2]}, tmp_path / "two.npz")
    with pytest.raises(ResultsError, match="exists"):
        store_tables(experts, tables, tmp_path / "labels.npz")
    # auto's flat candidate learns from them too, from those of the images that are left to train on
    routed = train_router(
        experts, "auto", x, torch.from_numpy(target), radii=RADII, recipe=QUICK, routing_labels=routing, plan_n=1000
    )
    assert routed.router.kind in ("flat", "cascade", "deferral")
