"""What a router is: a tree of stages over a pool of frozen experts, and the networks that cast its votes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rsrouter.core.errors import InputError
from rsrouter.core.tree import Stage, Tree, expert_stage
from rsrouter.experts.expert import Expert
from rsrouter.experts.identity import module_digest
from rsrouter.experts.pool import ExpertPool
from rsrouter.sampling.engine import VoteModel


@dataclass(frozen=True)
class Routed:
    """A router bound to a pool: the tree for the certificate, the networks for the engine."""

    tree: Tree
    models: tuple[VoteModel, ...]

    def __post_init__(self) -> None:
        """A router of one's own must not draw at another sigma than its stages are certified for."""
        wanted = {(s.network, s.name, float(s.sigma), s.num_outcomes) for s in self.tree.stages.values()}
        voting = [(m.name, s, float(m.sigma), w + 1) for m in self.models for s, w in zip(m.stages, m.widths, strict=True)]
        if len(voting) != len(wanted) or set(voting) != wanted:
            raise InputError(
                "The networks of a router do not fit its stages",
                expected=f"(network, stage, sigma, outcomes): {sorted(wanted - set(voting))}",
                received=str(sorted(set(voting) - wanted)),
                remedy="give each stage one network of the same sigma, with a logit for every outcome but the invalid one",
            )


class Router(ABC):
    """Decides which expert answers; only its own parameters are ever trained.

    A router is bound to a pool by `bind`, which gives the stages and the networks. `modules` are its trainable
    parts, saved as `router.safetensors`; `to_config` is everything else, and `from_config` the way back.
    """

    kind: ClassVar[str]

    @abstractmethod
    def bind(self, pool: ExpertPool) -> Routed:
        """Stages and networks of this router over `pool`.

        Raises:
            InputError: the router does not fit the pool.
        """

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """JSON-ready description; with `modules`' weights enough to rebuild the router."""

    @property
    def modules(self) -> nn.ModuleDict:
        """Trainable parts by name; empty where nothing is trained."""
        return nn.ModuleDict()

    @property
    def digest(self) -> str:
        """sha256 of the configuration and the weights."""
        return hashlib.sha256((repr(sorted(self.to_config().items())) + module_digest(self.modules)).encode()).hexdigest()


def stage_of(expert: Expert, network: str = "") -> Stage:
    """The expert as a plurality stage."""
    return expert_stage(expert.name, expert.sigma, expert.num_classes, network=network, expert=expert.name)


def vote_model(expert: Expert) -> VoteModel:
    """The expert as a network of its own."""
    return VoteModel(expert.name, expert.network(), expert.sigma, (expert.name,), (expert.num_classes,), expert.digest)


def single_tree(expert: Expert) -> Routed:
    """One expert, no routing: Cohen's smoothed classifier."""
    return Routed(Tree.of([stage_of(expert)]), (vote_model(expert),))


def check_stage_name(name: str, pool: ExpertPool) -> None:
    """Raises InputError where an expert is called like a router's own stage."""
    if name in pool.names:
        raise InputError(
            f"An expert is called {name!r}",
            expected="names other than the router's stages",
            received=str(pool.names),
            remedy="rename the expert",
        )
