"""CurveBall against its authors' own code, step by step, and against what its 2x2 system promises."""

import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat
from selection import some

from keras_curvature import ConstantDamping, CurveBall, LevenbergMarquardt, Linearization, curved, problems
from keras_curvature.operators.base import dense

REFERENCE = pathlib.Path(__file__).parent / "reference"
FILES = [f"curveball_{loss}_lambda{start}" for loss in ("softmax", "mse") for start in ("0p01", "1", "10")]
NAMES = {"loss": "loss", "beta": "beta", "rho": "rho", "damping": "lambda_before", "reduction_ratio": "ratio"}
GROWTH = 0.999**-5

pytestmark = pytest.mark.usefixtures("in_float64")


def stepper(model, optimizer):
    """`step(x, y)`: one step, traced once; the loss and what the optimizer reports, before it is rounded to float32."""

    @tf.function
    def step(x, y):
        with mock.patch.object(optimizer, "report", wraps=optimizer.report) as report:
            lin = Linearization(model, x, y)
            loss = lin.loss
            skipped = optimizer.step(lin)["skipped_steps"]
        seen = {name: value for call in report.call_args_list for name, value in call.kwargs.items()}
        return {**seen, "loss": loss, "skipped_steps": skipped}

    return lambda x, y: {name: float(value) for name, value in step(tf.constant(x), tf.constant(y)).items()}


def made(model, optimizer, loss):
    """The model curved and compiled, with the optimizer built."""
    curved(model).compile(optimizer, loss=loss)
    optimizer.build(model.trainable_variables)
    return model


def net(*arrays):
    """A tanh net with a linear output layer, from `w0, b0, w1, b1, ...`."""
    kernels = arrays[::2]
    layers = [keras.layers.Dense(w.shape[1], activation="tanh") for w in kernels[:-1]]
    model = keras.Sequential([keras.Input(kernels[0].shape[:1]), *layers, keras.layers.Dense(kernels[-1].shape[1])])
    model.set_weights(arrays)
    return model


def random_net(seed=0):
    """A small tanh classifier with its data: `(model, x, y)`."""
    random = np.random.RandomState(seed)
    sizes = (8, 7, 5)
    arrays = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        arrays += [random.randn(inputs, outputs) / np.sqrt(inputs), 0.1 * random.randn(outputs)]
    return net(*arrays), random.randn(16, 8), np.eye(5)[random.randint(5, size=16)]


def quadratic(optimizer, seed=0, **options):
    """A quadratic of ten weights: `(model, x, y, H, w*)`."""
    problem = problems.quadratic(dimension=10, **options)
    model = made(problem.model(seed), optimizer, problem.loss())
    x, y = problem.data(samples=1)
    return model, x, y, problem.hessian(), problem.solution()[0]


@pytest.mark.parametrize(
    "name", some(FILES, ["curveball_softmax_lambda1", "curveball_softmax_lambda10", "curveball_mse_lambda1"])
)
def test_trajectory_is_that_of_the_authors_code(name):
    reference = np.load(REFERENCE / f"{name}.npz")
    model = net(*(reference[key] for key in ("w0_init", "b0_init", "w1_init", "b1_init")))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True) if "softmax" in name else "mse"
    optimizer = CurveBall()
    step = stepper(made(model, optimizer, loss), optimizer)
    # assigned, because Keras' initializer of constants rounds 0.01 to float32 first
    optimizer._damping.assign(float(reference["set_lambda0"]))
    z = {}
    for t, index in enumerate(reference["batch_order"].astype(int)):
        rows = reference["batch_indices"][index].astype(int)
        seen = step(reference["x"][rows], reference["y"][rows])
        for ours, theirs in NAMES.items():
            np.testing.assert_allclose(seen[ours], reference[theirs][t], 1e-8, 1e-8, err_msg=f"{ours} of step {t}")
        np.testing.assert_allclose(float(optimizer._damping.value), reference["lambda_after"][t], 1e-12)
        np.testing.assert_allclose(flat(model.trainable_variables), reference["weights_flat"][t], 1e-8, 1e-8)
        z[t + 1] = flat(optimizer._z)
    for t in (1, 5, 25):
        np.testing.assert_allclose(z[t], reference[f"z_after_{t}"], 1e-8, 1e-8)
    assert t == 25 and np.isfinite(reference["ratio"]).sum() == 5


def test_first_step_is_the_exact_line_search_along_the_gradient():
    optimizer = CurveBall(damping=1.0)
    model, x, y, H, solution = quadratic(optimizer)
    step = stepper(model, optimizer)
    start = model.get_weights()[0]
    g = H @ (start - solution)
    for damping in (0.0, 1e-3, 0.1, 10.0):
        model.set_weights([start])
        for variable, value in ((optimizer._damping, damping), (optimizer._z[0], np.zeros(10))):
            variable.assign(value)
        seen = step(x, y)
        length = g @ g / (g @ H @ g + damping * g @ g)
        np.testing.assert_allclose(model.get_weights()[0], start - length * g, rtol=1e-12)
        np.testing.assert_allclose(seen["beta"], length, rtol=1e-12)
        assert seen["rho"] == 0.0


def test_loss_never_rises_on_a_quadratic_whatever_the_damping():
    optimizer = CurveBall(damping=1.0)
    model, x, y, _, _ = quadratic(optimizer, condition=1e4)
    step = stepper(model, optimizer)
    start = model.get_weights()
    for damping in (0.0, 1e-4, 0.03, 1.0, 100.0):
        model.set_weights(start)
        for variable, value in ((optimizer._damping, damping), (optimizer._z[0], np.zeros(10))):
            variable.assign(value)
        losses = [step(x, y)["loss"] for _ in range(40)]
        assert all(after <= before * (1 + 1e-12) for before, after in zip(losses, losses[1:])), damping
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("learning_rate", some([1.0, 0.5], [0.5]))
def test_predicted_change_is_that_of_the_damped_model_at_the_chosen_step(learning_rate):
    model, x, y = random_net()
    optimizer = CurveBall(learning_rate, damping=LevenbergMarquardt(initial=0.05, every=1))
    made(model, optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
    step = stepper(model, optimizer)
    for _ in range(3):
        lin = Linearization(model, tf.constant(x), tf.constant(y))
        g, G = flat(lin.gradient), dense(lin.gauss_newton(), lin.weights).numpy()
        old, damping, before = flat(optimizer._z), float(optimizer._damping.value), flat(lin.weights)
        seen = step(x, y)
        z = flat(optimizer._z)
        taken = flat(model.trainable_variables) - before
        np.testing.assert_allclose(taken, learning_rate * z, rtol=1e-10, atol=1e-14)
        damped = G + damping * np.eye(len(g))
        at_the_step = g @ taken + 0.5 * taken @ damped @ taken
        after = float(Linearization(model, tf.constant(x), tf.constant(y)).loss)
        change = after - seen["loss"]
        np.testing.assert_allclose(change / seen["reduction_ratio"], at_the_step, rtol=1e-9)
        # the 2x2 system over dz and the last z, as the paper writes it
        dz = damped @ old + g
        D = np.stack([dz, old], axis=1)
        A, b = D.T @ damped @ D, D.T @ g
        c = -np.linalg.pinv(A) @ b
        np.testing.assert_allclose([-seen["beta"], seen["rho"]], c, rtol=1e-8)
        if learning_rate == 1.0:
            np.testing.assert_allclose(at_the_step, -0.5 * b @ np.linalg.pinv(A) @ b, rtol=1e-9)


def damping_path(optimizer, model, x, y, steps):
    """`[(damping used, ratio reported, damping left)]` of each step."""
    step, path = stepper(model, optimizer), []
    for _ in range(steps):
        seen = step(x, y)
        path.append((seen["damping"], seen["reduction_ratio"], float(optimizer._damping.value)))
    return path


@pytest.mark.parametrize("every", [5, 3])
def test_damping_moves_by_the_compounded_factor_and_only_at_the_checks(every):
    # on a quadratic the damped model promises too little: at a large damping it is half of what comes
    optimizer = CurveBall(damping=LevenbergMarquardt(initial=100.0, every=every))
    model, x, y, _, _ = quadratic(optimizer)
    path = damping_path(optimizer, model, x, y, 12)
    for t, (before, ratio, after) in enumerate(path):
        if t % every:
            assert np.isnan(ratio) and after == before
        else:
            assert ratio > 1.5
            np.testing.assert_allclose(after / before, 0.999**every, rtol=1e-12)


@keras.saving.register_keras_serializable(package="keras_curvature_tests")
class Logarithm(keras.layers.Layer):
    """`x log w`: not a number left of zero. The Gauss-Newton step from `w` to zero loss is `-w log w`."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=())

    def call(self, x):
        return x * keras.ops.log(self.w)


def logarithm(optimizer, start):
    """`(model, x, y)` of the loss `(log w)^2`, at `w = start`."""
    model = keras.Sequential([keras.Input((1,)), Logarithm()])
    model.set_weights([np.array(start)])
    return made(model, optimizer, "mse"), np.ones((1, 1)), np.zeros((1, 1))


def test_damping_grows_where_the_model_promised_too_much_and_rests_in_between():
    optimizer = CurveBall(damping=LevenbergMarquardt(initial=1e-6))
    model, x, y, _, _ = quadratic(optimizer)
    (before, ratio, after), *_ = damping_path(optimizer, model, x, y, 1)
    assert abs(ratio - 1.0) < 1e-4 and after == before
    optimizer = CurveBall(damping=LevenbergMarquardt(initial=1e-6))
    (before, ratio, after), *_ = damping_path(optimizer, *logarithm(optimizer, 2.5), 1)
    assert ratio < 0.5
    np.testing.assert_allclose(after / before, GROWTH, rtol=1e-12)


def test_fixed_beta_and_rho_are_the_heavy_ball_on_the_damped_model():
    beta, rho, damping = 0.05, 0.9, 0.2
    optimizer = CurveBall(damping=1.0, beta=beta, rho=rho)
    model, x, y, H, solution = quadratic(optimizer)
    optimizer._damping.assign(damping)
    step = stepper(model, optimizer)
    w = model.get_weights()[0]
    z = np.zeros(10)
    for _ in range(20):
        step(x, y)
        z = rho * z - beta * (H @ z + damping * z + H @ (w - solution))
        w = w + z
        np.testing.assert_allclose(model.get_weights()[0], w, rtol=1e-11)


def test_step_to_a_loss_that_is_not_finite_is_not_taken():
    optimizer = CurveBall(damping=LevenbergMarquardt(initial=1e-6), weight_decay=0.1)  # nor a part of it
    model, x, y = logarithm(optimizer, 5.0)  # 5 - 5 log 5 < 0
    step = stepper(model, optimizer)
    seen = step(x, y)
    assert float(model.trainable_variables[0].value) == 5.0
    assert float(optimizer._z[0].value) == 0.0 and seen["step_norm"] == 0.0
    assert np.isnan(seen["reduction_ratio"])
    np.testing.assert_allclose(float(optimizer._damping.value) / seen["damping"], GROWTH, rtol=1e-12)
    assert int(optimizer.iterations) == 1


def test_constant_damping_asks_for_no_ratio_and_stays():
    model, x, y = random_net()
    optimizer = CurveBall(damping=ConstantDamping(0.5))
    made(model, optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
    path = damping_path(optimizer, model, x, y, 6)
    assert all(before == after == 0.5 and np.isnan(ratio) for before, ratio, after in path)


def test_fit_shows_what_the_steps_report():
    model, x, y = random_net()
    model = curved(model)
    model.compile(CurveBall(), keras.losses.CategoricalCrossentropy(from_logits=True))
    history = model.fit(x, y, batch_size=16, epochs=6, verbose=0, shuffle=False).history
    assert set(CurveBall.reports) <= set(history)
    assert history["loss"][-1] < history["loss"][0]
    assert np.isfinite(history["reduction_ratio"]).tolist() == [True, False, False, False, False, True]
