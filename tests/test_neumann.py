"""The Neumann optimizers against numpy versions of their algorithms, and against the limits that are known."""

import importlib.util
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat
from selection import some

from keras_curvature import Neumann, NeumannSeries, TwoLoopNeumann, curved, problems

BENCHMARK = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks" / "logistic.py"

pytestmark = pytest.mark.usefixtures("in_float64")


class Steps:
    """An optimizer on bare weights: `steps(G)` applies a gradient, traced once."""

    def __init__(self, optimizer, w):
        self.optimizer, self.variable = optimizer, keras.Variable(w)
        optimizer.build([self.variable])
        self._apply = tf.function(lambda G: optimizer.apply([G], [self.variable]))

    def __call__(self, G):
        self._apply(tf.constant(G))
        return self.w

    @property
    def w(self):
        return self.variable.numpy()

    @property
    def m(self):
        return self.optimizer._m[0].numpy()

    @property
    def v(self):
        return self.optimizer._v[0].numpy()


class Regression:
    """A logistic regression with a bias, batches of eight: a gradient that is written in one line."""

    def __init__(self, seed=0, batches=7):
        random = np.random.RandomState(seed)
        self.x, self.y = random.randn(batches, 8, 5), random.randint(2, size=(batches, 8, 1)).astype(float)
        self.start = random.randn(6)

    def model(self, optimizer, is_curved, jit_compile="auto"):
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1)])
        model.set_weights([self.start[:5, None], self.start[5:]])
        model = curved(model) if is_curved else model
        model.compile(optimizer, loss=keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=jit_compile)
        return model

    def batch(self, s):
        return self.x[s % len(self.x)], self.y[s % len(self.x)]

    def gradient(self, s, w):
        x, y = self.batch(s)
        error = 1 / (1 + np.exp(-(x @ w[:5] + w[5]))) - y[:, 0]
        return np.append(x.T @ error, error.sum()) / len(y)


def algorithm_2(
    w, gradient, eta, alpha=0.0, beta=0.0, gamma=0.99, mu_start=0.5, mu_end=0.9, warmup=0, reset_every=None, growth=2
):
    """Algorithm 2 of the paper, line by line; yields `(w, v, m, mu)` after every step, from the first."""
    v, m, s, next_reset = w, np.zeros_like(w), 0, 1
    while True:
        t, G = s - warmup + 1, gradient(s, w)
        # 1 - 1/(1 + t) for mu_start = 1/2, otherwise the same ramp begun earlier or later
        mu = min(mu_end, 1 - 1 / (t - 1 + 1 / (1 - mu_start))) if t >= 1 else 0.0
        if t < 1:
            m = -eta(s) * G
            w = w + m
        elif reset_every and t == next_reset:
            m = -eta(s) * G
            next_reset, reset_every = next_reset + reset_every, reset_every * growth
        else:
            r = np.linalg.norm(w - v)
            pull = alpha * r**2 - beta * w.size / r**2 if alpha or beta else 0.0
            d = G + (pull * (w - v) / r if pull else 0.0)
            m = mu * m - eta(s) * d
            w = w + mu * m - eta(s) * d
            v = w + gamma * (v - w)
        s += 1
        yield w, v, m, mu


SETTINGS = {
    "everything": {"alpha": 0.02, "beta": 1e-3, "warmup": 4, "reset_every": 5},
    "cubic only": {"alpha": 0.05, "warmup": 3, "reset_every": 20},
    "repulsion only": {"beta": 2e-3, "warmup": 3, "reset_every": 20, "growth": 1},
    "other ramp": {
        "beta": 1e-3, "gamma": 0.9, "warmup": 2, "reset_every": 8, "growth": 3, "mu_start": 0.3, "mu_end": 0.96,
    },
    "no resets": {"alpha": 0.02, "beta": 1e-3, "warmup": 5},
    "no warm-up": {"mu_start": 0.6, "reset_every": 10},
}  # fmt: skip


def neumann(learning_rate, warmup=0, growth=2, alpha=0.0, beta=0.0, **options):
    """`Neumann` from the arguments of `algorithm_2`."""
    return Neumann(learning_rate, alpha, beta, warmup_steps=warmup, reset_growth=growth, **options)


PAIRS = [(name, is_curved) for name in SETTINGS for is_curved in (False, True)]


# by default plain and curved models in turn
@pytest.mark.parametrize(("name", "is_curved"), some(PAIRS, [*PAIRS[::4], *PAIRS[3::4]]))
def test_sixty_steps_are_those_of_algorithm_2(name, is_curved):
    problem, options = Regression(), SETTINGS[name]
    optimizer = neumann(0.1, **options)
    model = problem.model(optimizer, is_curved)
    ours = algorithm_2(problem.start, problem.gradient, lambda s: 0.1, **options)
    for s, (w, v, m, mu) in zip(range(60), ours):
        model.train_on_batch(*problem.batch(s))
        # a curved model stores the solution, a plain one the displaced weights
        stored = w - mu * m if is_curved else w
        np.testing.assert_allclose(flat(model.trainable_variables), stored, 1e-10, 1e-10, err_msg=f"w of step {s}")
        np.testing.assert_allclose(flat(optimizer._m), m, 1e-10, 1e-10, err_msg=f"m of step {s}")
        np.testing.assert_allclose(flat(optimizer._v), v, 1e-10, 1e-10, err_msg=f"v of step {s}")
    optimizer.finalize_variable_values(model.trainable_variables)
    np.testing.assert_allclose(flat(model.trainable_variables), w - mu * m, 1e-10, 1e-10)


@pytest.mark.parametrize("is_curved", [False, True], ids=["plain", "curved"])
def test_it_begins_and_goes_on_after_a_fit_under_xla_as_without(is_curved):
    """There without a condition: `v` begins at the weights; the solution at the end of a `fit` is displaced again."""
    problem, found = Regression(), []
    for jit_compile in (False, True):
        optimizer = neumann(0.1, alpha=0.02, beta=1e-3, mu_start=0.6)
        model = problem.model(optimizer, is_curved, jit_compile)
        for s in range(6):
            if s == 3:
                optimizer.finalize_variable_values(model.trainable_variables)
            assert optimizer.is_displaced == (s not in (0, 3) and not is_curved)
            model.train_on_batch(*problem.batch(s))
            found.append([*flat(model.trainable_variables), *flat(optimizer._m), *flat(optimizer._v)])
    np.testing.assert_allclose(found[6:], found[:6], 1e-10, 1e-10)


def test_without_its_own_it_is_nesterov_and_finalizes_to_the_base_weights():
    problem, mu, eta = Regression(), 0.875, 0.25  # Keras rounds its momentum to float32
    model = problem.model(neumann(eta, mu_start=mu, mu_end=mu), False)
    stock = problem.model(keras.optimizers.SGD(eta, momentum=mu, nesterov=True), False)
    u = before = problem.start
    for s in range(40):
        model.train_on_batch(*problem.batch(s))
        stock.train_on_batch(*problem.batch(s))
        np.testing.assert_allclose(flat(model.trainable_variables), flat(stock.trainable_variables), rtol=1e-13)
        ahead = u + mu * (u - before)
        u, before = ahead - eta * problem.gradient(s, ahead), u
    model.optimizer.finalize_variable_values(model.trainable_variables)
    np.testing.assert_allclose(flat(model.trainable_variables), u, rtol=1e-12)


@pytest.mark.parametrize("is_curved", [False, True], ids=["plain", "curved"])
def test_learning_rate_schedule_is_followed(is_curved):
    problem = Regression()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3, 10], [0.05, 0.3, 0.1])
    options = SETTINGS["cubic only"]
    model = problem.model(neumann(schedule, **options), is_curved)
    ours = algorithm_2(problem.start, problem.gradient, lambda s: float(schedule(s)), **options)
    for s, (w, _, m, mu) in zip(range(20), ours):
        model.train_on_batch(*problem.batch(s))
        stored = w - mu * m if is_curved else w
        # Keras computes the values of a schedule in float32
        np.testing.assert_allclose(flat(model.trainable_variables), stored, 1e-6, 1e-6)


def test_ramp_of_mu():
    mu = [float(Neumann()._mu(tf.constant(t))) for t in (0, 1, 2, 3, 8, 9, 10, 1000)]
    np.testing.assert_allclose(mu, [0, 1 / 2, 2 / 3, 3 / 4, 8 / 9, 0.9, 0.9, 0.9], rtol=1e-15)
    mu = [float(Neumann(mu_start=0.75, mu_end=0.99)._mu(tf.constant(t))) for t in (1, 2, 96, 97, 98)]
    np.testing.assert_allclose(mu, [3 / 4, 4 / 5, 98 / 99, 0.99, 0.99], rtol=1e-15)
    constant = Neumann(mu_start=0.7, mu_end=0.7)
    assert all(float(constant._mu(tf.constant(t))) == 0.7 for t in (1, 2, 50))


@pytest.mark.parametrize("alpha, beta", [(0.3, 0.0), (0.0, 1e-3), (0.3, 1e-3)])
def test_regularizer_is_the_gradient_of_its_two_terms(alpha, beta):
    random = np.random.RandomState(0)
    w, v = random.randn(2, 12)
    eta = 1e-2
    steps = Steps(neumann(eta, alpha=alpha, beta=beta, mu_start=0.0, mu_end=0.0), w)
    steps(np.zeros(12))  # v begins at the weights
    steps.optimizer._v[0].assign(v)
    with tf.GradientTape() as tape:
        x = tf.constant(w)
        tape.watch(x)
        r = tf.norm(x - v)
        value = alpha / 3 * r**3 + beta * w.size / r
    # with mu = 0 and no gradient the step is -eta times the regularizer's
    np.testing.assert_allclose((w - steps(np.zeros(12))) / eta, tape.gradient(value, x), rtol=1e-9)


def test_norm_is_one_of_all_weights():
    a, b = keras.Variable(np.full(2, 1.0)), keras.Variable(np.full(3, 2.0))
    optimizer = neumann(1.0, alpha=0.1, mu_start=0.0, mu_end=0.0)
    optimizer.apply([np.zeros(2), np.zeros(3)], [a, b])  # v begins at the weights
    for v in optimizer._v:
        v.assign(np.zeros(v.shape))
    optimizer.apply([np.zeros(2), np.zeros(3)], [a, b])
    r = np.sqrt(2 * 1 + 3 * 4)
    np.testing.assert_allclose(a.numpy(), 1 - 0.1 * r * 1.0, rtol=1e-14)
    np.testing.assert_allclose(b.numpy(), 2 - 0.1 * r * 2.0, rtol=1e-14)


@pytest.mark.parametrize("n, mu", some([(1000, 0.9), (1000, 0.5), (100_000, 0.9)], [(1000, 0.9)]))
def test_without_a_gradient_the_distance_to_the_average_settles_at_the_balance(n, mu):
    eta, beta, gamma = 0.1, 1e-5, 0.99
    steps = Steps(neumann(eta, beta=beta, gamma=gamma, mu_start=mu, mu_end=mu, warmup=1), np.zeros(n))
    steps(np.random.RandomState(0).randn(n) / np.sqrt(n))  # off the average
    for _ in range(1500):
        steps(np.zeros(n))
    balance = (eta * beta * n / ((1 - mu) * (1 - gamma))) ** (1 / 3)
    assert abs(np.linalg.norm(steps.w - steps.v) / balance - 1) < 0.02


@pytest.mark.parametrize("push", [0.0, 1e-3, 1.0])
def test_repulsion_does_not_explode_at_its_singularity(push):
    # without a floor the second step would go to a distance of 1e5 and more
    n, eta, beta = 100_000, 0.1, 1e-5
    steps = Steps(neumann(eta, alpha=1e-7, beta=beta), np.zeros(n))
    balance = (eta * beta * n / (0.1 * 0.01)) ** (1 / 3)
    G = push * np.random.RandomState(0).randn(n) / np.sqrt(n)
    for _ in range(80):
        steps(G)
        assert np.linalg.norm(steps.w - steps.v) < 3 * balance + 2000 * push * eta
    if push == 0.0:
        assert not steps.w.any()  # no gradient, no distance, no direction: it stays


def test_reset_seeds_m_and_leaves_the_weights_bit_identical():
    random = np.random.RandomState(0)
    steps = Steps(neumann(0.3, alpha=0.1, beta=1e-3, warmup=2, reset_every=4), random.randn(6))
    for s in range(2 + 1 + 4 + 8 + 3):
        G, w, v = random.randn(6), steps.w, steps.v
        steps(G)
        if s - 2 in (0, 4, 12):
            np.testing.assert_array_equal(steps.w, w)
            np.testing.assert_array_equal(steps.v, v)
            np.testing.assert_array_equal(steps.m, -0.3 * G)
        else:
            assert (steps.w != w).all()


def test_resets_are_at_the_epochs_of_the_paper():
    length = 2  # steps of an epoch
    optimizer = Neumann.from_epochs(steps_per_epoch=length, learning_rate=1e-3, alpha=0.0, beta=0.0)
    steps, resets = Steps(optimizer, np.zeros(2)), []
    for s in range(length * (5 + 155)):
        w = steps.w
        if (steps(np.ones(2)) == w).all():
            resets.append(s / length - 5)
    assert resets == [0, 10, 30, 70, 150]
    assert optimizer.warmup_steps == 5 * length


def test_no_resets_where_none_are_asked_for():
    steps = Steps(neumann(1e-3), np.zeros(2))
    for _ in range(50):
        w = steps.w
        assert (steps(np.ones(2)) != w).all()


def test_clipping_is_warned_of():
    with pytest.warns(UserWarning, match="clip"):
        Neumann(global_clipnorm=1.0)


# Two loops.


def quadratic(optimizer, condition=10.0):
    """A curved quadratic with one step to take: `(model, x, y, H, w, g)`."""
    problem = problems.quadratic(dimension=6, condition=condition)
    model = curved(problem.model(1))
    model.compile(optimizer, loss=problem.loss())
    H, w = problem.hessian(), model.get_weights()[0]
    return model, *problem.data(samples=1), H, w, H @ (w - problem.solution()[0])


@pytest.mark.parametrize("K", [1, 4, 25])
def test_two_loops_sum_the_series(K):
    eta, outer = 0.3, 0.7
    model, x, y, H, w, g = quadratic(TwoLoopNeumann(outer, NeumannSeries(steps=K, rate=eta)))
    model.train_on_batch(x, y)
    terms = [np.linalg.matrix_power(np.eye(6) - eta * H, i) @ g for i in range(K + 1)]
    np.testing.assert_allclose(model.get_weights()[0], w - outer * sum(terms), rtol=1e-11)


def test_two_loops_tend_to_the_newton_step():
    eta = 1.0
    model, x, y, H, w, g = quadratic(TwoLoopNeumann(eta, NeumannSeries(steps=300, rate=eta)))
    model.train_on_batch(x, y)
    np.testing.assert_allclose(model.get_weights()[0], w - np.linalg.solve(H, g), rtol=1e-10)


def test_two_loops_below_mu_one_tend_to_a_damped_newton_step():
    eta, mu = 0.8, 0.9
    model, x, y, H, w, g = quadratic(TwoLoopNeumann(eta, NeumannSeries(steps=300, rate=eta), mu=mu))
    model.train_on_batch(x, y)
    damped = mu * H + (1 - mu) / eta * np.eye(6)
    np.testing.assert_allclose(model.get_weights()[0], w - np.linalg.solve(damped, g), rtol=1e-10)


def test_two_loops_on_a_loss_that_is_not_quadratic_with_both_regularizers():
    problem, eta, outer, mu, gamma = Regression(), 0.2, 0.15, 0.95, 0.9
    alpha, beta = 0.05, 1e-3
    optimizer = TwoLoopNeumann(outer, NeumannSeries(steps=6, rate=eta), mu=mu, alpha=alpha, beta=beta, gamma=gamma)
    model = problem.model(optimizer, True)
    model.train_on_batch(*problem.batch(0))  # v begins at the weights
    w = flat(model.trainable_variables)
    v = w - 0.5
    optimizer._v[0].assign(v[:5, None])
    optimizer._v[1].assign(v[5:])
    for s in range(1, 4):

        def gradient(at, s=s, v=v):
            r = np.linalg.norm(at - v)
            return problem.gradient(s, at) + (alpha * r - beta * 6 / r**3) * (at - v)

        m = -gradient(w)
        for _ in range(6):
            m = mu * m - gradient(w + eta * mu * m)
        w = w + outer * m
        v = w + gamma * (v - w)
        model.train_on_batch(*problem.batch(s))
        np.testing.assert_allclose(flat(model.trainable_variables), w, rtol=1e-10)
        np.testing.assert_allclose(flat(optimizer._v), v, rtol=1e-10)


# The published test that runs on a laptop.


@pytest.fixture(scope="module")
def logistic():
    spec = importlib.util.spec_from_file_location("logistic", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("batch_size", some([10, 200], [200]))
def test_neumann_is_ahead_of_sgd_on_the_logistic_regression(logistic, batch_size):
    ends = {name: logistic.losses(name, batch_size)[-1] for name in ("SGD", "Neumann")}
    assert ends["Neumann"] < 0.65 * ends["SGD"]


@pytest.mark.parametrize("curve", some([True, False], [False]))
def test_accumulated_gradients_train_as_micro_batches_do(curve):
    x = np.random.default_rng(0).standard_normal((96, 4))
    y = np.tanh(x @ np.random.default_rng(1).standard_normal((4, 2)))

    def weights(batch_size, curve, micro_batches=1, **options):
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((4,)), *layers])
        model = curved(model, micro_batches=micro_batches) if curve else model
        model.compile(Neumann(0.1, warmup_steps=2, reset_every=2, **options), "mse", jit_compile=False)
        model.fit(x, y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
        return flat(model.trainable_variables)

    accumulated = weights(4, curve, gradient_accumulation_steps=4)
    np.testing.assert_allclose(accumulated, weights(16, True, micro_batches=4), rtol=0, atol=1e-10)
    np.testing.assert_allclose(accumulated, weights(16, curve), rtol=0, atol=1e-10)
