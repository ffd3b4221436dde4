"""The cautious mask: entries of a step that would raise the loss to first order are left out.

    mask = (-step * gradient > 0),    step <- step * mask / max(mean(mask), 0.001)

for each variable, with the mean over its entries, so that the rest of the step is longer.

Reference: Liang et al., "Cautious optimizers: Improving training with one line of code" (2024), whose code has the same
bound on the mean.
"""

import tensorflow as tf

from keras_curvature.component import check

SMALLEST_SHARE = 1e-3


def agreeing(step, gradient):
    """The step without the entries that do not descend, a vector."""
    found = []
    for s, g in zip(step, gradient, strict=True):
        against = s * tf.cast(tf.sign(g), s.dtype) >= 0  # not so for a NaN, which stays to be seen
        share = 1.0 - tf.reduce_mean(tf.cast(against, s.dtype)) if s.shape.num_elements() else 1.0
        found.append(tf.where(against, tf.zeros_like(s), s / tf.maximum(share, SMALLEST_SHARE)))
    return found


def check_cautious(owner, cautious, steps_each_weight):
    """Check the argument; refuse it where no step is handed to Keras."""
    check(owner, "cautious", cautious, isinstance(cautious, bool), "True or False")
    if cautious and steps_each_weight:
        raise ValueError(
            f"`{type(owner).__name__}` steps each variable by itself, in `update_step`, so no mask can be put on its "
            "step. Received: cautious=True. Leave it out."
        )
