"""Stored forms (JSON beside weights and tables) are read once, against a schema, and refused in words."""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rsrouter.core.errors import InputError, RSRouterError

#: No stored form is larger; a file that is was not written by this package.
MOST_BYTES = 256 * 2**20


class Stored(BaseModel):
    """Base of everything that is read from JSON: frozen, of strict types, unknown keys kept aside for a warning."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


M = TypeVar("M", bound=Stored)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two readers of a key that stands there twice, each may see another value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands in it twice")
    return made


def parse_json(
    data: bytes | str, what: str, *, error: type[RSRouterError] = InputError, remedy: str = "write it again with rsrouter"
) -> Any:
    """The value that JSON text holds.

    Args:
        data: the text.
        what: names it in an error, such as `"pool.json"`.
        error: the class of the error.
        remedy: what the user can do.

    Raises:
        error: no JSON, NaN, Infinity or a key twice in it, or nested too deep.
    """
    try:
        return json.loads(data, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as problem:
        received = "nested too deep" if isinstance(problem, RecursionError) else str(problem)
        raise error(f"{what} is not JSON", expected="JSON text", received=received, remedy=remedy) from problem


def read_bytes(path: str | os.PathLike[str], what: str, *, error: type[RSRouterError] = InputError, remedy: str = "") -> bytes:
    """The content of a regular file of at most `MOST_BYTES`; pipes, devices and folders are never opened.

    Raises:
        error: no such file, another kind of file, too large, or not to be read.
    """
    file = Path(path)
    expected = f"a regular file of at most {MOST_BYTES >> 20} MiB"
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            kind = f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "a folder, pipe or device"
            raise error(f"{what} cannot be read", expected=expected, received=f"{file}: {kind}", remedy=remedy)
        return file.read_bytes()
    except (OSError, ValueError) as problem:
        if isinstance(problem, RSRouterError):
            raise
        raise error(f"{what} cannot be read", expected=expected, received=f"{file}: {problem}", remedy=remedy) from problem


def read_json(
    path: str | os.PathLike[str],
    what: str,
    *,
    error: type[RSRouterError] = InputError,
    remedy: str = "write it again with rsrouter",
) -> Any:
    """`parse_json` of `read_bytes`."""
    return parse_json(read_bytes(path, what, error=error, remedy=remedy), what, error=error, remedy=remedy)


def validated(
    model: type[M],
    content: Any,
    what: str,
    *,
    error: type[RSRouterError] = InputError,
    remedy: str = "write it again with rsrouter",
) -> M:
    """`content` as `model`; keys that the schema does not know are warned about.

    Raises:
        error: a field that is missing, of another type or out of range; the first three are named.
    """
    try:
        # through JSON: strict types still take a list where a tuple is wanted, as JSON has no tuples
        read = model.model_validate_json(json.dumps(content, allow_nan=False))
    except ValidationError as problem:
        faults = problem.errors(include_url=False)
        words = [f"{'.'.join(map(str, f['loc'])) or 'the whole'}: {f['msg'].lower()}" for f in faults[:3]]
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        fields = ", ".join(name for name, field in model.model_fields.items() if field.is_required())
        raise error(
            f"{what} does not have the form it must have",
            expected=f"an object with {fields}",
            received="; ".join(words) + more,
            remedy=remedy,
        ) from problem
    except (TypeError, ValueError, RecursionError) as problem:
        raise error(f"{what} is not JSON", expected="JSON", received=str(problem), remedy=remedy) from problem
    if unknown := sorted(_unknown(read)):
        warnings.warn(f"{what}: unknown keys {unknown} are ignored; they may need a newer rsrouter", stacklevel=3)
    return read


def _unknown(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, BaseModel):
        found = [f"{prefix}{key}" for key in (value.model_extra or {})]
        for key in type(value).model_fields:
            found += _unknown(getattr(value, key), f"{prefix}{key}.")
        return found
    if isinstance(value, list | tuple):
        return [name for i, item in enumerate(value) for name in _unknown(item, f"{prefix}{i}.")]
    if isinstance(value, dict):
        return [name for key, item in value.items() for name in _unknown(item, f"{prefix}{key}.")]
    return []
