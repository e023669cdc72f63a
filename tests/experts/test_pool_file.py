"""pool.json: pins that hold, weights held once, and every way they can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rsrouter.core.errors import CheckpointError, InputError, IntegrityError
from rsrouter.experts import Expert, ExpertPool, Provenance, load_expert
from rsrouter.experts.entries import expert_to_dict
from rsrouter.experts.places import ASSETS
from rsrouter.experts.provenance import Part
from rsrouter.experts.small_resnet import SmallResNet


def write_expert(folder: Path, sigma: float, seed: int = 0, **config: object) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    save_file(SmallResNet(width=8, blocks=((8, 2),)).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architecture": "small_resnet",
                "kwargs": {"width": 8, "blocks": [[8, 2]]},
                "sigma": sigma,
                "num_classes": 10,
                "input_shape": [1, 28, 28],
                "mean": [0.286],
                "std": [0.353],
                "licence": "Apache-2.0",
                **config,
            }
        )
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, sigma in enumerate((0.5, 0.25)):
        write_expert(tmp_path / "pool" / f"e{sigma}", sigma, i)
    ExpertPool([load_expert(tmp_path / "pool" / f"e{s}") for s in (0.5, 0.25)]).save(tmp_path / "pool")
    return tmp_path / "pool"


def test_round_trip_and_moved_folder(folder: Path, tmp_path: Path) -> None:
    pool = ExpertPool.load(folder)
    assert pool.sigmas == (0.25, 0.5)
    x = torch.rand(2, 1, 28, 28)
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    again = ExpertPool(moved / "pool.json")
    assert again.digest == pool.digest
    for a, b in zip(pool, again, strict=True):
        assert torch.equal(a.network()(x), b.network()(x))
        assert b.provenance is not None
        assert b.provenance.licence == "Apache-2.0"
    content = json.loads((moved / "pool.json").read_text())
    assert content["schema_version"] == 2
    assert [e["provenance"]["location"] for e in content["experts"]] == ["e0.25", "e0.5"]
    assert str(tmp_path) not in (moved / "pool.json").read_text()
    assert len(content["experts"][0]["provenance"]["sha256"]) == 64


def test_weights_are_held_once(folder: Path) -> None:
    first, second = ExpertPool.load(folder), ExpertPool.load(folder)
    assert first[0].module is second[0].module
    assert first[0].module is not first[1].module
    other_sigma = load_expert(folder / "e0.25", sigma=1.0, normalisation="none")
    assert other_sigma.module is first[0].module
    assert other_sigma.digest != first[0].digest


def test_lazy_pool_reads_nothing_until_asked(folder: Path) -> None:
    (folder / "e0.25" / "model.safetensors").unlink()
    pool = ExpertPool.load(folder, lazy=True)
    assert pool[1].module is not None
    with pytest.raises(CheckpointError, match="Cannot read"):
        _ = pool[0].module
    with pytest.raises(CheckpointError, match="Cannot read"):
        ExpertPool.load(folder)


@pytest.mark.parametrize("lazy", [True, False])
def test_same_size_corruption(folder: Path, lazy: bool) -> None:
    path = folder / "e0.25" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="pinned"):
        _ = ExpertPool.load(folder, lazy=lazy)[0].module


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (lambda c: c.update(schema_version=3), InputError, "upgrade"),
        (lambda c: c.pop("schema_version"), InputError, "schema"),
        (lambda c: c.update(schema_version=1), InputError, "unreleased version"),
        (lambda c: c.update(experts=[]), InputError, "needs experts"),
        (lambda c: c.update(experts=3), InputError, "experts: "),
        (lambda c: c["experts"][0].pop("sigma"), InputError, "sigma"),
        (lambda c: c["experts"][0].update(sigma=64), InputError, "/255"),
        (lambda c: c["experts"][0].update(sigma=0.3), IntegrityError, "digest"),
        (lambda c: c["experts"][0].update(mean=None, std=None), IntegrityError, "digest"),
        (lambda c: c["experts"][0].update(name="e/../1"), InputError, "name"),
        (lambda c: c["experts"][1].update(name=c["experts"][0]["name"]), InputError, "different names"),
        (lambda c: c["experts"][0].update(num_classes=9), IntegrityError, "digest"),
        (lambda c: c["experts"][0]["provenance"].pop("sha256"), InputError, "sha256"),
        (lambda c: c["experts"][0]["provenance"].update(sha256="0" * 64), IntegrityError, "pinned"),
        (lambda c: c["experts"][0]["provenance"].update(filename="../x.safetensors"), InputError, "outside"),
        (lambda c: c["experts"][0]["provenance"].update(filename="/etc/passwd"), InputError, "outside"),
        (lambda c: c["experts"][0]["provenance"].update(source="ftp"), InputError, "source"),
        (lambda c: c["experts"][0]["provenance"].update(loader="pickle"), InputError, "Unknown loader"),
        (lambda c: c["experts"][0]["provenance"].update(architecture="os.system"), IntegrityError, "digest"),
        (lambda c: c["experts"][0]["provenance"].update(source="bundled", location="../../x"), InputError, "outside"),
        (lambda c: c["experts"][0]["provenance"].update(source="hub", location="o/n", revision="main"), Exception, "pinned"),
    ],
)
def test_edited_pools(folder: Path, edit: object, error: type[Exception], match: str) -> None:
    content = json.loads((folder / "pool.json").read_text())
    edit(content)  # type: ignore[operator]
    (folder / "pool.json").write_text(json.dumps(content))
    with pytest.raises(error, match=match):
        ExpertPool.load(folder)


def test_unknown_keys_warn(folder: Path) -> None:
    content = json.loads((folder / "pool.json").read_text())
    content["experts"][0]["provenance"]["colour"] = "red"
    (folder / "pool.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="colour"):
        assert len(ExpertPool.load(folder)) == 2
    write_expert(folder / "new", 1.0, mood="good")
    with pytest.warns(UserWarning, match="mood"):
        load_expert(folder / "new")


def test_no_pool_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No pool"):
        ExpertPool.load(tmp_path)
    (tmp_path / "pool.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        ExpertPool(tmp_path)


def test_memory_experts_cannot_be_saved(tmp_path: Path) -> None:
    pool = ExpertPool([Expert(SmallResNet(), sigma=0.5, num_classes=10, input_shape=(1, 28, 28))])
    with pytest.raises(InputError, match="provenance"):
        pool.save(tmp_path)
    assert not (tmp_path / "pool.json").exists()


def test_pools_of_experts_that_differ() -> None:
    def make(**kwargs: object) -> Expert:
        settings = {"sigma": 0.5, "num_classes": 10, "input_shape": (1, 28, 28), "name": "a"}
        return Expert(torch.nn.Flatten(), **{**settings, **kwargs})  # type: ignore[arg-type]

    with pytest.raises(InputError, match="num_classes"):
        ExpertPool([make(), make(num_classes=9, name="b")])
    with pytest.raises(InputError, match="input_shape"):
        ExpertPool([make(), make(input_shape=(1, 32, 32), name="b")])
    with pytest.raises(InputError, match="different names"):
        ExpertPool([make(), make(sigma=1.0)])
    with pytest.raises(InputError, match="needs experts"):
        ExpertPool([])
    for odd in ([torch.nn.Identity()], torch.nn.Identity(), 3, [make(), "sigma_1"]):
        with pytest.raises(InputError, match="A pool is made of experts"):
            ExpertPool(odd)  # type: ignore[arg-type]


def test_bundled_experts_are_found_by_any_reader(tmp_path: Path) -> None:
    folders = sorted(p.parent for p in ASSETS.rglob("model.safetensors"))
    assert folders, "the package ships experts"
    expert = load_expert(folders[0])
    assert expert.provenance is not None
    assert expert.provenance.source == "bundled"
    assert not Path(expert.provenance.location).is_absolute()
    ExpertPool([expert]).save(tmp_path / "far" / "away.json")
    assert ExpertPool.load(tmp_path / "far" / "away.json").digest == ExpertPool([expert]).digest


def test_provenance_json_round_trip() -> None:
    inner = Provenance(
        source="local", location="a", filename="m.pt", sha256="0" * 64, loader="checkpoint", architecture="small_resnet"
    )
    part = Part(role="member", num_classes=10, mean=None, std=None, provenance=inner)
    outer = Provenance(
        source="composite",
        location="",
        filename="",
        loader="ensemble",
        architecture="ensemble",
        kwargs={"k": [1]},
        licence="mit",
        parts=(part,),
    )
    assert Provenance.from_dict(json.loads(json.dumps(outer.to_dict()))) == outer


def test_entry_is_json(folder: Path) -> None:
    entry = expert_to_dict(ExpertPool.load(folder)[0])
    assert json.loads(json.dumps(entry)) == entry
