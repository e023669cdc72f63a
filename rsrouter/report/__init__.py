"""Reports: the numbers (`curves`), and one self-contained page with its figures (`write_report`)."""

from rsrouter.report.curves import (
    Curve,
    abstention_rate,
    accuracy_difference,
    average_certified_radius,
    certified_accuracy,
    certified_lower,
    coverage,
    coverage_interval,
    envelope,
    natural_accuracy,
    oracle,
    wrong_certificates,
)
from rsrouter.report.page import write_report
from rsrouter.report.summary import Natural, Summary, summarise

__all__ = [
    "Curve",
    "Natural",
    "Summary",
    "abstention_rate",
    "accuracy_difference",
    "average_certified_radius",
    "certified_accuracy",
    "certified_lower",
    "coverage",
    "coverage_interval",
    "envelope",
    "natural_accuracy",
    "oracle",
    "summarise",
    "wrong_certificates",
    "write_report",
]
