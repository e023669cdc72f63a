"""State that decides a module's output and stands in no attribute of a module: each case is told, or makes the module unique."""

from __future__ import annotations

import enum
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rsrouter.experts import module_identity

SHARED = types.ModuleType("tests_hidden_helpers")
sys.modules["tests_hidden_helpers"] = SHARED


class Held(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x)


class Scaled:
    """A decorator that looks like what it wraps."""

    def __init__(self, function: Callable[..., Any], by: int) -> None:
        functools.update_wrapper(self, function)
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return self.__wrapped__(x) * self.by


class Text(str):
    by = 0


class Slots(nn.Module):
    __slots__ = ("by",)

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by


def on_function(by: int) -> nn.Module:
    def scale(x: Tensor) -> Tensor:
        return x * scale.by

    scale.by = by  # type: ignore[attr-defined]
    return Held(scale)


def on_parameter(by: int) -> nn.Module:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.ones_(layer.weight)
    layer.weight.by = by
    return layer


def on_plain_tensor(by: int) -> nn.Module:
    tensor = torch.ones(2)
    tensor.by = by  # type: ignore[attr-defined]
    return Held(tensor)


def on_metaclass(by: int) -> nn.Module:
    kind: Any = type("Kind", (type,), {"by": by})
    return kind("Net", (nn.Module,), {})()


def on_text(by: int) -> nn.Module:
    text = Text("a")
    text.by = by
    return Held(text)


def on_member(by: int) -> nn.Module:
    class Made(enum.Enum):
        ONE = 1

    Made.ONE.by = by  # type: ignore[attr-defined]
    return Held(Made.ONE)


def with_keywords(by: int) -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(lambda *given: given[-1] * (-1) ** len(given), with_kwargs=bool(by))
    return module


TOLD = {
    "decorator": lambda by: Held(Scaled(torch.relu, by)),
    "function": on_function,
    "keywords of a hook": with_keywords,
    "member of an enumeration": on_member,
    "metaclass": on_metaclass,
    "parameter": on_parameter,
    "plain tensor": on_plain_tensor,
    "slots": Slots,
    "text": on_text,
}


@pytest.mark.parametrize("name", TOLD)
def test_what_is_written_on_things_is_told(name: str) -> None:
    one, other, again = (module_identity(TOLD[name](by)) for by in (1, 2 if name != "keywords of a hook" else 0, 1))
    assert one.digest != other.digest
    assert one.digest == again.digest
    assert one.opaque == other.opaque == ()


READS = {
    "environ": "import os\ndef f(x): return x * float(os.environ['BY'])",
    "eval": "def f(x): return x * eval('BY')",
    "exec": "def f(x): exec('y = BY'); return x",
    "from os import environ": "from os import environ\ndef f(x): return x * float(environ['BY'])",
    "from os import getenv": "from os import getenv\ndef f(x): return x * float(getenv('BY'))",
    "getenv": "import os\ndef f(x): return x * float(os.getenv('BY'))",
    "globals": "def f(x): return x * globals()['BY']",
    "import_module": "import importlib\ndef f(x): return x * importlib.import_module('tests_hidden_helpers').BY",
    "import": "def f(x):\n    import tests_hidden_helpers as h\n    return x * h.BY",
    "from import": "def f(x):\n    from tests_hidden_helpers import BY\n    return x * BY",
    "relative import": "def f(x):\n    from . import BY\n    return x * BY",
    "modules": "import sys\ndef f(x): return x * sys.modules['tests_hidden_helpers'].BY",
}


def function(source: str) -> Callable[..., Any]:
    known: dict[str, Any] = {"BY": 1}
    exec(source, known)
    return known["f"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", READS)
def test_code_that_does_not_name_what_it_reads_makes_a_module_unique(name: str) -> None:
    identity = module_identity(Held(function(READS[name])))
    assert identity.opaque
    assert any(word in identity.opaque[0] for word in ("reads what the code does not name", "not an installed library", "shares"))


@pytest.mark.parametrize(
    "source",
    [
        "import math\ndef f(x): return x * math.pi",
        "import torch\ndef f(x): return torch.nn.functional.relu(x)",
        "import os\ndef f(x): return os.path.join(x)",
        "def f(x):\n    import math\n    from torch.nn import functional as F\n    return F.relu(x) * math.pi",
    ],
)
def test_libraries_are_read_by_name(source: str) -> None:
    one, other = module_identity(Held(function(source))), module_identity(Held(function(source)))
    assert one == other
    assert one.opaque == ()


def test_a_number_of_a_library_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import math

    held = Held(function("import math\ndef f(x): return x * math.pi"))
    before = module_identity(held)
    monkeypatch.setattr(math, "pi", 3.0)
    assert module_identity(held) != before


def test_a_masked_array_is_not_taken_for_its_values() -> None:
    assert "MaskedArray" in module_identity(Held(np.ma.array([1.0], mask=[True]))).opaque[0]


def test_a_users_file_may_be_called_like_one_of_python(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rsrouter.experts.code import is_installed

    (tmp_path / "this.py").write_text("BY = 1\ndef scale(x): return x * BY\n")
    monkeypatch.delitem(sys.modules, "this", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    is_installed.cache_clear()
    made = importlib.import_module("this")
    before = module_identity(Held(made.scale))
    made.BY = 2
    assert module_identity(Held(made.scale)) != before
    sys.modules.pop("this")
    is_installed.cache_clear()
    assert is_installed("math")
    assert is_installed(os.__name__)
