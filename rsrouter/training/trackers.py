"""The log of a training sent to a tracker as well: trackio, wandb or tensorboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rsrouter.core.errors import InputError


def log_to(tracker: Any) -> Callable[[dict[str, Any]], None]:
    """What `train_router(..., log=...)` takes, for a tracker: the numbers of each line, step by step.

    Args:
        tracker: with `log(metrics, step=)` (a run or the module of trackio or wandb), or `add_scalar(name, value, step)`
            (tensorboard's `SummaryWriter`).

    Raises:
        InputError: neither.

    >>> class Run:
    ...     def log(self, metrics, step): print(step, metrics)
    >>> log = log_to(Run())
    >>> log({"epoch": 1, "loss": 0.5, "head": "level0"})
    0 {'epoch': 1, 'loss': 0.5}
    >>> log({"score": {"deferral": 0.9}})
    1 {'score/deferral': 0.9}
    """
    whole, single = getattr(tracker, "log", None), getattr(tracker, "add_scalar", None)
    if not callable(whole) and not callable(single):
        raise InputError(
            "This is not a tracker",
            expected="log(metrics, step=), or add_scalar(name, value, step)",
            received=type(tracker).__name__,
            remedy="such as trackio.init(...), or tensorboard's SummaryWriter",
        )
    step = 0

    def log(line: dict[str, Any]) -> None:
        nonlocal step
        numbers = dict(_numbers(line, ""))
        if callable(single):
            for name, value in numbers.items():
                single(name, value, step)
        elif callable(whole):
            whole(numbers, step=step)
        step += 1

    return log


def _numbers(line: Mapping[str, Any], before: str) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{before}{name}", value
