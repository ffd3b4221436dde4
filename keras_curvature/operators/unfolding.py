"""Kernels as matrices: which axes of a tensor are the rows of its matrix, from the shape alone.

A matrix has the inputs of a layer in its rows and the outputs in its columns, as in Keras' `Dense`. A kernel of four
or more axes is a convolution's, `(height, width, in, out)`: the last axis is the columns. Of three axes, the middle one
may belong to either side: `MultiHeadAttention` has `(in, heads, out)` and `(heads, in, out)`, `Conv1D`
`(width, in, out)`. It goes where the matrix is nearer to square. This is right for attention whose heads together are
as wide as the model.
"""

import dataclasses
import math

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Unfolding:
    """How a tensor becomes a matrix, or one matrix for each head.

    Args:
        shape: The shape of the tensor, two axes or more, none of length 1.
        per_head: Whether the middle axis of a tensor of three axes counts matrices of their own. For a `Conv1D` kernel
            that is its width, or the axis of its inputs. Defaults to `False`.
    """

    shape: tuple
    per_head: bool = False

    @property
    def heads(self):
        """The axis that counts the matrices, or `None`."""
        return (1 if self._split == 1 else 0) if self.per_head and len(self.shape) == 3 else None

    @property
    def size(self):
        """`(rows, columns)` of each matrix."""
        if self.heads is not None:
            return tuple(n for axis, n in enumerate(self.shape) if axis != self.heads)
        return math.prod(self.shape[: self._split]), math.prod(self.shape[self._split :])

    @property
    def stacked(self):
        """The shape of the matrix, or of all of them."""
        return self.size if self.heads is None else (self.shape[self.heads], *self.size)

    def matrix(self, tensor):
        """The matrix `(rows, columns)`, or the matrices `(heads, rows, columns)`."""
        if self.heads is None:
            return tf.reshape(tensor, self.size)
        return tf.transpose(tensor, [1, 0, 2]) if self.heads else tensor

    def tensor(self, matrix):
        """The inverse of `matrix`."""
        if self.heads is None:
            return tf.reshape(matrix, self.shape)
        return tf.transpose(matrix, [1, 0, 2]) if self.heads else matrix

    @property
    def _split(self):
        """The number of axes in the rows."""
        if len(self.shape) != 3:
            return len(self.shape) - 1
        first, middle, last = self.shape
        return 1 if _aspect(first, middle * last) < _aspect(first * middle, last) else 2


def _aspect(rows, columns):
    return max(rows, columns) / min(rows, columns)
