"""The networks of an expert, in words: for cards and terminals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rsrouter.experts.expert import Expert
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.schedule import make_diffusion


def parts_of(provenance: Provenance, sigma: float, role: str = "") -> Iterator[tuple[str, Provenance]]:
    """Every weight file with what it is in an expert of that sigma: `"denoiser, t = 259 of 1000 (...)"`, `"classifier"`."""
    if provenance.source != "composite":
        yield role, provenance
        return
    for part in provenance.parts:
        words, told = part.role, provenance.kwargs.get("diffusion")
        if part.role == "denoiser" and told:
            words = f"denoiser, {make_diffusion(told).words(sigma)}"
        yield from parts_of(part.provenance, sigma, words)


def composed(experts: Iterable[Expert]) -> list[str]:
    """One line for each expert that is made of several networks."""
    return [
        f"{e.name}: " + "; ".join(f"{role}: {p.architecture}" for role, p in parts_of(e.provenance, e.sigma))
        for e in experts
        if e.provenance is not None and e.provenance.source == "composite"
    ]


__all__ = ["composed", "parts_of"]
