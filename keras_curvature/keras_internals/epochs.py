"""Private names of Keras' iterator over the steps of an epoch."""

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator

from keras_curvature.keras_internals.versions import HAS_LAST_STEPS


def batch_spec(epoch_iterator):
    """The spec of a batch, a nest of `tf.TensorSpec`; under a strategy, of one replica's share.

    Entries of the data that are `None` stay `None`; the data set has an empty `tf.experimental.Optional` for them.
    """

    def of_one_replica(spec):
        spec = spec._value_specs[0] if hasattr(spec, "_value_specs") else spec
        return None if isinstance(spec, tf.OptionalSpec) else spec

    return tf.nest.map_structure(of_one_replica, epoch_iterator._distributed_dataset.element_spec)


# `fit`: Keras does not tell callbacks when it fails.
FIT = (next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls)), "fit")
# The first iterator that `fit` makes is the one over its epochs.
NEW_ITERATOR = (TFEpochIterator, "__init__")
# The generator of `(first step, last step, iterator)` that `fit`, `evaluate` and `predict` loop over.
STEPS_OF_EPOCH = (TFEpochIterator, "_enumerate_iterator")


def changed_steps(steps, epoch_iterator, change):
    """What `STEPS_OF_EPOCH` yields, after `change` of a generator of `(first step, last step, iterator)`."""
    if HAS_LAST_STEPS:
        return change(steps)
    at_once = epoch_iterator.steps_per_execution
    return ((first, iterator) for first, _, iterator in change((a, a + at_once - 1, b) for a, b in steps))


def last_step(batch, model):
    """The last step of an execution, from the number that `on_train_batch_end` gets."""
    return batch if HAS_LAST_STEPS else batch + model.steps_per_execution - 1
