"""Dense symmetric matrices of small models, in float64: from products, by eigenvalues."""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.operators import LinearOperator
from keras_curvature.typing import Vector

# The matrix, its eigenvectors and what the decomposition needs beside them.
COPIES, MOST_BYTES = 4, 8e9


def check_size(owner, variables, remedy):
    """Raise a `ValueError` if the matrices would need more than 8 GB."""
    size = trees.count(variables)
    needed = 8.0 * COPIES * size**2
    if needed > MOST_BYTES:
        raise ValueError(
            f"`{type(owner).__name__}` decomposes a dense matrix, which takes {needed / 1e9:.1f} GB for this model. "
            f"Received: a model with {size} trainable weights; at most {int((MOST_BYTES / 8 / COPIES) ** 0.5)} fit. "
            f"{remedy}"
        )


def matrix(operator: LinearOperator, like: Vector) -> tf.Tensor:
    """The matrix of an operator, float64 `(n, n)`, from a product with each unit vector, one after the other."""
    size = trees.count(like)

    def column(i):
        return trees.flatten(operator @ trees.unflatten(tf.one_hot(i, size, dtype=tf.float64), like), tf.float64)

    columns = tf.map_fn(column, tf.range(size), fn_output_signature=tf.TensorSpec((size,), tf.float64),
                        parallel_iterations=1)  # fmt: skip
    return 0.5 * (columns + tf.transpose(columns))


def eigenpairs(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`(eigenvalues, eigenvectors in columns)`, smallest first; NaN where an entry is not finite."""
    finite = tf.math.is_finite(tf.reduce_sum(matrix))
    safe = tf.where(finite, matrix, tf.zeros_like(matrix))  # LAPACK may not return from a NaN
    values, vectors = tf.linalg.eigh(safe)
    return tf.where(finite, values, float("nan")), vectors


def minimize_in_ball(values: tf.Tensor, slopes: tf.Tensor, radius: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The global minimum of `c'p + 1/2 p'diag(l)p` over `|p| <= radius`.

        p = -c / (l + lambda),      lambda >= max(0, -l_0) with |p| = radius, or 0 if that is within

    Where `c` has no part along the smallest eigenvalue, which is negative, and `p` is too short, that eigenvector is
    added (the "hard case").

    Reference: Moré and Sorensen (1983); Nocedal and Wright, "Numerical Optimization" (2006), section 4.3. `lambda` is
    found by bisection, which needs no safeguards.

    Args:
        values: `l`, smallest first, float64 `(n,)`.
        slopes: `c`, float64 `(n,)`.
        radius: Positive, float64.

    Returns:
        `(p, whether it is at the sphere)`.
    """
    lowest = values[0]
    above = values - lowest  # so that a shift near the smallest eigenvalue is exact

    def step(shift):
        return -tf.math.divide_no_nan(slopes, above + shift)

    low, high = tf.maximum(lowest, 0.0), tf.maximum(tf.maximum(lowest, 0.0), tf.norm(slopes) / radius)
    inside = (lowest > 0) & (tf.norm(step(lowest)) <= radius)

    def halve(i, low, high):
        middle = 0.5 * (low + high)
        too_long = tf.norm(step(middle)) > radius
        return i + 1, tf.where(too_long, middle, low), tf.where(too_long, high, middle)

    # the loop halves towards 0 until the smallest number
    _, _, shift = tf.while_loop(lambda i, low, high: i < 1100, halve, (tf.constant(0), low, high))
    p = step(tf.where(inside, lowest, shift))
    missing = tf.where(lowest < 0, tf.sqrt(tf.maximum(radius**2 - tf.reduce_sum(p**2), 0.0)), 0.0)
    along = tf.one_hot(0, tf.size(values), dtype=values.dtype) * tf.where(p[0] < 0, -missing, missing)
    hard = missing > 1e-6 * radius
    return p + tf.where(hard, along, tf.zeros_like(along)), ~inside
