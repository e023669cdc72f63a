"""Several heads on one trunk (Theorem 7): equal to the composed network, sound, and closed to heads that saw the noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import ndtr
from scipy.stats import binom
from torch import Tensor, nn
from typer.testing import CliRunner

from rsrouter import (
    AdaptivePlan,
    Execution,
    Expert,
    ExpertPool,
    FixedPlan,
    InputError,
    IntegrityError,
    PlanError,
    ResultsError,
    Smooth,
    Terms,
)
from rsrouter.audit import audit
from rsrouter.cli import app
from rsrouter.core import AlphaSplit
from rsrouter.core.bounds import binom_lower
from rsrouter.core.certificates import vote_radius
from rsrouter.core.recompute import recompute, recompute_all
from rsrouter.core.requests import VoteRequest
from rsrouter.demo.bundled import ASSETS
from rsrouter.jobs import certify_head, declare_heads, draw_features, redraw_head, with_head
from rsrouter.jobs.features import Cached, Features
from rsrouter.jobs.heads import _cached, _engine, head_counts
from rsrouter.results import read_table, require_sound
from rsrouter.results.declared import Declaration
from rsrouter.router.trunk import head_digest
from rsrouter.sampling import Engine, VoteModel, image_identity
from rsrouter.sampling.features import linear_votes
from tests.helpers import small_router as small

WIDTH, COUNT = 24, 4
TERMS = Terms(FixedPlan(20, 150), 0.01)


class Net(nn.Module):
    """A classifier with features, as timm's models have them."""

    def __init__(self, first: nn.Module, width: int, after: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.fc, self.after = first, nn.Linear(width, small.CLASSES), after

    def forward_features(self, x: Tensor) -> Tensor:
        return self.after(self.first(x.flatten(1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def trunk(seed: int = 0, sigma: float = 0.5) -> Expert:
    torch.manual_seed(seed)
    return Expert(Net(nn.Linear(16, WIDTH), WIDTH), sigma=sigma, num_classes=small.CLASSES, input_shape=small.SHAPE)


def layers(count: int = 3, seed: int = 1) -> dict[str, nn.Linear]:
    torch.manual_seed(seed)
    return {f"head-{k}": nn.Linear(WIDTH, small.CLASSES) for k in range(count)}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    draw_features(declare_heads(trunk(), layers(), TERMS), trunk(), small.images(COUNT), folder)
    return folder


@pytest.fixture
def run(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("noise", ["gaussian", "sound"])
def test_cached_votes_are_those_of_the_composed_network_on_the_same_copies(noise: str, tmp_path: Path) -> None:
    base, heads, data = trunk(), layers(), small.images(COUNT)
    told = declare_heads(base, heads, TERMS, noise=noise, execution=Execution(batch=32))
    features = draw_features(told, base, data, tmp_path)
    for name, head in heads.items():
        whole = with_head(base, head, name)
        model = VoteModel(name, whole.network(), told.sigma, (name,), (small.CLASSES,), told.digest)
        engine = Engine([model], small.SHAPE, seed=told.seed, execution=Execution(batch=32), noise=noise)
        x = torch.stack([data[i][0] for i in range(COUNT)])
        requests = [VoteRequest(i, name, p, 0, n) for i in range(COUNT) for p, n in (("select", told.n0), ("estimate", told.n))]
        votes = engine.run(x, [image_identity(x[i], i) for i in range(COUNT)], requests)
        cached = [head_counts(told, features.load(i), head.weight, head.bias) for i in range(COUNT)]
        assert [v[name].tolist() for v in votes] == [cached[r.image][r.purpose] for r in requests]
        assert len({tuple(v[name].tolist()) for v in votes}) > COUNT


def test_a_table_follows_from_its_votes_and_spends_its_part_of_alpha(run: Path) -> None:
    tables = [certify_head(run, head, run / f"{name}.tsv") for name, head in layers().items()]
    for name, table in zip(layers(), tables, strict=True):
        about = require_sound(table).described()
        assert about.heads is not None
        assert about.terms.alpha * 3 <= 0.01 < about.terms.alpha * 3.001
        assert about.alpha == 0.01
        assert "one of 3" in about.heads.text
        assert table.label.tolist() == [0, 1, 2, 0]
        for i in range(COUNT):
            counts = table.counts(i)["estimate"][name]
            if table.predict[i] >= 0:  # Cohen's radius at a third of alpha, from another function
                lower = binom_lower(counts[table.predict[i]], sum(counts), 0.01 / 3)
                assert table.radius[i] == pytest.approx(float(vote_radius(0.5, lower)), abs=1e-6)
    assert {int(np.sum(t.predict >= 0)) for t in tables} != {0}


def seen(rows: Tensor) -> nn.Linear:
    """A head that was trained on noisy copies: as many as it can for class 0."""
    target = torch.cat([torch.ones(len(rows), 1), torch.zeros(len(rows), 2)], 1).double()
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat([rows.double(), ones], 1), target, driver="gelsd").solution.float()
    head = nn.Linear(rows.shape[1], 3)
    with torch.no_grad():
        head.weight.copy_(fit[:-1].T)
        head.bias.copy_(fit[-1])
    return head


def test_a_head_that_saw_the_noise_is_refused(run: Path) -> None:
    features = Features.open(run)
    memory = seen(features.load(0).estimate)
    with pytest.raises(IntegrityError, match="not declared before"):
        certify_head(features, memory, run / "memory.tsv")
    assert not (run / "memory.tsv").exists()
    # nor does it help to write it into the declaration afterwards
    told = json.loads((run / "declaration.json").read_text())
    told["heads"][0]["digest"] = head_digest(memory.weight.detach(), memory.bias.detach())
    (run / "declaration.json").write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match="another declaration"):
        certify_head(run, memory, run / "memory.tsv")
    # nor to name the new declaration in what was drawn
    other = Declaration.load(run / "declaration.json").digest
    content = json.loads((run / "drawn.json").read_text())
    (run / "drawn.json").write_text(json.dumps({**content, "declaration": other}))
    with pytest.raises(IntegrityError, match="another declaration"):
        certify_head(run, memory, run / "memory.tsv")


def noises(width: int, copies: int) -> tuple[Expert, nn.Linear, Declaration, Cached]:
    """A trunk of `width` pure noises, an innocent head, its declaration and features of one image."""
    base = Expert(Net(nn.Identity(), width, nn.Identity()), sigma=0.5, num_classes=small.CLASSES, input_shape=(1, 1, width))
    head = nn.Linear(width, 2)
    told = declare_heads(base, {"innocent": head}, Terms(FixedPlan(copies, copies), 0.01))
    return base, head, told, _cached(_engine(told, base, None), told, torch.full((1, 1, width), 0.5), 0, -1)


def test_why_heads_come_first() -> None:
    """With more features than copies a head can give all of them to class 0, at a true probability near one half: on noise of
    its own, which its declaration draws, nothing of that is left."""
    base, _, told, x = noises(width=200, copies=60)
    rows = torch.cat([x.select, x.estimate]) - 0.5
    w = torch.linalg.lstsq(rows.double(), torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0].float()
    memory = nn.Linear(200, 2)
    with torch.no_grad():
        memory.weight.copy_(torch.stack([w, torch.zeros(200)]))
        memory.bias.copy_(torch.tensor([-0.5 * float(w.sum()), 0.0]))

    def radius(told: Declaration, cached: Cached) -> float:
        votes = {p: {"m": c} for p, c in head_counts(told, cached, memory.weight, memory.bias).items()}
        tree = told.model_copy(update={"heads": (told.heads[0].model_copy(update={"name": "m"}),)}).tree("m")
        (made,) = recompute(tree, told.terms.plan, AlphaSplit.even(told.share, tree.paths), [votes], sides="one")
        return made.radius

    assert radius(told, x) > 0.5  # the truth is 0: the image lies on the boundary
    own = declare_heads(base, {"memory": memory}, Terms(FixedPlan(60, 60), 0.01))
    assert own.seed != told.seed
    assert own.digest != told.digest
    assert radius(own, _cached(_engine(own, base, None), own, torch.full((1, 1, 200), 0.5), 0, -1)) == 0.0


def test_any_change_of_the_declaration_draws_other_noise() -> None:
    base, heads = trunk(), layers(2)
    first = declare_heads(base, heads, TERMS)
    again = declare_heads(base, dict(reversed(heads.items())), TERMS)
    others = [
        again,
        declare_heads(base, layers(3), TERMS),
        declare_heads(base, heads, Terms(FixedPlan(20, 151), 0.01)),
        declare_heads(base, heads, Terms(FixedPlan(20, 150), 0.02)),
        declare_heads(base, heads, TERMS, seed_from="2026-11-29"),
        declare_heads(base, heads, TERMS, sigma=0.25),
        first.model_copy(update={"seed": first.seed + 1}),
    ]
    assert len({first.digest, *(o.digest for o in others)}) == len(others) + 1
    x = small.images(1)[0][0]
    drawn = [_cached(_engine(d, base, None), d, x, 0, -1).estimate[0] for d in (first, *others)]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)
    assert declare_heads(trunk(), layers(2), TERMS).digest == first.digest


def test_what_cannot_be_declared_together() -> None:
    base, one = trunk(), layers(1)["head-0"]
    two = nn.Linear(WIDTH, small.CLASSES)
    two.load_state_dict(one.state_dict())
    refused: list[tuple[type[Exception], dict[str, object], Terms]] = [
        (InputError, {}, TERMS),
        (InputError, {"a": one, "b": two}, TERMS),  # one head twice would pay alpha twice
        (InputError, {"a": one, "b": nn.Linear(WIDTH, 5)}, TERMS),
        (InputError, {"a": nn.Linear(WIDTH + 1, 3)}, TERMS),
        (InputError, {"a": one.double()}, TERMS),
        (InputError, {"a": nn.Sequential(nn.Linear(WIDTH, 3))}, TERMS),
        (PlanError, {"a": layers(1)["head-0"]}, Terms(AdaptivePlan(1000, [0.5]))),
    ]
    for kind, heads, terms in refused:
        with pytest.raises(kind):
            declare_heads(base, heads, terms)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="int8"):
        declare_heads(base, layers(1), TERMS, execution=replace(Execution(), dtype="int8"))
    with pytest.raises(InputError, match="features"):
        declare_heads(small.expert(0.5), {"a": nn.Linear(16, 3)}, TERMS)


def test_features_that_are_torn_edited_swapped_or_missing_are_refused(run: Path) -> None:
    features, head = Features.open(run), layers()["head-0"]
    path, whole = features.path(1), features.path(1).read_bytes()
    for data in (whole[:-10], whole[:40], b"", whole[:-4] + b"head", features.path(2).read_bytes()):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="image 1"):
            certify_head(run, head, run / "table.tsv")
        (run / "table.tsv").unlink(missing_ok=True)
    path.unlink()
    with pytest.raises(ResultsError, match="Not all features"):
        certify_head(run, head, run / "table.tsv")
    again = draw_features(features.declaration, trunk(), small.images(COUNT), run)
    assert len(certify_head(again, head, run / "table.tsv")) == COUNT


def test_a_draw_goes_on_where_it_stopped_and_refuses_others(run: Path, tmp_path: Path) -> None:
    told = Features.open(run).declaration

    class Stop(Exception):
        pass

    def stop(at: int, of: int) -> None:
        if at == 2:
            raise Stop

    with pytest.raises(Stop):
        draw_features(told, trunk(), small.images(COUNT), tmp_path / "b", progress=stop)
    draw_features(told, trunk(), small.images(COUNT), tmp_path / "b")
    for i in range(COUNT):
        one, other = (Features.open(folder).load(i) for folder in (run, tmp_path / "b"))
        assert one.digest("") == other.digest("")
    with pytest.raises(IntegrityError, match="another draw"):
        draw_features(told, trunk(), small.images(COUNT, seed=3), run)
    with pytest.raises(IntegrityError, match="another draw"):
        draw_features(told, trunk(), small.images(COUNT), run, indices=[0])
    with pytest.raises(IntegrityError, match="another declaration"):
        draw_features(declare_heads(trunk(), layers(), Terms(FixedPlan(20, 300), 0.01)), trunk(), small.images(COUNT), run)
    with pytest.raises(IntegrityError, match="not the one that was declared"):
        draw_features(told, trunk(seed=9), small.images(COUNT), tmp_path / "c")


def test_alpha_that_is_not_shared_is_refused(run: Path) -> None:
    certify_head(run, layers()["head-0"], run / "table.tsv")
    path = run / "table.json"
    content = json.loads(path.read_text())
    content["terms"]["alpha"] = 0.01
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="alpha shared"):
        read_table(run / "table.tsv")
    content["heads"]["declaration"]["heads"] = content["heads"]["declaration"]["heads"][:1]  # as if it were alone
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="not as declared"):
        read_table(run / "table.tsv")


def test_features_that_are_nan_vote_for_no_class() -> None:
    def holes(x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0.5, torch.nan, x)

    base = Expert(Net(nn.Identity(), 16, holes), sigma=0.5, num_classes=small.CLASSES, input_shape=small.SHAPE)
    head = nn.Linear(16, small.CLASSES)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    told = declare_heads(base, {"a": head}, TERMS)
    cached = _cached(_engine(told, base, None), told, small.images(1)[0][0], 0, -1)
    none = int(cached.estimate.isnan().any(1).sum())
    assert 20 < none < 150
    assert head_counts(told, cached, head.weight, head.bias)["estimate"] == [150 - none, 0, 0, none]
    # also where a head would not read them
    assert linear_votes(torch.tensor([[torch.nan, 1.0]]), torch.zeros(2, 2), torch.tensor([1.0, 0.0]), 4).tolist() == [0, 0, 1]


def test_votes_are_drawn_again(run: Path) -> None:
    head, data = layers()["head-0"], small.images(COUNT)
    table = certify_head(run, head, run / "table.tsv")
    assert redraw_head(table, trunk(), head, data, range(COUNT)) == []
    with pytest.raises(IntegrityError, match="not the table's"):
        redraw_head(table, trunk(), layers()["head-1"], data, [0])
    # the same image as another id has other noise, so that rows cannot be exchanged
    one = replace(table, idx=np.array([3, 1, 2, 0]))
    with pytest.raises(IntegrityError):
        redraw_head(replace(table, radius=table.radius * 1.1), trunk(), head, data, [0])
    assert len(redraw_head(one, trunk(), head, data, range(COUNT))) == 2
    # features that were made up, with digests that fit
    features = Features.open(run)
    kept = features.load(0)
    best = int(torch.nonzero(head(kept.estimate).argmax(1) == int(table.predict[0]))[0])
    features.keep(replace(kept, estimate=kept.estimate[best : best + 1].repeat(150, 1)))
    forged = certify_head(run, head, run / "forged.tsv")
    assert forged.radius[0] > table.radius[0]
    assert [text.split(":")[0] for text in redraw_head(forged, trunk(), head, data, range(COUNT))] == ["image 0"]
    with pytest.raises(IntegrityError, match="not the one that was declared"):
        redraw_head(table, trunk(seed=4), head, data, [0])


def test_on_another_machine_votes_are_compared_to_rounding(run: Path) -> None:
    head, data = layers()["head-0"], small.images(COUNT)
    certify_head(run, head, run / "table.tsv")
    content = json.loads((run / "table.json").read_text())
    content["info"]["instructions"] = "another"
    (run / "table.json").write_text(json.dumps(content))
    assert redraw_head(read_table(run / "table.tsv"), trunk(), head, data, [0]) == []
    features = Features.open(run)
    kept = features.load(1)
    features.keep(replace(kept, estimate=kept.estimate.flip(0).roll(5, 1)))
    forged = certify_head(run, head, run / "forged.tsv")
    assert len(redraw_head(forged, trunk(), head, data, [0, 1])) == 1


def test_an_audit_says_what_it_can_and_what_it_cannot(run: Path) -> None:
    pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
    small.routed(pool)
    small.run_folder(small.routed(pool), run / "router", small.images(COUNT))
    certify_head(run, layers()["head-0"], run / "table.tsv")
    report = audit(run / "router", data=small.images(COUNT), tables=[run / "table.tsv"], seed=1)
    status = {c.name: c.status for c in report.checks}
    assert not report.findings
    assert (status["radii"], status["heads"], status["seed"], status["votes"]) == ("passed", "passed", "passed", "skipped")
    assert report.exit_status == 2  # incomplete
    assert "heads check" in str(report)
    cells = (run / "table.tsv").read_text().splitlines()
    first = cells[1].split("\t")
    first[3] = f"{float(first[3]) + 0.5:.8f}"
    (run / "table.tsv").write_text("\n".join([cells[0], "\t".join(first), *cells[2:]]) + "\n")
    found = audit(run / "router", tables=[run / "table.tsv"], seed=1).findings
    assert {f.check for f in found} == {"radii"}


def test_a_trunk_in_bfloat16_has_heads_in_float32(tmp_path: Path) -> None:
    heads = layers(1)
    told = declare_heads(trunk(), heads, TERMS, execution=Execution(dtype="bfloat16"))
    features = draw_features(told, trunk(), small.images(2), tmp_path)
    x = features.load(0).estimate
    assert torch.equal(x, x.bfloat16().float())
    assert not torch.equal(
        x, draw_features(declare_heads(trunk(), heads, TERMS), trunk(), small.images(2), tmp_path / "b").load(0).estimate
    )
    assert certify_head(features, heads["head-0"], tmp_path / "table.tsv").described().execution["dtype"] == "bfloat16"


def test_the_certified_classifier_can_be_used() -> None:
    head = layers()["head-0"]
    answers = Smooth(with_head(trunk(), head, "a")).predict(torch.stack([small.images(2)[i][0] for i in range(2)]), n=50, seed=1)
    assert answers.shape == (2,)


HEADS, PROBABILITY, ALPHA = 6, 0.75, 0.1


def near_boundary() -> tuple[Expert, dict[str, nn.Linear], float, Tensor]:
    """Heads that read one pixel each: class 0 where it is bright. Every head's probability of class 0 is the same, its true
    radius known, and their votes are independent."""
    base = Expert(Net(nn.Identity(), 16, nn.Identity()), sigma=0.5, num_classes=small.CLASSES, input_shape=small.SHAPE)
    heads = {}
    distance = 0.5 * 0.6744897501960817
    for k in range(HEADS):
        head = nn.Linear(16, 2)
        with torch.no_grad():
            head.weight.zero_()
            head.weight[0, k] = 1.0
            head.bias.copy_(torch.tensor([-0.5 + distance, 0.0]))
        heads[f"pixel-{k}"] = head
    return base, heads, distance, torch.full(small.SHAPE, 0.5)


def failures(count: int) -> tuple[int, int, int]:
    """Images with a false certificate of any head where alpha is shared, and where, as planted, it is not; all certificates."""
    base, heads, distance, image = near_boundary()
    assert float(ndtr(distance / 0.5)) == pytest.approx(PROBABILITY)
    told = declare_heads(base, heads, Terms(FixedPlan(20, 400), ALPHA), execution=Execution(batch=420))
    engine = _engine(told, base, None)
    cached = [_cached(engine, told, image, idx, -1) for idx in range(count)]
    radii = np.zeros((2, count, HEADS))
    for k, (name, head) in enumerate(heads.items()):
        counts = [head_counts(told, x, head.weight, head.bias) for x in cached]
        votes, tree = [{p: {name: c} for p, c in each.items()} for each in counts], told.tree(name)
        for which, level in enumerate((told.share, told.alpha)):
            split = AlphaSplit.even(level, tree.paths)
            radii[which, :, k] = recompute_all(tree, told.terms.plan, split, votes, sides=told.sides).radius
    # also the head whose radius is the largest, chosen after looking
    wrong, planted = (radii.max(2) > distance).sum(1).tolist()
    return wrong, planted, int(np.sum(radii[0] > 0))


def test_all_heads_hold_together_and_do_not_where_alpha_is_not_shared() -> None:
    wrong, planted, certified = failures(50)
    assert certified > 0.9 * 50 * HEADS
    assert binom.sf(wrong - 1, 50, ALPHA) > 1e-4
    assert binom.sf(planted - 1, 50, ALPHA) < 1e-4


@pytest.mark.slow
def test_all_heads_hold_together_on_many_images() -> None:
    wrong, _, certified = failures(1500)
    assert certified > 0.9 * 1500 * HEADS
    assert binom.sf(wrong - 1, 1500, ALPHA) > 1e-4
    assert wrong > 0.03 * 1500  # near the boundary: a bound that were far too wide would hide mistakes


def test_the_verb_from_declaration_to_check(tmp_path: Path) -> None:
    torch.manual_seed(0)
    runner, files = CliRunner(), []
    for name in ("a", "b"):
        head = nn.Linear(100, 10)
        save_file({f"fc.{k}": v for k, v in head.state_dict().items()}, tmp_path / f"{name}.safetensors")
        files += ["--head", str(tmp_path / f"{name}.safetensors")]
    out, where = str(tmp_path / "run"), ["--trunk", str(ASSETS / "router"), "--expert", "sigma_0.5"]

    def call(*words: str, status: int = 0) -> str:
        done = runner.invoke(app, ["heads", *words])
        assert done.exit_code == status, done.output
        return done.output

    assert "2 heads, alpha 0.0005 each" in call("declare", out, *where, *files, "--n", "200", "--n0", "20")
    call("draw", out, *where, "--data", "demo", "--count", "2")
    assert "one of 2" in call("certify", out)
    assert "4 rows drawn again: every vote" in call("check", out, *where, "--data", "demo")
    told = json.loads(call("certify", out, "--name", "b", "--format", "json"))
    assert len(told["heads"]) == 1
    save_file(nn.Linear(100, 10).state_dict(), tmp_path / "run" / "heads" / "a.safetensors")
    with pytest.raises(IntegrityError, match="not declared"):
        runner.invoke(app, ["heads", "certify", out], catch_exceptions=False)
    with pytest.raises(InputError, match="No trunk"):
        runner.invoke(app, ["heads", "draw", out, "--data", "demo"], catch_exceptions=False)
    for words in (["certify", out, "--n", "500"], ["draw", out, "--alpha", "0.1"], ["check", out, "--count", "3"]):
        with pytest.raises(InputError, match=f"takes no {words[2]}"):  # no option is passed over in silence
            runner.invoke(app, ["heads", *words], catch_exceptions=False)
