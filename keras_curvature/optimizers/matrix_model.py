"""The quadratic model of a loss with a dense matrix for its curvature; see `local_models.py`."""

import tensorflow as tf

from keras_curvature import trees


class WithMatrix:
    """With a matrix `F`, float64 `(n, n)`, to which L2 regularizers are added.

    Args:
        lin: The `Linearization`.
        F: The matrix.
    """

    solved_by = "weights"

    def __init__(self, lin, F):
        self._like, self._g = lin.gradient, trees.flatten(lin.gradient, tf.float64)
        l2 = [tf.fill(w.shape, tf.constant(c, tf.float64)) for c, w in zip(lin.l2, self._like)]
        self._F = F + tf.linalg.diag(trees.flatten(l2, tf.float64))

    def is_finite(self):
        """Whether the matrix and the gradient are finite."""
        return tf.math.is_finite(tf.reduce_sum(self._F) + tf.reduce_sum(self._g))

    def decompose(self, damping, scale):
        """Decompose the system; the metric of the damping is the identity."""
        del scale
        shift = tf.cast(damping, tf.float64) * tf.eye(self._F.shape[0], dtype=tf.float64)
        self._lower = tf.linalg.cholesky(self._F + shift)

    def solve(self, center=None):
        """`d`, a vector."""
        del center
        self._found = -tf.linalg.cholesky_solve(self._lower, self._g[:, tf.newaxis])[:, 0]
        return trees.unflatten(self._found, self._like)

    def change(self, length):
        """`q(length * d)` of the solution `d`."""
        length = tf.cast(length, tf.float64)
        curved = tf.tensordot(self._found, tf.linalg.matvec(self._F, self._found), 1)
        return length * tf.tensordot(self._g, self._found, 1) + 0.5 * length * length * curved

    def iterations(self):
        """0: of conjugate gradients."""
        return tf.constant(0.0)
