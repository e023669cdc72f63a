"""What a training says of a choice that rests on too little, and what it refuses before it spends hours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import CLASSES, SHAPE, images, pool
from torch import nn

from rsrouter import CheckpointError, Expert, ExpertPool, InputError, train_router
from rsrouter.training import Labels

RADII = (0.0, 0.25, 0.5)


def told(kind: str = "cascade", **settings: Any) -> list[str]:
    """What a training warns of."""
    given = {"radii": RADII, "validation": images(120, 1), "plan_n": 1000, "label_n": 5, **settings}
    lines: list[dict[str, Any]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_router(pool(), kind, *images(), log=lines.append, **given)
    in_words = [str(w.message) for w in caught if w.category is UserWarning]
    assert in_words == [line["doubt"] for line in lines if "doubt" in line]
    return in_words


def test_a_sound_choice_is_told_nothing() -> None:
    assert told() == []


def test_few_validation_images() -> None:
    for seed in range(20):  # a good expert may well be wrong on one image: no word about labels
        first, *others = told(radii=[0.0], validation=images(1, seed))
        assert first.startswith("only 1 validation image:")
        assert not any("labels" in text for text in others)
    (text,) = told(radii=[0.0], validation=images(99, 1))
    assert text.startswith("only 99 validation images:")


def test_radii_that_no_expert_reaches() -> None:
    (text,) = told(radii=[0.0, 0.25, 50.0])
    assert "at radius 50: this radius counts for nothing" in text
    (text,) = told(radii=[0.0, 40.0, 50.0])
    assert "at radii 40, 50: these radii count for nothing" in text


@pytest.mark.parametrize("validation", [True, False])
def test_labels_of_another_order(validation: bool) -> None:
    x, y = images(120, 1)
    wrong = (y + 1) % CLASSES
    if validation:
        found = told(validation=(x, wrong))
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_router(pool(), "flat", x, wrong, radii=RADII, label_n=20, plan_n=1000)
        found = [str(w.message) for w in caught]
    assert any("are the labels numbered as the experts number their classes?" in text for text in found)


def test_validation_images_that_are_training_images() -> None:
    x, y = images()
    other, labels = images(120, 1)
    both = (torch.cat([x[:3], other]), torch.cat([y[:3], labels]))
    (text,) = told("flat", validation=both)
    assert text.startswith("3 of 123 validation images are training images too")
    assert told(validation=both) == []  # a cascade of frozen experts trains on no image


def test_images_that_are_given_twice_are_split_into_both_parts() -> None:
    x, y = images()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_router(pool(), "deferral", torch.cat([x, x]), torch.cat([y, y]), radii=RADII, plan_n=1000, recipe="quick")
    assert any("validation images are training images too" in str(w.message) for w in caught)


def test_each_training_is_told_and_in_the_line_that_asked_for_it() -> None:
    """Under the filters a process starts with, which show a text once for each line of code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(2):
            train_router(pool(), "cascade", *images(), radii=[0.0], validation=images(12, 1), plan_n=1000)
    few = [w for w in caught if "only 12 validation images" in str(w.message)]
    assert [Path(w.filename).name for w in few] == [Path(__file__).name] * 2


@pytest.mark.parametrize("kind", ["flat", "deferral", "auto"])
def test_each_kind_tells_once(kind: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_router(pool(), kind, *images(), radii=[0.0], validation=images(20, 1), label_n=5, plan_n=1000)
    assert sum("only 20 validation images" in str(w.message) for w in caught) == 1


class Private(nn.Module):
    """A module that no file can describe."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.fc(x.flatten(1)))


@pytest.mark.parametrize("cut", [(slice(1), slice(None)), (slice(None), slice(1)), (slice(None), slice(None))])
def test_labels_of_other_images_or_experts_are_refused(cut: tuple[slice, slice]) -> None:
    x, y = images()
    whole = np.zeros((len(x), len(pool())))
    labels = Labels(whole[cut], whole.astype(np.int64)[:, :1])
    with pytest.raises(InputError, match="Routing labels do not fit"):
        train_router(pool(), "flat", x, y, radii=RADII, routing_labels=labels)


def test_what_cannot_be_saved_is_told_before_the_training(tmp_path: Path) -> None:
    experts = [Expert(Private(), sigma=s, num_classes=CLASSES, input_shape=SHAPE, name=f"s{s:g}") for s in (0.5, 1.0)]
    votes: list[int] = []
    with pytest.raises(CheckpointError, match="Private cannot be written down"):
        train_router(ExpertPool(experts), "cascade", *images(), radii=RADII, out=tmp_path / "router", votes=votes.append)
    assert votes == []
    assert not (tmp_path / "router").exists()
    # in memory it may be trained
    assert train_router(ExpertPool(experts), "cascade", *images(), radii=RADII, plan_n=1000).router.kind == "cascade"


@pytest.mark.parametrize("floor", [95, -0.1, float("nan"), "much", {0.0: 20.0}])
def test_a_floor_is_a_share(floor: Any) -> None:
    with pytest.raises(InputError, match="A floor must be a share"):
        train_router(pool(), "cascade", *images(), radii=RADII, floor=floor)
