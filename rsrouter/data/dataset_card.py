"""Reads the card of a Hub data set (the YAML at the head of its README): configurations, files, class names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from rsrouter.inputs import printable


@dataclass(frozen=True)
class DatasetCard:
    """What a card declares; empty where it declares nothing.

    Attributes:
        files: configuration to split to patterns of file names.
        names: column to class names.
    """

    files: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_card(text: str) -> DatasetCard:
    """The card of a README; an empty one where its head is not YAML or declares nothing.

    >>> read_card("---\\nconfigs:\\n- config_name: a\\n  data_files:\\n  - split: test\\n    path: x/*.parquet\\n---").files
    {'a': {'test': ['x/*.parquet']}}
    """
    import yaml  # type: ignore[import-untyped]

    head = re.match(r"---\s*\n(.*?)\n---", text[: 1 << 20].replace("\r\n", "\n"), flags=re.DOTALL)
    try:
        content = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return DatasetCard()
    files: dict[str, dict[str, list[str]]] = {}
    for config in _dicts(content.get("configs")):
        parts = files.setdefault(str(config.get("config_name", "default")), {})
        given = config.get("data_files")
        for entry in [{"split": "train", "path": given}] if isinstance(given, str) else _dicts(given):
            paths = entry.get("path")
            listed = [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []
            parts.setdefault(str(entry.get("split", "train")), []).extend(p for p in listed if isinstance(p, str))
    names: dict[str, tuple[str, ...]] = {}
    info = content.get("dataset_info")
    for entry in [info] if isinstance(info, dict) else _dicts(info):
        for column in _dicts(entry.get("features")):
            kind = column.get("dtype")
            label = kind.get("class_label") if isinstance(kind, dict) else None
            found = label.get("names") if isinstance(label, dict) else None
            if isinstance(found, dict) and all(str(k).isdecimal() for k in found):
                found = [found[k] for k in sorted(found, key=lambda k: int(str(k)))]
            if isinstance(found, list) and found and isinstance(column.get("name"), str):
                names.setdefault(column["name"], tuple(printable(n) for n in found))
    return DatasetCard({k: v for k, v in files.items() if v}, names)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
