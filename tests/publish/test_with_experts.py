"""One verb takes a router and its experts to the Hub; a second run sends nothing twice."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rsrouter import (
    CascadeRouter,
    CheckpointError,
    Expert,
    ExpertPool,
    HubError,
    InputError,
    ResultsError,
    RoutedSmooth,
    load_expert,
)
from rsrouter.core.errors import IntegrityError
from rsrouter.experts import Diffusion, denoised, loaders
from rsrouter.experts.denoiser_files import load_denoiser
from rsrouter.experts.registry import build_architecture, register_architecture
from rsrouter.jobs import certify_table
from rsrouter.publish import publish
from rsrouter.publish.anew import load_anew
from rsrouter.results import read_table
from rsrouter.serialise import CONFIG
from tests.helpers import small_router as small
from tests.helpers.hub_server import HubServer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    small.run_folder(small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.usefixtures("real_load")
def test_experts_router_and_certificates_in_one_verb(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = RoutedSmooth.from_pretrained(run / "router").digest
    done = publish(run, "org/router", with_experts="org/expert")
    assert [(e.repo_id, e.sent) for e in done.experts] == [("org/expert-sigma_0.25", True), ("org/expert-sigma_0.5", True)]
    for expert in done.experts:
        assert expert.commit == hub.head(expert.repo_id)
        assert {"model.safetensors", "config.json", "README.md"} <= set(hub.files(expert.repo_id))
    loaded = RoutedSmooth.from_pretrained("org/router", cache_dir=tmp_path / "empty")
    assert loaded.digest == before
    assert {e.provenance.source for e in loaded.pool} == {"hub"}
    assert b"org/expert-sigma_0.25" in hub.files("org/router")["README.md"]
    # the folder stays as it was, and every expert stands by itself
    assert json.loads((run / "router" / CONFIG).read_text())["pool"]["experts"][0]["provenance"]["source"] == "local"
    assert load_expert("hf-hub:org/expert-sigma_0.5").digest == loaded.pool["sigma_0.5"].digest
    monkeypatch.setattr("rsrouter.publish.commit.load_anew", lambda *_, **__: None)
    again = publish(run, "org/router", with_experts="org/expert")
    assert [(e.commit, e.sent) for e in again.experts] == [(e.commit, False) for e in done.experts]


def test_a_run_that_was_stopped_is_resumed(hub: HubServer, run: Path) -> None:
    hub.fault("POST", r"expert-sigma_0\.5/commit/", 503, times=None)
    with pytest.raises(HubError):
        publish(run, "org/router", with_experts="org/expert")
    first = hub.head("org/expert-sigma_0.25")
    with pytest.raises(HubError):
        RoutedSmooth.from_pretrained("org/router")
    hub._faults.clear()
    hub.requests.clear()
    done = publish(run, "org/router", with_experts="org/expert")
    assert [e.sent for e in done.experts] == [False, True]
    assert hub.head("org/expert-sigma_0.25") == first
    assert not any(method == "POST" and "sigma_0.25/commit" in path for method, path in hub.requests)


def test_nothing_goes_up_for_a_router_that_is_refused(hub: HubServer, run: Path) -> None:
    lines = (run / "certificates.tsv").read_text().splitlines(keepends=True)
    (run / "certificates.tsv").write_text("".join(lines[:-3]))
    with pytest.raises(ResultsError, match="unfinished") as caught:
        publish(run, "org/router", with_experts="org/expert")
    assert caught.value.received == "9 of 12"
    assert not any(method == "POST" for method, _ in hub.requests)
    with pytest.raises(InputError, match="place on the Hub"):
        publish(run / "router", "org/router", with_experts="nowhere")


def test_a_dry_run_names_the_repositories(hub: HubServer, run: Path) -> None:
    shown = publish(run, "org/router", with_experts="org/expert", dry_run=True)
    assert not any(method == "POST" for method, _ in hub.requests)
    assert [(e.repo_id, e.commit, e.sent) for e in shown.experts] == [
        ("org/expert-sigma_0.25", None, False),
        ("org/expert-sigma_0.5", None, False),
    ]
    assert shown.refused is None


def test_parts_of_composite_experts_are_put_up_once(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name, module in (("unet", build_architecture("small_unet", None)), ("net", build_architecture("small_resnet", 3))):
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    denoiser = load_denoiser(tmp_path / "unet.safetensors", architecture="small_unet")
    settings = {"architecture": "small_resnet", "num_classes": 3, "input_shape": (1, 8, 8), "normalisation": "half_gray"}
    classifier = load_expert(tmp_path / "net.safetensors", sigma=0.25, **settings)
    experts = [denoised(denoiser, classifier, sigma=s, diffusion=Diffusion(), name=f"d_{s:g}") for s in (0.25, 0.5)]
    folder = RoutedSmooth(ExpertPool(experts), CascadeRouter((0.6,))).save_pretrained(tmp_path / "router")
    done = publish(folder, "org/router", with_experts="org/part")
    assert [e.repo_id for e in done.experts] == ["org/part-d_0.25-denoiser", "org/part-d_0.25-classifier"]
    monkeypatch.setattr(loaders, "_MODULES", {})
    loaded = RoutedSmooth.from_pretrained("org/router", cache_dir=tmp_path / "empty")
    assert [e.digest for e in loaded.pool] == [e.digest for e in experts]


def test_shards_and_false_roles_are_refused(run: Path) -> None:
    router = RoutedSmooth.from_pretrained(run / "router")
    part = run / "part.tsv"
    certify_table(router, small.images(), part, small.PLAN, shard=(0, 2))
    with pytest.raises(ResultsError, match="a part of its job"):
        publish(run, "org/router", certificates=part, dry_run=True, with_experts="org/expert")
    content = json.loads((run / "certificates.json").read_text())
    (run / "certificates.json").write_text(json.dumps({**content, "role": "expert"}))
    assert read_table(run / "certificates.tsv").described().role == "expert"
    with pytest.raises(IntegrityError, match="role: expert in the table, routed in the router"):
        publish(run, "org/router", dry_run=True, with_experts="org/expert")


@pytest.mark.usefixtures("this_process")
def test_a_fresh_process_says_what_it_lacks(run: Path) -> None:
    digest = RoutedSmooth.from_pretrained(run / "router").digest
    folder = run / "router"
    with pytest.raises(IntegrityError, match="not load this router as the same"):
        load_anew(folder, "0" * 64, allow_local=True)
    with pytest.raises(IntegrityError, match=r"A fresh process cannot load this router: .*not pinned"):
        load_anew(folder, digest)
    with pytest.raises(CheckpointError, match=r"cannot be made"):
        load_anew(folder, digest, allow_local=True, imports=["no_such_module_anywhere"])


def test_networks_that_no_package_builds_are_refused(tmp_path: Path) -> None:
    def build(num_classes: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, num_classes))

    build.__module__ = "loose_nets"
    register_architecture("loose_net", build)
    save_file(build(3).state_dict(), tmp_path / "w.safetensors")
    expert = load_expert(
        tmp_path / "w.safetensors",
        architecture="loose_net",
        sigma=0.5,
        num_classes=3,
        input_shape=small.SHAPE,
        normalisation="none",
    )
    folder = RoutedSmooth(ExpertPool([expert, small.expert(0.25)]), CascadeRouter((0.6,))).save_pretrained(tmp_path / "router")
    with pytest.raises(InputError, match="nobody else could build") as caught:
        publish(folder, "org/router", dry_run=True, with_experts="org/expert")
    assert "loose_nets" in caught.value.received


def test_a_slow_hub_ends_with_words(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers import hub_server

    keep = hub_server._Handler.commit

    def slow(self, id: str, rev: str, type: str = "model") -> None:
        time.sleep(3)
        keep(self, id, rev, type)

    publish(run, "org/router", with_experts="org/expert")
    monkeypatch.setattr(hub_server._Handler, "commit", slow)
    monkeypatch.setattr("rsrouter.publish.commit.PATIENCE", 1.0)
    started = time.monotonic()
    with pytest.raises(HubError, match="did not finish the publication in time"):
        publish(run, "org/router", with_experts="org/expert")
    assert time.monotonic() - started < 60
    for thread in [t for t in threading.enumerate() if t.name.startswith("rsrouter: ")]:
        thread.join()


def test_a_core_goes_up_as_experts_do_and_the_card_keeps_it_apart(hub: HubServer, tmp_path: Path) -> None:
    core = small.expert(0.25, tilt=0.02)
    core = Expert(core.module, core=True, num_classes=small.CLASSES, input_shape=small.SHAPE, name="accurate")
    made = RoutedSmooth(ExpertPool([small.expert(0.25), small.expert(0.5), core]), CascadeRouter((0.8, 0.9)))
    table = small.run_folder(made, tmp_path / "run")
    done = publish(tmp_path / "run", "org/router", with_experts="org/part")
    assert "org/part-accurate" in [e.repo_id for e in done.experts]
    loaded = RoutedSmooth.from_pretrained("org/router", cache_dir=tmp_path / "empty")
    assert loaded.core is not None
    assert loaded.core.expert.digest == core.digest
    assert loaded.core.expert.provenance.source == "hub"
    readme = hub.files("org/router")["README.md"].decode()
    assert f"natural accuracy {100 * table.natural.mean():.1f}%" in readme
    assert "None of it counts in the table above" in readme
    assert "2204.00487" in readme
    index = readme.partition("model-index")[2].partition("---\n\n")[0]
    assert "natural" not in index
    assert f"value: {100 * table.correct.mean():.1f}" in index
    assert "without a certificate" in hub.files("org/part-accurate")["README.md"].decode()
    with pytest.raises(InputError, match="core"):
        load_expert("hf-hub:org/part-accurate", sigma=0.5)
    other = tmp_path / "run" / "certificates.json"
    told = json.loads(other.read_text())
    told["core"]["digest"] = "0" * 64
    other.write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match="core"):
        publish(tmp_path / "run", "org/router", with_experts="org/part")
