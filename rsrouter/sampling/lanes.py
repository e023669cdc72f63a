"""Batches side by side on a CPU: a thread for each, with a module of its own over the same weights.

Every forward pass runs in the number of threads that the execution records, so the number of lanes changes no bit. Networks
that may keep something of their last input, or that call hooks, run in one lane.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from rsrouter.experts.identity import module_digest
from rsrouter.process import fixed_kernels
from rsrouter.sampling.check import Checked, check_again, logits_of
from rsrouter.sampling.execution import Prepared
from rsrouter.sampling.logits import Outputs, moved
from rsrouter.sampling.noise import CHUNK, CounterNoise, NoiseStream
from rsrouter.sampling.rounds import Round, Segment, draw
from rsrouter.sampling.threads import lane_pool

#: Pieces of a round for each lane: a lane that is slower takes fewer.
PIECES = 4


def shares_weights(module: nn.Module, copied: nn.Module) -> bool:
    """Whether two modules have the very same parameters and buffers."""
    pairs = [(*m.parameters(), *m.buffers()) for m in (module, copied)]
    return len(pairs[0]) == len(pairs[1]) and all(a is b for a, b in zip(*pairs, strict=True))


def twin(module: nn.Module) -> nn.Module | None:
    """A module of its own over the same weights; None where there is none, or hooks would be shared."""
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return None
    weights = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        copied = copy.deepcopy(module, dict(weights))
    except Exception:  # it was copied once, but not with shared weights
        return None
    return copied if shares_weights(module, copied) else None


class Lanes:
    """Several lanes of one network.

    Args:
        prepared: the network, once for each lane.
        threads: of each forward pass.
    """

    def __init__(self, prepared: Sequence[Prepared], threads: int) -> None:
        self.prepared, self.threads = tuple(prepared), threads
        self._pool = lane_pool(len(self.prepared), threads)

    @classmethod
    def of(cls, prepared: Prepared, checked: Checked, name: str, widths: tuple[int, ...]) -> Lanes | None:
        """As many lanes as torch has threads for; None where that is one, or where the network must run alone.

        It must run alone where it has hooks or cannot be copied over its own weights, where a pass changes anything that its
        digest sees, or where passes side by side give other bits than one after the other.
        """
        threads = prepared.execution.threads
        count = torch.get_num_threads() // threads
        if count < 2 or prepared.execution.compile:
            return None
        twins = [twin(prepared.module) for _ in range(count)]
        if any(t is None for t in twins):
            return None
        lanes = cls([replace(prepared, module=t) for t in twins], threads)
        before = [module_digest(p.module) for p in lanes.prepared]
        try:
            same = lanes._same(checked, name, widths) and lanes._same(checked, name, widths)
        except Exception:  # no room for so many, or it only runs in the main thread
            return None
        return lanes if same and [module_digest(p.module) for p in lanes.prepared] == before else None

    def _run(self, prepared: Prepared, checked: Checked, name: str, widths: tuple[int, ...]) -> Outputs:
        with torch.inference_mode(), fixed_kernels():
            return logits_of(prepared, checked.rows.clone(), widths, name)

    def _same(self, checked: Checked, name: str, widths: tuple[int, ...]) -> bool:
        """Whether all lanes at once give the bits of the check."""
        runs = [self._pool.submit(self._run, p, checked, name, widths) for p in self.prepared]
        return all(moved(r.result(), checked.logits).equal for r in runs)

    def check_again(self, checked: Checked, name: str, widths: tuple[int, ...]) -> None:
        """`rsrouter.sampling.check.check_again` in every lane."""

        def run(prepared: Prepared) -> None:
            with fixed_kernels():
                check_again(checked, prepared, name, widths)

        for done in [self._pool.submit(run, p) for p in self.prepared]:
            done.result()

    def draw(
        self, asked: Round, batches: Sequence[Sequence[Segment]], noise: NoiseStream | CounterNoise
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, Outputs] | None]:
        """As `rounds.draw`. Neighbouring batches stay together: they read the same chunks of noise."""
        size = max(-(-len(batches) // (PIECES * len(self.prepared))), -(-CHUNK // asked.batch))
        todo = [batches[at : at + size] for at in range(0, len(batches), size)]
        lock = threading.Lock()

        def work(prepared: Prepared) -> list[tuple[torch.Tensor, tuple[torch.Tensor, Outputs] | None]]:
            found: list[tuple[torch.Tensor, tuple[torch.Tensor, Outputs] | None]] = []
            mine = noise.fresh()
            with fixed_kernels():
                while True:
                    with lock:
                        part = todo.pop(0) if todo else None
                    if part is None:
                        return found
                    try:
                        found.append(draw(asked, part, mine, prepared))
                    except BaseException:
                        with lock:
                            todo.clear()
                        raise

        running = [self._pool.submit(work, p) for p in self.prepared]
        errors = [e for r in running if (e := r.exception()) is not None]  # which waits for each
        if errors:
            raise errors[0]
        parts = [part for r in running for part in r.result()]
        return torch.stack([counts for counts, _ in parts]).sum(0), parts[0][1]


__all__ = ["Lanes", "shares_weights", "twin"]
