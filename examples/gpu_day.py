"""Everything that is to be known of rsrouter on a card, in one go: facts, tests, speed, a profile, tables.

    python examples/gpu_day.py --minutes 25
    python examples/gpu_day.py --device cpu --minutes 1     # a rehearsal without a card

One step after the other, each with its share of the time; what is finished is kept in `--out/NAME-OF-THE-CARD`, and the same
command goes on from there. It ends with status 0 when every step is done, 1 when one failed, 2 where there is no such device, and
3 when the time is up. Networks of the field have random weights, and their figures say so; what they certify means nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rsrouter import AdaptivePlan, Execution, FixedPlan, Smooth
from rsrouter.bench.run import CUDA_DTYPES, DTYPES, FIELD, field_expert, field_throughput
from rsrouter.bench.votes import REFERENCE_BATCH, Drawing, reference_loop, throughput
from rsrouter.clock import seconds
from rsrouter.core import VoteRequest
from rsrouter.core.errors import DeviceError
from rsrouter.demo import load_pool, load_router, load_slice
from rsrouter.doctor import examine
from rsrouter.jobs import certify_table
from rsrouter.router.base import vote_model
from rsrouter.sampling import Engine, image_identity, resolve_device
from rsrouter.sampling.calibrate import calibrate
from rsrouter.sampling.execution import device_name

DONE, FAILED, NO_DEVICE, TIME_UP = 0, 1, 2, 3
#: Images and votes of the field's usual CIFAR-10 table.
TABLE_IMAGES, TABLE_VOTES = 500, 100_000


@dataclass(frozen=True)
class Size:
    """How much each step does.

    Attributes:
        n: votes of a throughput figure.
        repeats: rounds of it.
        votes: of a certificate that is timed.
        images: rows of the demo's table.
        fields: whether the field's networks are measured, which need a card or patience.
    """

    n: int
    repeats: int
    votes: int
    images: int
    fields: bool


CARD, REHEARSAL = Size(100_000, 3, TABLE_VOTES, 500, True), Size(100, 1, 200, 2, False)


class TimeUp(Exception):
    """The minutes are over in the middle of a step that can go on later."""


class Day:
    """The steps, and where they stand.

    Args:
        device: where.
        folder: of this card.
        end: on `time.monotonic`, when to stop.
        size: how much.
    """

    def __init__(self, device: torch.device, folder: Path, end: float, size: Size) -> None:
        self.device, self.folder, self.end, self.size = device, folder, end, size

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def steps(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Every step by name, in order."""
        names = [name for name, *_ in FIELD] if self.size.fields else []
        short = {name: re.sub(r"\W+", "-", name.split(" (")[0]).lower() for name in names}
        return {
            "facts": self.facts,
            "tests": self.tests,
            "redraw": self.redraw,
            "bench-demo": self.bench_demo,
            **{f"bench-{short[name]}": lambda name=name: self.bench_field(name) for name in names},  # type: ignore[misc]
            "calibrate": self.calibrate,
            "profile-demo": lambda: self.profile("demo"),
            **{f"profile-{short[name]}": lambda name=name: self.profile(name, short[name]) for name in names},  # type: ignore[misc]
            "table-cost": self.table_cost,
            "table": self.table,
        }

    def facts(self) -> dict[str, Any]:
        """What `rsrouter doctor` says."""
        report = examine(str(self.device), measure=self.size.fields, network=False)
        return {"sections": report.sections, "advice": [asdict(a) for a in report.advice]}

    def tests(self) -> dict[str, Any]:
        """`pytest -m gpu`, where the tests are at hand."""
        root = Path(__file__).resolve().parents[1]
        if not (root / "tests").is_dir():
            return {"skipped": "no tests here: run this from a checkout"}
        if self.device.type != "cuda":
            return {"skipped": "they need a CUDA device"}
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-rs", "tests/sampling", "tests/smooth"]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=max(60.0, self.left), check=False)
        except subprocess.TimeoutExpired as error:
            raise TimeUp from error
        (self.folder / "pytest.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"pytest ended with status {done.returncode}: see pytest.txt")
        return {"summary": done.stdout.strip().splitlines()[-1]}

    def redraw(self) -> dict[str, Any]:
        """Votes of the device and of the CPU, from the same counters: how many differ by rounding."""
        expert = load_pool()[1]
        image, n = load_slice("test").image(0), min(20_000, 10 * self.size.n)
        request, identity = VoteRequest(0, expert.name, "bench", 0, n), image_identity(image)
        counts = {}
        for where in (str(self.device), "cpu"):
            execution = Execution(stream="counters").nearest(torch.device(where))
            engine = Engine([vote_model(expert)], expert.input_shape, seed=0, device=where, execution=execution)
            counts[where] = engine.run(image[None], [identity], [request])[0][expert.name]
        drawn = list(counts.values())
        moved = int(abs(drawn[0] - drawn[-1]).sum()) // 2
        if moved > 0.02 * n:
            raise RuntimeError(f"{moved} of {n} votes differ between {self.device} and the CPU")
        return {"votes": n, "moved at least": moved}

    def bench_demo(self) -> dict[str, Any]:
        """The demo's network beside the papers' loop and pure forward passes."""
        expert, numbers = load_pool()[1], CUDA_DTYPES if self.device.type == "cuda" else DTYPES
        image = load_slice("test").image(0)
        figures = throughput(expert, image, self.size.n, self.size.repeats, self.device, expert.name, numbers, bars=True)
        return {"figures": [{**asdict(f), "met": f.met} for f in figures]}

    def bench_field(self, name: str) -> dict[str, Any]:
        """The same for a network of the field, with random weights."""
        return {"figures": [asdict(f) for f in field_throughput(name, self.size.n // 5, self.size.repeats, self.device)]}

    def calibrate(self) -> dict[str, Any]:
        """The fastest execution of the demo's networks, and everything that was measured."""
        models = [vote_model(expert) for expert in load_pool()]
        dtypes = ("float32", "bfloat16")
        batches = None if self.size.fields else (50,)
        chosen, timings = calibrate(
            models,
            load_pool().input_shape,
            device=str(self.device),
            dtypes=dtypes,
            ways_too=True,
            batches=batches,
            repeats=self.size.repeats,
        )
        chosen.save(self.folder / "execution.json", device=str(self.device))
        return {"chosen": chosen.to_dict(), "measured": [asdict(t) for t in timings]}

    def profile(self, name: str, short: str = "demo") -> dict[str, Any]:
        """Where the time of a round goes, kernel by kernel."""
        from torch.profiler import ProfilerActivity, profile

        expert = load_pool()[1] if name == "demo" else field_expert(name)
        part = next((entry[4] for entry in FIELD if entry[0] == name), 1)
        draw = Drawing(expert, torch.full(expert.input_shape, 0.5), max(50, self.size.n // 10 // part), self.device)
        work = draw.engine(Execution())
        work()
        cuda = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as found:
            took = seconds(work, self.device)
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=25)
        (self.folder / f"profile-{short}.txt").write_text(table, encoding="utf-8")
        return {"seconds": took, "votes": draw.n}

    def table_cost(self) -> dict[str, Any]:
        """Minutes of 500 CIFAR-10 images at 100,000 votes each: one is timed, on random weights, beside the papers' loop."""
        expert, name = (field_expert(FIELD[0][0]), FIELD[0][0]) if self.size.fields else (load_pool()[1], "the demo's network")
        image, n = torch.rand((1, *expert.input_shape)), self.size.votes
        smooth, plan = Smooth(expert), FixedPlan(min(100, n), n)
        smooth.certify(image, FixedPlan(10, 100), device=str(self.device))
        ours = seconds(lambda: smooth.certify(image, plan, device=str(self.device)), self.device)
        module, x = expert.network().eval().to(self.device), image[0].to(self.device)
        batch = min(REFERENCE_BATCH, n)
        reference_loop(module, x, expert.sigma, batch, expert.num_classes, batch)
        part = max(batch, n // 10)
        theirs = seconds(lambda: reference_loop(module, x, expert.sigma, part, expert.num_classes, batch), self.device) * n / part
        whole = TABLE_IMAGES * TABLE_VOTES / n / 60
        return {
            "network": name,
            "votes timed": {"ours": n, "reference loop": part},
            f"minutes of {TABLE_IMAGES} images at {TABLE_VOTES:,} votes": {
                "ours": ours * whole,
                "reference loop": theirs * whole,
            },
            "reference loop / ours": theirs / ours,
        }

    def table(self) -> dict[str, Any]:
        """The demo's router on its test images, as a table; it goes on where it stood."""
        routed = load_router()
        images = load_slice("test")
        out, start = self.folder / "table" / "certificates.tsv", time.monotonic()
        out.parent.mkdir(exist_ok=True)
        plan = AdaptivePlan(self.size.votes, (0.0, 0.25, 0.5))

        def watch(running: object) -> None:
            if self.left <= 0:  # rows that are written stay
                raise TimeUp

        table = certify_table(
            routed, images, out, plan, device=str(self.device), indices=range(min(self.size.images, len(images))), progress=watch
        )
        return {
            "rows": len(table),
            "seconds of this run": time.monotonic() - start,
            "accuracy": float((table.correct == 1).mean()),
            "votes": int(table.n_drawn.sum()),
        }

    def run(self) -> int:
        """Every step that is not done; a status."""
        status = DONE
        for name, step in self.steps().items():
            file = self.folder / f"{name}.json"
            if file.is_file():
                print(f"{name}: done before")
                continue
            if self.left <= 0:
                print(f"{name}: the time is up; run the same command again to go on")
                return TIME_UP
            start = time.monotonic()
            try:
                found = step()
            except TimeUp:
                print(f"{name}: the time is up; run the same command again to go on")
                return TIME_UP
            except Exception as error:  # the others are worth having
                status = FAILED
                (self.folder / f"{name}.error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                print(f"{name}: failed: {type(error).__name__}: {error}")
                if isinstance(error, DeviceError):
                    return FAILED  # nothing runs on it any more in this process
                continue
            content = {
                "device": device_name(self.device),
                "torch": torch.__version__,
                "seconds": time.monotonic() - start,
                **found,
            }
            file.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
            (self.folder / f"{name}.error.txt").unlink(missing_ok=True)
            print(f"{name}: {content['seconds']:.0f} s")
        return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; or cpu, to rehearse")
    parser.add_argument("--minutes", type=float, default=25.0, help="no step begins later")
    parser.add_argument("--out", type=Path, default=Path("gpu-day"), help="folder of folders, one for each card")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    try:
        device = resolve_device(options.device)
    except DeviceError as error:
        print(f"There is no {options.device} here. {error}", file=sys.stderr)
        return NO_DEVICE
    folder = options.out / (re.sub(r"\W+", "-", device_name(device)).strip("-").lower())
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{device_name(device)}: results in {folder}")
    return Day(device, folder, end, REHEARSAL if device.type == "cpu" else CARD).run()


if __name__ == "__main__":
    sys.exit(main())
