"""What runs next: work stealing by small shards, and what happens when a worker dies. The same for every backend."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from rsrouter.core.errors import InputError, WorkerError
from rsrouter.jobs.executor import Executor
from rsrouter.jobs.work import Event, Failed, Finished, Lost, Ready, Step, Task
from rsrouter.results import Row

#: Times that an image may end its worker before it is given up, and a slot's workers may end without a row before the slot is.
RETRIES = 2

#: Tasks get smaller towards the end: each worker gets this part of its share of what is left.
_SHARE = 4


class Scheduler:
    """Gives images to an executor's workers until every one has a row.

    A shard is the idempotent unit, an image's row the smallest thing that is kept: what a dying worker leaves undone
    goes to the next one that is free, image by image, so that an image that ends its worker is found out. It is tried
    `retries` times more; the others are finished first. A slot whose workers keep ending before any row is given up.

    Args:
        executor: where.
        load: image ids to a task, called in this process shortly before the task is due.
        todo: ids, in the order in which they are handed out.
        keep: called with each finished row, once for each id.
        block: images of one task at most.
        retries: see above.
        told: called after every word from a worker, with the votes drawn since the last call.

    Raises (from `run`):
        WorkerError: images or slots were given up.
        RSRouterError: what the work itself raises; another worker would meet it too.
    """

    def __init__(
        self,
        executor: Executor,
        load: Callable[[tuple[int, ...]], Task],
        todo: Iterable[int],
        keep: Callable[[Row], None],
        *,
        block: int,
        facts: dict[str, Any],
        retries: int = RETRIES,
        told: Callable[[int], None] | None = None,
    ) -> None:
        self._executor, self._load, self._keep, self._block, self._retries = executor, load, keep, block, retries
        self._facts, self._told = facts, told or (lambda votes: None)
        self._queue = deque(todo)
        self._again: deque[int] = deque()
        self._left = set(self._queue)
        self._attempts: Counter[int] = Counter()
        self._hopeless: dict[int, str] = {}
        self._running: dict[int, tuple[int, ...]] = {}
        self._idle: list[int] = []
        self._failures: Counter[int] = Counter()
        self._slots = set(range(executor.slots))
        self._restart: list[int] = list(range(executor.slots))
        self._next: Task | None = None
        self._reason = ""

    def run(self) -> None:
        """Returns when every image has a row."""
        while self._left - set(self._hopeless):
            if not self._slots:
                raise WorkerError(
                    "Workers end again and again before they finish anything",
                    expected="a worker that keeps running",
                    received=self._reason,
                    remedy="finished rows are kept; try fewer workers or one process. A script that starts workers needs "
                    'the line `if __name__ == "__main__":`',
                )
            # no more workers than there is work for
            while self._restart and len(self._running) + len(self._idle) < len(self._left):
                slot = self._restart.pop()
                self._running[slot] = ()
                self._executor.start(slot)
            self._hand_out()
            self._executor.wait(self._hear, 1.0)
        if self._hopeless:
            idx, reason = next(iter(self._hopeless.items()))
            raise WorkerError(
                f"Image {idx} ended {self._retries + 1} workers"
                + (f", and so did {len(self._hopeless) - 1} others" if len(self._hopeless) > 1 else ""),
                expected="a worker that finishes it",
                received=reason,
                remedy="all other images have their rows; run again with fewer workers, or in one process, which shows why",
            )

    def _hand_out(self) -> None:
        while self._idle and (task := self._take()) is not None:
            slot = self._idle.pop(0)
            self._running[slot] = task.ids
            self._executor.submit(slot, task)
        # while all are busy, the images of the next task are read
        if self._executor.slots > 1 and self._next is None:
            self._next = self._take()

    def _take(self) -> Task | None:
        if self._next is not None:
            task, self._next = self._next, None
            return task
        if self._again:
            return self._load((self._again.popleft(),))
        if not self._queue:
            return None
        share = -(-len(self._queue) // (_SHARE * self._executor.slots)) if self._executor.slots > 1 else self._block
        return self._load(tuple(self._queue.popleft() for _ in range(min(share, self._block, len(self._queue)))))

    def _hear(self, slot: int, event: Event) -> None:
        if isinstance(event, Ready):
            self._check(event.facts)
            self._running.pop(slot, None)
            self._idle.append(slot)
            self._told(0)
        elif isinstance(event, Step):
            for row in event.rows:
                if row.idx in self._left:
                    self._keep(row)
                    self._left.discard(row.idx)
                self._failures[slot] = 0
            self._told(event.votes)
        elif isinstance(event, Finished):
            self._running.pop(slot, None)
            self._idle.append(slot)
        elif isinstance(event, Failed):
            raise event.error
        else:
            self._lose(slot, event)

    def _lose(self, slot: int, event: Lost) -> None:
        self._reason = event.reason
        if slot in self._idle:
            self._idle.remove(slot)
        for idx in self._running.pop(slot, ()):
            if idx in self._left:
                self._attempts[idx] += 1
                if self._attempts[idx] > self._retries:
                    self._hopeless[idx] = event.reason
                else:
                    self._again.append(idx)
        self._failures[slot] += 1
        # one more than an image has: a single hopeless image must not take the slot with it
        if self._failures[slot] > self._retries + 1:
            self._slots.discard(slot)
        else:
            self._restart.append(slot)
        self._told(0)

    def _check(self, facts: dict[str, Any]) -> None:
        different = [key for key in facts if facts[key] != self._facts.get(key)]
        if different:
            raise InputError(
                "The workers' machines differ, and so would the bits of their votes",
                expected=", ".join(f"{key} {self._facts.get(key)}" for key in different),
                received=", ".join(f"{key} {facts[key]}" for key in different),
                remedy="use machines of one kind, or one table per kind with --shard",
            )
