"""Workers as Ray Core actors: one per GPU of a cluster, or one per share of its CPU cores. Needs `rsrouter[ray]`."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from rsrouter.core.errors import InputError, RSRouterError, WorkerError
from rsrouter.jobs.devices import check_workers
from rsrouter.jobs.workers import Event, Lost, Sink, Task, Worker, machine_facts, serve

#: Seconds that an actor holds a question for news, so that the driver need not ask often.
_PATIENCE = 1.0
#: Seconds in which a cluster must take a connection.
_KNOCKING = 20.0


class _Actor:
    """A worker in an actor: it works in a thread of its own, and answers for it meanwhile."""

    def __init__(self, worker: Worker, device: str | None, threads: int | None) -> None:
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        arguments = (lambda: worker, device, threads, self._tasks.get, self._events.put)
        threading.Thread(target=serve, args=arguments, daemon=True).start()

    def submit(self, task: Task) -> None:
        self._tasks.put(task)

    def events(self) -> list[Event]:
        """What happened since the last call; waits a while for the first of it."""
        found: list[Event] = []
        try:
            found.append(self._events.get(timeout=_PATIENCE))
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            return found


class RayActors:
    """Actors of a Ray cluster. An actor whose process or machine dies is a `Lost` of its slot.

    Args:
        address: of the cluster: "auto" (the one this machine belongs to, else a new one on it), "local" (a new one),
            `host:port`, or `ray://host:port`.
        workers: how many; None or "auto" takes every GPU, or every `threads` cores.
        device: `cuda` for one GPU each; None or `cpu` for cores.
        threads: torch threads, and cores, of each CPU worker; None: the cores divided by `workers`, or 1.

    Raises:
        InputError: Ray is not installed, or the cluster has less than was asked for.
        WorkerError: the cluster was not reached.
    """

    def __init__(self, address: str, workers: int | str | None, device: str | None, threads: int | None) -> None:
        number = check_workers("auto" if workers is None else workers)
        self._ray = _import_ray()
        self._gpu = device is not None and device.startswith("cuda")
        if self._gpu and device != "cuda":
            raise InputError(
                "Ray chooses the GPU of each actor",
                expected="device 'cuda'",
                received=repr(device),
                remedy="CUDA_VISIBLE_DEVICES on each machine says which GPUs Ray may use",
            )
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._connect(address)
        try:
            self._plan(number, threads)
        except BaseException:
            self._leave()
            raise
        self._device = device
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}

    def _connect(self, address: str) -> None:
        # never report to others without being asked to
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address != "auto":
            options["address"] = address
        if address == "local":
            options["include_dashboard"] = False
        try:
            _knock(address)
            self._ray.init(**options)
        except Exception as error:  # Ray's own errors, and whatever its gRPC raises
            raise WorkerError(
                "The Ray cluster was not reached",
                expected="auto, local, host:port or ray://host:port of a running cluster",
                received=f"{address}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                remedy="look with `ray status`; all machines need the same versions of Python and Ray",
            ) from error

    def _plan(self, number: int | None, threads: int | None) -> None:
        resources = self._ray.cluster_resources()
        there = int(resources.get("GPU" if self._gpu else "CPU", 0))
        if self._gpu:
            self.threads, possible = threads, there
            self._options: dict[str, Any] = {"num_gpus": 1, "num_cpus": min(1, int(resources.get("CPU", 0)))}
        else:
            self.threads = threads or (max(1, there // number) if number else 1)
            possible = there // self.threads
            self._options = {"num_cpus": self.threads}
        self.slots = possible if number is None else number
        if not 1 <= self.slots <= possible:
            raise InputError(
                "The Ray cluster has fewer resources than the workers need",
                expected=f"{number or 1} workers of {'1 GPU' if self._gpu else f'{self.threads} cores'}",
                received=f"{there} {'GPUs' if self._gpu else 'cores'}",
                remedy="ask for fewer workers, or let machines join with `ray start --address`",
            )

    def facts(self) -> dict[str, Any]:
        task = self._ray.remote(**self._options)(machine_facts)
        try:
            facts: dict[str, Any] = self._ray.get(task.remote(self._device))
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RSRouterError):
                raise cause from error
            raise WorkerError(
                "A machine of the Ray cluster cannot work",
                expected="rsrouter on every machine, the same version as here",
                received=_last_line(error),
                remedy="install it there, or start the machines in one container image",
            ) from error
        return facts

    def open(self, worker: Worker) -> RayActors:
        self._worker = self._ray.put(worker)
        return self

    def start(self, slot: int) -> None:
        self._end(slot)
        # news is asked for and tasks are handed in side by side
        cls = self._ray.remote(max_concurrency=2, max_restarts=0, **self._options)(_Actor)
        self._actors[slot] = cls.remote(self._worker, self._device, self.threads)
        self._ask(slot)

    def _ask(self, slot: int) -> None:
        self._asked[self._actors[slot].events.remote()] = slot

    def submit(self, slot: int, task: Task) -> None:
        self._actors[slot].submit.remote(task)

    def wait(self, sink: Sink, seconds: float) -> None:
        answers, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=seconds)
        for answer in answers:
            slot = self._asked.pop(answer)
            try:
                events: list[Event] = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                events = [Lost(_last_line(error))]
            if any(isinstance(event, Lost) for event in events):
                self._end(slot)
            else:
                self._ask(slot)
            for event in events:
                sink(slot, event)

    def _end(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        if actor is not None:
            self._asked = {answer: s for answer, s in self._asked.items() if s != slot}
            self._ray.kill(actor, no_restart=True)

    def _leave(self) -> None:
        if self._ours:
            self._ray.shutdown()

    def __enter__(self) -> RayActors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for slot in list(self._actors):
            self._end(slot)
        self._leave()


def _knock(address: str) -> None:
    """Whether anything listens at `host:port`; Ray itself tries for many minutes. OSError or ValueError where nothing does."""
    if address in ("auto", "local"):
        return
    where = urlsplit(f"//{address.removeprefix('ray://')}")
    if where.hostname is None or where.port is None:
        raise ValueError("no host:port")
    socket.create_connection((where.hostname, where.port), timeout=_KNOCKING).close()


def _last_line(error: Exception) -> str:
    """The line of Ray's long texts that says what happened."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed",
            expected="the extra [ray]",
            received=str(error),
            remedy="pip install 'rsrouter[ray]', on every machine of the cluster",
        ) from error
    return ray
