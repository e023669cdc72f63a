"""Jobs over whole data sets: certify or label into a crash-safe table, on one process, several, or a Ray cluster."""

from rsrouter.jobs.certify import certify_table
from rsrouter.jobs.driver import Images, Running
from rsrouter.jobs.estimate import Estimate, PlanCost, estimate_table
from rsrouter.jobs.heads import certify_head, declare_heads, draw_features, redraw_head, with_head
from rsrouter.jobs.label import label_table, merge_labels
from rsrouter.jobs.transfer import check_parent, transfer_table

__all__ = [
    "Estimate",
    "Images",
    "PlanCost",
    "Running",
    "certify_head",
    "certify_table",
    "check_parent",
    "declare_heads",
    "draw_features",
    "estimate_table",
    "label_table",
    "merge_labels",
    "redraw_head",
    "transfer_table",
    "with_head",
]
