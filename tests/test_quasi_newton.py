"""L-BFGS and BFGS: published counts, other people's trajectories, dense matrices, and what may go wrong in a search."""

import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf
from analytic import NOTHING, ONE, OfWeights, function_model, steps, the_output, value_and_gradient, weights
from cases import put
from selection import some

import keras_curvature as kc
from keras_curvature import problems
from keras_curvature.optimizers.quasi_newton import CAUTION, Pair
from keras_curvature.solvers import row_vectors

pytestmark = pytest.mark.usefixtures("in_float64")
OF_OPTAX = pathlib.Path(__file__).parent / "reference" / "lbfgs_optax.txt"
AS_TFP = {"search": kc.HagerZhang(checks="secant"), "initial_scale": 1.0}


# Other people's numbers.


# tensorflow_probability's tests of `lbfgs_minimize` and `bfgs_minimize`, tolerance 1e-8
OF_TFP = [
    (kc.LBFGS, (1.0, 1.0), 31), (kc.LBFGS, (-2.0, 2.0), 17),
    (kc.BFGS, (1.0, 1.0), 30), (kc.BFGS, (-2.0, 2.0), 17), (kc.BFGS, (-1.0, -1.0), 30), (kc.BFGS, (1.0, -2.0), 26),
]  # fmt: skip


@pytest.mark.parametrize("make, start, evaluations", some(OF_TFP, [OF_TFP[1], OF_TFP[2], OF_TFP[5]]))
def test_himmelblau_in_as_many_evaluations_as_tensorflow_probability(make, start, evaluations):
    logs = steps(function_model("himmelblau", start, make(**AS_TFP)), 50)
    assert 1 + sum(log["evaluations"] for log in logs) == evaluations
    assert logs[-1]["loss"] < 1e-8 and logs[-1]["gradient_max"] <= 1e-8


@pytest.mark.parametrize("make", some([kc.LBFGS, kc.BFGS, lambda: kc.LBFGS(search=kc.StrongWolfe())], [kc.LBFGS]))
@pytest.mark.parametrize("start, theirs", [((1.0, 1.0), 31), ((-2.0, 2.0), 17)])
def test_by_default_it_takes_fewer(make, start, theirs):
    logs = steps(function_model("himmelblau", start, make()), 50)
    assert logs[-1]["gradient_max"] <= 1e-8 and 1 + sum(log["evaluations"] for log in logs) < theirs


def test_without_a_search_it_goes_where_optax_goes():
    """optax 0.2.6 with JAX in float64: `optax.lbfgs(1.0, memory_size=3, linesearch=None)`, 30 iterations."""
    model = function_model("log_sum_exp", np.linspace(-2, 2, 8), kc.LBFGS(memory=3, search=None))
    for theirs in np.loadtxt(OF_OPTAX):
        model.train_on_batch(ONE, NOTHING)
        np.testing.assert_allclose(weights(model), theirs, rtol=1e-8, atol=1e-8)


def lbfgs_by_scipy(function, w, memory, iterations):
    """L-BFGS as a textbook has it, in NumPy, with SciPy's search; the points it comes to and its evaluations."""
    pairs, points, evaluations = [], [], 0
    value, g = value_and_gradient(function, w)
    for _ in range(iterations):
        q, alphas = g.copy(), []
        for s, y in reversed(pairs):
            alphas.append(s @ q / (y @ s))
            q -= alphas[-1] * y
        q *= pairs[-1][0] @ pairs[-1][1] / (pairs[-1][1] @ pairs[-1][1]) if pairs else min(1, 1 / np.linalg.norm(g))
        for (s, y), alpha in zip(pairs, reversed(alphas)):
            q += (alpha - y @ q / (y @ s)) * s
        f = lambda v: value_and_gradient(function, v)[0]  # noqa: E731
        df = lambda v: value_and_gradient(function, v)[1]  # noqa: E731
        length, calls, *_ = scipy.optimize.line_search(f, df, w, -q, g, value)
        evaluations += calls
        after, there = value_and_gradient(function, w - length * q)
        pairs = [*pairs, (-length * q, there - g)][-memory:]
        w, value, g = w - length * q, after, there
        points.append(w)
    return points, evaluations


AS_SCIPY = [
    ("rosenbrock", (-1.2, 1.0), 30), ("beale", (1.0, 1.0), 12), ("zakharov", (1.0, -2.0, 0.5, 1.5), 12),
    ("log_sum_exp", tuple(np.linspace(-2, 2, 8)), 12),
]  # fmt: skip


@pytest.mark.parametrize("function, start, iterations", some(AS_SCIPY, [AS_SCIPY[0], AS_SCIPY[3]]))
def test_with_strong_wolfe_it_goes_where_scipys_search_goes(function, start, iterations):
    points, evaluations = lbfgs_by_scipy(function, np.array(start, float), 5, iterations)
    model = function_model(function, start, kc.LBFGS(memory=5, search=kc.StrongWolfe()))
    logs = []
    for theirs in points:
        model.reset_metrics()
        logs.append(model.train_on_batch(ONE, NOTHING, return_dict=True))
        np.testing.assert_allclose(weights(model), theirs, rtol=1e-8, atol=1e-8)
    assert sum(log["evaluations"] for log in logs) == evaluations


# Solutions.

SOLVED = [
    ("rosenbrock", (-1.2, 1.0), 0.0), ("himmelblau", (1.0, 1.0), 0.0), ("matyas", (2.0, -1.0), 0.0),
    ("beale", (1.0, 1.0), 0.0), ("zakharov", (1.0, -2.0, 0.5, 1.5), 0.0), ("eggholder", (500.0, 400.0), -959.6406627),
]  # fmt: skip


@pytest.mark.parametrize("make", [
    kc.LBFGS, kc.BFGS, lambda: kc.LBFGS(search=kc.StrongWolfe()), lambda: kc.BFGS(scaling="self_scaled"),
    lambda: kc.BFGS(scaling="broyden"), lambda: kc.LBFGS(update="damped"),
])  # fmt: skip
@pytest.mark.parametrize("function, start, minimum", some(SOLVED, SOLVED[:1]))
def test_the_usual_functions_are_solved(make, function, start, minimum):
    model = function_model(function, start, make())
    # the gradient is a difference of much larger numbers at the minimum of Eggholder's
    assert steps(model, 80, gradient=1e-7)[-1]["gradient_max"] <= 1e-7
    last = steps(model, 1)[-1]["loss"]
    if function == "eggholder":  # many minima: as low as the one it is near to
        assert last <= -559.0
    else:
        np.testing.assert_allclose(last, minimum, atol=1e-10)


def broyden():
    return kc.BFGS(scaling="broyden")


METHODS = some([kc.LBFGS, kc.BFGS, broyden], [kc.LBFGS])
# the starts of JAX's tests of `jax.scipy.optimize.minimize`, among them bad ones
STARTS_OF_JAX = [
    ("rosenbrock", (0.0, 0.0)), ("himmelblau", (0.0, 0.0)), ("himmelblau", (92.0, 0.001)), ("matyas", (6.0, 6.0)),
    ("eggholder", (100.0, 100.0)), ("zakharov", (600.0, 700.0, 200.0, 100.0, 90.0, 1e4)),
]  # fmt: skip


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("function, start", some(STARTS_OF_JAX, [STARTS_OF_JAX[2]]))
def test_they_are_solved_from_the_starts_of_jax(make, function, start):
    theirs = scipy.optimize.minimize(lambda w: value_and_gradient(function, w), start, jac=True, method="BFGS")
    model = function_model(function, start, make())
    assert steps(model, 200, gradient=1e-6)[-1]["gradient_max"] <= 1e-6
    # Eggholder's has many minima, and it is chance which is found
    low = value_and_gradient(function, start)[0] if function == "eggholder" else theirs.fun
    assert value_and_gradient(function, weights(model))[0] <= low + 1e-9


def quadratic(size, condition, optimizer):
    """`(model, problem)`: a quadratic with a known spectrum."""
    problem = kc.problems.quadratic(dimension=size, condition=condition)
    return kc.curved(problem.compiled(optimizer)), problem


@pytest.mark.parametrize("make, settings", [
    (kc.LBFGS, {"memory": 12}), (kc.BFGS, {}), (kc.BFGS, {"initial_scale": 1.0}),
])  # fmt: skip
def test_with_exact_searches_a_quadratic_ends_after_n_steps(make, settings):
    exact = kc.HagerZhang(checks="secant", decrease=1e-12, curvature=1e-10, error=0.0)
    model, problem = quadratic(6, 100.0, make(search=exact, **settings))
    x, y = problem.data(1)
    for _ in range(7):
        model.train_on_batch(x, y)
    np.testing.assert_allclose(model.trainable_variables[0].numpy(), problem.solution()[0], atol=1e-8)


def test_with_exact_searches_a_memory_of_n_pairs_takes_the_steps_of_bfgs():
    """Both are conjugate gradients there."""
    exact = kc.HagerZhang(checks="secant", decrease=1e-12, curvature=1e-10, error=0.0)
    (limited, problem), (full, _) = (quadratic(6, 100.0, make(search=exact)) for make in (
        lambda search: kc.LBFGS(search=search, memory=6), kc.BFGS,
    ))  # fmt: skip
    x, y = problem.data(1)
    for _ in range(6):
        limited.train_on_batch(x, y)
        full.train_on_batch(x, y)
        np.testing.assert_allclose(limited.get_weights()[0], full.get_weights()[0], rtol=1e-7, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("make", METHODS)
def test_ill_conditioned_quadratics_are_solved(make, condition):
    model, problem = quadratic(10, condition, make())
    x, y = problem.data(1)
    # SciPy's BFGS takes 136 steps at 1e6, its L-BFGS-B 502
    model.fit(np.repeat(x, 600, 0), np.repeat(y, 600, 0), batch_size=1, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], problem.solution()[0], atol=1e-7)


# The matrices, against dense ones.


def trained(optimizer, steps=7, function="log_sum_exp"):
    """A model and its optimizer after some steps."""
    model = function_model(function, np.linspace(-2, 2, 8), optimizer)
    for _ in range(steps):
        model.train_on_batch(ONE, NOTHING)
    return model, model.optimizer


def inverse_hessian(optimizer, size=8):
    """`H`, dense, from products with the unit vectors."""
    count, scale = tf.identity(optimizer._count.value), tf.constant(1.0, tf.float64)
    units = [[tf.constant(unit)] for unit in np.eye(size)]
    return np.array([-optimizer.descent(e, optimizer.products(e), count, scale)[0].numpy() for e in units])


def pairs(optimizer):
    """The pairs in memory, oldest first."""
    count, memory = int(optimizer._count.numpy()), optimizer.memory
    order = [i % memory for i in range(max(0, count - memory), count)]
    rows = optimizer._memory[0].numpy()
    return [(rows[i], rows[memory + i]) for i in order]


def dense_bfgs(H, known):
    """The inverse Hessian by the textbook's product form."""
    for s, y in known:
        V = np.eye(len(s)) - np.outer(y, s) / (y @ s)
        H = V.T @ H @ V + np.outer(s, s) / (y @ s)
    return H


@pytest.mark.parametrize("memory", some([1, 3, 7, 20], [3, 20]))
def test_two_loops_are_the_dense_product(memory):
    optimizer = trained(kc.LBFGS(memory=memory))[1]
    known = pairs(optimizer)
    assert len(known) == min(memory, 7)
    s, y = known[-1]
    expected = dense_bfgs(s @ y / (y @ y) * np.eye(8), known)
    H = inverse_hessian(optimizer)
    np.testing.assert_allclose(H, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(H @ y, s, rtol=1e-10, atol=1e-12)


def test_each_pair_is_of_the_two_gradients_of_a_step():
    model, optimizer = trained(kc.LBFGS(memory=3), 4)
    before, g = weights(model), value_and_gradient("log_sum_exp", weights(model))[1]
    model.train_on_batch(ONE, NOTHING)
    s, y = pairs(optimizer)[-1]
    np.testing.assert_allclose(s, weights(model) - before, rtol=1e-12)
    np.testing.assert_allclose(y, value_and_gradient("log_sum_exp", weights(model))[1] - g, rtol=1e-10, atol=1e-14)


def updated(scaling, seed=0, first=False):
    """`(H before, s, y, B s, H after)` of one update of `BFGS` from a random positive definite matrix."""
    random = np.random.default_rng(seed)
    model, optimizer = trained(kc.BFGS(scaling=scaling), 1)
    M = random.standard_normal((8, 8))
    H, s = M @ M.T + 0.1 * np.eye(8), random.standard_normal(8)
    y = np.linalg.solve(H, s) * random.uniform(0.2, 3.0) + 0.1 * random.standard_normal(8)
    y = y if s @ y > 0 else y + s * (1.0 - s @ y) / (s @ s)
    optimizer._H.assign(H)
    Bs = np.linalg.solve(H, s)
    known = {"sy": s @ y, "yy": y @ y, "sBs": s @ Bs, "learns": True}
    known = {name: tf.constant(value) for name, value in known.items()}
    rest = dict.fromkeys(set(Pair._fields) - {"s", "y", *known}, tf.zeros((), tf.float64))
    pair = Pair(s=[tf.constant(s)], y=[tf.constant(y)], **known, **rest)
    with mock.patch.object(optimizer, "remember") as remember:
        optimizer.learn(pair, [], tf.constant(0 if first else 5), tf.constant(1.0, tf.float64))
    return H, s, y, Bs, remember.call_args.args[1].numpy()


SEEDS = some(range(6), [0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scaling", [None, "self_scaled", "broyden"])
def test_every_update_maps_y_to_s_and_stays_positive_definite(scaling, seed):
    H, s, y, _, after = updated(scaling, seed)
    np.testing.assert_allclose(after @ y, s, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(after, after.T, atol=1e-10)
    assert np.linalg.eigvalsh(after).min() > 0
    if scaling is None:
        np.testing.assert_allclose(after, dense_bfgs(H, [(s, y)]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_self_scaling_is_bfgs_on_the_scaled_hessian(seed):
    """Al-Baali's form: `B <- tau (B - Bs s'B / s'Bs) + y y' / s'y` with `tau = min(1, s'y / s'Bs)`, inverted."""
    H, s, y, Bs, after = updated("self_scaled", seed)
    B, tau = np.linalg.inv(H), min(1.0, s @ y / (s @ Bs))
    expected = tau * (B - np.outer(Bs, Bs) / (s @ Bs)) + np.outer(y, y) / (s @ y)
    np.testing.assert_allclose(np.linalg.inv(after), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_self_scaled_broyden_is_the_family_on_the_hessian(seed):
    """`B <- tau (B - Bs s'B / s'Bs + theta w w') + y y' / s'y`, `w = sqrt(s'Bs) (y / s'y - Bs / s'Bs)`, inverted."""
    H, s, y, Bs, after = updated("broyden", seed)
    B, b, h = np.linalg.inv(H), s @ Bs / (s @ y), y @ H @ y / (s @ y)
    a = b * h - 1
    low = min(1, h * (1 - np.sqrt(a / (1 + a))))
    theta = max((low - 1) / a, min(1 / low, (1 - b) / b))
    sigma = 1 + a * theta
    q, high = abs(sigma) ** (1 / (1 - 8)), min(1, 1 / b)
    tau = min(high * q, sigma) if theta <= 0 else high * min(q, 1 / theta)
    w = np.sqrt(s @ Bs) * (y / (s @ y) - Bs / (s @ Bs))
    expected = tau * (B - np.outer(Bs, Bs) / (s @ Bs) + theta * np.outer(w, w)) + np.outer(y, y) / (s @ y)
    np.testing.assert_allclose(np.linalg.inv(after), expected, rtol=1e-6, atol=1e-7)


def test_the_scale_of_the_loss_does_not_matter_after_the_first_pair():
    runs = []
    for factor in (1.0, 1e6):
        model = function_model("log_sum_exp", np.linspace(-2, 2, 8), kc.LBFGS(initial_scale=0.1 / factor))
        model.compile(model.optimizer, loss=lambda y, output, factor=factor: factor * output[:, 0])
        for _ in range(8):
            model.train_on_batch(ONE, NOTHING)
        runs.append(weights(model))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-6)


@pytest.mark.slow
def test_the_rows_are_written_in_place():
    """TensorFlow would copy a variable that is read as it is written: the product with the new gradient comes first."""
    model = kc.curved(keras.Sequential([keras.Input((1500,)), keras.layers.Dense(256), keras.layers.Dense(1)]))
    model.compile(kc.LBFGS(1e-4, search=None), "mse", jit_compile=False)
    x = np.random.default_rng(0).standard_normal((8, 1500))
    places = []
    for _ in range(15):
        model.train_on_batch(x, x[:, :1])
        handle = model.optimizer._memory[0].value.handle
        rows = tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float64)
        places.append(rows.numpy().__array_interface__["data"][0])
        del rows
    assert len(set(places[3:])) == 1  # at first the variable has the memory of its initial value


def test_a_self_scaled_search_begins_where_a_parabola_falls_as_far_as_the_last_step():
    optimizer = trained(kc.BFGS(scaling="broyden"), 1)[1]
    nan = float("nan")
    for decrease, slope, length in [(0, -2, 1), (0.5, -2, 0.505), (3, -2, 1), (-1, -2, 1), (0.5, nan, 1)]:
        optimizer._decrease.assign(decrease)
        found = optimizer.first_length(tf.constant(slope, tf.float64))
        np.testing.assert_allclose(found, length, rtol=1e-12, err_msg=f"{decrease}, {slope}")
        assert kc.BFGS().first_length(tf.constant(slope, tf.float64)) == 1.0


def test_the_remembered_decrease_is_that_of_the_loss():
    model, optimizer = trained(kc.BFGS(scaling="broyden"), 3)
    before = value_and_gradient("log_sum_exp", weights(model))[0]
    model.train_on_batch(ONE, NOTHING)
    after = value_and_gradient("log_sum_exp", weights(model))[0]
    np.testing.assert_allclose(optimizer._decrease.numpy(), before - after, rtol=1e-10)


def test_the_kept_inner_products_are_those_of_the_pairs():
    optimizer = trained(kc.LBFGS(memory=3, update="damped"), 8)[1]
    S, Y = np.split(optimizer._memory[0].numpy(), 2)
    order = [i % 3 for i in range(int(optimizer._count.numpy()) - 3, int(optimizer._count.numpy()))]
    np.testing.assert_allclose(optimizer._yy.numpy(), Y @ Y.T, rtol=1e-9, atol=1e-14)
    upper = np.triu((S @ Y.T)[np.ix_(order, order)])  # of a pair with those before it nothing is needed
    np.testing.assert_allclose(np.triu(optimizer._sy.numpy()[np.ix_(order, order)]), upper, rtol=1e-9, atol=1e-14)
    products = np.concatenate([S, Y]) @ optimizer._gradient[0].numpy()
    np.testing.assert_allclose(optimizer._products[0].numpy(), products, rtol=1e-9, atol=1e-14)


def test_on_an_accelerator_inner_products_and_combinations_are_not_products_of_matrices(monkeypatch):
    directions = {}
    for rounds in (False, True):
        monkeypatch.setattr(row_vectors, "sums_products", lambda rounds=rounds: rounds)
        directions[rounds] = inverse_hessian(trained(kc.LBFGS(memory=3))[1])
    np.testing.assert_allclose(directions[True], directions[False], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(1024, 1100), (3 * 2**19 + 1,)])
def test_inner_products_of_long_rows_are_exact(shape):
    """In one product each, they have an error of 1e-5."""
    random = np.random.default_rng(0)
    rows, vector = random.random((2, *shape), "float32"), random.random(shape, "float32")
    found = tf.function(row_vectors.coefficients)([tf.constant(rows)], [tf.constant(vector)])
    exact = rows.reshape(2, -1).astype("float64") @ vector.ravel().astype("float64")
    np.testing.assert_allclose(found, exact, rtol=1e-6)


# The gradient that is used again.


class Counting(OfWeights):
    """Counts its backward passes as the graph runs them; what nobody uses is not run."""

    backward = 0

    def call(self, x):
        def count(upstream):
            Counting.backward += 1
            return upstream

        @tf.custom_gradient
        def counted(value):
            def gradient(upstream):
                found = tf.numpy_function(count, [upstream], upstream.dtype, stateful=False)
                return tf.ensure_shape(found, upstream.shape)

            return tf.identity(value), gradient

        return counted(super().call(x))


def counting_model(optimizer):
    """A model that counts; its loss is `log_sum_exp` times a factor of the batch."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, Counting("log_sum_exp", 8)(inputs))
    put(model.trainable_variables, np.linspace(-2, 2, 8))
    model = kc.curved(model)
    model.compile(optimizer, loss=lambda y, output: output[:, 0] * (1.0 + y[:, 0]), jit_compile=False)
    return model


def backward_passes(model, y=NOTHING):
    """How many backward passes a step took beyond those of the search."""
    Counting.backward = 0
    model.reset_metrics()
    evaluations = model.train_on_batch(ONE, y, return_dict=True)["evaluations"]
    return Counting.backward - evaluations


def test_the_gradient_of_the_end_is_that_of_the_next_begin():
    model = counting_model(kc.LBFGS())
    assert [backward_passes(model) for _ in range(5)] == [1, 0, 0, 0, 0]


def test_another_batch_or_other_weights_take_a_new_gradient():
    model, other = counting_model(kc.LBFGS()), 0.5 * ONE
    assert [backward_passes(model, y) for y in (NOTHING, NOTHING, other, other)] == [1, 0, 1, 0]
    put(model.trainable_variables, -weights(model))
    assert [backward_passes(model, other) for _ in range(2)] == [1, 0]


def test_batches_that_differ_give_pairs_of_one_batch_each():
    model = counting_model(kc.LBFGS(memory=4))
    for scale in (0.0, 1.0, 3.0, 0.5):
        before = weights(model)
        model.train_on_batch(ONE, scale * ONE)
        s, y = pairs(model.optimizer)[-1]
        change = value_and_gradient("log_sum_exp", weights(model))[1] - value_and_gradient("log_sum_exp", before)[1]
        np.testing.assert_allclose(y, (1.0 + scale) * change, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(s, weights(model) - before, rtol=1e-9)


# What may go wrong.


def test_pairs_without_curvature_are_left_out_or_mended():
    # from the top of a cosine downhill the slope gets steeper: s'y < 0
    for update in ("cautious", "damped"):
        model = function_model("eggholder", (100.0, 100.0), kc.LBFGS(0.5, search=None, update=update))
        for _ in range(12):
            before = int(model.optimizer._count.numpy()) if model.optimizer.built else 0
            model.reset_metrics()
            log = model.train_on_batch(ONE, NOTHING, return_dict=True)
            learnt = int(model.optimizer._count.numpy()) == before + 1
            if update == "cautious" and log["resets"] == 0:
                g = value_and_gradient("eggholder", weights(model))[1]
                assert learnt == (log["curvature"] >= CAUTION * np.linalg.norm(g)) or abs(log["curvature"]) < 1e-3
        H = inverse_hessian(model.optimizer, 2)
        assert np.linalg.eigvalsh(H).min() > 0


@pytest.mark.parametrize("make", [kc.LBFGS, kc.BFGS])
def test_a_direction_that_does_not_descend_gives_way_to_the_gradient(make):
    model = function_model("himmelblau", (1.0, 1.0), make())
    steps(model, 4)
    optimizer = model.optimizer
    if make is kc.LBFGS:
        optimizer._yy.assign(-1e6 * np.eye(10))
    else:
        optimizer._H.assign(-np.eye(2))
    before = value_and_gradient("himmelblau", weights(model))
    model.reset_metrics()
    log = model.train_on_batch(ONE, NOTHING, return_dict=True)
    assert log["resets"] == 1 and int(optimizer._count.numpy()) == 1
    after = value_and_gradient("himmelblau", weights(model))
    assert after[0] < before[0]
    assert steps(model, 30)[-1]["gradient_max"] <= 1e-8


def test_a_search_steps_back_from_a_wall_and_says_so():
    logs = steps(function_model("wall", (-3.0, -1.0, 0.5), kc.LBFGS(initial_scale=1.0)), 60, gradient=1e-6)
    assert sum(log["overflows"] for log in logs) >= 1 and sum(log["skipped_steps"] for log in logs) == 0
    assert logs[-1]["gradient_max"] <= 1e-6 and np.isfinite([log["loss"] for log in logs]).all()


def test_a_first_point_that_is_not_finite_skips_the_step_and_keeps_all():
    model = function_model("wall", (0.5, 0.5), kc.LBFGS())
    steps(model, 3, gradient=0.0)
    put(model.trainable_variables, [2.0, 0.5])
    counter = model.optimizer.skipped_steps
    before = [v.numpy() for v in [*model.variables, *model.optimizer.variables] if v is not counter]
    model.reset_metrics()
    log = model.train_on_batch(ONE, NOTHING, return_dict=True)
    assert log["skipped_steps"] == 1 and log["evaluations"] == 0
    after = [v.numpy() for v in [*model.variables, *model.optimizer.variables] if v is not counter]
    ours = [(a, b) for a, b in zip(before, after) if a.dtype == np.float64]
    assert ours and all(np.array_equal(a, b) for a, b in ours if a.shape != ())


@pytest.mark.parametrize("make", some([kc.LBFGS, kc.BFGS, lambda: kc.LBFGS(search=kc.StrongWolfe())], [kc.LBFGS]))
@pytest.mark.parametrize("function, words", [
    ("flat", "the largest entry of the gradient is 0"), ("unbounded", None), ("matyas", "the largest entry"),
])  # fmt: skip
def test_flat_unbounded_and_solved_losses_end_with_a_reason(make, function, words):
    model = function_model(function, (2.0, 1.0), make())
    stop = kc.callbacks.Converged(verbose=0)
    history = model.fit(ONE, NOTHING, epochs=15, callbacks=[stop], verbose=0).history
    assert sum(history["skipped_steps"]) == 0
    if words:
        assert words in stop.reason and len(history["loss"]) < 15
    else:
        assert stop.reason is None and history["loss"][-1] < -1e3  # it goes on down, and says nothing wrong


def test_a_run_at_the_limit_of_rounding_ends_with_a_reason():
    model = function_model("himmelblau", (1.0, 1.0), kc.LBFGS(search=kc.StrongWolfe()))
    stop = kc.callbacks.Converged(gradient=0.0, verbose=0)
    history = model.fit(ONE, NOTHING, epochs=100, callbacks=[stop], verbose=0).history
    assert stop.reason is not None and len(history["loss"]) < 100
    assert history["loss"][-1] < 1e-15


def test_in_single_precision_it_goes_on_where_losses_are_less_exact_than_the_search_takes_them_for():
    """Poisson's equation: there the loss stood still at 4.5e-5, and each step took all evaluations of a search."""
    keras.config.set_floatx("float32")
    problem = problems.poisson()
    model = kc.curved(problem.model(0))
    model.compile(kc.LBFGS(memory=50), loss=problem.loss(), jit_compile=False)
    batches = tf.data.Dataset.from_tensors(problem.data()).repeat()
    history = model.fit(batches, steps_per_epoch=350, epochs=3, shuffle=False, verbose=0).history
    assert float(model.optimizer._rounding.value) > 1e-5
    assert max(history["evaluations"]) <= 480 and sum(history["resets"]) == 0
    assert min(history["step_length"]) > 0.5 and history["loss"][-1] < 4e-5


def test_the_callback_looks_at_the_loss(capsys):
    model = function_model("matyas", (2.0, 1.0), "sgd")
    with pytest.raises(ValueError, match="does not report `gradient_max`"):
        model.fit(ONE, NOTHING, verbose=0, callbacks=[kc.callbacks.Converged()])
    stop = kc.callbacks.Converged(gradient=None, loss=0.5, patience=3)
    epochs = len(model.fit(ONE, NOTHING, epochs=20, verbose=0, callbacks=[stop]).history["loss"])
    assert epochs == 4 and "changed by less than 0.5 of its size in 3 epochs" in stop.reason
    assert stop.reason in capsys.readouterr().out
    put(model.trainable_variables, [np.nan, 1.0])
    model.fit(ONE, NOTHING, epochs=5, verbose=0, callbacks=[stop])
    assert stop.reason == "the loss of no batch is finite"


def test_first_adam_then_lbfgs_is_a_second_compile():
    """The habit of physics-informed training."""
    model = function_model("rosenbrock", (-1.2, 1.0), keras.optimizers.Adam(0.01))
    x, y = np.ones((50, 1)), np.zeros((50, 1))
    model.fit(x, y, batch_size=1, verbose=0)
    model.compile(kc.LBFGS(), loss=the_output)
    stop = kc.callbacks.Converged(gradient=1e-9, verbose=0)
    one = model.fit(ONE, NOTHING, epochs=20, verbose=0, callbacks=[stop]).history
    two = model.fit(ONE, NOTHING, epochs=80, verbose=0, callbacks=[stop]).history  # the memory goes on
    assert two["pairs"][0] == min(10, one["pairs"][-1] + 1) or two["resets"][0]
    assert "gradient" in stop.reason and two["loss"][-1] < 1e-15


@pytest.mark.parametrize("make", METHODS)
def test_a_killed_run_goes_on_amid_the_memory_bit_for_bit(make, tmp_path):
    def run(*callbacks):
        model = function_model("rosenbrock", (-1.2, 1.0), make())
        history = model.fit(ONE, NOTHING, epochs=15, verbose=0, callbacks=list(callbacks)).history
        return str(history), [v.numpy() for v in [*model.variables, *model.optimizer.variables]], history

    def kill(epoch, logs):
        if epoch == 11:  # the oldest pairs have been replaced
            raise KeyboardInterrupt

    _, expected, whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(kc.callbacks.Checkpoint(tmp_path), keras.callbacks.LambdaCallback(on_epoch_end=kill))
    _, resumed, rest = run(kc.callbacks.Checkpoint(tmp_path))
    begin = 15 - len(rest["loss"])
    assert 10 <= begin <= 12 and all(rest[name] == whole[name][begin:] for name in whole)
    for a, b in zip(resumed, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_matrix_that_does_not_fit_is_refused_in_bytes():
    inputs = keras.Input((200,))
    model = kc.curved(keras.Model(inputs, keras.layers.Dense(200)(inputs)))
    model.compile(kc.BFGS(), "mse")
    with pytest.raises(ValueError, match=r"12.9 GB for this model.*40200 trainable weights.*Use `LBFGS\(\)`"):
        model.train_on_batch(np.zeros((2, 200)), np.zeros((2, 200)))


@pytest.mark.parametrize("make, words", [
    (lambda: kc.LBFGS(memory=0), "`memory` must be an integer"),
    (lambda: kc.LBFGS(search="wolfe"), "`search` must be a component"),
    (lambda: kc.LBFGS(search=kc.StrongWolfe), "`search` must be a component"),
    (lambda: kc.LBFGS(update="none"), '`update` must be "cautious" or "damped"'),
    (lambda: kc.LBFGS(initial_scale=0.0), "`initial_scale` must be a number above 0"),
    (lambda: kc.BFGS(scaling="ss"), '`scaling` must be None, "self_scaled" or "broyden"'),
    (lambda: kc.callbacks.Converged(gradient=-1.0), "`gradient` must be a number"),
    (lambda: kc.callbacks.Converged(patience=0), "`patience` must be an integer"),
])  # fmt: skip
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_plain_model_is_told_to_be_curved():
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile(kc.LBFGS(), "mse")
    with pytest.raises(ValueError, match="keras_curvature.curved"):
        model.train_on_batch(ONE, NOTHING)
