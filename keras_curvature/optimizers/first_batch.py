"""Whether the first batch has a gradient from which state can be made.

A batch whose examples all have weight zero, or are masked, has a gradient of zero, or of the weight regularizers alone.
Averages, diagonals and preconditioners that begin with it begin with zeros, and the steps after it explode: with PSGD
of Newton type the loss went to 1e14. Training begins with the first batch that has such a gradient.
"""

import numpy as np
import tensorflow as tf


def loss_has_gradient(linearization):
    """Whether the gradient differs from the gradient of the weight regularizers, a scalar boolean tensor."""
    regular = _of_regularizers(linearization.variables, linearization.weights)
    more = [
        tf.reduce_any(tf.cast(g, tf.bool) if r is None else tf.abs(g - r) > _rounding(v) * tf.abs(r))
        for v, g, r in zip(linearization.variables, linearization.gradient, regular)
    ]
    return tf.reduce_any(tf.stack(more))


def _of_regularizers(variables, weights):
    """The gradient of the weight regularizers, a list with `None` for weights without one."""
    with tf.GradientTape() as tape:
        tape.watch(weights)
        pairs = [(getattr(v, "regularizer", None), w) for v, w in zip(variables, weights)]
        terms = [tf.cast(regularizer(w), tf.float64) for regularizer, w in pairs if regularizer is not None]
    return tape.gradient(terms, weights) if terms else [None] * len(weights)


def _rounding(variable):
    """A few times the rounding of a variable's dtype."""
    dtype = tf.as_dtype(variable.dtype)
    return 0.1 if dtype.size < 4 else 16.0 * np.finfo(dtype.as_numpy_dtype).eps
