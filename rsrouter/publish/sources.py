"""Citations for cards: the paper behind each part of a routed classifier, as a sentence and as BibTeX."""

from __future__ import annotations

from collections.abc import Iterable

from rsrouter.experts.provenance import Provenance

#: key -> what it is the source of, how it is cited, BibTeX
PAPERS: dict[str, tuple[str, str, str]] = {
    "cohen2019": (
        "Randomized smoothing",
        "Cohen, Rosenfeld and Kolter 2019, arXiv:1902.02918",
        "@inproceedings{cohen2019, title={Certified Adversarial Robustness via Randomized Smoothing}, "
        "author={Cohen, Jeremy and Rosenfeld, Elan and Kolter, J. Zico}, booktitle={ICML}, year={2019}}",
    ),
    "sun2025": (
        "Routing between noise levels by one smoothed vote",
        "Sun, Mao and Vechev 2025 (Dual Randomized Smoothing), arXiv:2512.01782",
        "@article{sun2025, title={Dual Randomized Smoothing: Beyond Global Noise Variance}, "
        "author={Sun, Chenhao and Mao, Yuhao and Vechev, Martin}, journal={arXiv:2512.01782}, year={2025}}",
    ),
    "jeong2023": (
        "Cascades of noise levels",
        "Jeong and Shin 2023 (Multiscale), arXiv:2310.16779",
        "@inproceedings{jeong2023, title={Multi-scale Diffusion Denoised Smoothing}, "
        "author={Jeong, Jongheon and Shin, Jinwoo}, booktitle={NeurIPS}, year={2023}}",
    ),
    "carlini2023": (
        "Experts made of a diffusion model and a classifier",
        "Carlini et al. 2023, arXiv:2206.10550",
        "@inproceedings{carlini2023, title={(Certified!!) Adversarial Robustness for Free!}, author={Carlini, Nicholas and "
        "Tram{\\`e}r, Florian and Dvijotham, Krishnamurthy and Rice, Leslie and Sun, Mingjie and Kolter, J. Zico}, "
        "booktitle={ICLR}, year={2023}}",
    ),
    "salman2020": (
        "Experts made of a denoiser and a classifier",
        "Salman et al. 2020 (Denoised Smoothing), arXiv:2003.01908",
        "@inproceedings{salman2020, title={Denoised Smoothing: A Provable Defense for Pretrained Classifiers}, author={Salman, "
        "Hadi and Sun, Mingjie and Yang, Greg and Kapoor, Ashish and Kolter, J. Zico}, booktitle={NeurIPS}, year={2020}}",
    ),
    "nichol2021": (
        "The denoiser's network",
        "Nichol and Dhariwal 2021 (improved-diffusion), arXiv:2102.09672",
        "@inproceedings{nichol2021, title={Improved Denoising Diffusion Probabilistic Models}, "
        "author={Nichol, Alexander Quinn and Dhariwal, Prafulla}, booktitle={ICML}, year={2021}}",
    ),
    "dhariwal2021": (
        "The denoiser's network",
        "Dhariwal and Nichol 2021 (guided-diffusion), arXiv:2105.05233",
        "@inproceedings{dhariwal2021, title={Diffusion Models Beat {GAN}s on Image Synthesis}, "
        "author={Dhariwal, Prafulla and Nichol, Alexander Quinn}, booktitle={NeurIPS}, year={2021}}",
    ),
    "horvath2022": (
        "Experts that are ensembles",
        "Horváth et al. 2022, arXiv:2106.06946",
        "@inproceedings{horvath2022, title={Boosting Randomized Smoothing with Variance Reduced Classifiers}, author={"
        "Horv{\\'a}th, Mikl{\\'o}s Z. and M{\\\"u}ller, Mark Niklas and Fischer, Marc and Vechev, Martin}, booktitle={ICLR}, "
        "year={2022}}",
    ),
    "horvath2022b": (
        "An uncertified core network where nothing is certified",
        "Horváth et al. 2022 (ACES), arXiv:2204.00487",
        "@article{horvath2022b, title={Robust and Accurate - Compositional Architectures for Randomized Smoothing}, author={"
        "Horv{\\'a}th, Mikl{\\'o}s Z. and M{\\\"u}ller, Mark Niklas and Fischer, Marc and Vechev, Martin}, "
        "journal={arXiv:2204.00487}, year={2022}}",
    ),
    "voracek2023": (
        "Noise that is exact in floating point",
        "Voráček and Hein 2023, arXiv:2207.07209",
        "@inproceedings{voracek2023, title={Sound Randomized Smoothing in Floating-Point Arithmetic}, "
        "author={Vor{\\'a}{\\v c}ek, V{\\'a}clav and Hein, Matthias}, booktitle={ICLR}, year={2023}}",
    ),
}
OWN = "@software{rsrouter, title={rsrouter: routing between randomized-smoothing experts}, author={{The rsrouter authors}}}"


def cited(router_kind: str, noise: str, experts: Iterable[Provenance]) -> list[str]:
    """Keys of the papers behind a router of this kind over these experts.

    >>> cited("cascade", "gaussian", [])
    ['cohen2019', 'jeong2023']
    """
    keys = ["cohen2019", "sun2025" if router_kind == "flat" else "jeong2023"]
    for expert in experts:
        if expert.loader == "denoised":
            keys.append("carlini2023" if expert.kwargs.get("diffusion") else "salman2020")
            keys += [_network(part.provenance) for part in expert.parts if part.provenance.architecture == "openai_unet"]
        if expert.loader == "ensemble":
            keys.append("horvath2022")
    return list(dict.fromkeys([*keys, *(["voracek2023"] if noise.startswith("sound") else [])]))


def _network(denoiser: Provenance) -> str:
    """Which of OpenAI's two repositories a UNet is of: guided-diffusion's networks resample in residual blocks."""
    return "dhariwal2021" if denoiser.kwargs.get("resblock_updown") else "nichol2021"


__all__ = ["OWN", "PAPERS", "cited"]
