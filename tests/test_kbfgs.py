"""K-BFGS against its authors' code, step by step, and against what its factors tend to."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat
from test_curveball import made, stepper
from test_kfac import cross_entropy, net
from test_singd import of_all_kinds

import keras_curvature as kc
from keras_curvature.optimizers import kbfgs
from keras_curvature.solvers import pairs

REFERENCE = pathlib.Path(__file__).parent / "reference"
float64 = pytest.mark.usefixtures("in_float64")


def half_squares(y, outputs):
    """Half the sum of squares of each example."""
    return 0.5 * keras.ops.sum(keras.ops.square(outputs - y), -1)


@float64
@pytest.mark.parametrize("name", ["softmax", "mse"])
def test_trajectory_is_that_of_the_authors_code(name):
    reference = np.load(REFERENCE / f"kbfgs_{name}.npz")
    optimizer = kc.KBFGS(float(reference["set_learning_rate"]), float(reference["set_damping"]), warmup_steps=1)
    arrays = [reference[f"{kind}{layer}_init"] for layer in range(2) for kind in "wb"]
    model = made(net(arrays), optimizer, cross_entropy() if name == "softmax" else half_squares)
    for variable, layer in zip(optimizer._factors, range(2)):
        variable.assign(reference[f"A{layer}_init"])  # of the whole set, as the code begins
    optimizer._counts.assign([1000.0] * 2)
    x, y = reference["x"], np.eye(4)[reference["y"]] if name == "softmax" else reference["y"]
    step = stepper(model, optimizer)
    for t in range(20):
        rows = slice(16 * (t % 4), 16 * (t % 4) + 16)
        seen = step(x[rows], y[rows])
        np.testing.assert_allclose(seen["loss"], reference["loss"][t], 1e-11, err_msg=f"step {t}")
        np.testing.assert_allclose(flat(model.trainable_variables), reference["weights"][t], 1e-10, 1e-11)
    for layer in range(2):
        np.testing.assert_allclose(optimizer._inverses[layer], reference[f"Ha{layer}"], 1e-9, 1e-10)
        np.testing.assert_allclose(optimizer._of_outputs[3 * layer], reference[f"Hg{layer}"], 1e-9, 1e-10)


def test_inverses_that_fail_in_the_warmup_are_reported():
    random = np.random.default_rng(0)
    optimizer = kc.KBFGS(0.01, damping=1e-8)
    model = made(net([random.standard_normal((40, 3)), np.zeros(3)]), optimizer, "mse")
    # in float32 the rounding of `A` is far above the damping
    x = 3e3 * (1.0 + 1e-3 * random.standard_normal((64, 40)))
    seen = stepper(model, optimizer)(x.astype("float32"), random.standard_normal((64, 3)).astype("float32"))
    assert seen["failed_refreshes"] == 1.0 and seen["skipped_steps"] == 0.0


def test_from_targets_of_any_size_it_descends():
    """In a network of positively homogeneous units, `H_g = I` begins with steps that are a thousand times too long."""
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 5)).astype("float32")
    y = (1e5 * (np.sin(x[:, :1]) + 0.5 * x[:, 1:2])).astype("float32")
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="relu") for _ in range(2)]
    optimizer = kc.KBFGS()
    model = made(keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(1)]), optimizer, "mse")
    step = stepper(model, optimizer)
    seen = [step(x, y) for _ in range(60)]
    assert not any(s["skipped_steps"] for s in seen) and not any(s["failed_refreshes"] for s in seen)
    assert seen[-1]["loss"] < 0.3 * seen[0]["loss"]
    # a step that is not taken has length 0 and makes the next ones shorter, and each other one makes them longer
    for s, after in zip(seen, seen[1:]):
        factor = kbfgs.LONGER if s["step_norm"] else kbfgs.SHORTER
        assert after["length"] == pytest.approx(min(1.0, s["length"] * factor), rel=1e-5)
    assert 0 < sum(s["step_norm"] == 0 for s in seen) < 20


@float64
def test_on_a_quadratic_the_factor_of_the_outputs_tends_to_its_inverse():
    """One linear layer, whose Hessian in the outputs is a matrix: `H_g` learns its inverse along the moves."""
    random = np.random.default_rng(0)
    Q = np.linalg.qr(random.standard_normal((3, 3)))[0]
    G = Q @ np.diag([3.0, 1.0, 0.5]) @ Q.T
    optimizer = kc.KBFGS(0.2, 0.01, momentum=0.0, beta_pairs=0.0, warmup_steps=1)
    model = made(net([random.standard_normal((4, 3)), np.zeros(3)]), optimizer,
                 lambda y, z: 0.5 * keras.ops.sum(keras.ops.matmul(z - y, G) * (z - y), -1))  # fmt: skip
    step, x = stepper(model, optimizer), 1.0 + random.standard_normal((20, 4))
    for _ in range(60):  # other targets each time, for moves in all directions
        assert step(x, random.standard_normal(3) + np.zeros((20, 3)))["failed_refreshes"] == 0
    np.testing.assert_allclose(optimizer._of_outputs[0], np.linalg.inv(G), rtol=1e-3, atol=1e-3)
    A = np.c_[x, np.ones(20)].T @ np.c_[x, np.ones(20)] / 20 + 0.1 * np.eye(5)
    np.testing.assert_allclose(optimizer._inverses[0], np.linalg.inv(A), rtol=1e-8, atol=1e-10)


def bfgs(H, s, y):
    """The product form of the update."""
    rho, eye = 1.0 / (s @ y), np.eye(len(s))
    return (eye - rho * np.outer(s, y)) @ H @ (eye - rho * np.outer(y, s)) + rho * np.outer(s, s)


def test_update_is_the_product_form_and_exactly_symmetric():
    random = np.random.default_rng(0)
    X, s = random.standard_normal((2, 4, 4)), random.standard_normal((2, 4))
    H = X @ np.swapaxes(X, 1, 2) + np.eye(4)
    H = 0.5 * (H + np.swapaxes(H, 1, 2))
    y = np.stack([s[0] + 0.1 * random.standard_normal(4), -s[1]])  # the second one would make H indefinite
    found = pairs.updated(*[tf.constant(a) for a in (H, s, y)], tf.ones((2, 1), tf.float64)).numpy()
    np.testing.assert_allclose(found[0], bfgs(H[0], s[0], y[0]), rtol=1e-12)
    np.testing.assert_array_equal(found[1], H[1])
    np.testing.assert_array_equal(found, np.swapaxes(found, 1, 2))


@pytest.mark.parametrize("case", ["positive", "negative", "none"])
def test_double_damping_leaves_enough_curvature(case):
    random = np.random.default_rng(1)
    H, s = np.diag([0.5, 2.0, 1.0]), random.standard_normal(3)
    y = {"positive": 0.5 * s, "negative": -s + 0.1, "none": 0.0 * s}[case]
    new_s, new_y = (a.numpy() for a in pairs.damped(*[tf.constant(a) for a in (H, s, y)], 0.3))
    if case == "positive":
        np.testing.assert_array_equal([new_s, new_y], [s, y])
    elif case == "negative":
        assert new_s @ new_y >= 0.3 * (new_s @ new_s) * (1 - 1e-12)
        assert new_s @ y == pytest.approx(0.2 * y @ H @ y)
        assert np.linalg.eigvalsh(bfgs(H, new_s, new_y)).min() > 0
    else:
        np.testing.assert_array_equal([new_s, new_y], np.zeros((2, 3)))


@float64
def test_factors_stay_positive_definite_under_noise():
    random = np.random.default_rng(2)
    optimizer = kc.KBFGS(0.3, 0.05, warmup_steps=2)
    arrays = [random.standard_normal(s) for s in ((6, 5), (5,), (5, 4), (4,))]
    model = made(net(arrays), optimizer, cross_entropy())
    step = stepper(model, optimizer)
    for _ in range(60):
        assert step(random.standard_normal((4, 6)), np.eye(4)[random.integers(4, size=4)])["failed_refreshes"] == 0
    for H in [*optimizer._inverses, *optimizer._of_outputs[::3]]:
        assert np.linalg.eigvalsh(H.numpy()).min() > 0


@float64
def test_all_kinds_of_layers_train():
    random, model = np.random.default_rng(0), of_all_kinds()
    optimizer = kc.KBFGS(0.3, damping=0.1, warmup_steps=5)
    with pytest.warns(UserWarning, match="alpha.*divided by `1 \\+ sqrt\\(damping\\)`"):
        made(model, optimizer, "mse")
    x, y = random.integers(5, size=(8, 6)), random.standard_normal((8, 2))
    step = stepper(model, optimizer)
    seen = [step(x, y) for _ in range(60)]
    assert all(s["skipped_steps"] == s["failed_refreshes"] == 0 for s in seen)
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]


@float64
def test_a_layer_that_fails_keeps_all_of_its_factors():
    optimizer = kc.KBFGS(0.1, warmup_steps=1)
    random = np.random.default_rng(0)
    model = made(net([random.standard_normal(s) for s in ((4, 5), (5,), (5, 3), (3,))]), optimizer, cross_entropy())
    step, (x, y) = stepper(model, optimizer), (random.standard_normal((7, 4)), np.eye(3)[random.integers(3, size=7)])
    step(x, y)
    optimizer._of_outputs[2].assign(np.full(5, np.nan))  # the `y` of the first layer
    before = [v.numpy() for v in [*optimizer._inverses, *optimizer._of_outputs]]
    assert step(x, y)["failed_refreshes"] == 4
    after = [v.numpy() for v in [*optimizer._inverses, *optimizer._of_outputs]]
    same = [np.array_equal(a, b, equal_nan=True) for a, b in zip(after, before)]
    assert same == [True, False, *[True] * 3, *[False] * 3]


@pytest.mark.parametrize(
    "arguments",
    [{"damping": 0.0}, {"momentum": 1.0}, {"beta": -0.1}, {"beta_pairs": 1.0}, {"warmup_steps": 0}],
)  # fmt: skip
def test_bad_arguments_fail_at_construction(arguments):
    with pytest.raises(ValueError, match=f"`KBFGS`: `{next(iter(arguments))}`"):
        kc.KBFGS(**arguments)
