"""The audit passes an honest run, and catches what it must catch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rsrouter import AdaptivePlan, Expert, ExpertPool, FixedPlan, InputError, RoutedSmooth, Smooth
from rsrouter.audit import AuditReport, audit
from rsrouter.core.terms import Terms
from rsrouter.data import ImageData
from rsrouter.jobs import certify_table
from rsrouter.results import Row, read_table
from tests.helpers import small_router as small


def cells_of(run: Path) -> list[list[str]]:
    return [line.split("\t") for line in (run / "certificates.tsv").read_text().splitlines()]


def write_cells(run: Path, cells: list[list[str]]) -> None:
    (run / "certificates.tsv").write_text("\n".join("\t".join(row) for row in cells) + "\n")


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2))


def failed(report: AuditReport) -> set[str]:
    assert report.ok == (not report.findings)
    return {c.name for c in report.checks if c.status == "failed"}


def test_an_honest_run_passes(clean: Path, data: ImageData) -> None:
    report = audit(clean, data=data, rows=None, seed=1)
    assert report.ok
    assert report.complete
    assert report.exit_status == 0
    assert [c.name for c in report.checks] == [
        *("weights", "digests", "execution", "seed", "radii", "images", "repeats", "labels", "votes", "fresh", "attack")
    ]
    assert report.caveats == ()
    votes, fresh, attack = report.checks[-3:]
    assert votes.details["exact"]
    assert 0 < fresh.details["detectable_all_rows"] < fresh.details["detectable_one_row"] < 2
    assert attack.details["searched"] >= 10
    stored = json.loads(report.to_json())
    assert stored["ok"]
    assert stored["settings"]["seed"] == 1
    assert stored["environment"]["torch"] == torch.__version__


def test_without_images_the_rest_is_checked_and_says_so(clean: Path) -> None:
    report = audit(clean)
    assert report.ok
    assert not report.complete
    assert {c.name for c in report.checks if c.status == "skipped"} == {"labels", "votes", "fresh", "attack"}
    assert report.exit_status == 2
    assert "could not be checked" in str(report)


@pytest.mark.parametrize(
    "terms",
    [Terms(AdaptivePlan(1000, (0.1, 0.2, 0.3, 0.35), 50)), Terms(FixedPlan(50, 400), rule="min", sides="one")],
)
def test_other_plans_and_experts_alone_pass_too(tmp_path: Path, data: ImageData, terms: Terms) -> None:
    pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
    routed = small.routed(pool)
    routed.save_pretrained(tmp_path / "router")
    certify_table(routed, data, tmp_path / "certificates.tsv", terms)
    certify_table(Smooth(pool[0]), data, tmp_path / "experts" / "sigma_0.25.tsv", terms.plan)
    report = audit(tmp_path, data=data, rows=None, seed=2)
    assert report.ok, str(report)
    assert set(report.tables) == {"certificates", "sigma_0.25"}


def test_ids_may_be_left_out(run: Path, data: ImageData) -> None:
    """Certificates made by `RoutedSmooth.certify` itself name their images by content alone."""
    routed = RoutedSmooth.from_pretrained(run / "router")
    certificates, seed = routed.certify(small.pixels(data), small.PLAN), routed.routed.default_seed()
    lines = [
        Row.from_certificate(c, idx=i, label=data[i][1], rule="tree", seed=seed).to_line() for i, c in enumerate(certificates)
    ]
    header = (run / "certificates.tsv").read_text().splitlines(keepends=True)[0]
    (run / "certificates.tsv").write_text("".join([header, *lines]))
    assert audit(run, data=data, rows=None, seed=3, attack_steps=0).ok


def test_one_radius_inflated_by_one_percent_in_any_row(run: Path) -> None:
    honest = cells_of(run)
    column = honest[0].index("radius")
    certified = [i for i in range(1, len(honest)) if float(honest[i][column]) > 0]
    assert len(certified) >= 10
    for i in certified:
        cells = [list(row) for row in honest]
        cells[i][column] = f"{float(cells[i][column]) * 1.01:.8f}"
        write_cells(run, cells)
        report = audit(run)
        assert failed(report) == {"radii"}
        assert [f.idx for f in report.findings] == [int(cells[i][0])]
        assert report.exit_status == 1


@pytest.mark.parametrize(
    ("column", "value"), [("predict", "2"), ("n_drawn", "7"), ("expert", "sigma_9"), ("r_expert", "9.0"), ("seed", "5")]
)
def test_other_cells(run: Path, column: str, value: str) -> None:
    cells = cells_of(run)
    cells[1][cells[0].index(column)] = value
    if column == "predict":
        cells[1][cells[0].index("correct")] = "0"
    write_cells(run, cells)
    assert failed(audit(run)) == {"radii"}


def test_swapped_expert_weights(run: Path, data: ImageData) -> None:
    experts = run / "router" / "experts"
    first, second = (experts / n / "model.safetensors" for n in ("sigma_0.25", "sigma_0.5"))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    report = audit(run, data=data)
    assert failed(report) == {"weights"}
    assert "sha256" in report.findings[0].text or "digest" in report.findings[0].text


def test_swapped_weights_with_every_digest_made_to_fit(run: Path, data: ImageData) -> None:
    """Somebody saves other experts properly, and keeps the old table."""
    other = ExpertPool([small.expert(0.25, tilt=0.02), small.expert(0.5)])
    small.routed(other).save_pretrained(run / "router")
    assert "digests" in failed(audit(run))
    # ... and then edits the table's digest and seed as well
    routed = RoutedSmooth.from_pretrained(run / "router")
    seed = routed.routed.default_seed()
    experts = [{"name": e.name, "sigma": e.sigma, "digest": e.digest} for e in routed.pool]
    terms = {**read_table(run / "certificates.tsv").metadata["terms"], "seed": seed}
    edit(run / "certificates.json", lambda m: m.update(digest=routed.digest, terms=terms, experts=experts))
    cells = cells_of(run)
    for row in cells[1:]:
        row[cells[0].index("seed")] = str(seed)
    write_cells(run, cells)
    assert failed(audit(run)) == set()
    assert "votes" in failed(audit(run, data=data, rows=4, attack_steps=0))


def test_a_changed_sigma(run: Path, data: ImageData) -> None:
    def larger(config: dict) -> None:
        config["pool"]["experts"][1]["sigma"] = 0.6

    edit(run / "router" / "config.json", larger)
    assert failed(audit(run)) == {"weights"}
    # saved properly, so that the router loads
    shape = {"num_classes": small.CLASSES, "input_shape": small.SHAPE}
    moved = Expert(small.expert(0.5, tilt=0.01).module, sigma=0.6, name="sigma_0.5", **shape)
    small.routed(ExpertPool([small.expert(0.25), moved])).save_pretrained(run / "router")
    report = audit(run)
    assert "digests" in failed(report)
    assert any("sigma 0.5 in the table, 0.6 in the router" in f.text for f in report.findings)


def test_a_row_copied_to_another_image(run: Path, data: ImageData) -> None:
    cells = cells_of(run)
    names = cells[0]
    donor = next(i for i in range(1, len(cells)) if cells[i][names.index("predict")] == "0")
    target = next(i for i in range(1, len(cells)) if cells[i][names.index("predict")] == "-1")
    for column in names:
        if column not in ("idx", "label", "correct"):
            cells[target][names.index(column)] = cells[donor][names.index(column)]
    cells[target][names.index("correct")] = str(int(cells[target][names.index("label")] == "0"))
    write_cells(run, cells)
    report = audit(run, data=data, rows=None, seed=4, attack_steps=0)
    idx = int(cells[target][0])
    # the seed gives this image other votes, its fresh votes are others, and two rows share theirs
    assert {(f.check, f.idx) for f in report.findings} >= {("votes", idx), ("fresh", idx)}
    assert "repeats" in failed(report)
    assert ("votes", int(cells[donor][0])) not in {(f.check, f.idx) for f in report.findings}


def test_votes_and_radius_inflated_together(run: Path, data: ImageData) -> None:
    """Counts edited so that the radius follows from them: only drawing again can tell."""
    table = read_table(run / "certificates.tsv")
    routed = RoutedSmooth.from_pretrained(run / "router")
    from rsrouter.core.recompute import recompute

    run_of = table.described()
    i = int(np.flatnonzero(table.predict >= 0)[0])
    votes = {k: {s: list(v) for s, v in stages.items()} for k, stages in table.counts(i).items()}
    for counts in votes["estimate"].values():
        top = int(np.argmax(counts))
        for k in range(len(counts)):
            if k != top:
                counts[top] += counts[k]
                counts[k] = 0
    (better,) = recompute(routed.tree, run_of.plan, run_of.split, [votes])
    assert better.radius > table.radius[i]
    lines = (run / "certificates.tsv").read_text().splitlines(keepends=True)
    lines[i + 1] = Row.from_certificate(
        better, idx=int(table.idx[i]), label=int(table.label[i]), rule="tree", seed=run_of.seed
    ).to_line()
    (run / "certificates.tsv").write_text("".join(lines))
    report = audit(run, data=data, rows=None, seed=5, attack_steps=0)
    assert {(f.check, f.idx) for f in report.findings} == {("votes", int(table.idx[i])), ("fresh", int(table.idx[i]))}
    assert any("fresh votes allow at most" in f.text for f in report.findings)


def test_a_seed_chosen_by_hand(run: Path, data: ImageData, tmp_path: Path) -> None:
    routed = RoutedSmooth.from_pretrained(run / "router")
    (run / "certificates.tsv").unlink()
    (run / "certificates.json").unlink()
    certify_table(routed, data, run / "certificates.tsv", Terms(small.PLAN, seed=12345))
    report = audit(run, data=data, seed=6)
    assert failed(report) == {"seed"}
    assert "lucky" in report.findings[0].text


def test_a_flip_inside_a_claimed_ball_is_found(run: Path, data: ImageData) -> None:
    """Radii three times too large: beyond what is true, so an attacker gets through."""
    cells = cells_of(run)
    for row in cells[1:]:
        row[3] = f"{float(row[3]) * 3:.8f}"
    write_cells(run, cells)
    report = audit(run, data=data, rows=None, seed=7)
    flips = {f.idx for f in report.findings if f.check == "attack"}
    assert len(flips) >= 6
    assert flips <= {f.idx for f in report.findings if f.check == "radii"}
    assert "instead of" in next(f.text for f in report.findings if f.check == "attack")
    assert "votes" not in failed(report)


def test_attacked_points_stay_inside(data: ImageData) -> None:
    from rsrouter.audit.attack import attack

    pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
    x, radius = small.pixels(data), torch.linspace(0.01, 2.0, len(data))
    routed = small.routed(pool)
    for eight_bit in (False, True):
        found = attack(
            routed.tree, routed.routed.models, x, torch.zeros(len(data), dtype=torch.int64), radius, steps=5, eight_bit=eight_bit
        )
        distance = (found.double() - x.double()).flatten(1).norm(dim=1)
        assert torch.all(distance < radius)
        assert found.min() >= 0
        assert found.max() <= 1
        if eight_bit:
            assert torch.allclose(found * 255, (found * 255).round(), atol=1e-3)
        else:
            assert torch.all(distance[:4] > 0.5 * radius[:4])


def test_a_damaged_router_file(run: Path) -> None:
    path = run / "router" / "router.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, path)
    assert failed(audit(run)) == {"weights"}
    path.write_bytes(b"nonsense")
    report = audit(run)  # torn on the way, perhaps: nobody is accused, and nothing is confirmed
    assert not failed(report)
    assert not report.complete


def test_what_cannot_be_audited(run: Path, tmp_path: Path, data: ImageData) -> None:
    with pytest.raises(InputError, match="No router"):
        audit(tmp_path / "nowhere")
    with pytest.raises(InputError, match="rows"):
        audit(run, rows=0)
    with pytest.raises(InputError, match="not the certified images"):
        audit(run, data=data.subset(range(3)))
    (run / "certificates.tsv").unlink()
    with pytest.raises(InputError, match="no certificates"):
        audit(run)


def test_by_name_on_the_hub(hub, tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    from rsrouter.publish import publish

    monkeypatch.setattr("rsrouter.publish.commit.load_anew", lambda *_, **__: None)  # a process; tests/publish starts it
    pool = small.put_experts(hub, tmp_path)
    small.run_folder(small.routed(pool), tmp_path / "run", data)
    done = publish(tmp_path / "run", "org/router")
    report = audit("org/router", data=data, rows=3, seed=9)
    assert report.ok, str(report)
    assert report.revision == done.commit
    assert audit("org/router", revision=done.commit, local_files_only=True).ok


def test_the_verb_and_its_exit_status(
    run: Path, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from rsrouter.cli import main

    images = np.stack([(data.image(i).numpy() * 255).round() for i in range(len(data))]).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.array([data[i][1] for i in range(len(data))]))
    arguments = ["audit", str(run), "--data", str(tmp_path / "images.npz"), "--rows", "2", "--out", str(tmp_path / "audit.json")]

    def status(*extra: str) -> object:
        monkeypatch.setattr("sys.argv", ["rsrouter", *arguments, *extra])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    assert status() == 0  # two of sixteen rows: a note, no finding
    assert json.loads((tmp_path / "audit.json").read_text())["ok"] is True
    cells = cells_of(run)
    cells[1][3] = "1.5"
    write_cells(run, cells)
    before = (tmp_path / "audit.json").read_bytes()
    assert status() == 2
    assert "The output file exists" in capsys.readouterr().err
    assert (tmp_path / "audit.json").read_bytes() == before  # it might have been the table, or the images
    (tmp_path / "audit.json").unlink()
    assert status("--format", "json") == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["check"] == "radii"
    monkeypatch.setattr("sys.argv", ["rsrouter", "audit", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2


@pytest.mark.parametrize("noise", ["sound", "gaussian-shared"])
def test_other_kinds_of_noise(tmp_path: Path, data: ImageData, noise: str) -> None:
    made = small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))
    routed = RoutedSmooth(made.pool, made.router, noise=noise)
    routed.save_pretrained(tmp_path / "router")
    certify_table(routed, data, tmp_path / "certificates.tsv", FixedPlan(50, 500), seed_from="a test")
    report = audit(tmp_path, data=data, rows=6, seed=11)
    assert report.ok, str(report)
    assert report.complete


def test_votes_of_another_stream_are_not_compared(run: Path, data: ImageData) -> None:
    edit(run / "certificates.json", lambda m: m.update(stream={"chunk": 7}))
    report = audit(run, data=data, rows=2, seed=12, attack_steps=0)
    assert report.exit_status == 2
    assert next(c for c in report.checks if c.name == "votes").status == "skipped"


def test_an_architecture_that_is_not_registered_here_is_no_finding(run: Path, data: ImageData, monkeypatch) -> None:
    from rsrouter.core.errors import ArchitectureError

    def unknown(*_: object, **__: object) -> None:
        raise ArchitectureError("Unknown architecture 'mine'", remedy="rsrouter.register_architecture('mine', Mine)")

    monkeypatch.setattr(RoutedSmooth, "from_pretrained", unknown)
    report = audit(run, data=data)
    assert report.ok
    assert report.exit_status == 2
    weights = report.checks[0]
    assert (weights.name, weights.status) == ("weights", "skipped")
    assert "register_architecture" in weights.summary
    assert {c.name for c in report.checks if c.status == "passed"} == {"radii", "images", "repeats", "labels"}


def test_few_rows_say_what_they_may_miss(run: Path, data: ImageData) -> None:
    report = audit(run, data=data, rows=4, seed=13, attack_steps=0)
    (caveat,) = report.caveats
    assert "4 of 16 rows" in caveat
    assert "probability 0.25, one of five with 0.82" in caveat  # 1 - C(11,4) / C(16,4)
    assert caveat in str(report).splitlines()[1]


@pytest.mark.slow
def test_the_bundled_experts(tmp_path: Path) -> None:
    """A router over the bundled experts passes, and is caught with one expert's weights changed."""
    from rsrouter import CascadeRouter
    from rsrouter.demo import load_pool, load_slice

    pool, images = load_pool(), load_slice("test")
    routed = RoutedSmooth(pool, CascadeRouter((0.55,) * (len(pool) - 1)))
    routed.save_pretrained(tmp_path / "router")
    plan = AdaptivePlan(5000, np.arange(0.0, 2.01, 0.25))
    certify_table(routed, images, tmp_path / "certificates.tsv", plan, indices=range(40))
    report = audit(tmp_path, data=images, rows=20, seed=13)
    assert report.ok, str(report)
    assert next(c for c in report.checks if c.name == "attack").details["searched"] >= 10
    swapped = ExpertPool([*list(pool)[:-1], small_change(pool[len(pool) - 1])])
    other = RoutedSmooth(swapped, routed.router)
    edit(tmp_path / "certificates.json", lambda m: m.update(digest=other.digest))
    other.save_pretrained(tmp_path / "router")
    assert "votes" in failed(audit(tmp_path, data=images, rows=10, seed=14, attack_steps=0))


def small_change(expert):
    """The same expert with noise of a tenth of their spread on its weights."""
    import copy

    from rsrouter import Expert

    module = copy.deepcopy(expert.module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.1 * weight.std(unbiased=False) * torch.randn(weight.shape, generator=generator)
    return Expert(
        module,
        sigma=expert.sigma,
        num_classes=expert.num_classes,
        input_shape=expert.input_shape,
        mean=expert.mean,
        std=expert.std,
        name=expert.name,
    )


CLAIMS = {
    "threads": lambda m: m["info"].update(threads=64),
    "instructions": lambda m: m["info"].update(instructions="AVX9"),
    "torch": lambda m: m["versions"].update(torch="1.0"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_the_table_claims_about_its_machine_weakens_nothing_while_the_votes_agree(run: Path, data: ImageData, claim) -> None:
    edit(run / "certificates.json", CLAIMS[claim])
    report = audit(run, data=data, rows=None, seed=8, attack_steps=0)
    votes = next(c for c in report.checks if c.name == "votes")
    assert report.ok
    assert report.caveats == ()
    assert votes.details["exact"]
    assert claim in votes.details["differs"][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moved_votes_are_allowed_for_rounding_alone(
    run: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """None on the same machine; elsewhere a share of the row's votes that depends on the dtype, in either direction, and the
    audit says so before anything else."""
    from rsrouter.audit import rows

    saved = RoutedSmooth.from_pretrained(run / "router")
    saved.with_execution(replace(saved.execution, dtype=dtype)).save_pretrained(run / "router")
    edit(run / "certificates.json", lambda m: m["execution"].update(dtype=dtype))
    cap = {"float32": 50, "bfloat16": 100}[dtype]
    leans = [1, -1] * 8

    def report(moved: int, lean: list[int]) -> AuditReport:
        told = iter(lean)
        monkeypatch.setattr(rows, "moved_votes", lambda stored, again: (moved, 10_000))
        monkeypatch.setattr(rows, "lean", lambda row, again: next(told))
        return audit(run, data=data, rows=None, seed=8, fresh_votes=100, attack_steps=0)

    assert "votes" not in failed(report(0, leans))
    assert "votes" in failed(report(1, leans))
    edit(run / "certificates.json", CLAIMS["torch"])
    found = report(cap, leans)
    assert "votes" not in failed(found)
    assert "its JSON names another machine (torch 1.0 against" in found.caveats[0]
    assert "votes" in failed(report(cap + 1, leans))
    assert "votes" in failed(report(cap, [1] * 16))
    assert "votes" not in failed(report(cap, [-1] * 16))


def test_an_attack_leaves_the_users_modules_alone(data: ImageData) -> None:
    from rsrouter.audit.attack import attack

    class Keeps(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x.detach().clone()
            return super().forward(x)

    expert = small.expert(0.25)
    kept = Keeps(expert.module).train()
    smooth = Smooth(Expert(kept, sigma=0.25, num_classes=expert.num_classes, input_shape=expert.input_shape))
    x = small.pixels(data)[:2]
    attack(smooth.tree, smooth.routed.models, x, torch.zeros(2, dtype=torch.int64), torch.ones(2), steps=2)
    assert kept.training
    assert not hasattr(kept, "last")
    smooth.predict(x, n=20)
