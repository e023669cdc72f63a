"""The second look at validation images on which nearly all votes agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from test_training import RADII, images, pool

from rsrouter import PlanError, train_router
from rsrouter.core.posterior import FEW_DISSENT, nearly_unanimous
from rsrouter.router import Voter
from rsrouter.training import DeferralRecipe, Training
from rsrouter.training.chains import expert_radius
from rsrouter.training.heads import HeadRecipe
from rsrouter.training.looks import SURE_BLOCK, head_look, with_further
from rsrouter.training.resume import ResumeStore
from rsrouter.training.simulated import SimulatedVotes
from rsrouter.training.train import expert_passes

HEADS = (HeadRecipe(hidden=8, steps=60), HeadRecipe(hidden=8, steps=60, cross_entropy=0.5))


def given(count: int) -> Training:
    x, y = images(count, 1)
    return Training(pool(), "deferral", *images(), radii=RADII, validation=(x, y))


def test_only_images_whose_votes_nearly_agree_are_looked_at_again() -> None:
    dissent = np.arange(300) % 9
    counts = np.stack([100 - dissent, dissent, 0 * dissent], 1)[None]
    seen: list[int] = []

    def look(x: torch.Tensor, copies: int, purpose: str) -> list[np.ndarray]:
        assert (copies, purpose) == (1000, "tune sure")
        seen.append(len(x))
        return [np.broadcast_to(np.array([copies - 7, 7, 0]), (1, len(x), 3))]

    before = counts.copy()
    assert (with_further(given(300), (100, 0), [counts], look) == 100).all()
    assert not seen
    totals = with_further(given(300), (100, 1000), [counts], look)
    again = dissent <= FEW_DISSENT
    assert (totals == np.where(again, 1100, 100)).all()
    assert (counts[0].sum(1) == totals).all()
    assert (counts[0, ~again] == before[0, ~again]).all()
    assert sum(seen) == again.sum()
    assert max(seen) <= SURE_BLOCK < sum(seen)


def test_an_image_is_looked_at_again_if_one_of_the_voters_is_sure() -> None:
    sure, split = np.array([[[50, 0]] * 4]), np.array([[[25, 25]] * 4])
    totals = with_further(given(4), (50, 10), [split, sure], lambda x, n, _: [np.full((1, len(x), 2), n // 2)] * 2)
    assert totals.tolist() == [60] * 4
    assert split.tolist() == [[[30, 30]] * 4]


def test_nobody_is_sure_of_votes_that_name_no_class() -> None:
    assert nearly_unanimous(np.array([[0, 0], [1, 0]]), 2).tolist() == [False, True]


def test_every_voter_gets_its_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, list[np.ndarray]] = {}
    draw = SimulatedVotes.draw

    def recorded(votes: np.ndarray, *rest: Any) -> SimulatedVotes:
        asked.setdefault(votes.shape[1], []).append(np.maximum(votes, 0))
        return draw(votes, *rest)

    monkeypatch.setattr(SimulatedVotes, "draw", recorded)
    own = torch.nn.Linear(16, 3)

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = own

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1)) + 9.0 * torch.eye(3)[0]

    x, y = images()
    recipe = DeferralRecipe(copies=4, tune_copies=40, sure_copies=60, levels=(1.1,), heads=HEADS, confidences=(0.4,), stages=2)
    passes: list[int] = []
    options: dict[str, Any] = {"radii": RADII, "recipe": recipe, "validation": images(30, 1), "plan_n": 1000}
    options |= {"networks": [(Voter("s1", 0.7, "own", whole=True), Flat())], "votes": passes.append}
    train_router(pool(), "deferral", x, y, **options)
    counts = [votes for group in asked.values() for votes in group]
    assert len(counts) == len(pool()) + 2 * len(HEADS) + 2  # experts; heads and the network, each with a confidence and without
    again = [votes.sum(1) == 100 for votes in counts]
    assert sum(rows.any() for rows in again) >= 3
    assert not all(rows.all() for rows in again)
    for votes, rows in zip(asked[3], [votes.sum(1) == 100 for votes in asked[3]], strict=True):  # every vote counts there
        assert not nearly_unanimous(votes[~rows], 40).any()
    assert all(np.isin(votes.sum(1), (40, 100)).all() for votes in counts)
    assert sum(passes) == expert_passes(Training(pool(), "deferral", x, y, **options))  # the bar ends where it says


def test_it_draws_other_noise_than_the_first() -> None:
    training = given(20)
    first = training.expert_votes(training.held_out[0], 60, "tune")
    second = training.expert_votes(training.held_out[0], 60, "tune sure")
    assert (first != second).any()


def test_the_far_end_is_promised_better() -> None:
    """Radius 3.05 at sigma 1 needs dissent of at most one in a thousand; here it is 1.5 in a thousand, and 400 votes all agree on
    half of the images: 4,000 more tell that nobody holds the radius."""
    rng = np.random.default_rng(0)
    share = np.repeat([0.0015, 0.02], 1000)
    few = np.stack([rng.binomial(400, 1 - share), np.zeros(2000, int)], 1)
    few[:, 1] = 400 - few[:, 0]
    more = few.copy()
    rows = nearly_unanimous(few, 400)
    further = rng.binomial(4000, share[rows])
    more[rows] += np.stack([4000 - further, further], 1)
    assert binom.cdf(100_000 * 0.001, 100_000, share).max() < 0.01  # the truth

    def held(votes: np.ndarray) -> float:
        c, radius = expert_radius(SimulatedVotes.draw(votes, 1.0, 100_000, 100, np.random.default_rng(1)), 0.001)
        return float(np.mean((c == 0) & (radius >= 3.05)))

    assert held(few) > 0.15
    assert held(more) < 0.1


def test_further_copies_are_a_count() -> None:
    for odd in (-1, 1.5, "many"):
        with pytest.raises(PlanError, match=r"sure_copies.*ten times tune_copies"):
            DeferralRecipe(sure_copies=odd)  # type: ignore[arg-type]


def test_further_copies_of_heads_are_stored_as_counts(tmp_path: Path) -> None:
    readers, training = list(pool()), given(8)
    x = training.held_out[0]
    width = training.features(readers, 0.7, x[:1], 1, "tune").shape[-1]
    heads = {"h": torch.nn.Linear(width, 3)}
    kept = replace(training, store=ResumeStore(tmp_path))
    first = head_look(kept, readers, 0.7, 1, heads, [0.0], x, 500, "tune sure")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 8 * 500 * width
    again = head_look(replace(kept, votes=pytest.fail), readers, 0.7, 1, heads, [0.0], x, 500, "tune sure")  # draws nothing
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = head_look(kept, readers, 0.7, 1, {"h": torch.nn.Linear(width, 3)}, [0.0], x, 500, "tune sure")
    assert (other[0] != first[0]).any()
