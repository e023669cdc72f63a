"""The model card of a routed classifier: every number in it comes from the results tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from rsrouter._version import __version__
from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert
from rsrouter.report import Summary, summarise, wrong_certificates
from rsrouter.report.summary import Series
from rsrouter.results import Table, TableMetadata
from rsrouter.sampling.noise import SHARED
from rsrouter.serialise import Saved, origins

BEGIN, END = "<!-- rsrouter:begin -->", "<!-- rsrouter:end -->"
TEMPLATE = "card.md.j2"
_PERCENT = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d+)?)\s*(?:%|percent\b|per cent\b)")
_SAFE = re.compile(r"[^A-Za-z0-9._-]+")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("rsrouter", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


@dataclass(frozen=True)
class Card:
    """A rendered card.

    Attributes:
        text: the whole README.md.
        data: its metadata, as huggingface_hub reads them.
        summary: the numbers behind it; None without tables.
    """

    text: str
    data: ModelCardData
    summary: Summary | None


def render_card(
    routed: Saved,
    repo_id: str,
    tables: Sequence[Table] = (),
    *,
    licence: str = "apache-2.0",
    title: str | None = None,
    figure: str | None = None,
) -> Card:
    """The card of `routed`, from its tables.

    Args:
        routed: experts with provenance.
        repo_id: `org/name`, for the snippet and commands.
        tables: results of the routed classifier, and of its experts alone where there are any; labelled or not.
        licence: of the router, an identifier that the Hub knows.
        title: heading; default: the repository's name.
        figure: path of the curve inside the repository.

    Raises:
        InputError: an expert without provenance, or tables that cannot be put side by side.
        ResultsError: a table that does not say how it was made.
    """
    summary = summarise(list(tables), common=True) if tables else None
    experts = [_expert(e) for e in routed.pool]
    body = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=title or repo_id.split("/")[-1],
            repo_id=repo_id,
            version=__version__,
            shape=", ".join(map(str, routed.pool.input_shape)),
            experts=[origin for group in experts for origin in group],
            on_hub=all(origin["hub"] for group in experts for origin in group),
            router_kind=routed.router.kind,
            router_bytes=f"{sum(t.numel() * t.element_size() for t in routed.router.modules.state_dict().values()):,}",
            results=None if summary is None else _results(summary, list(tables), repo_id, figure),
            noise=routed.noise,
        )
    )
    body = re.sub(r"\n{3,}", "\n\n", body)
    data = ModelCardData(
        library_name="rsrouter",
        license=licence,
        pipeline_tag="image-classification",
        tags=["randomized-smoothing", "certified-robustness", "rsrouter"],
        base_model=list(dict.fromkeys(origin["repo"] for group in experts for origin in group if origin["hub"])),
        base_model_relation="adapter",
        model_name=repo_id.split("/")[-1],
        eval_results=None if summary is None else _eval_results(summary),
    )
    return Card(f"---\n{data.to_yaml()}\n---\n\n{body}", data, summary)


def _expert(expert: Expert) -> list[dict[str, Any]]:
    found = origins(expert)
    if not found:
        raise InputError(
            f"Expert {expert.name!r} has no origin",
            expected="an expert with provenance",
            received="a module made in memory",
            remedy="save it and load it from there",
        )
    rows = [
        {
            "name": expert.name,
            "sigma": f"{expert.sigma:g}",
            "repo": p.location,
            "hub": p.source == "hub",
            "where": f"[{p.location}](https://huggingface.co/{p.location})"
            if p.source == "hub"
            else f"{p.source}: {p.location.split('/')[-1]}",
            "revision": p.revision,
            "sha256": p.sha256,
            "filename": p.filename,
            "licence": p.licence,
        }
        for p in found
    ]
    return rows


def _results(summary: Summary, tables: list[Table], repo_id: str, figure: str | None) -> dict[str, Any]:
    runs = [(table, table.described()) for table in tables]
    main = next(run for table, run in runs if table.name == summary.main.name)
    images, shared = len(summary.main), main.noise.endswith(SHARED)
    return {
        "quantity": "certified accuracy" if summary.labelled else "certified share",
        "labelled": summary.labelled,
        "confidence": f"{100 * summary.confidence:g}",
        "lines": _lines(summary),
        "figure": figure,
        "runs": [_run(table, run, repo_id) for table, run in runs],
        "alpha": f"{main.alpha:g}",
        "one_minus_alpha": f"{1 - main.alpha:g}",
        "images": f"{images:,}",
        "expected_wrong": f"{images * main.alpha:.2g}",
        "most_wrong": wrong_certificates(images, main.alpha, delta=1e-3, independent=not shared),
        "shared": shared,
    }


def _cell(value: float, low: float | None, high: float | None) -> str:
    text = f"{100 * value:.1f}"
    return text if low is None or high is None else f"{text} ({100 * low:.1f}-{100 * high:.1f})"


def _lines(summary: Summary) -> list[str]:
    """The headline table in Markdown."""
    last = ["abstains"] + (["ACR"] if summary.labelled else [])
    lines = [
        " | ".join(["classifier", "images", *(f"r = {r:g}" for r in summary.radii), *last]),
        "|".join(["---"] * (4 + len(summary.radii))),
    ]
    if not summary.labelled:
        lines[1] = "|".join(["---"] * (3 + len(summary.radii)))
    for s in summary.series:
        cells = [
            _cell(
                float(s.at[i]),
                None if s.at_low is None else float(s.at_low[i]),
                None if s.at_high is None else float(s.at_high[i]),
            )
            for i in range(len(summary.radii))
        ]
        end = ["" if s.abstention is None else f"{100 * s.abstention:.1f}"]
        if summary.labelled:
            end.append("" if s.acr is None else f"{s.acr:.3f}")
        lines.append(" | ".join([s.name, str(len(summary.main)), *cells, *end]))
    return [f"| {line} |" if " | " in line else f"|{line}|" for line in lines]


def _run(table: Table, run: TableMetadata, repo_id: str) -> dict[str, Any]:
    data = table.metadata.get("data") or {}
    name = str(data.get("name") or "data set not named")
    plan = run.plan.to_dict()
    votes = {"fixed": "--plan fixed --n {n} --n0 {n0}", "adaptive": "--plan adaptive --n {n_max} --n0 {n0} --radii {grid}"}[
        plan["kind"]
    ]
    votes = votes.format(**plan, grid=",".join(f"{r:g}" for r in plan.get("radii", ())))
    argument = name if re.fullmatch(r"[\w./:@+-]+", name) else "DATA"
    expert = "" if run.role == "routed" else f" --expert {table.name}"
    sides = f" --sides {run.sides}"
    words = (
        f"{plan['n']:,} votes a stage" if plan["kind"] == "fixed" else f"adaptive plan, at most {plan['n_max']:,} votes a stage"
    )
    seed = "" if table.metadata.get("seed_derived") else f" --seed {run.seed}"
    votes += _part(table)
    command = f"rsrouter certify {repo_id}{expert} --data {argument} {votes} --alpha {run.alpha:g} --rule {run.rule}{sides}{seed}"
    return {
        "name": table.name,
        "data": name,
        "data_argument": argument,
        "images": f"{len(table):,}",
        "plan": f"{words}, {plan['n0']} to select",
        "rule": run.rule,
        "sides": run.sides,
        "noise": run.noise,
        "seed": run.seed,
        "seed_derived": bool(table.metadata.get("seed_derived")),
        "mean_votes": f"{float(table.n_drawn.mean()):,.0f}",
        "command": f"{command} --out {_SAFE.sub('-', table.name)}.tsv",
    }


def _part(table: Table) -> str:
    """The options that choose the certified images, "" where they are all of the data set."""
    indices = table.described().indices
    if len(indices) != 1 or indices[0] == (0, table.described().data.get("images"), 1):
        return ""
    start, stop, step = indices[0]
    every = f" --every {step}" if step != 1 else ""
    return f" --start {start} --count {step * len(range(start, stop, step))}{every}"


def _eval_results(summary: Summary) -> list[EvalResult]:
    """model-index entries: one per headline radius, of the routed classifier."""
    table, run = summary.main, summary.main.described()
    series: Series = next(s for s in summary.series if s.name == table.name)
    data = table.metadata.get("data") or {}
    name = str(data.get("name") or table.name)
    plan = run.plan.to_dict()
    quantity = "certified_accuracy" if summary.labelled else "certified_share"
    results = []
    for i, radius in enumerate(summary.radii):
        low, high = (None if end is None else round(float(100 * end[i]), 1) for end in (series.at_low, series.at_high))
        results.append(
            EvalResult(
                task_type="image-classification",
                dataset_type=_SAFE.sub("-", name).strip("-").lower() or "data",
                dataset_name=name,
                metric_type=quantity,
                metric_name=f"{quantity.replace('_', ' ').capitalize()} at L2 radius {radius:g} (percent)",
                metric_value=round(float(100 * series.at[i]), 1),
                metric_config=f"radius={radius:g}",
                metric_args={
                    "radius": float(radius),
                    "alpha": run.alpha,
                    "votes": plan.get("n", plan.get("n_max")),
                    "interval_low": low,
                    "interval_high": high,
                    "abstention": round(100 * float(series.abstention or 0.0), 1),
                    "images": len(table),
                },
                verified=False,
            )
        )
    return results


def check_claims(text: str, rendered: Card) -> None:
    """Refuses a card that claims what its tables do not say.

    The part between the markers must be what the tables render to, the model-index must be theirs, and every
    percentage in the prose around must be one of the rendered numbers.

    Args:
        text: README.md as the user wants it published.
        rendered: what the tables give.

    Raises:
        InputError: a claim that is not in the tables, with what it is.
    """
    remedy = (
        "let publish render the card (remove README.md), or keep your prose outside the markers and free of numbers of its own"
    )
    try:
        given = ModelCard(text)
        data = ModelCardData(**given.data.to_dict())  # type: ignore[no-untyped-call]
    except Exception as error:  # yaml's errors and huggingface_hub's own, all about this text
        raise InputError(
            "The card's metadata cannot be read", expected="YAML between --- lines", received=str(error)[:200], remedy=remedy
        ) from error
    wanted = {_key(r) for r in rendered.data.eval_results or []}
    claimed = {_key(r) for r in data.eval_results or []}
    if extra := sorted(claimed - wanted):
        raise InputError(
            "The card's model-index claims what the tables do not say",
            expected=f"{sorted(wanted)[:3]}, ...",
            received=str(extra[:3]),
            remedy=remedy,
        )
    if sorted(_bases(data)) != sorted(_bases(rendered.data)) and _bases(data):
        raise InputError(
            "The card names other base models than the router has",
            expected=str(_bases(rendered.data)),
            received=str(_bases(data)),
            remedy=remedy,
        )
    body, ours = given.content.partition("\n---\n")[2] or given.text, _block(rendered.text)
    theirs = _block(body)
    if theirs is not None and theirs.strip() != str(ours).strip():
        line = next(
            (a for a, b in zip(theirs.splitlines(), str(ours).splitlines(), strict=False) if a != b), "a line more or less"
        )
        raise InputError(
            "The card's generated part is not what the tables render to",
            expected="the text between the markers unchanged",
            received=repr(line[:120]),
            remedy=remedy,
        )
    prose = body.replace(theirs, "") if theirs else body
    lines = [] if rendered.summary is None else _lines(rendered.summary)[2:]
    allowed = {float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", " ".join(lines))}
    stray = [m.group(0) for m in _PERCENT.finditer(prose) if float(m.group(1)) not in allowed]
    if stray:
        raise InputError(
            "The card claims numbers that are in no table",
            expected="percentages that the tables give",
            received=", ".join(stray[:5]),
            remedy=remedy,
        )


def _key(result: EvalResult) -> tuple[str, str, str, float]:
    args = result.metric_args or {}
    return result.dataset_type, result.metric_type, f"{args.get('radius')}", float(result.metric_value)


def _bases(data: ModelCardData) -> list[str]:
    bases = data.base_model or []
    return [bases] if isinstance(bases, str) else list(bases)


def _block(text: str) -> str | None:
    start, end = text.find(BEGIN), text.find(END)
    return text[start : end + len(END)] if 0 <= start < end else None
