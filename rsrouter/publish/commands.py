"""From a table's metadata to the command that makes it again, and to what a publisher was free to choose."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan
from rsrouter.results import Table, TableMetadata, printable
from rsrouter.router.base import Router

SAFE = re.compile(r"[^A-Za-z0-9._-]+")


def certify_command(table: Table, repo_id: str, imports: Sequence[str] = ()) -> str:
    """The command that certifies the same images under the same terms: equal plan, seed, and so votes. `imports` are modules that
    register architectures."""
    about = table.described()
    words = ["rsrouter", "certify", repo_id]
    if about.role == "expert":
        words += ["--expert", about.experts[0].name]
    words += ["--data", data_argument(about), *_reading(about), *_part(about), *plan_options(about.plan)]
    words += ["--alpha", repr(about.alpha), "--rule", about.rule, "--sides", about.sides]
    if not about.seed_derived:
        words += ["--seed", str(about.seed)]
    elif about.seed_from:
        words += ["--seed-from", about.seed_from]
    if about.device != "cpu":
        words += ["--device", about.device.split(":")[0].split(" ")[0]]
    elif about.threads is not None:
        words += ["--threads", str(about.threads)]
    words += [word for name in imports for word in ("--import", name)]
    return shlex.join([*words, "--out", f"{SAFE.sub('-', table.name)}.tsv"])


def plan_options(plan: Plan) -> list[str]:
    """The options of `certify` that give exactly this plan.

    >>> plan_options(AdaptivePlan(1000, (0.1, 1 / 3), 50))
    ['--plan', 'adaptive', '--n', '1000', '--n0', '50', '--radii', '0.1,0.3333333333333333']
    >>> plan_options(FixedPlan(100, 1000))
    ['--plan', 'fixed', '--n', '1000', '--n0', '100']
    >>> plan_options(AdaptivePlan(1000, (0.0,), 50))[-2:]
    ['--radii', '0.0']
    """
    grid = None if plan.radii is None else plan.radii or (0.0,)  # a plan does not keep radius 0, which always counts
    plain: Plan = FixedPlan(plan.n0, plan.n_max) if grid is None else AdaptivePlan(plan.n_max, grid, plan.n0)
    if plain.to_dict() != plan.to_dict():
        return ["--plan", json.dumps(plan.to_dict())]
    words = ["--plan", plan.kind, "--n", str(plan.n_max), "--n0", str(plan.n0)]
    return words if grid is None else [*words, "--radii", ",".join(map(repr, map(float, grid)))]


def data_argument(about: TableMetadata) -> str:
    """What stands behind `--data`: the data set's name, or DATA where that is nothing one could type."""
    name = str(about.data.get("name") or "")
    return name if re.fullmatch(r"[\w./:@+-]+", name) else "DATA"


def _reading(about: TableMetadata) -> list[str]:
    done = about.data.get("preprocessing")
    given = {key: done[key] for key in ("size", "channels") if isinstance(done.get(key), int)} if isinstance(done, dict) else {}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def _part(about: TableMetadata) -> list[str]:
    """The options that choose the certified images, none where they are all of the data set (or picked one by one)."""
    if len(about.indices) != 1 or about.indices[0] == (0, about.data.get("images"), 1) or about.indices[0][2] < 1:
        return []
    start, stop, step = about.indices[0]
    return ["--start", str(start), "--count", str(step * len(range(start, stop, step)))] + (
        [] if step == 1 else ["--every", str(step)]
    )


def images_in_words(about: TableMetadata) -> str:
    """Which images were certified; says so where they were picked one by one."""
    whole, count = about.data.get("images"), about.num_images
    of = f"{count:,} of {whole:,}" if isinstance(whole, int) else f"{count:,}"
    if about.picked or any(step < 1 for *_, step in about.indices):
        few = ", ".join(map(str, about.ids[:6].tolist()))
        return f"{of} images, PICKED ONE BY ONE (numbers {few}, ...): nothing says that others would do as well"
    start, stop, step = about.indices[0] if about.indices else (0, 0, 1)
    if (start, stop, step) == (0, whole, 1):
        return f"all {count:,} images"
    each = "" if step == 1 else f", one in {step}"
    return f"{of} images{each}, from number {start} on"


def freedom(about: TableMetadata, router: Router) -> tuple[str, str]:
    """What a publisher could have varied to draw other noise, in two sentences."""
    price = "the best of k tries errs with probability at most k times alpha, and k cannot be seen"
    if not about.seed_derived:
        return (f"The seed was chosen by hand, among {2**63:.0e}.", f"Nothing shows how many seeds were tried: {price}.")
    numbers = [*getattr(router, "thresholds", ()), *(v.sigma for v in getattr(router, "voters", ()) if v.sigma is not None)]
    digits = sum(len(re.sub(r"[^0-9]", "", repr(float(number)).partition(".")[2])) for number in numbers)
    weights = sum(t.numel() for t in router.modules.state_dict().values())
    free = ["the expert"]
    if about.role == "routed":
        several = f"one of {len(numbers)} thresholds and noise levels" if len(numbers) > 1 else "the threshold or noise level"
        free = [f"{several} ({digits} decimals)"] if numbers else []
        free += [f"one of {weights:,} trained numbers"] if weights else []
        free += ["an expert"]
    free += ["that text"] if about.seed_from else []
    mixed = f" and from the public text {printable(about.seed_from)!r}" if about.seed_from else ""
    return (
        f"The seed follows from the classifier by value{mixed}, not from plan, alpha, names or images.",
        f"To draw other noise, a publisher would have had to change {' or '.join(free)}: {price}.",
    )


__all__ = ["SAFE", "certify_command", "data_argument", "freedom", "images_in_words", "plan_options"]
