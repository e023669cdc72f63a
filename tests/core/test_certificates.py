"""Each step of a certificate against a value worked out without it; fast, so that mutants of the code die here first."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from rsrouter.core import PlanError, Stage, Tree, entry_radii, tree_radius, vote_radius
from rsrouter.core.certificates import _distance, fixed_reference, group_entries, no_entries, recursion

mpmath.mp.dps = 40

PROBABILITIES = [1e-9, 0.03, 0.2, 0.4, 0.6, 0.9, 0.999, 1 - 1e-9]


def z(p: float) -> mpmath.mpf:
    """Phi^-1 to forty digits."""
    return mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)


def just_below(found: float, exact: mpmath.mpf, *, within: float = 1e-12) -> bool:
    """At most the exact value (0 where that is negative), and not much less."""
    if exact <= 0:
        return found == 0.0
    return bool(mpmath.mpf(float(found)) < exact and exact - mpmath.mpf(float(found)) < within)


@pytest.mark.parametrize("sigma", [0.12, 0.5, 1.0, 2, np.float32(0.25)])
def test_radius_of_one_vote_is_rounded_down(sigma: float):
    for lower in PROBABILITIES:
        assert just_below(vote_radius(sigma, lower), float(sigma) * z(lower))
        for upper in PROBABILITIES:
            # a rival has no more than what the top class leaves over
            rival = z(upper) if mpmath.mpf(upper) < 1 - mpmath.mpf(lower) else -z(lower)
            found = vote_radius(sigma, [lower], [upper])
            assert found.shape == (1,)
            assert just_below(found[0], float(sigma) / 2 * (z(lower) - rival), within=1e-9)


def test_rounding_is_downwards_to_the_last_bit():
    """Neither scipy's quantile nor the product may land above the exact radius, whatever the digits."""
    rng = np.random.default_rng(0)
    for lower in rng.uniform(0.5, 1, 400):
        exact = mpmath.mpf(0.3) * z(lower)
        found = float(vote_radius(0.3, lower))
        assert mpmath.mpf(found) < exact
        assert found > float(exact) * (1 - 1e-13)


def test_distances_are_one_bit_down_and_never_below_0():
    one, inf = np.ones(1), np.array([np.inf])
    assert _distance(0.5, 3 * one, one)[0] == np.nextafter(1.0, 0.0)
    assert _distance(0.5, one, one)[0] == 0.0
    assert _distance(0.5, one, 3 * one)[0] == 0.0
    assert _distance(0.5, inf, one)[0] == np.inf
    assert _distance(0.5, one, -inf)[0] == np.inf
    assert _distance(0.5, inf, inf)[0] == 0.0
    assert _distance(0.5, one * np.nan, one)[0] == 0.0


def test_bounds_of_exactly_0_or_1_certify_nothing():
    """No finite number of votes gives them, only rounding does; nothing is said about it on the way."""
    for lower, upper in ((1.0, None), (1.0, 0.0), (0.9, 0.0), (0.0, None), (0.0, 1.0)):
        assert vote_radius(0.5, lower, upper) == 0.0


def test_text_bounds_are_numbers_and_half_precision_is_not_kept():
    assert vote_radius(1.0, np.float16(0.75)) == vote_radius(1.0, 0.75)
    assert vote_radius(1.0, "0.75") == vote_radius(1.0, 0.75)
    assert vote_radius(1.0, [0.75], ["0.125"])[0] == vote_radius(1.0, [0.75], [0.125])[0]


@pytest.mark.parametrize("sigma", [0.0, -0.5, np.nan, np.inf])
def test_no_radius_without_a_noise_level(sigma: float):
    with pytest.raises(PlanError):
        vote_radius(sigma, 0.9)


PLURALITY = Stage("p", 0.5, leads_to=(0, 1, "t"))
THRESHOLD = Stage("t", 0.25, "threshold", 0.7, (0, 1, 2))


def test_entry_radii_of_a_plurality_stage():
    lower = np.array([[0.6, 0.05, 0.2], [0.1, 0.2, 0.5], [0.6, 0.05, 0.2], [0.3, 0.2, 0.2]])
    upper = np.array([[0.7, 0.1, 0.3], [0.2, 0.3, 0.6], [0.7, 0.1, 0.3], [0.4, 0.3, 0.5]])
    entry = entry_radii(PLURALITY, lower, upper, np.array([0, 2, -1, 0]))
    assert entry.shape == (4, 3)
    assert entry[0, 0] == entry[1, 2] == 0.0
    assert just_below(entry[0, 1], mpmath.mpf(0.25) * (z(0.6) - z(0.1)))
    assert just_below(entry[0, 2], mpmath.mpf(0.25) * (z(0.6) - z(0.3)))
    assert just_below(entry[1, 0], mpmath.mpf(0.25) * (z(0.5) - z(0.2)))
    assert just_below(entry[1, 1], mpmath.mpf(0.25) * (z(0.5) - z(0.3)))
    assert not entry[2].any()  # nothing was selected, so no lower bound may be used
    assert entry[3, 2] == 0.0  # a rival that may already win
    assert entry[3, 1] == 0.0
    # the reference's own upper bound is not read, not even where it contradicts the lower one
    upper[:, 0] = [1e-6, 0.2, 0.7, 1e-6]
    assert entry_radii(PLURALITY, lower, upper, np.array([0, 2, -1, 0]))[:, 0].tolist() == [0.0, entry[1, 0], 0.0, 0.0]


def test_entry_radii_of_a_threshold_stage():
    lower, upper = (
        np.array([[0.8, 0.05], [0.1, 0.75], [0.8, 0.05], [0.6, 0.2]]),
        np.array([[0.9, 0.1], [0.2, 0.85], [0.9, 0.1], [0.65, 0.3]]),
    )
    entry = entry_radii(THRESHOLD, lower, upper, np.array([0, 1, -1, 0]))
    tau = z(0.7)
    assert entry.shape == (4, 3)
    assert just_below(entry[0, 2], mpmath.mpf(0.25) * (z(0.8) - tau))
    assert just_below(entry[1, 2], mpmath.mpf(0.25) * (z(0.75) - tau))
    assert entry[2, 2] == 0.0
    assert entry[3, 2] == 0.0
    for row in range(4):
        for outcome in range(2):
            assert just_below(entry[row, outcome], mpmath.mpf(0.25) * (tau - z(upper[row, outcome])))


def test_a_bound_above_tau_by_its_last_bit_keeps_nothing():
    """Both quantiles carry a margin of 1e-14, larger than what one bit of a probability near 1 is worth."""
    stage = Stage("t", 1.0, "threshold", 0.999, (0, 1, 2))
    over, under = np.nextafter(0.999, 1.0), np.nextafter(0.999, 0.0)
    entry = entry_radii(stage, [[over, 0.0]], [[under, 0.001]], np.array([0]))[0]
    assert entry[0] == entry[2] == 0.0


def test_entry_radii_round_down_at_every_threshold():
    rng = np.random.default_rng(1)
    for tau, hi, lo in zip(rng.uniform(0.5, 1, 200), rng.uniform(0, 1, 200), rng.uniform(0.5, 1, 200), strict=True):
        stage = Stage("t", 1.0, "threshold", float(tau), (0, 1, 2))
        entry = entry_radii(stage, [[lo, 0.0]], [[hi, 0.5]], np.array([0]))[0]
        assert entry[0] == 0.0 or mpmath.mpf(entry[0]) < z(tau) - z(hi)
        assert entry[2] == 0.0 or mpmath.mpf(entry[2]) < z(lo) - z(tau)


@pytest.mark.parametrize(
    ("lower", "upper", "rows"),
    [
        (np.ones((2, 3)), np.ones((2, 2)), 2),
        (np.ones((2, 2)), np.ones((2, 2)), 2),
        (np.ones((1, 3)), np.ones((1, 3)), 2),
        (np.ones((2, 3, 1)), np.ones((2, 3, 1)), 2),
        (np.ones(3), np.ones(3), 3),
    ],
)
def test_bounds_of_another_shape_are_refused(lower, upper, rows):
    with pytest.raises(PlanError, match="wrong shape"):
        entry_radii(PLURALITY, lower, upper, np.zeros(rows, int))


def test_bounds_may_be_lists_of_text():
    bounds = [[0.6, 0.05, 0.2]], [[0.7, 0.1, 0.3]]
    text = [[str(v) for v in row] for row in bounds[0]], [[str(v) for v in row] for row in bounds[1]]
    reference = np.array([0])
    np.testing.assert_array_equal(entry_radii(PLURALITY, *text, reference), entry_radii(PLURALITY, *bounds, reference))


def test_reference_by_default_is_the_outcome_that_answers_the_class():
    stage = Stage("s", 0.5, leads_to=(2, "a", 1, 1, -1))
    assert fixed_reference(stage, np.array([1, 2, 0, -1, 7])).tolist() == [2, 0, -1, -1, -1]
    # the last target of a threshold stage is no outcome
    assert fixed_reference(THRESHOLD, np.array([0, 1, 2])).tolist() == [0, 1, -1]


def test_reference_given_for_one_or_each_image():
    one = Stage("s", 0.5, leads_to=(0, 1, 2), reference=2)
    assert fixed_reference(one, np.array([5, 6])).tolist() == [2, 2]
    each = Stage("s", 0.5, leads_to=(0, 1, 2), reference=np.array([-1, 0], np.int8))
    found = fixed_reference(each, np.array([5, 6]))
    assert found.tolist() == [-1, 0]
    assert found.dtype == np.int64
    unsigned = Stage("s", 0.5, leads_to=(0, 1, 2), reference=np.array([1, 0], np.uint8))
    assert fixed_reference(unsigned, np.array([5, 6])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "reference", [-2, 3, 0.0, True, np.array([0]), np.array([0, 1, 2]), np.array([[0], [0]]), np.array([0, 3])]
)
def test_reference_that_is_no_outcome_is_refused(reference):
    stage = Stage("s", 0.5, leads_to=(0, 1, 2), reference=reference)
    with pytest.raises(PlanError, match="reference of stage 's'"):
        fixed_reference(stage, np.array([0, 0]))


def test_grouping_keeps_the_smallest_entry_of_each_destination():
    stage = Stage("s", 0.5, leads_to=(0, "a", 1, "a", -1, "b", 0))
    entry = np.array([[9.0, 4.0, 3.0, 5.0, 2.0, 7.0, 0.0]] * 3)
    assert stage.children == ("a", "b")
    np.testing.assert_array_equal(group_entries(stage, entry, np.array([0, 1, 2])), [[2, 4, 7], [0, 4, 7], [0, 4, 7]])
    same = Stage("s", 0.5, leads_to=(0, 0, "a"))
    np.testing.assert_array_equal(group_entries(same, np.array([[1.0, 2.0, 3.0]]), np.array([0])), [[np.inf, 3.0]])
    np.testing.assert_array_equal(no_entries(same, np.array([0, 1])), [[np.inf, 0.0], [0.0, 0.0]])


def diamond() -> Tree:
    return Tree.of(
        [
            Stage("r", 1.0, leads_to=("a", "b", 1)),
            Stage("a", 0.5, leads_to=(0, 1)),
            Stage("b", 0.5, leads_to=(0, 1)),
        ]
    )


@pytest.mark.parametrize(
    ("wrong", "to_a", "to_b", "a", "b", "radius", "by"),
    [
        (9.0, 0.0, 5.0, 3.0, 1.0, 3.0, "a"),  # the chosen expert holds less far than the other one takes over
        (9.0, 0.0, 2.0, 3.0, 1.0, 2.0, "r"),  # the other expert, worse, takes over first
        (9.0, 0.0, 2.0, 3.0, 2.5, 2.5, "b"),  # it takes over first, but agrees for a while
        (1.0, 0.0, 5.0, 3.0, 4.0, 1.0, "r"),  # a wrong answer of the root itself
        (9.0, 0.0, 2.0, 3.0, 2.0, 2.0, "r"),  # equal: the stage nearer to the root is named
        (3.0, 0.0, 5.0, 3.0, 4.0, 3.0, "r"),
        (np.inf, 0.0, 0.0, np.inf, np.inf, np.inf, "r"),  # everything answers the class
    ],
)
def test_recursion_by_hand(wrong, to_a, to_b, a, b, radius, by):
    tree = diamond()
    found, code = recursion(tree, {"r": np.array([[wrong, to_a, to_b]]), "a": np.array([[a]]), "b": np.array([[b]])})
    assert found.tolist() == [radius]
    assert tree.order[code[0]] == by


FAR = (
    {"r": [[0.9, 0.0, 0.0]], "a": [[0.8, 0.0]], "b": [[0.7, 0.0]]},
    {"r": [[1.0, 0.05, 0.01]], "a": [[1.0, 0.2]], "b": [[1.0, 0.3]]},
)


def chosen_a() -> Tree:
    stages = dict(diamond().stages)
    return Tree.of([Stage("r", 1.0, leads_to=("a", "b", 1), reference=0), stages["a"], stages["b"]])


def test_tree_radius_from_bounds_to_the_name_of_the_stage():
    tree = chosen_a()
    radius, by = tree_radius(tree, None, *FAR, [0])
    # b holds .262 and enters at 1.463; a holds .421
    assert just_below(radius[0], mpmath.mpf(0.5) * z(0.8))
    assert by.tolist() == ["a"]
    assert by.dtype == object
    for given, root in ((tree.stages, None), (list(tree.stages.values())[::-1], "r"), (tree, "r")):
        again, who = tree_radius(given, root, *FAR, np.array([0]))
        assert again.tolist() == radius.tolist()
        assert who.tolist() == ["a"]
    below, by = tree_radius(tree, "b", *FAR, [0])
    assert just_below(below[0], mpmath.mpf(0.5) * z(0.7))
    assert by.tolist() == ["b"]


def test_a_root_further_down_keeps_only_what_it_reaches():
    chain = Tree.of(
        [
            Stage("s", 1.0, leads_to=(0, "t")),
            Stage("t", 1.0, leads_to=(0, "u", "v")),
            Stage("u", 1.0, leads_to=(0, "v")),
            Stage("v", 0.5, leads_to=(0, 1)),
        ]
    )
    radius, by = tree_radius(chain, "t", {"v": [[0.8, 0.0]]}, {"v": [[1.0, 0.2]]}, [0])
    assert just_below(radius[0], mpmath.mpf(0.5) * z(0.8))
    assert by.tolist() == ["v"]
    with pytest.raises(PlanError):
        tree_radius(chain, "nobody", {}, {}, [0])


def without(bounds, name):
    return {key: rows for key, rows in bounds.items() if key != name}


def test_a_stage_without_both_bounds_was_not_sampled():
    tree = chosen_a()
    lower, upper = FAR
    full = tree_radius(tree, None, lower, upper, [0])[0][0]
    for name, expected in (("r", 0.0), ("a", 0.0), ("b", full)):  # b only matters farther out than a holds
        for side in ({"lower": without(lower, name), "upper": upper}, {"lower": lower, "upper": without(upper, name)}):
            assert tree_radius(tree, None, c=[0], **side)[0][0] == expected


def test_masks_say_which_images_were_sampled():
    lower, upper = ({name: np.repeat(rows, 3, axis=0) for name, rows in side.items()} for side in FAR)
    tree = chosen_a()
    full, _ = tree_radius(tree, None, lower, upper, [0, 0, -1])
    assert full[0] == full[1] > 0.0
    assert full[2] == 0.0
    mask = {"a": np.array([True, False, True])}
    radius, _ = tree_radius(tree, None, lower, upper, [0, 0, 0], sampled=mask)
    # unsampled, a holds nothing, and it is where the router sends the image
    np.testing.assert_array_equal(radius, [full[0], 0.0, full[0]])
    for bad in (np.array([1, 0, 1]), np.array([True, False]), np.ones((3, 1), bool)):
        with pytest.raises(PlanError, match="mask of stage 'a'"):
            tree_radius(tree, None, lower, upper, [0, 0, 0], sampled={"a": bad})


@pytest.mark.parametrize("c", [[0.0], [[0]], [True], ["0"]])
def test_classes_are_whole_numbers_one_per_image(c):
    with pytest.raises(PlanError, match="certified class"):
        tree_radius(chosen_a(), None, *FAR, c)


def test_abstaining_is_never_certified():
    """Not even where every vote went to an outcome that answers nothing."""
    stage = Stage("e", 0.5, leads_to=(0, -1), reference=1)
    bounds = {"e": [[0.0, 0.99]]}, {"e": [[0.01, 1.0]]}
    assert tree_radius([stage], None, *bounds, [-1])[0].tolist() == [0.0]
    assert tree_radius([stage], None, {"e": [[0.99, 0.0]]}, {"e": [[1.0, 0.01]]}, [0])[0].tolist() == [0.0]


def test_classes_of_any_whole_type():
    for dtype in (np.uint8, np.int16, np.uint64):
        assert tree_radius(chosen_a(), None, *FAR, np.zeros(1, dtype))[0][0] > 0.0
    assert tree_radius(chosen_a(), None, *FAR, 0)[0].shape == (1,)
