"""A direction scaled down to a largest length in its own metric.

A natural-gradient step `-lr d`, `d = F^-1 g`, changes the model's predictive distribution by about
`1/2 lr^2 d'Fd = 1/2 lr^2 d'g` nats (Kullback-Leibler). The underlying quadratic is accurate only near the weights.
"""

import tensorflow as tf


def kl_clip(bound, learning_rate, slope):
    """The multiple `min(1, sqrt(bound / (learning_rate^2 d'g)))` of a direction `d` to take, a scalar.

    Args:
        bound: Largest `learning_rate^2 d'g`, a number.
        learning_rate: Multiple of `d` that would be taken.
        slope: `d'g`, a scalar; where it is not positive, nothing is cut.

    Reference: Ba, Grosse and Martens, "Distributed second-order optimization using Kronecker-factored approximations"
    (2017), section 5.
    """
    length = tf.cast(learning_rate, slope.dtype) ** 2 * slope
    longer = length > bound
    # a NaN stays one: it is the batch's fault, and the step is not taken
    return tf.where(longer, tf.sqrt(bound / tf.where(longer, length, tf.ones_like(length))), 1.0 + 0.0 * length)
