"""Experts from the Hub, through the real client against a server over real git repositories."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rsrouter.core.errors import CheckpointError, HubError, InputError, IntegrityError
from rsrouter.experts import ExpertPool, load_expert
from rsrouter.experts.cifar_resnet import CifarResNet
from rsrouter.hub import Hub, parse_reference, snapshot
from tests.helpers.hub_server import HubServer

SETTINGS = {
    "architecture": "cifar_resnet20",
    "sigma": 0.25,
    "num_classes": 10,
    "input_shape": [3, 32, 32],
    "mean": None,
    "std": None,
}


def weights(seed: int) -> bytes:
    torch.manual_seed(seed)
    return save(CifarResNet(depth=20).state_dict())


def repository(hub: HubServer, seed: int = 0, repo_id: str = "org/expert", **put: object) -> str:
    return hub.put(repo_id, {"config.json": json.dumps(SETTINGS), "model.safetensors": weights(seed)}, **put)  # type: ignore[arg-type]


def test_branch_tag_and_commit_are_one_expert(hub: HubServer) -> None:
    commit = repository(hub, tag="v1")
    experts = [load_expert(f"hf-hub:org/expert{at}") for at in ("", "@main", "@v1", f"@{commit}")]
    experts.append(load_expert("hf-hub:org/expert", revision="v1"))
    for expert in experts:
        assert expert.provenance is not None
        assert (expert.provenance.source, expert.provenance.revision) == ("hub", commit)
        assert expert.digest == experts[0].digest
        assert expert.module is experts[0].module  # the weights are held once


def test_pinned_pool_needs_no_request_and_survives_without_a_server(hub: HubServer, tmp_path: Path) -> None:
    repository(hub)
    pool = ExpertPool([load_expert("hf-hub:org/expert@main")])
    pool.save(tmp_path)
    digest = pool.digest
    del pool
    hub.requests.clear()
    assert ExpertPool.load(tmp_path).digest == digest
    assert hub.requests == []
    hub.stop()
    assert ExpertPool.load(tmp_path).digest == digest


def test_moved_branch_does_not_change_a_pinned_pool(hub: HubServer, tmp_path: Path) -> None:
    old = repository(hub, 0)
    pool = ExpertPool([load_expert("hf-hub:org/expert@main")])
    pool.save(tmp_path)
    new = repository(hub, 1)
    assert new != old
    again = ExpertPool.load(tmp_path)
    assert again.digest == pool.digest
    assert again[0].provenance is not None
    assert again[0].provenance.revision == old
    moved = load_expert("hf-hub:org/expert@main")
    assert moved.provenance is not None
    assert moved.provenance.revision == new
    assert moved.digest != pool[0].digest


def test_fresh_cache_fetches_the_pinned_commit(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub, 0)
    pool = ExpertPool([load_expert("hf-hub:org/expert@main")])
    pool.save(tmp_path)
    repository(hub, 1)
    hub.attach(monkeypatch, tmp_path / "other_cache")
    assert ExpertPool.load(tmp_path).digest == pool.digest


def test_offline_branch_from_the_cache(hub: HubServer) -> None:
    commit = repository(hub)
    load_expert("hf-hub:org/expert@main")
    hub.requests.clear()
    expert = load_expert("hf-hub:org/expert@main", local_files_only=True)
    assert hub.requests == []
    assert expert.provenance is not None
    assert expert.provenance.revision == commit


def test_other_process_with_endpoint_from_the_environment(hub: HubServer) -> None:
    commit = repository(hub)
    done = hub.run(
        "from rsrouter.experts import load_expert; print(load_expert('hf-hub:org/expert@main').provenance.revision)",
        PYTHONPATH=str(Path(__file__).resolve().parents[2]),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == commit


def test_legacy_file_of_a_repository(hub: HubServer, tmp_path: Path) -> None:
    torch.save({"net": CifarResNet(depth=20).state_dict(), "epoch": 440}, tmp_path / "440.pth")
    hub.put("org/macer", {"440.pth": (tmp_path / "440.pth").read_bytes()})
    with pytest.raises(HubError, match="filename="):
        load_expert("hf-hub:org/macer", architecture="cifar_resnet20", sigma=0.25, normalisation="none")
    expert = load_expert("hf-hub:org/macer", filename="440.pth", architecture="cifar_resnet20", sigma=0.25, normalisation="none")
    assert expert.provenance is not None
    assert expert.provenance.filename == "440.pth"


def test_absent_config_is_remembered(hub: HubServer) -> None:
    commit = hub.put("org/bare", {"model.safetensors": weights(0)})
    settings = {"architecture": "cifar_resnet20", "sigma": 0.25, "normalisation": "none"}
    load_expert(f"hf-hub:org/bare@{commit}", **settings)
    hub.requests.clear()
    load_expert(f"hf-hub:org/bare@{commit}", **settings)
    assert hub.requests == []


def test_timm_repository(hub: HubServer) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=5, pretrained=False)
    config = {
        "architecture": "resnet18",
        "num_classes": 5,
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "license": "apache-2.0"},
    }
    hub.put("timm/resnet18.tests", {"config.json": json.dumps(config), "model.safetensors": save(model.state_dict())})
    expert = load_expert("hf-hub:timm/resnet18.tests", sigma=0.5)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(expert.network()(x), model.eval()((x - 0.5) / 0.5), rtol=1e-4, atol=1e-4)
    assert expert.provenance is not None
    assert expert.provenance.licence == "apache-2.0"


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_missing_gated_private_and_bad_revision(hub: HubServer) -> None:
    repository(hub)
    repository(hub, repo_id="org/gated")
    hub.gated.add("org/gated")
    repository(hub, repo_id="org/private")
    hub.private.add("org/private")
    for reference, match, remedy in (
        ("hf-hub:org/none", "does not exist, or is private", "spelling"),
        ("hf-hub:org/gated", "gated", "ask for access"),
        ("hf-hub:org/private", "does not exist, or is private", "token"),
        ("hf-hub:org/expert@v9", "no revision 'v9'", "branches"),
        (f"hf-hub:org/expert@{'0' * 40}", "no revision '000", "branches"),
        ("hf-hub:expert", "not a Hub repository", "write"),
        ("hf-hub:org/expert@", "not a Hub repository", "write"),
    ):
        with pytest.raises(HubError, match=match) as caught:
            load_expert(reference)
        assert remedy in caught.value.remedy
    with pytest.raises(HubError, match="Two revisions"):
        load_expert("hf-hub:org/expert@v1", revision="v2")


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = repository(hub)
    hub.stop()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # the client retries for 23 s
    for at in ("main", commit):
        with pytest.raises(HubError) as caught:
            load_expert(f"hf-hub:org/expert@{at}")
        assert "network" in caught.value.remedy or "connect" in caught.value.remedy


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        ("corrupt", IntegrityError, "damaged"),
        ("truncate", HubError, "incomplete"),
        (503, HubError, "503"),
        (403, HubError, "403"),
    ],
)
def test_faults_while_fetching_weights(hub: HubServer, fault: int | str, error: type[Exception], match: str) -> None:
    repository(hub)
    hub.fault("GET", r"resolve/.*model\.safetensors", fault)
    with pytest.raises(error, match=match) as caught:
        load_expert("hf-hub:org/expert")
    assert caught.value.remedy  # type: ignore[attr-defined]


def test_corrupted_config_is_noticed(hub: HubServer) -> None:
    """A small file is no LFS file: its checksum is git's blob id."""
    repository(hub)
    hub.fault("GET", r"resolve/.*config\.json", "corrupt")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        load_expert("hf-hub:org/expert")


def test_dropped_connection_is_resumed_by_the_client(hub: HubServer) -> None:
    repository(hub)
    hub.fault("GET", r"resolve/.*model\.safetensors", "cut")
    assert load_expert("hf-hub:org/expert").sigma == 0.25


def test_cache_damaged_afterwards(hub: HubServer, tmp_path: Path) -> None:
    repository(hub)
    expert = load_expert("hf-hub:org/expert")
    ExpertPool([expert]).save(tmp_path)
    assert expert.provenance is not None
    path = Hub().fetch_pinned("org/expert", "model.safetensors", expert.provenance.revision)
    del expert
    blob = Path(os.path.realpath(path))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(IntegrityError, match="damaged") as caught:
        ExpertPool.load(tmp_path)
    assert "delete" in caught.value.remedy


def test_config_of_somebody_else(hub: HubServer) -> None:
    hub.put("org/evil", {"config.json": json.dumps({**SETTINGS, "architecture": "os.system"}), "model.safetensors": weights(0)})
    with pytest.raises(CheckpointError, match="Unknown architecture"):
        load_expert("hf-hub:org/evil")
    with pytest.raises(InputError, match="outside its folder"):
        load_expert("hf-hub:org/evil", filename="../../x.safetensors")
    hub.put("org/evil", {"config.json": "[1]"})
    with pytest.raises(CheckpointError, match="JSON object"):
        load_expert("hf-hub:org/evil")


def test_snapshot_and_references(hub: HubServer) -> None:
    commit = repository(hub, tag="v1")
    folder = snapshot("org/expert", "v1", allow=["*.json"])
    assert sorted(p.name for p in folder.iterdir()) == ["config.json"]
    hub.requests.clear()
    assert snapshot("org/expert", commit, allow=["*.json"]) == folder
    assert hub.requests == []
    assert Hub().files(Hub().reference("org/expert@v1")) == ["config.json", "model.safetensors"]
    assert parse_reference("hf-hub:a/b@c") == ("a/b", "c")
    with pytest.raises(HubError, match="40 hex"):
        Hub().fetch_pinned("org/expert", "config.json", "main")
