"""Max pooling as XLA compiles it: values, tangents and gradients against a loop over windows in NumPy."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import HAS_XLA, float64

from keras_curvature.keras_internals import replaced
from keras_curvature.linearization.pure import differentiable, pooling

SETTINGS = {  # shape, window, strides, padding
    "as in ResNet": ((2, 7, 6, 3), 3, 2, "same"),
    "two lengths": ((2, 7, 6, 3), (3, 2), (1, 2), "valid"),
    "a sequence": ((2, 9, 3), 3, 2, "same"),
    "a sequence, adjacent": ((2, 9, 3), 2, None, "same"),
    "a volume": ((2, 5, 5, 4, 2), 3, 2, "same"),
    "images, adjacent": ((2, 6, 4, 3), 2, None, "valid"),
}
FIRST = [("as in ResNet", "channels_first"), ("a sequence", "channels_first")]


def looped(x, v, window, strides, padding):
    """`(y, tangent)`, window by window: the first largest entry in the order of the axes, and `v` there."""
    axes = x.ndim - 2
    window = (window,) * axes if isinstance(window, int) else window
    strides = window if strides is None else (strides,) * axes if isinstance(strides, int) else strides
    starts, counts = [], []
    for n, k, s in zip(x.shape[1:-1], window, strides):
        count = -(-n // s) if padding == "same" else (n - k) // s + 1
        counts.append(count)
        starts.append(-(max((count - 1) * s + k - n, 0) // 2) if padding == "same" else 0)
    y, t = (np.zeros((len(x), *counts, x.shape[-1])) for _ in range(2))
    for position in np.ndindex(*y.shape):
        row, *at, channel = position
        corners = [start + i * s for start, i, s in zip(starts, at, strides)]
        seen = [
            (row, *place, channel)
            for place in itertools.product(*(range(c, c + k) for c, k in zip(corners, window)))
            if all(0 <= p < n for p, n in zip(place, x.shape[1:-1]))
        ]  # fmt: skip
        best = max(seen, key=lambda place: x[place])
        y[position], t[position] = x[best], v[best]
    return y, t


def derivatives(pool, x, v, u):
    """`(y, tangent along v, gradient against u)` of a function `pool(x)`."""
    with tf.GradientTape() as outer:
        outer.watch(u)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = pool(x)
        gradient = tape.gradient(y, x, output_gradients=u)
    return y, outer.gradient(gradient, u, output_gradients=v), gradient


compiled = tf.function(derivatives, jit_compile=True, autograph=False)


def pooled(x, v, u, *choices):
    """`compiled`, of the package's pooling with Keras' arguments."""
    return compiled(lambda x: pooling.max_pool(getattr(*replaced.MAX_POOL), x, *choices), x, v, u)


@pytest.mark.skipif(not HAS_XLA, reason="no XLA for the host")
@pytest.mark.parametrize(("name", "data_format"), [*[(name, "channels_last") for name in SETTINGS], *FIRST])
def test_pooling_under_xla_is_that_of_a_loop(name, data_format):
    shape, *setting = SETTINGS[name]
    random = np.random.default_rng(0)
    x, v = random.integers(-4, 5, shape) / 4.0, random.integers(-8, 9, shape) / 8.0  # with ties; exact in bfloat16
    y, tangent = looped(x, v, *setting)
    u = random.integers(-8, 9, y.shape) / 8.0

    def placed(a, to_last=False):
        if data_format == "channels_last":
            return a
        return np.moveaxis(a, 1, -1) if to_last else np.moveaxis(a, -1, 1)

    tensors = [tf.constant(placed(a), "bfloat16") for a in (x, v, u)]
    found = [placed(np.asarray(tf.cast(a, "float64")), True) for a in pooled(*tensors, *setting, data_format)]
    np.testing.assert_array_equal(found[0], y)
    np.testing.assert_array_equal(found[1], tangent)
    # the gradient is the transposed tangent; its entries are sums of a few eighths
    assert np.sum(found[2] * v) == np.sum(u * tangent)


@pytest.mark.parametrize(
    "setting",
    [
        ((2, 6, 5, 3), 3, 1, "same"), ((2, 6, 5, 3), (2, 5), 1, "same"), ((2, 9, 3), 3, 1, "same"),
        ((2, 4, 5, 4, 2), 3, 1, "same"), ((2, 6, 1, 3), 3, (1, 2), "same"), ((2, 6, 5, 3), 3, 1, "valid"),
        ((2, 6, 5, 3), 3, 2, "same"),
    ],
    ids=str,
)  # fmt: skip
def test_pooling_in_a_graph_is_that_of_a_loop(setting):
    """TensorFlow's own tangent of windows one step apart is wrong in a graph, where it reuses its memory."""
    shape, *choices = setting
    random = np.random.default_rng(0)
    x, v = (random.standard_normal(shape).astype("float32") for _ in range(2))
    y, tangent = looped(x, np.cos(v), *choices)
    u = random.standard_normal(y.shape).astype("float32")
    layer = {3: keras.layers.MaxPooling1D, 4: keras.layers.MaxPooling2D, 5: keras.layers.MaxPooling3D}[x.ndim]

    # a tangent that is computed in the graph, so that its memory can be reused
    asked = tf.function(lambda x, v, u: derivatives(layer(*choices), x, tf.math.cos(v), u), autograph=False)
    with differentiable.differentiable_keras():
        found = [a.numpy() for a in asked(*map(tf.constant, (x, v, u)))]
    np.testing.assert_allclose(found[0], y)
    np.testing.assert_allclose(found[1], tangent, rtol=1e-6)
    np.testing.assert_allclose(np.sum(found[2] * np.cos(v)), np.sum(u * tangent), rtol=1e-4)


@pytest.mark.parametrize("padding", ["SAME", [[0, 0], [1, 1], [1, 1], [0, 0]]], ids=["same", "explicit"])
@pytest.mark.parametrize("eager", [True, False])
def test_a_layer_that_calls_tensorflow_has_the_same_tangent(padding, eager):
    random = np.random.default_rng(0)
    x, v = (random.standard_normal((2, 6, 5, 3)).astype("float32") for _ in range(2))

    def asked(x, v):
        return derivatives(lambda x: tf.nn.max_pool(x, 3, 1, padding), x, tf.math.cos(v), tf.ones_like(x))[1]

    found = (asked if eager else tf.function(asked, autograph=False))(tf.constant(x), tf.constant(v))
    np.testing.assert_allclose(found, looped(x, np.cos(v), 3, 1, "same")[1], rtol=1e-6)


@pytest.mark.skipif(not HAS_XLA, reason="no XLA for the host")
def test_not_a_number_is_the_largest_and_so_is_seen():
    x = tf.constant([[[np.nan], [1.0], [2.0], [-np.inf], [np.nan], [-np.inf]]], "float32")
    y, *_ = pooled(x, x, tf.ones((1, 3, 1)), 2, 2, "valid", "channels_last")
    np.testing.assert_array_equal(np.ravel(y), [np.nan, 2, np.nan])


@pytest.mark.skipif(not HAS_XLA, reason="no XLA for the host")
def test_products_with_overlapping_windows_compile_in_every_precision():
    # TensorFlow's forward mode of max pooling has no kernel for XLA but in float32
    with float64():
        layer, x = keras.layers.MaxPooling2D(3, 2, "same"), tf.random.normal((1, 5, 5, 2), dtype="float64")
        expected = layer(x)
        with pytest.raises(tf.errors.InvalidArgumentError, match="MaxPoolGradGrad"):
            compiled(layer, x, x, tf.zeros_like(expected))
        with differentiable.differentiable_keras():
            _, tangent, _ = compiled(lambda x: layer(x), x, x, tf.zeros_like(expected))  # another function: a new trace
        np.testing.assert_array_equal(tangent, expected)  # along `x` itself
