"""The model card of a routed classifier: every number in it comes from the results tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from rsrouter._version import __version__
from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert
from rsrouter.experts.parts import parts_of
from rsrouter.hub import is_hub_reference, parse_reference
from rsrouter.publish.commands import SAFE, certify_command, data_argument, freedom, images_in_words
from rsrouter.publish.licences import restricted
from rsrouter.publish.sources import OWN, PAPERS, cited
from rsrouter.report import Summary, summarise, wrong_certificates
from rsrouter.report.summary import Series
from rsrouter.results import Table, markdown, printable
from rsrouter.router.words import decides
from rsrouter.serialise import Saved

BEGIN, END = "<!-- rsrouter:begin -->", "<!-- rsrouter:end -->"
TEMPLATE = "card.md.j2"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rsrouter", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = lambda value: Markup(text_of(value))
    return environment


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


def text_of(value: object) -> str:
    """`value` as text in Markdown that is nothing but text: names and licences are other people's.

    >>> text_of("sigma_0.25"), text_of("[mit](x) <b>")
    ('sigma_0.25', '\\\\[mit\\\\]\\\\(x\\\\) \\\\<b\\\\>')
    """
    plain = printable(value)
    if re.search(r"://|www\.", plain, re.IGNORECASE):  # escapes do not keep these from becoming links
        return "`" + re.sub(r"[`|]", " ", plain) + "`"
    return plain if re.fullmatch(r"[\w ./+@:,;%='()-]*", plain, re.ASCII) else markdown(plain)


def render_card(
    routed: Saved,
    repo_id: str,
    tables: Sequence[Table] = (),
    *,
    licence: str = "apache-2.0",
    title: str | None = None,
    figure: str | None = None,
    needs: Mapping[str, str] | None = None,
    imports: Sequence[str] = (),
) -> Card:
    """The card of `routed`, from its tables.

    Args:
        routed: experts with provenance.
        repo_id: `org/name`, for the snippet and commands.
        tables: results of the routed classifier, and of its experts alone where there are any; labelled or not.
        licence: of the router, an identifier that the Hub knows.
        title: heading; default: the repository's name.
        figure: path of the curve inside the repository.
        needs: packages beside rsrouter that build the networks, with tested versions.
        imports: modules that must be imported before loading.

    Raises:
        InputError: an expert without provenance, or tables that cannot be put side by side.
        ResultsError: a table that does not say how it was made.
    """
    summary = summarise(list(tables), common=True) if tables else None
    rows = [row for expert in routed.pool.members for row in _expert(expert)]
    router, made_of = routed.router, [e.provenance for e in routed.pool.members if e.provenance is not None]
    papers = [PAPERS[key] for key in cited(router.kind, routed.noise, made_of)]
    if routed.pool.core is not None:
        papers.append(PAPERS["horvath2022b"])
    sets = sorted({name for table in tables if (name := _on_hub(table)) is not None})
    body = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=text_of(title or repo_id.split("/")[-1]),
            repo_id=repo_id,
            version=__version__,
            shape=", ".join(map(str, routed.pool.input_shape)),
            labels=routed.pool.labels,
            count=len(routed.pool),
            experts=rows,
            parts=any(row["part"] for row in rows),
            on_hub=all(row["hub"] for row in rows),
            restricted={text_of(name): text_of(told) for name, told in restricted(routed.pool.members).items()},
            router_kind=router.kind,
            router_bytes=f"{sum(t.numel() * t.element_size() for t in router.modules.state_dict().values()):,}",
            core=None if routed.pool.core is None else text_of(routed.pool.core.name),
            decides=[text_of(line) for line in decides(routed.routed, routed.pool.names)],
            needs=needs or {},
            imports=imports,
            results=None if summary is None else _results(summary, list(tables), routed, repo_id, figure, imports),
            noise=routed.noise,
            papers=papers,
            bibtex=[OWN, *(entry for *_, entry in papers)],
        )
    )
    body = re.sub(r"\n{3,}", "\n\n", body)
    data = ModelCardData(
        library_name="rsrouter",
        license=licence,
        pipeline_tag="image-classification",
        tags=["randomized-smoothing", "certified-robustness", "rsrouter"],
        datasets=sets or None,
        base_model=list(dict.fromkeys(row["repo"] for row in rows if row["hub"])),
        base_model_relation="adapter",
        model_name=repo_id.split("/")[-1],
        eval_results=None if summary is None else _eval_results(summary),
    )
    return Card(f"---\n{data.to_yaml()}\n---\n\n{body}", data, summary)


def _on_hub(table: Table) -> str | None:
    """The data set's repository, where the table's images came from one."""
    name = str(table.described().data.get("name") or "")
    return parse_reference(name)[0] if is_hub_reference(name) else None


def _expert(expert: Expert) -> list[dict[str, Any]]:
    """A row for each weight file of an expert."""
    if expert.provenance is None:
        raise InputError(
            f"Expert {expert.name!r} has no origin",
            expected="an expert with provenance",
            received="a module made in memory",
            remedy="save it and load it from there",
        )
    return [
        {
            "name": text_of(expert.name),
            "part": text_of(role),
            "sigma": "core" if expert.core else f"{expert.sigma:g}",
            "repo": p.location,
            "hub": p.source == "hub",
            "where": f"[{text_of(p.location)}](https://huggingface.co/{quote(p.location)})"
            if p.source == "hub"
            else f"{p.source}: {text_of(p.location.split('/')[-1])}",
            "revision": p.revision,
            "sha256": p.sha256,
            "filename": text_of(p.filename),
            "licence": text_of(p.licence or "not stated"),
        }
        for role, p in parts_of(expert.provenance, expert.sigma)
    ]


def _results(
    summary: Summary, tables: list[Table], routed: Saved, repo_id: str, figure: str | None, imports: Sequence[str]
) -> dict[str, Any]:
    main = summary.main.described()
    images = len(summary.main)
    return {
        "quantity": "certified accuracy" if summary.labelled else "certified share",
        "labelled": summary.labelled,
        "confidence": f"{100 * summary.confidence:g}",
        "lines": headline(summary),
        "natural": [text_of(n.words) for n in summary.natural],
        "standings": [text_of(s.words) for s in summary.standings],
        "figure": figure,
        "runs": [_run(table, routed, repo_id, imports) for table in tables],
        "data_argument": shlex.quote(data_argument(main)),
        "alpha": f"{main.alpha:g}",
        "one_minus_alpha": f"{1 - main.alpha:g}",
        "images": f"{images:,}",
        "expected_wrong": f"{images * main.alpha:.2g}",
        "most_wrong": wrong_certificates(images, main.alpha, delta=1e-3, independent=main.independent_noise),
        "shared": not main.independent_noise,
    }


def _cell(value: float, low: float | None, high: float | None) -> str:
    text = f"{100 * value:.1f}"
    return text if low is None or high is None else f"{text} ({100 * low:.1f}-{100 * high:.1f})"


def headline(summary: Summary) -> list[str]:
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
        lines.append(" | ".join([text_of(s.name), str(len(summary.main)), *cells, *end]))
    return [f"| {line} |" if " | " in line else f"|{line}|" for line in lines]


def _run(table: Table, routed: Saved, repo_id: str, imports: Sequence[str]) -> dict[str, Any]:
    about = table.described()
    plan = about.plan
    words = f"{plan.n_max:,} votes a stage" if plan.radii is None else f"adaptive plan, at most {plan.n_max:,} votes a stage"
    return {
        "name": text_of(table.name),
        "data": text_of(about.data.get("name") or "data set not named"),
        "images": text_of(images_in_words(about)),
        "plan": f"{words}, {plan.n0} to select",
        "rule": about.rule,
        "sides": about.sides,
        "noise": about.noise,
        "seed": about.seed,
        "seed_derived": about.seed_derived,
        "freedom": [text_of(line) for line in freedom(about, routed.router)],
        "mean_votes": f"{float(table.n_drawn.mean()):,.0f}",
        "command": certify_command(table, repo_id, imports),
    }


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
                dataset_type=SAFE.sub("-", name).strip("-").lower() or "data",
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
