"""Routers: a tree of stages over a pool of frozen experts, and the networks that cast its votes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import InputError
from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan
from rsrouter.core.terms import Terms
from rsrouter.core.tree import Stage, Tree, expert_stage
from rsrouter.experts.expert import Expert, refuse_core
from rsrouter.experts.pool import ExpertPool
from rsrouter.experts.tensors import digest_of, tensors_digest
from rsrouter.sampling.engine import VoteModel
from rsrouter.sampling.execution import Execution


@dataclass(frozen=True)
class Routed:
    """A router bound to a pool, with how it runs: everything that a certificate is about.

    Attributes:
        tree: the stages, for the certificate.
        models: the networks, for the engine.
        execution: how they run.
        noise: a kind of noise (`rsrouter.sampling.noise`).

    Raises:
        InputError: networks that draw at other sigmas, or for other outcomes, than the stages are certified for.
    """

    tree: Tree
    models: tuple[VoteModel, ...]
    execution: Execution = field(default_factory=Execution)
    noise: str = "gaussian"

    def __post_init__(self) -> None:
        wanted = {(s.network, s.name, float(s.sigma), s.num_outcomes) for s in self.tree.stages.values()}
        voting = [(m.name, s, float(m.sigma), w + 1) for m in self.models for s, w in zip(m.stages, m.widths, strict=True)]
        if len(voting) != len(wanted) or set(voting) != wanted:
            raise InputError(
                "The networks of a router do not fit its stages",
                expected=f"(network, stage, sigma, outcomes): {sorted(wanted - set(voting))}",
                received=str(sorted(set(voting) - wanted)),
                remedy="give each stage one network of the same sigma, with a logit for every outcome but the invalid one",
            )

    @cached_property
    def digest(self) -> str:
        """sha256 of the smoothed classifier by value: networks, sigmas, thresholds, and where each outcome leads.

        Names of stages and experts take no part; stages are numbered from the root down.
        """
        order = list(reversed(self.tree.order))
        number = {name: i for i, name in enumerate(order)}
        models = {m.name: (i, m) for i, m in enumerate(sorted(self.models, key=lambda m: self.tree.networks.index(m.name)))}
        stages = []
        for name in order:
            stage = self.tree.stages[name]
            at, model = models[stage.network]
            targets = [f"stage {number[t]}" if isinstance(t, str) else int(t) for t in stage.leads_to]
            silent = () if stage.votes else (stage.lipschitz, float(stage.rounding))
            stages.append((float(stage.sigma), stage.kind, stage.tau, targets, at, model.stages.index(name), *silent))
        content = json.dumps(["rsrouter-classifier", stages, [m.digest for _, m in models.values()]])
        return hashlib.sha256(content.encode()).hexdigest()

    def default_seed(self, seed_from: str = "") -> int:
        """The certification seed when none is given.

        It follows from what the classifier is, so that nobody is tempted to shop for one: plan, alpha, rule, sides and names
        change nothing. The images enter through the noise streams, whose keys hold each image's content.

        Args:
            seed_from: a public text that fixes it further, such as a date or a commit that came after the router.
        """
        text = json.dumps(["rsrouter-seed", self.digest, self.noise, seed_from])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def resolve(self, terms: Terms | Plan, seed_from: str = "") -> Terms:
        """`terms` with nothing left open: sides (one for a single stage, else two) and the seed.

        Raises:
            PlanError: terms that cannot be, or a radius that the plan can never reach with this tree.
        """
        plan = terms.plan if isinstance(terms, Terms) else terms
        if type(plan) not in (FixedPlan, AdaptivePlan):  # one of somebody's own, which may change
            return self._resolve(terms, seed_from)
        if (terms, seed_from) not in self._resolved:
            self._resolved[terms, seed_from] = self._resolve(terms, seed_from)
        return self._resolved[terms, seed_from]

    @cached_property
    def _resolved(self) -> dict[tuple[Terms | Plan, str], Terms]:
        return {}

    @cached_property
    def _splits(self) -> dict[float, AlphaSplit]:
        return {}

    def _resolve(self, terms: Terms | Plan, seed_from: str) -> Terms:
        asked = terms if isinstance(terms, Terms) else Terms(terms)
        sides = asked.sides or ("one" if len(self.tree.stages) == 1 else "two")
        asked = replace(asked, sides=sides, seed=self.default_seed(seed_from) if asked.seed is None else asked.seed)
        asked.plan.check(self.tree, self.split(asked), str(asked.sides))
        return asked

    def within_reach(self, terms: Terms) -> Terms:
        """`terms` without the radii that this tree cannot certify with them."""
        if not isinstance(terms.plan, AdaptivePlan):
            return terms
        sides = terms.sides or ("one" if len(self.tree.stages) == 1 else "two")
        return replace(terms, plan=terms.plan.within(terms.plan.reach(self.tree, self.split(terms), sides)))

    def split(self, terms: Terms) -> AlphaSplit:
        """How `terms.alpha` is divided, so that no path from the root to a leaf spends more."""
        if terms.alpha not in self._splits:
            self._splits[terms.alpha] = AlphaSplit.even(terms.alpha, self.tree.paths)
        return self._splits[terms.alpha]


#: In the place of an expert's name: the gate's own outcome for "nobody here", where the pool's core answers, if it has one.
CORE = "core"


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
        return digest_of([self.to_config(), tensors_digest(self.modules)])


def stage_of(expert: Expert, network: str = "") -> Stage:
    """The expert as a plurality stage.

    Raises:
        InputError: a core, which certifies nothing.
    """
    refuse_core(expert, "be certified")
    return expert_stage(
        expert.name, expert.sigma, expert.num_classes, network=network, expert=expert.name, **constants_of(expert)
    )


def constants_of(expert: Expert) -> dict[str, Any]:
    """What makes a stage of the expert deterministic, as arguments of `Stage`; nothing for one that votes."""
    found = expert.lipschitz
    return {} if found is None else {"lipschitz": found.constants, "rounding": found.rounding}


def vote_model(expert: Expert) -> VoteModel:
    """The expert as a network of its own."""
    return VoteModel(
        expert.name, expert.network(), expert.sigma, (expert.name,), (expert.num_classes,), vote_digest([expert], expert.sigma)
    )


def vote_digest(experts: Sequence[Expert], sigma: float, **more: Any) -> str:
    """sha256 of what casts a vote: the experts that look at the image and what else decides, by value and not by name."""
    return digest_of({"experts": [e.network_digest for e in experts], "sigma": float(sigma), **more})


def bound_parts(models: Sequence[VoteModel], experts: Sequence[Expert]) -> dict[str, nn.Module | tuple[Any, ...]]:
    """What of networks, experts and a core may not change in place once they are bound: modules, and settings, by name."""
    found: dict[str, nn.Module | tuple[Any, ...]] = {f"network {m.name!r}": m.module for m in models}
    for e in experts:
        settings = (e.name, e.sigma, e.lipschitz, e.num_classes, e.input_shape, e.mean, e.std, e.resize, e.order)
        found[f"expert {e.name!r}"] = settings
    return found | {f"network {e.name!r}, the core": e.module for e in experts if e.core}


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
