"""`Smooth` (one expert) and `RoutedSmooth` (a router over a pool): certify and predict.

What is certified is the ideal smoothed classifier g (exact probabilities): with probability at least
`1 - alpha` over the certification noise, g answers the certified class everywhere within the radius.
`predict` answers for g, or abstains, with probability at least `1 - alpha` per query over fresh noise.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from torch import Tensor

from rsrouter.core.errors import InputError
from rsrouter.core.plans import Plan
from rsrouter.core.types import Certificate
from rsrouter.experts.expert import Expert
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.base import Router, single_tree
from rsrouter.sampling.execution import Execution
from rsrouter.serialise import load_routed, save_routed
from rsrouter.smoothed import OnCertificate, Progress, Smoothed, describe_stages


class Smooth(Smoothed):
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
        super().__init__(single_tree(expert), [expert], expert.input_shape, execution, noise)
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


class RoutedSmooth(Smoothed, ModelHubMixin, library_name="rsrouter", tags=["randomized-smoothing", "certified-robustness"]):
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
        self.pool, self.router = pool, router
        super().__init__(router.bind(pool), pool.experts, pool.input_shape, execution, noise)

    def _settings(self) -> dict[str, str]:
        # bound again: thresholds, voters and sigmas of now, whatever kind of router it is
        return {**super()._settings(), "the router": repr(describe_stages(self.router.bind(self.pool).tree))}

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
            options: `private`, `create_pr`, `dry_run`, `token`, ... of `rsrouter.publish.commit`.

        Returns:
            A `rsrouter.publish.Publication`.

        Raises:
            HubError, InputError, IntegrityError: see `rsrouter.publish.commit`.
        """
        # publishing stands above this module, and is only looked up when asked for
        publish = importlib.import_module("rsrouter.publish")
        with tempfile.TemporaryDirectory() as scratch:
            return publish.publish(self.save_pretrained(Path(scratch) / "router"), repo_id, certificates=certificates, **options)
