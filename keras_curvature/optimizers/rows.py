"""A row of a variable, assigned in place: the rest of a memory of many vectors is not copied."""

import dataclasses

import keras
import tensorflow as tf

from keras_curvature import replicas


@dataclasses.dataclass(frozen=True)
class Row:
    """Row `index`, an integer scalar tensor, of a variable `(rows, ...)`; `remember` takes it for a variable."""

    variable: keras.Variable
    index: tf.Tensor

    def read(self) -> tf.Tensor:
        """The row."""
        return tf.gather(self.variable.value, self.index)

    def assign(self, value: tf.Tensor) -> None:
        """Assign the row, on every replica."""
        replicas.on_each_copy(self.variable.value, _scatter, self.index, value)


def _scatter(variable, index, value):
    """Assign one row of this device's copy."""
    updates = tf.cast(value, variable.dtype)[None]
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=index[None], updates=updates)
