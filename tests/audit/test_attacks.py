"""Attacks on published tables: what whoever publishes one can edit, and what the audit makes of it.

Each attack is an edit of rows or of the JSON beside them. Its verdict says which check finds it, or why none can: an edit that
changes no certificate, or one that makes the table true of something else, which is then what it says. No attack that raises a
radius, or certified accuracy, passes without a finding or a caveat.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsrouter import AdaptivePlan, Execution, ExpertPool, RoutedSmooth, Terms
from rsrouter.audit import AuditReport, audit
from rsrouter.core.errors import PlanError, RSRouterError
from rsrouter.core.recompute import recompute
from rsrouter.data import ImageData, from_arrays
from rsrouter.jobs import certify_table
from rsrouter.results import Row, Table, read_table
from rsrouter.results.rows import COLUMNS
from tests.helpers import small_router as small

COUNT = 16
PLAN = AdaptivePlan(2000, (0.1, 0.2, 0.3), 50)


def labelled(seed: int = 0) -> ImageData:
    """Images of which every fifth has another label than it looks like."""
    data = small.images(COUNT, seed)
    labels = np.array([(label + (i % 5 == 0)) % small.CLASSES for i, (_, label) in enumerate(data)])
    return from_arrays(small.pixels(data), labels, name="bright columns")


@dataclass
class Publication:
    """A run that can be edited: cells by row and column, and the JSON."""

    folder: Path
    rows: list[dict[str, str]]
    about: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Publication:
        lines = (folder / "certificates.tsv").read_text().splitlines()
        rows = [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines[1:]]
        return cls(folder, rows, json.loads((folder / "certificates.json").read_text()))

    def write(self) -> None:
        lines = ["\t".join(COLUMNS), *("\t".join(row[c] for c in COLUMNS) for row in self.rows)]
        (self.folder / "certificates.tsv").write_text("\n".join(lines) + "\n")
        (self.folder / "certificates.json").write_text(json.dumps(self.about))

    def certified(self) -> list[dict[str, str]]:
        return [row for row in self.rows if row["predict"] != "-1"]

    def counts(self, row: dict[str, str]) -> dict[str, dict[str, list[int]]]:
        content: dict[str, dict[str, list[int]]] = json.loads(row["counts"])
        return content

    def follow(self, row: dict[str, str], votes: dict[str, dict[str, list[int]]]) -> None:
        """Makes every cell of a row follow from `votes`, as `certify` would write it."""
        routed = RoutedSmooth.from_pretrained(self.folder / "router")
        terms = Terms.from_dict(self.about["terms"])
        (made,) = recompute(routed.tree, terms.plan, routed.routed.split(terms), [votes], sides=str(terms.sides))
        if isinstance(made, Exception):
            raise made
        new = Row.from_certificate(
            made, idx=int(row["idx"]), label=int(row["label"]), seconds=float(row["time"]), rule=terms.rule, seed=terms.seed
        )
        row.update(zip(COLUMNS, new.cells(), strict=True))


Edit = Callable[[Publication], None]
ATTACKS: dict[str, tuple[Edit, str]] = {}


def attack(name: str, verdict: str) -> Callable[[Edit], Edit]:
    """Registers an attack. `verdict`: the check that finds it; `note` for a caveat; `refused` for a table that is not read;
    `harmless: why` for one that no audit needs to find."""

    def add(edit: Edit) -> Edit:
        ATTACKS[name] = edit, verdict
        return edit

    return add


def cell(column: str, change: Callable[[str], str], verdict: str, name: str) -> None:
    """One attack: a certified row's cell is changed."""

    def edit(p: Publication) -> None:
        row = p.certified()[0]
        row[column] = change(row[column])
        row["correct"] = str(int(row["label"] == row["predict"]))

    ATTACKS[f"row: {column} {name}"] = edit, verdict


def up(step: float) -> Callable[[str], str]:
    return lambda text: f"{float(text) + step:.8f}"


cell("radius", up(0.01), "radii", "up")
cell("radius", up(1e-6), "radii", "up by a millionth")
cell("radius", up(-0.01), "radii", "down")
cell("r_router", up(0.01), "radii", "up")
cell("r_router", up(-0.01), "radii", "down")
cell("r_expert", up(0.01), "radii", "up")
cell("r_expert", up(-0.01), "radii", "down")
cell("n_drawn", lambda text: str(int(text) - 1000), "radii", "down")
cell("n_drawn", lambda text: str(int(text) + 1000), "radii", "up")
cell("predict", lambda text: str((int(text) + 1) % 3), "radii", "of another class")
cell("expert", lambda text: "sigma_0.5" if text == "sigma_0.25" else "sigma_0.25", "radii", "of another")
cell("expert", lambda text: "", "radii", "removed")
cell("rule", lambda text: "min", "radii", "of another")
cell("seed", lambda text: str(int(text) + 1), "radii", "of another")
cell("seed", lambda text: "", "radii", "removed")
cell("bound_by", lambda text: "sigma_0.5" if text != "sigma_0.5" else "router", "radii", "of another stage")
cell("counts", lambda text: "", "radii", "removed")
cell("time", lambda text: "0.001", "harmless: seconds are part of no certificate, and the machine's own word", "down")
cell("idx", lambda text: str(COUNT + 5), "refused", "outside the data")
cell("core", lambda text: "1", "refused", "beside a certified class")


@attack("row: label edited to the prediction, in every row", "labels")
def _(p: Publication) -> None:
    for row in p.certified():
        row["label"], row["correct"] = row["predict"], "1"


@attack("row: labels of wrong rows removed, so that they do not count", "labels")
def _(p: Publication) -> None:
    for row in p.rows:
        if row["correct"] == "0":
            row["label"], row["correct"] = "-1", "-1"


@attack("row: correct alone edited", "refused")
def _(p: Publication) -> None:
    next(row for row in p.rows if row["correct"] == "0")["correct"] = "1"


@attack("row: core answers where the router has none", "radii")
def _(p: Publication) -> None:
    next(row for row in p.rows if row["predict"] == "-1")["core"] = "1"


@attack("row: an abstention given a class", "radii")
def _(p: Publication) -> None:
    row = next(row for row in p.rows if row["predict"] == "-1")
    row["predict"], row["correct"] = row["label"], "1"


@attack("row: the wrong rows deleted", "images")
def _(p: Publication) -> None:
    p.rows[:] = [row for row in p.rows if row["correct"] == "1"]


@attack("row: the wrong rows deleted, and the job said to be the others", "note")
def _(p: Publication) -> None:
    p.rows[:] = [row for row in p.rows if row["correct"] == "1"]
    p.about["indices"] = [[int(row["idx"]), int(row["idx"]) + 1, 1] for row in p.rows]
    p.about["num_images"] = len(p.rows)


@attack("row: one duplicated", "refused")
def _(p: Publication) -> None:
    p.rows.append(dict(p.certified()[0]))


@attack("row: one duplicated under the id of a deleted one", "repeats")
def _(p: Publication) -> None:
    row = next(row for row in p.rows if row["predict"] == "-1")
    row.update({k: v for k, v in p.certified()[0].items() if k not in ("idx", "label")})
    row["correct"] = str(int(row["label"] == row["predict"]))


@attack("row: two swapped but for their ids", "votes")
def _(p: Publication) -> None:
    a, b = p.certified()[0], p.certified()[3]
    a["idx"], b["idx"] = b["idx"], a["idx"]


@attack("row: in another order", "harmless: the same certificates")
def _(p: Publication) -> None:
    p.rows.reverse()


def spread(p: Publication, share: float, *, rows: int | None = None) -> None:
    """Moves a share of every estimation vote to the outcome that its stage favours, and makes the rows follow."""
    for row in p.certified()[:rows]:
        votes = p.counts(row)
        votes.pop("earlier", None)
        for counts in votes["estimate"].values():
            top, left = int(np.argmax(counts)), max(1, round(share * sum(counts)))
            for k in range(len(counts)):
                take = 0 if k == top else min(counts[k], left)
                counts[k], counts[top], left = counts[k] - take, counts[top] + take, left - take
        p.follow(row, votes)


@attack("votes: one row's moved to its class, its cells made to follow", "votes")
def _(p: Publication) -> None:
    spread(p, 0.05, rows=1)


@attack("votes: one vote in a thousand moved to the class in every row", "votes")
def _(p: Publication) -> None:
    spread(p, 0.001)


@attack("votes: moved to the class in every row, on 64 threads", "votes")
def _(p: Publication) -> None:
    spread(p, 0.004)
    p.about["info"]["threads"] = 64


@attack("votes: one in a hundred moved in every row, on another torch", "votes")
def _(p: Publication) -> None:
    spread(p, 0.01)
    p.about["versions"]["torch"] = "2.99"


@attack("votes: moved to the class in two rows, on another processor", "note")
def _(p: Publication) -> None:
    spread(p, 0.002, rows=2)
    p.about["info"]["instructions"] = "AVX9"


@attack("votes: moved to the class in every row, on a GPU that is not here", "note")
def _(p: Publication) -> None:
    spread(p, 0.004)
    p.about["device"] = "Some GPU"


@attack("votes: moved to the class in every row, of another noise stream", "note")
def _(p: Publication) -> None:
    spread(p, 0.004)
    p.about["stream"] = {"chunk": 64}


@attack("votes: selection edited to another class", "votes")
def _(p: Publication) -> None:
    row = p.certified()[0]
    votes = p.counts(row)
    for counts in votes["select"].values():
        counts[:] = [counts[(k + 1) % 3] for k in range(3)] + counts[3:] if len(counts) == 4 else counts
    p.follow(row, votes)


@attack("votes: an earlier look invented", "votes")
def _(p: Publication) -> None:
    """Unanimous votes at a look before the last, wherever that gives a better bound."""
    edited = False
    for row in p.certified():
        votes, before = p.counts(row), float(row["radius"])
        for stage, counts in votes["estimate"].items():
            top = int(np.argmax(counts))
            look = max((n for n in PLAN.looks if n <= counts[top] and n < sum(counts)), default=0)
            invented = [look if k == top else 0 for k in range(len(counts))]
            with contextlib.suppress(PlanError):
                p.follow(row, {**votes, "earlier": {**votes.get("earlier", {}), f"{stage}@{look}": invented}})
        edited |= float(row["radius"]) > before
    assert edited


@attack("votes: earlier looks removed", "harmless: a bound fewer, so no radius grows")
def _(p: Publication) -> None:
    for row in p.certified():
        votes = p.counts(row)
        votes.pop("earlier", None)
        p.follow(row, votes)


@attack("votes: of a stage that the tree does not have", "radii")
def _(p: Publication) -> None:
    row = p.certified()[0]
    votes = p.counts(row)
    votes["estimate"]["extra"] = [1000, 0, 0, 0]
    row["counts"] = json.dumps(votes, separators=(",", ":"))


@attack("votes: negative", "refused")
def _(p: Publication) -> None:
    row = p.certified()[0]
    row["counts"] = row["counts"].replace("[", "[-1,", 1)


def field(name: str, change: Callable[[dict[str, Any]], None], verdict: str) -> None:
    """One attack: the JSON alone is edited."""
    ATTACKS[f"json: {name}"] = (lambda p: change(p.about)), verdict


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(about: dict[str, Any]) -> None:
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = value

    return change


field("digest of another", put("digest", value="0" * 64), "digests")
field("an expert's digest", lambda m: m["experts"][0].update(digest="0" * 64), "digests")
field("an expert's sigma up", lambda m: m["experts"][1].update(sigma=1.0), "digests")
field("an expert removed", lambda m: m["experts"].pop(), "digests")
field("a stage's sigma up", lambda m: m["tree"]["stages"][1].update(sigma=1.0), "digests")
field("a stage leads elsewhere", lambda m: m["tree"]["stages"][-1].update(leads_to=[1, 0, 2, -1]), "digests")
field("role of a single expert", put("role", value="expert"), "digests")
field("router of another kind", put("router", value="cascade"), "digests")
field("kernels of other arithmetic", put("kernels", value={"float32": "tf32"}), "digests")
field("noise of another kind", put("noise", value="sound"), "digests")
field("noise shared by all images", put("noise", value="gaussian-shared"), "digests")
field("noise that depends said to be independent", put("independent_noise", value=True), "harmless: it is read from the noise")
field("dtype of another execution", put("execution", "dtype", value="bfloat16"), "execution")
field("fold of another execution", put("execution", "fold", value=False), "execution")
field("batch of another execution", put("execution", "batch", value=500), "execution")
field("alpha up", put("terms", "alpha", value=0.1), "radii")
field("alpha down", put("terms", "alpha", value=1e-6), "radii")
field("sides one", put("terms", "sides", value="one"), "radii")
field("rule min", put("terms", "rule", value="min"), "radii")
field("seed of another", put("terms", "seed", value=5), "seed")
field("seed_from invented", put("seed_from", value="2026-01-01"), "seed")
field("seed said to be chosen", put("seed_derived", value=False), "seed")
field("plan with more votes", put("terms", "plan", "n_max", value=4000), "radii")
field("plan that spends less on its looks", put("terms", "plan", "last_share", value=0.99), "radii")
field("plan of a fixed number of votes", put("terms", "plan", value={"kind": "fixed", "n0": 50, "n": 2000}), "radii")
field(
    "plan with another grid",
    put("terms", "plan", "radii", value=[0.1, 0.3]),
    "harmless: it says when to stop; no bound reads it",
)
field("beta", put("terms", "plan", "beta", value=0.2), "harmless: it steers what is drawn; no bound and no seed reads it")
field("num_images up", put("num_images", value=COUNT + 1), "refused")
field("more images in the job", lambda m: m.update(num_images=COUNT + 1, indices=[[0, COUNT + 1, 1]]), "images")
field("said to be a shard", put("shard", value={"index": 0, "count": 1}), "images")
field("a smaller data set", lambda m: m["data"].update(images=COUNT - 1), "labels")
field("another data set's fingerprint", lambda m: m["data"].update(fingerprint="0" * 64), "note")
field(
    "another data set's name",
    lambda m: m["data"].update(name="ImageNet"),
    "harmless: a name is the publisher's word; fingerprint, labels and, by the votes, pixels are compared",
)
field("kind", put("kind", value="results"), "refused")
field("device of another kind", put("device", value="Some GPU"), "execution")
field("stream of other chunks", put("stream", value={"chunk": 7}), "note")
field("schema_version of before", put("schema_version", value=1), "refused")
field("terms removed", lambda m: m.pop("terms"), "refused")
field("name of another run", put("name", value="state of the art"), "harmless: a name is no claim")
field("platform of another machine", lambda m: m["info"].update(platform="a better one"), "harmless: it decides nothing")
field("threads", lambda m: m["info"].update(threads=64), "harmless: the votes agree bit for bit all the same")
field(
    "torch of another version", lambda m: m["versions"].update(torch="1.0"), "harmless: the votes agree bit for bit all the same"
)


@attack("json: of another valid table, alpha and radii made to follow", "harmless: it is the table at that alpha, and says so")
def _(p: Publication) -> None:
    p.about["terms"]["alpha"] = 0.05
    for row in p.rows:
        votes = p.counts(row)
        p.follow(row, votes)


def of_another(**changes: Any) -> Edit:
    def edit(p: Publication) -> None:
        routed = RoutedSmooth.from_pretrained(p.folder / "router")
        execution = changes.get("execution", routed.execution)
        other = RoutedSmooth(routed.pool, routed.router, execution=execution, noise=changes.get("noise", "gaussian"))
        for file in ("certificates.tsv", "certificates.json"):
            (p.folder / file).unlink()
        terms = Terms(PLAN, seed=changes.get("seed"))
        certify_table(other, labelled(changes.get("images", 0)), p.folder / "certificates.tsv", terms)
        again = Publication.read(p.folder)
        p.rows, p.about = again.rows, again.about

    return edit


ATTACKS["table: of another execution"] = of_another(execution=Execution(dtype="bfloat16")), "execution"
ATTACKS["table: of other noise"] = of_another(noise="sound"), "digests"
ATTACKS["table: of a seed that was shopped for"] = of_another(seed=7), "seed"
ATTACKS["table: of other images"] = of_another(images=3), "votes"


@attack("table: of a seed that was shopped for, said to be derived", "seed")
def _(p: Publication) -> None:
    of_another(seed=7)(p)
    p.about["seed_derived"] = True


@attack("table: rows of another valid table, which share its seed", "votes")
def _(p: Publication) -> None:
    mine = {row["idx"]: row for row in p.rows}
    of_another(images=3)(p)
    p.rows[:10] = [mine[row["idx"]] for row in p.rows[:10]]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    routed = small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))
    routed.save_pretrained(folder / "router")
    certify_table(routed, labelled(), folder / "certificates.tsv", PLAN)
    return folder


@pytest.fixture(scope="module")
def data() -> ImageData:
    return labelled()


def gains(before: Table, after: Table) -> bool:
    """Whether a radius grew, or certified accuracy at some radius."""
    place = {int(i): at for at, i in enumerate(before.idx)}
    common = [(place[int(i)], at) for at, i in enumerate(after.idx) if int(i) in place]
    grew = any(after.radius[b] > before.radius[a] for a, b in common)

    def accuracy(table: Table) -> np.ndarray:
        known = table.correct >= 0
        return np.array([((table.correct == 1) & (table.radius >= r))[known].mean() for r in (1e-9, 0.1, 0.2, 0.3)])

    return grew or bool(np.any(accuracy(after) > accuracy(before)))


def test_an_honest_table_passes(honest: Path, data: ImageData) -> None:
    report = audit(honest, data=data, rows=None, seed=1, attack_steps=0)
    assert report.ok, str(report)
    assert report.caveats == ()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(honest: Path, data: ImageData, tmp_path: Path, name: str) -> None:
    edit, verdict = ATTACKS[name]
    (tmp_path / "router").symlink_to(honest / "router")
    for file in ("certificates.tsv", "certificates.json"):
        (tmp_path / file).write_bytes((honest / file).read_bytes())
    p = Publication.read(tmp_path)
    edit(p)
    p.write()
    try:
        # votes are drawn again for every row where they decide the verdict, and for two where reading the table does
        rows = 2 if verdict in ("radii", "labels", "images", "digests", "execution", "seed") else None
        report: AuditReport | None = audit(tmp_path, data=data, rows=rows, seed=1, fresh_votes=200, attack_steps=0)
    except RSRouterError:
        assert verdict == "refused"
        return
    assert report is not None
    failed = {c.name for c in report.checks if c.status == "failed"}
    if verdict.startswith("harmless"):
        assert not failed, str(report)
        same_terms = p.about["terms"]["alpha"] == json.loads((honest / "certificates.json").read_text())["terms"]["alpha"]
        assert not (same_terms and gains(read_table(honest / "certificates.tsv"), read_table(tmp_path / "certificates.tsv")))
    elif verdict == "note":
        assert report.caveats
    else:
        assert verdict in failed, str(report)
        assert report.exit_status == 1


def test_every_field_is_attacked(honest: Path) -> None:
    assert len(ATTACKS) >= 40
    edited = {"correct"} | {name.split()[1] for name in ATTACKS if name.startswith("row: ")}
    assert edited >= set(COLUMNS)
    fields = set()
    for name, (edit, _) in ATTACKS.items():
        if name.startswith("json: "):
            p = Publication.read(honest)
            before = json.loads(json.dumps(p.about))
            edit(p)
            fields |= {key for key in before if before[key] != p.about.get(key)}
    assert fields >= set(Publication.read(honest).about)
