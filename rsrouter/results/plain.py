"""Text of others is text: names from files, tables and cards, made harmless where they are shown."""

from __future__ import annotations

import re

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])?")
# C0 and C1 controls, zero-width and bidirectional marks, line separators
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~$&-])")


def printable(text: object) -> str:
    """`text` in one line, without terminal escapes, control characters and marks that turn the direction of writing.

    >>> printable("router\\x1b[31m red\\x07")
    'router red'
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", re.sub(r"[\t\r\n]+", " ", str(text))))


def csv_cell(text: object) -> str:
    """`text` for a cell of a CSV file: a spreadsheet takes what begins with one of `= + - @` for a formula.

    >>> csv_cell("=1+1")
    "'=1+1"
    """
    clean = printable(text)
    return f"'{clean}" if clean.lstrip()[:1] in ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20") else clean


def markdown(text: object) -> str:
    """`text` with everything escaped that Markdown or HTML would read as markup.

    >>> markdown("a|b <i>")
    'a\\\\|b \\\\<i\\\\>'
    """
    return _MARKDOWN.sub(r"\\\1", printable(text))


__all__ = ["csv_cell", "markdown", "printable"]
