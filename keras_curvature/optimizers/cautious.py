"""Cautious steps and cautious weight decay.

The cautious mask leaves out the entries of a step that would raise the loss to first order,

    mask = (-step * gradient > 0),    step <- step * mask / max(mean(mask), 0.001)

for each variable, with the mean over its entries, so that the rest of the step is longer.

Reference: Liang et al., "Cautious optimizers: Improving training with one line of code" (2024), whose code has the same
bound on the mean.

Cautious weight decay shrinks only the weights that the step shrinks too,

    w <- w + learning_rate (step - weight_decay w (step * w <= 0))

Reference: Chen et al., "Cautious weight decay" (2025), equation 1.
"""

import tensorflow as tf

from keras_curvature import trees

SMALLEST_SHARE = 1e-3


def agreeing(step, gradient):
    """The step without the entries that do not descend, a vector."""
    found = []
    for s, g in zip(step, gradient, strict=True):
        against = s * tf.cast(tf.sign(g), s.dtype) >= 0  # not so for a NaN, which stays to be seen
        share = 1.0 - tf.reduce_mean(tf.cast(against, s.dtype)) if s.shape.num_elements() else 1.0
        found.append(tf.where(against, tf.zeros_like(s), s / tf.maximum(share, SMALLEST_SHARE)))
    return found


def decaying(step, weights, decays):
    """The step minus each decay times the entries of its weights that shrink by the step, or do not move."""
    found = []
    for s, w, decay in zip(step, weights, decays, strict=True):
        grows = s * tf.cast(tf.sign(w), s.dtype) > 0
        share = trees.exactly(float(decay), s.dtype) * tf.cast(w, s.dtype)
        found.append(tf.where(grows, s, s - share) if decay else s)
    return found
