"""Damped linear least squares with dense rows, for Gauss-Newton and Levenberg-Marquardt steps. Pure functions.

    d = argmin_d  1/2 |A d + r|^2 + b'd + 1/2 (d - c)' E (d - c),       E a diagonal

with `N` rows and `n` weights. All ways to solve it give the same `d`:

    "rows"      d = p - E^-1 A' (A E^-1 A' + I)^-1 (r + A p)        p = c - E^-1 b;  Cholesky of N x N (Woodbury)
    "weights"   d = p - (A'A + E)^-1 A' (r + A p)                   Cholesky of n x n, and one refinement
    "qr"        the same from a QR decomposition of [A; E^(1/2)]    squares no condition number
    "svd"       from the singular values of A E^-(1/2)              also without damping: the shortest solution

Each function decomposes once and returns a function `solve(r, b=None, c=None)`, so that a second right side, such as
that of the geodesic acceleration, costs two products. A failed Cholesky decomposition gives NaN and raises nothing.

References: Nocedal and Wright, "Numerical Optimization" (2006), sections 10.2 and 10.3; Cai et al., "Gram-Gauss-Newton
method" (2019), for the solution in rows.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from keras_curvature.typing import Vector

Solve: TypeAlias = Callable[..., tf.Tensor]
# Columns of the rows below so many roundings of the longest are empty: up to 3 were seen of weights without influence.
ROUNDINGS = 16


def in_rows(A: tf.Tensor, E: tf.Tensor) -> Solve:
    """By Cholesky of `A E^-1 A' + I`, `(N, N)`: `N^2 n + N^3 / 3`."""
    scaled = A / E  # (N, n)
    lower = tf.linalg.cholesky(tf.matmul(scaled, A, transpose_b=True) + tf.eye(tf.shape(A)[0], dtype=A.dtype))

    def correct(r):
        return -tf.linalg.matvec(scaled, _by_cholesky(lower, r), transpose_a=True)

    return _from(correct, A, E)


def in_weights(A: tf.Tensor, E: tf.Tensor) -> Solve:
    """By Cholesky of `A'A + E`, `(n, n)`: `N n^2 + n^3 / 3`.

    `A'A` squares the condition number of `A`. One step of refinement, whose gradient comes from `A` itself, takes that
    back where `A'A + E` is regular in its precision (Bjorck's corrected seminormal equations, 1987, with this factor).
    """
    lower = tf.linalg.cholesky(tf.matmul(A, A, transpose_a=True) + tf.linalg.diag(E))

    def correct(r):
        d = -_by_cholesky(lower, tf.linalg.matvec(A, r, transpose_a=True))
        gradient = tf.linalg.matvec(A, r + tf.linalg.matvec(A, d), transpose_a=True) + E * d
        return d - _by_cholesky(lower, gradient)

    return _from(correct, A, E)


def by_qr(A: tf.Tensor, E: tf.Tensor) -> Solve:
    """By QR of `[A; E^(1/2)]`, `(N + n, n)`: `2 N n^2`; needs no product of `A` with itself."""
    Q, R = tf.linalg.qr(tf.concat([A, tf.linalg.diag(tf.sqrt(E))], 0))
    own = Q[: tf.shape(A)[0]]  # (N, n)

    def correct(r):
        right = tf.linalg.matvec(own, r, transpose_a=True)
        return -tf.linalg.triangular_solve(R, right[:, tf.newaxis], lower=False)[:, 0]

    return _from(correct, A, E)


def by_svd(A: tf.Tensor, E: tf.Tensor, metric: tf.Tensor, cutoff: float | None = None) -> Solve:
    """By the singular values of `A M^-(1/2)`; the shortest solution in the metric `M` where `E` is zero.

    Args:
        A: `(N, n)`.
        E: A multiple of the metric, `(n,)`; may be zero.
        metric: `M`, a positive diagonal `(n,)`.
        cutoff: Without damping, singular values below this share of the largest count as zero. Defaults to the rounding
            of the dtype times the longer side of `A` (LAPACK's least squares).
    """
    root = tf.sqrt(metric)
    s, U, V = tf.linalg.svd(A / root)
    rounding = float(np.finfo(A.dtype.as_numpy_dtype).eps)
    smallest = rounding * tf.cast(tf.reduce_max(tf.shape(A)), A.dtype) if cutoff is None else cutoff
    mu = tf.reduce_max(E / metric)
    kept = (s > smallest * tf.reduce_max(s)) | (mu > 0)
    squared = tf.where(kept, s * s + mu, tf.ones_like(s))

    def along(factors, coefficients):
        factors = tf.where(kept, factors / squared, tf.zeros_like(s))
        return tf.linalg.matvec(V, factors * coefficients) / root

    def solve(r, b=None, c=None):
        moved = r if c is None else r + tf.linalg.matvec(A, c)
        d = -along(s, tf.linalg.matvec(U, moved, transpose_a=True))
        if b is not None:
            b = b / root
            inside = tf.linalg.matvec(V, b, transpose_a=True)
            outside = tf.math.divide_no_nan(b - tf.linalg.matvec(V, inside), mu)
            d -= along(tf.ones_like(s), inside) + outside / root
        return d if c is None else d + c

    return solve


def scale_of(norms: Vector) -> Vector:
    """The scale of the damping from the norms of columns: those of empty columns are the longest, or 1.

    A weight that moves nothing has a column of rounding, and its slope is rounding too: the quotient could be any
    number. With the largest damping it stays where it is.
    """
    longest = tf.reduce_max(tf.stack([tf.cast(tf.reduce_max(a), tf.float64) for a in norms]))

    def of(a):
        least = tf.cast(longest, a.dtype) * (ROUNDINGS * np.finfo(a.dtype.as_numpy_dtype).eps)
        return tf.where(a > least, a, tf.where(longest > 0, tf.cast(longest, a.dtype), tf.ones_like(a)))

    return [of(a) for a in norms]


def _from(correct, A, E):
    """`solve(r, b, c)`, from the solution for `b = c = 0`."""

    def solve(r, b=None, c=None):
        if b is None and c is None:
            return correct(r)
        p = (0.0 if c is None else c) - (0.0 if b is None else b / E)
        return p + correct(r + tf.linalg.matvec(A, p))

    return solve


def _by_cholesky(lower, right):
    return tf.linalg.cholesky_solve(lower, right[:, tf.newaxis])[:, 0]
