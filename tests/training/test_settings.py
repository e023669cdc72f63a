"""The settings of a training: the process around it, what is wanted of the router, the paper's recipe, bars, a full disk."""

from __future__ import annotations

import errno
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import CLASSES, QUICK, RADII, SHAPE, images, pool
from torch import nn

from rsrouter import (
    CascadeRouter,
    Expert,
    ExpertPool,
    FixedPlan,
    FlatRouter,
    InputError,
    Recipe,
    ResultsError,
    Training,
    train_router,
)
from rsrouter.demo import load_pool, load_slice
from rsrouter.process import usual_settings
from rsrouter.training import RECIPES, tune_cascade
from rsrouter.training.chains import Frontier, Goal, goal_of, search_chain
from rsrouter.training.flat import flat_router
from rsrouter.training.simulated import SimulatedVotes

SHORT = Recipe("dual-rs", epochs=3, consistency=40.0)


def trained(experts: ExpertPool, kind: str) -> str:
    router: Any = kind
    if kind == "own":
        torch.manual_seed(1)
        router = FlatRouter(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).float(), sigma=0.5)
    recipe: Any = QUICK if kind == "deferral" else SHORT
    wanted: dict[str, Any] = {"radii": RADII, "recipe": recipe, "label_n": 20, "plan_n": 1000}
    x, y = (t.clone() for t in DATA)
    return train_router(experts, router, x, y, validation=tuple(t.clone() for t in HELD), **wanted).router.digest


@cache
def usual(kind: str) -> tuple[ExpertPool, str]:
    """Experts, and the digest of a router trained over them, in a process that nobody has set."""
    with usual_settings():
        return (experts := pool()), trained(experts, kind)


@pytest.mark.parametrize("kind", ["flat", "deferral", "own"])
@pytest.mark.parametrize("around", ["float64", "no_grad", "inference", "autocast"])
def test_training_does_not_depend_on_the_process_around_it(kind: str, around: str) -> None:
    experts, wanted = usual(kind)
    before = torch.get_default_dtype()
    contexts: dict[str, AbstractContextManager[Any]] = {
        "float64": nullcontext(),
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    try:
        if around == "float64":
            torch.set_default_dtype(torch.float64)
        with contexts[around]:
            states = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            # a module made under float64 is initialised by other random numbers
            assert trained(experts, kind) == wanted or (kind, around) == ("own", "float64")
            assert trained(pool(), kind)  # experts made in such a process
            assert states == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    finally:
        torch.set_default_dtype(before)


DATA, HELD = images(), images(40, 1)


def test_the_demo_trains_under_another_default_dtype() -> None:
    x, y = load_slice("train").batch(range(30))
    torch.set_default_dtype(torch.float64)
    try:
        for kind, recipe in (("flat", replace(RECIPES["dual-rs-head"], epochs=2)), ("deferral", replace(QUICK, copies=2))):
            routed = train_router(load_pool(), kind, x, y, recipe=recipe, radii=[0, 0.25], label_n=10)
            assert {p.dtype for p in routed.router.modules.parameters()} <= {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_papers_recipe_runs_as_its_authors_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW .01 / .01, milestones 30 and 60 (gamma .5), 90 epochs, batch 256, two draws, lambda 40, eta .5, 100 votes."""
    made: list[torch.optim.AdamW] = []
    drawn: list[tuple[int, str]] = []
    whole = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(whole(*a, **k)) or made[-1])
    votes = Training.expert_votes
    monkeypatch.setattr(
        Training, "expert_votes", lambda self, x, n, purpose: drawn.append((n, purpose)) or votes(self, x, n, purpose)
    )
    lines: list[dict[str, Any]] = []
    routed = train_router(pool(), "flat", *images(), radii=RADII, recipe="dual-rs", log=lines.append)
    router = routed.router
    assert isinstance(router, FlatRouter)
    assert (router.sigma, router.trunk) == (1.0, None)
    assert type(router.module) is type(pool()[2].module)  # a whole network, with an output for each expert
    assert router.module(torch.rand(2, *SHAPE)).shape == (2, 3)
    (optimiser,) = made
    trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert trained == {id(p) for p in router.module.parameters()}
    assert optimiser.param_groups[0]["weight_decay"] == 0.01
    rates = [line["lr"] for line in lines]
    assert rates == pytest.approx([0.01] * 30 + [0.005] * 30 + [0.0025] * 30)
    assert drawn == [(100, "label")]
    strong, weak = RECIPES["dual-rs"], RECIPES["dual-rs-weak"]
    assert (strong.batch, strong.copies, strong.consistency, strong.entropy) == (256, 2, 40.0, 0.5)
    assert (strong.radius_weight, weak) == ("strong", replace(strong, radius_weight="weak"))
    # radii are those that 100 votes certify, not carried over: at most 1.5 sigma
    training = Training(pool(), "flat", *images(), radii=RADII).checked()
    unanimous = np.zeros((1, 3, CLASSES + 1), dtype=np.int64)
    unanimous[:, :, 0] = 100
    label = torch.zeros(1, dtype=torch.int64)
    few, carried = (training.targets(unanimous, label, carried=c).radius for c in (False, True))
    assert few[0, 2] < 1.6 < 3.0 < carried[0, 2]


def test_a_whole_network_needs_an_architecture() -> None:
    blind = [
        Expert(nn.Sequential(nn.Flatten(), Odd()), sigma=s, num_classes=CLASSES, input_shape=SHAPE, name=f"s{s:g}")
        for s in (0.5, 1.0)
    ]
    with pytest.raises(InputError, match="No network can be made"):
        train_router(ExpertPool(blind), "flat", *images(), radii=RADII, recipe="dual-rs", label_n=5)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def test_why_no_head_could_be_trained() -> None:
    blind = ExpertPool([Expert(Odd2(), sigma=s, num_classes=CLASSES, input_shape=SHAPE, name=f"s{s:g}") for s in (0.5, 1.0)])
    lines: list[dict[str, Any]] = []
    with pytest.warns(UserWarning, match=r"no head could be trained.*s0.5 \(Odd2\), s1 \(Odd2\).*forward_features"):
        routed = train_router(blind, "deferral", *images(), radii=RADII, recipe=QUICK, plan_n=1000, log=lines.append)
    assert not len(routed.router.modules)
    assert "no head could be trained" in lines[0]["no_head"]
    with pytest.warns(UserWarning, match="radius asked for is 0"):
        train_router(pool(), "deferral", *images(), radii=[0], recipe=QUICK, plan_n=1000)
    mixed = ExpertPool([*pool(), Expert(Odd2(), sigma=0.7, num_classes=CLASSES, input_shape=SHAPE, name="odd")])
    lines.clear()
    train_router(mixed, "deferral", *images(), radii=RADII, recipe=QUICK, plan_n=1000, log=lines.append)
    assert lines[0]["fewer_heads"].startswith("no features are exposed by odd (Odd2)")


class Odd2(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1))


def test_a_goal_counts_floors_and_weights_by_radius() -> None:
    reached, envelope = np.array([0.6, 0.4, 0.0]), np.array([0.8, 0.4, 0.0])  # nobody holds the last radius
    plain = Goal((0.0, 0.5, 1.0), envelope, floor=0.5)
    assert plain.score(reached) == plain.coverage(reached) == pytest.approx(0.875)
    assert plain.least(reached) == pytest.approx(0.75)
    weighted = replace(plain, weights=np.array([3.0, 1.0, 1.0]))
    assert weighted.score(reached) == pytest.approx((3 * 0.75 + 1.0) / 4)
    strict = replace(plain, floor=np.array([0.9, 0.5, 0.9]))
    assert strict.shortfall(reached) == pytest.approx(0.15)
    assert strict.score(reached) == pytest.approx(0.875 - 5 * 0.15)
    nothing = Goal((2.0,), np.zeros(1), floor=np.array([0.9]))
    assert (nothing.score(np.zeros(1)), nothing.shortfall(np.zeros(1)), nothing.coverage(np.zeros(1))) == (1.0, 0.0, 1.0)


def voters() -> tuple[dict[str, SimulatedVotes], np.ndarray]:
    rng = np.random.default_rng(5)
    labels = np.arange(90) % CLASSES
    found = {}
    for k, sigma in enumerate((0.25, 0.5, 1.0)):
        shares = np.stack([rng.dirichlet(a) for a in np.eye(CLASSES)[labels] * (7.0 - 2.5 * k) + 0.3])
        found[f"s{sigma:g}"] = SimulatedVotes.draw(np.stack([rng.multinomial(60, s) for s in shares]), sigma, 1000, 50, rng)
    return found, labels


def test_never_below_an_expert_is_a_floor_at_its_radius() -> None:
    found, labels = voters()
    goal = goal_of(found, labels, RADII, 0.001, floor={0.25: 0.3}, never_below={1.0: "s1", 0.0: "s0.5"})
    floors = np.asarray(goal.floor)
    assert floors[1:3].tolist() == [0.3, 0.915]
    assert floors[3] == pytest.approx(max(0.915, goal.experts["s1"][3] / goal.envelope[3]))
    assert floors[0] == pytest.approx(max(0.915, goal.experts["s0.5"][0] / goal.envelope[0]))
    name, alone = goal.best_expert()
    assert goal.coverage(alone) == max(goal.coverage(a) for a in goal.experts.values())
    assert name in found


def test_a_higher_floor_moves_the_choice_along_the_frontier() -> None:
    found, labels = voters()
    least = []
    for floor in (0.0, 0.99):
        goal = goal_of(found, labels, RADII, 0.001, floor=floor)
        frontier = Frontier(goal)
        chain, _ = search_chain(found, labels, goal, 0.001, frontier=frontier)
        points = frontier.points()
        assert 1 <= len(points) <= 8
        assert all(a["coverage"] > b["coverage"] and a["least"] < b["least"] for a, b in pairwise(points))
        chosen = next(p for p in points if p["chain"] == [list(stage) for stage in chain])
        assert floor > 0 or chosen == points[0]
        least.append(chosen["least"])
    assert least[1] > least[0]


@pytest.mark.parametrize(
    "wish",
    [
        {"floor": {0.3: 0.9}},
        {"floor": float("nan")},
        {"weights": {0.25: -1.0}},
        {"weights": dict.fromkeys(RADII, 0.0)},
        {"never_below": {1.0: "s9"}},
        {"never_below": {9.0: "s1"}},
        {"never_below": {0.0: "x", 0.25: 3}},
        {"never_below": "s1"},
        {"floor": {"a": 0.9}},
        {"floor": {None: 0.9}},
        {"weights": 3},
        {"weights": {0.25: "much"}},
        {"floor": {0.0: 0.9, "0": 0.5}},
        {"floor": 10**400},
        {"weights": {10**400: 1.0}},
        {"weights": {0.25: 10**400}},
    ],
)
def test_wishes_that_cannot_be_read_are_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"cannot be read|must be a share"):
        Training(pool(), "cascade", *images(), radii=RADII, **wish).checked()


def test_radii_of_wishes_may_be_text_as_in_json() -> None:
    wish = {"floor": {"0.25": 0.99, "0.0": 1.1}, "weights": {"0.25": 2}, "never_below": {"0": "s1"}}
    checked = Training(pool(), "cascade", *images(), radii=RADII, **wish).checked()  # type: ignore[arg-type]
    assert checked.wishes == {"floor": {0.25: 0.99, 0.0: 1.1}, "weights": {0.25: 2}, "never_below": {0.0: "s1"}}


def test_a_record_is_what_the_keywords_say() -> None:
    options: dict[str, Any] = {"radii": RADII, "validation": images(40, 1), "plan_n": 1000}
    one = train_router(pool(), "cascade", *images(), **options)
    training = Training(pool(), "cascade", *images(), **options)
    assert train_router(training).router.digest == one.router.digest
    other = CascadeRouter((0.51,), ("s1", "s0.25"))
    assert train_router(training, router=other).router is other
    assert tune_cascade(training).digest == one.router.digest
    with pytest.raises(InputError, match="No validation images"):
        tune_cascade(replace(training, router="flat", validation=None))


def test_a_bar_is_shown_where_it_is_wanted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"radii": RADII, "validation": images(40, 1), "plan_n": 1000}
    monkeypatch.setattr("rsrouter.training.train.LINE_EVERY", 0.0)
    for show, terminal, seen in ((True, False, True), (None, False, False), (None, True, True), (False, True, False)):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        train_router(pool(), "cascade", *images(), show=show, **options)
        said = capsys.readouterr().err
        assert ("train: 100%" in said) is (seen and terminal)
        assert ("train: 48,000 of 48,000 votes\n" in said) is (seen and not terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train_router(pool(), "cascade", *images(), votes=lambda _: None, **options)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", ["rsrouter.training.resume.write_atomically", "rsrouter.training.train.write_atomically"])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    options: dict[str, Any] = {"radii": RADII, "recipe": SHORT, "label_n": 10, "out": tmp_path / "router"}
    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.raises(ResultsError, match=r"Cannot write.*No space left.*resumes"):
            train_router(pool(), "flat", *images(), **options)
    routed = train_router(pool(), "flat", *images(), **options)  # the same call, with room
    assert json.loads((tmp_path / "router" / "training.jsonl").read_text().splitlines()[0])["kind"] == "flat"
    assert routed.certify(images(2, 3)[0], FixedPlan(20, 100))


def test_labels_of_other_classes_are_refused() -> None:
    x, y = images()
    for wrong in (y + 1, y - 1):
        with pytest.raises(InputError, match="out of range"):
            train_router(pool(), "flat", x, wrong, radii=RADII)
        with pytest.raises(InputError, match="out of range"):
            train_router(pool(), "cascade", x, y, radii=RADII, validation=(x, wrong))


def test_a_flat_router_says_what_it_reaches() -> None:
    lines: list[dict[str, Any]] = []
    training = Training(pool(), "flat", *images(), radii=RADII, recipe=SHORT, validation=images(40, 1), label_n=20, plan_n=1000)
    router, found = flat_router(replace(training, log=lines.append))
    assert found is not None
    assert lines[-1] == found
    assert found["least"] <= found["coverage"]
    assert found["best_expert"]["name"] in pool().names
    assert isinstance(router, FlatRouter)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"seed": -3}, "seed is negative"),
        ({"recipe": "quik"}, "has no recipe"),
        ({"validation": (images(1)[0][:0], images(1)[1][:0])}, "Validation images cannot be read"),
        ({"validation": images(4)[0]}, "Validation images cannot be read"),
        ({"radii": 0.5}, "the radii you care about"),
        ({"radii": "0,0.5"}, "the radii you care about"),
    ],
)
def test_what_a_training_cannot_use_is_told_before_it_begins(wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"radii": RADII, "validation": images(20, 1), "out": tmp_path / "router", **wrong}
    with pytest.raises(InputError, match=told):
        train_router(pool(), "cascade", *images(), **given)
    assert not (tmp_path / "router").exists()


def test_experts_without_a_pool_are_told() -> None:
    with pytest.raises(InputError, match="needs a pool"):
        train_router(list(pool()), "cascade", *images(), radii=RADII)  # type: ignore[arg-type]
