"""The deferral router: frozen experts asked at noise levels of the router's choice, through small trained heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from rsrouter.core.errors import InputError
from rsrouter.experts.describe import build_described, describe_module
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.base import Routed, Router
from rsrouter.router.chain import Voter, bind_chain, check_head_names, check_thresholds


class DeferralRouter(Router):
    """Voters in a row; each answers where one class reaches its threshold and defers otherwise, the last one always answers.

    A voter is an expert's frozen network under noise of *any* standard deviation, with the expert's own logits or
    with a trained head on its features. An expert trained at sigma = 1 is often better at every radius when it
    is smoothed at less, as long as sigma * Phi^-1(alpha^(1/n)) reaches the radii that matter; a head of some
    kilobytes adapts it to the new noise level. The certificate holds for any base function and any sigma.

    Args:
        voters: who is asked, in this order (`Voter`, or the name of an expert).
        thresholds: one tau in (1/2, 1) per voter but the last; where the last has one too, it defers to nobody: nothing is
            certified there, and the pool's core answers, if it has one.
        heads: modules from `torch.cat([features, logits], 1)` to class logits, by name (`ResidualHead`); those of voters with
            `whole` map the normalised image to class logits.
    """

    kind: ClassVar[str] = "deferral"

    def __init__(
        self,
        voters: Sequence[Voter | str],
        thresholds: Sequence[float],
        heads: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
    ) -> None:
        self.voters = tuple(Voter(v) if isinstance(v, str) else v for v in voters)
        self.thresholds = check_thresholds(thresholds, len(self.voters))
        used = {v.head for v in self.voters if v.head is not None}
        given = {} if heads is None else dict(heads.items())
        if used != set(given) or not all(isinstance(head, nn.Module) for head in given.values()):
            raise InputError(
                "Heads and voters do not fit",
                expected=f"modules named {sorted(used)}",
                received=str(sorted(given)),
                remedy="pass one module for every head that a voter names",
            )
        check_head_names(given)
        self.heads = nn.ModuleDict({name: given[name] for name in sorted(given)})

    @property
    def modules(self) -> nn.ModuleDict:
        return self.heads

    def bind(self, pool: ExpertPool) -> Routed:
        return bind_chain(pool, self.voters, self.thresholds, self.heads)

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "thresholds": list(self.thresholds),
            "voters": [
                {"expert": v.expert, "sigma": v.sigma, "head": v.head, "others": list(v.others)}
                | ({} if v.grid == 1 else {"grid": v.grid})
                | ({"whole": True} if v.whole else {})
                | ({"confidence": v.confidence} if v.confidence else {})
                for v in self.voters
            ],
            "heads": {name: describe_module(head) for name, head in self.heads.items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DeferralRouter:
        """The router `to_config` described, heads freshly initialised."""
        voters = [
            Voter(
                *(v["expert"], v["sigma"], v["head"], tuple(v["others"])),
                grid=v.get("grid", 1),
                whole=v.get("whole", False),
                confidence=v.get("confidence", 0.0),
            )
            for v in config["voters"]
        ]
        return cls(voters, config["thresholds"], {name: build_described(d) for name, d in config["heads"].items()})
