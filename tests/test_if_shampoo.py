"""Inverse-free Shampoo against its equations in NumPy, at its fixed point, and where no inverse exists."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_curveball import made, stepper

import keras_curvature as kc
from keras_curvature import curved
from keras_curvature.solvers.inverse_free import InverseFreeAxes

float64 = pytest.mark.usefixtures("in_float64")


def along(tensor, matrix, axis):
    """`matrix` times the tensor along an axis."""
    return np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)


def changed(g, K, M, damping, beta, rate):
    """One change of all factors of one weight, by the equations."""
    Z, n = g, g.shape
    for i, X in enumerate(K):
        Z = along(Z, X.T, i)
    means = [np.trace(X.T @ X) / len(X) for X in K]
    new_K, new_M = [], []
    for i, (X, m) in enumerate(zip(K, M)):
        rows = np.moveaxis(Z, i, 0).reshape(n[i], -1)
        others = np.prod([mean for j, mean in enumerate(means) if j != i])
        drift = rows @ rows.T * n[i] / Z.size + damping * others * X.T @ X - np.eye(n[i])
        m = beta * m + (1 - beta) / 2 * drift
        new_K.append(X - rate * X @ m / max(1, np.linalg.norm(m)))
        new_M.append(m)
    return new_K, new_M


@float64
@pytest.mark.parametrize("kl_clip", [None, 0.02])
def test_steps_are_those_of_the_equations(kl_clip):
    """Weights of one, two and three axes, two of them of one shape."""
    keras.utils.set_random_seed(0)
    settings, random = {"damping": 0.05, "beta": 0.4, "rate": 0.2}, np.random.default_rng(0)
    optimizer = kc.IFShampoo(0.3, momentum=0.5, every=2, merge=1, kl_clip=kl_clip, **settings)
    model = made(keras.Sequential([
        keras.Input((5, 2)), keras.layers.Conv1D(3, 2, activation="tanh"), keras.layers.Flatten(),
        keras.layers.Dense(3), keras.layers.Dense(3), keras.layers.Dense(3),
    ]), optimizer, "mse")  # fmt: skip
    step, state, v = stepper(model, optimizer), None, [0.0] * 8
    for t in range(6):
        x, y = random.standard_normal((7, 5, 2)), random.standard_normal((7, 3))
        before = model.get_weights()
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        g = [a.numpy() for a in tape.gradient(loss, model.trainable_variables)]
        if state is None:
            scales = [(7 * np.mean(a**2) + 0.05) ** (-0.5 / a.ndim) for a in g]
            state = [([k * np.eye(n) for n in a.shape], [np.zeros((n, n)) for n in a.shape]) for k, a in zip(scales, g)]
        if t % 2 == 0:
            state = [changed(7**0.5 * a, *own, **settings) for a, own in zip(g, state)]
        d = []
        for a, (K, _) in zip(g, state):
            for axis, X in enumerate(K):
                a = along(a, X @ X.T, axis)
            d.append(a)
        length = 0.3**2 * sum((a * b).sum() for a, b in zip(d, g))
        assert kl_clip is None or length > kl_clip
        v = [0.5 * b - a * (1 if kl_clip is None else np.sqrt(kl_clip / length)) for a, b in zip(d, v)]
        step(x, y)
        for w, old, move in zip(model.get_weights(), before, v):
            np.testing.assert_allclose(w, old + 0.3 * move, rtol=1e-9, atol=1e-12)


def test_its_fixed_point_for_a_vector_is_the_inverse():
    g = tf.constant(np.random.default_rng(1).standard_normal(4))
    rule = InverseFreeAxes(0.3, 0.5, 0.2, 10)

    @tf.function
    def run():
        begin = rule.moved(g, [tf.eye(4, dtype=g.dtype)], [tf.zeros((4, 4), g.dtype)], tf.constant(True))
        return tf.while_loop(
            lambda i, *_: i < 500, lambda i, K, M: (i + 1, *rule.moved(g, K, M, tf.constant(False))), (0, *begin)
        )[1]

    (K,) = run()
    inverse = np.linalg.inv(np.outer(g, g) + 0.3 * np.eye(4))
    np.testing.assert_allclose(K @ tf.transpose(K), inverse, rtol=1e-6, atol=1e-9)


def test_long_axes_have_no_factor_and_singular_gradients_and_bfloat16_weights_do_no_harm():
    keras.utils.set_random_seed(0)
    model = curved(keras.Sequential([
        keras.Input((20,)), keras.layers.Dense(16, activation="tanh", dtype="bfloat16"), keras.layers.Dense(3),
    ]))  # fmt: skip
    optimizer = kc.IFShampoo(1e-3, damping=1e-9, every=1, max_dimension=16)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.full((32, 20), 100.0, "float32"), np.arange(32) % 3
    log = model.fit(x, y, batch_size=8, epochs=10, verbose=0).history
    assert [K.shape for K in optimizer._factors] == [(16, 16), (16, 16), (16, 16), (3, 3), (3, 3)]
    assert sum(log["skipped_steps"]) == sum(log["failed_refreshes"]) == 0
    assert np.isfinite(log["loss"]).all() and log["loss"][-1] < 0.9 * log["loss"][0]


@pytest.mark.parametrize(
    "arguments", [{"damping": 0.0}, {"momentum": 1.0}, {"beta": 1.0}, {"rate": 1.0}, {"every": 0}, {"merge": 0},
                  {"max_dimension": 0}, {"kl_clip": 0.0}],
)  # fmt: skip
def test_bad_arguments_fail_at_construction(arguments):
    with pytest.raises(ValueError, match=f"`IFShampoo`: `{next(iter(arguments))}`"):
        kc.IFShampoo(**arguments)
