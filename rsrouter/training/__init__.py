"""Training routers: the experts stay frozen to the bit, only the router's own parameters move.

`train_router` is the one way in; a `Training` is everything it takes, and `tune_cascade`, `train_deferral` and `flat_router` are
what it calls for each kind.
"""

from rsrouter.training.cascade import tune_cascade
from rsrouter.training.deferral import DEFERRAL_RECIPES, DeferralRecipe, train_deferral
from rsrouter.training.flat import RECIPES, Recipe, flat_router
from rsrouter.training.labels import Labels, label_images, label_votes
from rsrouter.training.losses import consistency_loss, dual_rs_loss, good_sets, utility_loss
from rsrouter.training.record import KINDS, Training
from rsrouter.training.resume import ResumeStore
from rsrouter.training.trackers import log_to
from rsrouter.training.train import train_router
from rsrouter.training.whole import WholeRecipe

__all__ = [
    "DEFERRAL_RECIPES",
    "KINDS",
    "RECIPES",
    "DeferralRecipe",
    "Labels",
    "Recipe",
    "ResumeStore",
    "Training",
    "WholeRecipe",
    "consistency_loss",
    "dual_rs_loss",
    "flat_router",
    "good_sets",
    "label_images",
    "label_votes",
    "log_to",
    "train_deferral",
    "train_router",
    "tune_cascade",
    "utility_loss",
]
