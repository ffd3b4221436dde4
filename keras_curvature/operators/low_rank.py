"""A diagonal plus low-rank operator on all weights together."""

import dataclasses

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.operators.base import LinearOperator
from keras_curvature.typing import Vector


def columns(vector):
    """A vector as a list of columns `(n_i, 1)`."""
    return [tf.reshape(a, [-1, 1]) for a in vector]


def gram(A, B):
    """`A'B`, `(r, k)`, for tall matrices in pieces, one for each weight: `(n_i, r)` and `(n_i, k)`."""
    return tf.add_n([_gram(a, b) for a, b in zip(A, B)])


def _gram(a, b):
    """`a'b`; of single columns in sums over pieces, see `trees.PIECE`. For more, the kernel itself adds in blocks."""
    rows, size = a.shape[0], trees.piece(a.shape[0])
    if b.shape[1] > 1 or rows <= trees.PIECE:
        return tf.matmul(a, b, transpose_a=True)
    if size is None:  # no divisor fits; a sum of products along this axis would have an error of 1e-4 at 1e6 rows
        whole = rows - rows % trees.PIECE
        return _gram(a[:whole], b[:whole]) + tf.matmul(a[whole:], b[whole:], transpose_a=True)
    a, b = (tf.reshape(x, [-1, size, x.shape[1]]) for x in (a, b))
    return tf.reduce_sum(tf.matmul(a, b, transpose_a=True), 0)


def times(A, B):
    """`A B` for a tall matrix in pieces `(n_i, r)`, one for each weight, and a matrix `(r, k)`."""
    return [tf.matmul(a, B) for a in A]


@dataclasses.dataclass(frozen=True)
class LowRankSquare(LinearOperator):
    """`P = Q'Q` with `Q = (I + U V') diag(d)`: a diagonal plus a matrix of rank at most `2 r`.

    Args:
        U: A list of matrices `(n_i, r)`, one for each weight tensor.
        V: A list of matrices `(n_i, r)`.
        d: A list of columns `(n_i, 1)`.
    """

    U: Vector
    V: Vector
    d: Vector
    psd = True

    def multiply(self, vector: Vector) -> Vector:
        product = self.transposed_root(self.root(columns(vector)))
        return [tf.reshape(p, a.shape) for p, a in zip(product, vector)]

    def root(self, x: Vector) -> Vector:
        """`Q x`, for and as a list of columns."""
        return _plus(self.U, self.V, [d * a for d, a in zip(self.d, x)])

    def transposed_root(self, y: Vector) -> Vector:
        """`Q' y`, for and as a list of columns."""
        return [d * a for d, a in zip(self.d, _plus(self.V, self.U, y))]


def _plus(A, B, x):
    """`(I + A B') x`."""
    return [a + b for a, b in zip(x, times(A, gram(B, x)))]
