"""`certify_table`: what cannot work is refused before a table is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rsrouter import AdaptivePlan, CascadeRouter, Execution, Expert, ExpertPool, FixedPlan, RoutedSmooth, Smooth, train_router
from rsrouter.core.errors import InputError, NetworkError, PlanError, ResultsError
from rsrouter.core.terms import Terms
from rsrouter.jobs import certify_table, label_table
from rsrouter.results import Table, read_table
from rsrouter.results.table import ARRAYS
from rsrouter.training import label_votes

SHAPE = (1, 4, 4)


def routed(noise: str = "gaussian") -> RoutedSmooth:
    torch.manual_seed(0)
    experts = [
        Expert(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), sigma=s, num_classes=3, input_shape=SHAPE) for s in (0.25, 0.5)
    ]
    return RoutedSmooth(ExpertPool(experts), CascadeRouter([0.6]), noise=noise)


class Images:
    def __init__(self, **odd: Any) -> None:
        self.odd = odd

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.full(SHAPE, index / 4)
        if index == 2:
            return self.odd.get("image", image), self.odd.get("label", 1)
        return image, 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"block": 0},
        {"indices": [0, 1, 0]},
        {"indices": []},
        {"indices": [4]},
        {"terms": None},
        {"terms": Terms(AdaptivePlan(50, (0.0, 9.0), 10))},
        {"batch_size": True},
        {"shard": (2, 2)},
    ],
    ids=str,
)
def test_arguments_are_checked_before_anything_is_written(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises((InputError, PlanError)) as caught:
        certify_table(routed(), Images(), tmp_path / "t.tsv", **{"terms": FixedPlan(10, 50), **arguments})
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_unknown_noise_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Unknown noise"):
        certify_table(routed("uniform"), Images(), tmp_path / "t.tsv", FixedPlan(10, 50))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "odd",
    [
        {"image": torch.zeros(1, 3, 4)},
        {"image": np.zeros(SHAPE, np.float32)},
        {"image": torch.zeros(SHAPE, dtype=torch.uint8)},
        {"image": torch.full(SHAPE, torch.nan)},
        {"label": None},
        {"label": -2},
        {"label": 3},
        {"label": 0.5},
    ],
    ids=str,
)
def test_images_and_labels_that_do_not_fit(tmp_path: Path, odd: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        certify_table(routed(), Images(**odd), tmp_path / "t.tsv", FixedPlan(10, 50))


def test_a_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Broken(Images):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    arguments: dict[str, Any] = {"terms": Terms(FixedPlan(10, 50), seed=np.int64(3))}
    with pytest.raises(KeyboardInterrupt):
        certify_table(routed(), Broken(), tmp_path / "a.tsv", block=1, **arguments)
    again = certify_table(routed(), Images(), tmp_path / "a.tsv", **arguments)
    whole = certify_table(routed(), Images(), tmp_path / "b.tsv", **arguments)
    assert again.idx.tolist() == [0, 1, 2, 3]
    assert list(again.counts_text) == list(whole.counts_text)


def test_an_image_is_decoded_once_and_the_table_in_memory_is_the_one_on_disk(tmp_path: Path) -> None:
    read: list[int] = []

    class Counted(Images):
        fingerprint = "0" * 64

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            read.append(index)
            return super().__getitem__(index)

    class Half(Exception):
        pass

    def stop(running: Any) -> None:
        if running.finished == 2:
            raise Half

    job: dict[str, Any] = {"terms": Terms(FixedPlan(10, 50)), "block": 1}
    with pytest.raises(Half):
        certify_table(routed(), Counted(), tmp_path / "t.tsv", progress=stop, **job)
    certify_table(routed(), Counted(), tmp_path / "whole.tsv", **job)
    read.clear()
    made = certify_table(routed(), Counted(), tmp_path / "another.tsv", **job)
    assert sorted(read) == [0, 1, 2, 3]
    resumed = certify_table(routed(), Counted(), tmp_path / "t.tsv", **job)
    for table in (made, resumed):
        stored = read_table(table.path)
        assert (stored.name, stored.metadata) == (table.name, table.metadata)
        for column in ARRAYS:
            assert getattr(stored, column).dtype == getattr(table, column).dtype
            assert getattr(stored, column).tolist() == getattr(table, column).tolist()


def test_a_table_is_not_continued_over_other_images(tmp_path: Path) -> None:
    """A plain list knows no fingerprint; some of its images and labels do."""
    job: dict[str, Any] = {"terms": Terms(FixedPlan(10, 50), seed=1)}
    same = [(torch.full(SHAPE, i / 40), i % 3) for i in range(40)]
    path = tmp_path / "t.tsv"
    certify_table(routed(), same[:40], path, **job)
    certify_table(routed(), list(same), path, **job)
    for other in (
        [(image * 0.5, label) for image, label in same],
        [(image, (label + 1) % 3) for image, label in same],
        [*same[:-1], (torch.ones(SHAPE), 0)],
    ):
        with pytest.raises(ResultsError, match="data"):
            certify_table(routed(), other, path, **job)


def test_images_of_another_size_begin_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wrong shape") as caught:
        certify_table(routed(), [(torch.zeros(1, 5, 5), 0)], tmp_path / "t.tsv", FixedPlan(10, 50))
    assert "4 x 4" in caught.value.remedy
    assert not list(tmp_path.iterdir())


class Drifts(nn.Module):
    """Names another class after so many calls, told by the class, which no digest sees."""

    after = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits = self.fc(x.flatten(1))
        return logits.roll(1, 1) if self.calls > self.after else logits


@pytest.mark.parametrize("wait", [0.0, 1e9])
def test_no_row_of_a_network_that_changed_on_the_way_reaches_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: float
) -> None:
    """Rows wait for a check after their votes; what is on disk after the error is what an honest network gives."""
    monkeypatch.setattr("rsrouter.jobs.certify.ROWS_WAIT", wait)
    # the two networks are different functions and say so; here both read one noise, to be compared
    monkeypatch.setattr("rsrouter.router.base.vote_digest", lambda *args, **kwargs: "one noise")
    images = [(torch.full(SHAPE, i / 60), i % 3) for i in range(60)]

    def certify(after: int, path: Path) -> Table:
        torch.manual_seed(0)
        monkeypatch.setattr(Drifts, "after", after)
        expert = Expert(Drifts(), sigma=0.5, num_classes=3, input_shape=SHAPE, name="e")
        smooth = Smooth(expert, execution=Execution(batch=20, fold=False))
        return certify_table(smooth, images, path, Terms(FixedPlan(10, 100), seed=1), block=6)

    honest = certify(10**9, tmp_path / "honest.tsv")
    with pytest.raises(NetworkError, match="changed while it was voting"):
        certify(200, tmp_path / "t.tsv")
    left = read_table(tmp_path / "t.tsv")
    assert 0 < len(left) < len(honest)
    for row in range(len(left)):
        at = honest.idx.tolist().index(int(left.idx[row]))
        assert left.counts_text[row] == honest.counts_text[at]


def test_settings_changed_in_place_are_refused() -> None:
    """The table would name the router and the sigma of now, and its certificates be those of before."""
    x, plan = torch.full((1, *SHAPE), 0.5), FixedPlan(10, 50)
    changed = routed()
    changed.router.thresholds = (0.7,)  # type: ignore[attr-defined]
    with pytest.raises(NetworkError, match="The router's setting 'thresholds' was changed"):
        changed.certify(x, plan)
    moved = routed()
    moved.pool[0].sigma = 1.0
    with pytest.raises(NetworkError, match=r"Expert 'sigma_0\.25' was changed"):
        moved.predict(x, n=10)


def test_labels_and_training_refuse_a_changed_expert(tmp_path: Path) -> None:
    pool = routed().pool
    images = torch.rand(12, *SHAPE)
    labels = torch.arange(12) % 3
    with torch.no_grad():
        pool[0].module[1].bias += 1.0  # type: ignore[index]
    for use in (
        lambda: label_votes(pool, images, n=10),
        lambda: label_table(pool, list(zip(images, labels.tolist(), strict=True)), tmp_path / "l.npz", n=10),
        lambda: train_router(pool, "cascade", images, labels, radii=(0.0, 0.5)),
    ):
        with pytest.raises(NetworkError, match="was changed after it was wrapped"):
            use()
    assert not list(tmp_path.iterdir())
