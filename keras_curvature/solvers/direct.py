"""Damped inverses of small matrices, by structure. Pure functions of tensors.

A curvature block is kept as a matrix, as a diagonal, or as the two factors of a Kronecker product. Each form has its
own inverse:

    (M + lambda I)^-1                    Cholesky, d^3
    1 / (m + lambda)                     M a diagonal
    (A (x) G + lambda I)^-1              by factors: (A + pi sqrt(lambda) I)^-1 (x) (G + sqrt(lambda)/pi I)^-1
    (aa' (x) bb' + lambda I)^-1          exactly, by Sherman and Morrison
    (X'X + lambda I)^-1                  by the rows of `X`, if they are few (Woodbury)

A Kronecker product plus a multiple of the identity is not a Kronecker product. So the damping is split over the factors
in proportion to their mean eigenvalues (`pi`). The result does not depend on which factor holds the scale.

Reference: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015),
section 6.3, with the trace norm.

A failed inverse is NaN and never raises: the caller keeps its last inverse.
"""

import tensorflow as tf

from keras_curvature import trees


def inverse(matrix, damping):
    """`(M + damping I)^-1` of a symmetric positive semi-definite `M`; NaN where Cholesky fails.

    Args:
        matrix: `(d, d)`, or several of them `(..., d, d)`.
        damping: A scalar, or one for each of several matrices.
    """
    damping = trees.exactly(damping, matrix.dtype)
    # one copy of the matrix: Cholesky reads its lower triangle only
    damped = tf.linalg.set_diag(matrix, tf.linalg.diag_part(matrix) + damping[..., tf.newaxis])
    # from the triangle's inverse, not `cholesky_solve`: this product is symmetric to the last bit
    half = _inverse_of_triangle(tf.linalg.cholesky(damped))
    return tf.matmul(half, half, transpose_a=True)


def _inverse_of_triangle(lower, largest=1280):
    """The inverse of lower triangular matrices, large ones by halves: products are faster than substitution.

        [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1  C^-1]
    """
    n = lower.shape[-1]
    if n <= largest:
        unit = tf.eye(n, dtype=lower.dtype)
        return tf.linalg.triangular_solve(lower, unit if lower.shape.rank == 2 else tf.broadcast_to(unit, lower.shape))
    half = (n + 1) // 2
    A = _inverse_of_triangle(lower[..., :half, :half], largest)
    C = _inverse_of_triangle(lower[..., half:, half:], largest)
    B = -tf.matmul(C, tf.matmul(lower[..., half:, :half], A))
    upper = tf.concat([A, tf.zeros([*lower.shape[:-2], half, n - half], lower.dtype)], -1)
    return tf.concat([upper, tf.concat([B, C], -1)], -2)


def inverse_of_diagonal(entries, damping):
    """`1 / (m + damping)` of a diagonal `(..., d)`; NaN where `m + damping` is not positive, as with Cholesky."""
    damped = entries + trees.exactly(damping, entries.dtype)[..., tf.newaxis]
    return tf.where(damped > 0, 1.0 / damped, tf.constant(float("nan"), damped.dtype))


def split_damping(of_A, of_G, damping):
    """`(damping of A, damping of G)`, two numbers (or one for each group) whose product is `damping`.

    The first is `pi sqrt(damping)` and the second `sqrt(damping) / pi`, where `pi^2` is the ratio of the mean
    eigenvalues of `A` and `G`, or 1 if one of them is zero.

    Args:
        of_A: `mean_eigenvalue(A)`.
        of_G: `mean_eigenvalue(G)`.
        damping: A scalar.
    """
    known = (of_A > 0) & (of_G > 0)
    one = tf.ones_like(of_A)
    pi = tf.sqrt(tf.where(known, of_A, one)) / tf.sqrt(tf.where(known, of_G, one))
    root = tf.sqrt(trees.exactly(damping, pi.dtype))
    return pi * root, root / pi


def mean_eigenvalue(matrix):
    """`tr(M) / d` of a matrix, or of each of several."""
    return tf.reduce_mean(tf.linalg.diag_part(matrix), -1)


def solve_rank_one(a, b, damping, W):
    """`(ab' (ab')' + damping I)^-1 W` for vectors that make a matrix `ab'` shaped as `W`, or one for each group.

    By Sherman and Morrison: `(W - (a'Wb) / (damping + |a|^2 |b|^2) ab') / damping`.
    """
    damping = trees.exactly(damping, W.dtype)
    a, b = a[..., tf.newaxis], b[..., tf.newaxis, :]
    squares = tf.reduce_sum(a * a, [-2, -1], keepdims=True) * tf.reduce_sum(b * b, [-2, -1], keepdims=True)
    along = tf.matmul(tf.matmul(a, W, transpose_a=True), b, transpose_b=True)  # (..., 1, 1)
    return (W - along / (damping + squares) * a * b) / damping


def after_rank_one(inverse, v):
    """`(J^-1 + v v')^-1` of a symmetric positive definite `J`, by Sherman and Morrison, symmetric to the last bit.

    Args:
        inverse: `J`, `(d, d)`, or several of them `(..., d, d)`.
        v: `(..., d)`.
    """
    Jv = tf.linalg.matvec(inverse, v)
    scaled = Jv * tf.math.rsqrt(1.0 + tf.reduce_sum(v * Jv, -1, keepdims=True))
    return inverse - scaled[..., :, tf.newaxis] * scaled[..., tf.newaxis, :]


def solve_by_rows(rows, damping, W):
    """`(X'X + damping I)^-1 W` for the rows `X`, or for several of them; NaN where Cholesky fails.

    By Woodbury's identity, `(W - X' (X X' + damping I)^-1 X W) / damping`, or directly where there are as many rows as
    columns. Where an eigenvalue of `X'X` is much larger than the damping the identity loses digits, about those of
    their quotient.

    Args:
        rows: `(..., r, d)`.
        damping: A positive scalar, or one for each of several.
        W: `(..., d, m)`.
    """
    r, d = rows.shape[-2:]
    damping = trees.exactly(damping, W.dtype)
    if r is not None and r >= d:
        return tf.matmul(inverse(tf.matmul(rows, rows, transpose_a=True), damping), W)
    gram = tf.matmul(rows, rows, transpose_b=True)
    damped = tf.linalg.set_diag(gram, tf.linalg.diag_part(gram) + damping[..., tf.newaxis])
    inner = tf.linalg.cholesky_solve(tf.linalg.cholesky(damped), tf.matmul(rows, W))
    return (W - tf.matmul(rows, inner, transpose_a=True)) / damping[..., tf.newaxis, tf.newaxis]


def symmetric(matrix):
    """The symmetric part: sums of products are symmetric only up to rounding."""
    if matrix.shape[-1] == 1:  # inside a `tf.cond`, TensorFlow's graph optimizer makes an empty tensor of this sum
        return matrix
    return 0.5 * (matrix + tf.linalg.matrix_transpose(matrix))
