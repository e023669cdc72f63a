"""Routers as JSON: one schema for each kind, with bounds on what a configuration from elsewhere may ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rsrouter.stored import Stored

Name = Annotated[str, Field(min_length=1, max_length=1_000)]
Sigma = Annotated[float, Field(gt=0, le=1_000)]
Tau = Annotated[float, Field(gt=0.5, lt=1)]
#: Of a chain. Each stage costs votes and a share of alpha; chains that pay have a handful.
MOST_STAGES = 64
Thresholds = Annotated[tuple[Tau, ...], Field(max_length=MOST_STAGES)]


class StoredFlat(Stored):
    """A flat router; attributes as in `FlatRouter`."""

    kind: Literal["flat"]
    sigma: Annotated[float, Field(ge=0, le=1_000)]
    experts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=10_000)] | None
    trunk: Name | None
    module: dict[str, Any]
    lipschitz: float | tuple[tuple[float, ...], ...] | None = None
    rounding: float | None = None


class StoredCascade(Stored):
    """A cascade; attributes as in `CascadeRouter`."""

    kind: Literal["cascade"]
    thresholds: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(max_length=MOST_STAGES)]
    experts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST_STAGES)] | None


class StoredVoter(Stored):
    """One voter of a deferral router; attributes as in `Voter`."""

    expert: Name
    sigma: Sigma | None
    head: Name | None
    others: Annotated[tuple[Name, ...], Field(max_length=100)] = ()
    grid: Annotated[int, Field(ge=1, le=1_000)] = 1
    whole: bool = False
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0


class StoredDeferral(Stored):
    """A deferral router; attributes as in `DeferralRouter`."""

    kind: Literal["deferral"]
    thresholds: Thresholds
    voters: Annotated[tuple[StoredVoter, ...], Field(min_length=1, max_length=MOST_STAGES)]
    heads: Annotated[dict[Name, dict[str, Any]], Field(max_length=1_000)]


StoredRouter = Annotated[StoredFlat | StoredCascade | StoredDeferral, Field(discriminator="kind")]
