"""Functions of Keras and TensorFlow that are replaced while a model is linearized.

* `tf.nn.moments`, in BatchNormalization, LayerNormalization and GroupNormalization, stops the gradient at the mean.
  First derivatives are exact, and so are Gauss-Newton products, which consist of first derivatives; second derivatives
  are 3% to 49% off. `differentiable_keras(twice=True)` uses the plain mean and variance instead, for Hessians.
* Synchronized normalization sums over replicas, and these sums can be differentiated only within the same call.
* On a slice of a batch, losses and random numbers are those of the whole batch; see `slices.py`.

The first argument of each substitute below is the original function. It is installed once and acts only in a thread
that is in the context `differentiable_keras`, or in the replicas of such a thread; see `keras_internals/guards.py`.
"""

import contextlib
import contextvars
import dataclasses

import tensorflow as tf

from keras_curvature import keras_internals, replicas
from keras_curvature.keras_internals import replaced
from keras_curvature.linearization.pure import pooling, randomness, reductions, slices


@dataclasses.dataclass(frozen=True)
class _Mode:
    """The arguments of the current `differentiable_keras` context."""

    is_open: bool = False
    twice: bool = False
    products: bool = False


_CLOSED = _Mode()
_mode = contextvars.ContextVar("differentiable_keras", default=_CLOSED)


def _plain_moments(x, axes, keepdims):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
    return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))


def _moments(original, x, axes, keepdims):
    return (_plain_moments if _mode.get().twice else original)(x, axes, keepdims)


def _synchronized_moments(original, x, axes, keepdims):
    """Mean and variance over all replicas."""
    if not _mode.get().is_open:
        return original(x, axes, keepdims)
    place = slices.here()
    if place is None:
        return _plain_moments(x, axes, keepdims)
    mean = replicas.add_up_inside(place.weigh(tf.reduce_mean(x, axes, keepdims=True)))
    squares = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
    variance = replicas.add_up_inside(place.weigh(squares))
    return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))


def _max_pool(original, inputs, pool_size, strides=None, padding="valid", data_format=None):
    choices = pool_size, strides, padding, data_format
    return pooling.max_pool(original, inputs, *choices) if _mode.get().products else original(inputs, *choices)


def _ctc_loss(original, target, output, *args, **kwargs):
    """The CTC loss without second derivatives, which raises an error: TensorFlow's are NaN or fail at run time."""
    if not _mode.get().is_open:
        return original(target, output, *args, **kwargs)

    @tf.custom_gradient
    def once(output):
        with tf.GradientTape() as tape:
            tape.watch(output)
            loss = original(target, output, *args, **kwargs)
        slope = tape.gradient(loss, output)  # of the sum over examples, which have separate losses
        slope = tf.raw_ops.PreventGradient(input=slope, message="the CTC loss has no second derivative")
        return loss, lambda g: slope * tf.cast(tf.reshape(g, [-1, 1, 1]), slope.dtype)

    return once(tf.convert_to_tensor(output))


def _cudnn_ok(original, *args, **kwargs):
    return False if _mode.get().products else original(*args, **kwargs)


def _scale(original, mean):
    """A mean over the examples of a slice, weighted by its share of the batch, so that slices can be summed."""
    place = _uneven_place()
    return original(mean) if place is None else place.weigh(mean)


def _reduce(original, *args, **kwargs):
    """The reduction of a loss, on a part of the examples; see `reductions.py`."""
    return reductions.reduce(original, *args, **kwargs) if _mode.get().is_open else original(*args, **kwargs)


def _unscale(original, value):
    """Undo `_scale`, for the metric that shows the mean."""
    place = _uneven_place()
    return original(value) if place is None else tf.math.divide_no_nan(value, place.share(value.dtype))


def _uneven_place():
    """The `Place` if slices differ in size, so that their means need weights; `None` if Keras' own scale is right."""
    place = _place()
    return None if place is None or not place.weighs_means or place.is_even else place


def _by_rows(original, *args, **kwargs):
    """A random generator of TensorFlow, which draws the rows of the slice instead of the whole batch."""
    place = _place()
    return original(*args, **kwargs) if place is None else randomness.by_rows(original, place, *args, **kwargs)


def _truncated_by_rows(original, *args, **kwargs):
    """The truncated normal generator, whose numbers may take several tries each."""
    tries = {} if _place() is None else {"tries": randomness.TRIES}
    return _by_rows(original, *args, **kwargs, **tries)


def _place():
    """The `Place` of the current slice; `None` for the whole batch, and if no model is linearized."""
    return slices.here() if _mode.get().is_open else None


_without_edges = contextvars.ContextVar("without_control_edges", default=False)

@contextlib.contextmanager
def without_control_edges():
    """A context in which this thread traces gradients without control dependencies.

    TensorFlow's gradients of `Square`, `SquaredDifference` and `Erf` (moments, GELU) delay their factors until the
    incoming gradient is computed, to save memory. Forward mode is derived from a backward pass whose values are not
    needed. The control edges would keep it in the graph: a whole backward pass per product of a transformer.
    """
    keras_internals.guard(*replaced.CONTROL_DEPENDENCIES, _data_dependencies)
    with keras_internals.holding(_without_edges, True):
        yield


def _data_dependencies(original, graph, inputs):
    if inputs is not None and _without_edges.get():
        return contextlib.nullcontext()
    return original(graph, inputs)


@contextlib.contextmanager
def differentiable_keras(twice=False, products=True):
    """A context in which Keras' layers and losses can be differentiated as often as needed, on any slice of a batch.

    On a slice, losses and random numbers are those of the whole batch; see `slices.py`. Nested contexts combine their
    arguments by "or".

    Args:
        twice: Whether normalization has second derivatives, for Hessians. Gauss-Newton products (with `J` and `J'`)
            are exact without, and Keras' own moments have a cheaper gradient. Defaults to `False`.
        products: Whether curvature products are computed, not only losses and gradients. Max pooling then has a cheap
            forward mode, and recurrent layers on a GPU run their loop instead of cuDNN's kernel, whose backward pass
            has no derivative. Defaults to `True`.
    """
    _install()
    outer = _mode.get()
    with keras_internals.holding(_mode, _Mode(True, twice or outer.twice, products or outer.products)):
        yield


def _install():
    """Install the substitutes, once for all threads."""
    for name, substitute in (
        (replaced.MOMENTS, _moments), (replaced.SYNCHRONIZED_MOMENTS, _synchronized_moments),
        (replaced.MAX_POOL, _max_pool), (replaced.CTC_LOSS, _ctc_loss), (replaced.CUDNN_OK, _cudnn_ok),
        (replaced.REDUCE_LOSS, _reduce), (replaced.SCALE_LOSS, _scale), (replaced.UNSCALE_LOSS, _unscale),
        *[(name, _by_rows) for name in replaced.GENERATORS], (replaced.TRUNCATED_NORMAL, _truncated_by_rows),
    ):  # fmt: skip
        keras_internals.guard(*name, substitute)
