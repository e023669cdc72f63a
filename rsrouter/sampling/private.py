"""A copy of a user's module that belongs to the engine alone, or the reason why there is none."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rsrouter.core.errors import NetworkError
from rsrouter.experts.expert import check_values
from rsrouter.experts.structure import structure_of

#: Libraries whose objects are not looked into.
_CLOSED = {"torch", "torchvision", "numpy", "builtins", "collections", "threading", "logging", "_thread", "weakref"}


def _parts(value: Any) -> Iterator[Any]:
    """What a container, a function or a plain object holds."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield from value.__defaults__ or ()
    elif type(value).__module__.split(".")[0] not in _CLOSED and not isinstance(value, type | types.ModuleType):
        yield from getattr(value, "__dict__", {}).values()


def unregistered(module: nn.Module) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Modules and tensors that are kept in plain attributes, lists, dictionaries and closures of a module, where neither `.to`
    nor `.eval` reaches them, by the attribute they are found under.

    >>> class Members(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.members = [nn.Linear(2, 2)]
    >>> [path for path, _ in unregistered(Members())]
    ['members']
    """
    seen = {id(part) for part in (*module.modules(), *module.parameters(), *module.buffers())}
    keep: list[Any] = []  # an id is only an object's while it lives
    for path, owner in module.named_modules():
        for key, attribute in vars(owner).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            todo = [attribute]
            while todo:
                value = todo.pop()
                if id(value) in seen or isinstance(value, str | bytes | int | float | None):
                    continue
                seen.add(id(value))
                keep.append(value)
                if isinstance(value, nn.Module | Tensor):
                    yield f"{path}.{key}".lstrip("."), value
                else:
                    todo.extend(_parts(value))


def _refuse_unregistered(module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    for path, part in unregistered(module):
        if isinstance(part, nn.Module):
            left = any(True for _ in (*part.parameters(), *part.buffers()))
            what = f"a {type(part).__name__} with weights"
        else:
            # a number moves by itself; anything else stays where and what it was
            stays = part.device.type != device.type or (part.is_floating_point() and dtype != torch.float32)
            left = part.dim() > 0 and stays
            what = f"a tensor of {str(part.dtype).removeprefix('torch.')} on {part.device}"
        if left:
            raise NetworkError(
                f"Network {name!r} keeps weights outside parameters, buffers and registered modules",
                expected="weights in parameters, buffers and registered modules, which move to "
                f"{str(dtype).removeprefix('torch.')} on {device} and into eval mode",
                received=f"{what} in the plain attribute {path!r}",
                remedy="use nn.ModuleList or nn.ModuleDict instead of a list or dictionary, and register_buffer for tensors",
            )


def _refuse_other(module: nn.Module, copied: nn.Module, name: str) -> None:
    """Refuses a copy that lost something: copy.deepcopy drops what was written on a parameter, and a class may have ideas of its
    own about what to copy."""
    if structure_of(copied, code=False) != structure_of(module, code=False):
        raise NetworkError(
            f"The copy of network {name!r} is not what it was copied from",
            expected="a module that copy.deepcopy copies whole",
            received="other attributes, hooks or classes in the copy",
            remedy="keep what it needs in attributes of modules and in buffers, not on parameters or in slots; give it no "
            "__deepcopy__, __getstate__ or __reduce__ that leaves something out",
        )


def private_copy(module: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode, without gradients, in float32 on `device`, that will run in `dtype`.

    Raises:
        NetworkError: parameters without values, weights that cannot be copied, or that would not move.
    """
    check_values(module, name)
    # tensors with a history, such as the weights of the old `nn.utils.weight_norm` and of `prune`, are not copied otherwise
    derived = [part for _, part in unregistered(module) if isinstance(part, Tensor) and not part.is_leaf]
    try:
        copied = copy.deepcopy(module, {id(t): t.detach().clone() for t in derived})
    except Exception as error:
        raise NetworkError(
            f"Network {name!r} cannot be copied",
            expected="a module that copy.deepcopy accepts",
            received=f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
            remedy="keep no locks, files, generators or parameters with gradients in it",
        ) from error
    _refuse_other(module, copied, name)
    with suppress(NotImplementedError):  # an exported program keeps the mode that it was exported in
        copied.eval()
    for parameter in copied.parameters():
        if parameter.is_leaf:  # a script that was traced or frozen keeps others
            parameter.requires_grad_(False)
    _refuse_unregistered(copied, name, device, dtype)
    try:
        return copied.to(device=device, dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NetworkError(
            f"Network {name!r} cannot be moved",
            expected=f"a module that moves to float32 on {device}",
            received=f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
            remedy="call .to on it yourself and mend what it raises, or choose another device",
        ) from error
