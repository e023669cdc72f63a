"""Identity of a module by value: whatever decides its output and nothing else.

A module that can be written down (a registered architecture as it was built, or a stack of torch.nn layers) is its
description and its tensors, wherever its classes lie and whichever release of a library made it; so it is the same before it is
saved and after. Any other module is what `rsrouter.experts.structure` reads of it. Where something cannot be read, the digest
does not tell everything: `unique_digest` then differs for every object.

Counters count: a module that keeps a number, a list or a tensor which its forward pass changes is another module after the
pass (networks are run as private copies, so drawing votes changes nothing).
"""

from __future__ import annotations

import hashlib
import uuid
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.describe import describe_module
from rsrouter.experts.provenance import network_record
from rsrouter.experts.structure import structure_of
from rsrouter.experts.tensors import digest_of, named_tensors, tensor_bytes, tensors_digest


@dataclass(frozen=True)
class ModuleIdentity:
    """What a module is.

    Attributes:
        digest: hex sha256; equal for equal values, also in another process.
        opaque: what the digest does not tell, one sentence each; empty where it tells everything.
    """

    digest: str
    opaque: tuple[str, ...] = ()


def module_record(module: nn.Module) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A module in memory as JSON-ready values, and what they do not tell."""
    try:
        tensors, unread = tensors_digest(module), ()
    except (TypeError, RuntimeError, ValueError) as error:
        return {"structure": structure_of(module).digest}, (f"the module holds {error}",)
    try:
        description = describe_module(module)
    except CheckpointError:
        structure = structure_of(module)
        return {"structure": structure.digest, "tensors": tensors}, (*unread, *structure.opaque)
    return network_record("torch_layers", {"description": description}, None, tensors), ()


def module_identity(module: nn.Module) -> ModuleIdentity:
    """What a module is, with what could not be read.

    >>> import torch
    >>> class Scaled(nn.Module):
    ...     def __init__(self, act): super().__init__(); self.act = act
    ...     def forward(self, x): return self.act(x)
    >>> module_identity(Scaled(torch.tanh)) == module_identity(Scaled(torch.tanh))
    True
    >>> module_identity(Scaled(torch.tanh)) == module_identity(Scaled(torch.relu))
    False
    """
    record, opaque = module_record(module)
    return ModuleIdentity(digest_of(record), opaque)


def module_digest(module: nn.Module) -> str:
    """The digest of `module_identity`: to see whether a module is still what it was. It does not tell two modules apart
    whose difference cannot be read; `unique_digest` does."""
    return module_identity(module).digest


def module_state(module: nn.Module, hashes: dict[int, str] | None = None) -> ModuleIdentity:
    """What a module is now, to see whether it is still that later: its tensors' values and its structure.

    As complete as `module_identity` and cheaper, for no description of the module is sought. It names nothing: equal modules
    have equal states in this process.

    Args:
        module: any module.
        hashes: of tensors that several modules share, by id; filled, and of use for as long as nothing changes.

    >>> layer = nn.Linear(2, 2)
    >>> before = module_state(layer)
    >>> layer.weight.data += 1
    >>> module_state(layer) == before
    False
    """
    hashes = {} if hashes is None else hashes
    told, unread = hashlib.sha256(), []
    for name, tensor in named_tensors(module):
        if id(tensor) not in hashes:
            try:
                hashes[id(tensor)] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
            except (TypeError, RuntimeError, ValueError) as error:
                hashes[id(tensor)] = ""
                unread.append(f"{name} is {error}")
        told.update(repr((name, str(tensor.dtype), tuple(tensor.shape), hashes[id(tensor)])).encode())
    structure = structure_of(module)
    told.update(structure.digest.encode())
    return ModuleIdentity(told.hexdigest(), (*unread, *structure.opaque))


_TOKENS: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def unique_digest(module: nn.Module) -> str:
    """`module_digest`, and for a module that cannot be read whole one that no other object shares.

    >>> a, b = nn.Identity(), nn.Identity()
    >>> unique_digest(a) == unique_digest(b)
    True
    >>> import torch
    >>> a.generator = b.generator = torch.Generator()
    >>> unique_digest(a) == unique_digest(b)
    False
    >>> unique_digest(a) == unique_digest(a)
    True
    """
    identity = module_identity(module)
    if not identity.opaque:
        return identity.digest
    return digest_of([identity.digest, _TOKENS.setdefault(module, uuid.uuid4().hex)])
