"""Licences of experts: what they allow the router that stands on them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert
from rsrouter.serialise import origins

_IDENTIFIER = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*[+]*")
_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?_? ?commercial|research[-_ ]only", re.IGNORECASE)


def is_non_commercial(licence: str | None) -> bool:
    """Whether a licence, as people write it, forbids commercial use.

    >>> is_non_commercial("cc-by-nc-4.0"), is_non_commercial("apache-2.0"), is_non_commercial(None)
    (True, False, False)
    """
    return licence is not None and _NON_COMMERCIAL.search(licence) is not None


def restricted(experts: Iterable[Expert]) -> dict[str, str]:
    """Expert's name to a licence of one of its parts that forbids commercial use."""
    return {e.name: str(o.licence) for e in experts for o in origins(e) if is_non_commercial(o.licence)}


def check_licence(licence: str, experts: Iterable[Expert]) -> None:
    """Refuses a licence that promises more than the experts' own.

    Raises:
        InputError: not an identifier as the Hub has them, or an expert may not be used commercially, and the router's licence
            does not say so.
    """
    if not isinstance(licence, str) or not _IDENTIFIER.fullmatch(licence):
        raise InputError(
            "The router's licence is not a licence identifier of the Hub",
            expected="lower-case letters, digits, dots and hyphens, such as apache-2.0, mit or cc-by-4.0",
            received=repr(licence),
            remedy="take one of https://huggingface.co/docs/hub/repositories-licenses, or 'other'",
        )
    found = restricted(experts)
    if found and not is_non_commercial(licence) and licence != "other":
        named = next((text.lower() for text in sorted(found.values()) if _IDENTIFIER.fullmatch(text.lower())), None)
        raise InputError(
            "The router's licence promises more than those of its experts",
            expected="a licence without commercial use, or 'other'",
            received=f"{licence}; " + ", ".join(f"{name}: {text}" for name, text in found.items()),
            remedy=(f"--licence {named}, or " if named else "") + "--licence other, and say in README.md what holds",
        )


__all__ = ["check_licence", "is_non_commercial", "restricted"]
