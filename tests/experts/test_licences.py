"""Licences of weights: as the model card's metadata say where nobody says otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from rsrouter.experts import build_architecture, denoised, load_denoiser, load_expert
from tests.helpers.hub_server import HubServer

KWARGS = {"in_channels": 3, "width": 4, "blocks": [[4, 2]]}
CONFIG = {"architecture": "small_resnet", "kwargs": KWARGS, "num_classes": 3, "input_shape": [3, 8, 8], "mean": [0.5] * 3}
DIFFUSION = {"schedule": "linear", "steps": 1000}


def files(card: str | None = None, **more: object) -> dict[str, bytes]:
    torch.manual_seed(0)
    config = {**CONFIG, "std": [0.25] * 3, "sigma": 0.5, **more}
    weights = save(build_architecture("small_resnet", 3, KWARGS).state_dict())
    found = {"config.json": json.dumps(config).encode(), "model.safetensors": weights}
    return found if card is None else {**found, "README.md": card.encode()}


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("# A model\n", None),
        ("---\nlicense: cc-by-nc-4.0\n---\n# A model\n", "cc-by-nc-4.0"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit AND apache-2.0"),
        ("---\nlicense: other\nlicense_name: research-only\n---\n", "research-only"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [\n---\n", None),
        ("---\nlicense: " + "x" * 2000 + "\n---\n", None),
    ],
)
def test_the_card_says_the_licence(tmp_path: Path, card: str | None, licence: str | None) -> None:
    for name, data in files(card).items():
        (tmp_path / name).write_bytes(data)
    expert = load_expert(tmp_path)
    assert expert.provenance is not None
    assert expert.provenance.licence == licence


def test_who_says_so_goes_before_the_card(hub: HubServer) -> None:
    card = "---\nlicense: cc-by-nc-4.0\n---\n"
    hub.put("org/card", files(card))
    hub.put("org/config", files(card, licence="mit"))
    found = [load_expert("hf-hub:org/card"), load_expert("hf-hub:org/card", licence="gpl-3.0"), load_expert("hf-hub:org/config")]
    assert [e.provenance.licence for e in found if e.provenance] == ["cc-by-nc-4.0", "gpl-3.0", "mit"]
    assert len({e.digest for e in found}) == 1


def test_a_denoiser_and_what_stands_on_it(hub: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"d.safetensors": save(build_architecture("small_unet", None, {"width": 8, "image_channels": 3}).state_dict())}
    hub.put("org/denoiser", {**weights, "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    told = {"architecture": "small_unet", "kwargs": {"width": 8, "image_channels": 3}, "diffusion": DIFFUSION}
    found = load_denoiser("hf-hub:org/denoiser", filename="d.safetensors", **told)
    assert found.provenance is not None
    assert found.provenance.licence == "cc-by-nc-4.0"
    hub.put("org/classifier", files("---\nlicense: mit\n---\n"))
    expert = denoised(found, load_expert("hf-hub:org/classifier"), sigma=0.5)
    assert expert.provenance is not None
    assert expert.provenance.licence == "cc-by-nc-4.0 AND mit"
    # a file that is named alone: the card beside it may be about another
    save_file(build_architecture("small_unet", None, told["kwargs"]).state_dict(), tmp_path / "d.safetensors")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    alone = load_denoiser(tmp_path / "d.safetensors", **told)
    assert alone.provenance is not None
    assert alone.provenance.licence is None
