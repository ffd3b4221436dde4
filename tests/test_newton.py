"""Newton's methods: dense, truncated, saddle-free, preconditioned, by series; each against a dense computation."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from analytic import NOTHING, ONE, function_model, steps, weights
from cases import flat
from selection import some

import keras_curvature as kc
from keras_curvature.operators import Function
from keras_curvature.operators.base import dense as dense_of
from keras_curvature.solvers import dense
from keras_curvature.solvers.krylov_space import krylov_space
from keras_curvature.solvers.nystrom import NystromPreconditioner, sketch
from keras_curvature.solvers.steihaug import steihaug

pytestmark = pytest.mark.usefixtures("in_float64")


def spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return Q @ np.diag(values) @ Q.T


def operator(A):
    """`A` as an operator on two tensors, the first two entries in a matrix `(1, 2)` and the rest in a vector."""

    def product(v):
        return parts(tf.linalg.matvec(tf.constant(A), tf.concat([tf.reshape(a, [-1]) for a in v], 0)))

    return Function(product)


def parts(vector):
    """A flat vector as the two tensors."""
    vector = tf.convert_to_tensor(vector)
    return [tf.reshape(vector[:2], (1, 2)), vector[2:]]


def whole(vector):
    """The two tensors as one NumPy vector."""
    return np.concatenate([np.ravel(a) for a in vector])


# The step in a ball.

CONVEX, INDEFINITE = [0.1, 0.5, 1.0, 3.0, 10.0], [-2.0, -0.1, 0.3, 1.0, 4.0]


@pytest.mark.parametrize(("radius", "seed"), some(
    list(itertools.product([0.1, 1.0, 3.0, 1e4], range(4))), [(1.0, 0)]
))  # fmt: skip
@pytest.mark.parametrize("values", [CONVEX, INDEFINITE, [-1.0] * 5, [0.0, 0.0, 1.0, 1.0, 2.0]])
def test_the_minimum_in_a_ball_meets_the_conditions_of_a_global_one(values, radius, seed):
    A, g = spectrum(values, seed), np.random.default_rng(seed + 50).standard_normal(5)
    values, V = np.linalg.eigh(A)
    p, at_boundary = dense.minimize_in_ball(tf.constant(values), tf.constant(V.T @ g), tf.constant(radius, tf.float64))
    p = V @ p.numpy()
    assert np.linalg.norm(p) <= radius * (1 + 1e-9)
    multiplier = -(p @ (A @ p + g)) / (p @ p)  # (A + lambda I) p = -g
    np.testing.assert_allclose(A @ p + multiplier * p, -g, atol=1e-8 * max(1.0, abs(multiplier) * radius))
    assert multiplier >= max(0.0, -values[0]) - 1e-8
    assert bool(at_boundary) or abs(multiplier) < 1e-8
    if bool(at_boundary):
        np.testing.assert_allclose(np.linalg.norm(p), radius, rtol=1e-8)


def test_the_hard_case_and_a_saddle_without_a_slope_are_left_along_negative_curvature():
    values = tf.constant([-2.0, 1.0, 3.0], tf.float64)
    for slopes, rest in (([0.0, 3.0, 0.0], 1.0), ([0.0, 0.0, 0.0], 0.0)):
        p, at_boundary = dense.minimize_in_ball(values, tf.constant(slopes, tf.float64), tf.constant(2.0, tf.float64))
        np.testing.assert_allclose(np.abs(p), [np.sqrt(4.0 - rest), rest, 0.0], atol=1e-7)
        assert bool(at_boundary)


def textbook(A, g, radius, tolerance):
    """Steihaug's method as Nocedal and Wright write it, Algorithm 7.2."""
    z, r, d = np.zeros_like(g), g.copy(), -g
    for count in range(1, 100):
        sphere = np.roots([d @ d, 2 * z @ d, z @ z - radius**2]).real.max()
        if d @ A @ d <= 0:
            return z + sphere * d, count, True
        alpha = r @ r / (d @ A @ d)
        if np.linalg.norm(z + alpha * d) >= radius:
            return z + sphere * d, count, True
        z, old = z + alpha * d, r
        r = r + alpha * A @ d
        if np.linalg.norm(r) <= tolerance * np.linalg.norm(g):
            return z, count, False
        d = -r + r @ r / (old @ old) * d
    raise AssertionError


@pytest.mark.parametrize("seed", some(range(4), [0]))
@pytest.mark.parametrize("radius", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("values", [CONVEX, INDEFINITE])
def test_steihaug_is_the_textbooks(values, radius, seed):
    A, g = spectrum(values, seed), np.random.default_rng(seed + 9).standard_normal(5)
    expected, count, at_boundary = textbook(A, g, radius, 1e-6)
    found = steihaug(operator(A), parts(g), radius, 100, 1e-6)
    p = whole(found.value)
    np.testing.assert_allclose(p, expected, rtol=1e-9, atol=1e-9)
    assert int(found.steps) == count and bool(found.at_boundary) == at_boundary and bool(found.finite)
    np.testing.assert_allclose(float(found.change), g @ p + 0.5 * p @ A @ p, rtol=1e-9)


def test_steihaug_ends_before_a_product_that_is_not_finite():
    calls = []

    def product(v):
        calls.append(1)
        scale = tf.cond(tf.reduce_all(tf.abs(v[0]) < 0.5), lambda: 1.0, lambda: float("nan"))
        return [tf.cast(scale, tf.float64) * a for a in v]

    found = steihaug(Function(product), parts(np.full(5, 2.0)), 1.0, 10, 1e-6)
    assert not bool(found.finite) and np.array_equal(whole(found.value), np.zeros(5))


# The methods.


def one_step(function, start, optimizer):
    """`(weights after one step, logs)`."""
    model = function_model(function, start, optimizer)
    return (model.train_on_batch(ONE, NOTHING, return_dict=True), weights(model))[::-1]


def derivatives(function, w):
    """`(gradient, Hessian)` of a function, NumPy, by TensorFlow's tapes."""
    from analytic import FUNCTIONS

    w = tf.constant(w)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(w)
        with tf.GradientTape() as inner:
            inner.watch(w)
            value = FUNCTIONS[function](w)
        g = inner.gradient(value, w)
    return g.numpy(), outer.jacobian(g, w, experimental_use_pfor=False).numpy()


START = np.array([-0.4, 0.3])  # the Hessian of Himmelblau's function is indefinite here


@pytest.mark.parametrize("settings", [
    {"damping": 0.3}, {"damping": 0.3, "eigenvalues": "signed"}, {"trust_region": kc.TrustRegion(initial=0.2)},
])  # fmt: skip
def test_a_dense_step_is_that_of_the_formula(settings):
    g, H = derivatives("himmelblau", START)
    values, V = np.linalg.eigh(H)
    assert values[0] < 0
    if "trust_region" in settings:
        expected = 0.2  # its length; the conditions of the minimum are tested above
    elif settings.get("eigenvalues") == "signed":
        expected = START - np.linalg.solve(H + 0.3 * np.eye(2), g)
    else:
        expected = START - V @ np.diag(1 / (np.abs(values) + 0.3)) @ V.T @ g
    after, logs = one_step("himmelblau", START, kc.Newton(**settings))
    np.testing.assert_allclose(logs["lowest"], values[0], rtol=1e-6)
    if "trust_region" in settings:
        np.testing.assert_allclose(np.linalg.norm(after - START), expected, rtol=1e-9)
        assert logs["reduction_ratio"] > 0
    elif settings.get("eigenvalues") == "signed":  # towards the maximum: not taken
        from analytic import FUNCTIONS

        rises = FUNCTIONS["himmelblau"](expected) > FUNCTIONS["himmelblau"](START)
        np.testing.assert_array_equal(after, START) if rises else np.testing.assert_allclose(after, expected)
        assert rises
    else:
        np.testing.assert_allclose(after, expected, rtol=1e-9)


def test_near_a_minimum_the_error_squares():
    model = function_model("himmelblau", [3.2, 2.1], kc.Newton(damping=0.0))
    errors = []
    for _ in range(4):
        model.train_on_batch(ONE, NOTHING)
        errors.append(np.linalg.norm(weights(model) - [3.0, 2.0]))
    assert errors[1] < 2 * errors[0] ** 2 and errors[2] < 2 * errors[1] ** 2 and errors[3] < 1e-12


@pytest.mark.parametrize("make", [
    kc.Newton, lambda: kc.Newton(trust_region=kc.TrustRegion()), kc.NewtonCG,
    kc.SaddleFreeNewton, lambda: kc.NysNewtonCG(rank=2, damping=1e-6),
])  # fmt: skip
@pytest.mark.parametrize("function, start", some([
    ("rosenbrock", (-1.2, 1.0)), ("himmelblau", (1.0, 1.0)), ("matyas", (2.0, -1.0)), ("zakharov", (1.0, -2.0, 0.5)),
], [("rosenbrock", (-1.2, 1.0))]))  # fmt: skip
def test_the_usual_functions_are_solved(make, function, start):
    logs = steps(function_model(function, start, make()), 80, gradient=1e-7)
    if "gradient_max" in logs[0]:
        assert logs[-1]["gradient_max"] <= 1e-7
    assert logs[-1]["loss"] < 1e-8


@pytest.mark.parametrize("make", [
    lambda: kc.Newton(trust_region=kc.TrustRegion()), kc.Newton, kc.NewtonCG, kc.SaddleFreeNewton,
])  # fmt: skip
def test_a_saddle_is_left(make):
    """`a^2 - b^2 + b^4 / 2` from beside its saddle at 0; the minima are at b = +-1."""
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
    model.layers[-1].kernel.assign([[0.5], [1e-3]])
    model = kc.curved(model)
    # the loss of the output at two examples, (1, 0) and (0, 1)
    model.compile(make(), loss=lambda y, z: y[:, 0] * z[:, 0] ** 2 - y[:, 1] * (z[:, 0] ** 2 - 0.5 * z[:, 0] ** 4))
    x = np.eye(2)
    model.fit(x, x, batch_size=2, epochs=40, verbose=0)
    a, b = model.layers[-1].kernel.numpy().ravel()
    assert abs(a) < 1e-3 and abs(abs(b) - 1.0) < 1e-3


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda **k: kc.NewtonCG(trust_region=kc.TrustRegion(initial=100.0), **k), "radius"),
        (lambda **k: kc.Newton(trust_region=kc.TrustRegion(initial=100.0), **k), "radius"),
        (lambda **k: kc.Newton(eigenvalues="signed", **k), "damping"),
    ],
    ids=["cg", "region", "damping"],
)
def test_the_attempts_of_a_step_are_the_steps_of_one_attempt_each(make, key):
    def steps(attempts, count):
        model, seen = function_model("himmelblau", START, make(attempts=attempts)), []
        before = weights(model)
        for _ in range(count):
            model.reset_metrics()
            seen.append(model.train_on_batch(ONE, NOTHING, return_dict=True)[key])
        return before, weights(model), seen

    count = 1
    while np.array_equal(*steps(1, count)[:2]):
        count += 1
    assert count > 2
    _, expected, seen = steps(1, count)
    before, found, last = steps(count, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert last == [pytest.approx(seen[-1])]
    _, found, _ = steps(count - 1, 1)
    np.testing.assert_array_equal(found, before)


def test_a_rejected_step_leaves_the_weights_and_shrinks_the_ball():
    model = function_model("himmelblau", START, kc.NewtonCG(trust_region=kc.TrustRegion(initial=100.0), attempts=1))
    before, rejected, radius = weights(model), 0, 100.0
    for _ in range(8):
        model.reset_metrics()
        logs = model.train_on_batch(ONE, NOTHING, return_dict=True)
        assert logs["radius"] == pytest.approx(radius)
        if logs["step_norm"] == 0.0:
            np.testing.assert_array_equal(weights(model), before)
            rejected, radius = rejected + 1, radius / 4
        else:
            break
    assert rejected >= 1 and logs["step_norm"] > 0


@pytest.mark.parametrize("ratio, at_boundary, factor", [
    (0.9, True, 2.0), (0.9, False, 1.0), (0.75, True, 1.0), (0.25, True, 1.0), (0.24, True, 0.25), (-1.0, False, 0.25),
    (float("nan"), True, 0.25), (float("-inf"), False, 0.25),
])  # fmt: skip
def test_the_radius_by_the_textbooks_table(ratio, at_boundary, factor):
    rule = kc.TrustRegion().at(tf.constant(at_boundary))
    assert float(rule.update(tf.constant(8.0), tf.constant(ratio, tf.float64))) == 8.0 * factor
    assert float(kc.TrustRegion(maximum=9.0).at(tf.constant(True)).update(tf.constant(8.0), tf.constant(1.0))) == 9.0


def small_network(optimizer):
    """`(model, x, y)`: a network with 17 weights, far from a minimum."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((2,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    model = kc.curved(keras.Model(inputs, keras.layers.Dense(1)(hidden)))
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).standard_normal((20, 2))
    return model, x, np.sin(2 * x[:, :1]) + x[:, 1:]


def linearized(model, x, y):
    """`(gradient, Hessian)`, dense."""
    lin = kc.Linearization(model, x, y)
    return flat(lin.gradient), dense_of(lin.hessian(), lin.gradient).numpy()


def test_the_dense_matrix_is_that_of_the_products():
    model, x, y = small_network(kc.Newton())
    lin = kc.Linearization(model, x, y)
    np.testing.assert_allclose(dense.matrix(lin.hessian(), lin.gradient), linearized(model, x, y)[1], atol=1e-12)


def test_saddle_free_with_the_whole_space_has_absolute_eigenvalues():
    model, x, y = small_network(kc.SaddleFreeNewton(rank=17, dampings=(0.3,)))
    before, (g, H) = flat(model.trainable_variables), linearized(model, x, y)
    values, V = np.linalg.eigh(H)
    assert values[0] < 0 < values[-1]
    logs = model.train_on_batch(x, y, return_dict=True)
    step = flat(model.trainable_variables) - before
    damping = 0.3 * np.abs(values).max()
    np.testing.assert_allclose(step, -V @ np.diag(1 / (np.abs(values) + damping)) @ V.T @ g, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose([logs["lowest"], logs["damping"]], [values[0], damping], rtol=1e-5)


@pytest.mark.parametrize("size, count", [(1, 1), (3, 3), (5, 5), (9, 5)])
def test_a_krylov_space_is_orthonormal_and_holds_the_matrix(size, count):
    A, b = spectrum(INDEFINITE, 2), np.random.default_rng(1).standard_normal(5)
    space = krylov_space(operator(A), parts(b), size)
    V = np.concatenate([np.reshape(rows, (rows.shape[0], -1)) for rows in space.basis], 1)[:count]
    assert int(space.count) == count
    np.testing.assert_allclose(V @ V.T, np.eye(count), atol=1e-12)
    np.testing.assert_allclose(space.matrix[:count, :count], V @ A @ V.T, atol=1e-12)
    np.testing.assert_allclose(V[0], b / np.linalg.norm(b), rtol=1e-12)


def test_a_krylov_space_that_is_invariant_ends_there():
    A = np.diag([1.0, 2.0, 2.0, 2.0, 5.0])
    space = krylov_space(operator(A), parts(np.array([1.0, 1.0, 0.0, 0.0, 0.0])), 5)
    assert int(space.count) == 2
    np.testing.assert_array_equal(space.matrix[2:], 0.0)
    assert int(krylov_space(operator(A), parts(np.zeros(5)), 5).count) == 0


# Nyström.


@pytest.mark.parametrize("values", [CONVEX, [0.0, 0.0, 0.0, 1.0, 4.0]])
def test_a_sketch_of_full_rank_is_the_matrix(values):
    A = spectrum(values, 4)
    found = sketch(operator(A), parts(np.zeros(5)), 5, tf.constant(0))
    U = np.concatenate([np.reshape(rows, (5, -1)) for rows in found.vectors], 1)
    np.testing.assert_allclose(found.values, sorted(values, reverse=True), atol=1e-7)
    np.testing.assert_allclose(U.T @ np.diag(found.values) @ U, A, atol=1e-6)


def test_a_sketch_of_low_rank_is_below_the_matrix_and_exact_on_its_range():
    A = spectrum([0.0, 0.0, 0.0, 1.0, 4.0], 4)
    found = sketch(operator(A), parts(np.zeros(5)), 2, tf.constant(3))
    U = np.concatenate([np.reshape(rows, (2, -1)) for rows in found.vectors], 1)
    np.testing.assert_allclose(U @ U.T, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(U.T @ np.diag(found.values) @ U, A, atol=1e-6)
    full = spectrum(CONVEX, 4)
    found = sketch(operator(full), parts(np.zeros(5)), 3, tf.constant(3))
    U = np.concatenate([np.reshape(rows, (3, -1)) for rows in found.vectors], 1)
    assert np.linalg.eigvalsh(full - U.T @ np.diag(found.values) @ U).min() > -1e-7


def test_an_indefinite_matrix_gives_a_finite_sketch_without_negative_values():
    for seed in range(5):
        found = sketch(operator(spectrum(INDEFINITE, seed)), parts(np.zeros(5)), 3, tf.constant(seed))
        assert np.isfinite(found.values).all() and min(found.values) >= 0 and bool(found.finite)
    bad = sketch(Function(lambda v: [a + float("nan") for a in v]), parts(np.zeros(5)), 3, tf.constant(0))
    assert not bool(bad.finite) and np.isnan(bad.values).all()


def test_the_preconditioner_is_the_formula():
    A = spectrum(CONVEX, 1)
    found = sketch(operator(A), parts(np.zeros(5)), 3, tf.constant(0))
    U, values, mu = np.concatenate([np.reshape(r, (3, -1)) for r in found.vectors], 1), found.values.numpy(), 0.01
    expected = U.T @ np.diag((values[-1] + mu) / (values + mu)) @ U + np.eye(5) - U.T @ U
    P = NystromPreconditioner(found.vectors, found.values, mu)
    product = np.array([whole(P @ parts(unit)) for unit in np.eye(5)])
    np.testing.assert_allclose(product, expected, atol=1e-10)


def test_nys_newton_cg_solves_the_damped_system():
    optimizer = kc.NysNewtonCG(rank=10, damping=5.0, line_search=kc.ArmijoLineSearch())
    model, x, y = small_network(optimizer)
    before, (g, H) = flat(model.trainable_variables), linearized(model, x, y)
    assert np.linalg.eigvalsh(H + 5.0 * np.eye(17)).min() > 0
    logs = model.train_on_batch(x, y, return_dict=True)
    step = flat(model.trainable_variables) - before
    assert logs["step_length"] == 1.0
    np.testing.assert_allclose(step, -np.linalg.solve(H + 5.0 * np.eye(17), g), rtol=1e-6, atol=1e-9)


def test_a_good_sketch_saves_iterations():
    counts = {}
    for rank in (1, 15):
        model, x, y = small_network(kc.NysNewtonCG(rank=rank, damping=1e-4, curvature="gauss_newton"))
        counts[rank] = model.train_on_batch(x, y, return_dict=True)["cg_iterations"]
    assert counts[15] <= 0.5 * counts[1]


# LiSSA.


def test_lissa_on_the_whole_batch_is_the_truncated_series():
    model, x, y = small_network(kc.LiSSA(steps=7, rate=0.05, curvature_batch=1.0, damping=0.1))
    before, (g, H) = flat(model.trainable_variables), linearized(model, x, y)
    model.train_on_batch(x, y)
    A, d = H + 0.1 * np.eye(17), np.zeros(17)
    for _ in range(7):
        d = d + 0.05 * (g - A @ d)
    np.testing.assert_allclose(flat(model.trainable_variables) - before, -d, rtol=1e-9, atol=1e-12)


def test_lissa_takes_another_part_in_each_term():
    model, x, y = small_network(kc.LiSSA(steps=4, rate=0.05, curvature_batch=0.25, damping=0.0))
    before, (g, _) = flat(model.trainable_variables), linearized(model, x, y)
    model.train_on_batch(x, y)
    lin, d = kc.Linearization(model, x, y), np.zeros(17)
    after = flat(model.trainable_variables)
    for variable, part in zip(model.trainable_variables, np.split(before, [8, 12, 16])):
        variable.assign(part.reshape(variable.shape))
    for j in range(4):
        lin = kc.Linearization(model, x, y).chunk(0.25, j)
        d = d + 0.05 * (g - dense_of(lin.hessian(), lin.gradient).numpy() @ d)
    np.testing.assert_allclose(after - before, -d, rtol=1e-9, atol=1e-12)


def test_lissas_rate_is_below_the_inverse_of_the_largest_eigenvalue():
    model, x, y = small_network(kc.LiSSA(curvature_batch=1.0, damping=0.1, power_steps=30))
    largest = np.abs(np.linalg.eigvalsh(linearized(model, x, y)[1] + 0.1 * np.eye(17))).max()
    rate = model.train_on_batch(x, y, return_dict=True)["rate"]
    np.testing.assert_allclose(rate, 1.0 / (1.1 * largest), rtol=0.05)


# What is refused.


def test_a_model_that_is_too_large_for_a_dense_matrix_is_refused_in_bytes():
    inputs = keras.Input((200,))
    model = kc.curved(keras.Model(inputs, keras.layers.Dense(200)(inputs)))
    model.compile(kc.Newton(), "mse")
    with pytest.raises(ValueError, match=r"51.7 GB for this model.*40200 trainable weights.*`NewtonCG\(\)`"):
        model.train_on_batch(np.zeros((2, 200)), np.zeros((2, 200)))


@pytest.mark.parametrize("make, words", [
    (lambda: kc.Newton(eigenvalues="clipped"), '`eigenvalues` must be "absolute" or "signed"'),
    (lambda: kc.Newton(trust_region=1.0), "`trust_region` must be a `TrustRegion"),
    (lambda: kc.NewtonCG(trust_region=None), "`trust_region` must be a `TrustRegion"),
    (lambda: kc.NewtonCG(curvature="fisher"), "`curvature` must be"),
    (lambda: kc.NewtonCG(tolerance=1.0), "`tolerance` must be a number"),
    (lambda: kc.TrustRegion(initial=0.0), "`initial` must be a number"),
    (lambda: kc.TrustRegion(high=0.1), "`high` must be at least `low`"),
    (lambda: kc.SaddleFreeNewton(rank=0), "`rank` must be an integer"),
    (lambda: kc.SaddleFreeNewton(dampings=(0.0,)), "`dampings` must be a tuple of positive numbers"),
    (lambda: kc.SaddleFreeNewton(dampings=()), "`dampings` must be a tuple of positive numbers"),
    (lambda: kc.NysNewtonCG(damping=0.0), "`damping` must be a number"),
    (lambda: kc.NysNewtonCG(every=0), "`every` must be an integer"),
    (lambda: kc.LiSSA(steps=0), "`steps` must be an integer"),
    (lambda: kc.LiSSA(rate=0.0), "`rate` must be a number"),
    (lambda: kc.LiSSA(curvature_batch=None), "`curvature_batch` must be"),
])  # fmt: skip
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
