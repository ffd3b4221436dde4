"""The minimum of a quadratic over the span of two directions.

Given directions `d_i` and the quadratic `q(d) = g'd + 1/2 d'Bd`, let `A_ij = d_i' B d_j` and `b_i = g'd_i`. For the
combination `sum_i c_i d_i` the quadratic is `b'c + 1/2 c'Ac`, and its minimum is at `c = -A^-1 b`. With the new
direction and the last step as the two directions, as in CurveBall, `c` is the learning rate and the momentum.
"""

import tensorflow as tf


def minimize(A, b):
    """The coefficients `c = -A^-1 b` of the minimum over two directions.

    If the directions are parallel or the second is zero (in the first step), the matrix is singular. The result is then
    the exact line search along the first direction, `c = (-b_0/A_00, 0)`, or zero if the curvature along that direction
    is not positive, because there is no minimum. The matrix counts as singular within the rounding of its dtype; the
    solution is computed in float64. If a curvature is not finite, `c` is NaN: a product overflowed, and a step of zero
    would hide it.

    Args:
        A: Symmetric matrix of curvatures, shape `(2, 2)`.
        b: Slopes `g'd_i`, shape `(2,)`.

    Returns:
        `c`, shape `(2,)`, in the dtype of `A`.
    """
    tolerance = 16.0 * (2.2e-16 if A.dtype == tf.float64 else 1.2e-7)
    A, b, dtype = tf.cast(A, tf.float64), tf.cast(b, tf.float64), A.dtype
    determinant = A[0, 0] * A[1, 1] - A[0, 1] * A[1, 0]
    convex = (A[0, 0] > 0) & (A[1, 1] > 0)
    regular = convex & (determinant > tolerance * A[0, 0] * A[1, 1])
    safe = tf.where(regular, determinant, tf.ones_like(determinant))
    first = -(A[1, 1] * b[0] - A[0, 1] * b[1]) / safe
    second = -(A[0, 0] * b[1] - A[1, 0] * b[0]) / safe
    # no step where the curvature is not positive; NaN stays NaN
    line = -tf.where(A[0, 0] <= 0, tf.zeros_like(b[0]), b[0] / A[0, 0])
    found = tf.where(regular, tf.stack([first, second]), tf.stack([line, tf.zeros_like(line)]))
    overflowed = tf.logical_not(tf.reduce_all(tf.math.is_finite(A)))
    return tf.cast(tf.where(overflowed, tf.constant(float("nan"), found.dtype), found), dtype)


def value(A, b, c):
    """`b'c + 1/2 c'Ac`, the change of the loss that the quadratic predicts, a scalar."""
    return tf.tensordot(b, c, 1) + 0.5 * tf.tensordot(c, tf.linalg.matvec(A, c), 1)

