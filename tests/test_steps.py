"""Damping rules, line search and the small quadratic: values in, values out."""

import numpy as np
import pytest
import tensorflow as tf

from keras_curvature import ArmijoLineSearch, ConstantDamping, LevenbergMarquardt
from keras_curvature.steps import Trial, as_damping, quadratic

NAN, INF = float("nan"), float("inf")
MARTENS = LevenbergMarquardt(1.0, decay=2 / 3, low=0.25, high=0.75, every=1)


def updated(rule, value, ratio, dtype=tf.float64):
    """The next damping, a number."""
    return float(rule.update(tf.constant(value, dtype), tf.constant(ratio, tf.float64)))


@pytest.mark.parametrize("ratio, factor", [
    (1.5, 1), (1.5000001, 0.999**5), (100.0, 0.999**5), (1.0, 1), (0.5, 1), (0.4999999, 0.999**-5), (0.0, 0.999**-5),
    (-3.0, 0.999**-5), (NAN, 0.999**-5), (-INF, 0.999**-5), (INF, 0.999**5),
])  # fmt: skip
def test_curveballs_rule_is_compounded_over_the_steps_between_checks(ratio, factor):
    np.testing.assert_allclose(updated(LevenbergMarquardt(), 7.0, ratio), 7.0 * factor, 1e-15)


@pytest.mark.parametrize("ratio, factor", [
    (0.75, 1), (0.76, 2 / 3), (0.25, 1), (0.24, 1.5), (-INF, 1.5), (NAN, 1.5), (1.0, 2 / 3),
])  # fmt: skip
def test_martens_rule(ratio, factor):
    np.testing.assert_allclose(updated(MARTENS, 45.0, ratio), 45.0 * factor, 1e-15)


def test_the_damping_does_not_fall_below_its_minimum():
    rule = LevenbergMarquardt(1.0, decay=0.5, every=1, minimum=0.3)
    assert updated(rule, 1.0, 2.0) == 0.5
    assert updated(rule, 0.5, 2.0) == 0.3
    assert updated(rule, 0.3, 2.0) == 0.3
    assert updated(rule, 0.3, 0.0) == 0.6


@pytest.mark.parametrize("rule", [LevenbergMarquardt(), MARTENS, LevenbergMarquardt(decay=0.01)])
@pytest.mark.parametrize("ratio", [2.0, -1.0])
def test_a_thousand_updates_in_one_direction_leave_a_way_back(rule, ratio):
    ratio, back = tf.constant(ratio), tf.constant(1.0 - ratio)

    @tf.function
    def thousand(value):
        for _ in tf.range(1000):
            value = rule.update(value, ratio)
        return value

    end = thousand(tf.constant(1.0))
    assert 0 < float(end) < INF
    assert (float(rule.update(end, back)) - float(end)) * float(ratio) > 0


def test_a_constant_stays():
    rule = ConstantDamping(0.1)
    assert rule.every is None
    assert updated(rule, 0.1, NAN) == updated(rule, 0.1, 100.0) == 0.1


def test_the_dtype_is_that_of_the_damping():
    ratio = tf.constant(2.0, tf.float64)
    assert MARTENS.update(tf.constant(1.0), ratio).dtype == tf.float32


def test_a_number_is_a_constant_damping():
    assert as_damping(None, 0.5) == ConstantDamping(0.5)
    assert as_damping(None, 2) == ConstantDamping(2.0)
    assert as_damping(None, MARTENS) is MARTENS
    for bad in (-1.0, "much", None, LevenbergMarquardt, ArmijoLineSearch()):
        with pytest.raises(ValueError, match="`damping` must be a"):
            as_damping(MARTENS, bad)


# The checked step.


class Told:
    """What a trial is told of a step, and how often it asks."""

    def __init__(self, before, after, predicted):
        self.told, self.asked = {"before": before, "after": after, "predicted": predicted}, 0

    def __call__(self, trial, iterations, damping=1.0):
        def functions(name):
            def ask():
                self.asked += name == "after"
                return tf.constant(self.told[name], tf.float64)

            return ask

        value, before = tf.constant(damping, tf.float64), functions("before")()
        told = {name: functions(name) for name in ("after", "predicted")}
        checked = trial.check(tf.constant(iterations), value, before=before, **told)
        return float(checked.value), float(checked.ratio), bool(checked.accepted)


@pytest.mark.parametrize("before, after, predicted, ratio", [
    (3.0, 2.0, -1.0, 1.0), (3.0, 2.5, -1.0, 0.5), (3.0, 1.0, -1.0, 2.0), (3.0, 3.0, 0.0, 0.0), (3.0, 3.0, -1.0, 0.0),
    (3.0, 4.0, -1.0, -INF), (3.0, 4.0, 1.0, -INF), (3.0, INF, -1.0, -INF), (3.0, NAN, -1.0, NAN), (3.0, 2.0, 1.0, -1.0),
])  # fmt: skip
def test_the_ratio_is_that_of_the_changes_and_no_rise_is_a_success(before, after, predicted, ratio):
    _, found, _ = Told(before, after, predicted)(Trial(MARTENS), 0)
    np.testing.assert_equal(found, ratio)


@pytest.mark.parametrize("accepts, losses", [
    ("lower", {2.0: True, 3.0: True, 4.0: False, INF: False, NAN: False}),
    ("finite", {2.0: True, 4.0: True, INF: False, NAN: False}), ("any", {4.0: True, NAN: True}),
])  # fmt: skip
def test_a_trial_accepts_what_it_says(accepts, losses):
    for after, accepted in losses.items():
        assert Told(3.0, after, -1.0)(Trial(MARTENS, accepts), 0)[2] == accepted, after


@pytest.mark.parametrize("at, checked", [("first", [0, 4, 8]), ("last", [3, 7])])
def test_one_of_every_so_many_steps_is_looked_at(at, checked):
    trial = Trial(LevenbergMarquardt(decay=0.5, every=4), at=at)
    for t in range(10):
        step = Told(3.0, 4.0, -1.0)
        value, ratio, accepted = step(trial, t)
        assert (step.asked == 1) == (value == 2.0**4) == (not accepted) == (t in checked)
        assert step.asked == 1 or (value == 1.0 and np.isnan(ratio))


def test_where_all_are_looked_at_a_rejected_step_adapts_at_once_and_an_accepted_one_when_it_is_due():
    trial = Trial(LevenbergMarquardt(decay=0.5, every=4), always=True)
    assert [Told(3.0, 4.0, -1.0)(trial, t)[0] for t in range(5)] == [2.0**4] * 5
    assert [Told(3.0, 1.0, -1.0)(trial, t)[0] for t in range(5)] == [2.0**-4, 1.0, 1.0, 1.0, 2.0**-4]


def test_a_trial_of_a_constant_looks_at_nothing_unless_it_always_does():
    step = Told(3.0, 4.0, -1.0)
    assert step(Trial(ConstantDamping()), 0)[::2] == (1.0, True) and step.asked == 0
    assert step(Trial(ConstantDamping(), always=True), 0) == (1.0, -INF, False)


def test_bad_choices_of_a_trial_fail_at_construction():
    with pytest.raises(ValueError, match="`accepts` must be one of 'lower', 'finite', 'any'. Received: accepts='less'"):
        Trial(MARTENS, accepts="less")
    with pytest.raises(ValueError, match='`at` must be "first" or "last". Received: at=3'):
        Trial(MARTENS, at=3)


# The line search.


class Loss:
    """A loss along a direction, which counts how often it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, length):
        self.asked.append(float(length))
        return tf.constant(self.function(float(length)), tf.float64)


def searched(function, slope, **kwargs):
    """`(length, loss, trials)`, with the first trial made by the caller."""
    along = Loss(function)
    start, slope = tf.constant(function(0.0), tf.float64), tf.constant(slope, tf.float64)
    length, loss = ArmijoLineSearch(**kwargs).search(along, start, slope, tf.constant(function(1.0), tf.float64))
    return float(length), float(loss), along.asked


def test_a_good_full_step_is_taken_and_costs_nothing():
    length, loss, asked = searched(lambda s: (s - 1) ** 2, -2.0)
    assert (length, loss, asked) == (1.0, 0.0, [])


def test_the_first_length_with_sufficient_decrease_is_taken():
    length, loss, asked = searched(lambda s: (s - 0.3) ** 2, -0.6)
    expected = next(0.8**m for m in range(60) if (0.8**m - 0.3) ** 2 <= 0.09 - 1e-2 * 0.8**m * 0.6)
    np.testing.assert_allclose(length, expected, 1e-12)
    np.testing.assert_allclose(loss, (expected - 0.3) ** 2, 1e-12)
    np.testing.assert_allclose(asked, 0.8 ** np.arange(1, len(asked) + 1), 1e-12)
    assert asked[-1] == length


def test_equality_is_enough():
    assert searched(lambda s: -0.01 * s, -1.0)[0] == 1.0
    assert searched(lambda s: -0.0099 * s, -1.0)[0] == 0.0


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_loss_that_is_not_finite_is_too_high(bad):
    length, loss, _ = searched(lambda s: bad if s > 0.6 else -s, -1.0)
    np.testing.assert_allclose((length, loss), (0.8**3, -(0.8**3)), 1e-12)


@pytest.mark.parametrize("function", [lambda s: s, lambda s: NAN if s else 2.0, lambda s: INF if s else 2.0])
def test_after_sixty_lengths_the_step_is_rejected(function):
    length, loss, asked = searched(function, -1.0)
    assert (length, loss) == (0.0, function(0.0))
    assert len(asked) == 59  # and the first, which the caller knew


def test_a_number_of_trials_of_ones_own():
    assert len(searched(lambda s: s, -1.0, max_steps=3, shrink=0.5)[2]) == 2
    assert searched(lambda s: -1.0 if s == 0.25 else 1.0, -1.0, max_steps=3, shrink=0.5)[0] == 0.25
    assert searched(lambda s: -1.0 if s == 0.125 else 1.0, -1.0, max_steps=3, shrink=0.5)[0] == 0.0
    assert searched(lambda s: s, -1.0, max_steps=1)[2] == []


def test_the_search_in_a_graph():
    @tf.function(jit_compile=True)
    def search():
        f = lambda s: (s - 0.3) ** 2  # noqa: E731
        return ArmijoLineSearch().search(f, f(tf.constant(0.0)), tf.constant(-0.6), f(tf.constant(1.0)))[0]

    np.testing.assert_allclose(search(), 0.8**3, 1e-6)


# The quadratic over two directions.


def minimized(A, b, dtype=tf.float64):
    """The coefficients, an array."""
    return quadratic.minimize(tf.constant(A, dtype), tf.constant(b, dtype)).numpy()


@pytest.mark.parametrize("seed", range(20))
def test_the_minimum_is_that_of_least_squares(seed):
    random = np.random.default_rng(seed)
    M = random.standard_normal((5, 2)) * np.array([1, 10.0 ** random.integers(-6, 7)])
    A, b = M.T @ M, M.T @ random.standard_normal(5)
    c = minimized(A, b)
    np.testing.assert_allclose(c, -np.linalg.lstsq(M, np.linalg.lstsq(M.T, b)[0])[0], 1e-7)
    np.testing.assert_allclose(quadratic.value(tf.constant(A), tf.constant(b), tf.constant(c)), 0.5 * b @ c, 1e-8)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("second", [[0.0, 0.0, 0.0], [2.0, 4.0, -2.0], [-1e-3, -2e-3, 1e-3], [1e6, 2e6, -1e6]])
def test_without_a_second_direction_the_minimum_is_a_line_search(dtype, second):
    M = np.array([[1.0, 2.0, -1.0], second]).T
    A, b = M.T @ M, M.T @ np.array([0.5, 1.5, 1.0])
    np.testing.assert_allclose(minimized(A, b, dtype), [-b[0] / A[0, 0], 0], 1e-6)


def test_a_zero_gradient_moves_nothing():
    np.testing.assert_array_equal(minimized(np.zeros((2, 2)), [0.0, 0.0]), [0, 0])
    np.testing.assert_array_equal(np.abs(minimized(np.diag([0.0, 1.0]), [0.0, 0.0])), [0, 0])


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_where_there_is_no_minimum_the_quadratic_does_not_rise(dtype):
    random = np.random.default_rng(0)
    values = []
    for signs in ([-1, -1], [1, -1], [-1, 1]) * 20:
        Q = np.linalg.qr(random.standard_normal((2, 2)))[0]
        A, b = Q @ np.diag(signs * random.uniform(0.01, 10, 2)) @ Q.T, random.standard_normal(2)
        values.append(quadratic.value(tf.constant(A), tf.constant(b), tf.constant(minimized(A, b, dtype), tf.float64)))
    assert np.isfinite(values).all() and max(values) <= 0


def test_a_nan_is_not_hidden():
    assert np.isnan(minimized([[NAN, 0.0], [0.0, 1.0]], [1.0, 1.0])).any()
    assert np.isnan(minimized([[1.0, 0.0], [0.0, 1.0]], [NAN, 1.0])).any()


def test_the_value_of_the_quadratic():
    A, b, c = tf.constant([[2.0, 1.0], [1.0, 3.0]]), tf.constant([1.0, -1.0]), tf.constant([0.5, 2.0])
    np.testing.assert_allclose(quadratic.value(A, b, c), 0.5 - 2.0 + 0.5 * (0.5 + 2 * 1.0 + 12.0), 1e-6)
