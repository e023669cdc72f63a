"""Errors that say what was expected, what came, and what to do."""

from __future__ import annotations


class RSRouterError(ValueError):
    """Base of every error this package raises on purpose.

    Args:
        message: one sentence, what went wrong.
        expected: what would have been accepted.
        received: what came instead.
        remedy: what the user can do about it.
    """

    def __init__(self, message: str, *, expected: str = "", received: str = "", remedy: str = "") -> None:
        self.message, self.expected, self.received, self.remedy = message, expected, received, remedy
        parts = [message.rstrip(".") + "."]
        for word, text in (("Expected", expected), ("Received", received), ("Remedy", remedy)):
            if text:
                parts.append(f"{word}: {text.rstrip('.')}.")
        super().__init__(" ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles across worker processes with all four texts (keyword arguments need the dictionary)."""
        return (_rebuild, (type(self), self.message, self.expected, self.received, self.remedy))


def _rebuild(cls: type[RSRouterError], message: str, expected: str, received: str, remedy: str) -> RSRouterError:
    return cls(message, expected=expected, received=received, remedy=remedy)


class InputError(RSRouterError):
    """Images, labels or arguments that do not fit."""


class DeviceError(InputError):
    """A device that cannot be used: not there, no driver for it, or lost on the way."""


class PlanError(RSRouterError):
    """A plan, confidence level or radius that cannot work."""


class NetworkError(RSRouterError):
    """A network whose votes cannot be certified: wrong width, batch-dependent, random at test time."""


class CheckpointError(RSRouterError):
    """A checkpoint that cannot be read, does not fit, or would run code."""


class ArchitectureError(CheckpointError):
    """An architecture that is not registered here, or that the installed libraries build differently: nobody's fault."""


class IntegrityError(RSRouterError):
    """Content that is not what was pinned or recorded: digests, table rows, metadata."""


class HubError(RSRouterError):
    """The Hub did not give what was asked for: missing, gated, unreachable, refused."""


class ResultsError(RSRouterError):
    """A results table or output folder that belongs to another run, or cannot be written."""


class WorkerError(RSRouterError):
    """Worker processes or actors that die again and again, or cannot be started."""
