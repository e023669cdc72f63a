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
import operator
import uuid
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.describe import describe_module
from rsrouter.experts.provenance import network_record
from rsrouter.experts.structure import is_marked, structure_of, watched_tables
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
                hashes[id(tensor)] = _hash(tensor)
            except (TypeError, RuntimeError, ValueError) as error:
                hashes[id(tensor)] = ""
                unread.append(f"{name} is {error}")
        told.update(repr((name, str(tensor.dtype), tuple(tensor.shape), hashes[id(tensor)])).encode())
    structure = structure_of(module)
    told.update(structure.digest.encode())
    return ModuleIdentity(told.hexdigest(), (*unread, *structure.opaque))


class ModuleWatch:
    """A module as it is now, to ask later whether it still is that.

    Where its layers are of installed libraries and hold nothing but tensors, values, lists and dictionaries, all of it is seen by
    a look at which objects those hold, and at the tensors' values. Otherwise `module_state` tells, and where objects were
    replaced by equal ones.

    Attributes:
        state: its state now.

    >>> layer = nn.Linear(2, 2)
    >>> watch = ModuleWatch(layer)
    >>> watch.unchanged(), layer.weight.data.add_(1) is None, watch.unchanged()
    (True, False, False)
    """

    def __init__(self, module: nn.Module, hashes: dict[int, str] | None = None) -> None:
        hashes = {} if hashes is None else hashes
        self.module, self.state, self._quick = module, module_state(module, hashes), False
        self._look(hashes)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "state": self.state, "_quick": False}  # a copy holds other objects

    def _look(self, hashes: dict[int, str]) -> None:
        """Notes what the module holds while it is in `state`."""
        layers = list(self.module.modules())
        tables = [] if self.state.opaque else [watched_tables(layer) for layer in layers]
        self._quick = bool(tables) and None not in tables
        if self._quick:
            self._kinds = [(layer, type(layer)) for layer in layers]
            self._held = [(table, _content(table)) for part in tables for table in part or ()]
            self._tensors = [(t, t.dtype, t.shape, hashes.get(id(t)) or _hash(t)) for t in _tensors_of(layers)]

    def unchanged(self, hashes: dict[int, str] | None = None) -> bool:
        """Whether it is what it was; `hashes` as in `module_state`."""
        hashes = {} if hashes is None else hashes
        if not self._quick or not self._holds_the_same():
            if module_state(self.module, hashes) != self.state:
                return False
            self._look(hashes)
            return True
        for tensor, dtype, shape, known in self._tensors:
            if tensor.dtype != dtype or tensor.shape != shape:
                return False
            if id(tensor) not in hashes:
                hashes[id(tensor)] = _hash(tensor)
            if hashes[id(tensor)] != known:
                return False
        return True

    def _holds_the_same(self) -> bool:
        for table, content in self._held:
            now = _content(table)
            if len(now) != len(content) or not all(map(operator.is_, now, content)):
                return False
        same = all(type(layer) is kind for layer, kind in self._kinds)
        return same and not any(vars(tensor) and is_marked(tensor) for tensor, *_ in self._tensors)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor).data).hexdigest()


def _content(table: Any) -> list[Any]:
    return [*table, *table.values()] if isinstance(table, dict) else sorted(table) if isinstance(table, set) else list(table)


def _tensors_of(layers: list[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once, but for BatchNorm's `num_batches_tracked`."""
    skipped = {id(m._buffers.get("num_batches_tracked")) for m in layers if isinstance(m, _NormBase)}
    found = {id(t): t for m in layers for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    return [tensor for key, tensor in found.items() if key not in skipped]


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
