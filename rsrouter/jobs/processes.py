"""Workers as processes of this machine, started by `spawn`: one per GPU, or several that share the CPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from rsrouter.core.errors import InputError
from rsrouter.jobs.executor import Resources, Sink
from rsrouter.jobs.work import Event, Lost, Task, Work, machine_facts, serve


class ProcessPool:
    """One process per entry of `resources.devices`. A process that is killed is a `Lost` of its slot.

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

    def open(self, work: Work) -> ProcessPool:
        try:
            self._payload = pickle.dumps(work, protocol=pickle.HIGHEST_PROTOCOL)
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

    def __enter__(self) -> ProcessPool:
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
