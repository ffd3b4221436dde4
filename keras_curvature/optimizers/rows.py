"""A memory of several vectors: one variable `(rows, *shape)` for each weight, whose rows are assigned in place.

Once a row was assigned TensorFlow copies the whole variable whenever it is read, until it is told not to.
"""

import dataclasses

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.typing import Variables, Vector


def add_rows(optimizer: keras.Optimizer, variables: Variables, rows: int, name: str) -> Variables:
    """New variables of an optimizer, each with `rows` times the shape of one of `variables`; all zero."""
    return [
        optimizer.add_variable(
            (rows, *v.shape), dtype=trees.wide(v.dtype).name, name=f"{v.path.replace('/', '_')}_{name}",
            aggregation="none",
        ) for v in variables
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows `indices`, integer scalar tensors, of variables of `add_rows`; `remember` takes it for a variable.

    Args:
        variables: The variables.
        indices: A list of integer scalar tensors.
        when: Whether to assign, a boolean scalar tensor. Defaults to always. Let it depend on all that is computed from
            the rows: TensorFlow copies the whole variable if it is written while it is read.
    """

    variables: Variables
    indices: list[tf.Tensor]
    when: tf.Tensor | None = None

    def assign(self, vectors: list[Vector]) -> None:
        """Assign a vector to each of the rows, on every replica."""

        def assign():
            for vector, index in zip(vectors, self.indices, strict=True):
                for variable, value in zip(self.variables, vector, strict=True):
                    replicas.on_each_copy(variable.value, _scatter, index, value)

        if self.when is None:
            assign()
        else:
            tf.cond(self.when, assign, lambda: None)


def _scatter(variable, index, value):
    """Assign one row of this device's copy."""
    updates = tf.cast(value, variable.dtype)[None]
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=index[None], updates=updates)
    if not keras_internals.is_compiled():
        tf.raw_ops.DisableCopyOnRead(resource=variable.handle)
