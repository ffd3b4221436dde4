"""K-FAC against kfac-jax, step by step, and against what it must be where the Fisher matrix is known."""

import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat
from selection import some
from test_curveball import stepper

from keras_curvature import LevenbergMarquardt, curved
from keras_curvature.linearization.fisher import likelihoods
from keras_curvature.optimizers import by_layer
from keras_curvature.optimizers.ekfac import EKFAC
from keras_curvature.optimizers.kfac import KFAC

REFERENCE = pathlib.Path(__file__).parent / "reference"

pytestmark = pytest.mark.usefixtures("in_float64")

PERIODS = {"factors_every": 2, "inverses_every": 4}
EVERY_STEP = {"factors_every": 1, "inverses_every": 1}
MARTENS = {"low": 0.25, "high": 0.75, "minimum": 1e-8}
RUNS = {
    # the reference divides empirical factors by the batch size once more: as if damping and rate were 16 times larger
    "softmax_empirical": lambda: KFAC(16 * 0.05, 16 * 0.05, 0.9, **EVERY_STEP, fisher="empirical", kl_clip=None),
    "softmax_sampled": lambda: KFAC(0.05, 0.05, 0.9, **PERIODS, kl_clip=None),
    "softmax_exact": lambda: KFAC(0.1, 0.01, 0.9, **PERIODS, fisher="exact", kl_clip=1e-3),
    "mse_exact": lambda: KFAC(0.1, 0.02, 0.8, **PERIODS, fisher="exact", kl_clip=None),
    "softmax_adaptive": lambda: KFAC.adaptive(
        damping=LevenbergMarquardt(1e-3, 0.7, every=1, **MARTENS), **EVERY_STEP, fisher="exact"
    ),
    "mse_adaptive": lambda: KFAC.adaptive(
        damping=LevenbergMarquardt(1.0, 0.95, every=5, **MARTENS), **PERIODS, fisher="exact"
    ),
}


def net(arrays, l2=0.0):
    """A tanh net with a linear output layer, from `w0, b0, w1, b1, ...`."""
    kernels = arrays[::2]
    penalty = keras.regularizers.L2(l2 / 2) if l2 else None
    options = {"kernel_regularizer": penalty, "bias_regularizer": penalty}
    layers = [keras.layers.Dense(w.shape[1], activation="tanh", **options) for w in kernels[:-1]]
    layers.append(keras.layers.Dense(kernels[-1].shape[1], **options))
    model = keras.Sequential([keras.Input(kernels[0].shape[:1]), *layers])
    model.set_weights(arrays)
    return model


def made(model, optimizer, loss="mse"):
    """The model curved and compiled."""
    model = curved(model)
    model.compile(optimizer, loss=loss)
    return model


def cross_entropy():
    return keras.losses.CategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("name", some(RUNS, ["softmax_sampled", "softmax_adaptive"]))
def test_trajectory_is_that_of_kfac_jax(name):
    reference = np.load(REFERENCE / f"kfac_{name}.npz")
    arrays = [reference[f"{kind}{layer}_init"] for layer in range(3) for kind in "wb"]
    optimizer = RUNS[name]()
    model = made(
        net(arrays, float(reference["set_l2"])), optimizer, cross_entropy() if "softmax" in name else "mse"
    )
    # at a damping of 1e-3 and less, 14 digits become 8 on the way
    tolerance = 1e-6 if name == "softmax_adaptive" else 1e-12
    step, labels = stepper(model, optimizer), tf.Variable(np.zeros(16), dtype=tf.int32)
    for t in range(20):
        rows = reference["batch_indices"][t % 4].astype(int)
        if "sampled" in name:
            labels.assign(reference["sampled"][t])
        with mock.patch.object(likelihoods.Categorical, "sample", lambda *_: labels + 0):
            seen = step(reference["x"][rows], reference["y"][rows])
        np.testing.assert_allclose(seen["loss"], reference["loss"][t], tolerance, err_msg=f"step {t}")
        if "adaptive" in name:
            np.testing.assert_allclose(seen["damping"], reference["damping"][t], 1e-12, err_msg=f"step {t}")
            np.testing.assert_allclose(seen["alpha"], reference["learning_rate"][t], tolerance)
            np.testing.assert_allclose(seen["mu"], reference["momentum"][t] if t else 0.0, tolerance)
            assert seen["rejected_steps"] == reference["rejected"][t]
        np.testing.assert_allclose(flat(model.trainable_variables), reference["weights"][t], tolerance, tolerance)


def single(optimizer, loss, seed=0, outputs=3, examples=7):
    """One `Dense` layer: `(model, x, y, inputs with a 1, model's outputs)`."""
    random = np.random.RandomState(seed)
    model = net([random.randn(4, outputs), random.randn(outputs)])
    x = random.randn(examples, 4)
    y = random.randn(examples, outputs) if loss == "mse" else np.eye(outputs)[random.randint(outputs, size=examples)]
    made(model, optimizer, loss if loss == "mse" else cross_entropy())
    return model, x, y, np.c_[x, np.ones(examples)]


def matrix(model):
    """Kernel and bias of the only layer, `(d_in + 1, d_out)`."""
    kernel, bias = model.get_weights()
    return np.concatenate([kernel, bias[None]])


def test_undamped_step_of_a_linear_model_is_newtons():
    optimizer = KFAC(1.0, 0.0, 0.0, fisher="exact", kl_clip=None)
    model, x, y, a = single(optimizer, "mse")
    stepper(model, optimizer)(x, y)
    solution = np.linalg.lstsq(a, y, rcond=None)[0]
    np.testing.assert_allclose(matrix(model), solution, rtol=1e-9)


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def fisher_of(a, z):
    """Dense Fisher matrix of one layer with softmax, kernels by rows: `mean aa' (x) (diag p - pp')`."""
    blocks = [np.kron(np.outer(a_i, a_i), np.diag(p) - np.outer(p, p)) for a_i, p in zip(a, softmax(z))]
    return np.mean(blocks, axis=0)


def test_step_for_one_example_is_the_dense_natural_gradient():
    # without damping of the factors there would be no inverse: the product of damped factors is the dense matrix here
    optimizer, damping = KFAC(1.0, 0.1, 0.0, fisher="exact", kl_clip=None), 0.1
    model, x, y, a = single(optimizer, "softmax", examples=1)
    W = matrix(model)
    p = softmax(a @ W)
    A, G = np.outer(a, a), np.diag(p[0]) - np.outer(p, p)
    np.testing.assert_allclose(np.kron(A, G), fisher_of(a, a @ W), atol=1e-14)
    pi = np.sqrt((np.trace(A) / 5) / (np.trace(G) / 3))
    damped = np.kron(A + pi * damping**0.5 * np.eye(5), G + damping**0.5 / pi * np.eye(3))
    stepper(model, optimizer)(x, y)
    np.testing.assert_allclose(matrix(model), W - np.linalg.solve(damped, (a.T @ (p - y)).ravel()).reshape(5, 3))


def test_ekfac_divides_by_the_second_moments_in_the_eigenbasis():
    optimizer = EKFAC(1.0, 0.1, 0.0, fisher="exact", kl_clip=None)
    model, x, y, a = single(optimizer, "softmax")
    W = matrix(model)
    p, F = softmax(a @ W), fisher_of(a, a @ W)
    A, G = a.T @ a / 7, np.mean([np.diag(q) - np.outer(q, q) for q in p], axis=0)
    U = np.kron(np.linalg.eigh(A)[1], np.linalg.eigh(G)[1])
    corrected = U @ np.diag(np.diag(U.T @ F @ U)) @ U.T
    assert np.linalg.norm(corrected - F) < np.linalg.norm(np.kron(A, G) - F)
    stepper(model, optimizer)(x, y)
    g = (a.T @ (p - y) / 7).ravel()
    expected = W - np.linalg.solve(corrected + 0.1 * np.eye(15), g).reshape(5, 3)
    np.testing.assert_allclose(matrix(model), expected, rtol=1e-9)


def test_clip_cuts_to_the_bound_by_hand():
    def step(learning_rate, bound):
        optimizer = KFAC(learning_rate, 0.1, 0.0, fisher="exact", kl_clip=bound)
        model, x, y, a = single(optimizer, "softmax")
        W = matrix(model)
        seen = stepper(model, optimizer)(x, y)
        taken = matrix(model) - W
        return taken, a.T @ (softmax(a @ W) - y) / 7, seen["kl_clip"]

    whole, g, _ = step(0.5, None)
    length = -0.5 * np.sum(whole * g)  # learning_rate^2 d'g
    for bound, factor in ((0.25 * length, 0.5), (4.0 * length, 1.0)):
        taken, _, nu = step(0.5, bound)
        np.testing.assert_allclose(nu, factor, rtol=1e-12)
        np.testing.assert_allclose(taken, factor * whole, rtol=1e-12)


def test_factors_are_averaged_as_the_paper_has_it():
    optimizer = KFAC(0.0, fisher="exact", factors_every=2, inverses_every=30)
    model, x, y, _ = single(optimizer, "softmax")
    step, random, expected, t = stepper(model, optimizer), np.random.RandomState(1), None, 0
    for i in range(60):
        x = random.randn(7, 4)
        step(x, y)
        if i % 2 == 0:
            t += 1
            a = np.c_[x, np.ones(7)]
            eps = min(1 - 1 / t, 0.95)
            expected = a.T @ a / 7 if t == 1 else eps * expected + (1 - eps) * (a.T @ a / 7)
        np.testing.assert_allclose(optimizer._factors[0], expected, rtol=1e-12)
    assert t == 30


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_factor_that_is_not_finite_is_dropped_and_reported(make):
    optimizer = make(0.1, factors_every=1, inverses_every=1)
    model, x, y, _ = single(optimizer, "softmax")
    step = stepper(model, optimizer)
    assert step(x, y)["failed_refreshes"] == 0
    optimizer._factors[0].assign(np.full((5, 5), np.nan))
    before = matrix(model)
    seen = step(x, y)
    assert seen["failed_refreshes"] > 0 and seen["skipped_steps"] == 0
    assert np.isfinite(matrix(model)).all() and not np.array_equal(matrix(model), before)


def test_inverse_that_fails_keeps_the_last_good_one():
    optimizer = KFAC(0.1, 1e-3, factors_every=10, inverses_every=1)
    model, x, y, _ = single(optimizer, "softmax")
    step = stepper(model, optimizer)
    step(x, y)
    good = optimizer._inverses[0].numpy()
    optimizer._factors[0].assign(-np.eye(5))  # Cholesky fails
    seen = step(x, y)
    np.testing.assert_array_equal(optimizer._inverses[0], good)
    assert seen["failed_refreshes"] == 1 and seen["skipped_steps"] == 0 and np.isfinite(matrix(model)).all()


def overflowing(model, x):
    """`(inputs, labels)` whose squares overflow, and of which the model is so certain that there is no gradient."""
    return 1e200 * x, np.eye(3)[(1e200 * x @ model.get_weights()[0]).argmax(1)]


def test_average_begins_with_the_first_look_that_is_finite():
    optimizer = KFAC(0.1, 0.1, fisher="exact", kl_clip=None, factors_every=1)
    model, x, y, a = single(optimizer, "softmax")
    step = stepper(model, optimizer)
    seen = step(*overflowing(model, x))
    assert seen["failed_refreshes"] == 1 and seen["skipped_steps"] == 0
    np.testing.assert_array_equal(optimizer._factors[0], np.eye(5))
    step(x, y)
    np.testing.assert_allclose(optimizer._factors[0], a.T @ a / 7, rtol=1e-12)
    # a first batch without a gradient begins nothing: the average of the slopes does not count it either
    np.testing.assert_array_equal(optimizer._counts, [1, 1])


def test_ekfac_keeps_basis_and_moments_together():
    optimizer, random = EKFAC(0.0, fisher="exact", factors_every=1, inverses_every=2), np.random.RandomState(1)
    model, _, y, _ = single(optimizer, "softmax")
    step, W, looks = stepper(model, optimizer), matrix(model), []

    def look():
        x = random.randn(7, 4)
        step(x, y)
        looks.append(np.c_[x, np.ones(7)])

    def expected():
        """Mean of the last looks, in the bases that there are."""
        U_A, U_G = (U.numpy() for U in optimizer._bases)
        p = [softmax(a @ W) for a in looks]
        slopes = [q @ U_G**2 - (q @ U_G) ** 2 for q in p]
        return np.mean([(a @ U_A).T ** 2 @ d / 7 for a, d in zip(looks, slopes)], axis=0)

    def state():
        return [v.numpy() for v in (*optimizer._bases, *optimizer._moments, optimizer._moment_counts)]

    look()
    look()
    np.testing.assert_allclose(optimizer._moments[0], expected(), 1e-10, 1e-14)
    before = state()
    # of the factors of both looks there is another basis, in which nothing can be seen
    assert step(*overflowing(model, random.randn(7, 4)))["failed_refreshes"] == 2
    for one, other in zip(before, state()):
        np.testing.assert_array_equal(one, other)
    look()
    optimizer._factors[0].assign(np.full((5, 5), np.nan))
    look()  # a basis is due, and cannot be had
    for one, other in zip(before[:2], optimizer._bases):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(optimizer._moments[0], expected(), 1e-10, 1e-14)
    optimizer._factors[0].assign(np.diag(np.arange(5.0)))
    look()
    look()  # another one, and an average of its own
    assert optimizer._moment_counts.numpy() == [1] and not np.array_equal(before[0], optimizer._bases[0])
    looks = looks[-1:]
    np.testing.assert_allclose(optimizer._moments[0], expected(), 1e-10, 1e-14)


def test_large_eigendecompositions_take_turns():
    random = np.random.RandomState(2)
    shapes = [(6, 3), (3,), (3, 7), (7,), (7, 3), (3,)]
    optimizer = EKFAC(0.0, 0.3, 0.0, factors_every=1, inverses_every=3, fisher="exact", kl_clip=None)
    model = made(net([random.randn(*shape) for shape in shapes]), optimizer)
    x, y = random.randn(20, 6), random.randn(20, 3)
    with mock.patch.object(by_layer, "TAKES_TURNS", 5):
        step, bases, steps = stepper(model, optimizer), [], []
        for _ in range(4):
            step(x, y)
            bases.append([U.numpy() for U in optimizer._bases])
            steps.append([v.numpy() for v in optimizer._velocity])
    is_identity = [[np.array_equal(U, np.eye(len(U))) for U in each] for each in bases]
    # of 7 and 3, 4 and 7, 8 and 3 rows: none in the first step, the most expensive one in the second, then the others
    assert is_identity[0] == [True] * 6
    assert is_identity[1] == [True, True, True, True, False, False]
    assert is_identity[2] == [False] * 6 == is_identity[3]
    # before its turn a layer is divided by the diagonal of its Fisher matrix, here J'J / 20
    g, squares = diagonal_fisher(model, x, y)
    for v, slope, entries in zip(steps[0], g, squares):
        np.testing.assert_allclose(v, -slope / (entries + 0.3), rtol=1e-9)
    # weights and batch were the same in all steps, so the bases are those that the factors have in the end
    for U, F in zip(bases[2], optimizer._factors):
        F, within = F.numpy(), U.T @ F.numpy() @ U
        np.testing.assert_allclose(within, np.diag(np.diag(within)), atol=1e-10 * np.abs(F).max())


def diagonal_fisher(model, x, y):
    """Gradient, and diagonal of the Fisher matrix of Keras' mean squared error, a normal likelihood."""
    with tf.GradientTape(persistent=True) as tape:
        z = model(x)
        loss = tf.reduce_mean(tf.square(z - y))
    jacobians = tape.jacobian(z, model.trainable_variables, experimental_use_pfor=False)
    factor = 2.0 / y.size  # the second derivative of the loss in each output
    return tape.gradient(loss, model.trainable_variables), [factor * tf.reduce_sum(J**2, [0, 1]) for J in jacobians]


def test_curvature_of_a_small_part_does_not_run_away():
    # products of 16 examples with 3 outputs have a null space in 131 weights, where the damping alone holds the step
    keras.utils.set_random_seed(0)
    random, optimizer = np.random.RandomState(0), KFAC.adaptive(curvature_batch=0.5)
    x, y = random.randn(64, 12), np.eye(3)[random.randint(3, size=64)]
    stack = [keras.Input((12,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(3)]
    model = made(keras.Sequential(stack), optimizer, cross_entropy())
    step = stepper(model, optimizer)
    seen = [step(x[rows], y[rows]) for rows in 30 * [slice(32), slice(32, 64)]]
    losses, rejected = [s["loss"] for s in seen], [s["rejected_steps"] for s in seen]
    assert 0 < sum(rejected) < 30 and not any(s["skipped_steps"] for s in seen)
    assert max(losses) < 20 and np.mean(losses[-4:]) < 0.9 * losses[0]
    for now, later in zip(seen, seen[1:]):  # at once, and not at the next check
        if now["rejected_steps"]:
            assert later["damping"] > now["damping"]


def test_reports_are_those_of_the_settings():
    always = {"damping", "failed_refreshes", "step_norm", "skipped_steps"}
    assert set(KFAC().reports) == {*always, "kl_clip"} and set(KFAC(kl_clip=None).reports) == always
    least = {*always, "alpha", "mu"}
    looking = {*least, "reduction_ratio", "rejected_steps"}
    assert set(KFAC(momentum=None).reports) == least
    assert set(KFAC(momentum=None, curvature_batch=0.5).reports) == set(EKFAC.adaptive().reports) == looking
    assert set(KFAC(damping=LevenbergMarquardt()).reports) == {*always, "kl_clip", "reduction_ratio"}


def test_frozen_layers_are_left_alone():
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(scale=False)])
    base.trainable = False
    model = made(keras.Sequential([base, keras.layers.Dense(2)]), KFAC(0.1))
    before, random = model.get_weights(), np.random.RandomState(0)
    stepper(model, model.optimizer)(random.randn(6, 4), random.randn(6, 2))
    moved = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights())]
    assert sum(moved) == 2 and [block.shape for block in model.optimizer._blocks] == [(4, 2)]


def test_l2_regularizer_is_part_of_the_damping():
    steps = []
    for damping, l2 in ((0.1, 0.3), (0.4, 0.0)):
        optimizer = KFAC(1.0, damping, 0.0, fisher="empirical", kl_clip=None)
        random = np.random.RandomState(0)
        model = made(net([random.randn(4, 3), random.randn(3)], l2), optimizer)
        x, y = random.randn(7, 4), random.randn(7, 3)
        stepper(model, optimizer)(x, y)
        steps.append([v.numpy() for v in optimizer._inverses])
    for one, other in zip(*steps):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_weights_of_no_known_layer_are_named_and_train():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.PReLU(), keras.layers.Dense(2)])
    model = curved(model)
    with pytest.warns(UserWarning, match="`KFAC` knows no Kronecker factors for .*alpha.*diagonal of the Fisher"):
        model.compile(KFAC(), loss="mse")
        model.optimizer.build(model.trainable_variables)
    before, random = model.get_weights(), np.random.RandomState(0)
    stepper(model, model.optimizer)(random.randn(6, 4), random.randn(6, 2))
    assert all(not np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    assert [d.shape for d in model.optimizer._diagonals] == [(3,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, "damping"),
        ({"momentum": 1.0}, "momentum"),
        ({"factors_every": 0}, "factors_every"),
        ({"inverses_every": 2.5}, "inverses_every"),
        ({"fisher": "true"}, '"sampled", "empirical" or "exact". Received: fisher=\'true\''),
        ({"sharing": "none"}, "sharing"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"curvature_batch": 1.5}, "curvature_batch"),
        ({"curvature_batch": 0}, "curvature_batch"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        KFAC(**arguments)
    with pytest.raises(ValueError, match="a multiple of `factors_every`"):
        EKFAC(factors_every=3)


def test_settings_survive_the_config():
    optimizer = KFAC.adaptive(curvature_batch=0.25)
    again = KFAC.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config() and again.momentum is None
    assert again.damping == LevenbergMarquardt(1e-3, 19 / 20, 0.25, 0.75, 5, 1e-8)
