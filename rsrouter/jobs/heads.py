"""Several heads on one frozen trunk, certified on the same noisy copies: the forward passes of the trunk are paid for once.

A head that was chosen after its noise was seen would make the votes depend on each other, and no bound would hold. So heads are
declared first; the noise is keyed by the declaration, so that other heads see other noise; and alpha is shared among them, so
that any may be chosen afterwards (THEORY.md, section 8).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rsrouter.audit.state import environment
from rsrouter.audit.votes import ROUNDING_SHARE, ROUNDING_VOTES, same_environment
from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import InputError, IntegrityError, NetworkError, PlanError
from rsrouter.core.plans import FixedPlan
from rsrouter.core.recompute import recompute
from rsrouter.core.requests import ESTIMATE, SELECT
from rsrouter.core.terms import Terms
from rsrouter.core.types import Certificate
from rsrouter.experts.expert import Expert
from rsrouter.files import write_atomically
from rsrouter.jobs.certify import check_order, describe_data
from rsrouter.jobs.driver import Images, Reader
from rsrouter.jobs.features import Cached, Drawn, Features
from rsrouter.jobs.workers import machine_facts
from rsrouter.process import kernels
from rsrouter.results import (
    ExpertRecord,
    ResultsWriter,
    Row,
    Table,
    TableMetadata,
    TreeRecord,
    pack_ids,
    read_table,
    require_sound,
)
from rsrouter.results.declared import Declaration, DeclaredHead, HeadRecord
from rsrouter.router.base import vote_digest
from rsrouter.router.trunk import Headed, Trunk, head_digest, read_head
from rsrouter.sampling.engine import Engine, VoteModel, image_identity
from rsrouter.sampling.execution import Execution, default_batch, largest_input, resolve_device
from rsrouter.sampling.features import linear_votes, noisy_outputs
from rsrouter.sampling.noise import STREAMS

#: A head as it is given: the layer, or a safetensors file with its weight and bias.
Head = nn.Linear | str | Path
#: The trunk among an engine's networks, and what its two outputs are called.
TRUNK = "trunk"
_OUTPUTS = ("features", "logits")


def declare_heads(
    trunk: Expert,
    heads: Mapping[str, Head],
    terms: Terms,
    *,
    sigma: float | None = None,
    noise: str = "gaussian",
    execution: Execution | None = None,
    seed_from: str = "",
    device: str | None = None,
) -> Declaration:
    """Fixes everything that a later draw of noisy features is to certify.

    Args:
        trunk: the expert whose features the heads read; it stays as it is.
        heads: last layers by name, in their order: `(F,)` features to a logit for each class, in float32.
        terms: a `FixedPlan`, and alpha of *all* heads together for each image: each spends its part.
        sigma: noise level; None: the trunk's.
        noise: "gaussian" or "sound".
        execution: how the trunk runs.
        seed_from: a public text that the derived seed depends on as well.
        device: where the trunk is to run; None is the CPU.

    Returns:
        The declaration. Publish it, or keep its digest, before the draw: nobody then need believe that the heads came first.

    Raises:
        InputError: no head, heads that do not fit the trunk or each other, one head twice; an expert without features.
        PlanError: another plan, or terms that cannot be.
    """
    plan = terms.plan
    if not isinstance(plan, FixedPlan):
        raise PlanError(
            "Cached features need a fixed plan", expected="a FixedPlan", received=repr(plan), remedy="FixedPlan(n0=100, n=10_000)"
        )
    if noise not in ("gaussian", "sound"):
        raise InputError("Unknown noise", expected="gaussian or sound", received=repr(noise), remedy="leave it out")
    if execution is not None and execution.dtype == "int8":
        raise InputError(
            "Features are not drawn in int8",
            expected="float32, bfloat16 or float16",
            received="int8, whose ranges are those of whole networks",
            remedy="declare the heads with another execution",
        )
    width = feature_width(trunk)
    level = float(trunk.sigma if sigma is None else sigma)
    layers = {name: read_head(head, width, f"head {name!r}") for name, head in heads.items()}
    classes = {len(weight) for weight, _ in layers.values()}
    digests = {name: head_digest(*layer) for name, layer in layers.items()}
    if len(classes) != 1 or len(set(digests.values())) < len(digests):
        raise InputError(
            "These heads cannot be declared together",
            expected="one head at least, all of the same classes, each once",
            received=f"{len(heads)} heads, {len(set(digests.values()))} different, of {sorted(classes)} classes",
            remedy="leave the doubles out, and declare heads of other classes on their own",
        )
    where = resolve_device(device)
    run = (execution or Execution()).on(where)
    run = replace(run, batch=run.batch or default_batch(largest_input(trunk.input_shape, [trunk.module]), where))
    told = Declaration(
        trunk=trunk.name,
        trunk_digest=vote_digest([trunk], level),
        sigma=level,
        features=width,
        classes=classes.pop(),
        heads=tuple(HeadRecord(name=name, digest=digest) for name, digest in digests.items()),
        n0=plan.n0,
        n=plan.n_max,
        alpha=terms.alpha,
        sides="two" if terms.sides == "two" else "one",
        noise="sound" if noise == "sound" else "gaussian",
        execution=run.to_dict(),
        seed=terms.seed or 0,
        seed_from=seed_from,
    )
    tree = told.tree(told.heads[0].name)
    told.terms.plan.check(tree, AlphaSplit.even(told.share, tree.paths), told.sides)
    return told if terms.seed is not None else told.model_copy(update={"seed": told.derived_seed})


@torch.inference_mode()
def feature_width(trunk: Expert) -> int:
    """Width of the features that a head on this expert reads.

    Raises:
        InputError: an expert whose features cannot be taken, or are not vectors.
    """
    probe = copy.deepcopy(Trunk(trunk)).cpu().float().eval()
    pooled, _ = probe(torch.zeros(2, *trunk.input_shape))
    if pooled.dim() != 2:
        raise InputError(
            f"The features of {trunk.name!r} are not vectors",
            expected="(B, F) before the last layer",
            received=str(tuple(pooled.shape)),
            remedy="heads are linear layers on pooled features",
        )
    return int(pooled.shape[1])


def with_head(trunk: Expert, head: Head, name: str | None = None, sigma: float | None = None) -> Expert:
    """The expert with another last layer: the classifier that a certificate of `certify_head` is about, for `Smooth(...)`
    and its `predict`, in float32; at the trunk's noise level, or the one that was declared instead.

    >>> from rsrouter import build_architecture
    >>> trunk = Expert(build_architecture("small_cnn", 10), sigma=0.5, num_classes=10, input_shape=(1, 28, 28))
    >>> with_head(trunk, nn.Linear(100, 3), "three")
    Expert('three', sigma=0.5, num_classes=3, input_shape=(1, 28, 28))
    """
    weight, bias = read_head(head, feature_width(trunk), "the head")
    level = trunk.sigma if sigma is None else sigma
    return Expert(Headed(trunk, weight, bias), sigma=level, num_classes=len(weight), input_shape=trunk.input_shape, name=name)


def _engine(declaration: Declaration, trunk: Expert, device: str | None) -> Engine:
    """Draws the features of a declaration: its digest stands where a network's own does in the names of noise streams."""
    trunk.check_unchanged()
    if (now := vote_digest([trunk], declaration.sigma)) != declaration.trunk_digest:
        raise IntegrityError(
            "The trunk is not the one that was declared",
            expected=f"digest {declaration.trunk_digest} ({declaration.trunk})",
            received=f"digest {now} ({trunk.name})",
            remedy="give the expert of the declaration, or declare the heads anew",
        )
    execution, where = Execution.from_dict(declaration.execution, "the declaration"), resolve_device(device)
    if execution.on(where) != execution:
        raise InputError(
            "The declaration is for another kind of device",
            expected=f"one that runs {declaration.execution}",
            received=str(where),
            remedy="declare the heads for this device: other bits are other votes",
        )
    widths = (declaration.features, trunk.num_classes)
    model = VoteModel(TRUNK, Trunk(trunk), declaration.sigma, _OUTPUTS, widths, declaration.digest)
    return Engine([model], trunk.input_shape, seed=declaration.seed, device=device, execution=execution, noise=declaration.noise)


def _cached(engine: Engine, declaration: Declaration, image: Tensor, idx: int, label: int) -> Cached:
    identity = image_identity(image, idx)
    select, estimate = (
        noisy_outputs(engine, TRUNK, image, identity, purpose, count)
        for purpose, count in ((SELECT, declaration.n0), (ESTIMATE, declaration.n))
    )
    return Cached(idx, label, identity.hex(), select, estimate)


def draw_features(
    declaration: Declaration,
    trunk: Expert,
    images: Images,
    out: str | Path,
    *,
    indices: Sequence[int] | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """The trunk's features of every image's noisy copies, kept in a folder; an unfinished one is resumed.

    Args:
        declaration: of the heads; its digest keys the noise.
        trunk: the declared expert.
        images: data set, by image id.
        out: folder; each image takes `(n0 + n) * F * 4` bytes.
        indices: which images; None: all.
        device: where the trunk runs; None is the CPU.
        progress: called after every image.

    Raises:
        IntegrityError: another trunk than was declared; a folder of another declaration; features that were edited.
        InputError: images that do not fit, or that are not those of the folder.
    """
    engine = _engine(declaration, trunk, device)
    order = check_order(images, indices, 1)
    reader = Reader(images, trunk.input_shape, declaration.classes)
    reader.look(order[0])
    execution, facts = engine.execution, machine_facts(device)
    drawn = Drawn(
        declaration=declaration.digest,
        data=describe_data(reader, {"name": getattr(images, "name", "")}, order),
        indices=pack_ids(order),
        device=facts["device"],
        versions=facts["versions"],
        instructions=facts["instructions"],
        threads=execution.threads_of(engine.device),
    )
    features = Features.begin(Path(out), declaration, drawn)
    for at, idx in enumerate(order):
        image, label = reader.look(idx)
        if features.path(idx).is_file():
            kept = features.load(idx)
            if kept.identity != image_identity(image, idx).hex():
                raise InputError(
                    f"Image {idx} is not the one whose features are kept",
                    expected=f"identity {kept.identity[:12]}",
                    received=image_identity(image, idx).hex()[:12],
                    remedy="give the data set of the first draw, or another folder",
                )
        else:
            made = _cached(engine, declaration, image, idx, label)
            engine.check_again()  # before anything is kept: features of a network that changed are of no fixed one
            features.keep(made)
        reader.task([idx])  # lets go of the image
        if progress is not None:
            progress(at + 1, len(order))
    return features


def head_counts(declaration: Declaration, cached: Cached, weight: Tensor, bias: Tensor) -> dict[str, list[int]]:
    """Votes of a head on an image's cached features by purpose, invalid ones last."""
    batch = int(declaration.execution["batch"])
    parts = {SELECT: cached.select, ESTIMATE: cached.estimate}
    return {purpose: linear_votes(rows, weight, bias, batch).tolist() for purpose, rows in parts.items()}


def certify_head(features: Features | str | Path, head: Head, out: str | Path, *, name: str | None = None) -> Table:
    """Certificates of one declared head, from kept features, without a forward pass of the trunk.

    With probability at least `1 - declaration.alpha` over the noise of an image, the certificates of *all* declared heads
    hold together: the smoothed classifier of trunk and head i answers `predict` on every input closer than `radius`, for
    every i. So the best head may be chosen after looking at tables, and labels.

    Args:
        features: of `draw_features`, or their folder.
        head: a declared head.
        out: the table; an unfinished one is resumed.
        name: of the run in reports; None: the head's.

    Raises:
        IntegrityError: a head that was not declared; features that are torn, edited, or another declaration's.
        ResultsError: images whose features are not drawn yet; a table of another run.
    """
    features = features if isinstance(features, Features) else Features.open(Path(features))
    declaration, drawn = features.declaration, features.drawn
    weight, bias = read_head(head, declaration.features, "the head")
    digest = head_digest(weight, bias)
    record = next((h for h in declaration.heads if h.digest == digest), None)
    if record is None:
        raise IntegrityError(
            "The head was not declared before the noise was drawn",
            expected=f"one of {', '.join(f'{h.name} ({h.digest[:12]})' for h in declaration.heads)}",
            received=f"digest {digest[:12]}",
            remedy="declare it, and draw anew: a head that may have seen this noise cannot be certified on it",
        )
    features.require_whole()
    tree, terms = declaration.tree(record.name), declaration.terms
    split = AlphaSplit.even(terms.alpha, tree.paths)
    facts = machine_facts(None)
    order = drawn.order
    execution = Execution.from_dict(declaration.execution)
    metadata = TableMetadata(
        name=name or record.name,
        role="expert",
        digest=declaration.classifier(record.name),
        experts=(ExpertRecord(name=record.name, sigma=declaration.sigma, digest=declaration.classifier(record.name)),),
        tree=TreeRecord.of(tree),
        terms=terms,
        seed_from=declaration.seed_from,
        seed_derived=declaration.seed == declaration.derived_seed,
        noise=declaration.noise,
        stream=dict(STREAMS[execution.stream]),
        execution=declaration.execution,
        kernels=kernels(execution.precision),
        data=drawn.data,
        indices=drawn.indices,
        num_images=len(order),
        device=drawn.device,
        versions=drawn.versions,
        heads=DeclaredHead(
            head=record.name,
            declaration=declaration,
            counted={**facts, "threads": torch.get_num_threads()},
        ),
        info={"threads": drawn.threads, "instructions": drawn.instructions},
    ).to_dict()
    with ResultsWriter(out, metadata) as writer:
        for idx in order:
            if idx in writer.done():
                continue
            start, cached = time.perf_counter(), features.load(idx)
            votes = {purpose: {record.name: counts} for purpose, counts in head_counts(declaration, cached, weight, bias).items()}
            (made,) = recompute(tree, terms.plan, split, [votes], rule=terms.rule, sides=declaration.sides)
            if not isinstance(made, Certificate):
                raise made
            seconds = time.perf_counter() - start
            # the label enters here and nowhere before
            writer.append(Row.from_certificate(made, idx=idx, label=cached.label, seconds=seconds, seed=declaration.seed))
        writer.arrange(order)
    return require_sound(read_table(out))


def redraw_head(
    table: Table, trunk: Expert, head: Head, images: Images, rows: Sequence[int], device: str | None = None
) -> list[str]:
    """Draws features of some rows of a table again, and lets the head vote on them: what differs, one sentence each. On another
    machine than the table names, only what is more than rounding does.

    Args:
        table: of `certify_head`.
        trunk, head: as they were declared.
        images: the certified data set.
        rows: row numbers.
        device: where the trunk runs.

    Raises:
        InputError: a table of something else.
        IntegrityError: another trunk or head; rows that do not follow from their votes.
    """
    about = require_sound(table).described()
    if about.heads is None:
        raise InputError(
            "The table is not about a declared head",
            expected="a table of `rsrouter heads certify`",
            received=table.name,
            remedy="rsrouter audit checks other tables",
        )
    declaration = about.heads.declaration
    weight, bias = read_head(head, declaration.features, "the head")
    if head_digest(weight, bias) != (declared := declaration.named(about.heads.head).digest):
        raise IntegrityError(
            "The head is not the table's",
            expected=f"digest {declared}",
            received=f"digest {head_digest(weight, bias)}",
            remedy=f"give the weights of {about.heads.head}",
        )
    engine, found = _engine(declaration, trunk, device), list[str]()
    here = {**environment(device), "threads": engine.execution.threads_of(engine.device)}
    there = {"device": about.device, **about.versions, "threads": about.threads, "instructions": about.instructions}
    counted = {key: about.heads.counted.get(key) for key in ("threads", "instructions")}
    differs = same_environment(there, here) + same_environment(counted, {**environment(None)})
    drawn = declaration.n0 + declaration.n
    room = max(ROUNDING_VOTES, int(ROUNDING_SHARE[engine.execution.rounding] * drawn)) if differs else 0
    for at in rows:
        idx, stored = int(table.idx[at]), table.counts(at)
        again = head_counts(declaration, _cached(engine, declaration, images[idx][0], idx, -1), weight, bias)
        told = {purpose: list(stored.get(purpose, {}).get(about.heads.head, ())) for purpose in again}
        moved = sum(abs(a - b) for p in again for a, b in zip(again[p], told[p] or [0] * len(again[p]), strict=True)) // 2
        if moved > room:
            where = f" (another machine: {'; '.join(dict.fromkeys(differs))})" if differs else ""
            found.append(f"image {idx}: {moved} of {drawn} votes are not those of its declaration{where}")
    engine.check_again()
    return found


def save_head(path: Path, weight: Tensor, bias: Tensor) -> None:
    """Writes a head as a safetensors file that `read_head` reads.

    Raises:
        NetworkError: numbers that are not finite.
    """
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise NetworkError(
            "A head has weights that are not finite", expected="numbers", received="NaN or infinity", remedy="train it again"
        )
    write_atomically(path, save({"weight": weight.contiguous(), "bias": bias.contiguous()}))


__all__ = [
    "certify_head",
    "declare_heads",
    "draw_features",
    "feature_width",
    "head_counts",
    "redraw_head",
    "save_head",
    "with_head",
]
