"""One process, several, shards, and what dies on the way: the table is the same.

Workers fork from this process, which has torch already; `test_certify_workers.py` spawns one.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rsrouter.core.errors import InputError, NetworkError, ResultsError, WorkerError
from rsrouter.jobs.devices import check_workers, local_resources, stored_threads
from rsrouter.jobs.driver import Reader, Running, run_job
from rsrouter.jobs.workers import machine_facts
from rsrouter.results import ResultsWriter, read_table
from tests.helpers.fake_work import COUNT, METADATA, FakeWorker, Images, pool, run, untimed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers fork here")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a forked child of a process with OpenMP threads may hang


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What one uninterrupted run in one process writes."""
    path = tmp_path_factory.mktemp("whole") / "t.tsv"
    run(path)
    return untimed(path)


def forked(job: Callable[[], object]) -> int:
    """Starts `job` in a forked child, in a process group of its own."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            job()
            code = 0
        except BaseException as error:
            print(type(error), error)
        finally:
            os._exit(code)
    return pid


def test_workers_write_what_one_process_writes(tmp_path: Path, whole: list[list[str]]) -> None:
    said: list[Running] = []
    run(tmp_path / "t.tsv", pool(2, "fork"), progress=said.append)
    assert untimed(tmp_path / "t.tsv") == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.tsv"]
    assert (said[-1].finished, said[-1].total, said[-1].votes) == (COUNT, COUNT, 10 * COUNT)
    assert said[-1].remaining == 0.0
    assert all(a.seconds <= b.seconds for a, b in pairwise(said))


def test_a_worker_killed_in_the_middle_of_an_image(tmp_path: Path, whole: list[list[str]]) -> None:
    for idx, times in ((0, 1), (7, 2), (COUNT - 1, 1)):
        (tmp_path / f"die-{idx}").write_text("x" * times)
    run(tmp_path / "t.tsv", pool(2, "fork"), FakeWorker(str(tmp_path)))
    assert untimed(tmp_path / "t.tsv") == whole
    assert (tmp_path / "die-7").read_text() == ""


def test_an_image_that_kills_every_worker_is_named_and_the_others_are_kept(tmp_path: Path, whole: list[list[str]]) -> None:
    (tmp_path / "die-7").write_text("x" * 100)
    with pytest.raises(WorkerError, match="Image 7 ended 3 workers") as caught:
        run(tmp_path / "t.tsv", pool(2, "fork"), FakeWorker(str(tmp_path)))
    assert "SIGKILL" in caught.value.received
    assert set(read_table(tmp_path / "t.tsv").idx.tolist()) == set(range(COUNT)) - {7}
    run(tmp_path / "t.tsv")
    assert untimed(tmp_path / "t.tsv") == whole


def test_workers_that_never_start(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="again and again"):
        run(tmp_path / "t.tsv", pool(2, "fork"), FakeWorker(dead=True))


def test_an_error_of_the_work_ends_the_job_with_that_error(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="odd") as caught:
        run(tmp_path / "t.tsv", pool(2, "fork"), FakeWorker(fails=11))
    assert caught.value.remedy == "none"


def test_work_that_cannot_be_sent(tmp_path: Path) -> None:
    class Local(FakeWorker):
        pass

    with pytest.raises(InputError, match="cannot be sent"):
        run(tmp_path / "t.tsv", pool(2, "fork"), Local())


def random_kills(folder: Path, whole: list[list[str]], trials: int, seed: int) -> list[int]:
    """Kills drivers of two workers at random times; how many rows each left."""
    rng, left = random.Random(seed), []
    start = time.monotonic()
    os.waitpid(forked(lambda: run(folder / "timed.tsv", pool(2, "fork"), FakeWorker(seconds=0.002))), 0)
    span = time.monotonic() - start
    for trial in range(trials):
        path = folder / f"{trial}.tsv"
        pid = forked(lambda path=path: run(path, pool(2, "fork"), FakeWorker(seconds=0.002)))  # type: ignore[misc]
        time.sleep(rng.uniform(0, span))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left.append(path.read_bytes().count(b"\n") - 1 if path.exists() else -1)
        run(path)
        assert untimed(path) == whole
    return left


def test_drivers_killed_at_random_times(tmp_path: Path, whole: list[list[str]]) -> None:
    random_kills(tmp_path, whole, 15, seed=1)


@pytest.mark.slow
def test_a_thousand_drivers_killed_at_random_times(tmp_path: Path, whole: list[list[str]]) -> None:
    left = random_kills(tmp_path, whole, 1000, seed=2)
    print(f"rows left by a kill: {sorted(set(left))}")
    assert len(set(left)) > 3  # the kills fell into the job


@pytest.mark.slow
def test_a_thousand_kills_of_workers(tmp_path: Path, whole: list[list[str]]) -> None:
    rng = random.Random(3)
    for trial in range(1000):
        folder = tmp_path / str(trial)
        folder.mkdir()
        for idx in rng.sample(range(COUNT), 2):
            (folder / f"die-{idx}").write_text("x")
        run(folder / "t.tsv", pool(2, "fork"), FakeWorker(str(folder)))
        assert untimed(folder / "t.tsv") == whole


def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    pid = forked(lambda: run(tmp_path / "t.tsv", pool(2, "fork"), FakeWorker(seconds=30.0)))
    children: set[str] = set()
    for _ in range(200):
        children = set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if len(children) == 2:
            break
        time.sleep(0.05)
    assert len(children) == 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for _ in range(200):
        if not any(_alive(child) for child in children):
            return
        time.sleep(0.05)
    pytest.fail("a worker outlived its driver")


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_torn_last_line(tmp_path: Path, whole: list[list[str]]) -> None:
    path = tmp_path / "t.tsv"
    run(path)
    path.write_bytes(path.read_bytes()[:-20])
    run(path, pool(2, "fork"))
    assert untimed(path) == whole


def test_a_full_disk_keeps_what_was_done(tmp_path: Path, whole: list[list[str]]) -> None:
    path = tmp_path / "t.tsv"

    def job() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
        with pytest.raises(ResultsError, match="Cannot write"):
            run(path, pool(2, "fork"))

    assert os.waitpid(forked(job), 0)[1] == 0
    assert 0 < len(read_table(path)) < COUNT
    run(path, pool(2, "fork"))
    assert untimed(path) == whole


def test_two_jobs_on_one_table(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    with ResultsWriter(path, METADATA), pytest.raises(ResultsError, match="Another process"):
        run(path, pool(2, "fork"))


def test_a_clock_that_jumps(tmp_path: Path, whole: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    said: list[Running] = []
    run(tmp_path / "t.tsv", progress=said.append)
    assert untimed(tmp_path / "t.tsv") == whole
    assert all(r.seconds >= 0 and not r.remaining < 0 for r in said)


def test_rows_out_of_order_are_put_into_order(tmp_path: Path, whole: list[list[str]]) -> None:
    path = tmp_path / "t.tsv"
    run(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *reversed(lines[5:])]))
    run(path)
    assert untimed(path) == whole


def test_machines_that_differ_are_refused(tmp_path: Path) -> None:
    facts = {**machine_facts(None), "device": "another"}
    with pytest.raises(InputError, match="machines differ"), pool(2, "fork") as executor:
        run_job(
            executor,
            FakeWorker(),
            Reader(Images(), (1, 1, 2), 3),
            range(COUNT),
            tmp_path / "t.tsv",
            METADATA,
            facts=facts,
            block=5,
        )


@pytest.mark.parametrize("workers", [0, -1, "two", 1.5, True, None])
def test_numbers_of_workers_that_cannot_be(workers: object) -> None:
    with pytest.raises(InputError, match="workers"):
        check_workers(workers)


def test_cores_are_divided() -> None:
    assert local_resources(3, "cpu", 2).threads == 2
    two = local_resources("auto", "cpu", None)
    assert len(two.devices) * (two.threads or 0) <= max(1, os.cpu_count() or 1)


def test_a_table_keeps_its_threads(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"info": {"threads": 3}}')
    assert stored_threads(tmp_path / "t.tsv", "cpu", None) == 3
    assert stored_threads(tmp_path / "t.tsv", "cuda", None) is None
    with pytest.raises(ResultsError, match="another number of threads"):
        stored_threads(tmp_path / "t.tsv", "cpu", 2)
