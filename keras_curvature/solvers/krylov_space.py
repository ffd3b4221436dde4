"""A Krylov space within a graph: Lanczos' method for a few steps, with the basis kept.

`solvers/lanczos.py` does the same on the host, with residuals and restarts, for measuring. Here nothing leaves the
graph, so a train step can use it, also under a strategy.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.operators import LinearOperator
from keras_curvature.solvers import row_vectors
from keras_curvature.typing import Vector


class KrylovSpace(NamedTuple):
    """An orthonormal basis `V` of the span of `b, A b, A^2 b, ...`, and the operator in it.

    Attributes:
        basis: The vectors, one in each row: a list of tensors `(size, *shape)`; rows beyond `count` are zero.
        matrix: `V'A V`, float64 `(size, size)`; zero beyond `count`.
        count: Number of vectors, int32: fewer than `size` where the space is invariant.
        finite: Whether all products were finite.
    """

    basis: Vector
    matrix: tf.Tensor
    count: tf.Tensor
    finite: tf.Tensor

    def combine(self, coefficients: tf.Tensor) -> Vector:
        """`V c`, a vector."""
        return row_vectors.combine(coefficients, self.basis)


def krylov_space(operator: LinearOperator, start: Vector, size: int) -> KrylovSpace:
    """The Krylov space of an operator from a start vector, by Lanczos' method with full orthogonalization, twice.

    Args:
        operator: `A`, symmetric.
        start: `b`, a vector; the first of the basis is `b / |b|`.
        size: Largest number of vectors, and of products.

    Returns:
        A `KrylovSpace`.
    """
    dtype = trees.scalar_dtype(start)
    size = min(size, trees.count(start))
    rounding = 1e-10 if dtype == tf.float64 else 1e-4
    norm = trees.norm(start)
    begins = norm > 0
    first = trees.scale(1.0 / tf.where(begins, norm, tf.ones_like(norm)), start)
    empty = [tf.zeros((size, *a.shape), a.dtype) for a in start]
    zero = tf.zeros((size, size), tf.float64)

    def step(count, basis, matrix, v, live, finite):
        basis = [rows + _in_row(count, size, a) for rows, a in zip(basis, v)]
        product = operator @ v
        length = trees.norm(product)
        column, rest = _split(basis, product)
        again, rest = _split(basis, rest)
        column = tf.cast(column + again, tf.float64)
        matrix = tf.tensor_scatter_nd_update(matrix, [[count]], column[None])
        beta = trees.norm(rest)
        finite &= tf.math.is_finite(length)
        live = finite & (beta > rounding * length)
        v = trees.scale(1.0 / tf.where(live, beta, tf.ones_like(beta)), rest)
        return count + 1, basis, matrix, v, live, finite

    count, basis, matrix, _, _, finite = tf.while_loop(
        lambda count, basis, matrix, v, live, finite: live & (count < size), step,
        (tf.constant(0), empty, zero, first, begins, tf.math.is_finite(norm)), parallel_iterations=1,
    )  # fmt: skip
    # each row knows the vectors up to its own; the later ones follow by symmetry
    lower = tf.linalg.band_part(matrix, -1, 0)
    matrix = lower + tf.transpose(lower - tf.linalg.band_part(lower, 0, 0))
    return KrylovSpace(basis, matrix, count, finite)


def _in_row(row, rows, a):
    """`a` in one of several rows, the others zero."""
    return tf.reshape(tf.one_hot(row, rows, dtype=a.dtype), [rows] + [1] * a.shape.rank) * a[None]


def _split(basis, vector):
    """`(V'u, u - V V'u)`."""
    column = row_vectors.coefficients(basis, vector)
    return column, trees.subtract(vector, row_vectors.combine(column, basis))
