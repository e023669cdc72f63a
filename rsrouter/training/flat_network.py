"""The network of a flat router: a head on a frozen expert, a whole network, or a parent's over other experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.describe import build_described, describe_module
from rsrouter.experts.pool import ExpertPool
from rsrouter.experts.registry import build_architecture
from rsrouter.router.flat import FlatRouter
from rsrouter.router.trunk import Trunk
from rsrouter.training.features import with_features, without_features


def default_flat(pool: ExpertPool, seed: int, network: str = "head", sigma: float | None = None) -> FlatRouter:
    """A new flat router.

    Args:
        pool: the experts.
        seed: of its weights.
        network: `"head"`, some kilobytes on the frozen expert of the largest sigma whose features can be read, or `"whole"`, a
            network of its own with an expert's architecture.
        sigma: its noise level; None: that of the expert under the head, or the largest in the pool.

    Raises:
        InputError: no expert exposes its features, or none has an architecture that can be built for other outputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == "whole":
            return FlatRouter(_whole_network(pool), sigma=max(pool.sigmas) if sigma is None else sigma)
        if not (readable := with_features(pool)):
            raise InputError(
                "No head can be trained on these experts",
                expected="an expert that exposes its features",
                received=without_features(pool),
                remedy="pass a FlatRouter with a network of its own, use the recipe 'dual-rs', or train kind 'cascade'",
            )
        trunk = readable[-1]
        with torch.no_grad():
            width = sum(part.shape[1] for part in copy.deepcopy(Trunk(trunk)).float().eval()(torch.zeros(1, *pool.input_shape)))
        head = build_architecture("mlp_head", len(pool), {"in_features": width})
    return FlatRouter(head, sigma=trunk.sigma if sigma is None else sigma, trunk=trunk.name)


def _whole_network(pool: ExpertPool) -> nn.Module:
    """The architecture of the expert of the largest sigma that can be built anew, with an output for each expert."""
    for expert in reversed(list(pool)):
        try:
            described = _widened(describe_module(expert.module), expert.num_classes, len(pool))
        except CheckpointError:
            continue
        if described is not None:
            return build_described(described)
    raise InputError(
        "No network can be made for the router",
        expected="an expert of a registered architecture",
        received=str([type(e.module).__name__ for e in pool]),
        remedy="pass a FlatRouter with a network of its own, or register_architecture the experts'",
    )


def adapt_flat(old: FlatRouter, old_pool: ExpertPool, pool: ExpertPool, seed: int) -> FlatRouter | None:
    """`old` over the experts of `pool`: every tensor is kept, the last layer's rows follow the experts by name.

    New experts get rows of a fresh initialisation. None where that cannot be done: the trunk is gone, or the module's last layer
    cannot be told.
    """
    before, after = old.order(old_pool), tuple(pool.names)
    if old.trunk is not None and old.trunk not in pool.names:
        return None
    if set(before) == set(after):
        return FlatRouter(copy.deepcopy(old.module), sigma=old.sigma, experts=before, trunk=old.trunk)
    try:
        description = _widened(describe_module(old.module), len(before), len(after))
    except CheckpointError:
        return None
    if description is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_described(description)
    state, rows = old.module.state_dict(), [(after.index(n), before.index(n)) for n in after if n in before]
    fresh = module.state_dict()
    for name, new in fresh.items():
        kept = state.get(name)
        if kept is not None and kept.shape == new.shape:
            fresh[name] = kept.clone()
        elif kept is not None and kept.shape == (len(before), *new.shape[1:]) and len(new) == len(after):
            for place, source in rows:
                new[place] = kept[source]
    module.load_state_dict(fresh)
    return FlatRouter(module, sigma=old.sigma, experts=after, trunk=old.trunk)


def _widened(description: dict[str, Any], before: int, after: int) -> dict[str, Any] | None:
    """The description with `after` outputs instead of `before`; None where its last layer is not plain."""
    if "architecture" in description:
        kwargs = dict(description["kwargs"])
        if kwargs.get("num_classes") != before or "description" in kwargs:
            return None
        return {**description, "kwargs": {**kwargs, "num_classes": after}}
    if description.get("layer") == "Sequential" and description["children"]:
        *rest, last = description["children"]
        changed = _widened(last, before, after)
        return None if changed is None else {**description, "children": [*rest, changed]}
    if description.get("layer") == "Linear" and description["kwargs"].get("out_features") == before:
        return {**description, "kwargs": {**description["kwargs"], "out_features": after}}
    return None


def trainable(module: nn.Module) -> nn.Module:
    """`module` in place with float32 parameters that gradients may reach, even where it was made in inference mode."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_inference():
                setattr(part, name, nn.Parameter(parameter.clone()))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(part, name, buffer.clone())
    return module.float().requires_grad_(True)
