"""Classifiers as transformers and open_clip write them, against those libraries' own answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsrouter import ExpertPool, FixedPlan, InputError, Smooth, load_expert
from rsrouter.core.errors import CheckpointError, IntegrityError
from rsrouter.experts import loaders
from rsrouter.experts.entries import expert_to_dict
from rsrouter.router.trunk import Trunk
from tests.helpers.library_models import KINDS, NAMES, open_clip_folder, transformers_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    folder = tmp_path_factory.mktemp("transformers")
    for kind in KINDS:
        transformers_folder(folder / kind, kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_processor_and_model(models: Path, kind: str, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForImageClassification.from_pretrained(models / kind).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(models / kind)
    for size in ((32, 32), (20, 28)):
        expert = load_expert(models / kind, sigma=0.25, input_size=size)
        assert (expert.input_shape, expert.labels) == ((3, *size), NAMES)
        x = torch.randn(2, 3, *size) * 0.3 + 0.5
        with torch.inference_mode():
            seen = processor(x, do_rescale=False, return_tensors="pt")["pixel_values"]
            assert torch.allclose(expert.network()(x), model(seen).logits, atol=1e-4)
            features, logits = Trunk(expert)(x)
            assert torch.allclose(logits, expert.network()(x), atol=1e-5)
        assert features.ndim == 2
    expert = load_expert(models / kind, sigma=0.25)
    assert len(Smooth(expert).certify(torch.rand(1, 3, 32, 32), FixedPlan(10, 100))) == 1  # its guards pass
    pool = ExpertPool([expert]).save(tmp_path / "pool.json")
    digest = expert.digest
    del expert
    loaders._MODULES.clear()
    again = ExpertPool.load(pool)[0]
    assert again.digest == digest
    again.check_unchanged()


def test_identity_is_that_of_the_files(models: Path, tmp_path: Path) -> None:
    first = load_expert(models / "vit", sigma=0.25)
    moved = transformers_folder(tmp_path / "vit", "vit")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "6.0"}))
    assert load_expert(moved, sigma=0.25).digest == first.digest
    (moved / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert load_expert(moved, sigma=0.25).digest != first.digest
    pool = ExpertPool([first]).save(tmp_path / "pool.json")
    entry = json.loads(pool.read_text())
    entry["experts"][0]["provenance"]["kwargs"]["config"]["layer_norm_eps"] = 1e-3
    pool.write_text(json.dumps(entry))
    with pytest.raises(IntegrityError):
        ExpertPool.load(pool)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoModelForImageClassification": "modeling.Own"}}, "its own code"),
        ({"architectures": ["ViTModel"]}, "not an image classifier"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_hidden_layers": 3}, "does not fit"),
        ({"image_size": 64}, "cannot load|does not fit|disagree"),
        ({"num_channels": 1}, "disagree"),
    ],
)
def test_configurations_that_are_refused(models: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    for name in ("model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(models / "vit" / name)
    config = json.loads((models / "vit" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=words):
        load_expert(tmp_path, sigma=0.25)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"height": 48, "width": 48}}, "disagree"),
        ({"rescale_factor": 1 / 127.5}, "another range"),
        ({"resample": 1}, "no counterpart"),
        ({"auto_map": {"AutoImageProcessor": "own.Own"}}, "its own code"),
        ({"image_processor_type": "NobodysProcessor"}, "cannot make"),
    ],
)
def test_processors_that_are_refused(models: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).symlink_to(models / "vit" / name)
    content = json.loads((models / "vit" / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=words):
        load_expert(tmp_path, sigma=0.25, input_size=(16, 16))


def test_pickles_and_what_is_missing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(models / "vit" / name)
    torch.save(load_file(models / "vit" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_expert(tmp_path, sigma=0.25)
    save_file(load_file(models / "vit" / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="normalisation"):
        load_expert(tmp_path, sigma=0.25)
    assert load_expert(tmp_path, sigma=0.25, normalisation="half").digest == load_expert(models / "vit", sigma=0.25).digest
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="needs transformers") as caught:
        load_expert(models / "vit", sigma=0.25)
    assert 'pip install "rsrouter[transformers]"' in caught.value.remedy


def test_zero_shot_is_open_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip", reason="the extra [open-clip] is not installed")
    folder = open_clip_folder(tmp_path / "clip")
    with pytest.raises(InputError, match="names of its classes"):
        load_expert(folder, sigma=0.25)
    with pytest.raises(InputError, match="no place for the class"):
        load_expert(folder, sigma=0.25, labels=NAMES, templates=("a photo",))
    expert = load_expert(folder, sigma=0.25, labels=NAMES)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, [lambda c: f"a photo of a {c}."], device="cpu")
    x = torch.rand(4, 3, 16, 16)
    with torch.inference_mode():
        ours = expert.network()(x)
        assert torch.allclose(
            ours, model.encode_image((x - 0.5) / 0.5, normalize=True) @ weights * model.logit_scale.exp(), atol=1e-4
        )
        assert torch.allclose(Trunk(expert)(x)[1], ours, atol=1e-6)
    with pytest.raises(InputError, match="lie nowhere yet"):
        expert_to_dict(expert)
    pool = ExpertPool([expert]).save(tmp_path / "pool" / "pool.json")
    assert [p.suffix for p in sorted(pool.parent.iterdir())] == [".safetensors", ".json"]
    digest = expert.digest
    del expert
    loaders._MODULES.clear()
    assert ExpertPool.load(pool)[0].digest == digest
    wide = load_expert(folder, sigma=0.25, labels=NAMES, input_size=(16, 24))
    assert wide.resize is not None
    assert (wide.resize.size, wide.resize.crop) == ((16, 24), (16, 16))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(CheckpointError, match="needs open_clip"):
        load_expert(folder, sigma=0.25, labels=NAMES)
