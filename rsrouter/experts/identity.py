"""What decides a module's output, as a digest."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

#: packages whose modules say in their repr, parameters and buffers all that matters, where they have an `extra_repr`
_DESCRIBED = {"torch", "torchvision", "timm", "rsrouter"}


def _is_plain(value: object, setting: bool) -> bool:
    """Whether an attribute is text or numbers; whole numbers and flags count only as settings, else they may be counters."""
    if isinstance(value, tuple | list):
        return all(_is_plain(v, setting) for v in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v, setting) for k, v in value.items())
    return isinstance(value, float | str | np.floating) or (setting and isinstance(value, bool | int | np.integer | np.bool_))


def _parameters_of(kind: type) -> set[str]:
    """Names that the constructors of a class and its bases take."""
    constructors = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, object]]:
    """Attributes that may decide what `module` computes and stand neither in its repr nor among its tensors."""
    for path, child in module.named_modules():
        package = type(child).__module__.split(".")[0]
        described = package in _DESCRIBED
        if package == "rsrouter" or (described and type(child).extra_repr is not nn.Module.extra_repr):
            continue
        settings = _parameters_of(type(child)) - {"training"}
        for key, value in sorted(vars(child).items()):
            parts = value if isinstance(value, tuple | list) else [value]
            if described and key not in settings:
                continue
            if parts and all(isinstance(part, Tensor | np.ndarray) for part in parts):
                yield from ((path, key if value is part else f"{key}.{i}", part) for i, part in enumerate(parts))
            elif not key.startswith("_") and _is_plain(value, key in settings):
                yield path, key, value


def module_digest(module: nn.Module, *extra: object) -> str:
    """sha256 over what decides a module's output: class names, every parameter and buffer (name, dtype, shape, bytes),
    and what classes keep as plain attributes, as many papers' normalisation layers do: tensors, arrays, floats, strings,
    and where the constructor takes them (`num_heads`) also whole numbers and flags; tuples, lists and mappings of them."""
    digest = hashlib.sha256()
    # a script's own classes stand in `__mp_main__` in the processes it starts
    home = {"__mp_main__": "__main__"}.get(type(module).__module__, type(module).__module__)
    digest.update(repr((home, type(module).__qualname__, str(module), *extra)).encode())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for path, key, value in _attributes(module):
        if isinstance(value, Tensor):
            tensors.append((f"{path}.{key}", value))
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            tensors.append((f"{path}.{key}", torch.from_numpy(np.array(value))))
        else:
            digest.update(repr((path, key, value)).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
