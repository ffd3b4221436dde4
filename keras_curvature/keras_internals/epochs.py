"""Private names of Keras' iterator over the steps of an epoch."""

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator


def batch_spec(epoch_iterator):
    """The spec of the batches of an epoch, a nest of `tf.TensorSpec`; under a strategy, of one replica's.

    `None` where the data have `None`, which stands in the data set as an empty `tf.experimental.Optional`.
    """

    def of_one_replica(spec):
        spec = spec._value_specs[0] if hasattr(spec, "_value_specs") else spec
        return None if isinstance(spec, tf.OptionalSpec) else spec

    return tf.nest.map_structure(of_one_replica, epoch_iterator._distributed_dataset.element_spec)


# `fit`, of which callbacks do not learn that it has failed.
FIT = (next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls)), "fit")
# Its iterator over the epochs is made first.
NEW_ITERATOR = (TFEpochIterator, "__init__")
# The generator of `(first step, last step, iterator)` that `fit`, `evaluate` and `predict` loop over.
STEPS_OF_EPOCH = (TFEpochIterator, "_enumerate_iterator")
