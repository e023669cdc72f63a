"""Experts that are the mean of several networks; plain modules to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import InputError
from rsrouter.experts.composite import composite, networks, part
from rsrouter.experts.expert import Expert, same_labels
from rsrouter.experts.loaders import LOADERS, Sources
from rsrouter.experts.preprocessing import has_trunk
from rsrouter.experts.provenance import Provenance


class Ensemble(nn.Module):
    """Mean of the members' logits (Horvath et al., "Boosting Randomized Smoothing with Variance Reduced Classifiers",
    ICLR 2022), with their optional K-consensus: where the first K members agree on the class, the others are not asked.

    The answer of an image depends on that image alone: the remaining members run on chunks of one fixed size, so that
    how many other images of the batch went on does not change its logits.

    >>> torch.equal(Ensemble([nn.Flatten(), nn.Flatten()])(torch.ones(1, 1, 2, 2)), torch.ones(1, 4))
    True

    Args:
        members: networks from pixels `(B, C, H, W)` to logits `(B, num_classes)`.
        consensus: K, at least 2 and less than the number of members; None: always ask all.
        chunk: images per forward pass of the members after the K-th.
    """

    def __init__(self, members: Sequence[nn.Module], consensus: int | None = None, chunk: int = 32) -> None:
        super().__init__()
        if len(members) < 2:
            raise InputError(
                "An ensemble needs several members",
                expected="at least 2",
                received=str(len(members)),
                remedy="use the one expert as it is",
            )
        if consensus is not None and not (isinstance(consensus, int) and 2 <= consensus < len(members)):
            raise InputError(
                "K-consensus does not fit the ensemble",
                expected=f"2 <= K < {len(members)}, or None",
                received=repr(consensus),
                remedy="leave consensus out to ask every member",
            )
        if not isinstance(chunk, int) or chunk < 1:
            raise InputError(
                "The chunk must be a whole number", expected="at least 1", received=repr(chunk), remedy="leave it out"
            )
        self.members = nn.ModuleList(members)
        self.consensus, self.chunk = consensus, chunk

    def extra_repr(self) -> str:
        return f"consensus={self.consensus}, chunk={self.chunk}"

    @property
    def has_features(self) -> bool:
        """Whether every member exposes features."""
        return all(has_trunk(member) for member in self.members)

    def forward_features(self, x: Tensor) -> Tensor:
        """What the last layers of all members read, side by side; every member is asked."""
        members: list[Any] = list(self.members)
        return torch.cat([m.forward_head(m.forward_features(x), pre_logits=True) for m in members], 1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or with `pre_logits` the features as they are."""
        return features if pre_logits else self.get_classifier()(features)

    def get_classifier(self) -> nn.Module:
        """The last layers of all members, and the mean of what they give."""
        return _Heads([m.get_classifier() for m in list[Any](self.members)], self.consensus)

    def forward(self, x: Tensor) -> Tensor:
        if self.consensus is None:
            total: Tensor = self.members[0](x)
            for member in list(self.members)[1:]:
                total = total + member(x)
            return total / len(self.members)
        first = [member(x) for member in list(self.members)[: self.consensus]]
        total = torch.stack(first).sum(0)
        undecided = _differ(first).nonzero().flatten()
        # where all agree, the mean of the first K has the same argmax as each of them
        mean = total / self.consensus
        for rows in torch.split(undecided, self.chunk) if len(undecided) else ():
            padded = torch.cat([rows, rows[:1].expand(self.chunk - len(rows))])
            part, more = x[padded], total[padded]
            for member in list(self.members)[self.consensus :]:
                more = more + member(part)
            mean = mean.index_copy(0, rows, (more / len(self.members))[: len(rows)])
        return mean


def _differ(logits: Sequence[Tensor]) -> Tensor:
    """`(B,)`: whether some name another class than the first."""
    tops = torch.stack([each.argmax(1) for each in logits])
    return (tops != tops[0]).any(0)


class _Heads(nn.Module):
    """The last layers of an ensemble's members on their features side by side; logits as the ensemble's own."""

    def __init__(self, heads: Sequence[nn.Module], consensus: int | None) -> None:
        super().__init__()
        self.heads, self.consensus = nn.ModuleList(heads), consensus
        self.widths = [_width(head) for head in heads]

    def forward(self, features: Tensor) -> Tensor:
        widths = self.widths if all(self.widths) else [features.shape[1] // len(self.heads)] * len(self.heads)
        logits = [head(part) for head, part in zip(self.heads, torch.split(features, widths, 1), strict=True)]
        total = torch.stack(logits).sum(0)
        if self.consensus is None:
            return total / len(logits)
        first = logits[: self.consensus]
        asked = _differ(first)[:, None]
        return torch.where(asked, total / len(logits), torch.stack(first).sum(0) / self.consensus)


def _width(head: nn.Module) -> int:
    """How many features a last layer reads; 0 where it does not say."""
    return next((int(m.in_features) for m in head.modules() if isinstance(m, nn.Linear)), 0)


def ensemble(
    members: Sequence[Expert],
    *,
    consensus: int | None = None,
    sigma: float | None = None,
    name: str | None = None,
    chunk: int = 32,
) -> Expert:
    """One expert from several: see `Ensemble`.

    Args:
        members: of one class count and input shape, and of one sigma unless `sigma` is given.
        consensus: K of K-consensus; None asks every member.
        sigma: noise level of the result.
        name: of the result.

    Raises:
        InputError: members that do not fit together.
    """
    for what in ("num_classes", "input_shape", *(() if sigma is not None else ("sigma",))):
        values = {f"{i}:{m.name}": getattr(m, what) for i, m in enumerate(members)}
        if len(set(values.values())) > 1:
            raise InputError(
                f"Members of an ensemble must agree on {what}",
                expected="one value",
                received=str(values),
                remedy="leave out those that differ" + ("" if what != "sigma" else ", or give sigma="),
            )
    labels = same_labels(members, "the members of an ensemble")
    module = Ensemble([m.network() for m in members], consensus, chunk)
    provenance = composite(
        "ensemble",
        {"consensus": consensus, "chunk": chunk},
        [part("member", member) for member in members],
    )
    return Expert(
        module,
        sigma=members[0].sigma if sigma is None else sigma,
        num_classes=members[0].num_classes,
        input_shape=members[0].input_shape,
        name=name,
        labels=labels,
        provenance=provenance,
    )


def _load_ensemble(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    return Ensemble(networks(provenance, sources), **_consensus(provenance.kwargs))


def _consensus(kwargs: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(kwargs.keys() - {"consensus", "chunk"}):
        raise InputError(
            "Unknown settings of an ensemble", expected="consensus, chunk", received=str(unknown), remedy="wrap it anew"
        )
    return kwargs


LOADERS["ensemble"] = _load_ensemble
