"""Options that several verbs share, and how they become arguments."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rsrouter.core.errors import InputError
from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan

Device = Annotated[str, typer.Option("--device", help="Where networks run: cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of labelling and training.")]
Out = Annotated[Path, typer.Option("--out", help="Where to write; nothing there is overwritten.")]
Alpha = Annotated[float, typer.Option("--alpha", help="Failure probability of each certificate.")]
Radii = Annotated[str, typer.Option("--radii", help="Radii you care about: '0,0.25,0.5' or 'start:stop:step', stop included.")]
DEFAULT_RADII = "0:2:0.25"
#: No figure or plan needs more.
MOST_RADII = 10_000


class Format(StrEnum):
    """How a verb prints its result."""

    text = "text"
    json = "json"


OutputFormat = Annotated[Format, typer.Option("--format", help="text for people, json for programs.")]


def parse_radii(text: str) -> tuple[float, ...]:
    """Radii from `"0,0.25,0.5"` or `"0:2:0.25"` (stop included).

    Raises:
        InputError: anything else.
    """
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if not (step > 0 and stop >= start and (stop - start) / step <= MOST_RADII):
                raise ValueError
            return tuple(round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-9) + 1))
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            "Radii cannot be read",
            expected="'0,0.25,0.5' or 'start:stop:step'",
            received=repr(text),
            remedy="0:2:0.25 means 0, 0.25, ..., 2",
        ) from error


def make_plan(kind: str, n: int, n0: int, radii: str) -> Plan:
    """A plan from a verb's options.

    Raises:
        InputError: unknown kind. PlanError: numbers that cannot work.
    """
    if kind == "fixed":
        return FixedPlan(n0, n)
    if kind == "adaptive":
        return AdaptivePlan(n, parse_radii(radii), n0)
    raise InputError("Unknown plan", expected="adaptive or fixed", received=repr(kind), remedy="--plan adaptive")
