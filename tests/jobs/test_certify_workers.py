"""Certificates by one process, two, three shards, and two actors of a Ray cluster: the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rsrouter import AdaptivePlan, Execution, ExpertPool, FixedPlan, RoutedSmooth, Terms
from rsrouter.cli import app
from rsrouter.cli.jobs import duration
from rsrouter.core.errors import InputError, NetworkError, ResultsError, WorkerError
from rsrouter.core.plans import Plan
from rsrouter.jobs import certify_table, estimate_table, label_table, merge_labels
from rsrouter.jobs.workers import Processes
from rsrouter.results import merge_tables, read_table
from rsrouter.training.label_files import load_votes
from tests.helpers import small_router as small
from tests.helpers.fake_work import FakeWorker, run, untimed
from tests.helpers.hub_server import HubServer

DATA = small.images(30)


def pool() -> ExpertPool:
    return ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])


def certify(out: Path, terms: Terms | Plan = small.PLAN, **options: Any) -> list[list[str]]:
    certify_table(small.routed(pool()), DATA, out, terms, **{"threads": 1, "data": {"name": "columns"}, **options})
    return untimed(out)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """One process."""
    return certify(tmp_path_factory.mktemp("one") / "t.tsv")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(3):
        certify(folder / f"{i}.tsv", shard=(i, 3))
    return [folder / f"{i}.tsv" for i in range(3)]


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers fork from this process, which has torch already; a script at the end of this file spawns one."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    monkeypatch.setattr("rsrouter.jobs.driver.Processes", partial(Processes, method="fork"))
    torch.set_num_threads(1)  # a forked child of a process with OpenMP threads may hang


def test_two_workers(tmp_path: Path, one: list[list[str]], forks: None) -> None:
    assert certify(tmp_path / "t.tsv", workers=2) == one


def test_three_shards_one_of_them_twice(tmp_path: Path, one: list[list[str]], shards: list[Path]) -> None:
    merge_tables([shards[2], shards[0], shards[1], shards[0]], tmp_path / "t.tsv")
    assert untimed(tmp_path / "t.tsv") == one


def test_a_missing_shard(tmp_path: Path, shards: list[Path]) -> None:
    with pytest.raises(ResultsError, match="missing"):
        merge_tables(shards[:2], tmp_path / "t.tsv")


def test_shards_of_different_configurations(tmp_path: Path, shards: list[Path]) -> None:
    certify(tmp_path / "other.tsv", FixedPlan(50, 999), shard=(2, 3))
    with pytest.raises(ResultsError, match="another run") as caught:
        merge_tables([*shards[:2], tmp_path / "other.tsv"], tmp_path / "t.tsv")
    assert "terms.plan.n" in caught.value.received


def test_a_table_begun_by_one_process_is_finished_by_another_kind(tmp_path: Path, one: list[list[str]]) -> None:
    class Stop(Exception):
        pass

    def stop(running: Any) -> None:
        if running.finished >= 8:
            raise Stop

    with pytest.raises(Stop):
        certify(tmp_path / "t.tsv", block=4, progress=stop)
    assert 8 <= len(read_table(tmp_path / "t.tsv")) < len(DATA)
    assert certify(tmp_path / "t.tsv", shard=None) == one


def test_a_shard_without_images(tmp_path: Path) -> None:
    for shard in ((30, 31), (2, 2), (-1, 2)):
        with pytest.raises(InputError, match="shard") as caught:
            certify(tmp_path / "t.tsv", shard=shard)
        assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_what_is_certified_stays_as_the_caller_made_it(tmp_path: Path) -> None:
    routed = small.routed(pool())
    arguments: dict[str, Any] = {"terms": FixedPlan(20, 100), "indices": range(2), "threads": 1}
    table = certify_table(routed, DATA, tmp_path / "a.tsv", **arguments)
    estimate_table(routed, DATA, seconds=0.1, sample=1, **arguments)
    assert table.metadata["execution"]["batch"] > 0
    # the next job may be on another device, whose batch is another
    assert routed.execution == Execution()


@pytest.mark.parametrize("most", [0, 100])
def test_a_job_keeps_its_batch_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    def full(self: Any, x: torch.Tensor) -> torch.Tensor:
        if len(x) > most:
            raise torch.OutOfMemoryError("no memory")
        return x.flatten(1)

    monkeypatch.setattr(torch.nn.Flatten, "forward", full)
    for name in ("t.tsv", "t.tsv"):  # the second goes on with what the first began
        with pytest.raises(NetworkError, match="ran out of memory") as caught:
            certify(tmp_path / name)
        batch = json.loads((tmp_path / "t.json").read_text())["execution"]["batch"]
        assert f"room for {batch} rows" in caught.value.expected
    assert (tmp_path / "t.tsv").read_text().count("\n") == 1


@pytest.mark.parametrize("key", ["threads", "instructions"])
def test_a_table_is_not_finished_under_another_rounding(tmp_path: Path, key: str) -> None:
    certify(tmp_path / "t.tsv", indices=range(2))
    metadata = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**metadata, "info": {**metadata["info"], key: 7}}))
    with pytest.raises(ResultsError) as caught:
        certify(tmp_path / "t.tsv", indices=range(2))
    assert "7" in str(caught.value)


def test_estimate_of_both_kinds_of_plan() -> None:
    found = estimate_table(small.routed(pool()), DATA, FixedPlan(50, 1000), threads=1, grid=(0.0, 0.25), seconds=0.2, sample=8)
    fixed, adaptive = found.costs
    assert (found.images, found.sampled, found.workers) == (30, 8, 1)
    assert (fixed.plan["kind"], adaptive.plan["kind"]) == ("fixed", "adaptive")
    # a router and at least one expert, at most both
    assert 2 * 1050 <= fixed.votes_per_image <= 3 * 1050
    assert 0 < adaptive.votes_per_image < fixed.votes_per_image
    assert fixed.seconds > 0
    half = estimate_table(small.routed(pool()), DATA, FixedPlan(50, 1000), threads=1, shard=(0, 2), seconds=0.2, sample=8)
    assert half.images == 15
    assert [cost.beta for cost in found.patience] == [0.01, 0.05, 0.1, 0.2, 0.5]
    assert found.patience[-1].votes < found.patience[0].votes
    other = estimate_table(
        small.routed(pool()), DATA, AdaptivePlan(1000, (0.0, 0.25), 50, beta=0.3), threads=1, seconds=0.2, sample=2
    )
    assert [cost.beta for cost in other.patience] == [0.01, 0.05, 0.1, 0.2, 0.3, 0.5]


def test_labels_by_two_workers(tmp_path: Path, forks: None) -> None:
    for name, options in (("one", {}), ("two", {"workers": 2})):
        label_table(pool(), DATA, tmp_path / name, n=20, threads=1, unseen=True, **options)
    (a, ya, ma), (b, yb, mb) = (load_votes(tmp_path / name, pool()) for name in ("one", "two"))
    assert a.tolist() == b.tolist()
    assert (ya.tolist(), ma) == (yb.tolist(), mb)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Labels by one process, and by three shards."""
    folder = tmp_path_factory.mktemp("labels")
    for name, shard in (("whole", None), ("0", (0, 3)), ("1", (1, 3)), ("2", (2, 3))):
        label_table(pool(), DATA, folder / f"{name}.npz", n=20, threads=1, unseen=True, shard=shard)
    assert len(list(folder.iterdir())) == 4
    return folder / "whole.npz", [folder / f"{i}.npz" for i in range(3)]


def test_labels_by_three_shards_one_of_them_twice(tmp_path: Path, labels: tuple[Path, list[Path]]) -> None:
    whole, parts = labels
    out = merge_labels([parts[2], parts[0], parts[1], parts[0]], tmp_path / "out" / "all.npz")
    assert out.read_bytes() == whole.read_bytes()
    assert merge_labels(parts, out) == out  # and again
    assert out.read_bytes() == whole.read_bytes()
    command = ["merge", *map(str, parts), "--out", str(tmp_path / "told.npz")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "told.npz").read_bytes() == whole.read_bytes()
    assert isinstance(CliRunner().invoke(app, [*command, "--partial"]).exception, InputError)


def test_labels_that_do_not_merge(tmp_path: Path, labels: tuple[Path, list[Path]]) -> None:
    whole, parts = labels
    with pytest.raises(ResultsError, match="no shard 1"):
        merge_labels([parts[0], parts[2]], tmp_path / "out.npz")
    with pytest.raises(ResultsError, match="not a shard"):
        merge_labels([*parts, whole], tmp_path / "out.npz")
    with pytest.raises(ResultsError, match="not a shard"):
        merge_labels([*parts, tmp_path / "none.npz"], tmp_path / "out.npz")
    with pytest.raises(ResultsError, match="nothing to merge"):
        merge_labels([], tmp_path / "out.npz")
    label_table(pool(), DATA, tmp_path / "other.npz", n=21, threads=1, unseen=True, shard=(1, 3))
    with pytest.raises(ResultsError, match=r"n: 20 against 21"):
        merge_labels([parts[0], tmp_path / "other.npz", parts[2]], tmp_path / "out.npz")
    with np.load(parts[1]) as file:
        content = dict(file)
    content["votes"] = content["votes"][::-1]
    np.savez(tmp_path / "damaged.npz", **content)
    with pytest.raises(ResultsError, match="disagree"):
        merge_labels([*parts, tmp_path / "damaged.npz"], tmp_path / "out.npz")
    content["votes"] = content["votes"][1:]
    np.savez(tmp_path / "damaged.npz", **content)
    with pytest.raises(ResultsError, match="not a shard"):
        merge_labels([parts[0], tmp_path / "damaged.npz", parts[2]], tmp_path / "out.npz")
    with pytest.raises(ResultsError, match="other labels"):
        merge_labels(parts, parts[0])
    assert not (tmp_path / "out.npz").exists()


def test_labels_that_were_killed_at_their_last_step(tmp_path: Path, labels: tuple[Path, list[Path]]) -> None:
    (tmp_path / "a.npz").write_bytes(labels[0].read_bytes())
    for name in ("a.npz.part.tsv", "a.npz.part.json"):
        (tmp_path / name).write_text("{}")
    label_table(pool(), DATA, tmp_path / "a.npz", n=20, threads=1, unseen=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_the_command_line(tmp_path: Path, hub: HubServer) -> None:
    small.routed(small.put_experts(hub, tmp_path)).save_pretrained(tmp_path / "router")
    images, labels = DATA.tensors()
    np.savez(tmp_path / "d.npz", images=(images * 255).round().to(torch.uint8).numpy(), labels=labels.numpy())
    words = ["certify", str(tmp_path / "router"), "--data", str(tmp_path / "d.npz"), "--plan", "fixed", "--n", "1000"]
    words += ["--radii", "0,0.25", "--threads", "1", "--count", "12", "--format", "json"]
    result = CliRunner().invoke(app, [*words, "--estimate", "--shard", "1/2"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["images"], [c["plan"]["kind"] for c in told["costs"]]) == (6, ["fixed", "adaptive"])
    assert not (tmp_path / "t.tsv").exists()
    for i in range(2):
        out = tmp_path / f"{i}.tsv"
        result = CliRunner().invoke(app, [*words, "--out", str(out), "--shard", f"{i}/2"])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(
        app, ["merge", str(tmp_path / "0.tsv"), str(tmp_path / "1.tsv"), "--out", str(tmp_path / "t.tsv")]
    )
    assert result.exit_code == 0, result.output
    assert read_table(tmp_path / "t.tsv").idx.tolist() == list(range(12))
    assert "set --threads" not in result.stderr
    told = CliRunner().invoke(
        app, [w for w in words if w not in ("--threads", "1")] + ["--out", str(tmp_path / "x.tsv"), "--shard", "0/12"]
    )
    assert "set --threads" in told.stderr
    for odd, message in ((["--workers", "0"], "workers"), (["--shard", "2/2"], "shard"), (["--stream"], "streamed")):
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "odd.tsv"), *odd])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)
    assert isinstance(CliRunner().invoke(app, words).exception, InputError)  # no --out


def test_labels_on_the_command_line(tmp_path: Path, hub: HubServer) -> None:
    small.put_experts(hub, tmp_path).save(tmp_path / "pool.json")
    images, classes = DATA.tensors()
    np.savez(tmp_path / "d.npz", images=(images * 255).round().to(torch.uint8).numpy(), labels=classes.numpy())
    words = ["label", str(tmp_path / "pool.json"), "--data", str(tmp_path / "d.npz"), "--n", "20", "--unseen", "--threads", "1"]
    for name, more in (("whole", []), ("0", ["--shard", "0/2"]), ("1", ["--shard", "1/2"])):
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / f"{name}.npz"), *more])
        assert result.exit_code == 0, result.output
    merge = ["merge", str(tmp_path / "1.npz"), str(tmp_path / "0.npz"), "--out", str(tmp_path / "all.npz"), "--format", "json"]
    result = CliRunner().invoke(app, merge)
    assert json.loads(result.stdout) == {"labels": str(tmp_path / "all.npz")}
    assert (tmp_path / "all.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "odd.npz"), "--shard", "2/2"])
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.2, "3 s"), (119.0, "119 s"), (720.0, "12 min"), (9000.0, "2.5 h"), (3e5, "3.5 days"), (float("nan"), "?")],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ray_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="Ray is not installed") as caught:
        certify(tmp_path / "t.tsv", ray="auto")
    assert "rsrouter[ray]" in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere", "127.0.0.1:x", "127.0.0.1"])
def test_an_address_where_no_cluster_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    class Ray:  # would try for minutes
        def is_initialized(self) -> bool:
            return False

        def init(self, **options: Any) -> None:
            raise ValueError("Ray was asked")

    monkeypatch.setattr("rsrouter.jobs.ray_workers._import_ray", Ray)
    with pytest.raises(WorkerError, match="not reached") as caught:
        certify(tmp_path / "t.tsv", ray=address)
    assert address in caught.value.received
    assert "was asked" not in caught.value.received
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two cores on this machine, for all tests of this file."""
    ray = pytest.importorskip("ray")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_worker_niceness", "0")
    here = Path(__file__).parent
    patch.setenv("PYTHONPATH", f"{here}:{here.parents[1]}:{os.environ.get('PYTHONPATH', '')}")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=200 * 2**20)
    yield "auto"
    ray.shutdown()
    patch.undo()


@pytest.mark.slow
def test_two_actors_of_a_ray_cluster(tmp_path: Path, one: list[list[str]], cluster: str) -> None:
    assert certify(tmp_path / "t.tsv", ray=cluster, workers=2) == one


@pytest.mark.slow
def test_an_actor_killed_in_the_middle_of_an_image(tmp_path: Path, cluster: str) -> None:
    from rsrouter.jobs.ray_workers import RayActors

    run(tmp_path / "whole.tsv")
    (tmp_path / "die-7").write_text("x")
    run(tmp_path / "t.tsv", RayActors(cluster, 2, None, 1), FakeWorker(str(tmp_path)))
    assert (tmp_path / "die-7").read_text() == ""
    assert untimed(tmp_path / "t.tsv") == untimed(tmp_path / "whole.tsv")


@pytest.mark.slow
def test_more_actors_than_cores(tmp_path: Path, cluster: str) -> None:
    with pytest.raises(InputError, match="fewer resources than the workers need"):
        certify(tmp_path / "t.tsv", ray=cluster, workers=3, threads=1)


DRIVER = """
import sys
from tests.helpers import small_router as small
from test_certify_workers import certify
from pathlib import Path

if __name__ == "__main__":
    certify(Path(sys.argv[1]), workers=2)
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_and_started_again(tmp_path: Path, one: list[list[str]]) -> None:
    (tmp_path / "job.py").write_text(DRIVER)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    out = tmp_path / "t.tsv"
    job = subprocess.Popen([sys.executable, str(tmp_path / "job.py"), str(out)], env=environment)
    while job.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 3):
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert certify(out, workers=2) == one


def certify_few(out: Path) -> list[list[str]]:
    """A job of small networks that takes a tenth of a second, a few images at a time."""
    return certify(out, FixedPlan(20, 200), indices=range(12), block=4)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="jobs fork here")
def test_a_thousand_kills_of_jobs_with_networks(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a forked child of a process with OpenMP threads may hang
    rng = random.Random(4)
    certify_few(tmp_path / "warm.tsv")
    start = time.monotonic()
    whole = certify_few(tmp_path / "whole.tsv")
    span, left = time.monotonic() - start, []
    for trial in range(1000):
        out = tmp_path / f"{trial}.tsv"
        if (pid := os.fork()) == 0:
            try:
                certify_few(out)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 1.5 * span))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left.append(out.read_bytes().count(b"\n") - 1 if out.exists() else -1)
        assert certify_few(out) == whole
        out.unlink()
    print(f"rows left by a kill: { {n: left.count(n) for n in sorted(set(left))} }")
    assert {4, 8} <= set(left)  # the kills fell into the job


def test_routed_classifiers_can_be_sent() -> None:
    import pickle

    routed = small.routed(pool())
    assert isinstance(again := pickle.loads(pickle.dumps(routed)), RoutedSmooth)
    assert again.digest == routed.digest


SCRIPT = """
import sys
import torch
from torch import nn
from rsrouter import Expert, FixedPlan, Smooth
from rsrouter.jobs import certify_table


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))


if __name__ == "__main__":
    torch.manual_seed(0)
    expert = Expert(Mine(), sigma=0.5, num_classes=3, input_shape=(1, 4, 4), name="mine")
    images = [(torch.full((1, 4, 4), i / 4), 1) for i in range(4)]
    tables = [
        certify_table(Smooth(expert), images, f"{sys.argv[1]}/{name}.tsv", FixedPlan(10, 50), threads=1, **more)
        for name, more in (("here", {}), ("there", {"workers": 1}))
    ]
    print(len(tables[1]))
"""


def test_a_network_that_a_script_defines_is_the_same_in_its_workers(tmp_path: Path) -> None:
    """In a process of its own, whose rows are those of the script's own process. There its class belongs to `__mp_main__`,
    which must not make it another network."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "4", done.stderr
    assert untimed(tmp_path / "there.tsv") == untimed(tmp_path / "here.tsv")
