"""What a certificate is: numpy and scipy only, imports no torch."""

from rsrouter.core.bounds import AlphaSplit, binom_lower, binom_upper, multiclass_bounds, sequence_lower, sequence_upper
from rsrouter.core.budget import (
    BudgetRow,
    BudgetTable,
    budget_table,
    expected_votes,
    largest_radius,
    mean_radius_ratio,
    votes_needed,
)
from rsrouter.core.certificates import entry_radii, tree_radius, vote_radius
from rsrouter.core.certify import CertifyPolicy, VoteRequest
from rsrouter.core.errors import (
    CheckpointError,
    HubError,
    InputError,
    IntegrityError,
    NetworkError,
    PlanError,
    ResultsError,
    RSRouterError,
    WorkerError,
)
from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan, plan_from_dict
from rsrouter.core.predict import PredictPolicy, confidence_set
from rsrouter.core.terms import Terms
from rsrouter.core.tree import Stage, Tree, cascade_tree, expert_stage, flat_tree
from rsrouter.core.types import ABSTAIN, RULES, SIDES, Certificate

__all__ = [
    "ABSTAIN",
    "RULES",
    "SIDES",
    "AdaptivePlan",
    "AlphaSplit",
    "BudgetRow",
    "BudgetTable",
    "Certificate",
    "CertifyPolicy",
    "CheckpointError",
    "FixedPlan",
    "HubError",
    "InputError",
    "IntegrityError",
    "NetworkError",
    "Plan",
    "PlanError",
    "PredictPolicy",
    "RSRouterError",
    "ResultsError",
    "Stage",
    "Terms",
    "Tree",
    "VoteRequest",
    "WorkerError",
    "binom_lower",
    "binom_upper",
    "budget_table",
    "cascade_tree",
    "confidence_set",
    "entry_radii",
    "expected_votes",
    "expert_stage",
    "flat_tree",
    "largest_radius",
    "mean_radius_ratio",
    "multiclass_bounds",
    "plan_from_dict",
    "sequence_lower",
    "sequence_upper",
    "tree_radius",
    "vote_radius",
    "votes_needed",
]
