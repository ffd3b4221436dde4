"""Several vectors in the rows of tensors `(rows, *shape)`, one tensor for each weight, within a graph."""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.typing import Vector


def coefficients(rows: Vector, vector: Vector) -> tf.Tensor:
    """The inner product of each row with a vector, `(rows,)`; no matrix product, which a GPU or a TPU would round."""
    dtype = trees.scalar_dtype(vector)
    axes = [list(range(1, a.shape.rank)) for a in rows]
    return tf.add_n([tf.reduce_sum(tf.cast(a * v[None], dtype), axis) for a, v, axis in zip(rows, vector, axes)])


def combine(weights: tf.Tensor, rows: Vector) -> Vector:
    """The combination of the rows with weights `(rows,)`, a vector; with a matrix `(count, rows)`, `count` new rows."""
    return [tf.tensordot(tf.cast(weights, a.dtype), a, 1) for a in rows]
