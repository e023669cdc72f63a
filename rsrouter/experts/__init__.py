"""Experts: any randomized-smoothing checkpoint as a pinned, verified base classifier."""

from rsrouter.experts.config import NORMALISATIONS
from rsrouter.experts.convert import convert, save_expert
from rsrouter.experts.denoiser_files import Denoiser, load_denoiser
from rsrouter.experts.denoising import at_sigmas, denoised
from rsrouter.experts.ensembles import Ensemble, ensemble
from rsrouter.experts.expert import Expert
from rsrouter.experts.identity import ModuleIdentity, module_digest, module_identity, unique_digest
from rsrouter.experts.label_order import map_labels
from rsrouter.experts.loaders import LOADERS, Sources, load_expert
from rsrouter.experts.noisy_accuracy import NoisyCheck, check_expert
from rsrouter.experts.open_clip_models import ZeroShot
from rsrouter.experts.pool import ExpertPool
from rsrouter.experts.preprocessing import Normalise, Resize
from rsrouter.experts.probe import Probe
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.registry import architectures, build_architecture, register_architecture
from rsrouter.experts.schedule import Diffusion
from rsrouter.experts.select import Selection, select_experts
from rsrouter.experts.transformers_models import TransformersClassifier
from rsrouter.experts.wrap import Wrapped, wrap

__all__ = [
    "LOADERS",
    "NORMALISATIONS",
    "Denoiser",
    "Diffusion",
    "Ensemble",
    "Expert",
    "ExpertPool",
    "ModuleIdentity",
    "NoisyCheck",
    "Normalise",
    "Probe",
    "Provenance",
    "Resize",
    "Selection",
    "Sources",
    "TransformersClassifier",
    "Wrapped",
    "ZeroShot",
    "architectures",
    "at_sigmas",
    "build_architecture",
    "check_expert",
    "convert",
    "denoised",
    "ensemble",
    "load_denoiser",
    "load_expert",
    "map_labels",
    "module_digest",
    "module_identity",
    "register_architecture",
    "save_expert",
    "select_experts",
    "unique_digest",
    "wrap",
]
