"""The card's command gives the same plan, and says which images and which freedom there was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsrouter import AdaptivePlan, CascadeRouter, ExpertPool, FixedPlan, InputError, RoutedSmooth, Terms
from rsrouter.cli.reading import make_plan
from rsrouter.core.errors import PlanError
from rsrouter.core.plans import Plan
from rsrouter.jobs import certify_table
from rsrouter.publish.commands import certify_command, freedom, images_in_words, plan_options
from rsrouter.results import read_table
from tests.helpers import small_router as small

PLANS = [
    FixedPlan(50, 1000),
    AdaptivePlan(1000, (0.1, 1 / 3, 0.1 + 0.2), 37),
    AdaptivePlan(1000, (0.25,), 50, beta=0.0123456789012345),
    AdaptivePlan(1000, (0.25,), 50, growth=1.7, first=60, last_share=0.8),
    AdaptivePlan(1000, (0.25,), 50, bound="mixture"),
    AdaptivePlan(1000, (0.25,), 50, spending="even"),
]


@pytest.fixture
def router() -> RoutedSmooth:
    return small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_options_give_the_plan_back(plan: Plan) -> None:
    words = plan_options(plan)
    given = dict(zip(words[::2], words[1::2], strict=True))
    read = make_plan(given["--plan"], int(given.get("--n", 1)), int(given.get("--n0", 1)), given.get("--radii", "0"))
    assert read.to_dict() == plan.to_dict()


@pytest.mark.parametrize("text", ["{", '{"kind": "adaptive"}', '{"kind": "fixed", "n0": "x", "n": 5}', "{}", '{"kind": 3}'])
def test_a_plan_that_is_none(text: str) -> None:
    with pytest.raises((InputError, PlanError)):
        make_plan(text, 1000, 50, "0")


def test_seed_and_execution_are_in_the_command(router: RoutedSmooth, tmp_path: Path) -> None:
    derived = certify_table(router, small.images(4), tmp_path / "a.tsv", small.PLAN, seed_from="2026-11-28 it's", threads=1)
    command = certify_command(derived, "org/router")
    assert "--seed-from '2026-11-28 it'\"'\"'s'" in command
    assert "--threads 1" in command
    chosen = certify_table(router, small.images(4), tmp_path / "b.tsv", Terms(small.PLAN, alpha=0.1 + 0.2, seed=7))
    command = certify_command(chosen, "org/router")
    assert " --seed 7 " in command
    assert " --alpha 0.30000000000000004 " in command


def test_what_a_publisher_could_have_varied(router: RoutedSmooth, tmp_path: Path) -> None:
    cascade = RoutedSmooth(router.pool, CascadeRouter((0.625,)))
    derived = certify_table(cascade, small.images(2), tmp_path / "a.tsv", small.PLAN, seed_from="a commit")
    first, second = freedom(derived.described(), cascade.router)
    assert "from the public text 'a commit'" in first
    assert "the threshold or noise level (3 decimals)" in second
    chosen = certify_table(cascade, small.images(2), tmp_path / "b.tsv", Terms(small.PLAN, seed=7))
    assert "chosen by hand" in freedom(chosen.described(), cascade.router)[0]


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (None, "all 8 images"),
        (range(2, 8, 3), "2 of 8 images, one in 3, from number 2 on"),
        ([0, 1, 5], "3 of 8 images, PICKED ONE BY ONE (numbers 0, 1, 5, ...)"),
        ([7, 4, 1], "PICKED ONE BY ONE"),
    ],
)
def test_images_picked_by_hand_are_called_that(router: RoutedSmooth, tmp_path: Path, indices, words: str) -> None:
    table = certify_table(router, small.images(8), tmp_path / "t.tsv", small.PLAN, indices=indices)
    assert words in images_in_words(table.described())
    if "PICKED" in words:
        assert "--start" not in certify_command(table, "org/router")


def test_the_command_is_read_from_the_table_alone(router: RoutedSmooth, tmp_path: Path) -> None:
    table = certify_table(router, small.images(2), tmp_path / "t.tsv", small.PLAN, data={"name": "$(rm -rf x)"})
    assert "--data DATA" in certify_command(read_table(table.path), "org/router")
    assert json.loads((tmp_path / "t.json").read_text())["data"]["name"] == "$(rm -rf x)"
