"""Heads that were declared before the noise they are certified on was drawn (THEORY.md, section 8)."""

from __future__ import annotations

import json
from fractions import Fraction
from math import nextafter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rsrouter.core.errors import IntegrityError
from rsrouter.core.plans import FixedPlan
from rsrouter.core.terms import SEEDS, Terms
from rsrouter.core.tree import Tree, expert_stage
from rsrouter.files import sha256_of
from rsrouter.stored import Stored, read_json, validated

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Count = Annotated[int, Field(ge=1, le=10**9)]


def _digest(*parts: Any) -> str:
    return sha256_of(json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def share_of(alpha: float, heads: int) -> float:
    """The part of `alpha` that each of several heads may spend: together, in exact arithmetic, they spend no more than alpha.

    >>> share_of(0.001, 4)
    0.00025
    >>> from fractions import Fraction
    >>> all(Fraction(share_of(a, m)) * m <= Fraction(a) for a in (0.1, 0.001, 1 / 3) for m in range(1, 50))
    True
    """
    share = alpha / heads
    while Fraction(share) * heads > Fraction(alpha):
        share = nextafter(share, 0.0)
    return share


class HeadRecord(Stored):
    """One declared head.

    Attributes:
        name: how it is called; unique among the heads.
        digest: sha256 of its weight and bias (`rsrouter.jobs.head_digest`).
    """

    name: Name
    digest: Digest


class Declaration(Stored):
    """What is fixed before the first noisy copy is drawn. Its digest keys the noise: with any other head, number of votes,
    alpha or seed, all of the noise is another.

    Attributes:
        trunk: name of the expert whose features the heads read.
        trunk_digest: sha256 of its network and of the noise level.
        sigma: noise level of the votes, standard deviation for pixels in [0,1].
        features: width F of what a head reads.
        classes: number of classes of every head.
        heads: in their order.
        n0, n: selection and estimation votes of each image, the same noisy copies for all heads.
        alpha: probability, for each image, that any of the heads' certificates fails.
        sides: "one" or "two", as in `Terms`.
        noise: "gaussian" or "sound".
        execution: how the trunk runs; heads run in float32 on a CPU.
        seed, seed_from: of the noise; derived from all of the above and a public text, unless it was chosen by hand.
    """

    kind: Literal["rsrouter-heads"] = "rsrouter-heads"
    schema_version: Literal[1] = 1
    trunk: Name
    trunk_digest: Digest
    sigma: Annotated[float, Field(gt=0)]
    features: Count
    classes: Annotated[int, Field(ge=2, le=10**6)]
    heads: Annotated[tuple[HeadRecord, ...], Field(min_length=1)]
    n0: Count
    n: Count
    alpha: Annotated[float, Field(gt=0, lt=1)]
    sides: Literal["one", "two"] = "one"
    noise: Literal["gaussian", "sound"] = "gaussian"
    execution: dict[str, Any]
    seed: Annotated[int, Field(ge=0, lt=SEEDS)]
    seed_from: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what in ("name", "digest"):
            told = [getattr(head, what) for head in self.heads]
            if len(set(told)) < len(told):
                raise ValueError(f"two heads have one {what}: each is declared once")
        batch = self.execution.get("batch")
        if type(batch) is not int or batch < 1:
            raise ValueError("execution.batch must say how many rows a forward pass has")
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content, as it is written."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """sha256 of everything that is declared."""
        return _digest("rsrouter-heads", self.to_dict())

    @property
    def derived_seed(self) -> int:
        """The seed that follows from everything else that is declared."""
        told = {key: value for key, value in self.to_dict().items() if key != "seed"}
        return int(_digest("rsrouter-heads-seed", told)[:14], 16)

    @property
    def share(self) -> float:
        """Alpha of each head's certificate."""
        return share_of(self.alpha, len(self.heads))

    @property
    def terms(self) -> Terms:
        """What each head is certified for."""
        return Terms(FixedPlan(self.n0, self.n), self.share, "tree", self.sides, self.seed)

    def named(self, name: str) -> HeadRecord:
        """The head of that name.

        Raises:
            IntegrityError: none was declared under it.
        """
        for head in self.heads:
            if head.name == name:
                return head
        raise IntegrityError(
            f"No head {name!r} was declared",
            expected=f"one of {[h.name for h in self.heads]}",
            received=repr(name),
            remedy="declare it with the others, and draw anew: the noise of a declaration certifies no other head",
        )

    def classifier(self, name: str) -> str:
        """sha256 of the smoothed classifier of trunk and head."""
        return _digest("rsrouter-head-on-trunk", self.trunk_digest, self.sigma, self.named(name).digest)

    def tree(self, name: str) -> Tree:
        """That classifier as a tree of one stage."""
        return Tree.of([expert_stage(name, self.sigma, self.classes, network=name)])

    @classmethod
    def load(cls, path: Path) -> Self:
        """A declaration that was written as JSON.

        Raises:
            IntegrityError: no such file, or one of another form.
        """
        content = read_json(path, path.name, error=IntegrityError, remedy="declare the heads with `rsrouter heads declare`")
        return validated(cls, content, path.name, error=IntegrityError, remedy="restore it, or declare the heads anew")


class DeclaredHead(Stored):
    """That a table is about one of several heads that share their noisy copies.

    Attributes:
        head: its name in the declaration.
        declaration: the whole of it.
        counted: device, versions, threads and instructions of the machine on which features became votes.
    """

    head: Name
    declaration: Declaration
    counted: dict[str, Any] = Field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the table's certificates say, in a sentence.

        A reader learns how alpha is shared, and what may be chosen after looking.
        """
        told = self.declaration
        many = len(told.heads)
        if many == 1:
            return f"head {self.head} was declared before its noise was drawn; declaration {told.digest[:12]}"
        return (
            f"head {self.head} is one of {many} that were declared before their noise was drawn, at alpha {told.share:.3g} each: "
            f"the certificates of all {many} hold together with probability {1.0 - told.alpha:g} for each image, whichever is "
            f"chosen after looking; declaration {told.digest[:12]}"
        )


__all__ = ["Declaration", "DeclaredHead", "HeadRecord", "share_of"]
