"""FOOF and Newton-Muon against dense arithmetic in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_curveball import made, stepper
from test_soap import trajectory

import keras_curvature as kc
from keras_curvature import Linearization, curved
from keras_curvature.linearization.estimates.inputs import input_second_moments
from keras_curvature.linearization.layers import kronecker

pytestmark = pytest.mark.usefixtures("in_float64")


def dense(*widths, activation="tanh"):
    """A chain of dense layers from the first width to the last."""
    hidden = [keras.layers.Dense(n, activation=activation) for n in widths[1:-1]]
    return keras.Sequential([keras.Input(widths[:1]), *hidden, keras.layers.Dense(widths[-1])])


def with_ones(a):
    return np.c_[a, np.ones(len(a))]


def gradients_of(model, x, y):
    """Of the mean of squares, as Keras' `"mse"` has it."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
    return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


# The second moments.


def test_second_moments_sum_over_the_positions_of_an_example():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((5, 6, 6, 2)), random.standard_normal((5, 3))
    model = curved(keras.Sequential([
        keras.Input((6, 6, 2)), keras.layers.Conv2D(4, 3, strides=2), keras.layers.Flatten(), keras.layers.Dense(3),
    ]))  # fmt: skip
    model.compile("sgd", "mse")
    A, B = input_second_moments(Linearization(model, x, y), kronecker.blocks(model)[0])
    patches = [x[n, i : i + 3, j : j + 3].ravel() for n in range(5) for i in (0, 2) for j in (0, 2)]
    np.testing.assert_allclose(A, with_ones(patches).T @ with_ones(patches) / 5, rtol=1e-12)
    flat = with_ones(model.layers[0](x).numpy().reshape(5, -1))
    np.testing.assert_allclose(B, flat.T @ flat / 5, rtol=1e-12)


def test_second_moment_of_indices_is_how_often_an_example_has_each():
    x = np.array([[0, 1, 1], [3, 1, 0]])
    model = curved(keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(4, 2)]))
    model.compile("sgd", "mse")
    (A,) = input_second_moments(Linearization(model, x, np.zeros((2, 3, 2))), kronecker.blocks(model)[0])
    np.testing.assert_allclose(A, [1, 1.5, 0, 0.5])


def test_second_moments_do_not_depend_on_the_slices():
    random = np.random.default_rng(1)
    x, y = random.standard_normal((7, 4)), random.standard_normal((7, 2))
    model = curved(dense(4, 3, 2))
    model.compile("sgd", "mse")
    blocks = kronecker.blocks(model)[0]
    whole, cut = (input_second_moments(Linearization(model, x, y, micro_batches=n), blocks) for n in (1, 3))
    for a, b in zip(whole, cut):
        np.testing.assert_allclose(a, b, rtol=1e-12)


# FOOF.


def test_a_whole_step_moves_the_outputs_along_their_own_gradients():
    random = np.random.default_rng(2)
    x, y = random.standard_normal((4, 6)), random.standard_normal((4, 3))  # fewer examples than inputs
    optimizer = kc.FOOF(0.3, damping=1e-8, momentum=0.0, output_clip=None)
    model = made(dense(6, 3), optimizer, "mse")
    before = model(x).numpy()
    stepper(model, optimizer)(x, y)
    slopes = 2 * (before - y) / 3  # of the loss of each example, a mean over its outputs
    np.testing.assert_allclose(model(x).numpy(), before - 0.3 * slopes, rtol=1e-5)


def test_trajectory_is_that_of_dense_arithmetic():
    random = np.random.default_rng(3)
    settings = {"damping": 0.2, "momentum": 0.8, "factors_every": 2, "inverses_every": 4}
    optimizer = kc.FOOF(0.05, output_clip=None, **settings)
    model = made(dense(5, 4, 3), optimizer, "mse")
    step, M, moments, inverses, looks = stepper(model, optimizer), [0.0, 0.0], None, None, 0
    for t in range(11):
        x, y = random.standard_normal((8, 5)), random.standard_normal((8, 3))
        before = [np.r_[w, b[None]] for w, b in zip(*[iter(model.get_weights())] * 2)]
        g = gradients_of(model, x, y)
        M = [0.8 * m + np.r_[w, b[None]] for m, w, b in zip(M, g[::2], g[1::2])]
        if t % 2 == 0:
            looks += 1
            inputs = [with_ones(x), with_ones(np.tanh(with_ones(x) @ before[0]))]
            new, eps = [a.T @ a / 8 for a in inputs], min(1 - 1 / looks, 0.95)
            moments = new if looks == 1 else [eps * o + (1 - eps) * n for o, n in zip(moments, new)]
        if t % 4 == 0:
            inverses = [np.linalg.inv(A + 0.2 * np.eye(len(A))) for A in moments]
        step(x, y)
        after = [np.r_[w, b[None]] for w, b in zip(*[iter(model.get_weights())] * 2)]
        for a, b, inverse, m in zip(after, before, inverses, M):
            np.testing.assert_allclose(a, b - 0.05 * inverse @ m, rtol=1e-11)


def test_a_weight_of_no_known_layer_counts_as_one_with_an_input_of_one():
    optimizer = kc.FOOF(0.1, damping=3.0, momentum=0.0, output_clip=None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.PReLU()])
    with pytest.warns(UserWarning, match="alpha.*divided by `1 \\+ damping`"):
        made(model, optimizer, "mse")
    random = np.random.default_rng(4)
    x, y = random.standard_normal((6, 4)), random.standard_normal((6, 3))
    g, before = gradients_of(model, x, y), model.get_weights()
    stepper(model, optimizer)(x, y)
    np.testing.assert_allclose(model.get_weights()[2], before[2] - 0.1 * g[2] / 4, rtol=1e-12)


def test_inverse_that_fails_keeps_the_last_good_one():
    optimizer = kc.FOOF(0.1, factors_every=1, inverses_every=1)
    model = made(dense(4, 3), optimizer, "mse")
    step = stepper(model, optimizer)
    step(np.ones((2, 4)), np.zeros((2, 3)))
    kept = optimizer._inverses[0].numpy()
    optimizer._factors[0].assign(-1e6 * np.eye(5))
    assert step(np.ones((2, 4)), np.zeros((2, 3)))["failed_refreshes"] == 1
    np.testing.assert_array_equal(optimizer._inverses[0], kept)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (kc.FOOF, {"damping": -1.0}), (kc.FOOF, {"momentum": 1.0}), (kc.FOOF, {"factors_every": 0}),
        (kc.FOOF, {"inverses_every": 1.5}), (kc.NewtonMuon, {"every": 0}), (kc.NewtonMuon, {"ridge": 0.0}),
    ],
)  # fmt: skip
def test_bad_arguments_fail_at_construction(cls, arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`.* Received"):
        cls(**arguments)


# Newton-Muon.


def test_newton_muon_is_muon_on_divided_gradients():
    random, settings = np.random.default_rng(5), {"learning_rate": 0.05, "sign": kc.PolarExpress(steps=12)}
    optimizer = kc.NewtonMuon(every=2, ridge=0.3, **settings)
    model = made(dense(5, 4, 4, 3), optimizer, "mse")
    start, divided, seen = model.get_weights(), [], []
    step, K, inverses = stepper(model, optimizer), [None, None], [None, None]
    for t in range(6):
        x, y = random.standard_normal((9, 5)), random.standard_normal((9, 3))
        g, w = gradients_of(model, x, y), model.get_weights()
        inputs = [x, np.tanh(x @ w[0] + w[1])]
        for i, z in enumerate(inputs):
            if t % 2 == 0:
                looks = t // 2 + 1
                K[i] = z.T @ z / 9 if t == 0 else (1 - 1 / looks) * K[i] + z.T @ z / 9 / looks
                ridge = 0.3 * np.trace(K[i]) / len(K[i]) + 1e-8
                inverses[i] = np.linalg.inv(K[i] + ridge * np.eye(len(K[i])))
            g[2 * i] = inverses[i] @ g[2 * i]
        divided.append(np.concatenate([a.ravel() for a in g]))
        step(x, y)
        seen.append(np.concatenate([a.ravel() for a in model.get_weights()]))
    plain = kc.Muon(**settings)  # without a model the last kernel counts as the output layer
    shapes, flat = [w.shape for w in start], np.concatenate([w.ravel() for w in start])
    np.testing.assert_allclose(seen, trajectory(plain, flat, np.array(divided), shapes), rtol=1e-9)


def test_newton_muon_leaves_the_ends_and_the_biases_to_adam():
    optimizer = kc.NewtonMuon()
    model = keras.Sequential([
        keras.Input((6,), dtype="int32"), keras.layers.Embedding(9, 4), keras.layers.Conv1D(5, 2, padding="same"),
        keras.layers.LayerNormalization(), keras.layers.Flatten(), keras.layers.Dense(7), keras.layers.Dense(2),
    ])  # fmt: skip
    made(model, optimizer, "mse")
    assert [model.trainable_variables[b.variables[0]].shape for b in optimizer._blocks] == [(2, 4, 5), (30, 7)]
    assert [f.shape for f in optimizer._factors] == [(8, 8), (30, 30)]


def test_newton_muon_names_the_hidden_kernels_that_it_cannot_divide():
    class Own(keras.layers.Dense):
        """A layer with a call of its own."""

        def call(self, inputs):
            return super().call(inputs)

    model = keras.Sequential([keras.Input((4,)), Own(5), keras.layers.Dense(3)])
    optimizer = kc.NewtonMuon(0.1)
    with pytest.warns(UserWarning, match="`NewtonMuon` knows no Kronecker factors for .*kernel.*gradient as it is"):
        made(model, optimizer, "mse")
    before = model.get_weights()
    stepper(model, optimizer)(np.ones((2, 4)), np.zeros((2, 3)))
    assert all(not np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
