"""The devices of a job: their names, the workers they make, and the threads of each worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rsrouter.core.errors import InputError, ResultsError
from rsrouter.inputs import check_count
from rsrouter.results.metadata import metadata_path, read_metadata
from rsrouter.sampling.execution import Execution, device_name, named_device, resolve_device


@dataclass(frozen=True)
class Resources:
    """How many workers, and what each has.

    Attributes:
        devices: one per worker.
        threads: torch threads of each; None leaves torch's own.
    """

    devices: tuple[str | None, ...]
    threads: int | None


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(workers: object) -> int | None:
    """A number of workers; None for "auto".

    Raises:
        InputError: anything else.
    """
    if workers == "auto":
        return None
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InputError(
            "The number of workers cannot be read",
            expected='a whole number of at least 1, or "auto"',
            received=repr(workers),
            remedy="auto takes one per GPU, or one per core",
        )
    return workers


def check_threads(threads: object) -> int | None:
    """A number of torch threads, or None; InputError for anything else."""
    return None if threads is None else check_count("threads", threads)


def device_names(device: str | None) -> tuple[str | None, ...]:
    """The devices of a list such as `cuda:0,cuda:2`.

    Raises:
        InputError: a name that torch does not know, one that is there twice, or devices of several types.

    >>> device_names("cuda:0, cuda:2"), device_names(None)
    (('cuda:0', 'cuda:2'), (None,))
    """
    if device is None or "," not in device:
        return (device,)
    names = tuple(part.strip() for part in device.split(","))
    kinds = {(named_device(name).type, named_device(name).index is None) for name in names}
    if len(set(names)) < len(names) or len(kinds) > 1 or any(bare for _, bare in kinds):
        raise InputError(
            "The list of devices cannot be used",
            expected="different devices of one type, each with its number, such as cuda:0,cuda:2",
            received=repr(device),
            remedy="--device cuda --workers auto takes every card",
        )
    return names


def first_device(device: str | None) -> str | None:
    """The first device of a list."""
    return device_names(device)[0]


def _one_kind(devices: Sequence[str]) -> None:
    """Refuses cards of several kinds: their votes would have other bits, and no table may hold both."""
    cards = {name: device_name(torch.device(name)) for name in devices}
    if len(set(cards.values())) > 1:
        first = cards[devices[0]]
        raise InputError(
            "The cards differ, and so would the bits of their votes",
            expected="cards of one kind in one table",
            received=", ".join(f"{name} {card}" for name, card in cards.items()),
            remedy=f"--device {','.join(name for name, card in cards.items() if card == first)}, or a table for each kind "
            "with --shard",
        )


def local_resources(workers: int | str, device: str | None, threads: int | None) -> Resources:
    """Workers of this machine: one per GPU, or `workers` on the CPU that share its cores.

    Args:
        workers: how many, or "auto": as many as there are GPUs, or cores.
        device: `cuda` spreads workers over the GPUs; `cuda:1` is one GPU and one worker, `cuda:0,cuda:2` are two.
        threads: of each CPU worker; None divides the cores.

    Raises:
        InputError: more workers than GPUs, cards of several kinds, or a device that cannot be used.
    """
    number, names = check_workers(workers), device_names(device)
    found = [resolve_device(name) for name in names]
    where = found[0]
    if where.type == "cpu":
        number = number or usable_cores()
        return Resources((device,) * number, threads or max(1, usable_cores() // number))
    there = len(names) if where.index is not None else torch.cuda.device_count() if where.type == "cuda" else 1
    if number is not None and number > there:
        raise InputError(
            "There are fewer GPUs than workers",
            expected=f"at most {there} for device {device!r}",
            received=str(number),
            remedy="one worker fills a GPU; --device cuda counts all GPUs of this machine",
        )
    if where.type != "cuda":
        return Resources((device,), threads)
    cards = [str(n) for n in names] if where.index is not None else [f"cuda:{i}" for i in range(there)]
    _one_kind(cards[: number or there])
    return Resources(tuple(cards[: number or there]), threads)


def on_cpu(device: str | None) -> bool:
    """Whether workers run on a CPU; asks no machine, since the driver's need not have what the workers' have."""
    return named_device(first_device(device)).type == "cpu"


def stored_threads(out: Path, device: str | None, threads: int | None) -> int | None:
    """The thread count that a table was begun with, which it keeps; `threads` where there is no table yet.

    Raises:
        ResultsError: another number was asked for (on a CPU, threads decide how sums are rounded).
    """
    threads = check_threads(threads)
    if not on_cpu(device):
        return threads
    stored = (read_metadata(metadata_path(out)) or {}).get("info", {}).get("threads")
    if not isinstance(stored, int):
        return threads
    if threads is not None and threads != stored:
        raise ResultsError(
            f"{out} was begun with another number of threads",
            expected=f"{stored} threads per worker",
            received=str(threads),
            remedy="leave threads out to resume it, or give another output",
        )
    return stored


def job_threads(out: Path, device: str | None, threads: int | None, execution: Execution) -> int | None:
    """`stored_threads`, but for an execution that fixes the threads of a forward pass: those of a worker then only say how many
    passes it runs side by side, and any number gives the table's bits."""
    return check_threads(threads) if execution.threads else stored_threads(out, device, threads)
