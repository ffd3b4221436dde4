"""How the losses of the examples become one number, on any part of the examples.

Two losses are not means over the examples: masked losses are means over the unmasked steps, and
`reduction="mean_with_sample_weight"` over the sample weights. With `w_i` the number of unmasked steps or the weight of
example `i`, and `m` their mean over all `N` examples,

    f = sum_i w_i f_i / sum_i w_i = 1/N sum_i (w_i / m) f_i,      m = 1/N sum_i w_i

Of a part of the examples Keras divides by the part's own sum of `w_i`, so the parts do not add up to the whole. Whoever
has all examples takes `m` of each loss from `Evaluation.mean_weights`, once, and opens `over_all(m)`. Within it a part
has its share of the sum on the right, and the parts add up exactly, however the examples are cut.

Masks count as fixed: `m` does not follow a mask that depends on the weights.
"""

import contextlib
import contextvars
import dataclasses

import keras
import tensorflow as tf

from keras_curvature import keras_internals, trees
from keras_curvature.keras_internals import replaced
from keras_curvature.linearization.pure import slices

_all = contextvars.ContextVar("mean weights over all examples", default=())
_found = contextvars.ContextVar("what an evaluation finds", default=None)

MEAN_OF_WEIGHTS = "mean_with_sample_weight"
MEANS = ("sum_over_batch_size", "mean", MEAN_OF_WEIGHTS)


class Found:
    """What an evaluation at a `Place` finds out about the compiled losses.

    Attributes:
        mean_weights: `sum_i w_i / N` over the slice, of each loss that is a mean over weights or unmasked steps, with
            `N` the examples of the whole batch; a list of scalars. Slices add up to `m` of the batch.
        coupled: Names of the losses that return one number for the slice, or are known to couple examples; a list.
    """

    def __init__(self, place):
        self.place, self.mean_weights, self.coupled = place, [], []
        self.graph = slices.graph()

    def note(self, weights):
        """Note `sum_i w_i` of the next loss; return the divisor of its sum, or `None` if only the slice is known."""
        place, number = self.place, len(self.mean_weights)
        examples = tf.cast(place.examples, weights.dtype)
        mean = tf.math.divide_no_nan(weights, examples)
        self.mean_weights.append(mean if place.is_whole else place.weigh(mean))
        known = _all.get()
        return examples * trees.exactly(known[number], weights.dtype) if number < len(known) else None

    def add_coupled(self, losses):
        """Note, and on a slice warn of, the `keras.losses.Loss`es among these that couple examples by definition."""
        for name in [loss.name for loss in losses if _couples(loss)]:
            self.found_coupled(name)

    def found_coupled(self, name):
        """Note, and on a slice warn of, a loss by its name."""
        self.coupled.append(name)
        if not self.place.is_whole:
            slices.warn_of_coupled(name)


@contextlib.contextmanager
def over_all(mean_weights):
    """While open, each loss that is a mean over weights has this mean weight over all examples; a tuple of floats."""
    with keras_internals.holding(_all, mean_weights):
        yield


@contextlib.contextmanager
def finding(place, weighs_means):
    """While open, the losses of one evaluation at `place` are computed; yields its `Found`.

    `weighs_means`: whether Keras' means over the examples are weighted by the share of the slice.
    """
    place = dataclasses.replace(place, weighs_means=weighs_means)
    with slices.at(place), keras_internals.holding(_found, Found(place)) as found:
        yield found


def reduce(original, values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None):
    """Keras' `reduce_weighted_values` on a slice of the batch, or on a part of all examples."""
    found = _found.get()
    if found is None or found.graph is not slices.graph():  # within a function of the model's own
        return original(values, sample_weight, mask, reduction, dtype)
    values = keras.ops.convert_to_tensor(values, dtype)
    if not values.shape.rank:
        return _of_one_number(found, original(values, sample_weight, mask, reduction, dtype), sample_weight, mask)
    weights = _sum_of_weights(values, sample_weight, mask, reduction)
    divisor = None if weights is None else found.note(weights)
    if divisor is None:
        return original(values, sample_weight, mask, reduction, dtype)
    total = original(values, sample_weight, mask, "sum", dtype)
    return getattr(*replaced.SCALE_LOSS)(tf.math.divide_no_nan(total, tf.cast(divisor, total.dtype)))


def _of_one_number(found, loss, sample_weight, mask):
    """The loss of the slice by a loss that returns one number for it, weighted by its share."""
    if not found.place.weighs_means:  # a `compute_loss` of the model's own is weighted as a whole
        return loss
    found.found_coupled(tf.get_current_name_scope().split("/")[-1])  # Keras calls a loss in a name scope of its name
    # times weights or a mask it is several numbers, and Keras scales their mean
    is_unscaled = sample_weight is None and mask is None and not found.place.is_whole
    return found.place.weigh(loss) if is_unscaled else loss


def _sum_of_weights(values, sample_weight, mask, reduction):
    """What Keras divides the sum of the losses by, where it is a sum of weights or of unmasked steps; else `None`."""
    if reduction == MEAN_OF_WEIGHTS and not (sample_weight is None and mask is None):
        return tf.reduce_sum(keras_internals.with_mask(sample_weight, mask, values.dtype, reduction))
    if reduction in MEANS and mask is not None:
        of_values, of_mask = (tf.cast(tf.size(a), values.dtype) for a in (values, mask))
        return tf.reduce_sum(tf.cast(mask, values.dtype)) * tf.math.divide_no_nan(of_values, of_mask)
    return None


def _couples(loss):
    """Whether it is a loss of Keras that returns several numbers, each of which depends on several examples."""
    if isinstance(loss, keras.losses.Circle):
        return True
    axes = getattr(loss, "axis", None) if isinstance(loss, (keras.losses.Dice, keras.losses.Tversky)) else None
    return axes is not None and 0 in (axes if isinstance(axes, (list, tuple)) else [axes])
