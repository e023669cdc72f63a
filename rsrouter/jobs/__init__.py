"""Jobs over whole data sets: certify or label into a crash-safe table, on one process, several, or a Ray cluster."""

from rsrouter.jobs.certify import certify_table
from rsrouter.jobs.driver import Images, Running
from rsrouter.jobs.estimate import Estimate, PlanCost, estimate_table
from rsrouter.jobs.label import label_table, merge_labels
from rsrouter.jobs.transfer import check_parent, transfer_table

__all__ = [
    "Estimate",
    "Images",
    "PlanCost",
    "Running",
    "certify_table",
    "check_parent",
    "estimate_table",
    "label_table",
    "merge_labels",
    "transfer_table",
]
