"""The searches along a line: functions of one number, conditions, counts of evaluations, all kinds of ends."""

import numpy as np
import pytest
import tensorflow as tf
from selection import some

from keras_curvature import ArmijoLineSearch, HagerZhang, StrongWolfe
from keras_curvature.steps.search import (
    BUDGET,
    CONDITIONS_MET,
    ENDS,
    INTERVAL,
    NO_SLOPE,
    OneLength,
    search_along,
)

NAN, INF = float("nan"), float("inf")
LINES = {
    # Moré and Thuente (1994), functions 1 and 2
    "more_thuente_1": lambda s: -s / (s * s + 2.0),
    "more_thuente_2": lambda s: (s + 0.004) ** 5 - 2.0 * (s + 0.004) ** 4,
    "quartic": lambda s: (s - 2.0) ** 4 + 0.5 * (s - 2.0) ** 2,
    "wavy": lambda s: 0.1 * s * s - tf.sin(3.0 * s) - s,
    "cosh": lambda s: tf.cosh(s - 1.0),
}  # fmt: skip
FIRST = (1e-3, 0.1, 1.0, 10.0, 100.0)
# tensorflow_probability 0.25.0, `optimizer.linesearch.hager_zhang` with its defaults, float64, at each of `FIRST`:
# evaluations beyond the start, and the length
OF_TFP = {
    "more_thuente_1": [(7, 2.7097050168341514), (4, 2.194), (3, 4.115384615384616), (2, 9.81509433962264),
                       (2, 99.98001599040576)],
    "more_thuente_2": [(12, 1.7183511896426658), (7, 1.609124315432286), None, (12, 1.771820567929378),
                       (15, 1.5979912286222215)],
    "quartic": [(7, 2.207983193277311), (4, 2.375), (3, 1.1724137931034482), (2, 0.16267942583732056),
                (3, 0.6941845593869901)],
    "wavy": [(6, 0.6218865764810655), (7, 7.5496267807764195), (2, 0.6483005823946358), (2, 8.815921173901362),
             (3, 1.7352593384402446)],
    "cosh": [(7, 0.8377502365071593), (4, 0.8932238664829637), (2, 1.0), (3, 0.7624349916139396),
             (7, 0.7615941651005489)],
}  # fmt: skip


def searched(rule, line, first=1.0, dtype=tf.float64):
    """`(found, points)`: the result of a search along a function of one number, and the lengths it looked at."""
    seen = []

    def along(length):
        seen.append(float(length))
        length = tf.cast(length, dtype)
        with tf.GradientTape() as tape:
            tape.watch(length)
            loss = line(length)
        return loss, [tape.gradient(loss, length)[None]]

    loss, gradient = along(tf.zeros((), tf.float64))
    seen.clear()
    found = search_along(rule, along, [tf.ones(1, dtype)], loss, gradient[0][0], gradient, first)
    return found, seen


def slopes(line, length):
    """`(value, slope)` of a line at a length."""
    s = tf.constant(length, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(s)
        value = line(s)
    return float(value), float(tape.gradient(value, s))


@pytest.mark.parametrize("name", LINES)
def test_hager_zhang_looks_where_tensorflow_probability_does(name):
    for first, known in zip(FIRST, OF_TFP[name]):
        if known is None:
            # there it takes an interval for flat whose left end is higher than the right one, and ends after 9
            # evaluations at a point without the conditions; its test of equality is one-sided
            continue
        found, seen = searched(HagerZhang(checks="secant"), LINES[name], first)
        assert len(seen) == int(found.evaluations) == known[0]
        np.testing.assert_allclose(float(found.point.length), known[1], rtol=1e-13)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("rule", [StrongWolfe(max_evaluations=60), StrongWolfe(curvature=0.1, max_evaluations=60)])
def test_the_strong_conditions_hold_where_it_ends(rule, name, first):
    found, seen = searched(rule, LINES[name], first)
    if int(found.end) == INTERVAL:  # the second function is so flat at 0 that its conditions are finer than rounding
        assert name == "more_thuente_2"
        return
    assert int(found.end) == CONDITIONS_MET
    start, slope = slopes(LINES[name], 0.0)
    value, there = slopes(LINES[name], float(found.point.length))
    assert float(found.point.loss) == value and float(found.gradient[0][0]) == there
    assert value <= start + rule.decrease * float(found.point.length) * slope
    assert abs(there) <= rule.curvature * abs(slope)
    assert float(found.point.length) == seen[-1]


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", LINES)
def test_the_wolfe_conditions_or_their_approximation_hold_where_it_ends(name, first):
    rule = HagerZhang()
    found, _ = searched(rule, LINES[name], first)
    assert int(found.end) == CONDITIONS_MET
    start, slope = slopes(LINES[name], 0.0)
    value, there = slopes(LINES[name], float(found.point.length))
    wolfe = value <= start + 0.1 * float(found.point.length) * slope
    approximate = value <= start + 1e-6 * abs(start) and there <= -0.8 * slope
    assert there >= 0.9 * slope and (wolfe or approximate)


def test_a_secant_step_ends_at_the_minimum_of_a_parabola():
    for curvature, minimum in ((3.0, 0.7), (1e-3, 40.0), (1e5, 1e-4)):
        line = lambda s, c=curvature, m=minimum: c * (s - m) ** 2  # noqa: E731
        found, _ = searched(HagerZhang(checks="secant"), line)
        np.testing.assert_allclose(float(found.point.length), minimum, rtol=1e-12)


RULES = [StrongWolfe(), HagerZhang(), ArmijoLineSearch(shrink=0.5)]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("rule", RULES)
def test_it_steps_back_from_what_is_not_finite_and_counts_it(rule, bad):
    line = lambda s: tf.where(s > 0.02, tf.constant(bad, s.dtype), (s - 0.01) ** 2)  # noqa: E731
    found, seen = searched(rule, line)
    assert int(found.end) == CONDITIONS_MET
    assert int(found.overflows) == sum(s > 0.02 for s in seen) >= 1
    assert 0 < float(found.point.length) <= 0.02
    assert np.isfinite(float(found.gradient[0][0]))


def test_a_gradient_that_is_not_finite_is_stepped_back_from_too():
    line = lambda s: (s - 2.0) ** 2 + 0.0 * tf.pow(tf.abs(s - 1.0), 0.5)  # noqa: E731, its derivative at 1: 0 * inf
    found, seen = searched(StrongWolfe(), line)
    assert seen[0] == 1.0 and int(found.overflows) == 1
    assert 0 < float(found.point.length) < 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("slope", [0.0, 1.0, NAN])
def test_nothing_is_evaluated_without_a_negative_slope(rule, slope):
    found, seen = searched(rule, lambda s: slope * s + 1.0)
    assert int(found.end) == NO_SLOPE and not seen
    assert float(found.point.length) == 0.0 and int(found.evaluations) == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_that_rises_against_its_slope_ends_with_no_step(rule):
    """A gradient that is wrong by its sign: no length is lower, the search ends in words."""
    start = tf.constant(1.0, tf.float64)

    def along(s):
        return 1.0 + s, [tf.constant([-1.0], tf.float64)]

    found = search_along(rule, along, [tf.ones(1, tf.float64)], start, -1.0, [-tf.ones(1, tf.float64)])
    assert int(found.evaluations) <= rule.max_evaluations
    np.testing.assert_array_equal(found.gradient[0], [-1.0])
    if isinstance(rule, ArmijoLineSearch):  # as short as rounding, where its condition holds again
        assert float(found.point.length) < 1e-15
    else:
        assert float(found.point.length) == 0.0
        assert int(found.end) in (BUDGET, INTERVAL) and ENDS[int(found.end)]


def test_a_loss_without_a_bound_ends_at_the_budget_with_the_farthest_point():
    for rule in (StrongWolfe(max_evaluations=7), HagerZhang(max_evaluations=7)):
        found, seen = searched(rule, lambda s: -s)
        assert int(found.end) == BUDGET and len(seen) == 7
        assert float(found.point.length) == max(seen) == float(-found.point.loss)


def test_one_length_is_taken_if_it_is_finite():
    found, seen = searched(OneLength(), lambda s: s * s + 10.0 * s - 1.0, first=0.25)
    assert float(found.point.length) == 0.0 and not seen  # the slope is positive
    found, seen = searched(OneLength(), lambda s: s * s - s, first=4.0)
    assert float(found.point.length) == 4.0 and seen == [4.0]
    found, _ = searched(OneLength(), lambda s: NAN * s if float(s) > 1.0 else -s, first=4.0)
    assert float(found.point.length) == 0.0 and int(found.overflows) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compiled", some([False, True], [True]))
def test_in_a_graph_it_is_the_same_search(rule, compiled):
    eager, _ = searched(rule, LINES["wavy"], 10.0)

    @tf.function(jit_compile=compiled)
    def in_graph():
        def along(s):
            return LINES["wavy"](s), [(0.2 * s - 3.0 * tf.cos(3.0 * s) - 1.0)[None]]

        loss, gradient = along(tf.zeros((), tf.float64))
        return search_along(rule, along, [tf.ones(1, tf.float64)], loss, gradient[0][0], gradient, 10.0)

    found = in_graph()
    np.testing.assert_allclose(found.point.length, eager.point.length, rtol=1e-9)
    assert int(found.evaluations) == int(eager.evaluations)


def test_in_float32_a_search_near_a_minimum_ends_at_it():
    """The loss is constant to rounding there; the approximate conditions look at slopes."""
    line = lambda s: 1000.0 + 1e-3 * (s - 0.4) ** 2  # noqa: E731
    found, seen = searched(HagerZhang(), line, dtype=tf.float32)
    assert int(found.end) == CONDITIONS_MET and len(seen) <= 3
    assert abs(float(found.point.length) - 0.4) < 0.4


def search_in(noise, rounding=0.0):
    """A search along `1 + 1e-9 (s - 1.2)^2`, whose losses but that of the start are too high by up to `noise`."""

    def along(s):
        exact, slope = 1.0 + 1e-9 * (s - 1.2) ** 2, 2e-9 * (s - 1.2)
        return exact + noise * tf.cast(s > 0, tf.float64) * (1.0 + 0.5 * tf.sin(1e6 * s)), [slope[None]]

    loss, gradient = along(tf.zeros((), tf.float64))
    return search_along(HagerZhang(), along, [tf.ones(1, tf.float64)], loss, gradient[0][0], gradient, 1.0, rounding)


def test_losses_less_exact_than_the_error_make_it_grow_and_the_next_search_knows_it():
    found = search_in(noise=1e-5)
    assert int(found.end) == CONDITIONS_MET and float(found.point.length) == 1.0
    assert int(found.evaluations) == 12  # the first, ten bisections, the first again
    excess = 1e-5 * (1.0 + 0.5 * np.sin(1e6))
    np.testing.assert_allclose(float(found.rounding), 10.0 * excess, rtol=1e-3)
    again = search_in(noise=1e-5, rounding=found.rounding)
    assert int(again.evaluations) == 1 and int(again.end) == CONDITIONS_MET
    assert float(again.rounding) == float(found.rounding)


def test_what_is_higher_than_rounding_can_be_is_no_rounding():
    found = search_in(noise=1e-2)
    assert float(found.point.length) == 0.0 and float(found.rounding) == 0.0
    assert int(found.end) in (BUDGET, INTERVAL)


@pytest.mark.parametrize("rule", [StrongWolfe(), ArmijoLineSearch(), OneLength()])
def test_a_rule_that_does_not_learn_it_hands_on_what_another_learnt(rule):
    start, slope = tf.constant(1.0, tf.float64), [-tf.ones(1, tf.float64)]
    along = lambda s: ((1.0 - s) ** 2, [tf.reshape(2.0 * (s - 1.0), [1])])  # noqa: E731
    assert float(search_along(rule, along, [tf.ones(1, tf.float64)], start, -1.0, slope, 1.0, 0.25).rounding) == 0.25


@pytest.mark.parametrize("make, words", [
    (lambda: StrongWolfe(decrease=0.0), "`decrease` must be a number in"),
    (lambda: StrongWolfe(curvature=1e-5), "`curvature` must be above `decrease`"),
    (lambda: StrongWolfe(max_evaluations=0), "`max_evaluations` must be an integer"),
    (lambda: HagerZhang(decrease=0.6), "`decrease` must be a number in"),
    (lambda: HagerZhang(curvature=0.05), "`curvature` must be at least `decrease`"),
    (lambda: HagerZhang(expand=1.0), "`expand` must be a number in"),
    (lambda: HagerZhang(shrink=1.0), "`shrink` must be a number in"),
    (lambda: HagerZhang(checks="none"), '`checks` must be "all" or "secant"'),
])  # fmt: skip
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
