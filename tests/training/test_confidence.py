"""Votes that count for a class only where the network is sure enough of it (`Voter.confidence`)."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from rsrouter import (
    Expert,
    ExpertPool,
    FixedPlan,
    InputError,
    NetworkError,
    RoutedSmooth,
    Terms,
    build_architecture,
    train_router,
)
from rsrouter.audit.attack import attack
from rsrouter.core.titles import stage_titles
from rsrouter.experts.preprocessing import Resize
from rsrouter.router import CascadeRouter, DeferralRouter, Voter
from rsrouter.router.chain import bind_chain, reject_unsure
from rsrouter.router.words import decides
from rsrouter.sampling.logits import votes_of
from rsrouter.training import DeferralRecipe
from rsrouter.training.whole import whole_votes
from tests.helpers.designs import CHANGE, unsure

KWARGS = {"channels": (4, 4), "hidden": 8, "size": 8}
TERMS = Terms(FixedPlan(50, 2000), alpha=0.01)


@pytest.fixture(scope="module")
def pool():
    torch.manual_seed(0)
    given = {"input_shape": (1, 8, 8), "num_classes": 2, "mean": (0.5,), "std": (0.3,)}
    networks = [build_architecture("small_cnn", 2, KWARGS).eval() for _ in range(2)]
    return ExpertPool([Expert(n, sigma=s, name=name, **given) for n, s, name in zip(networks, (0.25, 0.5), "ab", strict=True)])


def test_a_vote_names_a_class_exactly_where_its_softmax_reaches_the_confidence():
    logits = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)) * 2
    for confidence in (0.25, 0.5, 0.9):
        top, named = logits.double().softmax(1).max(1)
        clear = (top - confidence).abs() > 1e-6
        expected = torch.where(top >= confidence, named, 5)
        assert torch.equal(votes_of(reject_unsure(logits, confidence))[clear], expected[clear])
        assert 0 < (expected == 5).sum() < 2000 or confidence == 0.25


def test_logits_that_are_no_vote_stay_no_vote():
    inf, nan = float("inf"), float("nan")
    odd = torch.tensor([[nan, 1.0], [inf, 1.0], [-inf, -inf], [5.0, -inf], [inf, inf]])
    assert votes_of(reject_unsure(odd, 0.6)).tolist() == [3, 3, 3, 0, 3]
    assert votes_of(reject_unsure(odd.bfloat16(), 0.6)).tolist() == [3, 3, 3, 0, 3]


def test_certificates_hold_at_the_boundary_and_come_near_it():
    design = unsure()
    certified = design.certify(Terms(FixedPlan(100, 20_000), alpha=0.01), 40)
    assert design.true_radius(0) == pytest.approx(CHANGE, abs=1e-6)
    assert design.violations(certified) <= 3
    assert np.median([c.radius for c in certified if c.predict == 0]) > 0.9 * CHANGE
    (stage, *_), counts = design.smooth.routed.tree.stages.values(), certified[0].counts
    assert counts[stage.name][2] > 1000  # there are unsure votes, and they are neither a class's nor invalid
    assert counts[stage.name][3] == 0


@pytest.mark.parametrize("plain_first", [True, False])
def test_an_expert_in_one_pass_with_heads_keeps_its_name(pool, plain_first):
    head = torch.nn.Linear(2, 2)
    voters = [Voter("a"), Voter("a", None, "h"), Voter("a")]
    voters = voters if plain_first else voters[1:]
    tree = bind_chain(pool, voters, (0.7,) * (len(voters) - 1), {"h": head}).tree
    titles = stage_titles([tree.stages[name] for name in reversed(tree.order)], pool.names)
    own = [f"a at noise {pool['a'].sigma:g}", f"a at noise {pool['a'].sigma:g} again"]
    on = f"head on a at noise {pool['a'].sigma:g}"
    assert list(titles.values()) == ([own[0], on, own[1]] if plain_first else [on, own[0]])


def test_unsure_votes_lead_where_deferral_leads(pool):
    routed = bind_chain(pool, [Voter("b", confidence=0.6), Voter("a")], (0.6,))
    first, last = routed.tree.stages["b itself@0.5"], routed.tree.stages["a"]
    assert first.leads_to == (0, 1, "a", -1, "a")
    assert last.leads_to == (0, 1, -1)
    to_core = bind_chain(pool, [Voter("b", confidence=0.6)], (0.6,))
    assert to_core.tree.stages["b itself@0.5"].leads_to == (0, 1, -1, -1, -1)
    assert decides(routed, pool.names)[0].endswith(
        "answers where one class has at least 60% of the votes (counting those whose softmax is at least 0.6), else asks a"
    )


def test_two_confidences_on_one_network_share_its_passes(pool):
    voters = [Voter("b", confidence=0.7), Voter("a"), Voter("b", confidence=0.6), Voter("b")]
    routed = bind_chain(pool, voters, (0.6, 0.6, 0.6))
    (shared,) = [m for m in routed.models if len(m.stages) == 3]
    assert shared.widths == (3, 3, 2)
    image = torch.rand(4, 1, 8, 8)
    strict, loose, plain = shared.module(image)
    assert torch.equal(strict[:, :2], plain)
    assert torch.equal(loose[:, 2] > strict[:, 2], torch.zeros(4, dtype=torch.bool))


def test_a_confidence_is_part_of_what_a_classifier_is(pool):
    digests = {
        bind_chain(pool, [Voter("b", confidence=c), Voter("a")], (0.6,)).digest for c in (0.0, 0.4, np.nextafter(0.4, 1.0))
    }
    assert len(digests) == 3
    assert bind_chain(pool, [Voter("b"), Voter("a")], (0.6,)).digest in digests
    assert CascadeRouter((0.6,), ["b", "a"]).bind(pool).digest in digests


def test_it_is_saved_and_loaded(pool, tmp_path):
    router = DeferralRouter([Voter("b", 0.4, confidence=0.55), Voter("a")], [0.6])
    RoutedSmooth(pool, router).save_pretrained(tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())["router"]
    assert config["voters"][0]["confidence"] == 0.55
    assert config["voters"][1]["confidence"] == 0.0
    loaded = DeferralRouter.from_config(config)
    assert loaded.digest == router.digest
    assert loaded.voters == router.voters


def test_predict_and_certify_ask_the_same_classifier(pool):
    sure = RoutedSmooth(pool, DeferralRouter([Voter("b", confidence=0.999), Voter("a")], [0.6]))
    alone = RoutedSmooth(pool, CascadeRouter([], ["a"]))
    x = torch.rand(6, 1, 8, 8)
    held = sure.certify(x, TERMS)
    assert [c.predict for c in held] == [c.predict for c in alone.certify(x, TERMS)]
    assert all(c.counts["b itself@0.5"][2] > 1900 for c in held)  # nobody is that sure, so all of it is asked of the next voter
    answers = sure.predict(x, n=500)
    assert all(a in (-1, c.predict) for a, c in zip(answers, held, strict=True))


@pytest.mark.parametrize("confidence", [1.0, -0.1, float("nan"), "0.5", None])
def test_a_confidence_that_cannot_be(pool, confidence):
    with pytest.raises(InputError, match="confidence is out of range"):
        bind_chain(pool, [Voter("b", confidence=confidence), Voter("a")], (0.6,))


def test_the_last_voter_has_nobody_to_ask(pool):
    with pytest.raises(InputError, match="cannot defer"):
        bind_chain(pool, [Voter("b"), Voter("a", confidence=0.5)], (0.6,))


def test_a_deterministic_expert_has_no_votes(pool):
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    silent = Expert(linear, lipschitz=2.0, num_classes=2, input_shape=(1, 8, 8), name="silent")
    with pytest.raises(InputError, match="cannot vote"):
        bind_chain(ExpertPool([silent, *pool]), [Voter("silent", confidence=0.5), Voter("a")], (0.6,))


def pictures(n, seed):
    """Ten classes by brightness; labels 0 and 1 only."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.rand((n, 1, 8, 8), generator=generator) * 0.2 + 0.7 * y[:, None, None, None], y


def test_training_offers_each_confidence_and_chooses_on_validation_images(pool):
    x, y = pictures(60, 0)
    own = build_architecture("small_cnn", 2, KWARGS).eval()
    recipe = DeferralRecipe(heads=(), tune_copies=40, confidences=(0.51, 0.6))
    lines = []
    given = {"radii": (0.0, 0.25), "plan_n": 1000, "log": lines.append}
    routed = train_router(pool, "deferral", x, y, recipe=recipe, networks=[(Voter("b", 0.5, "own", whole=True), own)], **given)
    names = {stage[0] for line in lines if "frontier" in line for point in line["frontier"] for stage in point["chain"]}
    assert names <= {"a", "b", "own@0.5", "own@0.5~0.51", "own@0.5~0.6"}
    last = routed.router.voters[-1] if isinstance(routed.router, DeferralRouter) else Voter("a")
    assert last.confidence == 0.0
    with pytest.raises(InputError, match="confidences are out of range"):
        DeferralRecipe(confidences=(0.0,))
    voter = Voter("b", 0.5, "own", whole=True, confidence=0.5)
    with pytest.raises(InputError, match="has a confidence of its own"):
        train_router(pool, "deferral", x, y, recipe=recipe, networks=[(voter, own)], **given)


def test_counts_at_several_confidences_are_of_the_same_copies(pool):
    x, _ = pictures(10, 1)
    given = {"seed": 0, "purpose": "tune"}
    plain = whole_votes(pool["b"], pool["b"].module, 0.5, x, 30, **given)
    several = whole_votes(pool["b"], pool["b"].module, 0.5, x, 30, confidences=(0.0, 0.55, 0.9), **given)
    assert np.array_equal(several[0], plain[0])
    assert np.all(several[1] <= several[0])
    assert np.all(several[2] <= several[1])
    assert several[2].sum() < several[0].sum() == 300


def test_a_network_of_its_own_is_identified_with_what_stands_around_it():
    """The expert whose input it reads gives it the order of the classes and the size too, and a memo goes by digest."""
    torch.manual_seed(1)
    own = build_architecture("small_cnn", 2, KWARGS).eval()

    def routed(**around):
        given = {"input_shape": (1, 8, 8), "num_classes": 2, "mean": (0.5,), "std": (0.3,), **around}
        experts = [
            Expert(build_architecture("small_cnn", 2, KWARGS).eval(), sigma=0.5, name="a", **given),
            Expert(build_architecture("small_cnn", 2, KWARGS).eval(), sigma=0.25, name="z", input_shape=(1, 8, 8), num_classes=2),
        ]
        return bind_chain(ExpertPool(experts), [Voter("a", 0.4, "own", whole=True)], (), {"own": own})

    plain, turned = routed(), routed(order=(1, 0))
    resized = routed(resize=Resize(size=(12, 12), crop=(8, 8)))
    assert len({r.digest for r in (plain, turned, resized)}) == 3
    assert len({r.default_seed() for r in (plain, turned, resized)}) == 3
    assert routed().digest == plain.digest


class Planes(torch.nn.Module):
    """Class 1 where one pixel is brighter than `at`."""

    def __init__(self, pixel, at):
        super().__init__()
        self.pixel = pixel
        self.register_buffer("at", torch.tensor(at))

    def forward(self, x):
        z = 40.0 * (x.flatten(1)[:, self.pixel : self.pixel + 1] - self.at)
        return torch.cat([-z, z], 1)


@pytest.mark.parametrize("confidence", [0.0, 0.9])
def test_the_audits_attack_finds_its_way_past_unsure_votes(confidence):
    """A radius of .55 is claimed; along the first pixel the answer changes at about .48, after both stages have turned."""
    given = {"num_classes": 2, "input_shape": (1, 2, 2), "sigma": 0.25}
    pool = ExpertPool([Expert(Planes(0, 0.85), name="first", **given), Expert(Planes(1, 0.75), name="behind", **given)])
    router = RoutedSmooth(pool, DeferralRouter([Voter("first", confidence=confidence), Voter("behind")], [0.7]))
    x, c = torch.full((8, 1, 2, 2), 0.5), torch.zeros(8, dtype=torch.long)
    points = attack(router.routed.tree, router.routed.models, x, c, torch.full((8,), 0.55))
    assert (router.predict(points, n=2000) == 1).sum() >= 2


@pytest.mark.parametrize("given", [0.4, None, "0.4", ("0.4",), (1.0,), (0.4, float("nan"))])
def test_confidences_that_cannot_be_tried(given):
    with pytest.raises(InputError, match="confidences are out of range"):
        DeferralRecipe(confidences=given)


def test_numbers_of_other_libraries_are_numbers():
    assert DeferralRecipe(confidences=np.array([0.25, 0.5])).confidences == (0.25, 0.5)
    assert type(Voter("a", confidence=np.float32(0.5)).confidence) is float
    assert json.dumps(DeferralRouter([Voter("b", confidence=np.float32(0.5)), "a"], [0.6]).to_config())


def test_an_expert_that_returns_no_logits_is_named_as_before():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return {"logits": x.flatten(1)[:, :2]}

    given = {"num_classes": 2, "input_shape": (1, 2, 2)}
    pool = ExpertPool([Expert(Odd(), sigma=0.5, name="odd", **given), Expert(Planes(0, 0.5), sigma=0.25, name="z", **given)])
    routed = RoutedSmooth(pool, DeferralRouter([Voter("odd", confidence=0.6), Voter("z")], [0.6]))
    with pytest.raises(NetworkError, match="wrong shape"):
        routed.certify(torch.rand(1, 1, 2, 2), TERMS)


def test_votes_of_own_networks_are_drawn_in_the_dtype_that_certifies(pool):
    x, _ = pictures(8, 3)
    given = {"seed": 0, "purpose": "tune"}
    seen: set[torch.dtype] = set()
    module = copy.deepcopy(pool["b"].module)
    module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    plain, other = (whole_votes(pool["b"], module, 0.5, x, 60, dtype=dtype, **given) for dtype in ("float32", "int8"))
    assert (plain == other).all()
    assert seen == {torch.float32}
    half = whole_votes(pool["b"], module, 0.5, x, 60, dtype="bfloat16", **given)
    assert torch.bfloat16 in seen
    assert (half.sum(2) == 60).all()
    assert abs(half - plain).sum() <= 60 * 8 * 2 // 10  # a tenth of the votes
