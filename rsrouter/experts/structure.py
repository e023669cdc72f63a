"""The digest of everything that decides what a module computes, its parameters and persistent buffers apart.

That is the tree of modules, their classes, plain attributes, hidden tensors and arrays, hooks, and functions; the rest is
`rsrouter.experts.tensors`. A function or class of an installed library
counts by its qualified name; one of a script, a notebook or a package under development by its bytecode, its defaults, the
values it captured and the global names it reads, so that it may move between files. What cannot be read as a value (an object
of a C extension, a list that a function shares with others) is named in `Structure.opaque`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import re
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rsrouter.experts.code import WORLD, Hidden, is_all_attributes, is_installed, is_slot, library_name, outside_values, slots_of
from rsrouter.experts.tensors import put_tensor

#: where `build_architecture` keeps how a module was made; no part of what it computes
ORIGIN = "_rsrouter_architecture"
_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...))
_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: Tables that every nn.Module keeps, whose content may change.
_TABLES = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *(*_HOOKS, *(f"{hooks}_with_kwargs" for hooks in _HOOKS)),
)
#: attributes of every nn.Module that decide nothing in evaluation, or are walked on their own
_INTERNAL = frozenset(vars(nn.Module())) | {ORIGIN, "_compiled_call_impl"}
_GRAPH_MODULE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) | {"_graph", "_code", "_lineno_map", "meta"}
_CLASS_NOISE = frozenset(
    (
        *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__"),
        *("__qualname__", "__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"),
        *("__abstractmethods__", "_abc_impl", "__slots__", "__match_args__", "__dataclass_params__"),
        *("__annotate_func__", "__annotations_cache__", "__slotnames__", "__dataclass_fields__", "__repr__"),
        *("__str__", "__del__", "extra_repr"),
    )
)
#: methods whose bytecode counts, but not the global names they read: they make an object and decide nothing after
_MAKING = frozenset({"__init__", "__init_subclass__"})
_DEEPEST = 200
#: what torch and transformers write on tensors for themselves
_MARKS = ("_dynamo", "_is_hf_initialized")
_ENUM = frozenset({"_name_", "_sort_order_", "__objclass__"})
_CACHED = type(functools.lru_cache(len))


@dataclass(frozen=True)
class Structure:
    """Everything of a module but its parameters and persistent buffers.

    Attributes:
        digest: sha256 over what was read.
        opaque: what could not be read, one sentence each; empty where the digest tells everything.
    """

    digest: str
    opaque: tuple[str, ...] = ()


def structure_of(module: nn.Module, *, code: bool = True) -> Structure:
    """What decides a module's output beside its parameters and persistent buffers.

    `code=False` tells functions and classes by which objects they are: enough to compare a copy with its original.

    >>> structure_of(nn.LeakyReLU(0.1)) == structure_of(nn.LeakyReLU(0.2))
    False
    >>> scale = nn.Identity(); scale.generator = torch.Generator()
    >>> structure_of(scale).opaque[0]
    'generator is a Generator, which cannot be read as a value'
    """
    walk = _Walk(frozenset(map(id, module.modules())), code)
    walk.visit(module, "")
    return Structure(walk.hash.hexdigest(), tuple(dict.fromkeys(walk.opaque)))


def is_amended(module: nn.Module) -> bool:
    """Whether a module has attributes or hooks beyond those that every nn.Module has."""
    return bool(vars(module).keys() - _INTERNAL) or any(getattr(module, table) for table in _HOOKS)


def watched_tables(module: nn.Module) -> list[Any] | None:
    """The tables of one module, and the lists and dictionaries that it holds, where that is all that could change in it but its
    tensors' values: it then is what it was as long as each of them holds the same objects. None where more could.

    >>> layer = nn.Linear(2, 2)
    >>> len(watched_tables(layer)), watched_tables(layer)[0] is vars(layer)
    (9, True)
    >>> layer.generator = torch.Generator()
    >>> watched_tables(layer) is None
    True
    """
    kind = type(module)
    if (
        isinstance(module, torch.jit.ScriptModule | fx.GraphModule)
        or library_name(kind) is None
        or any(map(slots_of, kind.__mro__))
    ):
        return None
    tensors = [t for table in (module._parameters, module._buffers) for t in table.values() if t is not None]
    if any(getattr(module, table) for table in _HOOKS) or any(map(is_marked, tensors)):
        return None
    tables: list[Any] = [vars(module), *(vars(module)[table] for table in _TABLES)]
    todo = [v for k, v in vars(module).items() if k not in _INTERNAL or k == "forward"]
    while todo:
        value = todo.pop()
        if type(value) in (list, dict):
            tables.append(value)
        if type(value) in (list, tuple, torch.Size, dict):
            todo += [*value, *value.values()] if type(value) is dict else value
        elif not (
            type(value) in _SCALARS or type(value) in _TORCH or (isinstance(value, type) and library_name(value) is not None)
        ):
            return None
        if len(tables) > _DEEPEST:
            return None
    return tables


def is_marked(tensor: Tensor) -> bool:
    """Whether someone wrote attributes on a tensor, but for what libraries write there for themselves."""
    return any(not key.startswith(_MARKS) for key in vars(tensor))


class _Walk:
    """Feeds a hash with values and remembers what it could not read."""

    def __init__(self, registered: frozenset[int], code: bool = True) -> None:
        self.hash = hashlib.sha256()
        self._code_counts = code
        self._registered = registered  # modules whose tensors have names, and are told by `tensors_digest`
        self.opaque: list[str] = []
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # alive, so that no id is used twice
        self._open: set[int] = set()
        self._depth = 0

    def put(self, *parts: object) -> None:
        data = repr(parts).encode()
        self.hash.update(len(data).to_bytes(8, "little") + data)

    def cannot(self, where: str, what: str) -> None:
        self.put("opaque")
        self.opaque.append(f"{where or 'the module'} {what}")

    def _again(self, value: object) -> bool:
        """Whether an object with an identity was met before; then only where."""
        if id(value) in self._seen:
            self.put("again", self._seen[id(value)])
            return True
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        return False

    @contextmanager
    def _inside(self, value: object) -> Iterator[bool]:
        """False inside itself, or too deep."""
        if id(value) in self._open or self._depth > _DEEPEST:
            yield False
            return
        self._open.add(id(value))
        self._depth += 1
        try:
            yield True
        finally:
            self._open.discard(id(value))
            self._depth -= 1

    # -- values --------------------------------------------------------------------------------------------------------

    def visit(self, value: Any, where: str) -> None:
        kind = type(value)
        if kind in _SCALARS:
            self.put(kind.__name__, value)
            return
        if id(value) in self._seen:
            self.put("again", self._seen[id(value)])
            return
        if isinstance(value, enum.Enum):  # its class holds it
            self._again(value)
            self._class(kind, where)
            self.put(value.name)
            self._attributes({k: v for k, v in vars(value).items() if k not in _ENUM}, where)
            return
        with self._inside(value) as fresh:
            if not fresh:
                self.cannot(where, "holds itself, or is nested too deep")
            elif isinstance(value, nn.Module):
                self._module(value, where)
            elif isinstance(value, Tensor):
                self._tensor(value, where)
            elif isinstance(value, np.ndarray | np.generic):
                self._array(value, where)
            elif isinstance(value, _TORCH) or kind in (range, slice):
                self.put(kind.__name__, str(value))
            elif isinstance(value, type):
                self._class(value, where)
            elif isinstance(value, tuple | list | dict | set | frozenset | deque | Mapping) and not self._by_name(value):
                self._container(value, where)
            elif isinstance(value, str | int | float | complex | bytes):
                self._class(kind, where)
                base: Any = next(base for base in kind.__mro__ if base in _SCALARS)
                self.put(repr(base(value)))
                self._attributes(getattr(value, "__dict__", {}), where)
            else:
                self._object(value, where)

    def _by_name(self, value: Any) -> bool:
        """Settings of other libraries that are read-only views of something else."""
        return isinstance(value, Mapping) and not isinstance(value, dict | types.MappingProxyType)

    def _tensor(self, value: Tensor, where: str) -> None:
        try:
            put_tensor(self.hash, "tensor", value)
        except (TypeError, RuntimeError, NotImplementedError, ValueError) as error:
            self.cannot(where, f"is {error}")

        self._written_on(value, where)

    def _written_on(self, tensor: Tensor, where: str) -> None:
        """Attributes that someone gave to a tensor."""
        told = {k: v for k, v in vars(tensor).items() if not k.startswith(_MARKS)}
        if told:
            self._attributes(told, where)

    def _array(self, value: Any, where: str) -> None:
        if not isinstance(value, np.generic) and type(value) not in (np.ndarray, np.memmap):
            self.cannot(where, f"is a {type(value).__name__}, which cannot be read as a value")
            return
        if value.dtype.kind not in "fiubcUSmM":
            self.cannot(where, f"is an array of {value.dtype}, which cannot be read as a value")
            return
        self.put("array", value.dtype.str, value.shape)
        self.hash.update(np.ascontiguousarray(value).tobytes())

    def _container(self, value: Any, where: str) -> None:
        kind = type(value)
        if kind not in (tuple, list, dict, set, frozenset, deque, OrderedDict, defaultdict, torch.Size, types.MappingProxyType):
            self._class(kind, where)
            self._attributes(getattr(value, "__dict__", {}), where)
        self.put("items", "dict" if isinstance(value, Mapping) else kind.__name__, len(value))
        if isinstance(value, Mapping):
            if isinstance(value, defaultdict):
                self.visit(value.default_factory, where)
            for key, item in value.items():
                self.visit(key, where)
                self.visit(item, f"{where}[{key!r}]")
        elif isinstance(value, set | frozenset):
            self.put(*sorted(self._apart(item, where) for item in value))
        else:
            for i, item in enumerate(value):
                self.visit(item, f"{where}[{i}]")

    def _apart(self, value: object, where: str) -> str:
        walk = _Walk(self._registered, self._code_counts)
        walk.visit(value, where)
        self.opaque += walk.opaque
        return walk.hash.hexdigest()

    def _attributes(self, attributes: Mapping[str, Any], where: str, skip: frozenset[str] = frozenset()) -> None:
        """Attributes by name, in any order; plain ones at once."""
        plain: list[tuple[str, str, object]] = []
        rest = []
        for key in sorted(attributes):
            if key in skip:
                continue
            value = attributes[key]
            kind = type(value)
            if kind in _SCALARS or (kind is tuple and all(type(v) in _SCALARS for v in value)):
                plain.append((key, kind.__name__, value))
            else:
                rest.append((key, value))
        self.put("attributes", plain, len(rest))
        for key, value in rest:
            self.put(key)
            self.visit(value, f"{where}.{key}" if where else key)

    def _object(self, value: Any, where: str) -> None:
        name = library_name(value) if callable(value) else None
        if name in WORLD:
            self.cannot(where, f"is {name.replace(':', '.')}, which reads what the code does not name")
        elif name is not None:
            self.put("named", name)
        elif isinstance(value, types.FunctionType):
            self._function(value, where)
        elif isinstance(value, types.MethodType | types.BuiltinMethodType):
            self.put("method", value.__name__)
            self.visit(getattr(value, "__func__", None), where)
            if not isinstance(value.__self__, types.ModuleType):
                self.visit(value.__self__, where)
        elif isinstance(value, functools.partial):
            self.put("partial")
            for part in (value.func, value.args, value.keywords):
                self.visit(part, where)
        elif isinstance(value, types.ModuleType):
            self.put("library", value.__name__)
            if not is_installed(value.__name__):
                self.cannot(where, f"is the module {value.__name__!r}, which is not an installed library")
        elif isinstance(value, property):
            self.put("property")
            self.visit(value.fget, where)
        elif isinstance(value, classmethod | staticmethod):
            self.put(type(value).__name__)
            self.visit(value.__func__, where)
        elif isinstance(value, PurePath | logging.Logger):
            self.put(type(value).__name__, str(value))
        elif isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and str(value).startswith("aten."):
            self.put("operator", str(value))
        elif isinstance(value, re.Pattern):
            self.put("pattern", value.pattern, value.flags)
        elif type(value) is _CACHED:
            self.put("wrapped")
            self.visit(value.__wrapped__, where)
        elif is_all_attributes(type(value)):
            if not self._again(value):
                self._class(type(value), where)
                slots = [s for base in type(value).__mro__ for s in slots_of(base) if hasattr(value, s)]
                self._attributes({**{s: getattr(value, s) for s in slots}, **getattr(value, "__dict__", {})}, where)
        else:
            self.cannot(where, f"is a {type(value).__name__}, which cannot be read as a value")

    # -- modules -------------------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module, where: str) -> None:
        if self._again(module):
            return
        if isinstance(module, torch.jit.ScriptModule):
            self.cannot(where, "is TorchScript, whose code cannot be read as a value")
            return
        graph = isinstance(module, fx.GraphModule)
        if not self._code_counts and (graph or type(module).__module__.startswith("torch._dynamo")):
            for key, child in module._modules.items():  # torch makes its own anew
                self.visit(child, f"{where}.{key}")
            return
        if graph:
            self.put("graph", module.code)  # the class is made for this one object
        else:
            self._class(type(module), where)
        before = f"{where}." if where else ""
        hidden = id(module) not in self._registered  # held in a list or dict: its tensors have no names
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                self.put("tensor", key, tensor is None)
                if tensor is not None and (hidden or key in module._non_persistent_buffers_set):
                    self._tensor(tensor, before + key)
                elif tensor is not None:
                    self._written_on(tensor, before + key)
        for hooks in _HOOKS:
            keywords = getattr(module, f"{hooks}_with_kwargs")
            for key, hook in getattr(module, hooks).items():
                self.put(hooks, *(["keywords"] if key in keywords else []))
                self.visit(hook, f"{before}{hooks}")
        slots = {s: getattr(module, s) for base in type(module).__mro__ for s in slots_of(base) if hasattr(module, s)}
        self._attributes({**module.__dict__, **slots}, where, _INTERNAL | _GRAPH_MODULE if graph else _INTERNAL)
        self.put("children", len(module._modules))
        for key, child in module._modules.items():
            self.put(key)
            self.visit(child, before + key)

    # -- code ----------------------------------------------------------------------------------------------------------

    def _class(self, kind: type, where: str) -> None:
        if self._again(kind) or self._by_identity(kind):
            return
        name = library_name(kind)
        if name is not None:
            self.put("class", name)
            return
        self.put("class", kind.__qualname__, len(kind.__bases__))
        if not kind.__flags__ & 1 << 9:  # made in C (Py_TPFLAGS_HEAPTYPE)
            self.cannot(where, f"is of class {kind.__qualname__}, which no installed library gives under that name")
            return
        for base in kind.__bases__:
            if base is not object:
                self._class(base, where)
        if library_name(type(kind)) is None:
            self._class(type(kind), where)
        content = {k: v for k, v in vars(kind).items() if k not in _CLASS_NOISE and not is_slot(v)}
        self._attributes(content, f"class {kind.__qualname__}")

    def _by_identity(self, value: object) -> bool:
        if not self._code_counts:
            self.put("object", id(value))
        return not self._code_counts

    def _function(self, function: types.FunctionType, where: str) -> None:
        if self._again(function) or self._by_identity(function):
            return
        code = function.__code__
        self.put("function")
        self._code(code)
        title = f"{where}: {code.co_name}" if where else code.co_name
        for defaults in (function.__defaults__, function.__kwdefaults__):
            self.visit(defaults, title)
        if function.__dict__:
            self._attributes(function.__dict__, title)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                captured = cell.cell_contents
            except ValueError:
                self.put("empty")
                continue
            self._captured(captured, name, title)
        if code.co_name not in _MAKING and not is_installed(str(function.__globals__.get("__name__"))):
            for name, found in outside_values(code, function.__globals__):
                self.put("global", name)
                self._captured(found, name, title)

    def _captured(self, value: Any, name: str, where: str) -> None:
        if isinstance(value, Hidden):
            self.cannot(where, value.words)
        elif isinstance(value, list | dict | set | deque | bytearray | Mapping):
            # not by value: it may change with every call, and others may hold it
            self.cannot(where, f"reads {name!r}, a {type(value).__name__} that it shares with other code")
        else:
            self.visit(value, f"{where} reads {name!r}, which")

    def _code(self, code: types.CodeType) -> None:
        self.put(code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags, code.co_code)
        self.put(code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_exceptiontable)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            elif isinstance(constant, frozenset):
                self.put("frozenset", sorted(map(repr, constant)))
            else:
                self.put(type(constant).__name__, constant)
