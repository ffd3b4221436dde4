"""Trust region: limit the length of a natural-gradient step in the Fisher metric.

A natural-gradient step `-lr d`, `d = F^-1 g`, changes the model's predictive distribution by about `1/2 lr^2 d'Fd = 1/2
lr^2 d'g` nats (Kullback-Leibler). This second-order expansion is accurate only near the weights.
"""

import tensorflow as tf


def kl_clip(bound, learning_rate, slope):
    """The factor `min(1, sqrt(bound / (learning_rate^2 d'g)))` on a direction `d`, a scalar.

    Args:
        bound: Largest `learning_rate^2 d'g`, a number.
        learning_rate: The learning rate of the step.
        slope: `d'g`, a scalar. If it is not positive, the factor is 1.

    Reference: Ba, Grosse and Martens, "Distributed second-order optimization using Kronecker-factored approximations"
    (2017), section 5.
    """
    length = tf.cast(learning_rate, slope.dtype) ** 2 * slope
    longer = length > bound
    # NaN stays NaN, and the step is skipped
    return tf.where(longer, tf.sqrt(bound / tf.where(longer, length, tf.ones_like(length))), 1.0 + 0.0 * length)
