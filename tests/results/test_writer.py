"""The writer: killed anywhere, out of space, started twice, or given another run's table."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rsrouter.core import FixedPlan
from rsrouter.core.errors import ResultsError
from rsrouter.results import ResultsWriter, read_table
from rsrouter.results.rows import HEADER
from tests.helpers.fake_rows import METADATA, described, make_row, run_job

IDS = range(30)
#: for what is done once for each system call of a job
FEW = range(8)


def in_child(job: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Runs `job` in a forked child; its wait status. `kill_after` seconds later it gets SIGKILL."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Table and metadata of one uninterrupted run."""
    path = tmp_path_factory.mktemp("reference") / "certificates.tsv"
    run_job(path, IDS)
    return path.read_bytes(), path.with_suffix(".json").read_bytes()


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves is the same, and syncing costs nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def check_resumes(path: Path, reference: tuple[bytes, bytes], ids: range = IDS) -> None:
    """What is there is a prefix (and a torn line at most), and running again completes it byte for byte."""
    there = path.read_bytes() if path.exists() else b""
    assert reference[0].startswith(there)
    if there:
        assert path.with_suffix(".json").exists()
    run_job(path, ids)
    assert path.read_bytes() == reference[0]
    assert path.with_suffix(".json").read_bytes() == reference[1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["certificates.json", "certificates.tsv"]


def test_a_second_run_adds_nothing(tmp_path: Path, reference: tuple[bytes, bytes]) -> None:
    path = tmp_path / "certificates.tsv"
    run_job(path, IDS)
    with ResultsWriter(path, METADATA) as writer:
        assert writer.done() == frozenset(IDS)
        with pytest.raises(ResultsError, match="already"):
            writer.append(make_row(3))
    assert path.read_bytes() == reference[0]


def random_kills(folder: Path, reference: tuple[bytes, bytes], trials: int, seed: int) -> set[int]:
    """Kills `trials` jobs at random times, each on a table of its own; how many whole rows the kills left."""
    rng = random.Random(seed)
    start = time.perf_counter()
    assert in_child(lambda: run_job(folder / "whole" / "certificates.tsv", IDS)) == 0
    whole = time.perf_counter() - start
    left = set()
    for trial in range(trials):
        path = folder / str(trial) / "certificates.tsv"
        in_child(lambda path=path: run_job(path, IDS), kill_after=rng.uniform(0, whole))  # type: ignore[misc]
        left.add(path.read_bytes().count(b"\n") - 1 if path.exists() else -1)
        check_resumes(path, reference)
    return left


def test_kills_at_random_times(quick_path: Path, reference: tuple[bytes, bytes]) -> None:
    random_kills(quick_path, reference, 30, seed=1)


@pytest.mark.slow
def test_a_thousand_kills_at_random_times(quick_path: Path, reference: tuple[bytes, bytes]) -> None:
    left = random_kills(quick_path, reference, 1000, seed=2)
    print(f"whole rows left by a kill: {sorted(left)}")
    assert len(left) > 3  # the kills fell into the job, not before or after it


def test_many_kills_of_one_job(quick_path: Path, reference: tuple[bytes, bytes]) -> None:
    path, rng = quick_path / "certificates.tsv", random.Random(5)
    for _ in range(40):
        in_child(lambda: run_job(path, IDS), kill_after=rng.uniform(0, 0.01))
    check_resumes(path, reference)


def kill_at_call(number: int, how: str) -> Callable[[], int]:
    """Makes this process die at the `number`-th system call that touches files; returns a counter of the calls so far."""
    calls = 0

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def replacement(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if how == "after":
                    original(*args, **options)
                elif how == "torn" and name == "write":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(os, name, replacement)

    for name in ("open", "write", "fsync", "ftruncate", "replace", "close", "chmod"):
        wrap(name)
    return lambda: calls


@pytest.mark.parametrize("how", ["before", "torn", "after"])
def test_a_kill_at_every_system_call(quick_path: Path, how: str) -> None:
    run_job(quick_path / "whole.tsv", FEW)
    reference = (quick_path / "whole.tsv").read_bytes(), (quick_path / "whole.json").read_bytes()
    number, finished = 0, False
    while not finished:
        number += 1
        path = quick_path / str(number) / "certificates.tsv"

        def job(path: Path = path, number: int = number) -> None:
            kill_at_call(number, how)
            run_job(path, FEW)

        status = in_child(job)
        finished = status == 0
        assert finished or os.WTERMSIG(status) == signal.SIGKILL
        check_resumes(path, reference, FEW)
    assert number > 2 * len(FEW)


@pytest.mark.parametrize("seed", range(3))
def test_torn_anywhere(quick_path: Path, reference: tuple[bytes, bytes], seed: int) -> None:
    rng = random.Random(seed)
    lengths = {0, 1, len(HEADER) - 1, len(HEADER), len(HEADER) + 1, *rng.sample(range(len(reference[0])), 30)}
    path = quick_path / "certificates.tsv"
    path.with_suffix(".json").write_bytes(reference[1])
    for length in sorted(lengths):
        path.write_bytes(reference[0][:length])
        check_resumes(path, reference)
        # a power loss can leave zeros where rows were on their way
        path.write_bytes(reference[0][:length] + bytes(500))
        run_job(path, IDS)
        assert path.read_bytes() == reference[0]


def test_a_full_disk_leaves_a_table_that_resumes(quick_path: Path, reference: tuple[bytes, bytes]) -> None:
    for number, limit in enumerate((len(HEADER) + 3, 2000, 2100, len(reference[0]) - 1)):
        path = quick_path / str(number) / "certificates.tsv"

        def job(path: Path = path, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(ResultsError, match="make room"):
                run_job(path, IDS)
            assert path.read_bytes() == b"" or path.read_bytes().endswith(b"\n")

        assert in_child(job) == 0
        check_resumes(path, reference)


def test_a_disk_too_full_for_the_metadata(tmp_path: Path, reference: tuple[bytes, bytes]) -> None:
    path = tmp_path / "certificates.tsv"

    def job() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        with pytest.raises(ResultsError, match="Cannot"):
            run_job(path, IDS)

    assert in_child(job) == 0
    assert not path.with_suffix(".json").exists()
    check_resumes(path, reference)


def test_another_runs_table_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "certificates.tsv"
    run_job(path, range(3))
    before = path.read_bytes()
    with pytest.raises(ResultsError) as caught:
        ResultsWriter(path, {**described(plan=FixedPlan(10, 200)), "extra": True})
    assert "terms.plan.n: 100 against 200" in caught.value.received
    assert "extra: (absent) against true" in caught.value.received
    assert "alpha" not in caught.value.received
    assert path.read_bytes() == before


def test_info_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "certificates.tsv"
    run_job(path, range(3), {**METADATA, "info": {"host": "a"}})
    run_job(path, range(5), {**METADATA, "info": {"host": "b"}})
    assert len(read_table(path)) == 5
    assert json.loads(path.with_suffix(".json").read_text())["info"] == {"host": "a"}


@pytest.mark.parametrize(
    "content",
    ["", "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01\n", "something else\n", "\0\0\n", HEADER],
)
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "certificates.tsv"
    path.write_text(content)
    if not content:  # an empty file is where a run that was killed at once had begun
        run_job(path, range(2))
        assert len(read_table(path)) == 2
        return
    with pytest.raises(ResultsError):
        ResultsWriter(path, METADATA)
    assert path.read_text() == content
    assert not path.with_suffix(".json").exists()


def test_metadata_of_another_run_alone_is_enough_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "certificates.json").write_text('{"mine": 1}')
    with pytest.raises(ResultsError, match="another run"):
        ResultsWriter(tmp_path / "certificates.tsv", METADATA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["certificates.json"]


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "certificates.tsv"
    run_job(path, range(5))
    lines = path.read_text().split("\n")
    lines[2] = lines[2].replace("\t", " ", 1)
    path.write_text("\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"Line 3 of certificates.tsv"):
        ResultsWriter(path, METADATA)
    assert path.read_bytes() == before


def test_two_jobs_on_one_output(tmp_path: Path) -> None:
    path = tmp_path / "certificates.tsv"
    with ResultsWriter(path, METADATA) as writer:
        writer.append(make_row(0))

        def second() -> None:
            with pytest.raises(ResultsError, match="Another process"):
                ResultsWriter(path, METADATA)

        assert in_child(second) == 0
        second()
        writer.append(make_row(1))
    with ResultsWriter(path, METADATA) as writer:
        assert writer.done() == {0, 1}


def test_rows_of_a_writer_that_no_lock_kept_out(tmp_path: Path) -> None:
    # a file system without locks, or with locks that hold on one machine only
    path = tmp_path / "certificates.tsv"
    with ResultsWriter(path, METADATA) as writer:
        writer.append(make_row(0))
        with path.open("a") as other:
            other.write(make_row(1).to_line())
        with pytest.raises(ResultsError, match="Something else is writing"):
            writer.append(make_row(1))
    assert read_table(path).idx.tolist() == [0, 1]


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("step", ["append", "arrange"])
def test_a_table_that_is_deleted_or_replaced_under_its_job(tmp_path: Path, replaced: bool, step: str) -> None:
    path = tmp_path / "certificates.tsv"
    with ResultsWriter(path, METADATA) as writer:
        writer.append(make_row(0))
        content = path.read_bytes()
        path.unlink()
        if replaced:
            path.write_bytes(content)
        with pytest.raises(ResultsError, match="deleted or replaced") as caught:
            writer.append(make_row(1)) if step == "append" else writer.arrange([0])
        assert caught.value.remedy
    assert path.exists() == replaced


def test_a_job_may_change_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ResultsWriter("certificates.tsv", METADATA) as writer:
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        writer.append(make_row(0))
    assert len(read_table(tmp_path / "certificates.tsv")) == 1


def test_a_killed_jobs_children_do_not_keep_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "certificates.tsv"
    read, write = os.pipe()

    def job() -> None:
        writer = ResultsWriter(path, METADATA)
        writer.append(make_row(0))
        child = os.fork()
        if child == 0:  # such as a data loader's worker that outlives its parent
            os.write(write, str(os.getpid()).encode().ljust(10))
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(job)
    os.close(write)  # so that reading ends where the child never came to write
    orphan = int(os.read(read, 10))
    try:
        with ResultsWriter(path, METADATA) as writer:
            assert writer.done() == {0}
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(read)


def test_a_closed_writer_says_so(tmp_path: Path) -> None:
    writer = ResultsWriter(tmp_path / "certificates.tsv", METADATA)
    writer.close()
    with pytest.raises(ResultsError, match="closed"):
        writer.append(make_row(0))


def test_a_batch_with_a_bad_row_writes_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "certificates.tsv"
    with ResultsWriter(path, METADATA) as writer:
        with pytest.raises(ResultsError, match="already"):
            writer.extend([make_row(0), make_row(0)])
        writer.append(make_row(1))
    assert read_table(path).idx.tolist() == [1]


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_metadata_that_json_cannot_hold(tmp_path: Path, value: object) -> None:
    with pytest.raises(ResultsError, match="JSON"):
        ResultsWriter(tmp_path / "certificates.tsv", {"value": value})
    assert not list(tmp_path.iterdir())
