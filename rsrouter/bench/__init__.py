"""Speed as ratios measured in one run: the engine against the hardware's limit and against the field's own loop."""

from rsrouter.bench.run import run_bench
from rsrouter.bench.timing import Figure
from rsrouter.bench.votes import reference_loop

__all__ = ["Figure", "reference_loop", "run_bench"]
