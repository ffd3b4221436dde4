"""A memory of several vectors: one variable `(rows, *shape)` for each weight, whose rows are assigned in place."""

import dataclasses

import keras
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.typing import Variables


def add_rows(optimizer: keras.Optimizer, variables: Variables, rows: int, name: str) -> Variables:
    """New variables of an optimizer, each with `rows` times the shape of one of `variables`; all zero."""
    return [
        optimizer.add_variable(
            (rows, *v.shape), dtype=trees.wide(v.dtype).name, name=f"{v.path.replace('/', '_')}_{name}",
            aggregation="none",
        ) for v in variables
    ]  # fmt: skip


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
