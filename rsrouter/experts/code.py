"""References in code: names of installed libraries, slots of classes, and what functions read from outside themselves."""

from __future__ import annotations

import dis
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

#: Reads of something that no value in the code tells, as builtins and as names of the standard library.
_COMPUTED = frozenset({"eval", "exec", "globals", "__import__"})
WORLD = frozenset(
    [
        *("os:getenv", "os:getenvb", "importlib:import_module", "importlib:__import__", "sys:_getframe"),
        *("inspect:currentframe", "inspect:stack", "builtins:eval", "builtins:exec", "builtins:globals", "builtins:__import__"),
    ]
)


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a module belongs to Python, to an installed distribution, or to this package."""
    top = module.split(".")[0]
    if top == "rsrouter" or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return top in sys.stdlib_module_names and top != "__main__"
    return _of_library(file)


def _of_library(file: str) -> bool:
    # a user's file may be called like one of the standard library
    home = Path(os.__file__).resolve().parent
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts) or Path(file).resolve().is_relative_to(home)


def _imports_library(name: str) -> bool:
    """Whether an import statement of that name finds an installed library; the same before it was run and after."""
    top = name.split(".")[0]
    if not top:
        return False  # relative
    if top in sys.builtin_module_names or top == "rsrouter":
        return True
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if found is None or found.origin is None:
        return False
    return found.origin == "frozen" or _of_library(found.origin)


def _lookup(module: str | None, qualname: str) -> object:
    found: object = sys.modules.get(module or "")
    for part in qualname.split("."):  # what a module makes when it is asked is nothing of its own
        found = vars(found).get(part) if isinstance(found, types.ModuleType) else getattr(found, part, None)
    return found


def library_name(value: Any) -> str | None:
    """The qualified name under which an installed library gives exactly this object; None if there is none."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(name, str):
        return None
    owner = getattr(value, "__objclass__", None)
    homes = (getattr(value, "__module__", None), getattr(owner, "__module__", None), "torch", "torch.nn.functional", "numpy")
    for home in homes:
        for text in (name, name.rpartition(".")[2]):
            if isinstance(home, str) and is_installed(home) and _lookup(home, text) is value:
                # files inside this package may move
                return f"{'rsrouter' if home.split('.')[0] == 'rsrouter' else home}:{text}"
    return None


@functools.cache
def slots_of(kind: type) -> tuple[str, ...]:
    """Attributes that a class itself, not its bases, keeps in slots."""
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    hidden = {n: f"_{kind.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n for n in names}
    return tuple(hidden[n] for n in names if n not in ("__dict__", "__weakref__"))


def is_all_attributes(kind: type) -> bool:
    """Whether objects of a class hold nothing but their attributes: no room for anything that C code keeps in them."""
    offsets = (kind.__dictoffset__, kind.__weakrefoffset__)
    slots = sum(len(slots_of(base)) for base in kind.__mro__)
    room = object.__basicsize__ + 8 * (slots + sum(offset > 0 for offset in offsets))
    return kind.__basicsize__ == room and kind.__itemsize__ == 0


def is_slot(value: object) -> bool:
    """Whether something in a class stands for an attribute of its objects."""
    return isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType)


def outside_values(code: types.CodeType, known: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Global names that code reads, with their values; attributes of a module (`helpers.scale`, `math.pi`) are followed into it.

    Of an installed library's module only what may change counts: numbers, texts, containers and reads of the world. Where
    code names what it reads only when it runs, or imports what no installed library has, the value is a `Hidden`.
    """
    wanted: dict[str, object] = {}
    pending = [code]

    def put(path: str, value: object) -> None:
        root = path.split(".")[0]
        kept = not isinstance(known.get(root), types.ModuleType) or not is_installed(known[root].__name__)
        wanted.update({path: value} if kept or _may_change(value) else {root: known[root]})

    while pending:
        current = pending.pop()
        pending += [c for c in current.co_consts if isinstance(c, types.CodeType)]
        path, value, level = "", None, 0
        for step in dis.get_instructions(current):
            name = str(step.argval)
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and path and isinstance(value, types.ModuleType):
                inside = vars(value).get(name) if is_installed(value.__name__) else getattr(value, name, None)
                path, value = f"{path}.{name}", inside
                continue
            if path:
                put(path, value)
            path, value = "", None
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in known:
                path, value = name, known[name]
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in _COMPUTED:
                wanted[name] = Hidden(f"calls {name!r}, which reads what the code does not name")
            elif step.opname == "IMPORT_NAME" and (level or not _imports_library(name)):
                wanted[f"import {name}"] = Hidden(f"imports {name or 'from its package'!r}, which is not an installed library")
            if step.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and type(step.argval) is int:
                level = step.argval
            elif step.opname != "LOAD_CONST":
                level = 0
        if path:
            put(path, value)
    yield from sorted(wanted.items(), key=lambda item: item[0])


def _may_change(value: object) -> bool:
    if isinstance(value, bool | int | float | str | bytes | list | dict | set | Mapping | Hidden):
        return True
    return callable(value) and library_name(value) in WORLD


class Hidden:
    """Something that code reads and that no value tells; `words` say what it does."""

    def __init__(self, words: str) -> None:
        self.words = words
