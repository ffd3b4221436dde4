"""Inverses learnt from pairs `(s, y)` with `y ~ G s`: BFGS for matrices of a layer, of noisy pairs.

    H <- (I - s y'/s'y) H (I - y s'/s'y) + s s'/s'y                     H ~ G^-1

Noise, and a curvature that is not positive, would make `H` indefinite. Double damping mends a pair first:

    s <- theta s + (1 - theta) H y     until  s'y >= MU_1 y'H y          the step of `H` that the pair suggests
    y <- theta y + (1 - theta) s       until  s'y >= mu_2 s's            the least curvature that is learnt

Reference: Goldfarb, Ren and Bahamou, "Practical quasi-Newton methods for training deep neural networks" (2020),
sections 3 and 4, and the authors' code. All functions take stacks along leading axes.
"""

import tensorflow as tf

MU_1 = 0.2  # the authors
LEAST = 1e-4  # times |s|^2 |g|: pairs with less of `s'y` are dropped (the authors)


def damped(H: tf.Tensor, s: tf.Tensor, y: tf.Tensor, mu_2: float) -> tuple[tf.Tensor, tf.Tensor]:
    """The pair after double damping.

    Args:
        H: `(..., d, d)`, positive definite.
        s, y: `(..., d)`.
        mu_2: The least `s'y / s's` of the result.
    """
    Hy = tf.linalg.matvec(H, y)
    sy, yHy = dot(s, y), dot(y, Hy)
    s = _towards(s, Hy, sy, yHy, MU_1)
    sy, ss = dot(s, y), dot(s, s)
    return s, _towards(y, s, sy, ss, mu_2)


def updated(H: tf.Tensor, s: tf.Tensor, y: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """`H` after the pair; as it is if `s'y <= LEAST |s|^2 size`.

    Args:
        H: `(..., d, d)`, symmetric.
        s, y: `(..., d)`.
        size: The norm of the gradient that the pair is of, `(..., 1)`.
    """
    sy = dot(s, y)
    learns = (sy > 0) & (sy > LEAST * dot(s, s) * size)
    rho = tf.math.divide_no_nan(tf.cast(learns, H.dtype), sy)
    Hy = tf.linalg.matvec(H, y)
    crossed = _outer(rho * s, Hy)
    square = rho * s * tf.sqrt(dot(y, Hy) + tf.where(learns, sy, tf.zeros_like(sy)))
    # a sum with its own transpose, and a square: symmetric to the last bit
    return H + _outer(square, square) - (crossed + tf.linalg.matrix_transpose(crossed))


def dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The inner product along the last axis, which stays with length 1."""
    return tf.reduce_sum(a * b, -1, keepdims=True)


def _towards(a, b, share, whole, least):
    """`theta a + (1 - theta) b`, where `theta` makes `share` a `least` part of `whole`; `a` if it is that already."""
    short = share <= least * whole
    theta = tf.where(short, tf.math.divide_no_nan((1.0 - least) * whole, whole - share), tf.ones_like(share))
    return theta * a + (1.0 - theta) * b


def _outer(a, b):
    return a[..., :, tf.newaxis] * b[..., tf.newaxis, :]
