"""`Training`: everything that one training is given, passed whole to whatever trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.core.errors import InputError
from rsrouter.experts.expert import Expert
from rsrouter.experts.pool import ExpertPool
from rsrouter.inputs import check_images, check_labels, check_seed
from rsrouter.router.base import Router
from rsrouter.router.chain import Voter, check_voters
from rsrouter.sampling.execution import Execution
from rsrouter.smooth import RoutedSmooth
from rsrouter.training.features import noisy_features
from rsrouter.training.labels import Labels, label_votes, radii_from_votes, target_radii
from rsrouter.training.resume import ResumeStore

#: Kinds that can be asked for by name. `auto` lets the validation images choose between trained heads, plain experts in a row,
#: and a flat router.
KINDS = ("auto", "deferral", "cascade", "flat")
#: Purposes of noise: what heads are trained on, what routing labels are drawn with, what chains are chosen with, and their
#: further copies of images whose votes nearly agree.
TRAIN, LABEL, TUNE, TUNE_SURE = "train", "label", "tune", "tune sure"
#: Selection votes of the certification that is simulated.
SELECTION_VOTES = 100

#: A floor is a ratio: above this it was meant in percent.
MOST_FLOOR = 10.0

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that decides what a training ends with, and how it is watched.

    Attributes:
        pool: frozen experts; unchanged to the bit.
        router: a kind out of `KINDS`, or a router: a `FlatRouter` is trained in place (from where its weights are), any other
            keeps what it has. `auto` trains heads and a flat router, and takes what scores higher on the validation images
            (simulated votes).
        images: `(N, C, H, W)` pixels in [0,1], preferably unseen by every expert: experts look better than they are on
            their own training images, and the router would learn to trust them.
        labels: `(N,)` class indices.
        radii: radii the user cares about, L2 in [0,1]-pixel units.
        seed: of noise, initialisation and order.
        recipe: of a flat router a `Recipe` or a name in `RECIPES` (default `"utility"`; `"dual-rs"` as its authors run it), else
            a `DeferralRecipe` or a name in `DEFERRAL_RECIPES` (`"deferral"`, `"deferral-confidence"`, `"deferral-grid"`,
            `"deferral-sure"`, `"deferral-whole"`, `"quick"`).
        routing_labels: of a flat router: labels made before; None: made here with `label_n` votes per expert and image.
        label_n: see `routing_labels`.
        validation: images and labels that choices are made on; None: the last fifth of `images`, which then train nothing (a
            flat router that is asked for goes without).
        plan_n, alpha: the certification that thresholds are chosen for.
        floor: least wanted ratio of certified accuracy to the experts' envelope, for all radii or by radius (other radii: .915).
        weights: what each radius counts in the mean of the ratios, by radius; the others count 1.
        never_below: expert by radius: the router shall certify there no less than this expert does.
        networks: whole networks of the router's own that a deferral router may ask as well: the voter each is to be (`whole`, its
            head names the network) and the module. One network may be offered at several noise levels.
        core_at: threshold of the chain's last stage: where no class reaches this share of its votes, the input is left to the
            pool's core. None: the last stage answers always, and the core only where that gives no certificate.
        device: where experts vote.
        execution: how experts vote, and how the routed classifier is to run, which records it (a dtype moves votes, and
            thresholds are chosen for these). None: the parent's, or the default.
        parent: a router to train further where the kind is given by name: heads of the same shape start from its weights, a
            flat router keeps its weights and the logits of the experts that are still there, a cascade's thresholds are searched
            further. Its pool may hold other experts.
        out: folder to save to (`config.json`, `router.safetensors`, `training.jsonl`); must not hold another router. A training
            that was killed leaves its log and a state there; the same call resumes it and ends at the same bits.
        notes: written into the first line of `training.jsonl` (a parent and its revision, the data's name).
        show: progress bars on stderr; None: on a terminal, unless there is a callback.
        progress: called with (epoch, epochs, loss) of a flat router.
        votes: called with the number of forward passes of single experts since the last call.
        log: called with every line of the log, JSON-ready.
        store: finished units; with `out` a training keeps its own there.
    """

    pool: ExpertPool
    router: Router | str
    images: Tensor
    labels: Tensor
    radii: Sequence[float] = ()
    seed: int = 0
    recipe: Any = None
    routing_labels: Labels | None = None
    label_n: int = 100
    validation: tuple[Tensor, Tensor] | None = None
    plan_n: int = 10_000
    alpha: float = 1e-3
    floor: float | Mapping[float, float] = 0.915
    weights: Mapping[float, float] | None = None
    never_below: Mapping[float, str] | None = None
    networks: Sequence[tuple[Voter, nn.Module]] = ()
    core_at: float | None = None
    device: str | None = None
    execution: Execution | None = None
    parent: RoutedSmooth | None = None
    out: str | Path | None = None
    notes: Mapping[str, Any] | None = None
    show: bool | None = None
    progress: Callable[[int, int, float], None] | None = None
    votes: Callable[[int], None] | None = None
    log: Callable[[dict[str, Any]], None] | None = None
    store: ResumeStore = field(default_factory=ResumeStore)

    def checked(self) -> Training:
        """The same with everything checked and settled: sorted radii, float32 images, validation images of its own.

        Raises:
            InputError: images, labels, radii, kind or wishes that do not fit.
            NetworkError: an expert that was changed after it was wrapped.
        """
        if not (self.router in KINDS if isinstance(self.router, str) else isinstance(self.router, Router)):
            raise InputError(
                "Unknown kind of router",
                expected=f"a Router, or one of {KINDS}",
                received=repr(self.router),
                remedy="router='auto'",
            )
        if not isinstance(self.pool, ExpertPool):
            raise InputError(
                "Training needs a pool of experts",
                expected="an ExpertPool",
                received=type(self.pool).__name__,
                remedy='ExpertPool([expert, other]), or ExpertPool("pool.json")',
            )
        if check_seed(self.seed) < 0:
            raise InputError(
                "A training's seed is negative", expected="0 or more", received=repr(self.seed), remedy="leave it out"
            )
        for expert in self.pool:
            expert.check_unchanged()
        images, labels = self._labelled(self.images, self.labels)
        try:
            grid = tuple(sorted({float(r) for r in self.radii})) if not isinstance(self.radii, str) else ()
        except (TypeError, ValueError):
            grid = ()
        if not grid or not all(0.0 <= r < float("inf") for r in grid):
            raise InputError(
                "Training needs the radii you care about",
                expected="finite radii >= 0",
                received=repr(self.radii),
                remedy="radii=[0, 0.25, 0.5, ...]",
            )
        validation, routing = self.validation, self.routing_labels
        if validation is not None:
            pair = isinstance(validation, tuple | list) and len(validation) == 2
            if not pair or (isinstance(validation[0], Tensor) and not len(validation[0])):
                raise InputError(
                    "Validation images cannot be read",
                    expected="a pair (images, labels) of one image or more",
                    received="no image" if pair else type(validation).__name__,
                    remedy="validation=(images, labels), or leave it out",
                )
            validation = self._labelled(*validation)
        elif self.kind != "flat":
            cut = len(images) - len(images) // 5
            if len(images) < 10:
                raise InputError(
                    "Too few images to choose on",
                    expected="validation images, or ten images or more",
                    received=str(len(images)),
                    remedy="pass validation=(images, labels)",
                )
            if routing is not None:
                routing = Labels(routing.radius[:cut], routing.predict[:cut])
            validation, images, labels = (images[cut:], labels[cut:]), images[:cut], labels[:cut]
        execution = self.execution or (Execution() if self.parent is None else self.parent.execution)
        new = replace(
            self, images=images, labels=labels, radii=grid, validation=validation, routing_labels=routing, execution=execution
        )
        if self.networks:
            new._check_networks()
        return replace(new, **new._wishes())

    def _labelled(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = check_images(images, self.pool.input_shape)
        y = check_labels(labels, len(x), self.pool.num_classes)
        # tensors made in inference mode cannot take part in training
        return x.clone() if x.is_inference() else x, y.clone() if y.is_inference() else y

    def _wishes(self) -> dict[str, Any]:
        """`floor`, `weights` and `never_below` by radius as numbers, whatever a radius was written as (JSON has only text)."""
        remedy = "floor={0.0: 0.98}, weights={1.0: 2.0}, never_below={1.0: 'sigma_1'}"
        told: dict[str, Any] = {"floor": self.floor, "weights": self.weights, "never_below": self.never_below}
        wishes = dict[str, dict[float, Any]]()
        for name, given in told.items():
            if name == "floor" and not isinstance(given, Mapping):
                given = dict.fromkeys(self.radii, given)
            try:
                by_radius = dict({} if given is None else given)
                wishes[name] = {float(radius): value for radius, value in by_radius.items()}
                if len(wishes[name]) < len(by_radius):  # 0 and "0"
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                raise InputError(
                    f"{name} cannot be read",
                    expected="values by radius, each radius once" + (", or one number" if name == "floor" else ""),
                    received=repr(given),
                    remedy=remedy,
                ) from None
        floors, weights, experts = wishes.values()
        if odd_floors := [v for v in floors.values() if not (_is_number(v) and 0.0 <= v <= MOST_FLOOR)]:
            raise InputError(
                "A floor must be a share of the experts' envelope, not a percentage",
                expected=f"numbers from 0 to {MOST_FLOOR:g}: 1 is as much as the best expert certifies at a radius",
                received=repr(odd_floors[0]),
                remedy="floor=0.95, or by radius floor={0.0: 0.98, 1.0: 0.95}",
            )
        strange = [r for r in (*floors, *weights, *experts) if r not in self.radii]
        unknown = [name for name in experts.values() if name not in self.pool.names]
        odd = [v for v in weights.values() if not (_is_number(v) and v >= 0.0)]
        silent = not odd and all(weights.get(r, 1.0) == 0 for r in self.radii)
        if strange or unknown or odd or silent:
            raise InputError(
                "What the router is to reach cannot be read",
                expected=f"radii of {list(self.radii)}, weights >= 0 (not all 0), experts of {list(self.pool.names)}",
                received=", ".join(
                    f"{what} {values}"
                    for what, values in (("other radii", strange), ("weights", odd), ("unknown experts", unknown))
                    if values
                )
                or "weights that are all 0",
                remedy=remedy,
            )
        return {
            "floor": floors if isinstance(self.floor, Mapping) else self.floor,
            "weights": weights or None,
            "never_below": experts or None,
        }

    def _check_networks(self) -> None:
        modules = {voter.head: module for voter, module in self.networks if voter.head is not None}
        if not all(v.whole and modules.get(v.head or "") is module for v, module in self.networks):
            raise InputError(
                "The router's own networks cannot be told apart",
                expected="voters with whole=True, whose head names their network, one module for each name",
                received=str([voter for voter, _ in self.networks]),
                remedy="networks=[(Voter('sigma_0.5', 0.6, 'own', whole=True), module)]",
            )
        for voter, _ in self.networks:
            check_voters([voter], self.pool, modules)
            if voter.confidence:
                raise InputError(
                    "A network that is offered has a confidence of its own",
                    expected="voters of confidence 0: the recipe says which others are tried",
                    received=str(voter),
                    remedy=f"recipe=DeferralRecipe(confidences=({voter.confidence:g},))",
                )

    @property
    def kind(self) -> str:
        """The kind of router that is asked for."""
        return self.router if isinstance(self.router, str) else self.router.kind

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """The validation images and labels; InputError where there are none."""
        if self.validation is None:
            raise InputError(
                "No validation images", expected="images to choose on", received="none", remedy="pass validation=(images, labels)"
            )
        return self.validation

    @property
    def wishes(self) -> dict[str, Any]:
        """What a router should reach, as `goal_of` takes it."""
        return {"floor": self.floor, "weights": self.weights, "never_below": self.never_below}

    def say(self, line: dict[str, Any]) -> None:
        """A line of the log."""
        if self.log is not None:
            self.log(line)

    def doubt(self, sentences: Iterable[str]) -> None:
        """Lines of the log that warn of the choice; `train_router` warns in words, too."""
        for sentence in sentences:
            self.say({"doubt": sentence})

    def expert_votes(self, images: Tensor, n: int, purpose: str, pool: ExpertPool | None = None) -> NDArray[np.int64]:
        """`(N, K, classes + 1)` votes of every expert (of `pool` instead) on `images (N, C, H, W)`."""
        return label_votes(
            pool or self.pool,
            images,
            n=n,
            seed=self.seed,
            purpose=purpose,
            device=self.device,
            execution=self.execution,
            progress=self.votes,
            store=self.store,
        )

    def features(
        self,
        experts: Sequence[Expert],
        sigma: float,
        images: Tensor,
        copies: int,
        purpose: str,
        grid: int = 1,
        quiet: bool = False,
    ) -> Tensor:
        """`noisy_features` of `experts`; `quiet` ones are not counted as votes."""
        return noisy_features(
            experts,
            sigma,
            images,
            copies,
            seed=self.seed,
            purpose=purpose,
            grid=grid,
            device=self.device,
            execution=self.execution,
            progress=None if quiet else self.votes,
            store=self.store,
        )

    def targets(self, votes: NDArray[np.int64], labels: Tensor, *, carried: bool = True) -> Labels:
        """Routing labels from votes, `carried` over to the certification's votes or as so few votes certify."""
        if carried:
            return target_radii(votes, labels.numpy(), self.pool.sigmas, plan_n=self.plan_n, alpha=self.alpha)
        return radii_from_votes(votes, labels.numpy(), self.pool.sigmas, self.alpha)


def named_recipe(given: Any, default: str, recipes: Mapping[str, R], kind: type[R]) -> R:
    """The recipe that is given by name or as itself; InputError for anything else."""
    found = recipes.get(default if given is None else given) if given is None or isinstance(given, str) else given
    if not isinstance(found, kind):
        raise InputError(
            "The recipe is unknown, or for another kind of router",
            expected=f"one of {sorted(recipes)}, or a {kind.__name__}",
            received=repr(given),
            remedy="flat routers take a Recipe, the others a DeferralRecipe",
        )
    return found


def _is_number(value: Any) -> bool:
    """Whether it is a real number that float64 holds."""
    try:
        return isinstance(value, Real) and isfinite(value)
    except OverflowError:
        return False
