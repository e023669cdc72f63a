"""Peak memory of a whole process against the number of votes: a new process for each n, so that none profits from another."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rsrouter.bench.scaling import tiny_expert
from rsrouter.core.errors import WorkerError
from rsrouter.core.plans import FixedPlan
from rsrouter.smooth import Smooth

#: Votes of one certificate.
VOTES = (10_000, 100_000, 1_000_000)
#: Images of the demo's size.
SHAPE = (1, 28, 28)


@dataclass(frozen=True)
class Peak:
    """What one certificate of `n` votes took.

    Attributes:
        n: estimation votes of one image.
        before: MB, the most that the process had held before it drew them: Python, torch, and a certificate of 1,000 votes.
        peak: MB, the most that it had held afterwards.
    """

    n: int
    before: float
    peak: float

    @property
    def grown(self) -> float:
        """MB that the votes took beyond what was held before."""
        return self.peak - self.before


def held() -> float:
    """MB, the most that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def certify_once(n: int) -> Peak:
    """In this process: a short certificate, then one of `n` votes; a linear network, so that memory is the engine's."""
    smooth = Smooth(tiny_expert(SHAPE))
    image = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(0))
    smooth.certify(image, FixedPlan(100, 1_000))
    before = held()
    smooth.certify(image, FixedPlan(100, n))
    return Peak(n, before, held())


def memory_peaks(votes: Sequence[int] = VOTES) -> list[Peak]:
    """`certify_once` of each n, in a new process each (Linux, macOS).

    Raises:
        WorkerError: a process that failed.
    """
    found = []
    for n in votes:
        done = subprocess.run(
            [sys.executable, "-m", "rsrouter.bench.memory", str(int(n))], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise WorkerError(
                "A process that measures memory failed",
                expected=f"a certificate of {n:,} votes",
                received=said[:300],
                remedy="is there memory for one process of torch?",
            )
        found.append(Peak(**json.loads(done.stdout)))
    return found


if __name__ == "__main__":
    print(json.dumps(vars(certify_once(int(sys.argv[1])))))
