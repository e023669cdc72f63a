"""Options and progress of verbs that run over whole data sets: workers, clusters, and how images are read."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from math import isnan
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from rsrouter.cli.options import Format, echo_json
from rsrouter.core.errors import InputError

Workers = Annotated[
    str | None, typer.Option("--workers", help="Number of processes: one per GPU, or sharing the CPU's cores; auto uses all.")
]
UseRay = Annotated[bool, typer.Option("--ray", help="Run workers on a Ray cluster: this machine's, or a new one.")]
RayAddress = Annotated[
    str | None,
    typer.Option("--ray-address", metavar="ADDRESS", help="host:port, ray://host:port or local; implies --ray."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of each worker; a resumed table keeps its number.")
]
Shard = Annotated[str | None, typer.Option("--shard", help="i/N: only part i of N (i from 0); `rsrouter merge` joins them.")]
Estimate = Annotated[
    bool, typer.Option("--estimate", help="Write nothing; measure a few votes and print how long the job will take.")
]


def parse_workers(text: str | None) -> int | str | None:
    """`--workers` as a number, "auto" or None; what cannot be a number is refused where it is used."""
    return int(text) if text is not None and text.isdecimal() else text


def ray_address(use: bool, address: str | None) -> str | None:
    """What `certify_table(ray=...)` takes."""
    return address if address is not None else ("auto" if use else None)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`"i/N"` as numbers, i from 0.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    try:
        index, count = (int(part) for part in text.split("/"))
        if not 0 <= index < count:
            raise ValueError
    except ValueError as error:
        raise InputError(
            "The shard cannot be read",
            expected="i/N with 0 <= i < N",
            received=repr(text),
            remedy="four parts are 0/4, 1/4, 2/4 and 3/4",
        ) from error
    return index, count


def part_of(total: int, start: int, count: int | None, source: str) -> range:
    """`--start` and `--count` of a data set of `total` images.

    Raises:
        InputError: none are left.
    """
    last = total if count is None else min(total, start + count)
    if not 0 <= start < last:
        raise InputError(
            "No images are left",
            expected=f"--start below {total}, the images in {source}",
            received=str(start),
            remedy="check --start and --count",
        )
    return range(start, last)


def duration(seconds: float) -> str:
    """`3 s`, `12 min`, `5.2 h`, `3.4 days`; "?" for NaN."""
    if seconds != seconds:
        return "?"
    for unit, size, digits in (("days", 2 * 86400.0, 1), ("h", 2 * 3600.0, 1), ("min", 120.0, 0)):
        if seconds >= size:
            return f"{seconds / {'days': 86400.0, 'h': 3600.0, 'min': 60.0}[unit]:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _to_go(running: Any) -> str:
    """The time to go, at most so much while no image is finished."""
    if running.remaining == running.remaining:
        return f"{duration(running.remaining)} to go"
    return f"at most {duration(running.most)} to go" if running.most == running.most else "? to go"


class Display:
    """Live progress of a job on stderr: a bar on a terminal; elsewhere a line after five seconds, then every half minute.

    Takes its times from the job, which counts on a clock that never jumps.
    """

    def __init__(self, title: str, shown: tuple[float, ...] = ()) -> None:
        from tqdm import tqdm

        self._title, self._shown = title, shown
        self._live = sys.stderr.isatty()
        self._bar: Any = tqdm(
            total=1, file=sys.stderr, mininterval=0, disable=not self._live, bar_format="{desc}|{bar}|{postfix}"
        )
        self._last = -1e9 if self._live else time.monotonic() - 25.0

    def __call__(self, running: Any) -> None:
        """Takes a `rsrouter.jobs.Running`."""
        now = time.monotonic()
        if now - self._last < (0.2 if self._live else 30.0):
            return
        self._last = now
        rate = running.votes / running.seconds if running.seconds > 0 else 0.0
        accuracy = [f"{r:g}:{100 * a:.1f}%" for r, a in zip(self._shown, running.accuracy, strict=False) if a == a]
        text = ", ".join(
            [
                f"{running.finished}/{running.total} images",
                f"{running.votes:,} votes",
                f"{rate:,.0f}/s",
                _to_go(running),
                *([" ".join(accuracy)] if accuracy else []),
            ]
        )
        if not self._live:
            typer.echo(f"{self._title}: {text}", err=True)
            return
        self._bar.total, self._bar.n = running.total, running.finished
        if get_terminal_size().columns < 100:
            text = text.rpartition(", ")[0] if accuracy else text  # room for the bar
        self._bar.set_description_str(f"{self._title} ", refresh=False)
        self._bar.set_postfix_str(text, refresh=True)

    def close(self) -> None:
        self._bar.close()


def show_patience(costs: Sequence[Any], title: str) -> None:
    """A table of `rsrouter.core.patience.PatienceCost`."""
    if not costs:
        return
    typer.echo(f"{title}; shares are of the fixed plan's votes")
    typer.echo(
        f"{'--patience':<11}{'votes/image':>12}{'share':>8}{'Wald floor':>12}{'lost, points (at r)':>21}{'radius kept':>13}"
    )
    for cost in costs:
        least = "-" if cost.floor is None else f"{cost.floor:.1%}"
        lost = f"{100 * cost.lost:.2f} ({cost.at:g})"
        kept = "-" if isnan(cost.kept) else f"{cost.kept:.3f}"  # nothing was certified
        typer.echo(f"{cost.beta:<11g}{cost.votes:>12,.0f}{cost.share:>8.1%}{least:>12}{lost:>21}{kept:>13}")


def say_estimate(estimate: Any, format: Format) -> None:
    """Prints a `rsrouter.jobs.Estimate`."""
    if format is Format.json:
        echo_json(estimate.to_dict())
        return
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in estimate.votes_per_second.items())
    typer.echo(f"{estimate.images} images, {estimate.workers} workers, {estimate.device}; votes a second on each: {speeds}")
    typer.echo(f"{'plan':<10}{'votes/image':>20}{'time':>12}{'device hours':>15}")
    for cost in estimate.costs:
        votes = f"{cost.votes_per_image:,.0f} ± {cost.standard_error:,.0f}"
        typer.echo(f"{cost.plan['kind']:<10}{votes:>20}{duration(cost.seconds):>12}{cost.device_hours:>15.2f}")
    show_patience(estimate.patience, f"patience of the adaptive plan, on votes simulated for the {estimate.sampled} images")
    typer.echo(f"from {estimate.sampled} images in {duration(estimate.measured_seconds)}; nothing was written")
