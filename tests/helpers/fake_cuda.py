"""Stand-ins for what of `torch.cuda` the engine calls, on a machine without: operations run at once, and their order is noted.

A stream's work runs when it is called, so what is tested is who waits for what: a kernel that a real device could run too early
shows as a wait that is not there.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch


class FakeEvent:
    """An event; `after` is what its stream had done, or was waiting for, when it was recorded."""

    def __init__(self):
        self.after = set()

    def record(self, stream):
        self.after = set(stream.done)


class FakeStream:
    """A stream that knows which works are surely finished before its next one."""

    def __init__(self, device=None):
        self.done = set()

    def wait_event(self, event):
        self.done |= event.after

    def wait_stream(self, other):
        self.done |= other.done


class FakeCuda:
    """Patches `torch.cuda`, and notes works as `(name, what was surely done before)`."""

    def __init__(self, monkeypatch, cards=("Card A",)):
        self.main, self.current, self.log, self.cards = FakeStream(), None, [], list(cards)
        self.current = self.main
        fakes = {
            "Stream": FakeStream,
            "Event": FakeEvent,
            "stream": self._stream,
            "device": lambda device: nullcontext(),
            "current_stream": lambda device=None: self.main,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: self.log.append(("empty_cache", set())),
            "is_available": lambda: bool(self.cards),
            "device_count": lambda: len(self.cards),
            "get_device_name": lambda device: self.cards[torch.device(device).index or 0],
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    @contextmanager
    def _stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def work(self, name):
        """A piece of work in the current stream."""
        self.log.append((name, set(self.current.done)))
        self.current.done.add(name)
