"""Gauss-Newton and Levenberg-Marquardt steps against dense linear algebra in float64."""

import contextlib
import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, flat, float64, put
from selection import some

import keras_curvature as kc
from keras_curvature import ConjugateGradient, GaussNewton, GridSearch, Linearization, Nielsen, operators
from keras_curvature.optimizers import local_models
from keras_curvature.solvers import least_squares

CASES = {**MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
CG = ConjugateGradient(max_steps=2000, progress_tolerance=0.0, residual_tolerance=1e-13)
WAYS = ("rows", "weights", "qr", "svd", CG)


def random_problem(rows=7, n=5, seed=0):
    """`(A, r, b, c, E)`."""
    random = np.random.default_rng(seed)
    A, r, b, c = (random.standard_normal(shape) for shape in ((rows, n), rows, n, n))
    return A, r, b, c, 0.1 + random.random(n)


SOLVERS = {
    "rows": least_squares.in_rows, "weights": least_squares.in_weights, "qr": least_squares.by_qr,
    "svd": lambda A, E: least_squares.by_svd(A, E, E),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 5), (3, 5), (1, 4)])
@pytest.mark.parametrize("way", SOLVERS)
def test_each_solver_finds_the_minimum(way, shape):
    A, r, b, c, E = random_problem(*shape)
    solve = SOLVERS[way](tf.constant(A), tf.constant(E))
    H = A.T @ A + np.diag(E)
    np.testing.assert_allclose(solve(tf.constant(r)), -np.linalg.solve(H, A.T @ r), rtol=1e-10)
    expected = -np.linalg.solve(H, A.T @ r + b - E * c)
    np.testing.assert_allclose(solve(*map(tf.constant, (r, b, c))), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(7, 5), (3, 5)])
def test_singular_values_without_damping_give_the_shortest_solution(shape):
    A, r, *_, metric = random_problem(*shape)
    A[-1] = A[0]  # and singular
    root = np.sqrt(metric)
    found = least_squares.by_svd(tf.constant(A), tf.zeros(shape[1], tf.float64), tf.constant(metric))(tf.constant(r))
    np.testing.assert_allclose(found, -np.linalg.lstsq(A / root, r, rcond=1e-12)[0] / root, rtol=1e-9)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_the_normal_equations_are_as_exact_as_qr_while_they_are_regular(condition):
    random = np.random.default_rng(0)
    (U, _), (V, _) = (np.linalg.qr(random.standard_normal((rows, 20))) for rows in (60, 20))
    A, r = U * np.logspace(0, -np.log10(condition), 20) @ V.T, random.standard_normal(60)
    E = np.full(20, 1e-6 / condition**2)
    exact = -np.linalg.lstsq(np.vstack([A, np.diag(np.sqrt(E))]), np.append(r, np.zeros(20)), rcond=None)[0]
    errors = [
        np.linalg.norm(solve(tf.constant(A), tf.constant(E))(tf.constant(r)) - exact) / np.linalg.norm(exact)
        for solve in (least_squares.in_weights, least_squares.by_qr)
    ]
    assert errors[0] <= 100 * max(errors[1], 1e-16 * condition)  # without the refinement 1e-16 condition^2


def test_a_failed_decomposition_is_nan_and_raises_nothing():
    A, r, *_ = random_problem()
    for solver, entry in ((least_squares.in_rows, -0.01), (least_squares.in_weights, -1e3)):
        assert np.isnan(solver(tf.constant(A), tf.constant(entry * np.ones(5)))(tf.constant(r))).any()


# One step.


def step(case, optimizer, steps=1, **how):
    """`(weights before, step, reports)` of the last of some steps on the batch."""
    model = kc.curved(case.model)
    case.compile(optimizer, **how)
    for _ in range(steps):
        before = flat(model.trainable_variables)
        logs = model.train_on_batch(*case.batch, return_dict=True)
    return before, flat(model.trainable_variables) - before, logs


def dense(case):
    """`(G, g, A, r)` at the weights, as arrays: the Gauss-Newton matrix by products, with L2."""
    if not case.model.compiled:
        case.compile()
    lin = Linearization(case.model, *case.batch)
    rows = lin.rows()
    G = operators.base.dense(lin.gauss_newton(), lin.weights).numpy()
    return G, flat(lin.gradient), rows.dense().numpy(), rows.residual.numpy()


@pytest.mark.parametrize("kind", some(
    ["dense", "conv2d", "lstm", "batch_normalization", "embedding", "several_outputs", "attention", "loss_regularized",
     "loss_sample_weights", "loss_added_loss", "loss_poisson", "loss_huber", "loss_binary_from_sigmoid"],
    ["loss_regularized"],
))  # fmt: skip
def test_all_ways_to_solve_give_the_same_step(kind):
    with float64():
        G, g, *_ = dense(CASES[kind]())
        expected = -np.linalg.solve(G + 0.03 * np.eye(len(g)), g)
        for way in WAYS:
            _, found, logs = step(CASES[kind](), GaussNewton(damping=0.03, solver=way), jit_compile=False)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max(), err_msg=str(way))
            assert (logs["cg_iterations"] > 0) == (way is CG)


@pytest.mark.parametrize("kind", some(
    ["loss_regularized", "several_outputs", "batch_normalization"], ["loss_regularized", "batch_normalization"]
))  # fmt: skip
def test_rows_are_solved_by_layers_without_an_array_where_no_layer_mixes_examples(kind, monkeypatch):
    """The model of the loss is the same, so the reports are, after steps with momentum and geodesic acceleration."""
    made = []
    for model in (local_models.WithGram, local_models.WithRows):
        monkeypatch.setattr(
            local_models, model.__name__, type("Noted", (model,), {"__init__": lambda self, *args, own=model: (
                made.append(own.__name__), own.__init__(self, *args))[1]}),
        )  # fmt: skip
    found = []
    for way in ("rows", "weights"):
        with float64():
            damping = kc.LevenbergMarquardt.martens(initial=0.3)
            optimizer = GaussNewton(0.5, damping=damping, solver=way, momentum=0.6, geodesic=True)
            found.append(step(CASES[kind](), optimizer, steps=3, jit_compile=False))
    assert made[0] == ("WithRows" if kind == "batch_normalization" else "WithGram") and made[-1] == "WithRows"
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-9 * np.abs(found[1][1]).max())
    for name in ("loss", "damping", "reduction_ratio", "step_norm"):
        np.testing.assert_allclose(found[0][2][name], found[1][2][name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("way", some(WAYS, ["rows", CG]))
def test_momentum_pulls_the_damping_to_the_last_step(way):
    with float64():
        case = CASES["loss_regularized"]()
        optimizer = GaussNewton(learning_rate=0.5, damping=0.2, momentum=0.7, solver=way)
        _, first, _ = step(case, optimizer)
        G, g, *_ = dense(case)
        _, second, _ = step(case, optimizer)
    last = first / 0.5
    expected = 0.7 * last - np.linalg.solve(G + 0.2 * np.eye(len(g)), g + 0.7 * G @ last)
    np.testing.assert_allclose(second, 0.5 * expected, atol=1e-9)


def test_with_momentum_the_fixed_point_is_that_of_a_smaller_damping():
    """On a quadratic that does not move, `phi` tends to the solution with `lambda (1 - momentum)`."""
    A, r, *_ = random_problem(3, 5)
    solve, last = least_squares.in_rows(tf.constant(A), tf.constant(0.4 * np.ones(5))), tf.zeros(5, tf.float64)
    for _ in range(400):
        last = solve(tf.constant(r), None, 0.9 * last)
    np.testing.assert_allclose(last, -np.linalg.solve(A.T @ A + 0.04 * np.eye(5), A.T @ r), rtol=1e-8)


@pytest.mark.parametrize("scaling", ["marquardt", "more"])
def test_the_damping_is_scaled_by_the_norms_of_columns(scaling):
    with float64():
        case = CASES["dense"]()
        optimizer = GaussNewton(damping=0.3, scaling=scaling)
        *_, A, _ = dense(case)
        first = np.sqrt((A * A).sum(0))
        step(case, optimizer)
        G, g, A, _ = dense(case)
        D = np.sqrt((A * A).sum(0))
        D = np.maximum(D, first) if scaling == "more" else D
        _, found, _ = step(case, optimizer)
    np.testing.assert_allclose(found, -np.linalg.solve(G + 0.3 * np.diag(D * D), g), rtol=1e-7, atol=1e-11)


def test_a_column_of_zeros_counts_as_the_longest():
    with float64():
        case = CASES["dense"]()
        case.x = np.array(case.x)
        case.x[:, 1] = 0.0
        G, g, A, _ = dense(case)
        D = np.sqrt((A * A).sum(0))
        assert (D == 0).any()
        D[D == 0] = D.max()
        _, found, _ = step(case, GaussNewton(damping=1e-3, scaling="marquardt"))
    np.testing.assert_allclose(found, -np.linalg.solve(G + 1e-3 * np.diag(D * D), g), rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("floatx", ["float32", "float64"])
@pytest.mark.parametrize("scaling", ["marquardt", "more"])
@pytest.mark.parametrize("kind", ["keys", "normalization"])
def test_weights_without_influence_stay_where_they_are(floatx, scaling, kind):
    """Their columns are rounding: the quotient of slope and square of the norm came to 1e14."""
    with float64() if floatx == "float64" else contextlib.nullcontext():
        keras.utils.set_random_seed(1)
        random = np.random.default_rng(0)
        inputs = keras.Input((5, 4))
        if kind == "keys":
            hidden = inputs + keras.layers.MultiHeadAttention(2, 3, name="layer")(inputs, inputs)
        else:
            hidden = keras.layers.GroupNormalization(6)(keras.layers.Conv1D(6, 2, name="layer")(inputs))
        outputs = keras.layers.Dense(2)(keras.layers.Flatten()(keras.layers.Activation("tanh")(hidden)))
        model = kc.curved(keras.Model(inputs, outputs))
        model.compile(GaussNewton(scaling=scaling, damping=kc.Nielsen()), "mse")
        x, y = random.standard_normal((16, 5, 4)).astype(floatx), random.standard_normal((16, 2)).astype(floatx)
        losses = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history["loss"]
        without = [v for v in model.get_layer("layer").trainable_variables if v.path.endswith("bias")]
        (bias,) = [v for v in without if kind != "keys" or "key" in v.path]
    assert np.abs(bias.numpy()).max() < 1e-3 and losses[-1] < 0.1 * losses[0]


def test_geodesic_acceleration_is_that_of_a_dense_computation():
    with float64():
        case = CASES["dense"]()
        G, g, A, _ = dense(case)
        H = G + 1.0 * np.eye(len(g))
        v = -np.linalg.solve(H, g)
        variables, w = case.model.trainable_variables, flat(case.model.trainable_variables)

        def rows_of(t):
            put(variables, w + t * v)
            z = np.ravel(case.model(case.x))
            put(variables, w)
            return np.sqrt(2.0 / 18) * z

        bent = (rows_of(0.1) - 2 * rows_of(0.0) + rows_of(-0.1)) / 0.01
        a = -np.linalg.solve(H, A.T @ bent)
        assert 2 * np.linalg.norm(a) < 0.75 * np.linalg.norm(v)
        for way in ("qr", CG):
            again = CASES["dense"]()
            _, found, _ = step(again, GaussNewton(damping=1.0, geodesic=True, solver=way))
            np.testing.assert_allclose(found, v + 0.5 * a, atol=1e-9)


@pytest.mark.parametrize(
    "order, search, way",
    some(
        list(itertools.product([2, 3, 4], [False, True], ["rows", "qr", "svd", CG])),
        [(2, False, "qr"), (3, True, "rows"), (3, False, CG), (4, True, "qr"), (4, False, "svd"), (4, True, CG)],
    ),
    ids=str,
)
def test_a_path_of_higher_order_is_that_of_a_dense_computation(order, search, way):
    """Each vector solves the same system; the search takes the best of its points on the curve."""
    with float64():
        case = CASES["dense"]()
        G, g, A, _ = dense(case)
        H = G + np.eye(len(g))
        path, variables = [-np.linalg.solve(H, g)], case.model.trainable_variables
        w = flat(variables)

        def at(t):
            return w + sum(v * t**k / math.factorial(k) for k, v in enumerate(path, 1))

        def of(point, function):
            put(variables, point)
            found = function()
            put(variables, w)
            return found

        stencils = {2: (0.1, [1, -2, 1]), 3: (0.2, [-0.5, 1, 0, -1, 0.5]), 4: (0.2, [1, -4, 6, -4, 1])}
        for k in range(2, order + 1):
            h, weights = stencils[k]
            offsets = np.arange(len(weights)) - len(weights) // 2
            outputs = [of(at(h * t), lambda: np.ravel(case.model(case.x))) for t in offsets]
            bent = np.sqrt(2.0 / 18) * np.tensordot(weights, outputs, 1) / h**k
            path.append(-np.linalg.solve(H, A.T @ bent))
        lengths = [1.0, 0.7, 0.49] if search else [1.0]
        losses = [of(at(s), lambda: np.mean((case.model(case.x) - case.y) ** 2)) for s in lengths]
        expected = at(lengths[int(np.argmin(losses))]) - w
        line_search = GridSearch(0.7, 3) if search else None
        optimizer = GaussNewton(damping=1.0, geodesic=order, line_search=line_search, solver=way)
        _, found, _ = step(CASES["dense"](), optimizer)
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_in_a_bent_valley_the_curve_goes_on_where_the_straight_step_is_cut_short():
    """Along Rosenbrock's valley, a parabola, the acceleration is all that the straight step lacks."""
    logs, damping, after = {}, {}, {}
    with float64():
        for geodesic in (False, True, 4):
            model, batch = rising(damping=Nielsen(tau=1e-9), geodesic=geodesic, line_search=GridSearch(count=6))
            logs[geodesic] = model.train_on_batch(*batch, return_dict=True)
            after[geodesic] = model.test_on_batch(*batch, return_dict=True)["loss"]
            damping[geodesic] = model.optimizer._damping.numpy()[0]
    assert 0 < logs[False]["step_length"] < 1 and 0 < after[False] < logs[False]["loss"]
    # the gain was small beside what the whole step promised
    assert damping[False] > logs[False]["damping"]
    for geodesic in (True, 4):
        assert logs[geodesic]["step_length"] == 1 and after[geodesic] < 1e-6 * after[False]
        assert damping[geodesic] < logs[geodesic]["damping"]


def test_an_acceleration_that_is_too_large_takes_the_step_back_or_is_left_out():
    problem = kc.problems.rosenbrock()
    with float64():
        ends, logs = [], []
        for damping, geodesic in ((1e-9, False), (1e-9, True), (Nielsen(tau=1e-12), True)):
            model = kc.curved(problem.compiled(GaussNewton(damping=damping, geodesic=geodesic, attempts=1)))
            model.set_weights([np.array([-1.2, 1.0])])
            logs.append(model.train_on_batch(*problem.data(1), return_dict=True))
            ends.append(model.get_weights()[0])
    np.testing.assert_array_equal(ends[0], ends[1])  # a constant damping cannot grow
    np.testing.assert_array_equal(ends[2], [-1.2, 1.0])
    assert [found["step_length"] for found in logs] == [1.0, 1.0, 0.0]


# Trial steps.


def rising(damping=Nielsen(), **kwargs):
    """A model at the start of Rosenbrock's valley, where a full step of Gauss-Newton raises the loss; in float64."""
    problem = kc.problems.rosenbrock()
    model = kc.curved(problem.compiled(GaussNewton(damping=damping, **kwargs)))
    model.set_weights([np.array([-1.2, 1.0])])
    return model, problem.data(1)


@pytest.mark.parametrize("way", ["qr", CG])
def test_a_step_that_raises_the_loss_is_taken_back_bit_for_bit(way):
    with float64():
        model, data = rising(Nielsen(tau=1e-9), solver=way, momentum=0.5, attempts=1)
        before, seen = model.get_weights()[0], []
        for _ in range(12):
            logs = model.train_on_batch(*data, return_dict=True)
            seen.append(logs["damping"])
            if logs["step_length"] > 0:
                break
            np.testing.assert_array_equal(model.get_weights()[0], before)
            assert logs["step_norm"] == 0 and logs["skipped_steps"] == 0
    assert len(seen) > 3
    np.testing.assert_allclose(np.array(seen[1:4]) / seen[:3], [2, 4, 8], rtol=1e-6)
    assert np.any(model.get_weights()[0] != before)


@pytest.mark.parametrize(
    "options", [{"geodesic": 4}, {"solver": CG}, {"momentum": 0.5}, {"line_search": GridSearch(0.9, 2)}], ids=str
)
def test_the_attempts_of_a_step_are_the_steps_of_one_attempt_each(options):
    with float64():
        model, data = rising(Nielsen(tau=1e-9), attempts=1, **options)
        count, length = 0, 0.0
        while not length:
            count, length = count + 1, model.train_on_batch(*data, return_dict=True)["step_length"]
        assert count > 2
        expected = [model.get_weights()[0], model.optimizer._damping.numpy()]
        for attempts, same in ((count, True), (count - 1, False)):
            model, _ = rising(Nielsen(tau=1e-9), attempts=attempts, **options)
            logs = model.train_on_batch(*data, return_dict=True)
            assert (logs["step_length"] == length) == same
            found = [model.get_weights()[0], model.optimizer._damping.numpy()]
            if not same:
                np.testing.assert_array_equal(found[0], [-1.2, 1.0])
                logs = model.train_on_batch(*data, return_dict=True)  # goes on with the next damping
                found = [model.get_weights()[0], model.optimizer._damping.numpy()]
            for a, b in zip(found, expected):
                np.testing.assert_allclose(a, b, rtol=1e-12)


def test_no_attempt_follows_rows_that_are_not_finite():
    model, (x, y) = rising(attempts=10)
    before = model.get_weights()[0]
    logs = model.train_on_batch(x, np.full_like(y, np.nan), return_dict=True)
    assert logs["skipped_steps"] == 1 and not model.optimizer._damping.numpy()[0]
    np.testing.assert_array_equal(model.get_weights()[0], before)


def test_nielsen_by_hand():
    rule = Nielsen(tau=1e-3)
    value = rule.begun(tf.constant(rule.initial, tf.float64), tf.constant(50.0, tf.float64))
    np.testing.assert_allclose(value, [0.05, 2.0])
    np.testing.assert_allclose(rule.begun(value, tf.constant(7.0, tf.float64)), [0.05, 2.0])
    for ratio, expected in ((1.0, 1 / 3), (0.5, 1.0), (0.1, 1 + 0.8**3), (0.75, 1 - 0.5**3)):
        np.testing.assert_allclose(rule.update(value, tf.constant(ratio, tf.float64)), [0.05 * expected, 2.0])
    for bad in (0.0, -1.0, -np.inf, np.nan):
        worse = rule.update(value, tf.constant(bad, tf.float64))
        np.testing.assert_allclose(worse, [0.1, 4.0])
        np.testing.assert_allclose(rule.update(worse, tf.constant(bad, tf.float64)), [0.4, 8.0])
    np.testing.assert_allclose(rule.begun(tf.constant([0.0, 2.0]), tf.constant(0.0)), [1e-3, 2.0])  # no gradient


def test_grid_search_takes_the_lowest_of_all_lengths():
    search = GridSearch(shrink=0.5, count=6)
    losses = {1.0: np.nan, 0.5: 3.0, 0.25: 0.5, 0.125: 0.7, 0.0625: 0.2, 0.03125: 0.9}
    along = lambda s: tf.constant(losses[float(s)], tf.float64)  # noqa: E731
    found = search.search(along, tf.constant(1.0, tf.float64), None, tf.constant(losses[1.0], tf.float64))
    assert [float(a) for a in found] == [0.0625, 0.2]
    higher = lambda s: tf.constant(2.0, tf.float64)  # noqa: E731
    found = search.search(higher, tf.constant(1.0, tf.float64), None, tf.constant(2.0, tf.float64))
    assert [float(a) for a in found] == [0.0, 1.0]


@pytest.mark.parametrize("search", [GridSearch(), kc.ArmijoLineSearch(shrink=0.5)])
def test_a_line_search_finds_a_lower_loss_where_the_full_step_has_none(search):
    with float64():
        model, data = rising(1e-9, line_search=search)
        losses = [model.train_on_batch(*data, return_dict=True) for _ in range(60)]
    values = [logs["loss"] for logs in losses]
    assert all(b < a for a, b in zip(values, values[1:]) if a > 1e-25)
    assert losses[0]["step_length"] < 1
    assert values[-1] < 1e-20


# Hard cases.


def test_a_residual_of_zero_takes_no_step():
    problem = kc.problems.rosenbrock()
    with float64():
        model = kc.curved(problem.compiled(GaussNewton.levenberg_marquardt()))
        model.set_weights([np.ones(2)])
        model.optimizer.iterations.assign(1)  # the first batch must have a gradient
        logs = [model.train_on_batch(*problem.data(1), return_dict=True) for _ in range(3)][-1]
    np.testing.assert_array_equal(model.get_weights()[0], np.ones(2))
    assert logs["skipped_steps"] == 0


@pytest.mark.parametrize("way", WAYS)
def test_equal_examples_make_the_gram_matrix_singular_and_no_harm(way):
    with float64():
        case = CASES["dense"]()
        case.x, case.y = np.tile(case.x[:1], (6, 1)), np.tile(case.y[:1], (6, 1))
        model = kc.curved(case.model)
        case.compile(GaussNewton(solver=way))
        for _ in range(30):
            logs = model.train_on_batch(case.x, case.y, return_dict=True)
        assert logs["loss"] < 1e-12 and logs["skipped_steps"] == 0


def test_one_example_trains():
    with float64():
        case = CASES["dense"]()
        case.x, case.y = case.x[:1], case.y[:1]
        model = kc.curved(case.model)
        case.compile(GaussNewton())
        for _ in range(20):
            loss = model.train_on_batch(case.x, case.y)
        assert np.ravel(loss)[0] < 1e-20
        assert model.optimizer.solved_by == "rows"


def test_without_a_check_every_finite_step_is_taken():
    """A number for the damping is the papers' method: from the start of Rosenbrock's valley the loss rises."""
    with float64():
        model, data = rising(1e-9)
        logs = [model.train_on_batch(*data, return_dict=True) for _ in range(2)]
    assert logs[1]["loss"] > 10 * logs[0]["loss"] and logs[0]["step_length"] == 1


def test_a_gram_matrix_that_is_singular_in_its_precision_leaves_the_weights_finite():
    """Equal examples in float32: `K / lambda + 1` is `K / lambda`, whose Cholesky decomposition fails or is noise."""
    for damping in (1e-9, 1e-20, 1e-30):
        case = CASES["dense"]()
        case.x, case.y = np.tile(case.x[:1], (6, 1)), np.tile(case.y[:1], (6, 1))
        model = kc.curved(case.model)
        case.compile(GaussNewton.gram(damping=damping), jit_compile=False)
        for _ in range(3):
            before = flat(model.trainable_variables)
            logs = model.train_on_batch(case.x, case.y, return_dict=True)
            after = flat(model.trainable_variables)
            assert np.isfinite(after).all()
            assert logs["step_length"] == 1 or np.array_equal(after, before)


@pytest.mark.parametrize("kind", ["loss_focal", "loss_cosine_similarity"])
def test_a_loss_that_is_not_convex_is_refused_in_words(kind):
    case = CASES[kind]()
    model = kc.curved(case.model)
    case.compile(GaussNewton())
    with pytest.raises(ValueError, match="convex in the model's outputs.*Choose another loss"):
        model.train_on_batch(case.x, case.y)


def test_integer_targets_of_huge_scale_are_met():
    with float64():
        x = np.linspace(-1, 1, 9)[:, None]
        y = (1e9 * np.sign(x)).astype("int64")
        keras.utils.set_random_seed(0)
        model = kc.curved(keras.Sequential([keras.Input((1,)), keras.layers.Dense(12, "tanh"), keras.layers.Dense(1)]))
        model.compile(GaussNewton.levenberg_marquardt(), "mse")
        losses = [model.train_on_batch(x, y, return_dict=True)["loss"] for _ in range(60)]
    assert np.isfinite(losses).all() and losses[-1] < 1e-12 * losses[0]


def test_too_large_an_array_is_solved_by_conjugate_gradients_and_said():
    case = CASES["dense"]()
    model = kc.curved(case.model)
    case.compile(GaussNewton(memory=1000))
    logs = model.train_on_batch(case.x, case.y, return_dict=True)
    assert model.optimizer.solved_by == "conjugate gradients" and logs["cg_iterations"] > 0
    for options in ({"solver": "rows"}, {"scaling": "more"}):
        case = CASES["dense"]()
        model = kc.curved(case.model)
        case.compile(GaussNewton(memory=1000, **options))
        with pytest.raises(ValueError, match="GaussNewton\\(memory=...\\)"):
            model.train_on_batch(case.x, case.y)


def test_more_rows_than_weights_are_decomposed_by_qr_only_while_that_is_quick(monkeypatch):
    found = {}
    for quick in (local_models.QUICK, 100):
        monkeypatch.setattr(local_models, "QUICK", quick)
        problem = kc.problems.get("sinc")
        model = kc.curved(problem.compiled(GaussNewton.levenberg_marquardt(), seed=0))
        x, y = problem.data()
        model.train_on_batch(x[:200], y[:200])
        found[model.optimizer.solved_by] = model.get_weights()
    assert list(found) == ["qr", "weights"]
    for qr, weights in zip(*found.values()):
        np.testing.assert_allclose(weights, qr, rtol=1e-4, atol=1e-4)


def test_a_loss_of_the_models_own_is_solved_without_rows():
    case = CASES["loss_own_compute_loss"]()
    model = kc.curved(case.model)
    case.compile(GaussNewton())
    before = float(model.evaluate(case.x, case.y, verbose=0))
    for _ in range(20):
        model.train_on_batch(case.x, case.y)
    assert model.optimizer.solved_by == "conjugate gradients"
    assert float(model.evaluate(case.x, case.y, verbose=0)) < before


@pytest.mark.parametrize(("make", "expected"), [
    (lambda: GaussNewton(solver="cholesky"), "solver='cholesky'"),
    (lambda: GaussNewton(solver=ConjugateGradient), "solver=<class"),
    (lambda: GaussNewton(scaling="none"), "scaling='none'"),
    (lambda: GaussNewton(scaling="more", solver=CG), "scaling='more'"),
    (lambda: GaussNewton(geodesic=1), "geodesic=1"),
    (lambda: GaussNewton(geodesic=5), "True, False, or the order of the path: 2, 3 or 4. Received: geodesic=5"),
    (lambda: GaussNewton(geodesic=2.0), "geodesic=2.0"),
    (lambda: GaussNewton(momentum=1.0), "momentum=1.0"),
    (lambda: GaussNewton(line_search="grid"), "line_search='grid'"),
    (lambda: GaussNewton(memory=0), "memory=0"),
    (lambda: GaussNewton(damping=0.0, solver="rows"), "damping=0.0"),
    (lambda: GaussNewton(damping=0.0, momentum=0.5), "damping=0.0"),
    (lambda: GaussNewton(damping=-1.0), "damping=-1.0"),
    (lambda: kc.CurveBall(damping=Nielsen()), "damping=Nielsen"),
    (lambda: Nielsen(tau=0.0), "tau=0.0"),
    (lambda: Nielsen(minimum=0.0), "minimum=0.0"),
    (lambda: GridSearch(shrink=1.0), "shrink=1.0"),
    (lambda: GridSearch(count=0), "count=0"),
])  # fmt: skip
def test_bad_arguments_fail_at_construction(make, expected):
    with pytest.raises(ValueError) as caught:
        make()
    assert expected in str(caught.value)


# Presets.


PRESETS = {
    "levenberg_marquardt": {"damping": Nielsen(), "scaling": "more", "geodesic": True},
    "energy_natural_gradient": {"damping": 0.0, "solver": "svd", "line_search": GridSearch()},
    "gram": {"damping": 1.0, "solver": "rows"},
    "spring": {"damping": 2e-3, "momentum": 0.99, "solver": "rows"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_arguments(preset):
    made, settings = getattr(GaussNewton, preset)(), PRESETS[preset]
    if preset == "spring":
        settings = {**settings, "learning_rate": keras.optimizers.schedules.InverseTimeDecay(0.05, 1, 1e-4)}
    assert made.get_config() == GaussNewton(**settings).get_config()
    assert getattr(GaussNewton, preset)(damping=0.5, solver="svd").damping == 0.5


def numpy_spring(A, e, mu, lam, last):
    """Algorithm 1 of the SPRING paper, with `O = A`, without centring."""
    inner = np.linalg.solve(A @ A.T + lam * np.eye(len(A)), e - mu * A @ last)
    return mu * last + A.T @ inner


def test_spring_is_the_papers_algorithm():
    with float64():
        case, mu, last = CASES["dense"](), 0.99, 0.0
        model = kc.curved(case.model)
        optimizer = GaussNewton.spring()
        case.compile(optimizer)
        n = len(flat(model.trainable_variables))
        last = np.zeros(n)
        for t in range(3):
            _, _, A, r = dense(case)
            O, e = A / np.sqrt(2), r / np.sqrt(2)  # noqa: E741  J / sqrt(N) and the residuals over sqrt(N)
            last = numpy_spring(O, e, mu, 1e-3, last)
            before = flat(model.trainable_variables)
            model.train_on_batch(case.x, case.y)
            rate = 0.05 / (1 + 1e-4 * t)
            np.testing.assert_allclose(flat(model.trainable_variables) - before, -rate * last, rtol=1e-5, atol=1e-9)


def test_gram_is_kernel_regression_with_the_tangent_kernel():
    with float64():
        case = CASES["dense"]()
        _, _, A, r = dense(case)
        _, found, _ = step(CASES["dense"](), GaussNewton.gram(damping=0.5))
    np.testing.assert_allclose(found, -A.T @ np.linalg.solve(A @ A.T + 0.5 * np.eye(len(r)), r), atol=1e-10)


def test_energy_natural_gradient_is_the_shortest_solution_and_the_best_of_the_grid():
    with float64():
        case = CASES["dense"]()
        _, _, A, r = dense(case)
        direction = -np.linalg.lstsq(A, r, rcond=1e-13)[0]
        variables, w = case.model.trainable_variables, flat(case.model.trainable_variables)

        def loss(s):
            put(variables, w + s * direction)
            return float(case.model.evaluate(case.x, case.y, verbose=0))

        best = min((0.5**k for k in range(31)), key=loss)
        _, found, logs = step(CASES["dense"](), GaussNewton.energy_natural_gradient())
    assert logs["step_length"] == best
    np.testing.assert_allclose(found, best * direction, rtol=1e-6, atol=1e-9)
