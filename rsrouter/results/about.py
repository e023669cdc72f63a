"""The metadata of a results table: one schema, filled by `certify` and read by every later step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import ResultsError
from rsrouter.core.plans import Plan
from rsrouter.core.terms import Terms
from rsrouter.core.tree import Stage, Target, Tree
from rsrouter.results.declared import DeclaredHead
from rsrouter.stored import Stored, validated

KIND: Final = "rsrouter-certificates"
SCHEMA: Final = 2

#: No table lists more images or outcomes than this.
_MOST = 20_000_000

_AGAIN = "certify again with `rsrouter certify`, into a new folder"


def _terms(content: Any) -> Terms:
    terms = content if isinstance(content, Terms) else Terms.from_dict(content)
    if terms.sides is None or terms.seed is None:
        raise ValueError("terms must be resolved: sides and seed say what was used")
    return terms


StoredTerms = Annotated[Terms, PlainValidator(_terms), PlainSerializer(Terms.to_dict)]
Whole = Annotated[int, Field(ge=0)]


class ExpertRecord(Stored):
    """One expert of the run: its name, noise level and identity."""

    name: str
    sigma: Annotated[float, Field(ge=0)]
    digest: str


class StageRecord(Stored):
    """One stage of the tree, as JSON.

    Attributes:
        name, sigma, kind, tau, network, expert, lipschitz, rounding: as in `rsrouter.core.tree.Stage`.
        leads_to: one target per outcome; `[0, 10]` stands for the classes 0 to 9.
    """

    name: str
    sigma: Annotated[float, Field(ge=0)]
    kind: Literal["plurality", "threshold"] = "plurality"
    tau: float | None = None
    leads_to: tuple[int | str | tuple[Whole, Whole], ...]
    network: str = ""
    expert: str | None = None
    lipschitz: float | tuple[tuple[float, ...], ...] | None = None
    rounding: float = 0.0

    @classmethod
    def of(cls, stage: Stage) -> Self:
        """The record of a stage of a tree.

        >>> from rsrouter.core import expert_stage
        >>> StageRecord.of(expert_stage("sigma_0.5", 0.5, 10)).leads_to
        ((0, 10), -1)
        """
        targets: list[int | str | tuple[int, int]] = []
        for target in stage.leads_to:
            last = targets[-1] if targets else None
            if isinstance(target, str) or target < 0:
                targets.append(target)
            elif isinstance(last, tuple) and last[1] == target:
                targets[-1] = (last[0], int(target) + 1)
            else:
                targets.append((int(target), int(target) + 1))
        return cls(
            name=stage.name,
            sigma=float(stage.sigma),
            kind="plurality" if stage.kind == "plurality" else "threshold",
            tau=stage.tau,
            leads_to=tuple(targets),
            network=stage.network,
            expert=stage.expert,
            lipschitz=stage.lipschitz,
            rounding=float(stage.rounding),
        )

    def stage(self) -> Stage:
        """The stage itself.

        Raises:
            PlanError: one that cannot be; ValueError: too many outcomes.
        """
        if sum(t[1] - t[0] for t in self.leads_to if isinstance(t, tuple)) > _MOST:
            raise ValueError(f"stage {self.name!r} has too many outcomes")
        targets: list[Target] = []
        for target in self.leads_to:
            targets.extend(range(*target)) if isinstance(target, tuple) else targets.append(target)
        more = {"lipschitz": self.lipschitz, "rounding": self.rounding}
        return Stage(self.name, self.sigma, self.kind, self.tau, tuple(targets), None, self.network, self.expert, **more)  # type: ignore[arg-type]


class TreeRecord(Stored):
    """The tree of smoothed votes that a run certified: enough to compute every radius of its table again."""

    root: str
    stages: Annotated[tuple[StageRecord, ...], Field(min_length=1)]

    @classmethod
    def of(cls, tree: Tree) -> Self:
        """The record of a tree."""
        return cls(root=tree.root, stages=tuple(StageRecord.of(s) for s in tree.stages.values()))

    @cached_property
    def tree(self) -> Tree:
        """The tree itself."""
        return Tree.of([record.stage() for record in self.stages], self.root)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tree.paths or not self.tree.by_network:
            raise ValueError("no stages")
        return self


class Shard(Stored):
    """Which part of a job a table holds: every `count`-th image, from the `index`-th on."""

    index: Whole
    count: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.index >= self.count:
            raise ValueError(f"an index from 0 to {self.count - 1} is needed")
        return self


class Transfer(Stored):
    """That a table's certificates are about the same networks run in another way (THEORY.md, section 7).

    Attributes:
        execution: how they ran for the pairs; the classifier that is certified.
        device, versions, threads, instructions: where.
        votes: paired draws for each network and image.
        alpha: failure probability of the bounds on disagreement, beside that of the votes.
        parent: sha256 of the table whose votes these are.
    """

    execution: dict[str, Any]
    device: str
    versions: dict[str, str]
    threads: int
    instructions: str
    votes: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    parent: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TableMetadata(Stored):
    """The JSON beside a table of certificates.

    Rows are only ever added under the same metadata, `info` apart. `TableMetadata(...).to_dict()` is what to write,
    `Table.about` what was read.

    Attributes:
        name: of the run, for reports.
        role: "routed", or "expert" for a single smoothed classifier.
        digest: of the smoothed classifier.
        router: kind of the router; None for a single expert.
        experts: of the classifier, in the order of its pool.
        core: the uncertified network that answered where nothing was certified; None without one. It decides no certificate.
        tree: the stages that voted.
        terms: plan, alpha, rule, sides and seed, all of them resolved.
        seed_from: public text that was mixed into the derived seed, "" for none.
        seed_derived: whether the seed is the classifier's own (with `seed_from`), and not somebody's choice.
        noise: kind of noise; it ends in `-shared` where all images saw one stream.
        stream: how the noise is cut into chunks.
        execution: batch, dtype, memory layout and folding of the function that ran.
        kernels: numerical settings of the libraries.
        data: name, size, fingerprint and preprocessing of the data set, as far as they are known.
        indices: image ids of the whole job, in its order, as runs `(start, stop, step)`.
        num_images: how many those are.
        shard: which part of the job this table holds; None for all of it.
        device, versions: where it ran.
        transfer: of a table whose certificates were carried over to another execution; None for others.
        heads: of a table of one of several heads that were declared together; its `terms.alpha` is the part of this head, and
            `alpha` that of all of them. None for others.
        info: threads, instructions, platform, python; `threads` and `instructions` decide bits on a CPU.
    """

    kind: Literal["rsrouter-certificates"] = KIND
    schema_version: Literal[2] = SCHEMA
    name: str
    role: Literal["routed", "expert"]
    digest: str
    router: str | None = None
    experts: tuple[ExpertRecord, ...]
    core: ExpertRecord | None = None
    tree: TreeRecord
    terms: StoredTerms
    seed_from: str = ""
    seed_derived: bool
    noise: str
    stream: dict[str, Any]
    execution: dict[str, Any]
    kernels: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any]
    indices: tuple[tuple[Whole, Whole, Annotated[int, Field(ge=1)] | Annotated[int, Field(le=-1)]], ...]
    num_images: Whole
    shard: Shard | None = None
    device: str
    versions: dict[str, str]
    transfer: Transfer | None = None
    heads: DeclaredHead | None = None
    info: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.transfer is not None and not self.terms.alpha + self.transfer.alpha < 1.0:
            raise ValueError("the two alphas add up to 1 or more")
        if self.heads is not None and (wrong := self._undeclared(self.heads)):
            raise ValueError(f"not as declared: {', '.join(wrong)}")
        count = sum(len(range(*run)) for run in self.indices)
        if count != self.num_images or count > _MOST:
            raise ValueError(f"indices name {count} images, num_images says {self.num_images}")
        if len(self.indices) > 1 and len(np.unique(unpack_ids(self.indices))) < count:
            raise ValueError("indices name an image twice")
        return self

    def _undeclared(self, head: DeclaredHead) -> list[str]:
        """What differs between this table and the declaration that it names."""
        told = head.declaration
        if head.head not in [h.name for h in told.heads]:
            return [f"head {head.head}"]
        claims = {
            "terms (alpha shared among the heads, votes, seed)": (self.terms, told.terms),
            "digest": (self.digest, told.classifier(head.head)),
            "tree": (self.tree, TreeRecord.of(told.tree(head.head))),
            "execution": (self.execution, told.execution),
            "noise": (self.noise, told.noise),
            "seed_from": (self.seed_from, told.seed_from),
            "seed_derived": (self.seed_derived, told.seed == told.derived_seed),
            "transfer": (self.transfer, None),
        }
        return [what for what, (ours, theirs) in claims.items() if ours != theirs]

    @classmethod
    def read(cls, content: Mapping[str, Any], what: str) -> Self:
        """`content` of the JSON called `what`, checked.

        Raises:
            ResultsError: metadata of another kind or version, or with fields that are missing or cannot be.
        """
        version = content.get("schema_version")
        if content.get("kind") == KIND and isinstance(version, int) and version != SCHEMA:
            older = version < SCHEMA
            raise ResultsError(
                f"{what} was made by {'an unreleased' if older else 'a newer'} version of rsrouter",
                expected=f"schema_version {SCHEMA}",
                received=f"schema_version {version}",
                remedy=_AGAIN if older else "update rsrouter: pip install --upgrade rsrouter",
            )
        return validated(cls, dict(content), what, error=ResultsError, remedy=f"restore it, or {_AGAIN}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content, as it is written."""
        return self.model_dump(
            mode="json", exclude={key for key in ("core", "shard", "transfer", "heads") if getattr(self, key) is None}
        )

    @cached_property
    def split(self) -> AlphaSplit:
        """How alpha was divided over the stages."""
        return AlphaSplit.even(self.terms.alpha, self.tree.tree.paths)

    @cached_property
    def moved(self) -> AlphaSplit | None:
        """How the alpha of a transfer was divided over the stages."""
        return None if self.transfer is None else AlphaSplit.even(self.transfer.alpha, self.tree.tree.paths)

    @property
    def plan(self) -> Plan:
        """How many votes, and the bound that is valid for that rule."""
        return self.terms.plan

    @property
    def alpha(self) -> float:
        """Failure probability of each certificate; of a transferred one both of its parts, of a declared head's that of all
        heads together, so that it still is when the best of them was chosen."""
        if self.heads is not None:
            return self.heads.declaration.alpha
        return self.terms.alpha + (0.0 if self.transfer is None else self.transfer.alpha)

    @property
    def rule(self) -> str:
        """Which stages are sampled."""
        return self.terms.rule

    @property
    def sides(self) -> str:
        """Sidedness of the bounds, "one" or "two"."""
        return cast(str, self.terms.sides)

    @property
    def seed(self) -> int:
        """The seed that keyed the noise."""
        return cast(int, self.terms.seed)

    @property
    def independent_noise(self) -> bool:
        """Whether every image had noise of its own, so that something may be concluded about the whole table."""
        return not self.noise.endswith("-shared")

    @property
    def picked(self) -> bool:
        """Whether the images were picked one by one, not as an evenly spaced run of the data set."""
        return len(self.indices) > 1

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """`(N,)` image ids that a finished table holds, in its order (a shard's: only its own)."""
        every = unpack_ids(self.indices)
        return every if self.shard is None else every[self.shard.index :: self.shard.count]

    @property
    def threads(self) -> int | None:
        """Threads of each worker, where the table tells."""
        value = self.info.get("threads")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def instructions(self) -> str | None:
        """Vector instructions of the processor, where the table tells."""
        value = self.info.get("instructions")
        return value if isinstance(value, str) else None


def understood(content: Mapping[str, Any], what: str) -> TableMetadata | None:
    """The metadata of a table of certificates; None where another program wrote them, or nobody did.

    Raises:
        ResultsError: they are of this package, and of another version, or damaged.
    """
    return TableMetadata.read(content, what) if content.get("kind") == KIND else None


def pack_ids(order: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Image ids in their order as runs `(start, stop, step)`.

    >>> pack_ids([0, 20, 40, 60])
    ((0, 61, 20),)
    >>> pack_ids([5, 6, 7, 3])
    ((5, 8, 1), (3, 4, 1))
    """
    ids = [int(i) for i in order]
    runs: list[tuple[int, int, int]] = []
    at = 0
    while at < len(ids):
        end, step = at + 1, 1
        if end < len(ids) and ids[end] != ids[at]:
            step = ids[end] - ids[at]
            while end < len(ids) and ids[end] - ids[end - 1] == step:
                end += 1
        stop = ids[end - 1] + (1 if step > 0 else -1)
        if stop < 0:  # counting down to 0: `range` has no word for it that is not negative
            end, step, stop = at + 1, 1, ids[at] + 1
        runs.append((ids[at], stop, step))
        at = end
    return tuple(runs)


def unpack_ids(runs: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """The ids that `pack_ids` packed, `(N,)` in their order.

    >>> unpack_ids([(0, 61, 20), (7, 8, 1)]).tolist()
    [0, 20, 40, 60, 7]
    """
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(*run, dtype=np.int64) for run in runs)])


__all__ = [
    "KIND",
    "SCHEMA",
    "ExpertRecord",
    "Shard",
    "StageRecord",
    "TableMetadata",
    "Transfer",
    "TreeRecord",
    "pack_ids",
    "understood",
    "unpack_ids",
]
