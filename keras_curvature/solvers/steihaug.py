"""Conjugate gradients in a ball, for a matrix that need not be positive definite."""

from typing import NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.operators import LinearOperator
from keras_curvature.typing import Scalar, Vector


class InBall(NamedTuple):
    """A step within a ball.

    Attributes:
        value: The step `p`, a vector.
        change: `g'p + 1/2 p'A p`, a scalar.
        at_boundary: Whether the step ends at the sphere, a boolean scalar.
        steps: Number of products, int32.
        finite: Whether all products were finite; if not, `value` is the step before the one that was not.
    """

    value: Vector
    change: tf.Tensor
    at_boundary: tf.Tensor
    steps: tf.Tensor
    finite: tf.Tensor


class _State(NamedTuple):
    live: tf.Tensor
    finite: tf.Tensor
    at_boundary: tf.Tensor
    i: tf.Tensor
    p: list
    r: list
    d: list
    rr: tf.Tensor


def steihaug(operator: LinearOperator, gradient: Vector, radius: Scalar, max_steps: int, tolerance: Scalar) -> InBall:
    """Minimize `g'p + 1/2 p'A p` over `|p| <= radius`, approximately.

    Conjugate gradients from zero. A step that would leave the ball ends at the sphere, and so does a direction of
    negative curvature, followed downhill. Ends where `|g + A p| <= tolerance |g|`.

    Reference: Steihaug (1983); Nocedal and Wright, "Numerical Optimization" (2006), Algorithm 7.2.

    Args:
        operator: `A`, a symmetric `LinearOperator`.
        gradient: `g`, a vector.
        radius: A positive scalar.
        max_steps: Largest number of products.
        tolerance: Relative residual to end at, a scalar.

    Returns:
        An `InBall`.
    """
    rr = trees.squared_norm(gradient)
    radius, goal = tf.cast(radius, rr.dtype), tf.cast(tolerance, rr.dtype) ** 2 * rr

    def step(s):
        Ad = operator @ s.d
        curvature = trees.dot(s.d, Ad)
        finite = tf.math.is_finite(curvature)
        curved = curvature > 0
        alpha = s.rr / tf.where(curved, curvature, tf.ones_like(curvature))
        beyond = trees.squared_norm(trees.add(s.p, s.d, alpha)) >= radius**2
        leaves = finite & (~curved | beyond)
        alpha = tf.where(leaves, _to_sphere(s.p, s.d, radius), alpha)
        alpha = tf.where(finite, alpha, tf.zeros_like(alpha))
        p, r = trees.add(s.p, s.d, alpha), trees.where(finite, trees.add(s.r, Ad, alpha), s.r)
        rr = trees.squared_norm(r)
        d = trees.add(trees.negative(r), s.d, tf.math.divide_no_nan(rr, s.rr))
        i = s.i + 1
        live = finite & ~leaves & (rr > goal) & (i < max_steps)
        return (_State(live, finite, leaves, i, p, r, d, rr),)

    no, zero = tf.constant(False), trees.zeros_like(gradient)
    r, d = list(gradient), trees.negative(gradient)
    begin = _State(rr > 0, tf.math.is_finite(rr), no, tf.constant(0), zero, r, d, rr)
    end = tf.while_loop(lambda s: s.live, step, (begin,))[0]
    # r = g + A p, so the model needs no other product
    change = 0.5 * (trees.dot(gradient, end.p) + trees.dot(end.r, end.p))
    return InBall(end.p, change, end.at_boundary, end.i, end.finite)


def _to_sphere(p, d, radius):
    """The positive root `t` of `|p + t d| = radius`."""
    pp, pd, dd = trees.squared_norm(p), trees.dot(p, d), trees.squared_norm(d)
    room = tf.maximum(radius**2 - pp, tf.zeros_like(pp))
    root = tf.sqrt(pd**2 + dd * room)
    # without the difference of two numbers that are nearly equal
    return tf.where(pd > 0, room / (pd + root), (root - pd) / dd)
