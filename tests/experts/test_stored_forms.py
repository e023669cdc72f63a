"""Stored forms of experts against odd and hostile edits: typed errors, nothing opened that must not be, nothing guessed."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rsrouter.core.errors import CheckpointError, InputError, IntegrityError, RSRouterError
from rsrouter.experts import Expert, ExpertPool, build_architecture, ensemble, load_expert, save_expert, wrap
from rsrouter.experts.pool import pool_from_dict, pool_to_dict

SMALL = {"width": 8, "blocks": [[8, 1]]}
VALUES = (None, True, -1, 0, 1e308, 10**30, "", "x" * 2000, "\x1b[2J", "../..", [], [[1]], {}, {"a": {}}, [None] * 3, 3.5)


def small(seed: int = 0, **settings: Any) -> Expert:
    torch.manual_seed(seed)
    module = build_architecture("small_resnet", 3, SMALL).eval()
    return Expert(module, **{"sigma": 0.5, "num_classes": 3, "input_shape": (1, 8, 8), **settings})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in (0, 1):
        save_expert(small(seed, labels=["a", "b", "c"]), tmp_path / f"e{seed}")
    return tmp_path


def edits(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], object]]:
    """Every place of a JSON value with every odd value; `edits` itself stands for leaving the place out."""
    if path:
        yield from ((path, value) for value in (*VALUES, edits))
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from edits(value, (*path, key))


def edited(content: Any, path: tuple[Any, ...], value: object) -> Any:
    copied = json.loads(json.dumps(content))
    place = copied
    for key in path[:-1]:
        place = place[key]
    if value is edits:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copied


def check_words(error: RSRouterError) -> None:
    assert all(isinstance(text, str) and text for text in (error.message, error.expected, error.received, error.remedy))


def test_every_edit_of_a_pool_is_refused_or_understood(folder: Path) -> None:
    experts = [load_expert(folder / "e0"), ensemble([load_expert(folder / f"e{s}", sigma=1.0) for s in (0, 1)], name="both")]
    content = pool_to_dict(ExpertPool(experts), folder)
    digest = pool_from_dict(content, folder).digest
    tried = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path, value in edits(content):
            if path[-3:-2] == ("logits",) or (value is edits and path[:-1] == ("experts",)):
                continue
            tried += 1
            try:
                pool = pool_from_dict(edited(content, path, value), folder)
            except RSRouterError as error:
                refused += 1
                check_words(error)
                continue
            # what was not refused says nothing about votes: licence, versions, the probe left out
            assert pool.digest == digest, (path, value)
    assert tried > 1000
    assert refused > 0.8 * tried


def test_every_edit_of_a_config_is_refused_or_understood(folder: Path) -> None:
    file = folder / "e0" / "config.json"
    content = json.loads(file.read_text())
    tried = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path, value in edits(content):
            tried += 1
            file.write_text(json.dumps(edited(content, path, value)))
            try:
                load_expert(folder / "e0")
            except RSRouterError as error:
                check_words(error)
        for text in ("", "[", "[]", "NaN", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "null"):
            file.write_text(text)
            with pytest.raises(RSRouterError):
                load_expert(folder / "e0")
    assert tried > 300


def test_every_edit_of_a_spec_is_refused_or_understood(folder: Path) -> None:
    content = {
        "defaults": {"normalisation": "none"},
        "expert": [
            {"source": "e0", "sigma": [0.5, 1.0], "name": "one"},
            {"kind": "ensemble", "sigma": 0.5, "consensus": None, "chunk": 4, "members": [{"source": "e0"}, {"source": "e1"}]},
            {
                "kind": "denoised",
                "sigma": 0.5,
                "denoiser": {"source": "u.safetensors", "architecture": "small_unet", "kwargs": {"width": 8}},
                "classifier": {"source": "e0"},
                "diffusion": {"schedule": "linear", "steps": 1000, "prediction": "sample"},
            },
        ],
    }
    from safetensors.torch import save_file

    save_file(build_architecture("small_unet", 2, {"width": 8}).state_dict(), folder / "u.safetensors")
    assert len(wrap(content, folder=folder).pool) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path, value in edits(content):
            if value not in (None, -1, "", [], edits):
                continue
            try:
                wrap(edited(content, path, value), folder=folder)
            except RSRouterError as error:
                check_words(error)


@pytest.mark.parametrize("location", ["/etc", "/dev/zero", "pipe"])
def test_a_pool_from_elsewhere_opens_no_local_file(folder: Path, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe")
    content = pool_to_dict(
        ExpertPool([load_expert(folder / "e0"), ensemble([load_expert(folder / f"e{s}") for s in (0, 1)], name="b")])
    )
    for entry in content["experts"]:
        for where in [entry["provenance"], *(p["provenance"] for p in entry["provenance"]["parts"])]:
            if where["source"] == "local":
                where |= {"location": location, "filename": "passwd"}
    opened: list[Path] = []
    for name in ("open", "read_bytes", "stat"):
        monkeypatch.setattr(Path, name, lambda self, *a, **k: opened.append(self))
    for lazy in (True, False):
        with pytest.raises(IntegrityError, match="not pinned"):
            pool_from_dict(content, folder, allow_local=False, lazy=lazy)
    assert opened == []


def test_pipes_and_devices_are_no_weights(folder: Path) -> None:
    os.mkfifo(folder / "pipe.pt")
    for name in (folder / "pipe.pt", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="Cannot read"):
            load_expert(name, architecture="small_resnet", sigma=0.5, normalisation="none", input_shape=(1, 8, 8))


def test_a_lazy_pool_has_a_digest_without_its_weights(folder: Path) -> None:
    pool = ExpertPool([load_expert(folder / f"e{s}", name=f"e{s}") for s in (0, 1)])
    pool.save(folder)
    for s in (0, 1):
        (folder / f"e{s}" / "model.safetensors").unlink()
    lazy = ExpertPool.load(folder, lazy=True)
    assert lazy.digest == pool.digest
    with pytest.raises(CheckpointError, match="Cannot read"):
        lazy[0].module  # noqa: B018


@pytest.mark.parametrize("version", [1, 3, None, "2"])
def test_other_schemas(folder: Path, version: object) -> None:
    content = {**pool_to_dict(ExpertPool([load_expert(folder / "e0")])), "schema_version": version}
    with pytest.raises(InputError, match="upgrade" if version == 3 else "unreleased"):
        pool_from_dict(content, folder)
    if isinstance(version, int):
        file = folder / "e0" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": version}))
        with pytest.raises(CheckpointError, match="upgrade" if version == 3 else "unreleased"):
            load_expert(folder / "e0")


# -- class names -------------------------------------------------------------------------------------------------------


def test_labels_travel_and_must_agree(folder: Path) -> None:
    one = load_expert(folder / "e0")
    assert one.labels == ("a", "b", "c")
    pool = ExpertPool([one, load_expert(folder / "e1", sigma=1.0)])
    assert pool.labels == ("a", "b", "c")
    pool.save(folder)
    assert ExpertPool.load(folder).labels == pool.labels
    assert ExpertPool([one, small(1, sigma=1.0)]).labels == pool.labels
    with pytest.raises(InputError, match="another order"):
        ExpertPool([one, small(1, sigma=1.0, labels=["a", "c", "b"])])
    with pytest.raises(InputError, match="class 2"):
        ExpertPool([one, small(1, sigma=1.0, labels=["a", "b", "d"])])
    with pytest.raises(InputError, match="another order"):
        ensemble([one, small(1, labels=["b", "a", "c"])])


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "b", "b"], ["a", "b", ""], ["a", "b", 3], "abc", ["a", "b", "\x1b[2J"]])
def test_labels_that_do_not_fit(labels: object) -> None:
    with pytest.raises(InputError, match="class names"):
        small(labels=labels)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, ("a", "b", "c")),
        ({"id2label": {"2": "c", "0": "a", "1": "b"}, "model_type": "resnet", "hidden_sizes": [1]}, ("a", "b", "c")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, None),
        ({"pretrained_cfg": {"label_names": ["a", "b", "c"]}}, ("a", "b", "c")),
    ],
)
def test_class_names_of_other_libraries(folder: Path, config: dict[str, Any], expected: object) -> None:
    (folder / "e0" / "config.json").write_text(json.dumps(config))
    settings = {"architecture": "small_resnet", "kwargs": SMALL, "sigma": 0.5, "num_classes": 3, "input_shape": (1, 8, 8)}
    assert load_expert(folder / "e0", normalisation="none", **settings).labels == expected


@pytest.mark.parametrize("names", [[], {"0": 1}, {"1": "a"}, {"x": "a"}, "a"])
def test_class_names_that_cannot_be_read(folder: Path, names: object) -> None:
    (folder / "e0" / "config.json").write_text(json.dumps({"id2label": names}))
    with pytest.raises(CheckpointError, match="class names"):
        load_expert(folder / "e0")


# -- convert -----------------------------------------------------------------------------------------------------------


def test_a_killed_convert_leaves_nothing_in_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("rsrouter.experts.convert")
    steps: list[Callable[..., Any]] = [module.save_file, module.card, module.load_expert, module.os.replace]
    (folder / ".out.part").mkdir()  # as a run that was killed outright leaves it
    (folder / ".out.part" / "config.json").write_text("{")
    for step in steps:
        with monkeypatch.context() as patch:

            def die(*args: object, **kwargs: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(module if hasattr(module, step.__name__) else module.os, step.__name__, die)
            with pytest.raises(KeyboardInterrupt):
                save_expert(small(), folder / "out")
        assert not (folder / "out").exists()
    assert load_expert(module.convert(folder / "e0", folder / "out")).digest == load_expert(folder / "e0").digest
    assert [p.name for p in folder.glob(".out*")] == []
