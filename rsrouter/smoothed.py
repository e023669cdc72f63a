"""What `Smooth` and `RoutedSmooth` share: drawing votes for a tree of stages until the policy is content."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.certify import CertifyPolicy, VoteRequest
from rsrouter.core.errors import InputError, NetworkError
from rsrouter.core.plans import Plan
from rsrouter.core.tree import Tree
from rsrouter.core.types import Certificate
from rsrouter.experts.expert import Expert
from rsrouter.experts.identity import module_digest
from rsrouter.inputs import check_ids, check_images, check_seed
from rsrouter.router.base import Routed
from rsrouter.sampling.engine import Engine, image_identity
from rsrouter.sampling.execution import Execution
from rsrouter.sampling.memo import VoteMemo


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


def describe_stages(tree: Tree) -> list[tuple[object, ...]]:
    """What the stages of a tree are, for digests and comparisons."""
    return [(s.name, s.sigma, s.kind, s.tau, s.leads_to, s.network) for s in tree.stages.values()]


class Smoothed:
    """Certify and predict for any tree of stages."""

    def __init__(
        self, routed: Routed, experts: Sequence[Expert], shape: tuple[int, ...], execution: Execution | None, noise: str
    ) -> None:
        self._routed, self._shape, self.execution, self.noise = routed, shape, execution or Execution(), noise
        self._experts = tuple(experts)
        for expert in experts:
            expert.check_unchanged()
        self._bound = self._state()
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
        stages = describe_stages(self._routed.tree)
        models = [(m.name, m.digest) for m in self._routed.models]
        return hashlib.sha256(repr((stages, self._routed.tree.root, models)).encode()).hexdigest()

    def default_seed(self, plan: Plan, alpha: float, rule: str, sides: str) -> int:
        """The certification seed when none is given: derived from digests, so nobody is tempted to shop for one.

        The images enter through the noise streams, which are keyed by each image's content as well.
        """
        text = repr((self.digest, sorted(plan.to_dict().items()), float(alpha), rule, sides, self.noise))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def _settings(self) -> dict[str, str]:
        """What else digests and tables name, by what it belongs to."""
        return {f"expert {e.name!r}": repr((e.name, e.sigma, e.num_classes, e.input_shape, e.mean, e.std)) for e in self._experts}

    def _state(self) -> dict[str, str]:
        return {**{f"network {m.name!r}": module_digest(m.module) for m in self._routed.models}, **self._settings()}

    def check_unchanged(self) -> None:
        """Refuses weights and settings that were changed in place since they were bound: digests, seeds and tables would name
        others. It sees what digests see (`module_digest`); hooks and functions that were put in are not noticed.

        Raises:
            NetworkError: something differs.
        """
        now = self._state()
        changed = [who for who in {**self._bound, **now} if self._bound.get(who) != now.get(who)]
        if changed:
            raise NetworkError(
                f"{changed[0][0].upper()}{changed[0][1:]} was changed after it was bound",
                expected="the weights and settings it had",
                received=f"others, in {', '.join(changed)}",
                remedy="make a new Smooth or RoutedSmooth (of a new Expert, where an expert changed) and certify that; "
                "a network may not keep anything of its last input",
            )

    def _engine(self, seed: int, device: str | None) -> Engine:
        self.check_unchanged()
        return self._new_engine(seed, device)

    def _new_engine(self, seed: int, device: str | None) -> Engine:
        return Engine(self._routed.models, self._shape, seed=seed, device=device, execution=self.execution, noise=self.noise)

    def _kept_engine(self, seed: int, device: str | None) -> Engine:
        """The engine of the last `predict` under another seed, as long as it runs the same way: preparing and checking
        networks takes longer than a thousand votes of a small one."""
        self.check_unchanged()
        key = (str(device), self.execution, self.noise)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._new_engine(seed, device))
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
        `rsrouter.core.predict`).

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
        from rsrouter.core.predict import PredictPolicy

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
