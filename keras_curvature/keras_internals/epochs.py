"""Private names of Keras' iterator over the steps of an epoch."""

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TFEpochIterator


def batch_spec(epoch_iterator):
    """The spec of the batches of an epoch, a nest of `tf.TensorSpec`; under a strategy, of one replica's."""
    spec = epoch_iterator._distributed_dataset.element_spec
    return tf.nest.map_structure(lambda s: s._value_specs[0] if hasattr(s, "_value_specs") else s, spec)


# The generator of `(first step, last step, iterator)` that `fit`, `evaluate` and `predict` loop over.
STEPS_OF_EPOCH = (TFEpochIterator, "_enumerate_iterator")
