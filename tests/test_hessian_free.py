"""Hessian-free optimization against Martens' own code, update by update, and against what its parts promise."""

import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat, put
from selection import some

from keras_curvature import (
    ArmijoLineSearch,
    ConjugateGradient,
    HessianFree,
    LevenbergMarquardt,
    Linearization,
    curved,
    problems,
    trees,
)
from keras_curvature.operators import Diagonal
from keras_curvature.operators.base import dense
from keras_curvature.steps import trial

REFERENCE = pathlib.Path(__file__).parent / "reference"
FILES = [
    "classifier_chunks1", "classifier_chunks2", "regression_chunks2", "classifier_rejected", "autoencoder_chunks1",
    "autoencoder_chunks2",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("in_float64")


@keras.saving.register_keras_serializable(package="keras_curvature_tests")
class SumBinaryCrossentropy(keras.losses.Loss):
    """`sum_o [log(1 + exp(h_o)) - t_o h_o]`, averaged over the batch; Keras' own averages over the outputs too."""

    def call(self, y_true, y_pred):
        return keras.ops.sum(keras.ops.softplus(y_pred) - y_true * y_pred, axis=-1)


@keras.saving.register_keras_serializable(package="keras_curvature_tests")
class L2(keras.regularizers.L2):
    """Keras' own, but for the rounding of its coefficient to float32, which would show in the tenth digit."""

    def __call__(self, x):
        return self.l2 * keras.ops.sum(keras.ops.square(x))


def stepper(model, optimizer):
    """`step(x, y)`: one step, traced once; the loss and what the optimizer reports, before it is rounded to float32."""

    @tf.function
    def step(x, y):
        with mock.patch.object(optimizer, "report", wraps=optimizer.report) as report:
            lin = Linearization(model, x, y)
            loss = lin.loss
            optimizer.step(lin)
        seen = {name: value for call in report.call_args_list for name, value in call.kwargs.items()}
        return {**seen, "loss": loss}

    return lambda x, y: {name: float(value) for name, value in step(tf.constant(x), tf.constant(y)).items()}


def net(sizes, activation="tanh", l2=0.0, seed=0):
    """A net with a linear output layer and the weight cost `l2/2 |w|^2` over kernels and biases."""
    random = np.random.RandomState(seed)
    cost = {"kernel_regularizer": L2(l2 / 2), "bias_regularizer": L2(l2 / 2)}
    cost = cost if l2 else {}
    activations = [activation] * (len(sizes) - 2) + [None]
    layers = [keras.layers.Dense(n, activation=a, **cost) for n, a in zip(sizes[1:], activations)]
    model = keras.Sequential([keras.Input((sizes[0],)), *layers])
    put(model.trainable_variables, np.concatenate([random.randn(model.count_params()) / np.sqrt(sizes[0])]))
    return model


class Run:
    """The stored run of one reference file, and the same problem in Keras."""

    def __init__(self, name):
        self.stored = stored = np.load(REFERENCE / f"hessian_free_{name}.npz")
        kind, chunks = name.split("_")[0], int(stored["set_numchunks"])
        loss = {
            "classifier": keras.losses.CategoricalCrossentropy(from_logits=True),
            "regression": problems.SumSquares(),
            "autoencoder": SumBinaryCrossentropy(),
        }[kind]
        activation = "sigmoid" if kind == "autoencoder" else "tanh"
        model = net([int(n) for n in stored["layer_sizes"]], activation, float(stored["set_l2"]))
        self.model, self.weights = model, model.trainable_variables
        initial = [stored[f"{kind}{i}_init"] for i in range(len(self.weights) // 2) for kind in "wb"]
        model.set_weights(initial)
        self.initial = flat(self.weights)
        self.optimizer = HessianFree(
            solver=ConjugateGradient(max_steps=int(stored["set_maxiters"])),
            curvature_batch=None if chunks == 1 else 1 / chunks,
        )
        curved(model).compile(self.optimizer, loss=loss)
        self.optimizer.build(self.weights)
        self._step = stepper(model, self.optimizer)
        # the code takes a chunk of the batch in one piece, ours is every so many rows
        rows = np.arange(len(stored["x"])).reshape(chunks, -1).T.ravel()
        self.x, self.y = stored["x"][rows], stored["y"][rows]

    def update(self, t):
        return self._step(self.x, self.y)

    def start_at(self, t):
        """Put the state of the row before into place."""
        stored, first = self.stored, t == 0
        put(self.weights, self.initial if first else stored["weights_flat"][t - 1])
        put(self.optimizer._last, np.zeros_like(self.initial) if first else stored["cg_end"][t - 1])
        self.optimizer._damping.assign(float(stored["set_lambda0"] if first else stored["lambda_after"][t - 1]))
        self.optimizer._iterations.assign(t)


@pytest.mark.parametrize("name", some(FILES, ["regression_chunks2"]))
def test_each_update_alone_is_that_of_the_authors_code(name):
    run = Run(name)
    stored, compared = run.stored, 0
    for t in range(25):
        if stored["rounding_step"][t] > 1e-8:  # not even the code itself is sure
            continue
        run.start_at(t)
        seen = run.update(t)
        tolerance = max(1e-9, 100 * stored["rounding_step"][t])
        np.testing.assert_allclose(flat(run.weights), stored["weights_flat"][t], 0, tolerance, err_msg=f"update {t}")
        np.testing.assert_allclose(seen["loss"], stored["full_before"][t], 1e-10)
        np.testing.assert_allclose(seen["damping"], stored["lambda_before"][t], 1e-12)
        if stored["rounding_step"][t] < 1e-10 and stored["decisions_stable"][t]:
            compared += 1
            assert seen["cg_iterations"] == stored["cg_iters"][t], f"update {t}"
            np.testing.assert_allclose(seen["step_length"], stored["rate"][t], 1e-12, err_msg=f"update {t}")
            np.testing.assert_allclose(seen["reduction_ratio"], stored["rho"][t], 1e-7, 1e-7, err_msg=f"update {t}")
            np.testing.assert_allclose(float(run.optimizer._damping.value), stored["lambda_after"][t], 1e-12)
            tolerance = max(1e-9, 100 * stored["rounding_cg_end"][t])
            np.testing.assert_allclose(flat(run.optimizer._last), stored["cg_end"][t], 0, tolerance)
    assert compared >= 10


@pytest.mark.parametrize(
    "name", some(["classifier_chunks2", "regression_chunks2", "classifier_rejected"], ["classifier_rejected"])
)
def test_twenty_five_updates_are_those_of_the_authors_code(name):
    run = Run(name)
    run.start_at(0)
    before = run.initial
    for t in range(25):
        seen = run.update(t)
        after = flat(run.weights)
        np.testing.assert_allclose(after, run.stored["weights_flat"][t], 0, 1e-8, err_msg=f"update {t}")
        np.testing.assert_allclose(float(run.optimizer._damping.value), run.stored["lambda_after"][t], 1e-12)
        if run.stored["rate"][t] == 0:  # rejected
            np.testing.assert_array_equal(after, before)
            assert seen["step_norm"] == 0.0 and seen["damping"] < float(run.optimizer._damping.value)
        before = after
    assert int(run.optimizer.iterations) == 25 and int(run.optimizer.skipped_steps) == 0
    rejected = (run.stored["rate"] == 0).sum()
    assert (rejected > 0) == (name == "classifier_rejected")


def test_the_preconditioner_is_that_of_the_authors_code():
    run = Run("classifier_chunks2")
    for t in range(3):
        run.start_at(t)
        lin = Linearization(run.model, *map(tf.constant, (run.stored["x"], run.stored["y"])))
        preconditioner = run.optimizer._preconditioner(lin, tf.constant(run.stored["lambda_before"][t]))
        ones = [tf.ones_like(w) for w in lin.weights]
        assert isinstance(preconditioner, Diagonal)
        np.testing.assert_allclose(1 / flat(preconditioner @ ones), run.stored["precon_first3"][t], rtol=1e-10)
        np.testing.assert_allclose(flat(lin.gradient), run.stored["grad_first3"][t], rtol=1e-9, atol=1e-12)


def quadratic(optimizer, condition=100.0):
    """A curved quadratic: `(step, model, x, y, H, w*)`."""
    problem = problems.quadratic(dimension=8, condition=condition)
    model = curved(problem.model(2))
    model.compile(optimizer, loss=problem.loss())
    optimizer.build(model.trainable_variables)
    step = stepper(model, optimizer)
    return step, model, *problem.data(samples=1), problem.hessian(), problem.solution()[0]


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_on_a_quadratic_the_ratio_is_one_whatever_the_damping(curvature):
    optimizer = HessianFree(curvature=curvature)
    step, model, x, y, H, solution = quadratic(optimizer)
    start = model.get_weights()[0]
    for damping in (1e-3, 0.1, 3.0):
        model.set_weights([start])
        optimizer._last[0].assign(np.zeros(8))
        optimizer._damping.assign(damping)
        seen = step(x, y)
        np.testing.assert_allclose(seen["reduction_ratio"], 1.0, rtol=1e-7)
        np.testing.assert_allclose(float(optimizer._damping.value), damping * 2 / 3, rtol=1e-12)
        d = -np.linalg.solve(H + damping * np.eye(8), H @ (start - solution))
        np.testing.assert_allclose(model.get_weights()[0], start + d, rtol=1e-5, atol=1e-6)
        assert seen["step_length"] == 1.0


@pytest.mark.parametrize("curvature_batch", some([None, 0.5], [0.5]))
def test_the_predicted_change_is_that_of_the_quadratic_without_the_damping(curvature_batch):
    x, y = (tf.constant(a) for a in batch())
    model = net((8, 7, 5), l2=0.01)
    optimizer = HessianFree(curvature_batch=curvature_batch, solver=ConjugateGradient(max_steps=12))
    curved(model).compile(optimizer, loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    seen = []

    def predicted(optimizer, gradient, B, step, quadratic, damping):
        found = original(optimizer, gradient, B, step, quadratic, damping)
        seen.append((found, trees.dot(gradient, step) + 0.5 * B.quadratic_form(step, step)))
        return found

    original = HessianFree._predicted
    with mock.patch.object(HessianFree, "_predicted", predicted):
        for _ in range(3):  # from zero, and then from a share of the last solution
            optimizer.step(Linearization(model, x, y))
    assert len(seen) == 3 and all(float(expected) < 0 for _, expected in seen)
    np.testing.assert_allclose(*zip(*seen), 1e-10)


def test_conjugate_gradients_end_early():
    optimizer = HessianFree(damping=0.1, solver=ConjugateGradient(max_steps=250))
    step, _, x, y, _, _ = quadratic(optimizer)
    assert 5 <= step(x, y)["cg_iterations"] < 50


@pytest.mark.parametrize("ratio, factor", [(0.1, 1.5), (0.5, 1.0), (0.9, 2 / 3), (-np.inf, 1.5), (np.nan, 1.5)])
def test_damping_follows_the_ratio(ratio, factor):
    optimizer = HessianFree()
    step, _, x, y, _, _ = quadratic(optimizer)
    optimizer._damping.assign(0.7)
    with mock.patch.object(trial, "reduction_ratio", lambda *_: tf.constant(ratio, tf.float64)):
        step(x, y)
    np.testing.assert_allclose(float(optimizer._damping.value), 0.7 * factor, rtol=1e-12)


UNDAMPED = LevenbergMarquardt(initial=1e-9, decay=2 / 3, low=0.25, high=0.75, every=1)


@keras.saving.register_keras_serializable(package="keras_curvature_tests")
class Curve(keras.layers.Layer):
    """`x f(w)` of one weight."""

    def __init__(self, f, **options):
        super().__init__(**options)
        self.f = f

    def build(self, input_shape):
        self.w = self.add_weight(shape=())

    def call(self, x):
        return x * self.f(self.w)


def curve(optimizer, f, start):
    """`(step, w)`: a curved model that says `f(w)`, whose loss is the square of it, at `w = start`."""
    model = keras.Sequential([keras.Input((1,)), Curve(f)])
    model.set_weights([np.array(start)])
    curved(model).compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    step = stepper(model, optimizer)
    return lambda: step(np.ones((1, 1)), np.zeros((1, 1))), model.trainable_variables[0]


def test_a_step_that_no_length_makes_good_is_rejected():
    # arctan: Newton's step from afar goes much further beyond; two lengths are not enough to come back
    optimizer = HessianFree(damping=UNDAMPED, line_search=ArmijoLineSearch(max_steps=2))
    step, w = curve(optimizer, keras.ops.arctan, 10.0)
    damping = float(optimizer._damping.value)
    seen = step()
    assert seen["reduction_ratio"] == -np.inf and seen["step_length"] == 0.0 and seen["step_norm"] == 0.0
    assert float(w.value) == 10.0
    assert float(optimizer._last[0].value) != 0.0  # the next solution begins there all the same
    np.testing.assert_allclose(float(optimizer._damping.value) / damping, 1.5, rtol=1e-12)


def test_a_step_to_a_loss_that_is_not_finite_is_shortened_or_rejected():
    # log: the full step from 5 is to 5 - 5 log 5 < 0
    optimizer = HessianFree(damping=UNDAMPED)
    step, w = curve(optimizer, keras.ops.log, 5.0)
    assert 0 < step()["step_length"] < 1 and 0 < float(w.value) < 5
    optimizer = HessianFree(damping=UNDAMPED, line_search=None)
    step, w = curve(optimizer, keras.ops.log, 5.0)
    before = float(optimizer._damping.value)
    assert step()["step_length"] == 0.0 and float(w.value) == 5.0
    np.testing.assert_allclose(float(optimizer._damping.value) / before, 1.5, rtol=1e-12)


NAN = float("nan")


@pytest.mark.parametrize(
    "losses, chosen", [([3, 1, 2], 1), ([3, 2, 2], 1), ([1, 1, 1], 0), ([3, 2, NAN], 1), ([NAN, 2, 3], 1), ([1], 0)]
)
def test_backtracking_goes_back_while_the_loss_gets_no_worse(losses, chosen):
    optimizer = HessianFree()

    @tf.function
    def backtrack(losses):
        given = {"iterate": lambda j: [tf.cast(j, tf.float64)], "quadratic": lambda j: -tf.cast(j, tf.float64)}
        solution = mock.Mock(count=tf.constant(len(losses)), **given)
        lin = mock.Mock(loss=losses[0], loss_at=lambda step: tf.gather(losses, tf.cast(step[0], tf.int32)))
        return optimizer._backtrack(lin, solution)

    (step,), quadratic, loss = backtrack(tf.constant(losses, tf.float64))
    assert float(step) == chosen == -float(quadratic) and float(loss) == losses[chosen]


def test_the_next_solution_begins_at_a_share_of_the_end_of_the_last_and_not_of_the_step():
    model = net((8, 7, 5))
    x, y = batch()
    optimizer = HessianFree(damping=0.05, solver=ConjugateGradient(max_steps=30), warm_start=0.8)
    curved(model).compile(optimizer, loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    ends, starts = [], []

    def solve(solver, operator, rhs, start=None, preconditioner=None):
        solution = original(solver, operator, rhs, start, preconditioner)
        starts.append(flat(start))
        ends.append(flat(solution.value))
        return solution

    original = ConjugateGradient.solve
    with mock.patch.object(ConjugateGradient, "solve", solve):
        for _ in range(3):
            before = flat(model.trainable_variables)
            optimizer.step(Linearization(model, tf.constant(x), tf.constant(y)))
    assert not starts[0].any()
    np.testing.assert_allclose(starts[1], 0.8 * ends[0], rtol=1e-13)
    np.testing.assert_allclose(starts[2], 0.8 * ends[1], rtol=1e-13)
    np.testing.assert_array_equal(flat(optimizer._last), ends[2])
    assert np.isfinite(flat(model.trainable_variables) - before).all()


def batch(samples=40, seed=0):
    """Inputs of eight numbers, one of five classes."""
    random = np.random.RandomState(seed)
    return random.randn(samples, 8), np.eye(5)[random.randint(5, size=samples)]


@pytest.mark.parametrize("curvature_batch", some([0.25, 10], [10]))
def test_curvature_batch_is_a_share_or_a_number_and_takes_turns(curvature_batch):
    # both mean ten of forty; the fifth update is back at the first ten
    x, y = batch()
    model = net((8, 7, 5))
    optimizer = HessianFree(curvature_batch=curvature_batch, damping=0.1, warm_start=0.0, preconditioner=0.0)
    curved(model).compile(optimizer, loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    step = stepper(model, optimizer)
    for t in range(5):
        start = model.get_weights()
        whole = Linearization(model, tf.constant(x), tf.constant(y))
        rows = slice(t % 4, None, 4)
        part = Linearization(model, tf.constant(x[rows]), tf.constant(y[rows]))
        G = dense(part.gauss_newton(), part.weights).numpy()
        d = -np.linalg.solve(G + 0.1 * np.eye(len(G)), flat(whole.gradient))
        step(x, y)
        np.testing.assert_allclose(flat(optimizer._last), d, rtol=0.02, atol=0.02 * np.abs(d).max())
        model.set_weights(start)


def test_hessian_ends_at_negative_curvature_and_still_descends():
    # cosine near its top: the curvature of the loss is negative there, that of Gauss-Newton is not
    optimizer = HessianFree(damping=LevenbergMarquardt(1e-3, 2 / 3, 0.25, 0.75, 1), curvature="hessian")
    step, w = curve(optimizer, lambda w: 2 + keras.ops.cos(w), 0.3)
    start = step()["loss"]
    # a direction of negative curvature at once: the step is zero, and the damping grows until there is none left
    for _ in range(40):
        seen = step()
    assert seen["loss"] < 0.99 * start and np.isfinite(float(w.value))
    optimizer = HessianFree(curvature="hessian")
    x, y = batch()
    model = net((8, 7, 5))
    curved(model).compile(optimizer, loss=keras.losses.CategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    step = stepper(model, optimizer)
    losses = [step(x, y)["loss"] for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(after <= before for before, after in zip(losses, losses[1:]))


@pytest.mark.parametrize("cls", some([keras.layers.SimpleRNN, keras.layers.LSTM], [keras.layers.SimpleRNN]))
def test_structural_damping_holds_the_hidden_states(cls):
    random = np.random.RandomState(0)
    x, y = random.randn(12, 4, 2), random.randn(12, 1)
    changes = {}
    for mu in (0.0, 100.0):
        inputs = keras.Input((4, 2))
        cell = {"kernel_initializer": keras.initializers.GlorotUniform(0), "return_sequences": True, "unroll": True}
        states = cls(3, recurrent_initializer=keras.initializers.Orthogonal(seed=1), **cell)(inputs)
        last = keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(2))(states[:, -1])
        model = curved(keras.Model(inputs, last))
        watch = keras.Model(inputs, states)
        optimizer = HessianFree(structural_damping=mu, damping=0.1, solver=ConjugateGradient(max_steps=20))
        model.compile(optimizer, loss="mse")
        before, loss = watch(x).numpy(), float(model.evaluate(x, y, verbose=0))
        model.train_on_batch(x, y)
        changes[mu] = np.linalg.norm(watch(x).numpy() - before)
        assert model.evaluate(x, y, verbose=0) < loss
    assert changes[100.0] < 0.5 * changes[0.0]


@pytest.mark.slow
def test_one_update_does_more_than_one_of_adam():
    keras.config.set_floatx("float32")
    problem = problems.get("digits_autoencoder")
    (x, y), _ = problem.data()
    losses = {}
    for name, optimizer in (("adam", keras.optimizers.Adam(3e-3)), ("hessian_free", HessianFree())):
        model = curved(problem.compiled(optimizer, seed=0))
        history = model.fit(x[:500], y[:500], batch_size=500, epochs=12, verbose=0)
        losses[name] = history.history["loss"]
    assert losses["hessian_free"][-1] < 0.8 * losses["adam"][-1]


@pytest.mark.parametrize(
    "damping", [pytest.param(0.0, marks=pytest.mark.slow), LevenbergMarquardt.martens(initial=1e-30)]
)
def test_an_input_that_is_always_zero_is_no_obstacle_without_damping(damping):
    keras.config.set_floatx("float32")  # where small squares and powers of them end sooner
    keras.config.set_dtype_policy("float32")
    x = np.random.default_rng(0).standard_normal((16, 3)).astype("float32")
    x[:, 1] = 0
    keras.utils.set_random_seed(0)
    model = curved(keras.Sequential([
        keras.Input((3,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)
    ]))  # fmt: skip
    model.compile(HessianFree(damping=damping, solver=ConjugateGradient(max_steps=8)), "mse")
    before = model.get_weights()[0]
    history = model.fit(x, x[:, :1] - x[:, 2:], batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    assert sum(history["skipped_steps"]) == 0
    after = model.get_weights()[0]
    np.testing.assert_allclose(after[1], before[1], rtol=1e-6)  # no gradient, no step
    assert all(np.isfinite(v.numpy()).all() for v in model.optimizer.variables)


def test_sgn_is_a_few_plain_iterations_and_the_full_step():
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(5, activation="tanh")
    model = curved(keras.Sequential([keras.Input((3,)), hidden, keras.layers.Dense(2)]))
    model.compile(HessianFree.sgn(rho=0.1, cg_steps=4), "mse")
    random = np.random.default_rng(0)
    x, y = random.standard_normal((12, 3)), random.standard_normal((12, 2))
    lin = Linearization(model, x, y)
    A = dense(lin.gauss_newton(), lin.gradient).numpy() + 0.1 * np.eye(32)
    before, b = flat(model.trainable_variables), -flat(lin.gradient)
    z, r, p = np.zeros(32), b, b
    for _ in range(4):
        alpha = r @ r / (p @ A @ p)
        z, old = z + alpha * p, r
        r = r - alpha * A @ p
        p = r + r @ r / (old @ old) * p
    logs = model.train_on_batch(x, y, return_dict=True)
    assert logs["cg_iterations"] == 4
    # backtracking compares the last iterate with no other: there is none before the fifth
    np.testing.assert_allclose(flat(model.trainable_variables) - before, z, rtol=1e-9, atol=1e-12)
    assert HessianFree.sgn(learning_rate=0.5).get_config()["name"] == "sgn"
