"""A certified table carried over to the same networks run in another way, for a fraction of the votes (Ugare et al. 2024).

Both executions vote on the same noisy copies; the share on which they disagree is bounded, and every bound of the table moves by
it (THEORY.md, section 7). What is certified then is the classifier of the second execution, on the device that drew the pairs,
with failure probability at most the table's alpha plus the one of the disagreements.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import lcm
from pathlib import Path

from rsrouter.core.bounds import AlphaSplit, check_alpha, check_whole
from rsrouter.core.errors import InputError, IntegrityError, ResultsError
from rsrouter.core.recompute import Moved, recompute
from rsrouter.core.tree import Tree
from rsrouter.core.types import ABSTAIN, Certificate
from rsrouter.files import sha256_of
from rsrouter.jobs.certify import settled_batch, with_batch
from rsrouter.jobs.driver import Images
from rsrouter.jobs.workers import machine_facts
from rsrouter.results import ResultsWriter, Row, Table, TableMetadata, read_table, require_sound
from rsrouter.results.about import Transfer
from rsrouter.sampling.engine import Engine
from rsrouter.sampling.execution import Execution, resolve_device
from rsrouter.sampling.paired import pairs_of
from rsrouter.smooth import RoutedSmooth, Smooth

#: Called with how many images are done, and of how many.
Progress = Callable[[int, int], None]


def transfer_table(
    smoothed: Smooth | RoutedSmooth,
    images: Images,
    table: str | Path,
    out: str | Path,
    execution: Execution,
    *,
    votes: int = 10_000,
    alpha: float = 1e-3,
    device: str | None = None,
    own_device: str | None = None,
    progress: Progress | None = None,
) -> Table:
    """Certificates of `table` for its networks run by `execution`.

    Args:
        smoothed: the classifier that the table is about.
        images: the certified data set, by image id.
        table: with votes; it is only read.
        out: the new table.
        execution: how the networks are to run; with the table's batch, where it says none.
        votes: paired draws for each network and certified image, rounded up to whole batches.
        alpha: failure probability of the bounds on disagreement; it adds to the table's.
        device: where `execution` is to run; None is the CPU.
        own_device: where the table's own execution runs.
        progress: called after every image.

    Returns:
        The new table; its radii are not larger than the old ones, and where nothing is left it abstains.

    Raises:
        IntegrityError: rows that do not follow from their votes, or a table of other weights.
        ResultsError: no table of certificates, or one that was transferred before; the errors of writing.
        InputError: another machine than the one that drew the votes, whose function could not be run; arguments that do not fit.
    """
    core = None if smoothed.core is None else smoothed.core.expert.digest
    path, votes, alpha = Path(table), check_whole("votes", votes, 1), float(check_alpha(alpha))
    parent = require_sound(read_table(path))
    about = parent.described()
    if about.transfer is not None:
        raise ResultsError(
            "The table was transferred before",
            expected="a table that `certify` wrote",
            received=f"a transfer of {about.transfer.parent[:12]}",
            remedy="transfer the first table",
        )
    if not about.terms.alpha + alpha < 1.0:
        raise InputError(
            "The alphas add up to 1 or more", expected="less", received=f"{about.terms.alpha + alpha}", remedy="lower them"
        )
    if smoothed.digest != about.digest or core != (None if about.core is None else about.core.digest):
        raise IntegrityError(
            "The table is about another classifier",
            expected=f"digest {about.digest}" + ("" if about.core is None else f", core {about.core.digest}"),
            received=f"digest {smoothed.digest}" + ("" if core is None else f", core {core}"),
            remedy="give the router that the table was certified with",
        )
    tree = smoothed.tree
    first = smoothed.with_execution(Execution.recorded(about.execution, about.device, "the metadata of the table"))
    _same_machine(about, own_device, first.execution)
    second = smoothed.with_execution(execution.on(resolve_device(device)))
    second = with_batch(second, second.execution.batch or settled_batch(first, own_device))
    pairs = lcm(settled_batch(first, own_device), second.execution.batch)
    count = -(-votes // pairs) * pairs
    engines = [
        Engine(s.routed.models, s.shape, seed=about.seed, device=where, execution=s.execution, noise=about.noise)
        for s, where in ((first, own_device), (second, device))
    ]
    facts = machine_facts(device)
    record = Transfer(
        execution=second.execution.to_dict(),
        device=facts["device"],
        versions=facts["versions"],
        threads=second.execution.threads_of(resolve_device(device)),
        instructions=facts["instructions"],
        votes=count,
        alpha=alpha,
        parent=sha256_of(path),
    )
    moved = Moved(AlphaSplit.even(alpha, tree.paths), count)
    metadata = about.model_copy(update={"transfer": record, "name": f"{about.name}, transferred"}).to_dict()
    with ResultsWriter(out, metadata) as writer:
        for at in range(len(parent)):
            if int(parent.idx[at]) not in writer.done():
                row = _row(parent, at, images, tree, engines, about, moved)
                if second.core is not None and row.predict == ABSTAIN:
                    row = replace(row, core=int(second.core.answers(images[row.idx][0][None], device)[0]))
                writer.append(row)
            if progress is not None:
                progress(at + 1, len(parent))
        for engine in engines:
            engine.check_again()
        writer.arrange([int(i) for i in parent.idx])
    return require_sound(read_table(out))


def _same_machine(about: TableMetadata, device: str | None, execution: Execution) -> None:
    """The pairs must run the very function that the table's votes came from."""
    facts = machine_facts(device)
    here = {
        "device": facts["device"],
        "threads": execution.threads_of(resolve_device(device)),
        "instructions": facts["instructions"],
    }
    there = {"device": about.device, "threads": about.threads, "instructions": about.instructions}
    for library in ("torch", "numpy"):
        here[library], there[library] = facts["versions"].get(library), about.versions.get(library)
    if differs := [f"{key} {there[key]}" for key in there if there[key] != here[key]]:
        raise InputError(
            "The table's own function cannot be run here",
            expected=", ".join(differs),
            received=", ".join(f"{key} {here[key]}" for key in there if there[key] != here[key]),
            remedy="transfer on a machine like the one that certified (--threads), or certify anew",
        )


def _row(parent: Table, at: int, images: Images, tree: Tree, engines: list[Engine], about: TableMetadata, moved: Moved) -> Row:
    start, idx, counts = time.perf_counter(), int(parent.idx[at]), parent.counts(at)
    found: dict[str, list[int]] = {}
    if int(parent.predict[at]) != ABSTAIN:
        found = pairs_of(tree, counts, engines, images[idx][0], idx, moved.votes)
    again = recompute(
        tree, about.plan, about.split, [{**counts, "moved": found}], rule=about.rule, sides=about.sides, moved=moved
    )[0]
    if not isinstance(again, Certificate):
        raise again
    row = Row.from_certificate(
        again,
        idx=idx,
        label=int(parent.label[at]),
        seconds=time.perf_counter() - start,
        rule=str(parent.rule[at]),
        seed=about.seed,
    )
    return replace(row, counts={**(row.counts or {}), "moved": found})


def check_parent(table: Table, parent: str | Path) -> None:
    """Whether `parent` still is the table that `table` was transferred from.

    Raises:
        ResultsError: a table that was not transferred.
        IntegrityError: the parent's bytes, or the votes that it shares with the transfer, are not what they were.
    """
    about = table.described()
    if about.transfer is None:
        raise ResultsError(
            "The table was not transferred", expected="a transfer", received=table.name, remedy="name the transfer"
        )
    path = Path(parent)
    if (now := sha256_of(path)) != about.transfer.parent:
        raise IntegrityError(
            "The table's parent was edited after the transfer",
            expected=f"sha256 {about.transfer.parent}",
            received=f"sha256 {now}",
            remedy="restore the parent, or transfer it again",
        )
    require_sound(read_table(path))


__all__ = ["check_parent", "transfer_table"]
