"""The weights of one layer as a matrix, with the inputs of its rows and the slopes of its columns.

Wherever a layer multiplies by its kernel, once or at many positions `t` (pixels, steps, heads), it computes

    s_t = W' a_t,      a_t (d_in [+ 1 for the bias]),      s_t (d_out),      dL/dW = sum_t a_t (dL/ds_t)'

For one kind of layer, a `Weights` arranges kernel and bias as the matrix `W`, and reads the `a_t` and the slopes
`dL/ds_t` off a tap (`taps.py`). All have the form `(groups, rows, positions, d)`. Groups of channels that do not mix
have a matrix each (a depthwise convolution, the heads of an einsum); most layers have one group.
"""

import dataclasses
import math
from typing import ClassVar

import keras
import tensorflow as tf

MATRIX, DIAGONAL = "matrix", "diagonal"


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Kernel and bias of a layer as one matrix `(d_in [+ 1], d_out)`, or one for each group.

    Attributes:
        layer: The layer that is tapped.
        kernel: Its variable; `None` for a layer with only a bias.
        bias: Its variable, or `None`: the last row of the matrix.
        size: `(d_in, d_out)`, without the bias.
        groups: Number of groups; `None`, without a leading axis, if the layer has no groups.
        split: Shape to give the kernel before its axes are put in `order`.
        order: The kernel's axes: first groups, then inputs, then outputs.
        bias_row: The row of the bias that belongs to this kernel, for a bias of several rows; else `None`.
        kinds: Of the factors of inputs and of slopes, `"matrix"` or `"diagonal"`.
        sharing: How positions count, if this kind of layer fixes it (see `kronecker.py`); else `None`.
    """

    layer: keras.layers.Layer
    kernel: object
    bias: object
    size: tuple
    groups: object = None
    split: tuple = ()
    order: tuple = ()
    bias_row: object = None
    kinds = (MATRIX, MATRIX)
    sharing: ClassVar[str | None] = None

    @property
    def variables(self):
        """The kernel and the bias, without `None`."""
        return [v for v in (self.kernel, self.bias) if v is not None]

    @property
    def shape(self):
        """The shape of the matrix."""
        d_in, d_out = self.size
        return (*self._leading, d_in + (self.bias is not None), d_out)

    @property
    def _leading(self):
        return () if self.groups is None else (self.groups,)

    def matrix(self, tensors):
        """Tensors shaped as `variables` to a matrix."""
        rows, tensors = [], list(tensors)
        if self.kernel is not None:
            kernel = tensors.pop(0)
            kernel = tf.transpose(tf.reshape(kernel, self.split), self.order) if self.order else kernel
            rows.append(tf.reshape(kernel, (*self._leading, *self.size)))
        if self.bias is not None:
            bias = tensors.pop() if self.bias_row is None else tensors.pop()[self.bias_row]
            rows.append(tf.reshape(bias, (*self._leading, 1, self.size[1])))
        return rows[0] if len(rows) == 1 else tf.concat(rows, -2)

    def tensors(self, matrix):
        """A matrix to tensors shaped as `variables`; zeros in the other rows of a bias of several rows."""
        found, d_in = [], self.size[0]
        if self.kernel is not None:
            kernel = matrix[..., :d_in, :]
            if self.order:
                kernel = tf.reshape(kernel, [self.split[axis] for axis in self.order])
                kernel = tf.transpose(kernel, [self.order.index(axis) for axis in range(len(self.order))])
            found.append(tf.reshape(kernel, self.kernel.shape))
        if self.bias is not None:
            bias = matrix[..., d_in:, :]
            if self.bias_row is not None:
                bias = tf.tensor_scatter_nd_update(
                    tf.zeros(self.bias.shape, bias.dtype), [[self.bias_row]], tf.reshape(bias, (1, -1))
                )
            found.append(tf.reshape(bias, self.bias.shape))
        return found

    def inputs(self, tap):
        """The `a_t` of one call, without the 1 of the bias, `(groups, rows, positions, d_in)`."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `inputs(tap)`.")

    def slopes(self, tap, slope):
        """The `dL/ds_t` of one call, `(groups, rows, positions, d_out)`, from the slope in the pre-activation."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `slopes(tap, slope)`.")


def arranged(x, groups=(), features=(), positions=None):
    """`x` with its axes put together as `(groups, rows, positions, features)`; rows are axis 0, positions the rest."""
    rank = x.shape.rank
    groups, features = ([axis % rank for axis in axes] for axes in (groups, features))
    if positions is None:
        positions = [axis for axis in range(1, rank) if axis not in (*groups, *features)]
    order = [*groups, 0, *positions, *features]
    sizes = [product(x, axes) for axes in (groups, [0], positions, features)]
    return tf.reshape(x if order == list(range(rank)) else tf.transpose(x, order), sizes)


def product(x, axes):
    """Number of entries along some axes: an integer if the shape is known, else a tensor."""
    sizes = [x.shape[axis] for axis in axes]
    return math.prod(sizes) if None not in sizes else tf.reduce_prod(tf.gather(tf.shape(x), axes))
