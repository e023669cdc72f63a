"""`Smooth` (one expert) and `RoutedSmooth` (a router over a pool): certify and predict.

What is certified is the ideal smoothed classifier g (exact probabilities): with probability at least
`1 - alpha` over the certification noise, g answers the certified class everywhere within the radius.
`predict` answers for g, or abstains, with probability at least `1 - alpha` per query over fresh noise.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from huggingface_hub import ModelHubMixin
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.clock import BAR, Drawn
from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.certify import CertifyPolicy
from rsrouter.core.errors import InputError, NetworkError
from rsrouter.core.plans import Plan
from rsrouter.core.predict import PredictPolicy
from rsrouter.core.requests import PASS, VoteRequest
from rsrouter.core.terms import Terms
from rsrouter.core.tree import Tree
from rsrouter.core.types import Certificate
from rsrouter.experts.expert import Expert
from rsrouter.experts.identity import ModuleWatch
from rsrouter.experts.pool import ExpertPool
from rsrouter.inputs import check_count, check_ids, check_images, check_seed
from rsrouter.publish import Publication, publish
from rsrouter.router.base import Routed, Router, bound_parts, single_tree
from rsrouter.router.words import in_lines, in_one_line
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.sampling.execution import Execution, resolve_device
from rsrouter.sampling.memo import VoteMemo
from rsrouter.sampling.uncertified import Core
from rsrouter.serialise import load_routed, save_routed

#: Called with (position of the image, its certificate, seconds of work spent on it), in finishing order.
OnCertificate = Callable[[int, Certificate, float], None]


class Smoothed:
    """Certify and predict for any tree of stages; `Smooth` and `RoutedSmooth` say which.

    Attributes:
        routed: the bound classifier (`rsrouter.router.Routed`): tree, networks, execution, noise, digest, default seed.
        experts: the frozen base classifiers.
        shape: `(C, H, W)` of an image.
        core: the network that answers where nothing is certified, without a certificate; None without one.
        memo: votes to share with other classifiers that certify the same images; None: draw them all.
        device: where votes are drawn if a call names no other; None is the CPU.
    """

    def __init__(
        self,
        routed: Routed,
        experts: Sequence[Expert],
        shape: tuple[int, ...],
        execution: Execution | None,
        noise: str,
        core: Expert | None = None,
    ) -> None:
        if not routed.tree.voting and noise != "gaussian":
            raise InputError(
                "A classifier that casts no votes takes no kind of noise",
                expected="noise left out: its experts are certified by one forward pass",
                received=f"noise={noise!r}",
                remedy="leave it out, or use an expert with a sigma",
            )
        self.routed = replace(routed, execution=execution or Execution(), noise=noise)
        self.experts, self.shape, self.core = tuple(experts), shape, None if core is None else Core(core)
        self.memo: VoteMemo | None = None
        self.device: str | None = None
        self._members = self.experts if core is None else (*self.experts, core)
        for expert in self._members:
            expert.digest  # noqa: B018 (taken now, so that a change from here on is seen)
            expert.check_unchanged()
        read: dict[int, str] = {}
        bound = self._parts().items()
        self._bound = {who: ModuleWatch(part, read) if isinstance(part, nn.Module) else repr(part) for who, part in bound}
        self._engines: dict[str, tuple[Routed, Engine]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({in_one_line(self.routed, [e.name for e in self.experts])})"

    def describe(self) -> str:
        """Who decides what, in lines: the stages in the order in which they are asked, and how the networks run.

        >>> from torch import nn
        >>> print(Smooth(Expert(nn.Flatten(), sigma=0.5, num_classes=4, input_shape=(1, 2, 2))).describe())
        1 stage over sigma_0.5, images of shape (1, 2, 2), gaussian noise, float32
          1. sigma_0.5 at noise 0.5: answers
        """
        more = [] if self.core is None else [f"  {self.core.words}"]
        return "\n".join([*in_lines(self.routed, self.experts, self.shape), *more])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engines": {}, "memo": None}

    @property
    def tree(self) -> Tree:
        """The stages as the certificate sees them (`rsrouter.core.Tree`)."""
        return self.routed.tree

    @property
    def digest(self) -> str:
        """sha256 of the smoothed classifier by value (`Routed.digest`)."""
        return self.routed.digest

    @property
    def execution(self) -> Execution:
        """How the networks run; part of the certified function."""
        return self.routed.execution

    @property
    def noise(self) -> str:
        """The kind of noise."""
        return self.routed.noise

    def with_execution(self, execution: Execution) -> Self:
        """The same classifier, run in another way: another function, as its votes may differ."""
        other = object.__new__(type(self))
        other.__dict__.update({**self.__dict__, "routed": replace(self.routed, execution=execution), "_engines": {}})
        return other

    def _own(self) -> dict[str, Any]:
        """What else may not change in place: modules, or anything with a `repr` that tells it, by name."""
        return {}

    def _parts(self) -> dict[str, Any]:
        return {**bound_parts(self.routed.models, self._members), **self._own()}

    def check_unchanged(self) -> None:
        """Refuses weights and settings that were changed in place since they were bound: digests, seeds and tables would
        name others.

        Raises:
            NetworkError: something differs.
        """
        now, changed, hashes = self._parts(), [], dict[int, str]()  # what several networks share is read once
        for who, bound in self._bound.items():
            if isinstance(bound, ModuleWatch):
                same = now.get(who) is bound.module and bound.unchanged(hashes)
            else:
                same = who in now and repr(now[who]) == bound
            changed += [] if same else [who]
        if changed := [*changed, *(who for who in now if who not in self._bound)]:
            raise NetworkError(
                f"{changed[0][0].upper()}{changed[0][1:]} was changed after it was bound",
                expected="the weights and settings it had",
                received=f"others, in {', '.join(changed)}",
                remedy="make a new Smooth or RoutedSmooth (of a new Expert, where an expert changed) and certify that; "
                "a network may not keep anything of its last input",
            )

    def engine(self, seed: int, device: str | None = None) -> Engine:
        """The engine that draws this classifier's votes under `seed`.

        Networks are prepared and checked once per device and kept; what they were made of is compared with what was bound.

        Raises:
            NetworkError: a network that cannot be certified, or was changed since it was bound.
            InputError: an unusable device.
        """
        self.check_unchanged()
        r, device = self.routed, self.device if device is None else device
        of, kept = self._engines.get(str(device), (None, None))
        if kept is None or of is not r:
            kept = Engine(r.models, self.shape, seed=seed, device=device, execution=r.execution, noise=r.noise)
            self._engines[str(device)] = r, kept
        return kept.with_seed(seed)

    def certify(
        self,
        images: Tensor,
        terms: Terms | Plan,
        *,
        ids: Sequence[object] | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        engine: Engine | None = None,
        on_certificate: OnCertificate | None = None,
        progress: Callable[[Drawn], None] | None = None,
    ) -> list[Certificate]:
        """Certified radius of every image.

        With probability at least `1 - terms.alpha` over the noise of one image, the smoothed classifier answers
        `predict` on every input closer than `radius` in L2 distance: Cohen et al. 2019, CERTIFY, for one expert under a
        `FixedPlan`; the tree theorem (`rsrouter.core.certificates`) for a router, with alpha split so that no
        root-to-leaf path spends more (for a flat router half for the router, half for the expert, whatever their number).

        Args:
            images: `(N, C, H, W)` float pixels in [0,1].
            terms: plan, alpha, rule, sides and seed; a plan alone takes the defaults of the others.
            ids: names of the images in their noise streams; None: their content alone.
            batch_size: votes a round should have at least; groups work, never changes a vote.
            device: where to run; None is `self.device`.
            engine: one of `engine()`, for callers that certify in many calls.
            on_certificate, progress: callbacks; without them a terminal shows a bar.

        Returns:
            One `Certificate` per image, in order.

        Raises:
            InputError: images, ids or arguments that do not fit.
            NetworkError: a network that cannot be certified.
            PlanError: terms that cannot be, or a radius that the plan can never reach.
        """
        asked = self.routed.resolve(terms)
        x = check_images(images, self.shape)
        names = check_ids(ids, len(x))
        if batch_size is not None:
            check_count("batch_size", batch_size, "it groups work; it never changes a vote")
        split = self.routed.split(asked)
        policy = CertifyPolicy(self.routed.tree, asked.plan, split, len(x), rule=asked.rule, sides=str(asked.sides))
        engine = engine or self.engine(int(asked.seed or 0), device)
        # enough images in flight that a round of the shortest requests still fills many batches
        window = -(-max(batch_size or 0, 16 * engine.forward_batch) // asked.plan.n0)
        done: list[Certificate | None] = [None] * len(x)
        identity = [b""] * len(x)
        seconds = np.zeros(len(x))
        live: list[int] = []
        upcoming, votes, finished = 0, 0, 0
        bar = BAR(desc="certify", total=len(x), disable=None if progress is None and on_certificate is None else True)
        while live or upcoming < len(x):
            while len(live) < window and upcoming < len(x):
                identity[upcoming] = image_identity(x[upcoming], names[upcoming])
                live, upcoming = [*live, upcoming], upcoming + 1
            start = time.perf_counter()
            requests = policy.next_requests(live)
            counts = engine.run(x, identity, requests) if self.memo is None else self.memo.run(engine, x, identity, requests)
            policy.update(requests, counts)
            drawn = np.zeros(len(x), dtype=np.int64)
            np.add.at(drawn, [r.image for r in requests], [r.count for r in requests])
            votes += sum(r.count for r in requests if r.purpose != PASS)
            seconds += (time.perf_counter() - start) * drawn / max(1, drawn.sum())
            made = {i: policy.certificate(i) for i in live if policy.done[i]}
            for i, certificate in (made if self.core is None else self.core.fill(made, x, device or self.device)).items():
                done[i] = certificate
                finished += 1
                bar.update()
                if on_certificate is not None:
                    on_certificate(i, certificate, float(seconds[i]))
            live = [i for i in live if not policy.done[i]]
            if progress is not None:
                progress(Drawn(votes, finished, len(x)))
        bar.close()
        engine.check_again()
        return [c for c in done if c is not None]

    def predict(
        self,
        images: Tensor,
        *,
        n: int,
        alpha: float = 1e-3,
        seed: int | None = None,
        ids: Sequence[object] | None = None,
        device: str | None = None,
    ) -> NDArray[np.int64]:
        """The smoothed classifier's answer, or ABSTAIN, for each image (Cohen et al. 2019, PREDICT; for a tree:
        `rsrouter.core.predict`). Where it abstains, `core.answers(images)` is what a core says, uncertified.

        Args:
            images: `(N, C, H, W)` pixels in [0,1].
            n: votes per stage that is asked.
            alpha: probability, per query, of an answer that is not g's. Repeated queries add up.
            seed: None draws fresh entropy; a published one voids the statement against an attacker who knows it.
            ids: names of the images in their noise streams.
            device: where to run; None is `self.device`.

        Returns:
            int64 `(N,)`, ABSTAIN (-1) where the votes do not decide.

        Raises:
            InputError, NetworkError, PlanError: as `certify`.
        """
        x = check_images(images, self.shape)
        names = check_ids(ids, len(x))
        tree = self.routed.tree
        policy = PredictPolicy(tree, n, AlphaSplit.even(alpha, tree.paths), len(x))
        engine = self.engine(secrets.randbits(62) if seed is None else check_seed(seed), device)
        window = -(-16 * engine.forward_batch // n)
        bar = BAR(desc="predict", total=len(x), disable=None)
        for start in range(0, len(x), window):
            part = range(start, min(start + window, len(x)))
            identity = {i: image_identity(x[i], names[i]) for i in part}
            while requests := policy.next_requests([i for i in part if not policy.done[i]]):
                local = [VoteRequest(r.image - start, r.network, r.purpose, r.start, r.count) for r in requests]
                policy.update(requests, engine.run(x[part.start : part.stop], [identity[i] for i in part], local))
            bar.update(len(part))
        bar.close()
        engine.check_again()
        return np.array([policy.answer(i) for i in range(len(x))], dtype=np.int64)


class Smooth(Smoothed):
    """One smoothed expert: Cohen et al. 2019.

    Args:
        expert: the base classifier and its sigma.
        execution: how the network runs (part of the certified function).
        noise: `"gaussian"`, or `"sound"` (exact arithmetic for 8-bit images); `"gaussian-shared"` and `"sound-shared"` read
            one stream for all images, which is cheaper and leaves each certificate valid, but not independent of the rest.

    Raises:
        InputError: something that is not an `Expert`.
    """

    def __init__(self, expert: Expert, *, execution: Execution | None = None, noise: str = "gaussian") -> None:
        if not isinstance(expert, Expert):
            raise InputError(
                "Smooth needs an Expert",
                expected="rsrouter.Expert",
                received=type(expert).__name__,
                remedy="Expert(module, sigma=..., num_classes=..., input_shape=...)",
            )
        super().__init__(single_tree(expert), [expert], expert.input_shape, execution, noise)
        self.expert = expert


class RoutedSmooth(Smoothed, ModelHubMixin, library_name="rsrouter", tags=["randomized-smoothing", "certified-robustness"]):
    """A smoothed router over frozen smoothed experts, certified as one classifier.

    Args:
        pool: the experts; its core, if it has one, answers where nothing is certified.
        router: which of them answers.
        execution: how the networks run (part of the certified function).
        noise: `"gaussian"`, `"sound"`, `"gaussian-shared"` or `"sound-shared"`, as in `Smooth`.

    Raises:
        InputError: a pool or router that is none, or that do not fit each other.
    """

    def __init__(self, pool: ExpertPool, router: Router, *, execution: Execution | None = None, noise: str = "gaussian") -> None:
        if not isinstance(pool, ExpertPool) or not isinstance(router, Router):
            raise InputError(
                "RoutedSmooth needs a pool and a router",
                expected="ExpertPool and FlatRouter, CascadeRouter, ...",
                received=f"{type(pool).__name__} and {type(router).__name__}",
                remedy="ExpertPool([...]), FlatRouter(...)",
            )
        self.pool, self.router = pool, router
        super().__init__(router.bind(pool), pool.experts, pool.input_shape, execution, noise, pool.core)

    def _own(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self.router).items() if not hasattr(type(self.router), k)}
        if not all(isinstance(v, nn.Module | str | int | float | tuple | None) for v in own.values()):
            return {"the router": self.router.bind(self.pool).digest}
        return {f"the router's setting {k!r}": v for k, v in own.items()}

    def save_pretrained(self, save_directory: str | Path) -> Path:  # type: ignore[override]
        """Writes `config.json` and `router.safetensors` (the router's tensors only; experts are pinned, not copied)."""
        return save_routed(Path(save_directory), self.pool, self.router, self.execution, self.noise)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        device: str | None = None,
        execution: Execution | None = None,
    ) -> RoutedSmooth:
        """Loads a routed classifier from a folder or the Hub, and verifies every pinned expert.

        Args:
            pretrained_model_name_or_path: folder with `config.json`, or a Hub repository id (`org/name`,
                `hf-hub:org/name@revision`).
            revision: branch, tag or commit on the Hub; a full commit hash with a warm cache needs no network.
            token, cache_dir, local_files_only, force_download: as in `huggingface_hub`, for the pinned experts as well.
            subfolder: of the folder or repository, where the router lies.
            device: where votes are drawn if `certify` or `predict` names no other; None is the CPU.
            execution: how the networks run, instead of as saved: another function, which its certificates are not about.

        Raises:
            HubError: a repository, revision or file that is missing, gated or not to be had.
            IntegrityError: a router or an expert that is not the one that was pinned.
            CheckpointError, InputError: files that cannot be read or do not fit.
        """
        saved = load_routed(
            pretrained_model_name_or_path,
            revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        loaded = cls(saved.pool, saved.router, execution=execution or saved.execution, noise=saved.noise)
        loaded.device = device if device is None else str(resolve_device(device))
        return loaded

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        revision: str = "main",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        certificates: str | Path | None = None,
        **options: Any,
    ) -> Publication:
        """Publishes this router: pinned experts, its own tensors, certificates and a card, in one commit.

        Args:
            repo_id: `org/name`.
            commit_message: of the commit.
            revision: branch to commit to; must exist unless it is `main`.
            private: visibility of a new repository; None leaves it to the account's default.
            token: as in `huggingface_hub`.
            create_pr: open a pull request instead.
            certificates: folder with results tables of this router, or one table; None publishes none.
            options: `dry_run`, `licence`, `title`, `with_experts`, `imports` of `rsrouter.publish.publish`.

        Returns:
            A `rsrouter.publish.Publication`.

        Raises:
            HubError, InputError, IntegrityError: see `rsrouter.publish.publish`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            return publish(
                self.save_pretrained(Path(scratch) / "router"),
                repo_id,
                certificates=certificates,
                message=commit_message,
                branch=revision,
                private=private,
                token=token,
                create_pr=create_pr,
                **options,
            )
