"""Pretends another processor: products and convolutions are rounded once more, otherwise for each shape and each row.

`PYTHONPATH=tests/rounding python -m pytest` (worker processes included). A function keeps its bits at one execution; what
compares bits across shapes, or takes rows of a batch to be alike, fails.
"""

from __future__ import annotations

import sys
import zlib
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

#: Largest relative change: some units in float32's last place.
SIZE = 5e-7


def install(torch: Any) -> Any:
    """Puts the rounding into torch's CPU kernels, which last as long as the library that is returned."""
    aten, library = torch.ops.aten, torch.library.Library("aten", "IMPL")

    @cache
    def factors(key: str, size: tuple[int, ...]) -> Any:
        return 1 + SIZE * (2 * torch.rand(size, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) - 1)

    def rounded(out: Any, *inputs: Any) -> Any:
        if out.dtype != torch.float32 or not out.numel():
            return out
        return out.mul_(factors(repr([tuple(i.shape) for i in inputs]), (*out.shape[:2], *[1] * (out.dim() - 2))))

    def mm(a: Any, b: Any) -> Any:
        return rounded(aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1])), a, b)

    def bmm(a: Any, b: Any) -> Any:
        return rounded(aten.bmm.out(a, b, out=a.new_empty(*a.shape[:2], b.shape[2])), a, b)

    def addmm(bias: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        out = a.new_empty(a.shape[0], b.shape[1])
        return rounded(aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out), a, b)

    def convolution(x: Any, weight: Any, *rest: Any) -> Any:
        return rounded(aten._convolution(x, weight, *rest, False, False, True, True), x, weight)

    for kernel in (mm, bmm, addmm, convolution):
        library.impl(kernel.__name__, kernel, "CPU", allow_override=True)
    return library


class _AfterTorch(MetaPathFinder):
    """Installs the rounding when torch has been imported, for whoever imports it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        found: Any = find_spec("torch")
        run = found.loader.exec_module

        def run_and_install(module: Any) -> None:
            run(module)
            module.pretended_rounding = install(module)

        found.loader.exec_module = run_and_install
        return found


sys.meta_path.insert(0, _AfterTorch())
