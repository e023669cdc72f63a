"""The spec file: checkpoints to pin, in TOML or YAML.

A spec has one `[[expert]]` per expert; what several share stands under `[defaults]`:

    [defaults]
    architecture = "cifar_resnet110"
    normalisation = "cifar10"              # or mean = [...] and std = [...]; "none" for models that take raw pixels

    [[expert]]
    source = "models/noise_0.25/checkpoint.pth.tar"     # relative to the spec
    sigma = 0.25

    [[expert]]
    source = "hf-hub:org/smoothed-resnet@v1"             # pinned to the commit the tag means now
    sigma = [0.5, 1.0]                                   # one model, an expert at each

    [[expert]]
    source = "accurate.safetensors"                      # a network without noise: it answers where nothing is certified
    core = true

    [[expert]]
    kind = "ensemble"
    consensus = 2
    sigma = 0.5
    members = [{ source = "a.pth" }, { source = "b.pth" }, { source = "c.pth" }]

    [[expert]]
    kind = "denoised"
    sigma = [0.25, 0.5, 1.0]                             # one denoiser, one classifier, an expert at each
    denoiser = { source = "hf-hub:org/ddpm-cifar10" }    # a UNet of diffusers: its files say how it was trained
    classifier = { source = "clean.safetensors" }
    timestep = "first"                                   # or "nearest"

    [[expert]]
    kind = "denoised"
    name = "openai"
    sigma = 0.5
    classifier = { source = "clean.safetensors" }
    [expert.denoiser]
    source = "cifar10_uncond_50M_500K.pt"
    architecture = "openai_unet"                         # "dncnn": without diffusion
    kwargs = { image_size = 32, num_channels = 128, num_res_blocks = 3, learn_sigma = true }
    [expert.diffusion]
    schedule = "cosine"
    steps = 4000
    rescale_timesteps = true
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsrouter.core.errors import InputError
from rsrouter.experts.config import SETTINGS
from rsrouter.experts.denoiser_files import Denoiser, load_denoiser
from rsrouter.experts.denoising import at_sigmas, denoised
from rsrouter.experts.ensembles import ensemble
from rsrouter.experts.expert import Expert, check_sigma
from rsrouter.experts.loaders import load_expert
from rsrouter.experts.places import expanded, hub_name
from rsrouter.hub import Hub, is_hub_reference
from rsrouter.stored import read_bytes

SPEC_SUFFIXES = (".toml", ".yaml", ".yml")
KINDS = ("plain", "ensemble", "denoised")
_FETCH = ("source", "filename", "revision", "cache_dir", "local_files_only")  # a token does not belong in a file
_KEYS = {
    "plain": {*_FETCH, *SETTINGS, "kind"},
    "ensemble": {"kind", "name", "sigma", "consensus", "chunk", "members"},
    "denoised": {"kind", "name", "sigma", "denoiser", "classifier", "diffusion", "timestep", "input_shape"},
}

Spec = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a TOML or YAML spec.

    Raises:
        InputError: missing, or not readable.
    """
    file = Path(path)
    data = read_bytes(file, "The spec", remedy="check the path")
    try:
        text = data.decode()
        if file.suffix in {".yaml", ".yml"}:
            import yaml  # type: ignore[import-untyped]  # comes with huggingface_hub

            content = yaml.safe_load(text)
        else:
            content = tomllib.loads(text)
    except Exception as error:  # YAML readers raise what they like
        if isinstance(error, ImportError):
            raise InputError(
                "YAML is not readable here", expected="a .toml file", received=file.name, remedy="pip install pyyaml"
            ) from error
        raise InputError(
            f"{file.name} does not parse",
            expected="TOML or YAML",
            received=(str(error) or type(error).__name__).splitlines()[0],
            remedy="see the example in rsrouter.experts.spec",
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file.name} is not a spec",
            expected="[[expert]] tables",
            received=type(content).__name__,
            remedy="see the example in rsrouter.experts.spec",
        )
    return content


def experts_of_spec(spec: Spec, *, folder: str | os.PathLike[str] | None = None, hub: Hub | None = None) -> list[Expert]:
    """The pinned experts of a spec; revisions become commit hashes, files are hashed, and nothing is guessed.

    Args:
        spec: path of a spec, its content, or the list of its experts.
        folder: where relative paths count from; default the spec's folder, else the working directory.
        hub: how the Hub is read (token, cache, offline).

    Raises:
        InputError: unknown keys, or something that decides the votes is missing.
        CheckpointError, HubError, IntegrityError: as `load_expert`.
    """
    if isinstance(spec, str | os.PathLike):
        base = Path(folder or Path(spec).parent)
        content: Mapping[str, Any] = read_spec(spec)
    else:
        base = Path(folder or ".")
        content = spec if isinstance(spec, Mapping) else {"expert": list(spec)}
    if unknown := sorted(set(map(str, content)) - {"expert", "experts", "defaults"}):
        raise InputError(
            "Unknown tables in the spec", expected="expert, defaults", received=str(unknown), remedy="check the spelling"
        )
    entries = content.get("expert") or content.get("experts")
    defaults = content.get("defaults") or {}
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries) or not isinstance(defaults, Mapping):
        raise InputError(
            "The spec names no experts",
            expected="one [[expert]] table for each",
            received=str(sorted(content)),
            remedy="see the example in rsrouter.experts.spec",
        )
    return [expert for entry in entries for expert in _experts(entry, defaults, base, hub or Hub())]


def _experts(entry: Mapping[str, Any], defaults: Mapping[str, Any], base: Path, hub: Hub) -> list[Expert]:
    kind = entry.get("kind", "plain")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(
            "Unknown kind of expert", expected=f"one of {list(KINDS)}", received=repr(kind), remedy="check the spelling"
        )
    if unknown := sorted(set(map(str, entry)) - _KEYS[kind]):
        raise InputError(
            f"Unknown keys of a {kind} expert",
            expected=f"some of {sorted(_KEYS[kind])}",
            received=str(unknown),
            remedy="check the spelling",
        )
    sigmas = entry.get("sigma", defaults.get("sigma") if kind == "plain" and not entry.get("core") else None)
    several = sigmas if isinstance(sigmas, list) else [sigmas]
    if kind != "plain":
        several = [check_sigma(s, f"a {kind} expert") for s in several if s is not None]
    if not several:
        raise InputError(
            f"A {kind} expert needs its sigma",
            expected="sigma = 0.5, or a list",
            received=repr(sigmas),
            remedy="give the noise level it is to be used at",
        )
    name = entry.get("name")
    made: list[Expert] = []
    if kind == "plain":
        first = _load({**entry, **({} if several == [None] else {"sigma": several[0]})}, defaults, base, hub)
        made = [first] if len(several) == 1 else at_sigmas(first, several)
    elif kind == "ensemble":
        members = [
            _load({"sigma": several[0], **m, "name": f"member_{i}"}, defaults, base, hub)
            for i, m in enumerate(_tables(entry, "members"))
        ]
        one = ensemble(
            members,
            consensus=entry.get("consensus"),
            chunk=entry.get("chunk", 32),
            sigma=several[0],
            name=name or f"ensemble_{several[0]:g}",
        )
        made = [one] if len(several) == 1 else at_sigmas(one, several)
    else:
        parts = {key: dict(_tables(entry, key)[0]) for key in ("denoiser", "classifier")}
        network = _denoiser(
            {**parts["denoiser"], **({"diffusion": entry["diffusion"]} if "diffusion" in entry else {})}, base, hub
        )
        seen = {} if network.side is None else {"input_size": list(network.side)}  # what the denoiser returns
        settings = {"sigma": several[0], **seen, **parts["classifier"], "name": "classifier"}
        classifier = _load(settings, defaults, base, hub)
        made = [
            denoised(
                network,
                classifier,
                sigma=check_sigma(s, "a denoised expert"),
                timestep=entry.get("timestep"),
                input_shape=entry.get("input_shape"),
                name=f"{name or 'denoised'}_{s:g}" if name is None or len(several) > 1 else name,
            )
            for s in several
        ]
    return made


def _tables(entry: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = entry.get(key)
    tables = [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Mapping)]
    if not tables or (isinstance(value, list) and len(tables) != len(value)):
        raise InputError(
            f"A {entry.get('kind')} expert needs {key}",
            expected=f"{key} = {{ source = ... }}",
            received=repr(value),
            remedy="see the example in rsrouter.experts.spec",
        )
    return tables


def _source(entry: Mapping[str, Any], base: Path) -> str:
    source = entry.get("source")
    for key in ("filename", "revision", "cache_dir"):
        if not isinstance(entry.get(key), str | None):
            raise InputError(
                f"An expert's {key} is not usable", expected="text", received=repr(entry[key]), remedy="write it in quotes"
            )
    if not isinstance(source, str) or not source:
        raise InputError(
            "An expert has no source",
            expected="source = a path or hf-hub:org/name@revision",
            received=repr(source),
            remedy="say where its weights are",
        )
    source = hub_name(source, base)
    return source if is_hub_reference(source) else str(base / expanded(source))


def _load(entry: Mapping[str, Any], defaults: Mapping[str, Any], base: Path, hub: Hub) -> Expert:
    settings = dict(defaults)
    if {"mean", "std", "normalisation"} & entry.keys():
        for key in ("mean", "std", "normalisation"):
            settings.pop(key, None)
    if entry.get("core"):
        settings.pop("sigma", None)
    settings.update({k: v for k, v in entry.items() if k not in {"kind", "source"}})
    if unknown := sorted(set(map(str, settings)) - _KEYS["plain"]):
        raise InputError(
            "Unknown keys of an expert",
            expected=f"some of {sorted(_KEYS['plain'])}",
            received=str(unknown),
            remedy="check the spelling",
        )
    return load_expert(_source(entry, base), **_hub(hub, settings))


def _denoiser(entry: dict[str, Any], base: Path, hub: Hub) -> Denoiser:
    allowed = {*_FETCH, "architecture", "kwargs", "licence"}
    if unknown := sorted(set(map(str, entry)) - allowed - {"diffusion"}):
        raise InputError(
            "The denoiser's table does not fit",
            expected=f"some of {sorted(allowed)}",
            received=str(unknown),
            remedy="check the spelling; the diffusion's settings stand in a table of their own",
        )
    source = _source(entry, base)
    return load_denoiser(source, **_hub(hub, {k: v for k, v in entry.items() if k != "source"}))


def _hub(hub: Hub, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with how the Hub is read where they do not say it."""
    told = {"token": hub.token, "cache_dir": hub.cache_dir, "local_files_only": hub.local_files_only}
    return {**{key: value for key, value in told.items() if value}, **settings}
