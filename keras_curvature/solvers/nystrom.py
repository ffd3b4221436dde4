"""The Nyström approximation of a matrix from products with a few random vectors, and the preconditioner made of it.

    Phi = orthonormal random vectors,   Y = A Phi,   A ~ Y (Phi'Y)^-1 Y' = U diag(l) U'

Vectors stand in the rows of tensors `(rank, *shape)`, one tensor for each weight.

Reference: Frangella, Tropp and Udell, "Randomized Nyström preconditioning" (2023), Algorithms 2.1 and 5.1. Differences:
(1) orthonormal vectors and the factors of `Y` come from Gram matrices in float64 (Cholesky twice, eigenvalues), so that
nothing of the size of the weights is decomposed; (2) where the sketch of an indefinite matrix has negative eigenvalues,
the matrix is shifted by twice their size, in `Y` as in `Phi'Y`, and the shift is taken off the eigenvalues again.
"""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import Component, check_count, register
from keras_curvature.operators import LinearOperator
from keras_curvature.solvers import row_vectors
from keras_curvature.typing import Scalar, Vector


@register
@dataclasses.dataclass(frozen=True)
class Nystrom(Component):
    """The choice of a Nyström preconditioner for conjugate gradients.

        P^-1 = U diag((l_r + mu) / (l + mu)) U' + I - U U',      B ~ U diag(l) U' from `rank` products,  mu: the damping

    It takes the largest eigenvalues away, on which conjugate gradients would spend their iterations. Costs `rank`
    products every `every` steps, and `rank` copies of the weights.

    Reference: Frangella, Tropp and Udell, "Randomized Nyström preconditioning" (2023), Algorithm 5.1; `every`: Rathore,
    Lei, Frangella, Lu and Udell (2024).

    Args:
        rank: Number of products. Defaults to `50` (DeepXDE).
        every: Steps between two sketches. Defaults to `20` (Rathore et al.).

    Example: `HessianFree(preconditioner=Nystrom(rank=20))`
    """

    rank: int = 50
    every: int = 20

    def __post_init__(self):
        check_count(self, "rank", self.rank)
        check_count(self, "every", self.every)


class Sketch(NamedTuple):
    """`U diag(l) U'`.

    Attributes:
        vectors: `U`, orthonormal, in rows: a list of tensors `(rank, *shape)`.
        values: `l >= 0`, largest first, float64 `(rank,)`.
        finite: Whether all products were finite; if not, `vectors` and `values` are not either.
    """

    vectors: Vector
    values: tf.Tensor
    finite: tf.Tensor


def sketch(operator: LinearOperator, like: Vector, rank: int, seed: tf.Tensor) -> Sketch:
    """The Nyström approximation of a symmetric operator, from `rank` products.

    Args:
        operator: `A`.
        like: A vector, for its shapes and dtypes.
        rank: Number of vectors, at most the number of entries of `like`.
        seed: An integer scalar tensor; equal seeds give equal vectors, also on all replicas.

    Returns:
        A `Sketch`.
    """
    seeds = [tf.stack([tf.cast(seed, tf.int32), place]) for place in range(len(like))]
    random = [tf.random.stateless_normal((rank, *a.shape), s, dtype=a.dtype) for a, s in zip(like, seeds)]
    phi = _orthonormal(_orthonormal(random))
    signature = [tf.TensorSpec(a.shape, a.dtype) for a in like]
    Y = tf.map_fn(lambda v: operator @ v, phi, fn_output_signature=signature, parallel_iterations=1)
    core = _gram(phi, Y)
    core = 0.5 * (core + tf.transpose(core))
    finite = tf.math.is_finite(tf.reduce_sum(core))
    # LAPACK may not return from a NaN
    core, Y = tf.where(finite, core, tf.eye(rank, dtype=tf.float64)), [tf.where(finite, y, tf.ones_like(y)) for y in Y]
    size = tf.reduce_max(tf.abs(core))
    shift = tf.maximum(10.0 * _rounding(like) * size, -2.0 * tf.linalg.eigvalsh(core)[0]) + 1e-300
    Y = [y + tf.cast(shift, y.dtype) * p for y, p in zip(Y, phi)]
    half = tf.linalg.cholesky(core + shift * tf.eye(rank, dtype=tf.float64))
    B = row_vectors.combine(tf.linalg.triangular_solve(half, tf.eye(rank, dtype=tf.float64)), Y)
    squares, left = tf.linalg.eigh(_gram(B, B))
    squares, left = tf.reverse(squares, [0]), tf.reverse(left, [1])
    roots = tf.sqrt(tf.maximum(squares, 0.0))
    known = tf.where(finite, tf.zeros((), tf.float64), float("nan"))
    U = row_vectors.combine(tf.math.divide_no_nan(tf.transpose(left), roots[:, None]) + known, B)
    return Sketch(U, tf.maximum(squares - shift, 0.0) + known, finite)


@dataclasses.dataclass(frozen=True)
class NystromPreconditioner(LinearOperator):
    """`P^-1 = U diag((l_r + mu) / (l + mu)) U' + I - U U'`, close to a multiple of `(A + mu I)^-1`.

    Args:
        vectors: `U`, as in `Sketch`.
        values: `l`, as in `Sketch`; `l_r` is the last.
        damping: `mu`, a scalar; taken as the rounding error of `l` where it is less.
    """

    vectors: Vector
    values: tf.Tensor
    damping: Scalar
    psd = True

    def multiply(self, vector: Vector) -> Vector:
        inside = row_vectors.coefficients(self.vectors, vector)
        rounding = _rounding(vector) * self.values[0]
        mu = tf.maximum(trees.exactly(self.damping, tf.float64), rounding)
        factors = tf.math.divide_no_nan(self.values[-1] - self.values, self.values + mu)
        change = tf.cast(factors, inside.dtype) * inside
        return trees.add(vector, row_vectors.combine(change, self.vectors))


def _rounding(vector):
    return 2.2e-16 if trees.scalar_dtype(vector) == tf.float64 else 1.2e-7


def _gram(A, B):
    """`A B'` for vectors in rows, float64 `(rank, rank)`."""
    flat = [(tf.reshape(a, (a.shape[0], -1)), tf.reshape(b, (b.shape[0], -1))) for a, b in zip(A, B)]
    return tf.add_n([tf.cast(tf.matmul(a, b, transpose_b=True), tf.float64) for a, b in flat])


def _orthonormal(rows):
    """The rows, made orthonormal by the Cholesky factor of their Gram matrix; to rounding after the second time."""
    half = tf.linalg.cholesky(_gram(rows, rows))
    return row_vectors.combine(tf.linalg.triangular_solve(half, tf.eye(rows[0].shape[0], dtype=tf.float64)), rows)
