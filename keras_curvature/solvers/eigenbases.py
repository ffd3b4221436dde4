"""Orthonormal bases of eigenvectors, in columns, and the update of an old basis to a new matrix.

All functions take stacks `(..., n, n)`. A failed basis is NaN, as with roots.
"""

import tensorflow as tf

from keras_curvature.solvers.roots import failed_as_nan, in_units, without_failures


def decompose(matrices):
    """The eigenvectors, sorted from the largest eigenvalue to the smallest."""
    finite, matrices = without_failures(matrices)
    _, vectors = tf.linalg.eigh(in_units(matrices)[1])
    return failed_as_nan(finite, tf.reverse(vectors, [-1]))


def refine(matrices, bases, sort=True):
    """One step of orthogonal iteration: `Q` of the QR decomposition of `matrices @ bases`.

    With `sort` the decomposition takes the columns in the order of their Rayleigh quotients `q'Aq`, the largest first.
    Columns keep their places in the result, so that other state stored per column stays valid.
    """
    finite, matrices = without_failures(matrices)
    products = tf.matmul(in_units(matrices)[1], bases)
    if not sort:
        return failed_as_nan(finite, tf.linalg.qr(products)[0])
    order = tf.argsort(tf.reduce_sum(bases * products, axis=-2), direction="DESCENDING", stable=True)
    columns, _ = tf.linalg.qr(tf.gather(products, order, axis=-1, batch_dims=order.shape.rank - 1))
    back = tf.argsort(order, stable=True)
    return failed_as_nan(finite, tf.gather(columns, back, axis=-1, batch_dims=order.shape.rank - 1))
