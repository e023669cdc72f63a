"""`Smooth` (one expert) and `RoutedSmooth` (a router over a pool): certify and predict.

What is certified is the ideal smoothed classifier g (exact probabilities): with probability at least
`1 - alpha` over the certification noise, g answers the certified class everywhere within the radius.
`predict` answers for g, or abstains, with probability at least `1 - alpha` per query over fresh noise.
"""

from __future__ import annotations

import hashlib
import importlib
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelHubMixin
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.errors import InputError
from rsrouter.core.plans import Plan
from rsrouter.core.policy import CertifyPolicy, VoteRequest
from rsrouter.core.types import Certificate
from rsrouter.experts.base import Expert, ExpertPool, module_digest
from rsrouter.inputs import check_ids, check_images, check_seed
from rsrouter.router.base import Routed, Router, single_tree
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.sampling.execution import Execution
from rsrouter.sampling.memo import VoteMemo
from rsrouter.serialise import load_routed, save_routed


@dataclass(frozen=True)
class Progress:
    """Where a certification stands; passed to the `progress` callback after every round.

    Attributes:
        votes: votes drawn so far.
        finished: images finished so far.
        total: images in this call.
    """

    votes: int
    finished: int
    total: int


#: Called with (position of the image, its certificate, seconds of work spent on it), in finishing order.
OnCertificate = Callable[[int, Certificate, float], None]


class _Smoothed:
    """Certify and predict for any tree of stages."""

    def __init__(self, routed: Routed, shape: tuple[int, ...], execution: Execution | None, noise: str) -> None:
        self._routed, self._shape, self.execution, self.noise = routed, shape, execution or Execution(), noise
        self.metadata: dict[str, Any] = {}
        self._kept: tuple[object, Engine] | None = None
        #: votes to share with other classifiers that certify the same images; None: draw them all
        self.memo: VoteMemo | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "memo": None}

    @property
    def shape(self) -> tuple[int, ...]:
        """`(C, H, W)` of an image."""
        return self._shape

    @property
    def tree(self) -> Any:
        """The stages as the certificate sees them (`rsrouter.core.Tree`)."""
        return self._routed.tree

    @property
    def digest(self) -> str:
        """sha256 over everything that decides the smoothed classifier: networks, sigmas, stages."""
        stages = [(s.name, s.sigma, s.kind, s.tau, s.leads_to, s.network) for s in self._routed.tree.stages.values()]
        models = [(m.name, m.digest) for m in self._routed.models]
        return hashlib.sha256(repr((stages, self._routed.tree.root, models)).encode()).hexdigest()

    def default_seed(self, plan: Plan, alpha: float, rule: str, sides: str) -> int:
        """The certification seed when none is given: derived from digests, so nobody is tempted to shop for one.

        The images enter through the noise streams, which are keyed by each image's content as well.
        """
        text = repr((self.digest, sorted(plan.to_dict().items()), float(alpha), rule, sides, self.noise))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def _engine(self, seed: int, device: str | None) -> Engine:
        return Engine(self._routed.models, self._shape, seed=seed, device=device, execution=self.execution, noise=self.noise)

    def _kept_engine(self, seed: int, device: str | None) -> Engine:
        """The engine of the last `predict` under another seed, as long as nothing changed: preparing and checking networks
        takes longer than a thousand votes of a small one."""
        key = (str(device), self.execution, self.noise, tuple(module_digest(m.module) for m in self._routed.models))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._engine(seed, device))
        return self._kept[1].with_seed(seed)

    def _certify(
        self,
        images: Tensor,
        *,
        plan: Plan,
        alpha: float,
        seed: int | None,
        ids: Sequence[object] | None,
        rule: str,
        sides: str,
        batch_size: int | None,
        device: str | None,
        on_certificate: OnCertificate | None,
        progress: Callable[[Progress], None] | None,
        engine: Engine | None = None,
    ) -> list[Certificate]:
        # `engine`: one made before by `_engine` with this seed and device, by a caller that certifies in many calls
        if not isinstance(plan, Plan):
            raise InputError(
                "Certifying needs a plan",
                expected="rsrouter.FixedPlan or rsrouter.AdaptivePlan",
                received=repr(plan),
                remedy="plan=rsrouter.FixedPlan(n0=100, n=100_000)",
            )
        x = check_images(images, self._shape)
        names = check_ids(ids, len(x))
        tree = self._routed.tree
        split = AlphaSplit.even(alpha, tree.paths)
        plan.check(tree, split, sides)
        policy = CertifyPolicy(tree, plan, split, len(x), rule=rule, sides=sides)
        seed = self.default_seed(plan, alpha, rule, sides) if seed is None else check_seed(seed)
        engine = engine or self._engine(seed, device)
        self.metadata = {
            "seed": seed,
            "rule": rule,
            "sides": sides,
            "alpha": alpha,
            "plan": plan.to_dict(),
            "split": {"stages": dict(split.stages), "lower_share": split.lower_share},
            "digest": self.digest,
        }
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(
                "batch_size must be a whole number",
                expected="batch_size >= 1, or None",
                received=repr(batch_size),
                remedy="it groups work; it never changes a vote",
            )
        # enough images in flight that a round of the shortest requests still fills many batches
        window = -(-max(batch_size or 0, 16 * engine.forward_batch) // plan.n0)
        done: list[Certificate | None] = [None] * len(x)
        identity = [b""] * len(x)
        seconds = np.zeros(len(x))
        live: list[int] = []
        upcoming, votes, finished = 0, 0, 0
        while live or upcoming < len(x):
            while len(live) < window and upcoming < len(x):
                identity[upcoming] = image_identity(x[upcoming], names[upcoming])
                live.append(upcoming)
                upcoming += 1
            start = time.perf_counter()
            requests = policy.next_requests(live)
            run = engine.run if self.memo is None else partial(self.memo.run, engine)
            policy.update(requests, run(x, identity, requests))
            drawn = np.zeros(len(x), dtype=np.int64)
            np.add.at(drawn, [r.image for r in requests], [r.count for r in requests])
            votes += int(drawn.sum())
            seconds += (time.perf_counter() - start) * drawn / max(1, drawn.sum())
            for i in [i for i in live if policy.done[i]]:
                certificate = policy.certificate(i)
                done[i] = certificate
                finished += 1
                if on_certificate is not None:
                    on_certificate(i, certificate, float(seconds[i]))
            live = [i for i in live if not policy.done[i]]
            if progress is not None:
                progress(Progress(votes, finished, len(x)))
        engine.check_again()
        self.metadata["engine"] = engine.describe()
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
        `rsrouter.core.decide`).

        Args:
            images: `(N, C, H, W)` pixels in [0,1].
            n: votes per stage that is asked.
            alpha: probability, per query, of an answer that is not g's. Repeated queries add up.
            seed: None draws fresh entropy. A published seed voids the statement against an attacker who
                knows it.
            ids: names of the images in their noise streams.
            device: where to run; None is the CPU.

        Returns:
            int64 `(N,)`, ABSTAIN (-1) where the votes do not decide.
        """
        from rsrouter.core.decide import PredictPolicy

        x = check_images(images, self._shape)
        names = check_ids(ids, len(x))
        policy = PredictPolicy(self._routed.tree, n, AlphaSplit.even(alpha, self._routed.tree.paths), len(x))
        engine = self._kept_engine(secrets.randbits(62) if seed is None else check_seed(seed), device)
        window = -(-16 * engine.forward_batch // n)
        for start in range(0, len(x), window):
            part = range(start, min(start + window, len(x)))
            identity = {i: image_identity(x[i], names[i]) for i in part}
            while requests := policy.next_requests([i for i in part if not policy.done[i]]):
                local = [VoteRequest(r.image - start, r.network, r.purpose, r.start, r.count) for r in requests]
                policy.update(requests, engine.run(x[part.start : part.stop], [identity[i] for i in part], local))
        engine.check_again()
        return np.array([policy.answer(i) for i in range(len(x))], dtype=np.int64)


class Smooth(_Smoothed):
    """One smoothed expert: Cohen et al. 2019.

    Args:
        expert: the base classifier and its sigma.
        execution: how the network runs (part of the certified function).
        noise: `"gaussian"`, or `"sound"` (exact arithmetic for 8-bit images); `"gaussian-shared"` and `"sound-shared"` read
            one stream for all images, which is cheaper and leaves each certificate valid, but not independent of the rest.
    """

    def __init__(self, expert: Expert, *, execution: Execution | None = None, noise: str = "gaussian") -> None:
        if not isinstance(expert, Expert):
            raise InputError(
                "Smooth needs an Expert",
                expected="rsrouter.Expert",
                received=type(expert).__name__,
                remedy="Expert(module, sigma=..., num_classes=..., input_shape=...)",
            )
        super().__init__(single_tree(expert), expert.input_shape, execution, noise)
        self.expert = expert

    def certify(
        self,
        images: Tensor,
        *,
        plan: Plan,
        alpha: float = 1e-3,
        seed: int | None = None,
        ids: Sequence[object] | None = None,
        sides: str = "one",
        batch_size: int | None = None,
        device: str | None = None,
        on_certificate: OnCertificate | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Certificate]:
        """Certified radius of every image (Cohen et al. 2019, CERTIFY, under a `FixedPlan` and `sides="one"`).

        With probability at least `1 - alpha` over the noise of one image, the smoothed expert answers
        `predict` on every input closer than `radius` in L2 distance.

        Args:
            images: `(N, C, H, W)` float pixels in [0,1].
            plan: how many votes, and the bound that is valid for that rule.
            alpha: failure probability of each certificate.
            seed: keys the noise; None derives it from the digests of model and plan.
            ids: names of the images in their noise streams; None: their content alone.
            sides: `"one"` bounds every rival by `1 - p_a_lower`; `"two"` also by its own votes.
            batch_size: votes a round should have at least; groups work, never changes a vote.
            device: where to run; None is the CPU.
            on_certificate, progress: callbacks.

        Returns:
            One `Certificate` per image, in order.

        Raises:
            InputError: images, ids or arguments that do not fit.
            NetworkError: a network that cannot be certified.
            PlanError: a radius that the plan can never reach.
        """
        return self._certify(
            images,
            plan=plan,
            alpha=alpha,
            seed=seed,
            ids=ids,
            rule="tree",
            sides=sides,
            batch_size=batch_size,
            device=device,
            on_certificate=on_certificate,
            progress=progress,
        )


class RoutedSmooth(_Smoothed, ModelHubMixin, library_name="rsrouter", tags=["randomized-smoothing", "certified-robustness"]):
    """A smoothed router over frozen smoothed experts, certified as one classifier.

    Args:
        pool: the experts.
        router: which of them answers.
        execution: how the networks run (part of the certified function).
        noise: `"gaussian"`, `"sound"`, `"gaussian-shared"` or `"sound-shared"`, as in `Smooth`.
    """

    def __init__(self, pool: ExpertPool, router: Router, *, execution: Execution | None = None, noise: str = "gaussian") -> None:
        if not isinstance(pool, ExpertPool) or not isinstance(router, Router):
            raise InputError(
                "RoutedSmooth needs a pool and a router",
                expected="ExpertPool and FlatRouter, CascadeRouter, ...",
                received=f"{type(pool).__name__} and {type(router).__name__}",
                remedy="ExpertPool([...]), FlatRouter(...)",
            )
        super().__init__(router.bind(pool), pool.input_shape, execution, noise)
        self.pool, self.router = pool, router

    def certify(
        self,
        images: Tensor,
        *,
        plan: Plan,
        alpha: float = 1e-3,
        seed: int | None = None,
        ids: Sequence[object] | None = None,
        rule: str = "tree",
        sides: str = "two",
        batch_size: int | None = None,
        device: str | None = None,
        on_certificate: OnCertificate | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Certificate]:
        """Certified radius of the routed classifier on every image (`rsrouter.core.certificates`, tree theorem).

        Arguments, errors and result as `Smooth.certify`, and

        Args:
            rule: `"tree"` draws from every stage that can still raise the radius; `"min"` only from the router
                and the expert it picks, R = min(R_router, R_expert) (Dual RS, arXiv 2512.01782).
            sides: `"two"` bounds each rival outcome by its own votes too.

        `alpha` is split over the stages so that no root-to-leaf path spends more (for a flat router: half for
        the router, half for the expert, for any number of experts).
        """
        return self._certify(
            images,
            plan=plan,
            alpha=alpha,
            seed=seed,
            ids=ids,
            rule=rule,
            sides=sides,
            batch_size=batch_size,
            device=device,
            on_certificate=on_certificate,
            progress=progress,
        )

    def save_pretrained(self, save_directory: str | Path) -> Path:  # type: ignore[override]
        """Writes `config.json` and `router.safetensors` (the router's tensors only; experts are pinned, not copied)."""
        return save_routed(Path(save_directory), self.pool, self.router, self.execution, self.noise)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None, **hub: Any) -> RoutedSmooth:  # type: ignore[override]
        """Loads a routed classifier from a folder or the Hub, and verifies every pinned expert.

        Args:
            name: folder with `config.json`, or a Hub repository id (`org/name`, `hf-hub:org/name@revision`).
            revision: branch, tag or commit on the Hub; a full commit hash with a warm cache needs no network.
            hub: `token`, `cache_dir`, `local_files_only`; they hold for the pinned experts as well.

        Raises:
            HubError: a repository, revision or file that is missing, gated or not to be had.
            IntegrityError: a router or an expert that is not the one that was pinned.
            CheckpointError, InputError: files that cannot be read or do not fit.
        """
        pool, router, execution, noise = load_routed(name, revision, **hub)
        return cls(pool, router, execution=execution, noise=noise)

    def push_to_hub(self, repo_id: str, *, certificates: str | Path | None = None, **options: Any) -> Any:
        """Publishes this router: pinned experts, its own tensors, certificates and a card, in one commit.

        Args:
            repo_id: `org/name`.
            certificates: folder with results tables of this router, or one table; None publishes none.
            options: `private`, `create_pr`, `dry_run`, `token`, ... of `rsrouter.publish.publish`.

        Returns:
            A `rsrouter.publish.Publication`.

        Raises:
            HubError, InputError, IntegrityError: see `rsrouter.publish.publish`.
        """
        # publishing stands above this module, and is only looked up when asked for
        publish = importlib.import_module("rsrouter.publish")
        with tempfile.TemporaryDirectory() as scratch:
            return publish.publish(self.save_pretrained(Path(scratch) / "router"), repo_id, certificates=certificates, **options)
