"""Votes from networks: noise streams and the engine that turns requests into counts."""

from rsrouter.sampling.engine import Engine, VoteModel, image_identity
from rsrouter.sampling.execution import Execution, native_dtype, resolve_device
from rsrouter.sampling.memo import VoteMemo
from rsrouter.sampling.noise import CHUNK, GaussianNoise, SoundNoise, make_noise, stream_key

__all__ = [
    "CHUNK",
    "Engine",
    "Execution",
    "GaussianNoise",
    "SoundNoise",
    "VoteMemo",
    "VoteModel",
    "image_identity",
    "make_noise",
    "native_dtype",
    "resolve_device",
    "stream_key",
]
