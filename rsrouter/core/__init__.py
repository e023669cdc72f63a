"""What a certificate is: numpy and scipy only, imports no torch."""

from rsrouter.core.bounds import AlphaSplit, binom_lower, binom_upper, sequence_lower, sequence_upper
from rsrouter.core.certificates import entry_radii, tree_radius, vote_radius
from rsrouter.core.errors import (
    CheckpointError,
    HubError,
    InputError,
    IntegrityError,
    NetworkError,
    PlanError,
    ResultsError,
    RSRouterError,
)
from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan, plan_from_dict
from rsrouter.core.policy import CertifyPolicy, VoteRequest
from rsrouter.core.tree import Stage, Tree, cascade_tree, expert_stage, flat_tree
from rsrouter.core.types import ABSTAIN, RULES, SIDES, Certificate

__all__ = [
    "ABSTAIN", "RULES", "SIDES", "AdaptivePlan", "AlphaSplit", "Certificate", "CertifyPolicy", "CheckpointError",
    "FixedPlan", "HubError", "InputError", "IntegrityError", "NetworkError", "Plan", "PlanError", "RSRouterError",
    "ResultsError", "Stage", "Tree", "VoteRequest", "binom_lower", "binom_upper", "cascade_tree", "entry_radii",
    "expert_stage", "flat_tree", "plan_from_dict", "sequence_lower", "sequence_upper", "tree_radius", "vote_radius",
]
