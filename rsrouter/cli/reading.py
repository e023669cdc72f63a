"""Values of options, read from the text of a command line: numbers, radii, sizes, names and plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsrouter.core.errors import InputError

if TYPE_CHECKING:
    from rsrouter.core.plans import Plan

#: No figure or plan needs more.
MOST_RADII = 10_000


def parse_numbers(text: str, what: str, expected: str = "numbers or fractions separated by commas") -> list[float]:
    """Numbers from `"0.25,0.5"` or `"64/255"`; InputError names the option `what` and what is `expected` of it."""
    try:
        return [_number(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"--{what} cannot be read",
            expected=expected,
            received=repr(text),
            remedy="such as 0.25,0.5 or 64/255" if expected.startswith("numbers") else "leave it out to take the default",
        ) from error


def _number(text: str) -> float:
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(text)


def parse_shape(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise InputError("--input-shape cannot be read", expected="C,H,W", received=repr(text), remedy="such as 3,32,32")
    return [int(part) for part in parts]


def parse_sides(text: str, what: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--{what} cannot be read", expected="SIDE or HEIGHTxWIDTH", received=repr(text), remedy="32, or 32x48")
    return [int(parts[0]), int(parts[-1])]


def parse_resize(text: str) -> dict[str, Any] | None:
    """`SIZE[:CROP][:INTERPOLATION]`, or none."""
    if text == "none":
        return None
    *sizes, last = text.split(":")
    named = not last[:1].isdecimal()
    sides = [parse_sides(part, "resize") for part in (sizes if named else [*sizes, last])]
    if not 1 <= len(sides) <= 2:
        raise InputError(
            "--resize cannot be read",
            expected="SIZE, SIZE:CROP or SIZE:CROP:INTERPOLATION, or none",
            received=repr(text),
            remedy="such as 256:224:bicubic",
        )
    crop = {"crop": sides[1]} if len(sides) == 2 else {}
    return {"size": sides[0], **crop, **({"interpolation": last} if named else {})}


def parse_class_names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    path = Path(text)
    if "," not in text and path.is_file():
        from rsrouter.stored import read_bytes

        content = read_bytes(path, "--classes").decode("utf-8-sig", "surrogateescape")
        return [line.strip() for line in content.splitlines() if line.strip()]
    return [name.strip() for name in text.split(",")]


def parse_label_map(text: str) -> dict[str, Any]:
    """Arguments of `rsrouter.experts.map_labels` from `--label-map`.

    Raises:
        InputError: a file that holds something else.
    """
    if text == "first":
        return {}
    path = Path(text)
    if path.is_file() and path.suffix == ".json":
        from rsrouter.stored import read_json

        names = read_json(path, "--label-map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(
                "--label-map cannot be read",
                expected='{"its name": "the name"}',
                received=type(names).__name__,
                remedy="names of an expert's classes, and what they are to be called",
            )
        return {"names": names}
    return {"order": parse_class_names(text)}


def parse_radii(text: str) -> tuple[float, ...]:
    """Radii from `"0,0.25,0.5"` or `"0:2:0.25"` (stop included).

    Raises:
        InputError: anything else.
    """
    try:
        if ":" in text:
            start, stop, step = (_number(part) for part in text.split(":"))
            if not (step > 0 and stop >= start and (stop - start) / step <= MOST_RADII):
                raise ValueError
            return tuple(round(start + i * step, 10) for i in range(int((stop - start) / step + 1e-9) + 1))
        return tuple(_number(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(
            "Radii cannot be read",
            expected="'0,0.25,0.5' or 'start:stop:step'",
            received=repr(text),
            remedy="--radii 0:2:0.25 stands for 0, 0.25, ..., 2",
        ) from error


def make_plan(kind: str, n: int, n0: int, radii: str, patience: float | None = None) -> Plan:
    """A plan from a verb's options.

    Raises:
        InputError: unknown kind. PlanError: numbers that cannot work, a patience for a plan that never gives up.
    """
    if patience is not None:
        from rsrouter.core.patience import with_patience

        return with_patience(make_plan(kind, n, n0, radii), patience)
    from rsrouter.core.plans import AdaptivePlan, FixedPlan, plan_from_dict
    from rsrouter.stored import parse_json

    if kind.lstrip().startswith("{"):  # a plan as a table's JSON and a card's command have it: every setting
        return plan_from_dict(parse_json(kind, "--plan", remedy="copy it from the card, or from a table's JSON"))
    if kind == "fixed":
        return FixedPlan(n0, n)
    if kind == "adaptive":
        return AdaptivePlan(n, parse_radii(radii), n0)
    raise InputError("Unknown plan", expected="adaptive or fixed", received=repr(kind), remedy="--plan adaptive")
