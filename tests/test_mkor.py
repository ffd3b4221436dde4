"""MKOR against its authors' code, step by step, and against inverses."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat
from test_curveball import made, stepper
from test_eva import convolutional
from test_kfac import cross_entropy, net

import keras_curvature as kc
from keras_curvature.solvers import direct

REFERENCE = pathlib.Path(__file__).parent / "reference"
float64 = pytest.mark.usefixtures("in_float64")


@float64
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_trajectory_is_that_of_the_authors_code(name):
    reference = np.load(REFERENCE / f"mkor_{name}.npz")
    optimizer = kc.MKOR(float(reference["set_learning_rate"]), every=int(reference["set_every"]), kl_clip=None)
    if name == "conv":
        model = convolutional(reference)
    else:
        model = net([reference[f"{kind}{layer}_init"] for layer in range(2) for kind in "wb"])
    step = stepper(made(model, optimizer, cross_entropy()), optimizer)
    for t in range(20):
        rows = slice(16 * (t % 4), 16 * (t % 4) + 16)
        seen = step(reference["x"][rows], reference["y"][rows])
        np.testing.assert_allclose(seen["loss"], reference["loss"][t], 1e-12, err_msg=f"step {t}")
        np.testing.assert_allclose(flat(model.trainable_variables), reference["weights"][t], 1e-11, 1e-11)
    for layer, (J_a, J_g) in enumerate(zip(optimizer._inverses[::2], optimizer._inverses[1::2])):
        np.testing.assert_allclose(J_g, reference[f"Jg{layer}"], 1e-11, 1e-12)
        if name != "conv" or layer:  # a patch of the reference has its channels first
            np.testing.assert_allclose(J_a, reference[f"Ja{layer}"], 1e-11, 1e-12)


def test_a_rank_one_update_is_that_of_the_inverse_and_exactly_symmetric():
    random = np.random.default_rng(0)
    X, v = random.standard_normal((2, 4, 4)), 3.0 * random.standard_normal((2, 4))
    J = X @ np.swapaxes(X, 1, 2) + 0.1 * np.eye(4)
    J = 0.5 * (J + np.swapaxes(J, 1, 2))
    found = direct.after_rank_one(tf.constant(J), tf.constant(v)).numpy()
    np.testing.assert_allclose(np.linalg.inv(found), np.linalg.inv(J) + v[:, :, None] * v[:, None, :], rtol=1e-9)
    np.testing.assert_array_equal(found, np.swapaxes(found, 1, 2))


@float64
def test_inverses_stay_between_zero_and_one_and_directions_have_the_length_of_the_gradient():
    random = np.random.default_rng(1)
    optimizer = kc.MKOR(0.1, momentum=0.0, every=1, kl_clip=None)
    model = made(net([random.standard_normal(s) for s in ((6, 5), (5,), (5, 4), (4,))]), optimizer, cross_entropy())
    step = stepper(model, optimizer)
    for _ in range(40):
        x, y = 10.0 + random.standard_normal((4, 6)), np.eye(4)[random.integers(4, size=4)]
        with tf.GradientTape() as tape:
            loss = cross_entropy()(y, model(x))
        g, before = tape.gradient(loss, model.trainable_variables), model.get_weights()
        step(x, y)
        moved = [np.linalg.norm(a - b) for a, b in zip(model.get_weights(), before)]
        lengths = [0.1 * np.linalg.norm(a) for a in g]
        np.testing.assert_allclose([sum(moved[:2]), sum(moved[2:])], [sum(lengths[:2]), sum(lengths[2:])], rtol=1e-9)
    for J in optimizer._inverses:
        values = np.linalg.eigvalsh(J.numpy())
        assert 0 < values.min() < 0.999 and values.max() <= 1 + 1e-12


@float64
def test_of_a_bias_of_several_rows_each_matrix_has_the_length_of_its_own():
    random = np.random.default_rng(2)
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.GRU(4)])
    optimizer = kc.MKOR(0.1, momentum=0.0, kl_clip=None)
    step = stepper(made(model, optimizer, "mse"), optimizer)
    x, y = random.standard_normal((6, 5, 3)), random.standard_normal((6, 4))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - y))
    g, before = [a.numpy() for a in tape.gradient(loss, model.trainable_variables)], model.get_weights()
    step(x, y)
    moved = [(a - b) / 0.1 for a, b in zip(model.get_weights(), before)]
    for row in range(2):  # of the inputs, of the state
        lengths = [np.linalg.norm(a[row]) + np.linalg.norm(a[2][row]) for a in (g, moved)]
        np.testing.assert_allclose(*lengths, rtol=1e-9)


@float64
def test_all_kinds_of_layers_train():
    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    model = keras.Sequential([
        keras.Input((6,), dtype="int32"), keras.layers.Embedding(5, 3), keras.layers.DepthwiseConv1D(2),
        keras.layers.LayerNormalization(), keras.layers.PReLU(), keras.layers.GRU(4), keras.layers.Dense(2),
    ])  # fmt: skip
    optimizer = kc.MKOR(0.05, every=2)
    with pytest.warns(UserWarning, match="alpha.*the gradient as it is"):
        made(model, optimizer, "mse")
    x, y = random.integers(5, size=(8, 6)), random.standard_normal((8, 2))
    step, before = stepper(model, optimizer), model.get_weights()
    seen = [step(x, y) for _ in range(40)]
    assert all(s["skipped_steps"] == s["failed_refreshes"] == 0 for s in seen)
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]
    assert all(not np.array_equal(a, b) for a, b in zip(model.get_weights(), before))
    np.testing.assert_array_equal(optimizer._inverses[0], np.ones(5))  # of the embedding's inputs


def test_inputs_of_pixels_train_although_their_gradients_are_large():
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).integers(0, 256, (32, 12)).astype("float32")
    layers = [keras.Input((12,)), *(keras.layers.Dense(16, activation="relu") for _ in range(2)), keras.layers.Dense(3)]
    model = made(keras.Sequential(layers), kc.MKOR(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    step = stepper(model, model.optimizer)
    seen = [step(x, np.argmax(x[:, :3], 1))["loss"] for _ in range(30)]
    assert np.isfinite(seen).all() and seen[-1] < seen[0]


@pytest.mark.parametrize("arguments", [{"momentum": 1.0}, {"beta": -0.1}, {"every": 0}, {"kl_clip": 0.0}])
def test_bad_arguments_fail_at_construction(arguments):
    with pytest.raises(ValueError, match=f"`MKOR`: `{next(iter(arguments))}`"):
        kc.MKOR(**arguments)
