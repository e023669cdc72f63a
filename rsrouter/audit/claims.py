"""Checks of a table's claims against its router and the data it names: every row, no vote drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rsrouter.audit.state import State
from rsrouter.audit.votes import repeated_rows
from rsrouter.data import ImageData
from rsrouter.process import kernels
from rsrouter.results import Table, TableMetadata
from rsrouter.results.choices import seed_freedom, selection
from rsrouter.results.verify import other_claims, verify_rows
from rsrouter.sampling.execution import Execution, default_batch, largest_input, resolve_device
from rsrouter.smooth import RoutedSmooth, Smooth

Found = list[tuple[int | None, str]]
#: Images in one pass of a core.
CORE_ROWS = 64


def find_subject(state: State, table: Table, run: TableMetadata, routed: RoutedSmooth) -> Smooth | RoutedSmooth:
    """The classifier that the table is about, running as the table says; differences from what is published are found."""
    name, wrong = table.name, Found()
    recorded = Execution.recorded(run.execution, run.device, f"the metadata of {name}")
    execution = recorded.nearest(resolve_device(state.settings.device))
    whole = RoutedSmooth(routed.pool, routed.router, execution=execution, noise=run.noise)
    subjects: list[Smooth | RoutedSmooth] = [whole, *(Smooth(e, execution=execution, noise=run.noise) for e in routed.pool)]
    equal = [s for s in subjects if s.digest == run.digest]  # experts of one pool may be equal but for their names
    subject = next((s for s in equal if s.tree.root == run.tree.root), equal[0] if equal else None)
    if subject is None:
        wrong.append((None, f"the table is about weights with digest {run.digest}, the router's is {routed.digest}"))
        alone = [x for x in subjects if isinstance(x, Smooth) and x.expert.name == name]
        subject = alone[0] if run.role == "expert" and alone else whole
    if run.noise != routed.noise:
        wrong.append((None, f"the table was drawn with {run.noise} noise, the router is published with {routed.noise}"))
    kind = None if isinstance(subject, Smooth) else subject.router.kind
    claims = other_claims(
        run,
        subject.tree,
        role="expert" if isinstance(subject, Smooth) else "routed",
        router=kind,
        experts=[(e.name, float(e.sigma), e.digest) for e in subject.experts],
        kernels=kernels(recorded.precision),
        core=None if subject.core is None else (subject.core.expert.name, subject.core.expert.digest),
    )
    wrong += [(None, text) for text in claims]
    state.add("digests", name, wrong, "the table is about these weights" if not wrong else "the table is about other weights")
    _execution(state, table, run, routed)
    return subject


def _execution(state: State, table: Table, run: TableMetadata, routed: RoutedSmooth) -> None:
    """Votes of another dtype, layout or batch belong to another function than the one that is published."""
    where = torch.device("cpu" if run.device == "cpu" else "cuda")
    batch = routed.execution.batch or default_batch(largest_input(routed.shape, (m.module for m in routed.routed.models)), where)
    published = replace(routed.execution.nearest(where), batch=batch).to_dict()
    told = Execution.recorded(run.execution, run.device).to_dict()
    wrong: Found = [
        (None, f"{key} {told[key]} in the table, {published[key]} as the router is published")
        for key in published
        if told[key] != published[key]
    ]
    state.add(
        "execution",
        table.name,
        wrong,
        "the table was drawn as the router runs" if not wrong else "the table is about another function than the published one",
        execution=dict(run.execution),
    )


def check_head(state: State, table: Table, run: TableMetadata) -> None:
    """A table of a head that was declared: its rows and its declaration; weights and votes are not a router's."""
    name, declared = table.name, run.heads
    assert declared is not None
    told, wrong = declared.declaration, Found()
    if told.seed != told.derived_seed:
        wrong.append((None, f"seed {told.seed} was chosen by hand; the declaration gives {told.derived_seed}"))
    free = seed_freedom(run)
    state.add(
        "seed", name, wrong, free.text if not wrong else "the seed does not derive from the declaration", digits=free.digits
    )
    state.add("heads", name, [], declared.text, declaration=told.digest, share=told.share, heads=[h.name for h in told.heads])
    check_rows(state, table, run, None)
    state.warn(
        name,
        "when its heads were declared, and how many declarations were tried, is not in the table: ask for a copy of this one "
        "from before the draw",
    )
    why = "a head's votes are drawn again by `rsrouter heads check`, which takes its trunk, its weights and the images"
    for check in ("digests", "execution", "labels", "votes", "fresh", "attack"):
        state.skip(check, name, why)


def check_seed(state: State, table: Table, run: TableMetadata, subject: Smooth | RoutedSmooth) -> None:
    """Whether the seed derives from the classifier, and how free its choice was."""
    derived, wrong = subject.routed.default_seed(run.seed_from), Found()
    free = seed_freedom(run)
    if run.seed != derived:
        lucky = "It could have been picked for a lucky result"
        wrong.append((None, f"seed {run.seed} was chosen by hand; the digests give {derived}. {lucky}"))
    if run.seed_derived != (run.seed == derived):
        wrong.append((None, f"the table says seed_derived {run.seed_derived}"))
    state.add(
        "seed", table.name, wrong, free.text if not wrong else "the seed does not derive from the digests", digits=free.digits
    )


def check_rows(state: State, table: Table, run: TableMetadata, subject: Smooth | RoutedSmooth | None) -> None:
    """Every row against its votes, the images of the job against the rows, and rows against each other."""
    name = table.name
    cells = verify_rows(table, None if subject is None else subject.tree)
    state.add(
        "radii",
        name,
        [(m.idx, str(m).partition(": ")[2]) for m in cells],
        f"{len({m.idx for m in cells})} of {len(table)} rows do not follow from their votes"
        if cells
        else f"all {len(table)} rows follow from their votes",
        rows=len(table),
    )
    missing = np.setdiff1d(run.ids, table.idx)
    wrong: Found = []
    if missing.size:
        few = ", ".join(map(str, missing[:8].tolist())) + (", ..." if missing.size > 8 else "")
        wrong.append((None, f"{len(table)} of {len(run.ids)} images have a row; there is none for {few}"))
    if run.shard is not None:
        wrong.append((None, f"the table is shard {run.shard.index} of {run.shard.count} of its job: merge the shards"))
    state.add(
        "images", name, wrong, f"{len(table) - len(set(table.idx) - set(run.ids))} of {len(run.ids)} rows: {selection(run)}"
    )
    if run.picked:
        state.warn(name, f"{selection(run)}: certified accuracy holds for these images alone")
    votes = [(int(table.idx[i]), table.counts(i)) for i in range(len(table))]
    groups = repeated_rows(votes)
    state.add(
        "repeats",
        name,
        [(g[0], f"images {', '.join(map(str, g))} have equal votes, which chance does not explain") for g in groups],
        "no two images share their votes" if not groups else f"{len(groups)} groups of images share their votes",
    )


def check_core(state: State, table: Table, subject: Smooth | RoutedSmooth, images: ImageData) -> None:
    """Every uncertified answer against a new pass of the core network."""
    rows = np.flatnonzero(table.abstained)
    if subject.core is None:
        return
    found: Found = []
    for start in range(0, len(rows), CORE_ROWS):
        state.tell("core", start, len(rows))
        part = rows[start : start + CORE_ROWS]
        x = torch.stack([images.image(int(i)) for i in table.idx[part]])
        other = subject.core.differs(x, table.core[part], state.settings.device)
        again = subject.core.answers(x, state.settings.device)
        found += [
            (int(table.idx[i]), f"the core's answer {table.core[i]} published, {own} by its network")
            for i, own, wrong in zip(part, again, other, strict=True)
            if wrong
        ]
    state.add("core", table.name, found, f"{len(rows)} uncertified answers of {subject.core.expert.name} computed again")


def check_labels(state: State, table: Table, run: TableMetadata, images: ImageData) -> None:
    """The table's labels, and the size of its data set, against the data."""
    wrong: Found = []
    size = run.data.get("images")
    if size != len(images):
        wrong.append((None, f"the table says that its data set has {size} images; the data have {len(images)}"))
    fingerprint = run.data.get("fingerprint")
    if fingerprint is not None and fingerprint != images.fingerprint:
        state.warn(table.name, "the data have another fingerprint than the table names; rows are compared with them")
    if not images.labelled:
        state.skip("labels", table.name, "the data have no labels")
        return
    truth = images.labels.numpy()[table.idx]
    other = np.flatnonzero(table.label != truth)
    wrong += [(int(table.idx[i]), f"label {table.label[i]} published, {truth[i]} in the data") for i in other]
    state.add(
        "labels",
        table.name,
        wrong,
        f"all {len(table)} labels are those of the data"
        if not wrong
        else f"{len(other)} of {len(table)} labels are not those of the data",
    )
