"""rsrouter: route between randomized-smoothing experts, and certify the result.

Public names are imported on first use (PEP 562), so `import rsrouter.core` never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rsrouter._version import __version__

if TYPE_CHECKING:
    from rsrouter import core
    from rsrouter.core import (
        ABSTAIN,
        AdaptivePlan,
        Certificate,
        CheckpointError,
        FixedPlan,
        HubError,
        InputError,
        IntegrityError,
        NetworkError,
        PlanError,
        ResultsError,
        RSRouterError,
        Terms,
        WorkerError,
    )
    from rsrouter.data import load_data
    from rsrouter.experts import (
        Expert,
        ExpertPool,
        build_architecture,
        convert,
        denoised,
        ensemble,
        load_expert,
        register_architecture,
        select_experts,
        wrap,
    )
    from rsrouter.report import write_report
    from rsrouter.results import ResultsWriter, Table, merge_tables, read_table
    from rsrouter.router import CascadeRouter, FlatRouter, MLPHead
    from rsrouter.sampling import Execution
    from rsrouter.smooth import RoutedSmooth, Smooth
    from rsrouter.training import Labels, Recipe, label_images, train_router

_WHERE = {
    "rsrouter.core": (
        "ABSTAIN",
        "AdaptivePlan",
        "Certificate",
        "CheckpointError",
        "FixedPlan",
        "HubError",
        "InputError",
        "IntegrityError",
        "NetworkError",
        "PlanError",
        "RSRouterError",
        "ResultsError",
        "Terms",
        "WorkerError",
    ),
    "rsrouter.data": ("load_data",),
    "rsrouter.experts": (
        "Expert",
        "ExpertPool",
        "build_architecture",
        "convert",
        "denoised",
        "ensemble",
        "load_expert",
        "register_architecture",
        "select_experts",
        "wrap",
    ),
    "rsrouter.report": ("write_report",),
    "rsrouter.results": ("ResultsWriter", "Table", "merge_tables", "read_table"),
    "rsrouter.router": ("CascadeRouter", "FlatRouter", "MLPHead"),
    "rsrouter.sampling": ("Execution",),
    "rsrouter.smooth": ("RoutedSmooth", "Smooth"),
    "rsrouter.training": ("Labels", "Recipe", "label_images", "train_router"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "ABSTAIN",
    "AdaptivePlan",
    "CascadeRouter",
    "Certificate",
    "CheckpointError",
    "Execution",
    "Expert",
    "ExpertPool",
    "FixedPlan",
    "FlatRouter",
    "HubError",
    "InputError",
    "IntegrityError",
    "Labels",
    "MLPHead",
    "NetworkError",
    "PlanError",
    "RSRouterError",
    "Recipe",
    "ResultsError",
    "ResultsWriter",
    "RoutedSmooth",
    "Smooth",
    "Table",
    "Terms",
    "WorkerError",
    "__version__",
    "build_architecture",
    "convert",
    "core",
    "denoised",
    "ensemble",
    "label_images",
    "load_data",
    "load_expert",
    "merge_tables",
    "read_table",
    "register_architecture",
    "select_experts",
    "train_router",
    "wrap",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "core":
        return importlib.import_module("rsrouter.core")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rsrouter' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
