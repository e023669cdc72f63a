"""Arguments and words that users of the Hub's other libraries expect."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from rsrouter import ExpertPool, FixedPlan, HubError, RoutedSmooth
from tests.helpers import small_router as small
from tests.helpers.hub_server import HubServer


@pytest.fixture
def pool(hub: HubServer, tmp_path: Path) -> ExpertPool:
    return small.put_experts(hub, tmp_path)


def test_branches_messages_and_where_a_router_is_loaded_from(hub: HubServer, pool: ExpertPool, tmp_path: Path) -> None:
    router = small.routed(pool)
    first = router.push_to_hub("org/router", commit_message="The first router")
    HfApi(token="hf_test").create_branch("org/router", branch="dev")
    second = router.push_to_hub("org/router", commit_message="On a branch", revision="dev", certificates=None)
    assert hub.head("org/router") == first.commit
    assert hub.head("org/router", "dev") == second.commit
    log = hub.repo("org/router", "model").git("log", "--format=%s", "dev")
    assert (log if isinstance(log, str) else log.decode()).split("\n")[:2] == ["On a branch", "The first router"]
    names = list(inspect.signature(RoutedSmooth.from_pretrained).parameters)
    hubs = {"revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "device", "execution"}
    assert names[0] == "pretrained_model_name_or_path"
    assert set(names[1:]) == hubs
    cache = tmp_path / "cache"
    for revision in ("dev", "main", str(first.commit)):
        assert (
            RoutedSmooth.from_pretrained("org/router", revision=revision, cache_dir=cache, token="hf_test").digest
            == router.digest
        )
    hub.requests.clear()
    offline = {"revision": str(first.commit), "cache_dir": cache, "local_files_only": True}
    assert RoutedSmooth.from_pretrained("org/router", **offline).digest == router.digest
    assert hub.requests == []
    RoutedSmooth.from_pretrained("org/router", revision=str(first.commit), cache_dir=cache, force_download=True)
    assert any("router.safetensors" in str(request) for request in hub.requests)
    with pytest.raises(HubError):
        RoutedSmooth.from_pretrained("org/router", cache_dir=tmp_path / "empty", local_files_only=True)
    router.save_pretrained(tmp_path / "several" / "one")
    assert RoutedSmooth.from_pretrained(tmp_path / "several", subfolder="one").digest == router.digest


def test_what_is_printed(pool: ExpertPool) -> None:
    router = small.routed(pool)
    certificates = router.certify(small.images().tensors()[0], FixedPlan(20, 200))
    assert any(c.predict >= 0 for c in certificates)
    for text in (str(router), repr(router), *map(str, certificates)):
        assert "\n" not in text
    for certificate in certificates:
        if certificate.predict >= 0:
            shown = str(certificate)
            assert shown.startswith(f"class {certificate.predict} within L2 radius ")
            assert float(shown.split("radius ")[1].split()[0].rstrip(",")) <= certificate.radius
        else:
            assert str(certificate).startswith("abstains after ")
    lines = router.describe().splitlines()
    assert len(lines) > len(pool)
    assert all(any(expert.name in line for line in lines) for expert in pool)
