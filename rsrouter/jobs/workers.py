"""Where the work of a job is done, and by whom: workers, their messages, and executors that start them.

A worker is pickled to where it runs, opened there once, and then given task after task: pixels in, certificates out. Labels
never come here; the driver adds them. An executor starts workers, passes tasks to them, and says what they say: this process
(`Inline`), processes of this machine (`Processes`), actors of a Ray cluster (`rsrouter.jobs.ray_workers`). It knows nothing of
tables, retries or order, which are the driver's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import scipy
import torch
from torch import Tensor

from rsrouter._version import __version__
from rsrouter.core.errors import DeviceError, InputError, RSRouterError
from rsrouter.core.types import Certificate
from rsrouter.jobs.devices import Resources
from rsrouter.sampling.execution import device_name, instructions, resolve_device


@dataclass(frozen=True, slots=True)
class Task:
    """A small shard of a job: done twice, it gives the same rows.

    Attributes:
        ids: the images' indices in their data set.
        images: `(len(ids), C, H, W)` pixels in [0,1].
    """

    ids: tuple[int, ...]
    images: Tensor


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker can take tasks; `facts` say what decides its votes' bits (`machine_facts`)."""

    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """One image is finished.

    Attributes:
        idx: its index in the data set.
        certificate: what its votes give.
        seconds: of work spent on it.
    """

    idx: int
    certificate: Certificate
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """Votes drawn since the last step, and images finished meanwhile."""

    votes: int
    done: tuple[Done, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The task is done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that another worker would meet as well: the job ends with it."""

    error: RSRouterError


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker is gone, or no longer to be trusted; its task can be given to another."""

    reason: str


Event = Ready | Step | Finished | Failed | Lost
Emit = Callable[[Event], None]
#: Called with the slot and what its worker said.
Sink = Callable[[int, Event], None]


class Worker(Protocol):
    """What is to be done with images."""

    def open(self, device: str | None) -> None:
        """Prepares the networks on `device`."""

    def run(self, task: Task, emit: Emit) -> None:
        """Emits one `Done` per image, in `Step`s, in any order."""


def machine_facts(device: str | None) -> dict[str, Any]:
    """What else decides a vote's bits: the device's name and the libraries' versions."""
    where = resolve_device(device)
    return {
        "device": device_name(where),
        # kernels differ with the vector instructions; on an accelerator they do not
        "instructions": instructions(where),
        "versions": {"rsrouter": __version__, "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
    }


def serve(unpack: Callable[[], Worker], device: str | None, threads: int | None, receive: Callable[[], Task], emit: Emit) -> None:
    """The life of a worker: open, then task after task, until `receive` raises EOFError.

    Args:
        unpack: gives the worker (unpickles it), so that its errors are told too.
        device: where its networks run.
        threads: of torch; None leaves them.
        receive: waits for the next task.
        emit: tells the driver.
    """
    try:
        if threads is not None:
            torch.set_num_threads(threads)  # counts for the thread that calls it, so not before
        mine = unpack()
        mine.open(device)
        emit(Ready(machine_facts(device)))
        while True:
            try:
                task = receive()
            except EOFError:
                return
            mine.run(task, emit)
            emit(Finished())
    except BrokenPipeError:
        return  # the driver is gone, and nobody reads on
    except DeviceError as error:  # another card may do the work
        emit(Lost(str(error)))
    except RSRouterError as error:
        emit(Failed(error))
    except Exception as error:
        emit(Lost(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


class Executor(Protocol):
    """Workers in `slots` places, each with at most one task at a time."""

    slots: int
    #: torch threads of each worker; None: torch's own
    threads: int | None

    def facts(self) -> dict[str, Any]:
        """`machine_facts` of the machines that do the work; asked for before any worker starts."""

    def open(self, worker: Worker) -> Self:
        """Takes the worker that every slot is to get a copy of."""

    def start(self, slot: int) -> None:
        """Starts the slot's worker, in place of one that is lost; its `Ready` follows."""

    def submit(self, slot: int, task: Task) -> None:
        """Gives a ready, idle worker its next task."""

    def wait(self, sink: Sink, seconds: float) -> None:
        """Passes on what workers say, waiting for the first word at most so long."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends every worker at once."""


class Inline:
    """One worker, which is this process. Errors rise where they happen, and nothing is tried twice."""

    slots = 1

    def __init__(self, device: str | None, threads: int | None) -> None:
        self.device, self.threads = device, threads
        self._tasks: list[Task | None] = []
        self._before = torch.get_num_threads()

    def facts(self) -> dict[str, Any]:
        return machine_facts(self.device)

    def open(self, worker: Worker) -> Inline:
        self._worker = worker
        return self

    def start(self, slot: int) -> None:
        self._tasks.append(None)

    def submit(self, slot: int, task: Task) -> None:
        self._tasks.append(task)

    def wait(self, sink: Sink, seconds: float) -> None:
        while self._tasks:
            task = self._tasks.pop(0)
            if task is None:
                self._worker.open(self.device)
                sink(0, Ready(self.facts()))
                continue
            self._worker.run(task, lambda event: sink(0, event))
            sink(0, Finished())

    def __enter__(self) -> Inline:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.threads is not None:
            torch.set_num_threads(self._before)


class Processes:
    """Processes of this machine, one per entry of `resources.devices`. A process that is killed is a `Lost` of its slot.

    Processes end with the driver, however that ends.

    Args:
        resources: devices and threads.
        method: how processes start; anything but "spawn" is for tests (CUDA does not survive a fork).
    """

    def __init__(self, resources: Resources, *, method: str = "spawn") -> None:
        self.slots, self.threads, self._devices = len(resources.devices), resources.threads, resources.devices
        self._context: Any = multiprocessing.get_context(method)
        self._workers: dict[int, tuple[Any, Connection]] = {}
        self._payload = b""

    def facts(self) -> dict[str, Any]:
        return machine_facts(self._devices[0])

    def open(self, worker: Worker) -> Processes:
        try:
            self._payload = pickle.dumps(worker, protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                "The networks cannot be sent to worker processes",
                expected="modules whose classes stand at the top of an importable file",
                received=str(error).splitlines()[0],
                remedy="move the class out of the function that defines it, or use one process",
            ) from error
        return self

    def start(self, slot: int) -> None:
        self._end(slot)
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._payload, self._devices[slot], self.threads)
        process = self._context.Process(target=_main, args=arguments, daemon=True, name=f"rsrouter worker {slot}")
        self._workers[slot] = (process, ours)
        try:
            process.start()
        finally:
            theirs.close()  # or the end of the worker would not end the pipe

    def submit(self, slot: int, task: Task) -> None:
        # it may have died since its last word; `wait` finds the end of its pipe
        with contextlib.suppress(OSError):
            _send(self._workers[slot][1], task)

    def wait(self, sink: Sink, seconds: float) -> None:
        slots = {pipe: slot for slot, (_, pipe) in self._workers.items()}
        for pipe in wait(list(slots), seconds):
            slot = slots[pipe]  # type: ignore[index]
            event: Event | None = None
            while not isinstance(event, Lost):
                try:
                    if not pipe.poll():  # type: ignore[union-attr]
                        break
                    event = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):  # also in the middle of a message
                    event = Lost(_ending(self._workers[slot][0]))
                if isinstance(event, Lost):
                    self._end(slot)
                sink(slot, event)

    def _end(self, slot: int) -> None:
        process, pipe = self._workers.pop(slot, (None, None))
        if process is None or pipe is None:
            return
        pipe.close()
        if process.pid is not None:
            process.kill()  # it holds nothing that a kill could damage
            process.join()
            process.close()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for slot in list(self._workers):
            self._end(slot)


def _ending(process: Any) -> str:
    """How a process ended, in words."""
    process.join(5)
    code = process.exitcode
    if code is None:
        return "closed its pipe"
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (the system may have run out of memory)" if name == "SIGKILL" else "")
    return f"ended with status {code}"


def _send(pipe: Connection, message: object) -> None:
    # pickle only ever travels between this driver and the processes it started itself, over private pipes
    pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def _end_with_driver() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # in the middle of a round of votes too, which may take minutes


def _main(pipe: Connection, payload: bytes, device: str | None, threads: int | None) -> None:
    # Ctrl-C goes to the whole group; the driver ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    with contextlib.suppress(OSError):  # the driver is gone
        serve(
            lambda: pickle.loads(payload),
            device,
            threads,
            lambda: pickle.loads(pipe.recv_bytes()),
            lambda event: _send(pipe, event),
        )
