"""Publishing and loading back through the real huggingface_hub client, against a Hub on loopback."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rsrouter import ExpertPool, FixedPlan, HubError, InputError, IntegrityError, ResultsError, RoutedSmooth, Smooth
from rsrouter.cli import main
from rsrouter.experts import loaders
from rsrouter.jobs import certify_table
from rsrouter.publish import publish
from rsrouter.serialise import CONFIG, WEIGHTS, store_execution
from tests.helpers import small_router as small
from tests.helpers.hub_server import HubServer


class _NoSharing(dict):
    """Weights that are in memory already are not fetched again; here every load must come from the Hub."""

    def get(self, key, default=None):
        return default


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_MODULES", _NoSharing())
    # no pauses between the client's retries
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


@pytest.fixture
def pool(hub: HubServer, tmp_path: Path) -> ExpertPool:
    return small.put_experts(hub, tmp_path)


@pytest.fixture
def run(pool: ExpertPool, tmp_path: Path) -> Path:
    small.run_folder(small.routed(pool), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.usefixtures("real_figure")
def test_published_and_loaded_back(hub: HubServer, pool: ExpertPool, run: Path, tmp_path: Path) -> None:
    done = publish(run, "org/router")
    assert done.commit == hub.head("org/router")
    assert done.parent != done.commit
    stored = hub.files("org/router")
    assert sorted(f.path for f in done.files) == [
        "README.md",
        "certificates/certificates.json",
        "certificates/certificates.tsv",
        "certificates/curve.svg",
        CONFIG,
        WEIGHTS,
    ]
    assert set(stored) == {f.path for f in done.files} | {".gitattributes"}
    assert b"<svg" in stored["certificates/curve.svg"]
    assert len(stored["certificates/curve.svg"]) > 5000
    assert stored["certificates/certificates.tsv"] == (run / "certificates.tsv").read_bytes()
    # an empty cache, and a hash: the same certificates, byte for byte
    before = small.run_folder(small.routed(pool), tmp_path / "before")
    loaded = RoutedSmooth.from_pretrained("org/router", revision=done.commit, cache_dir=tmp_path / "empty")
    assert {p.name for p in (tmp_path / "empty").glob("models--*")} == {
        "models--org--router",
        "models--lab--sigma-0.25",
        "models--lab--sigma-0.5",
    }
    after = small.run_folder(loaded, tmp_path / "after")
    cut = [[line.split("\t")[:5] + line.split("\t")[6:] for line in t.path.read_text().splitlines()] for t in (before, after)]
    assert cut[0] == cut[1]
    # a warm cache at a hash needs no network
    hub.requests.clear()
    again = RoutedSmooth.from_pretrained("org/router", revision=done.commit, cache_dir=tmp_path / "empty", local_files_only=True)
    assert hub.requests == []
    assert again.digest == loaded.digest


def test_a_dry_run_sends_nothing_and_shows_everything(hub: HubServer, run: Path) -> None:
    hub.requests.clear()
    shown = publish(run, "org/router", dry_run=True)
    assert [r for r in hub.requests if r[0] != "HEAD"] == []
    assert shown.commit is None
    sent = publish(run, "org/router")
    assert shown.files == sent.files
    assert shown.card.encode() == hub.files("org/router")["README.md"]


def test_push_to_hub_and_pull_request(hub: HubServer, pool: ExpertPool, run: Path) -> None:
    router = small.routed(pool)
    hub.tokens = {"hf_test"}
    first = router.push_to_hub("org/router", private=True)
    assert hub.private == {"org/router"}
    hub.private.clear()
    assert "nothing is claimed" in hub.files("org/router")["README.md"].decode()
    second = router.push_to_hub("org/router", certificates=run / "certificates.tsv", create_pr=True)
    assert hub.head("org/router") == first.commit
    assert "certificates/certificates.tsv" in hub.files("org/router", second.commit)
    assert "/discussions/" in str(second.url)


def test_old_tables_do_not_stay_beside_a_new_router(hub: HubServer, pool: ExpertPool, run: Path) -> None:
    publish(run, "org/router")
    done = small.routed(pool).push_to_hub("org/router")
    assert "certificates/certificates.tsv" in done.deleted
    assert not any(p.startswith("certificates/") for p in hub.files("org/router"))


def test_every_table_must_be_about_these_weights(hub: HubServer, pool: ExpertPool, run: Path, tmp_path: Path) -> None:
    alone = certify_table(Smooth(pool[0]), small.images(), tmp_path / "both" / "one.tsv", small.PLAN)
    for name in ("certificates.tsv", "certificates.json"):
        (tmp_path / "both" / name).write_bytes((run / name).read_bytes())
    done = publish(run, "org/router", certificates=tmp_path / "both", dry_run=True)
    assert "certificates/one.tsv" in {f.path for f in done.files}
    assert f"| {alone.name} | 12 |" in done.card
    other = Smooth(small.expert(0.25, tilt=0.2))
    certify_table(other, small.images(), tmp_path / "other" / "one.tsv", small.PLAN)
    with pytest.raises(IntegrityError, match="belongs to other weights"):
        publish(run, "org/router", certificates=tmp_path / "other", dry_run=True)


def test_an_edited_table_is_refused(hub: HubServer, run: Path) -> None:
    lines = (run / "certificates.tsv").read_text().splitlines(keepends=True)
    cells = lines[1].split("\t")
    cells[3] = f"{float(cells[3]) * 1.01:.8f}"
    (run / "certificates.tsv").write_text("".join([lines[0], "\t".join(cells), *lines[2:]]))
    with pytest.raises(IntegrityError, match="do not follow from the votes") as caught:
        publish(run, "org/router")
    assert "image 0: radius" in str(caught.value)
    assert not any(path.startswith("/api/models/org") for _, path in hub.requests)
    (run / "certificates.json").unlink()
    with pytest.raises(ResultsError):
        publish(run, "org/router")


def test_a_false_word_about_the_seed_is_refused(run: Path) -> None:
    metadata = json.loads((run / "certificates.json").read_text())
    (run / "certificates.json").write_text(json.dumps({**metadata, "seed_derived": False}))
    with pytest.raises(IntegrityError, match="seed_derived: False in the table, True for seed"):
        publish(run, "org/router", dry_run=True)


def test_unpinned_experts_are_refused(hub: HubServer, pool: ExpertPool, tmp_path: Path) -> None:
    in_memory = ExpertPool([small.expert(0.25), pool[1]])
    small.routed(in_memory).save_pretrained(tmp_path / "loose")
    with pytest.raises(InputError, match="not pinned") as caught:
        publish(tmp_path / "loose", "org/router")
    assert "sigma_0.25 (local" in caught.value.received
    assert "sigma_0.5" not in caught.value.received
    assert "--with-experts" in caught.value.remedy
    config = json.loads((small.routed(pool).save_pretrained(tmp_path / "branch") / CONFIG).read_text())
    config["pool"]["experts"][0]["provenance"]["revision"] = "main"
    (tmp_path / "branch" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="not pinned"):
        publish(tmp_path / "branch", "org/router")


def test_a_dry_run_over_experts_on_disk_shows_everything_and_the_refusal(
    hub: HubServer, pool: ExpertPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.routed(ExpertPool([small.expert(0.25), pool[1]])).save_pretrained(tmp_path / "loose")
    hub.requests.clear()
    shown = publish(tmp_path / "loose", "org/router", dry_run=True)
    assert not any(path.startswith("/api/models/org") for _, path in hub.requests)
    assert {"README.md", "config.json", "router.safetensors"} <= {f.path for f in shown.files}
    assert shown.refused is not None
    assert "sigma_0.25 (local" in shown.refused
    words = ["rsrouter", "publish", str(tmp_path / "loose"), "org/router", "--dry-run"]
    for more in ([], ["--format", "json"]):
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        if more:
            assert json.loads(out)["refused"] == shown.refused
        else:
            assert shown.card in out
            assert "would be refused" in err


def test_a_dry_run_that_cannot_show_files_tells_the_refusal(hub: HubServer, pool: ExpertPool, tmp_path: Path) -> None:
    small.routed(ExpertPool([small.expert(0.25), pool[1]])).save_pretrained(tmp_path / "loose")
    (tmp_path / "loose" / "README.md").write_text("It is certified at 99.9 % of all images.")
    with pytest.raises(InputError, match="not pinned"):
        publish(tmp_path / "loose", "org/router", dry_run=True)


@pytest.mark.parametrize("claim", ["It is certified at 99.9 % of all images.", "Robust accuracy: 98.1%"])
def test_a_card_may_not_claim_more_than_its_tables(run: Path, claim: str) -> None:
    rendered = publish(run, "org/router", dry_run=True).card
    (run / "router" / "README.md").write_text(rendered.replace("# router\n", f"# router\n\n{claim}\n", 1))
    with pytest.raises(InputError, match="in no table"):
        publish(run, "org/router", dry_run=True)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("75.0 (42.8-94.5)", "85.0 (42.8-94.5)", "generated part"),
        ("value: 75.0", "value: 85.0", "model-index"),
        ("- lab/sigma-0.25\n", "- lab/other\n", "base models"),
        ("library_name: rsrouter", "library_name: [", "metadata cannot be read"),
    ],
)
def test_a_changed_number_in_the_card_is_refused(run: Path, old: str, new: str, match: str) -> None:
    rendered = publish(run, "org/router", dry_run=True).card
    assert old in rendered
    (run / "router" / "README.md").write_text(rendered.replace(old, new, 1))
    with pytest.raises(InputError, match=match):
        publish(run, "org/router", dry_run=True)


def test_prose_of_the_user_is_kept(run: Path) -> None:
    rendered = publish(run, "org/router", dry_run=True).card
    text = rendered + "\nTrained on a sunny afternoon; it abstains on 25.0% of the images.\n"
    (run / "router" / "README.md").write_text(text)
    assert publish(run, "org/router", dry_run=True).files[0].size == len(text.encode())


FAULTS = [
    ("POST", r"/commit/", 412, "412"),
    ("POST", r"/commit/", 503, "503"),
    ("POST", r"/preupload/", 500, "500"),
    ("POST", r"/commit/", "drop", "not reached"),
    ("POST", r"/lfs/objects/batch", 503, "503"),
    ("PUT", r"/lfs/", 400, "400"),
    ("PUT", r"/lfs/", "drop", "not reached"),
]


@pytest.mark.parametrize(("method", "path", "action", "told"), FAULTS)
def test_nothing_half_published_loads(hub: HubServer, run: Path, method: str, path: str, action: int | str, told: str) -> None:
    hub.fault(method, path, action, times=None)
    with pytest.raises(HubError) as caught:
        publish(run, "org/router")
    assert told in str(caught.value)
    assert caught.value.remedy
    # the empty repository that was made for it stays, and does not load
    with pytest.raises(HubError):
        RoutedSmooth.from_pretrained("org/router")
    hub._faults.clear()
    done = publish(run, "org/router")
    assert hub.head("org/router") == done.commit


@pytest.mark.parametrize(
    ("method", "path", "action"), [("POST", r"/commit/", 412), ("POST", r"/commit/", 500), ("PUT", r"/lfs/", 400)]
)
def test_a_failed_update_leaves_the_old_publication(
    hub: HubServer, pool: ExpertPool, run: Path, method: str, path: str, action: int
) -> None:
    first = publish(run, "org/router")
    changed = small.routed(pool)
    with torch.no_grad():
        changed.router.modules["router"][1].bias += 0.25
    changed = RoutedSmooth(pool, changed.router)
    hub.fault(method, path, action, times=None)
    with pytest.raises(HubError):
        changed.push_to_hub("org/router")
    assert hub.head("org/router") == first.commit
    assert RoutedSmooth.from_pretrained("org/router").digest == small.routed(pool).digest


@pytest.mark.parametrize("reachable", [True, False])
def test_the_answer_to_the_commit_is_lost(hub: HubServer, run: Path, reachable: bool) -> None:
    """The commit stands, and its answer never arrives: it is found, or else the error is told; what loads is whole."""
    publish(run, "org/router")
    hub.fault("POST", r"/commit/", "cut")
    (run / "router" / "README.md").write_text("A card with other words.\n")
    before = hub.head("org/router")
    if reachable:
        done = publish(run, "org/router")
        assert done.commit == hub.head("org/router") != before
        assert done.parent == before
    else:
        hub.fault("POST", r"/paths-info/", "drop", times=None)
        with pytest.raises(HubError, match="not reached"):
            publish(run, "org/router")
        assert hub.head("org/router") != before
    assert hub.files("org/router")["README.md"] == b"A card with other words.\n"
    assert RoutedSmooth.from_pretrained("org/router").digest == RoutedSmooth.from_pretrained(run / "router").digest


def test_somebody_else_commits_meanwhile(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = publish(run, "org/router")
    from huggingface_hub import HfApi

    real = HfApi.model_info

    def late(self, *args, **kwargs):
        info = real(self, *args, **kwargs)
        hub.put("org/router", {"note.txt": b"hello"})
        return info

    monkeypatch.setattr(HfApi, "model_info", late)
    with pytest.raises(HubError, match="412") as caught:
        publish(run, "org/router")
    assert "fetch its head" in caught.value.remedy
    assert "note.txt" in hub.files("org/router")
    assert hub.files("org/router")[CONFIG] == hub.files("org/router", first.commit)[CONFIG]


def test_a_truncated_upload_is_refused(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store refuses content that is not what was announced; a server that kept it is told by reading back."""
    from tests.helpers import hub_server

    keep = hub_server._Handler.commit

    def lossy(self, id: str, rev: str, type: str = "model") -> None:
        self.body = re.sub(
            rb'("path": ?"config\.json"[^}]*?"content": ?"|"content": ?")([A-Za-z0-9+/]{8})', rb"\1AAAAAAAA", self.body, count=1
        )
        keep(self, id, rev, type)

    monkeypatch.setattr(hub_server._Handler, "commit", lossy)
    with pytest.raises(IntegrityError, match="as it was sent, though the commit stands"):
        publish(run, "org/router")


@pytest.mark.parametrize("action", ["cut", "drop", 500])
def test_a_commit_that_cannot_be_read_back_is_published_all_the_same(hub: HubServer, run: Path, action: int | str) -> None:
    hub.fault("POST", r"/paths-info/", action, times=None)
    with pytest.warns(RuntimeWarning, match="published, but the commit could not be read back"):
        done = publish(run, "org/router")
    assert (done.commit, done.verified) == (hub.head("org/router"), False)


def test_a_table_of_another_execution_belongs_to_another_function(run: Path) -> None:
    folder = run / "router"
    store_execution(folder, replace(RoutedSmooth.from_pretrained(folder).execution, fold=False))
    with pytest.raises(IntegrityError, match="drawn in another way") as caught:
        publish(run, "org/router", dry_run=True)
    assert "'fold': True" in caught.value.received


def test_gated_and_missing(hub: HubServer, run: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="does not exist"):
        RoutedSmooth.from_pretrained("org/nobody")
    publish(run, "org/router")
    with pytest.raises(HubError, match="no revision"):
        RoutedSmooth.from_pretrained("org/router", revision="v9")
    hub.gated.add("org/router")
    with pytest.raises(HubError, match="gated") as caught:
        RoutedSmooth.from_pretrained("org/router", cache_dir=tmp_path / "a")
    assert "access" in caught.value.remedy
    hub.gated = {"lab/sigma-0.25"}
    with pytest.raises(HubError, match=r"sigma-0\.25.* is gated"):
        RoutedSmooth.from_pretrained("org/router", cache_dir=tmp_path / "b")
    hub.gated.clear()
    for action in ("corrupt", "cut"):
        hub.fault("GET", r"sigma-0\.5/resolve/.*safetensors", action, times=None)
        with pytest.raises((HubError, IntegrityError)):
            RoutedSmooth.from_pretrained("org/router", cache_dir=tmp_path / action)
        hub._faults.clear()


def test_a_config_from_elsewhere_names_no_local_file(hub: HubServer, pool: ExpertPool, tmp_path: Path) -> None:
    folder = small.routed(ExpertPool([small.expert(0.25), pool[1]])).save_pretrained(tmp_path / "loose")
    hub.put("org/loose", {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    config = json.loads((folder / CONFIG).read_text())
    config["pool"]["experts"][0]["provenance"]["location"] = str(folder / "experts" / "sigma_0.25")
    hub.put("org/loose", {CONFIG: json.dumps(config)})
    with pytest.raises(IntegrityError, match="not pinned"):
        RoutedSmooth.from_pretrained("org/loose")


def test_an_existing_public_repository_is_not_taken_for_private(hub: HubServer, run: Path) -> None:
    publish(run, "org/router")
    with pytest.raises(HubError, match="public"):
        publish(run, "org/router", private=True)


@pytest.mark.parametrize("name", ["router", "org/", "a/b/c", "org/../x"])
def test_names(run: Path, name: str) -> None:
    with pytest.raises((InputError, HubError)):
        publish(run, name, dry_run=True)


def test_plans_without_a_radius_grid_and_single_votes(pool: ExpertPool, tmp_path: Path) -> None:
    router = small.routed(pool)
    router.save_pretrained(tmp_path / "r" / "router")
    certify_table(router, small.images(3), tmp_path / "r" / "certificates.tsv", FixedPlan(1, 1))
    assert "100.0" in publish(tmp_path / "r", "org/router", dry_run=True).card
