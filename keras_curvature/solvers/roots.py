"""Inverse roots `A^(-1/p)` of stacks of symmetric matrices.

A root is NaN if it fails: the matrix is not finite, or the iteration does not converge. The caller then keeps the last
good root. Nothing here raises because of values, whereas TensorFlow's eigendecomposition of a NaN raises an error.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from keras_curvature.component import Component, check, check_count, check_number, register

# An iteration has failed if it ends farther than this from the identity (the limit in the reference's check).
FAILED = 0.1
# The iteration stops when the norm of the error grows by WORSE, or when the error is below NEAR and its norm does not
# decrease (the same source). In exact arithmetic the norm decreases; the largest entry may not.
WORSE, NEAR = 1.2, 1e-3


@register
@dataclasses.dataclass(frozen=True)
class EigenRoot(Component):
    """`A^(-1/p) = Q diag(l)^(-1/p) Q'` with the eigenvalues `l` and eigenvectors `Q` of `A + epsilon I`.

    If rounding makes the smallest eigenvalue too small, all eigenvalues are shifted up, so that the smallest is
    `epsilon`, or the machine precision times the largest if that is larger.

    Reference: the eigendecomposition of github.com/facebookresearch/optimizers, `matrix_functions.py`, whose lower
    bound is `epsilon` alone.

    Args:
        exponent: The exponent of the inverse root; `None`: the optimizer chooses, `1 / (2 axes)` in Shampoo. Defaults
            to `None`.

    Example: `Shampoo(root=EigenRoot(exponent=0.5))`
    """

    exponent: float | None = None

    def __post_init__(self):
        check_number(self, "exponent", self.exponent, low=0, open_low=True, or_none=True)

    def inverse_root(self, matrices: tf.Tensor, p: float, epsilon: float) -> tf.Tensor:
        """`(A + epsilon I)^(-1/p)` of a stack `(..., n, n)`; NaN where it failed."""
        finite, matrices = without_failures(matrices)
        values, vectors = tf.linalg.eigh(_ridge(matrices, epsilon))
        smallest, precision = values[..., :1], np.finfo(values.dtype.as_numpy_dtype).eps
        lowest = tf.maximum(tf.constant(epsilon, values.dtype), precision * values[..., -1:])
        values += tf.where(smallest < lowest, lowest - smallest, tf.zeros_like(smallest))
        powers = values ** tf.constant(-1.0 / p, values.dtype)
        return failed_as_nan(finite, tf.matmul(vectors * powers[..., None, :], vectors, transpose_b=True))


@register
@dataclasses.dataclass(frozen=True)
class CoupledNewton(Component):
    """`A^(-1/p)` for an integer `p` by matrix products only, which are fast on accelerators.

        N = (1 + 1/p) I - M/p,    X <- X N,    M <- N^p M

    from `X = z^(1/p) I` and `M = z A`, `z = (p + 1) / (2 |A|_F)`, until all entries of `M - I` are
    at most `tolerance`. Each matrix of the stack stops separately: when it converges, or at its smallest error when
    the error grows again.

    Reference: Guo and Higham, "A Schur-Newton method for the matrix pth root and its inverse" (2006). Used by
    Anil et al., "Scalable second order optimization for deep learning" (2020), and in
    github.com/facebookresearch/optimizers.

    Args:
        exponent: The exponent of the inverse root, `1 / p`; `None`: the optimizer chooses. Defaults to `None`.
        relative_epsilon: `relative_epsilon |A|_F` is added to the diagonal if it exceeds the optimizer's `epsilon`: the
            iteration fails if the condition number exceeds what the precision resolves. Defaults to `1e-6` (Anil et
            al., of the largest eigenvalue).
        tolerance: Largest entry of `M - I` at convergence. Defaults to `1e-6` (the reference).
        max_steps: Largest number of iterations. Defaults to `100` (the reference).

    Example: `Shampoo(root=CoupledNewton())`
    """

    exponent: float | None = None
    relative_epsilon: float = 1e-6
    tolerance: float = 1e-6
    max_steps: int = 100

    def __post_init__(self):
        check_number(self, "exponent", self.exponent, low=0, open_low=True, or_none=True)
        if self.exponent is not None:
            whole = abs(1 / self.exponent - round(1 / self.exponent)) < 1e-6
            check(self, "exponent", self.exponent, whole, "one over an integer, or use `EigenRoot`")
        check_number(self, "relative_epsilon", self.relative_epsilon, low=0)
        check_number(self, "tolerance", self.tolerance, low=0, open_low=True)
        check_count(self, "max_steps", self.max_steps)

    def inverse_root(self, matrices: tf.Tensor, p: float, epsilon: float) -> tf.Tensor:
        """`(A + epsilon I)^(-1/p)` of a stack `(..., n, n)`; NaN where it failed."""
        p = round(p)
        finite, matrices = without_failures(matrices)
        unit, matrices = in_units(matrices)
        ridge = tf.maximum(tf.constant(epsilon, unit.dtype) / unit, self.relative_epsilon * _norms(matrices))
        matrices = _ridge(matrices, ridge)
        eye = tf.eye(matrices.shape[-1], dtype=matrices.dtype)
        z = (p + 1) / (2 * _norms(matrices))
        X, M = z ** tf.constant(1 / p, z.dtype) * eye, z * matrices

        def improve(step, X, M, error, norm, active):
            N = eye + (eye - M) / p
            next_M = tf.matmul(power(N, p), M)
            next_error, next_norm = _largest(next_M - eye), _norms(next_M - eye)
            better = active & (next_norm <= WORSE * norm)  # false for a NaN
            X, M = tf.where(better, tf.matmul(X, N), X), tf.where(better, next_M, M)
            at_rest = (next_norm >= norm) & (next_error < NEAR)
            error, norm = tf.where(better, next_error, error), tf.where(better, next_norm, norm)
            return step + 1, X, M, error, norm, better & (error > self.tolerance) & tf.logical_not(at_rest)

        error = _largest(M - eye)
        _, X, _, error, _, _ = tf.while_loop(
            lambda step, X, M, error, norm, active: tf.reduce_any(active),
            improve,
            (tf.constant(0), X, M, error, _norms(M - eye), error > self.tolerance),
            maximum_iterations=self.max_steps,
        )
        return failed_as_nan(finite & (error <= FAILED), X * unit ** tf.constant(-1 / p, unit.dtype))


def without_failures(matrices):
    """`(finite, matrices)`: which matrices are finite, `(..., 1, 1)`, and the stack with `I` for the others."""
    finite = tf.reduce_all(tf.math.is_finite(matrices), axis=(-2, -1), keepdims=True)
    return finite, tf.where(finite, matrices, tf.eye(matrices.shape[-1], dtype=matrices.dtype))


def in_units(matrices):
    """`(unit, matrices / unit)`: each matrix divided by its largest entry, so that squares do not overflow."""
    unit = _largest(matrices)
    unit = tf.where(unit > 0, unit, tf.ones_like(unit))
    return unit, matrices / unit


def failed_as_nan(good, matrices):
    """The stack, with NaN for the failed matrices."""
    return tf.where(good, matrices, tf.constant(float("nan"), matrices.dtype))


def _ridge(matrices, epsilon):
    return matrices + epsilon * tf.eye(matrices.shape[-1], dtype=matrices.dtype)


def _norms(matrices):
    return tf.norm(matrices, axis=(-2, -1), keepdims=True)


def _largest(matrices):
    return tf.reduce_max(tf.abs(matrices), axis=(-2, -1), keepdims=True)


def power(matrices, p):
    """The `p`-th power, by repeated squaring."""
    result = None
    while p:
        if p % 2:
            result = matrices if result is None else tf.matmul(result, matrices)
        p //= 2
        if p:
            matrices = tf.matmul(matrices, matrices)
    return result
