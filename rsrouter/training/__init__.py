"""Training routers: the experts stay frozen to the bit, only the router's own parameters move.

`train_router` is the one way in; `tune_cascade` and `train_deferral` are what it calls for those kinds.
"""

from rsrouter.training.deferral import DEFERRAL_RECIPES, DeferralRecipe, train_deferral
from rsrouter.training.flat import RECIPES, Recipe
from rsrouter.training.labels import Labels, label_images, label_votes
from rsrouter.training.losses import consistency_loss, dual_rs_loss, good_sets, utility_loss
from rsrouter.training.train import KINDS, train_router
from rsrouter.training.tune import tune_cascade

__all__ = [
    "DEFERRAL_RECIPES",
    "KINDS",
    "RECIPES",
    "DeferralRecipe",
    "Labels",
    "Recipe",
    "consistency_loss",
    "dual_rs_loss",
    "good_sets",
    "label_images",
    "label_votes",
    "train_deferral",
    "train_router",
    "tune_cascade",
    "utility_loss",
]
