"""`tf.matmul` and `tf.vectorized_map` without a product of matrices that TensorFlow computes wrongly.

TensorFlow 2.21 multiplies by oneDNN on processors with AVX-512. Its product of `(n, 1, p, k)` by one matrix, in float32
and bfloat16, reads past the end of that matrix for `n >= 3`: the numbers are wrong, or the process ends. A dense layer
for sequences, mapped over single examples, is such a product.
"""

import contextvars
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_curvature import keras_internals
from keras_curvature.keras_internals import replaced

_mapping = contextvars.ContextVar("mapping", default=False)


def vectorized_map(fn: Callable[[tf.Tensor], Any], elements: Any) -> Any:
    """`tf.vectorized_map(fn, elements)`."""
    keras_internals.guard(*replaced.MATMUL, _matmul)
    with keras_internals.holding(_mapping, True):
        return tf.vectorized_map(fn, elements)


def matmul(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`tf.matmul(a, b)`."""
    return _merged(tf.matmul, a, b)


def _matmul(original, *args, **kwargs):
    return _merged(original, *args, **kwargs) if _mapping.get() else original(*args, **kwargs)


def _merged(original, a, b, *args, **kwargs):
    """A product with one matrix has one axis of examples; the others are merged with it."""
    if a.shape.rank is None or a.shape.rank < 4 or not _is_one_matrix(b):
        return original(a, b, *args, **kwargs)
    matrices, lead = tf.shape(a)[-2:], tf.shape(a)[:-2]
    merged = tf.reshape(a, tf.concat([[-1], matrices], 0))
    found = original(merged, tf.reshape(b, tf.shape(b)[-2:]), *args, **kwargs)
    known = a.shape[:-2].concatenate(found.shape[-2:])
    return tf.ensure_shape(tf.reshape(found, tf.concat([lead, tf.shape(found)[-2:]], 0)), known)


def _is_one_matrix(b):
    return b.shape.rank is not None and b.shape[:-2].is_fully_defined() and b.shape[:-2].num_elements() == 1
