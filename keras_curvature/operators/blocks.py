"""Variables as blocks: tensors with few axes, each short enough for a matrix."""

import dataclasses
import math

import tensorflow as tf

from keras_curvature.operators import axes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a list of variables is cut up: small neighbouring axes merged first, then blocks along every axis.

    A variable without an entry has no block.

    Args:
        variables: Shapes of the variables, a list of tuples.
        merge: Longest axis that is made of several, an integer.
        size: Longest side of a block, an integer, or `None` for whole variables.
    """

    variables: list
    merge: int
    size: int | None = None

    @property
    def shapes(self):
        """The shapes of all blocks, variable by variable."""
        found = []
        for shape in self._merged():
            rows = [()]
            for length in shape:
                rows = [(*row, part) for row in rows for part in axes.cut(length, self.size or length)]
            found += rows
        return found

    @property
    def origins(self):
        """For each block, the shape that it was cut from."""
        found = []
        for shape in self._merged():
            found += [shape] * self._parts(shape)
        return found

    def split(self, vector):
        """The blocks of a list of tensors, one list."""
        blocks = []
        full = [tensor for tensor in vector if 0 not in tensor.shape]
        for tensor, shape in zip(full, self._merged(), strict=True):
            blocks += axes.split(tf.reshape(tensor, shape), self.size or max(shape))
        return blocks

    def join(self, blocks):
        """The list of tensors from their blocks, the inverse of `split`."""
        vector, blocks, merged = [], list(blocks), iter(self._merged())
        for whole in self.variables:
            if 0 in whole:
                vector.append(tf.zeros(whole))
                continue
            shape = next(merged)
            parts = self._parts(shape)
            tensor, blocks = axes.join(blocks[:parts], shape, self.size or max(shape)), blocks[parts:]
            vector.append(tf.reshape(tensor, whole))
        return vector

    def _parts(self, shape):
        return math.prod(len(axes.cut(length, self.size or length)) for length in shape)

    def _merged(self):
        return [axes.merged_shape(shape, self.merge) for shape in self.variables if 0 not in shape]
