"""Modules as data: a registered architecture, or a plain stack of torch.nn layers, written to JSON and rebuilt."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.lipschitz import GroupSort
from rsrouter.experts.registry import architectures, build_architecture, find_architecture, register_architecture
from rsrouter.experts.structure import ORIGIN, is_amended, structure_of
from rsrouter.experts.tensors import canonical

#: layers of torch.nn, and one of our own, that are rebuilt from their constructor's arguments (which they keep as attributes)
_LAYERS = (
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "Dropout",
    "ELU",
    "Flatten",
    "GELU",
    "GroupSort",
    "Hardswish",
    "Identity",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
)
_SKIPPED = {"device", "dtype", "_weight"}
_DEEPEST = 50


def _layer(name: str) -> Any:
    return GroupSort if name == "GroupSort" else getattr(nn, name)


def describe_module(module: nn.Module) -> dict[str, Any]:
    """JSON-ready description from which `build_described` makes the same structure.

    Raises:
        CheckpointError: a module that is neither registered nor a stack of known torch.nn layers, or that was changed since it
            was built (a hook, another attribute).

    >>> describe_module(nn.Sequential(nn.Flatten(), nn.ReLU()))["children"][1]
    {'layer': 'ReLU', 'kwargs': {'inplace': False}}
    """
    if type(module) is nn.Sequential and not is_amended(module):
        return {"layer": "Sequential", "children": [describe_module(child) for child in module]}
    name = type(module).__name__
    described = _describe_layer(module, name) if name in _LAYERS and type(module) is _layer(name) else None
    if described is not None:
        return described
    found = find_architecture(module)
    if found is not None:
        return {"architecture": found[0], "kwargs": found[1]}
    raise CheckpointError(
        f"A {name} cannot be written down",
        expected="a registered architecture as it was built, or a stack of torch.nn layers",
        received=f"{name}, changed after it was built" if hasattr(module, ORIGIN) or name in _LAYERS else name,
        remedy=f"rsrouter.register_architecture('my_{name.lower()}', {name}) and build it through "
        "rsrouter.build_architecture, before saving and before loading",
    )


def _describe_layer(module: nn.Module, name: str) -> dict[str, Any] | None:
    """A torch.nn layer by its constructor's arguments; None where these do not make it again."""
    kwargs: dict[str, Any] = {}
    for parameter in inspect.signature(type(module).__init__).parameters.values():
        if parameter.name in {"self", *_SKIPPED} or parameter.kind is parameter.VAR_KEYWORD:
            continue
        value = getattr(module, parameter.name, None)
        if parameter.name == "bias":
            value = value is not None
        kwargs[parameter.name] = list(value) if isinstance(value, tuple) else value
    description = {"layer": name, "kwargs": kwargs}
    try:
        with torch.device("meta"):
            again = build_described(description)
        canonical(description)
    except (CheckpointError, TypeError, ValueError):
        return None
    return description if structure_of(again) == structure_of(module) else None


def build_described(description: Any) -> nn.Module:
    """The structure `describe_module` wrote, freshly initialised. Only known layers and registered names are built.

    Raises:
        CheckpointError: anything else.

    >>> build_described({"layer": "Linear", "kwargs": {"in_features": 2, "out_features": 3, "bias": False}})
    Linear(in_features=2, out_features=3, bias=False)
    """
    return _build(description, 0)


def _build(description: Any, depth: int) -> nn.Module:
    if not isinstance(description, dict) or depth > _DEEPEST:
        raise _unknown(f"nested {depth} deep" if isinstance(description, dict) else type(description).__name__)
    kwargs = description.get("kwargs", {})
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise _unknown(repr(kwargs)[:100])
    if "architecture" in description:
        kwargs = dict(kwargs)
        width = kwargs.pop("num_classes", None)
        return build_architecture(str(description["architecture"]), width, kwargs)
    layer = description.get("layer")
    if layer == "Sequential":
        children = description.get("children", [])
        if not isinstance(children, list):
            raise _unknown(repr(children)[:100])
        return nn.Sequential(*(_build(child, depth + 1) for child in children))
    if layer not in _LAYERS:
        raise _unknown(repr(layer)[:100])
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    try:
        built: nn.Module = _layer(layer)(**arguments)
    except Exception as error:  # a constructor that gets what it was not made for may raise anything
        raise CheckpointError(
            f"Layer {layer} does not take these arguments",
            expected="its constructor's arguments",
            received=str(arguments)[:200],
            remedy=f"{type(error).__name__}: {error}",
        ) from error
    return built


def _unknown(received: str) -> CheckpointError:
    return CheckpointError(
        "Unknown layer in a stored module",
        expected=f"one of {('Sequential', *_LAYERS)} or {architectures()}",
        received=received,
        remedy="register the architecture, or update rsrouter",
    )


def _torch_layers(num_classes: int, description: dict[str, Any]) -> nn.Module:
    """A module written down by `describe_module`; its width is part of the description."""
    return build_described(description)


register_architecture("torch_layers", _torch_layers)
