"""What Keras and TensorFlow compute otherwise while a model is linearized.

* `tf.nn.moments`, under BatchNormalization, LayerNormalization and GroupNormalization, stops the gradient at
  the mean. First derivatives are still exact, and so are Gauss-Newton products, which are made of them; second
  derivatives are 3% to 49% off. `differentiable_keras(twice=True)` puts the plain mean and variance in its place
  while a Hessian is traced.
* Synchronized normalization takes sums over replicas that can be differentiated only in the call they were made in.
* On a slice of a batch, losses and random numbers shall be those of the whole; see `slices.py`.

The names that are replaced are private ones of Keras 3.15 and TensorFlow 2.21; `tests/test_keras_internals.py` checks
that they are there.
"""

import contextlib
import contextvars
import importlib

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import nn as keras_nn
from keras.src.losses import loss as keras_loss
from tensorflow.python.framework.func_graph import FuncGraph

from keras_curvature import replicas
from keras_curvature.linearization.pure import randomness, slices

# `import ... as` would give the function of that name, which hides the module
keras_rnn = importlib.import_module("keras.src.backend.tensorflow.rnn")


def _plain_moments(x, axes, keepdims):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
    return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))


def _synchronized_moments(x, axes, keepdims):
    """Mean and variance over the slices of all replicas."""
    place = slices.here()
    if place is None:
        return _plain_moments(x, axes, keepdims)
    mean = replicas.add_up_inside(place.weigh(tf.reduce_mean(x, axes, keepdims=True)))
    squares = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
    variance = replicas.add_up_inside(place.weigh(squares))
    return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))


_keras_max_pool = keras_nn.max_pool


def _max_pool(inputs, pool_size, strides=None, padding="valid", data_format=None):
    """Keras' max pooling; of images and without overlap, with a gradient whose transpose is cheap.

    TensorFlow's `MaxPoolGradGrad`, of which forward mode is made, takes 2-5 times as long as a pass forward. Where
    windows do not overlap, the tangent is a sum over windows of the tangents where the maximum was.
    """
    size = (pool_size,) * 2 if isinstance(pool_size, int) else tuple(pool_size)
    step = size if strides is None else (strides,) * 2 if isinstance(strides, int) else tuple(strides)
    last = (data_format or keras.config.image_data_format()) == "channels_last"
    if not (last and inputs.shape.rank == 4 and size == step and padding == "valid"):
        return _keras_max_pool(inputs, pool_size, strides, padding, data_format)
    window = {"ksize": [1, *size, 1], "strides": [1, *size, 1], "padding": "VALID"}

    @tf.custom_gradient
    def pool(x):
        y = tf.raw_ops.MaxPool(input=x, **window)
        largest = tf.stop_gradient(
            tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=tf.ones_like(y), **window)
        )

        def gradient(dy):
            mean = tf.raw_ops.AvgPoolGrad(orig_input_shape=tf.shape(x), grad=dy, **window)
            return largest * (float(size[0] * size[1]) * mean)

        return y, gradient

    return pool(inputs)


_keras_scale, _keras_unscale = keras_loss.scale_loss_for_distribution, keras_loss.unscale_loss_for_distribution


def _scale(mean):
    """A mean over the examples, as Keras adds it to those of the other slices: times their share of the batch."""
    place = slices.here()
    return _keras_scale(mean) if place is None or not place.weighs_means or place.is_even else place.weigh(mean)


def _unscale(value):
    """The mean again, for the metric that shows it."""
    place = slices.here()
    if place is None or not place.weighs_means or place.is_even:
        return _keras_unscale(value)
    return tf.math.divide_no_nan(value, place.share(value.dtype))


_along_data = contextvars.ContextVar("along_data", default=False)
_control_dependencies = FuncGraph.control_dependencies


@contextlib.contextmanager
def without_control_edges():
    """While open, this thread traces gradients along data alone.

    TensorFlow's gradients of `Square`, `SquaredDifference` and `Erf` (moments, GELU) hold back their factors until the
    incoming gradient is there, to save memory. The pass that forward mode is made from has no value anybody needs,
    but by these edges it would stay in the graph: a whole backward pass per product of a transformer.
    """
    token = _along_data.set(True)
    try:
        yield
    finally:
        _along_data.reset(token)


def _data_dependencies(graph, inputs):
    if inputs is not None and _along_data.get():
        return contextlib.nullcontext()
    return _control_dependencies(graph, inputs)


@contextlib.contextmanager
def replaced(*names):
    """While open, each `(owner, name, value)` stands in its owner."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in names]
    try:
        for owner, name, value in names:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def differentiable_keras(twice=False, products=True):
    """While open, Keras computes what can be differentiated as often as a product needs, on any slice of a batch.

    Max pooling gets a cheap forward mode; recurrent layers on a GPU run their loop and not cuDNN's kernel, whose
    backward pass has no derivative; and, if `twice`, normalization has second derivatives. Gauss-Newton products are
    of first order (a product with `J` and one with `J'`), and exact with Keras' own moments, whose gradient is the
    cheaper one. On a slice of the batch, losses and random numbers are those of the whole; see `slices.py`. Without
    `products`, for losses and gradients alone, recurrent layers and pooling stay as they are.

    Open it around the replicas and not inside one: the threads of a `MirroredStrategy` take turns, and the names
    that are replaced here are shared by all of them.
    """
    for_products = [(keras_nn, "max_pool", _max_pool), (keras_rnn, "cudnn_ok", lambda *args, **kwargs: False)]
    return replaced(
        (keras_nn, "_compute_moments", _plain_moments if twice else keras_nn._compute_moments),
        (keras_nn, "_compute_moments_sync", _synchronized_moments),
        *(for_products if products else []),
        (keras_loss, "scale_loss_for_distribution", _scale),
        (keras_loss, "unscale_loss_for_distribution", _unscale),
        (FuncGraph, "control_dependencies", _data_dependencies),
        *randomness.names(),
    )
