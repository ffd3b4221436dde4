"""The hyperball: each kernel keeps its norm, and its steps get a length in proportion to that norm.

    w <- R u / |u|,    u = w + learning_rate R s / |s|,    R = |w|                  s: the step of the method

with the Frobenius norms of each kernel: a learning rate of 0.01 turns it by 0.01, whatever the method. It takes the
place of weight decay, under which the norms settle where decay and steps are in balance. Biases and scales step as
ever, and so does a kernel that is zero.

Reference: Wen, Dang, Lyu, Ma and Liang, "Fantastic pretraining optimizers and where to find them II: Hyperball
optimization" (2026). Difference: `R` is the norm before the step, which differs from the initial one by rounding alone.
"""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.layers.ends import is_kernel
from keras_curvature.typing import Scalar, Variables, Vector


def on_spheres(step: Vector, variables: Variables, learning_rate: Scalar) -> Vector:
    """The step that, times the learning rate, ends on the sphere of each kernel; other tensors as they are."""
    values = zip(step, variables, trees.values(variables), strict=True)
    return [_on_sphere(s, w, tf.cast(learning_rate, s.dtype)) if is_kernel(v) else s for s, v, w in values]


def _on_sphere(s, w, rate):
    w = tf.cast(w, s.dtype)
    radius = _norm(w)
    u = w + rate * radius * tf.math.divide_no_nan(_unit(s), _norm(_unit(s)))
    turned = radius * tf.math.divide_no_nan(u, _norm(u)) - w
    # not finite where the step is not, for the step to be seen and skipped
    moves = (radius > 0) & tf.reduce_any(s != 0)
    return tf.where(moves, tf.math.divide_no_nan(turned, rate) + 0.0 * s, s)


def _unit(s):
    """`s` with entries up to 1, whose squares do not overflow."""
    return tf.math.divide_no_nan(s, tf.reduce_max(tf.abs(s)))


def _norm(x):
    return tf.sqrt(tf.reduce_sum(tf.square(x)))
