"""The flat router of Dual RS: one smoothed vote that names an expert (arXiv 2512.01782, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from rsrouter.core.errors import InputError
from rsrouter.core.tree import flat_tree
from rsrouter.experts.describe import build_described, describe_module
from rsrouter.experts.expert import check_sigma
from rsrouter.experts.identity import unique_digest
from rsrouter.experts.lipschitz import Constants, Lipschitz, check_constants, try_constants
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.base import CORE, Routed, Router, check_stage_name, stage_of, vote_digest, vote_model
from rsrouter.router.trunk import HeadedTrunk
from rsrouter.sampling.engine import VoteModel

STAGE = "router"


class FlatRouter(Router):
    """A network h from a noisy image to K logits, smoothed at `sigma`; the class of most votes names the expert.

    Args:
        module: without `trunk`, any torch module from pixels in [0,1], `(B, C, H, W)`, to `(B, K)` logits; with
            `trunk`, a head from that expert's features and logits `(B, F + C)` to `(B, K)`.
        sigma: noise level of the router. The paper wants it at least the largest expert sigma, so that the
            router is not what limits the radius; soundness does not need it.
        experts: names of the experts that logits 0 .. K - 1 stand for; None: the pool's order. "core" stands for none of them:
            nothing is certified there, and the pool's core answers, if it has one.
        lipschitz: of the logits, as of a deterministic `Expert`: the router then decides by one forward pass, and takes no sigma
            and no trunk. `rsrouter.experts.lipschitz.compute` gives it for layers that are known.
        rounding: by how much a logit of a float64 pass may be wrong.
        trunk: name of the frozen expert whose features the head reads. Where that expert has the router's
            sigma, one forward pass casts both votes.

    Raises:
        InputError: something that is not a module, or a sigma that is not positive and finite; where it is bound to a
            pool: experts, a trunk or a number of logits that do not fit.
    """

    kind: ClassVar[str] = "flat"

    def __init__(
        self,
        module: nn.Module,
        *,
        sigma: float | None = None,
        experts: Sequence[str] | None = None,
        trunk: str | None = None,
        lipschitz: Constants | None = None,
        rounding: float | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(
                "A flat router needs a module",
                expected="a torch.nn.Module with K logits",
                received=type(module).__name__,
                remedy="wrap a function in a small nn.Module",
            )
        if lipschitz is not None and (sigma or trunk is not None):
            raise InputError(
                "A flat router with a Lipschitz constant has a noise level or a trunk",
                expected="one forward pass of its own network, without noise",
                received=f"sigma={sigma!r}, trunk={trunk!r}",
                remedy="leave them out, or leave out lipschitz",
            )
        self.module, self.sigma = module, 0.0 if lipschitz is not None else check_sigma(sigma, "the router")
        self.lipschitz, self.rounding = lipschitz, rounding
        self.experts = None if experts is None else tuple(experts)
        self.trunk = trunk

    @property
    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({STAGE: self.module})

    def order(self, pool: ExpertPool) -> tuple[str, ...]:
        """Names of the experts behind the logits, checked against the pool."""
        names = pool.names if self.experts is None else self.experts
        unknown = [n for n in names if n not in pool.names and n != CORE]
        if unknown or len(set(names)) != len(names) or set(names) == {CORE}:
            raise InputError(
                "The router's experts do not fit the pool",
                expected=f"different names out of {list(pool.names)}, and 'core' beside them for none",
                received=str(list(names)),
                remedy="pass experts= in the order of the logits",
            )
        return tuple(names)

    def bind(self, pool: ExpertPool) -> Routed:
        check_stage_name(STAGE, pool)
        names = self.order(pool)
        if CORE in names:
            check_stage_name(CORE, pool)
        shared = self.trunk is not None and pool[self.trunk].sigma == self.sigma and self.trunk in names
        stages = [None if n == CORE else stage_of(pool[n], STAGE if shared and n == self.trunk else "") for n in names]
        models = []
        constants = self._constants(pool, len(names))
        own = unique_digest(self.module)
        if self.trunk is None:
            models.append(
                VoteModel(STAGE, self.module, self.sigma, (STAGE,), (len(names),), vote_digest([], self.sigma, head=own))
            )
        else:
            trunk = pool[self.trunk]
            headed = HeadedTrunk(trunk, [self.module], with_expert=shared)
            voters = (self.trunk, STAGE) if shared else (STAGE,)
            widths = (pool.num_classes, len(names)) if shared else (len(names),)
            digest = vote_digest([trunk], self.sigma, head=own, shared=shared)
            models.append(VoteModel(STAGE, headed, self.sigma, voters, widths, digest))
        models += [vote_model(pool[n]) for n in names if n != CORE and not (shared and n == self.trunk)]
        return Routed(flat_tree(STAGE, self.sigma, stages, **constants), tuple(models))

    def _constants(self, pool: ExpertPool, k: int) -> dict[str, Any]:
        if self.lipschitz is None:
            return {}
        found = Lipschitz(*check_constants(self.lipschitz, self.rounding, k, "the router"))
        try_constants(self.module, pool.input_shape, k, found, "the router")
        return {"lipschitz": found.constants, "rounding": found.rounding}

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sigma": self.sigma,
            "experts": None if self.experts is None else list(self.experts),
            "trunk": self.trunk,
            "module": describe_module(self.module),
            **({} if self.lipschitz is None else {"lipschitz": self.lipschitz, "rounding": self.rounding}),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FlatRouter:
        """The router `to_config` described, with fresh weights."""
        told = {key: config.get(key) for key in ("sigma", "experts", "trunk", "lipschitz", "rounding")}
        return cls(build_described(config["module"]), **told)
