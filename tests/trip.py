"""The trip of one image: which files and functions of the package a certificate passes through.

    PYTHONPATH=. python tests/trip.py

Counted with `sys.setprofile`, once everything is imported, on a flat router over two linear experts. A function is what has
a name of its own: comprehensions, generator expressions and lambdas belong to the function they stand in.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import numpy as np
import torch

import rsrouter
from rsrouter import AdaptivePlan, ExpertPool
from rsrouter.cli import main
from tests.helpers import small_router as small

PACKAGE = Path(rsrouter.__file__).parent

#: The most files of `rsrouter certify`; files and functions of a call of `RoutedSmooth.certify` on a prepared classifier.
COMMAND, METHOD = 35, (15, 110)


def entered(work: Callable[[], object]) -> dict[str, set[str]]:
    """Files of the package that `work` enters, each with the functions that it calls there."""
    found: dict[str, set[str]] = {}

    def called(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            name = code.co_qualname
            while name.endswith(">"):
                name = name.rpartition(".<locals>.")[0] or "module"
            found.setdefault(str(Path(code.co_filename).relative_to(PACKAGE)), set()).add(name)

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def of_the_method() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """`RoutedSmooth.certify` on one image: the first call of a classifier, which prepares its networks, and the third."""
    pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
    image, plan = small.pixels(small.images(1)), AdaptivePlan(1000, (0.0, 0.1, 0.2), 50)
    small.routed(pool).certify(image, plan)  # imports and caches
    routed = small.routed(pool)
    first = entered(lambda: routed.certify(image, plan))
    routed.certify(image, plan)
    return first, entered(lambda: routed.certify(image, plan))


def of_the_command() -> dict[str, set[str]]:
    """`rsrouter certify` of a data set of one image into a new table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
        small.routed(pool).save_pretrained(folder / "router")
        image = (small.pixels(small.images(1)) * 255).round().to(torch.uint8).numpy()
        np.savez(folder / "one.npz", images=image, labels=np.array([0]))

        def run(out: str) -> None:
            words = ["certify", str(folder / "router"), "--data", str(folder / "one.npz"), "--out", str(folder / out)]
            argv = patch.object(sys, "argv", ["rsrouter", *words, "--n", "1000", "--radii", "0,0.1"])
            with argv, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                main()
            assert (folder / out).exists()

        run("first.tsv")  # imports and caches
        return entered(lambda: run("second.tsv"))


if __name__ == "__main__":
    (first, method), command = of_the_method(), of_the_command()
    names = ("RoutedSmooth.certify, first call", "RoutedSmooth.certify, later calls", "rsrouter certify")
    for what, found in zip(names, (first, method, command), strict=True):
        for file, functions in sorted(found.items()):
            print(f"{file:32} {len(functions):>3}" + (f"  {', '.join(sorted(functions))}" if "-v" in sys.argv else ""))
        print(f"{what}: {len(found)} files, {sum(map(len, found.values()))} functions\n")
    sys.exit(len(method) > METHOD[0] or sum(map(len, method.values())) > METHOD[1] or len(command) > COMMAND)
