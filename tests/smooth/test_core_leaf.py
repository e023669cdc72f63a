"""A core: answers where nothing is certified, marked as such everywhere, pinned like an expert, in no certified figure."""

from __future__ import annotations

import html
import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from rsrouter import (
    CascadeRouter,
    Execution,
    Expert,
    ExpertPool,
    FixedPlan,
    FlatRouter,
    InputError,
    IntegrityError,
    NetworkError,
    ResultsError,
    RoutedSmooth,
    Smooth,
    Training,
    train_router,
)  # fmt: skip
from rsrouter.audit import audit
from rsrouter.cli import app
from rsrouter.core import ABSTAIN, Certificate
from rsrouter.jobs import certify_table, transfer_table
from rsrouter.report import curves, summarise, write_report
from rsrouter.report.text import print_summary
from rsrouter.results import Row, Table, merge_tables, read_table, require_sound
from rsrouter.results.field import parse_field
from rsrouter.router.stored import MOST_STAGES
from tests.helpers import small_router as small

COUNT, TAUS = 12, (0.8, 0.9)
FIELD = ("idx", "label", "predict", "radius", "correct", "time")


def core(tilt: float = 0.0, name: str = "accurate") -> Expert:
    """Sees every bright column, without noise: right where the smoothed experts are not sure."""
    module = small.expert(0.25, tilt=tilt).module
    return Expert(module, core=True, num_classes=small.CLASSES, input_shape=small.SHAPE, name=name)


def pool(*more: Expert) -> ExpertPool:
    return ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01), *(more or (core(),))])


def routed() -> RoutedSmooth:
    """Half of the images have less than 90% of the last expert's votes, and are left to the core."""
    return RoutedSmooth(pool(), CascadeRouter(TAUS))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("core")
    small.run_folder(routed(), folder, small.images(COUNT))
    return folder


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    shutil.copytree(clean, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def table(clean: Path) -> Table:
    return require_sound(read_table(clean / "certificates.tsv"))


def edit(path: Path, change) -> None:
    """Rows as mappings, changed and written again."""
    head, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    made = [dict(zip(head, row, strict=True)) for row in rows]
    change(made)
    path.write_text("\n".join("\t".join(row) for row in [head, *(list(m.values()) for m in made)]) + "\n")


def test_it_answers_where_nothing_is_certified_and_nowhere_else(table: Table) -> None:
    gone = table.abstained
    assert 2 <= gone.sum() <= COUNT - 2
    assert np.all(table.core[gone] >= 0)
    assert np.all(table.core[~gone] == ABSTAIN)
    assert np.all(table.radius[gone] == 0)
    assert not table.correct[gone].any()  # whatever the core says: it may be right, and nothing of it is certified
    assert (table.core[gone] == table.label[gone]).any()
    about = table.described()
    assert about.core is not None
    assert about.core.digest == core().digest
    assert [e.name for e in about.experts] == ["sigma_0.25", "sigma_0.5"]


def test_certificates_are_those_of_the_same_router_without_it(table: Table) -> None:
    bare = RoutedSmooth(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]), CascadeRouter(TAUS))
    assert bare.digest == routed().digest
    found = bare.certify(small.images(COUNT).batch(range(COUNT))[0], small.PLAN, ids=range(COUNT))
    assert [c.predict for c in found] == table.predict.tolist()
    assert np.allclose([c.radius for c in found], table.radius, atol=2e-8)
    assert {c.core for c in found} == {ABSTAIN}


def test_it_says_so_in_words() -> None:
    x = small.images(COUNT).batch(range(COUNT))[0]
    texts = [str(c) for c in routed().certify(x, small.PLAN, ids=range(COUNT)) if c.predict == ABSTAIN]
    assert all("uncertified" in text and "core answers class" in text for text in texts)
    assert "no certificate covers it" in routed().describe()
    assert "certifies nothing" in routed().describe()


def test_no_certified_figure_counts_it(table: Table) -> None:
    every = np.array([0.0, 1e-9, 0.25])
    certified = curves.certified_accuracy(table, every).accuracy
    held = (table.predict == table.label) & (table.predict >= 0)
    assert certified[0] == held.mean()
    assert np.all(certified <= held.mean())
    natural = curves.natural_accuracy(table)
    assert natural is not None
    assert natural[0] > certified[0]
    hidden = replace(table, core=np.full(COUNT, ABSTAIN))
    assert np.array_equal(curves.certified_accuracy(hidden, every).accuracy, certified)
    assert curves.average_certified_radius(hidden) == curves.average_certified_radius(table)
    assert curves.abstention_rate(hidden) == curves.abstention_rate(table) == float(table.abstained.mean())
    summary = summarise(table)
    assert [n.name for n in summary.natural] == [table.name]
    assert summary.natural[0].accuracy == natural[0]
    assert summary.natural[0].share == float(table.abstained.mean())
    assert summary.series[0].at[0] == certified[0]
    assert "natural accuracy" in summary.natural[0].words
    assert summary.to_dict()["natural"][0]["core"] == "accurate"


def test_readers_of_the_fields_columns_see_an_abstention(clean: Path, table: Table) -> None:
    lines = (clean / "certificates.tsv").read_text().splitlines()
    head = lines[0].split("\t")
    cut = "\n".join("\t".join(line.split("\t")[:6]) for line in lines) + "\n"
    assert tuple(head[:6]) == FIELD
    old = parse_field(cut, path=clean / "old.tsv", metadata={}, name="old")
    assert np.array_equal(old.predict, table.predict)
    assert np.array_equal(old.radius, table.radius)
    assert np.array_equal(old.correct, table.correct)
    assert old.natural is None
    # Cohen's analyze.py: correct and radius >= r, at every r
    by_hand = [line.split("\t") for line in cut.splitlines()[1:]]
    assert (
        np.mean([row[4] == "1" and float(row[3]) >= 0 for row in by_hand]) == curves.certified_accuracy(table, [0.0]).accuracy[0]
    )


def test_an_audit_runs_its_network_again(run: Path) -> None:
    asked = {"data": small.images(COUNT), "rows": 3, "fresh_votes": 100, "attack_steps": 0, "seed": 1}
    report = audit(run, **asked)
    assert report.ok
    assert "core" in {c.name for c in report.checks if c.status == "passed"}

    def another(rows) -> None:
        row = next(r for r in rows if r["core"])
        row["core"] = str((int(row["core"]) + 1) % small.CLASSES)

    edit(run / "certificates.tsv", another)
    report = audit(run, **asked)
    assert {f.check for f in report.findings} == {"core"}
    edit(run / "certificates.tsv", lambda rows: [r.update(core="") for r in rows])
    assert {f.check for f in audit(run, **asked).findings} == {"core"}


def right(row) -> str:
    return str(int(row["core"] == row["label"]))


#: The guard switched off: an answer of the core dressed as a certificate.
DRESSED = {
    "moved": (lambda row: row.update(predict=row["core"], correct=right(row), core=""), IntegrityError, "votes"),
    "copied": (lambda row: row.update(predict=row["core"], correct=right(row)), ResultsError, "core"),
    "called correct": (lambda row: row.update(correct=right(row)), ResultsError, "correct"),
    "with a radius": (lambda row: row.update(radius="0.10000000"), ResultsError, "radius 0"),
    "negative": (lambda row: row.update(core="-2"), ResultsError, "core"),
    "in words": (lambda row: row.update(core="one"), ResultsError, "core"),
    "no class": (lambda row: row.update(core="7"), IntegrityError, "core"),
}


@pytest.mark.parametrize(("change", "error", "words"), DRESSED.values(), ids=DRESSED.keys())
def test_a_core_answer_cannot_pass_for_a_certificate(run: Path, change, error, words) -> None:
    edit(run / "certificates.tsv", lambda rows: change(next(r for r in rows if r["core"] and r["core"] == r["label"])))
    with pytest.raises(error, match=words):
        require_sound(read_table(run / "certificates.tsv"))


def test_a_table_without_a_core_has_no_such_answers(run: Path) -> None:
    file = run / "certificates.json"
    told = json.loads(file.read_text())
    assert told.pop("core")["name"] == "accurate"
    file.write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match="core"):
        require_sound(read_table(run / "certificates.tsv"))
    report = audit(run, data=small.images(COUNT), rows=1, fresh_votes=50, attack_steps=0, seed=1)
    assert {"digests", "radii"} <= {f.check for f in report.findings}


def test_rows_and_certificates_keep_the_two_apart() -> None:
    certificate = Certificate(1, 0.5, None, 10, {}, "e", core=2)
    with pytest.raises(ResultsError, match="beside a certified one"):
        Row.from_certificate(certificate, idx=0).to_line()


def test_a_loaded_router_has_the_pinned_core(run: Path) -> None:
    again = RoutedSmooth.from_pretrained(run / "router")
    assert again.pool.core is not None
    assert again.pool.core.digest == routed().pool.core.digest
    assert again.digest == routed().digest
    x = small.images(COUNT).batch(range(COUNT))[0]
    assert again.core.answers(x).tolist() == routed().core.answers(x).tolist()
    weights = next((run / "router" / "experts" / "accurate").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0?")
    with pytest.raises(IntegrityError):
        RoutedSmooth.from_pretrained(run / "router")


def test_a_core_changed_in_place_is_seen() -> None:
    made = routed()
    with torch.no_grad():
        made.pool.core.module[1].bias += 1
    with pytest.raises(NetworkError, match="core"):
        made.certify(small.images(2).batch(range(2))[0], small.PLAN)


def test_resuming_with_another_core_is_refused(run: Path) -> None:
    other = RoutedSmooth(pool(core(0.3)), CascadeRouter(TAUS))
    with pytest.raises(ResultsError, match="another run"):
        certify_table(other, small.images(COUNT), run / "certificates.tsv", small.PLAN)


def test_a_core_cannot_certify(run: Path) -> None:
    with pytest.raises(InputError, match="core, and cannot"):
        Smooth(core())
    with pytest.raises(InputError, match="core, and cannot"):
        pool()["accurate"]
    result = CliRunner().invoke(
        app, ["certify", str(run / "router"), "--expert", "accurate", "--data", "demo", "--out", str(run / "x.tsv")]
    )
    assert isinstance(result.exception, InputError)
    assert "is a core, and cannot be certified" in str(result.exception)
    assert not (run / "x.tsv").exists()


@pytest.mark.parametrize("settings", [{"sigma": 0.5}, {"lipschitz": 1.0}, {"lipschitz": "compute"}, {"sigma": True}])
def test_a_core_has_no_noise_and_no_constant(settings) -> None:
    with pytest.raises(InputError, match="is a core"):
        Expert(core().module, core=True, num_classes=3, input_shape=small.SHAPE, **settings)


def test_pools_that_cannot_be() -> None:
    with pytest.raises(InputError, match="one core"):
        pool(core(), core(0.1, "second"))
    with pytest.raises(InputError, match="needs experts"):
        ExpertPool([core()])
    with pytest.raises(InputError, match="different names"):
        pool(core(name="sigma_0.5"))
    with pytest.raises(InputError, match="num_classes"):
        pool(Expert(nn.Flatten(), core=True, num_classes=16, input_shape=small.SHAPE))
    assert pool().core.name == "accurate"
    assert [e.name for e in pool()] == ["sigma_0.25", "sigma_0.5"]
    assert ExpertPool(pool()).core is not None


class Batchwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] - x.flatten(1)[:, :3].mean(0)


class Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * float("nan")


def test_a_core_that_is_no_function_of_the_image_is_refused_and_nan_answers_nothing() -> None:
    settings = {"core": True, "num_classes": 3, "input_shape": small.SHAPE}
    x = small.images(4).batch(range(4))[0]
    made = RoutedSmooth(pool(Expert(Batchwise(), **settings)), CascadeRouter((0.9, 0.999)))
    with pytest.raises(NetworkError, match="rest of the batch"):
        made.certify(x, small.PLAN)
    blind = RoutedSmooth(pool(Expert(Blind(), **settings)), CascadeRouter((0.9, 0.999)))
    assert {c.core for c in blind.certify(x, small.PLAN)} == {ABSTAIN}


def test_a_flat_gate_names_the_core() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        module[1].weight.zero_()
        module[1].bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    gate = FlatRouter(module, sigma=0.5, experts=["sigma_0.25", "sigma_0.5", "core"])
    made = RoutedSmooth(pool(), gate)
    found = made.certify(small.images(3).batch(range(3))[0], FixedPlan(20, 100))
    assert {c.predict for c in found} == {ABSTAIN}
    assert all(c.core >= 0 for c in found)
    assert {c.n_drawn for c in found} == {20}  # the gate's selection votes alone
    assert FlatRouter.from_config(gate.to_config()).experts == gate.experts
    taken = ExpertPool([small.expert(0.25), replace_name(small.expert(0.5), "core")])
    with pytest.raises(InputError, match="called 'core'"):
        FlatRouter(module, sigma=0.5, experts=["sigma_0.25", "core"]).bind(taken)
    with pytest.raises(InputError, match="do not fit"):
        FlatRouter(module, sigma=0.5, experts=["core"]).bind(pool())


def replace_name(expert: Expert, name: str) -> Expert:
    return expert.with_settings(name=name)


def test_a_deterministic_gate_sends_to_the_core_without_votes() -> None:
    silent = Expert(small.expert(0.5).module, lipschitz="compute", num_classes=3, input_shape=small.SHAPE, name="silent")
    made = RoutedSmooth(ExpertPool([silent, core()]), CascadeRouter((0.8,), ["silent"]))
    found = made.certify(small.images(COUNT).batch(range(COUNT))[0], FixedPlan(1, 1))
    assert {c.n_drawn for c in found} == {0}
    assert {c.predict == ABSTAIN for c in found} == {True, False}
    assert all((c.core >= 0) == (c.predict == ABSTAIN) for c in found)


def test_a_long_chain_with_a_last_threshold_is_written_and_read() -> None:
    names = ["sigma_0.25", "sigma_0.5"] * (MOST_STAGES // 2)
    router = CascadeRouter([0.9] * MOST_STAGES, names)
    assert len(router.bind(pool()).tree.stages) == MOST_STAGES


def test_a_trained_chain_leaves_to_the_core_what_was_asked(tmp_path: Path) -> None:
    images, labels = small.images(20).batch(range(20))
    asked = {"radii": [0.0, 0.25], "validation": (images, torch.as_tensor(labels)), "plan_n": 300, "show": False}
    made = train_router(pool(), "cascade", images, torch.as_tensor(labels), core_at=0.8, out=tmp_path / "r", **asked)
    again = RoutedSmooth.from_pretrained(tmp_path / "r")
    last = made.tree.stages[made.tree.order[0]]
    assert (last.kind, last.tau, last.leads_to[-1]) == ("threshold", 0.8, ABSTAIN)
    assert again.digest == made.digest
    assert again.core is not None
    for kind, members in (("flat", pool()), ("cascade", ExpertPool(list(pool())))):
        with pytest.raises(InputError, match="core"):
            train_router(Training(members, kind, images, torch.as_tensor(labels), radii=[0.0], core_at=0.8))
    with pytest.raises(InputError, match="threshold"):
        train_router(Training(pool(), "cascade", images, torch.as_tensor(labels), radii=[0.0], core_at=0.4))


def test_the_verbs_wrap_and_predict(tmp_path: Path) -> None:
    for name, made in (("a", small.expert(0.25)), ("accurate", core())):
        (tmp_path / name).mkdir()
        files = small.expert_files(made, tmp_path / name)
        told = json.loads(files["config.json"])
        told.pop("sigma")
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    words = [
        "wrap",
        str(tmp_path / "a"),
        "--sigma",
        "0.25",
        "--core",
        str(tmp_path / "accurate"),
        "--out",
        str(tmp_path / "pool.json"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "core, uncertified" in result.output
    loaded = ExpertPool.load(tmp_path / "pool.json")
    assert (loaded.names, loaded.core.digest) == (("sigma_0.25",), core(name="core").digest)
    RoutedSmooth(loaded, CascadeRouter((0.9,))).save_pretrained(tmp_path / "router")
    data = small.images(COUNT)
    np.savez(tmp_path / "test.npz", images=small.pixels(data).numpy(), labels=data.labels.numpy())
    asked = ["predict", str(tmp_path / "router"), "--data", str(tmp_path / "test.npz"), "--n", "300", "--seed", "1"]
    told = json.loads(CliRunner().invoke(app, [*asked, "--format", "json"]).output)
    assert all((row["answer"] == ABSTAIN) == (row["core"] is not None) for row in told.values())
    assert len({row["answer"] == ABSTAIN for row in told.values()}) == 2
    lines = CliRunner().invoke(app, asked).output.splitlines()
    assert all(("uncertified" in line) == (line.split("\t")[1] == "-1") for line in lines)
    spec = tmp_path / "experts.toml"
    spec.write_text(
        f'[defaults]\nsigma = 0.25\n[[expert]]\nsource = "{tmp_path / "a"}"\n[[expert]]\nsource = "{tmp_path / "accurate"}"\n'
        "core = true\n"
    )
    assert ExpertPool.load(spec).core.digest == loaded.core.digest
    with pytest.raises(InputError, match="spec and flags"):
        CliRunner().invoke(app, ["wrap", str(spec), "--core", str(tmp_path / "accurate")], catch_exceptions=False)


def test_shards_workers_and_transfers_keep_it(run: Path, table: Table) -> None:
    for k in (0, 1):
        told = {"shard": (k, 2), "data": {"name": "bright-columns"}}
        certify_table(routed(), small.images(COUNT), run / f"shard-{k}.tsv", small.PLAN, **told)
    merged = read_table(merge_tables([run / "shard-0.tsv", run / "shard-1.tsv"], run / "merged.tsv"), check="counts")
    assert merged.core.tolist() == table.core.tolist()
    assert merged.metadata["core"] == table.metadata["core"]
    copied = pickle.loads(pickle.dumps(routed()))
    x = small.images(COUNT).batch(range(COUNT))[0]
    assert [c.core for c in copied.certify(x, small.PLAN, ids=range(COUNT))] == table.core.tolist()
    carried = {"table": run / "certificates.tsv", "out": run / "half.tsv", "execution": Execution(dtype="bfloat16"), "votes": 100}
    moved = require_sound(transfer_table(routed(), small.images(COUNT), **carried))
    assert moved.abstained.sum() >= table.abstained.sum()
    assert np.all((moved.core >= 0) == moved.abstained)
    assert np.all(moved.core[table.abstained] == table.core[table.abstained])
    other = RoutedSmooth(pool(core(0.3)), CascadeRouter(TAUS))
    with pytest.raises(IntegrityError, match="core"):
        transfer_table(other, small.images(COUNT), **{**carried, "out": run / "other.tsv"})


def test_a_report_has_a_line_of_its_own(table: Table, tmp_path: Path) -> None:
    page = write_report(table, tmp_path / "report").read_text()
    assert summarise(table).natural[0].words in html.unescape(page)
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["natural"][0]["accuracy"] == curves.natural_accuracy(table)[0]
    assert "natural" not in (tmp_path / "report" / "numbers.csv").read_text()
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(summarise(table), console)
    assert "natural accuracy" in console.export_text()
    without = replace(table, metadata={k: v for k, v in table.metadata.items() if k != "core"}, core=np.full(COUNT, ABSTAIN))
    assert summarise(without).natural == []
