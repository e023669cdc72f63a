"""One image certified before your eyes: the certificate after every look, and how it is drawn."""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rsrouter import ABSTAIN, AdaptivePlan, RoutedSmooth, Smooth, Terms
from rsrouter.core import CertifyPolicy
from rsrouter.core.requests import SELECT
from rsrouter.core.titles import stage_titles
from rsrouter.demo import load_router
from rsrouter.sampling import image_identity

ALPHA, N0, STEP = 1e-3, 100, 0.02


@dataclass
class Moment:
    """Where a certification stands.

    Attributes:
        votes: drawn so far.
        predict: class that is being certified, ABSTAIN before the selection votes name one.
        radius: certified so far.
        done: no more votes will be drawn.
        counts: votes by stage, selection votes until a stage has others.
        path: stages that decided, in order.
        limit: name of the stage that limits the radius.
        curve: (votes, radius) at every look so far.
    """

    votes: int = 0
    predict: int = ABSTAIN
    radius: float = 0.0
    done: bool = False
    counts: dict[str, list[int]] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)
    limit: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)


def as_pixels(picture: Image.Image, shape: tuple[int, ...]) -> Tensor:
    """A picture as the classifier takes it: `(C, H, W)` in [0,1], cropped to the middle."""
    picture = ImageOps.exif_transpose(picture).convert("L" if shape[0] == 1 else "RGB")
    fitted = ImageOps.fit(picture, (shape[2], shape[1]), Image.Resampling.LANCZOS)
    array = np.asarray(fitted, dtype=np.float32) / 255.0
    return torch.from_numpy(array[None] if shape[0] == 1 else array.transpose(2, 0, 1).copy())


def watch(routed: RoutedSmooth, image: Tensor, n_max: int) -> Iterator[Moment]:
    """Certifies `image (C, H, W)` and yields after every round of votes; the last moment has the final certificate.

    The seed is fresh: a visitor's certificate is nobody's to prepare for.
    """
    plan = _plan(routed, n_max)
    policy = CertifyPolicy(routed.tree, plan, routed.routed.split(Terms(plan, ALPHA)), 1)
    engine = routed.engine(secrets.randbits(60))
    identity = [image_identity(image)]
    moment = Moment()
    while not policy.done[0]:
        requests = policy.next_requests([0])
        answers = engine.run(image[None], identity, requests)
        policy.update(requests, answers)
        for request, counts in zip(requests, answers, strict=True):
            for stage, votes in counts.items():
                # selection votes enter no bound; once a stage has estimation votes only these are shown
                if request.purpose == SELECT or request.start == 0:
                    moment.counts[stage] = votes.tolist()
                else:
                    moment.counts[stage] = (np.asarray(moment.counts[stage]) + votes).tolist()
        moment.votes, moment.predict, moment.radius = policy.drawn(0), int(policy.c[0]), float(policy.radius[0])
        moment.limit, moment.done = str(policy.bound_by[0]), bool(policy.done[0])
        moment.path = _path(routed, moment)
        moment.curve.append((moment.votes, moment.radius))
        if moment.done:
            certificate = policy.certificate(0)
            moment.predict, moment.radius = certificate.predict, certificate.radius
        yield moment


def _plan(smoothed: RoutedSmooth | Smooth, n_max: int) -> AdaptivePlan:
    """Every radius that this classifier could reach is one that the visitor cares about."""
    wanted = Terms(AdaptivePlan(n_max, np.arange(STEP, 8.0, STEP), N0, growth=1.5), ALPHA)
    plan = smoothed.routed.within_reach(wanted).plan
    assert isinstance(plan, AdaptivePlan)
    return plan


def _path(routed: RoutedSmooth, moment: Moment) -> list[str]:
    """The stages that an input like this walks, by the votes so far."""
    from rsrouter.core.certify import winner

    path, at = [], routed.tree.root
    while at in moment.counts:
        path.append(at)
        target = routed.tree.stages[at].leads_to[winner(routed.tree.stages[at], np.asarray(moment.counts[at]))]
        if not isinstance(target, str):
            break
        at = target
    return path


def demo_router(folder: Path) -> RoutedSmooth:
    """The trained router in `folder/router`, else the bundled one."""
    found = folder / "router"
    return RoutedSmooth.from_pretrained(found) if (found / "config.json").is_file() else load_router()


def class_names(routed: RoutedSmooth, known: Sequence[str] = ()) -> tuple[str, ...]:
    """What people call the classes: the experts' own names, else `known` where it fits, else "class 0" and so on."""
    count = routed.pool.num_classes
    return routed.pool.labels or (tuple(known) if len(known) == count else tuple(f"class {k}" for k in range(count)))


def experts_beside(routed: RoutedSmooth, image: Tensor, n_max: int, moment: Moment, classes: Sequence[str]) -> Iterator[str]:
    """Class and radius of every expert by itself on the same image, as HTML; yields again after each of them."""
    rows = ["<tr><th>classifier</th><th>class</th><th>L2 radius</th></tr>"]
    rows += [f"<tr><th>routed</th><td>{_answer(moment.predict, classes)}</td><td>{_down(moment.radius)}</td></tr>"]
    for expert in routed.pool:
        alone = Smooth(expert, execution=routed.execution, noise=routed.noise)
        terms = Terms(_plan(alone, n_max), alpha=ALPHA, seed=secrets.randbits(60))
        (found,) = alone.certify(image[None], terms)
        answer = _answer(found.predict, classes)
        rows.append(f"<tr><th>{escape(expert.name)}</th><td>{answer}</td><td>{_down(found.radius)}</td></tr>")
        yield f'<section class="beside"><h4>Beside the experts by themselves</h4><table>{"".join(rows)}</table></section>'


def stage_names(routed: RoutedSmooth) -> dict[str, str]:
    """Stages as people call them, in the order in which they are asked."""
    return stage_titles([routed.tree.stages[name] for name in reversed(routed.tree.order)], routed.pool.names)


def worst_direction(routed: RoutedSmooth, image: Tensor, predict: int, copies: int = 16) -> Tensor:
    """Unit vector `(C, H, W)` along which the experts, under their noise, soonest leave the class `predict`."""
    generator = torch.Generator().manual_seed(secrets.randbits(60))
    away = torch.zeros_like(image)
    for expert in routed.pool:
        noise = expert.sigma * torch.randn((copies, *image.shape), generator=generator)
        x = image.clone().requires_grad_(True)
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(expert.network()(x + noise), torch.full((copies,), predict))
            (gradient,) = torch.autograd.grad(loss, x)
        away += gradient / gradient.norm().clamp_min(1e-12)
    return away / away.norm().clamp_min(1e-12)


def moved(
    routed: RoutedSmooth, image: Tensor, direction: Tensor, moment: Moment, radii: float, classes: Sequence[str], n: int = 1000
) -> str:
    """The image moved by so many of its radii along `direction`, and what the deployed classifier says of it, as HTML."""
    there = (image + radii * moment.radius * direction).clamp(0, 1)
    distance = float((there - image).norm())  # pixels end at 0 and 1, which shortens the way
    (answer,) = routed.predict(there[None], n=n, alpha=ALPHA).tolist()
    inside = distance < moment.radius
    said = "the votes do not decide" if answer == ABSTAIN else f"<b>{escape(classes[answer])}</b>"
    if inside:
        words = f"inside the certified radius: the ideal answer is still {escape(classes[moment.predict])}"
    else:
        words = "outside the certified radius: nothing is promised here"
    state = "inside" if inside else "outside"
    return (
        f'<section class="moved" data-state="{state}">{_inline(there)}<p>Distance {distance:.3f}, {words}.<br>'
        f"{n:,} fresh votes a stage: {said}.</p></section>"
    )


def _answer(predict: int, classes: Sequence[str]) -> str:
    return "abstains" if predict == ABSTAIN else escape(classes[predict])


def certified_pixels(image: Tensor) -> str:
    """The pixels that are certified, after cropping and resizing, as HTML."""
    size = " x ".join(map(str, image.shape[1:]))
    return f'<section class="certified"><h4>What is certified: these {size} pixels</h4>{_inline(image)}</section>'


def _inline(image: Tensor) -> str:
    buffer = io.BytesIO()
    to_picture(image).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def noisy_copies(routed: RoutedSmooth, image: Tensor, each: int = 4) -> str:
    """What the experts see: a few noisy copies for every noise level, smallest first, as HTML with inline pictures."""
    generator = torch.Generator().manual_seed(secrets.randbits(60))
    groups = []
    for sigma in sorted({s.sigma for s in routed.tree.stages.values()}):
        copies = ""
        for _ in range(each):
            noisy = (image + sigma * torch.randn(image.shape, generator=generator)).clamp(0, 1)
            copies += _inline(noisy)
        groups.append(f"<figure><div>{copies}</div><figcaption>sigma {sigma:g}</figcaption></figure>")
    return f'<section class="noisy"><h4>What the experts see</h4><div class="groups">{"".join(groups)}</div></section>'


def to_picture(image: Tensor, size: int = 112) -> Image.Image:
    """A tensor in [0,1] as a picture with visible pixels."""
    array = (image.numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    return picture.resize((size, size * picture.height // picture.width), Image.Resampling.NEAREST)


def verdict(moment: Moment, classes: tuple[str, ...]) -> str:
    """The certificate in words, as HTML."""
    if not moment.votes:
        return '<div class="verdict idle"><p>Pick an image, then press <b>Certify</b>.</p></div>'
    state = "certified" if moment.done and moment.predict != ABSTAIN else "abstains" if moment.done else "drawing votes"
    name = classes[moment.predict] if moment.predict != ABSTAIN else "no class"
    facts = f'<div><dt>L2 radius</dt><dd id="radius">{_down(moment.radius)}</dd></div>'
    facts += f"<div><dt>votes</dt><dd>{moment.votes:,}</dd></div>"
    return (
        f'<div class="verdict {"done" if moment.done else "live"}" data-state="{state}">'
        f'<span class="tag">{state}</span><strong id="class">{escape(name)}</strong><dl>{facts}'
        f"<div><dt>error probability</dt><dd>{ALPHA:g}</dd></div></dl></div>"
    )


def _down(radius: float) -> str:
    return f"{np.floor(radius * 1000) / 1000:.3f}"


def stages(moment: Moment, routed: RoutedSmooth, classes: tuple[str, ...]) -> str:
    """One card per stage in the order in which they are asked: its votes, and whether it decided."""
    cards = []
    titles = stage_names(routed)
    for name in reversed(routed.tree.order):
        stage, votes = routed.tree.stages[name], moment.counts.get(name)
        labels = [f"ask {titles[t]}" if isinstance(t, str) else "invalid" if t == ABSTAIN else classes[t] for t in stage.leads_to]
        decided = bool(moment.path) and name == moment.path[-1]
        role = "decided" if decided else "passed it on" if name in moment.path else "asked too" if votes else "not asked"
        bars = ""
        if votes:
            total = sum(votes)
            for k in np.argsort(votes)[::-1][:3]:
                if votes[k]:
                    share = 100.0 * votes[k] / total
                    bars += (
                        f'<div class="bar"><span>{escape(labels[k])}</span><i style="--w:{share:.1f}%"></i>'
                        f"<b>{share:.1f}%</b></div>"
                    )
            bars += f"<small>{total:,} votes</small>"
        threshold = f" · answers from {100 * stage.tau:g}%, else defers" if stage.tau is not None else ""
        limit = " · limits the radius" if moment.done and name == moment.limit else ""
        kind = "decided" if decided else "on" if votes else "off"
        head = f"<header><b>{escape(titles[name])}</b><em>{role}</em></header>"
        cards.append(f'<li class="{kind}">{head}<small>sigma {stage.sigma:g}{threshold}{limit}</small>{bars}</li>')
    return f'<ol class="stages">{"".join(cards)}</ol>'


def curve(moment: Moment, n_max: int) -> str:
    """Certified radius against votes drawn, as inline SVG."""
    width, height, left, bottom = 640, 200, 44, 30
    top = max(0.25, max((r for _, r in moment.curve), default=0.0) * 1.1)
    last = max(1000, *(v for v, _ in moment.curve)) if moment.curve else n_max

    def x(votes: float) -> float:
        return left + (width - left - 12) * votes / last

    def y(radius: float) -> float:
        return (height - bottom) - (height - bottom - 12) * radius / top

    step = next(s for s in (0.1, 0.25, 0.5, 1.0, 2.0) if top / s <= 5)
    ticks = "".join(
        f'<line class="grid" x1="{left}" x2="{width - 12}" y1="{y(r):.1f}" y2="{y(r):.1f}"/>'
        f'<text x="{left - 8}" y="{y(r) + 4:.1f}" text-anchor="end">{r:g}</text>'
        for r in np.arange(0.0, top, step)
    )
    points = " ".join(f"{x(v):.1f},{y(r):.1f}" for v, r in [(0, 0.0), *moment.curve])
    dot = f'<circle cx="{x(moment.curve[-1][0]):.1f}" cy="{y(moment.curve[-1][1]):.1f}" r="4.5"/>' if moment.curve else ""
    label = "Certified radius against votes"
    return (
        f'<figure class="curve"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{ticks}'
        f'<polyline points="{points}"/>{dot}<text x="{left}" y="{height - 8}">0</text>'
        f'<text x="{width - 12}" y="{height - 8}" text-anchor="end">{last:,} votes</text></svg>'
        f"<figcaption>Certified L2 radius as the votes come in</figcaption></figure>"
    )
