"""The weights of one layer as a matrix, and what its rows and columns saw and said.

Wherever a layer multiplies by its kernel, once or at many positions `t` (pixels, steps, heads), it computes

    s_t = W' a_t,      a_t (d_in [+ 1 for the bias]),      s_t (d_out),      dL/dW = sum_t a_t (dL/ds_t)'

A `Weights` knows, for one kind of layer, the matrix `W` of the kernel and bias, and how to read the `a_t` and the
slopes `dL/ds_t` off a tap (`taps.py`). All come in one form, `(groups, rows, positions, d)`: groups of channels that do
not mix have a matrix each (a depthwise convolution, the heads of an einsum); most layers have one group.
"""

import dataclasses
import math

import keras
import tensorflow as tf

from keras_curvature.curvature.taps import RECURRENT_CELLS, overridden

MATRIX, DIAGONAL = "matrix", "diagonal"


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Kernel and bias of a layer as one matrix `(d_in [+ 1], d_out)`, or one for each group.

    Attributes:
        layer: The layer that is tapped.
        kernel: Its variable; `None` where there is a bias alone.
        bias: Its variable, or `None`: the last row of the matrix.
        size: `(d_in, d_out)`, without the bias.
        groups: Number of groups; `None`, and no leading axis, where the layer has none.
        split: Shape to give the kernel before its axes are put in `order`.
        order: The kernel's axes: those of groups, of inputs, of outputs.
        bias_row: Which row of a bias of several rows is meant; `None` for a bias of one.
        kinds: Of the factors of inputs and of slopes, `"matrix"` or `"diagonal"`.
        sharing: How positions count, where this kind of layer leaves no choice (see `kronecker.py`); else `None`.
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
    sharing = None

    @property
    def variables(self):
        """Kernel and bias, those that there are."""
        return [v for v in (self.kernel, self.bias) if v is not None]

    @property
    def shape(self):
        """Of the matrix."""
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
        """A matrix to tensors shaped as `variables`; zeros in the rows of a bias that are not meant."""
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
        raise NotImplementedError

    def slopes(self, tap, slope):
        """The `dL/ds_t` of one call, `(groups, rows, positions, d_out)`, from the slope in what was said."""
        raise NotImplementedError


class DenseWeights(Weights):
    """Of `Dense`: every axis between the first and the last is of positions."""

    def inputs(self, tap):
        return arranged(tap.inputs, features=(-1,))

    def slopes(self, tap, slope):
        return arranged(slope, features=(-1,))


class ConvolutionWeights(Weights):
    """Of `Conv1D`, `Conv2D`, `Conv3D`: a position is a patch of the image, unrolled as the kernel is."""

    def inputs(self, tap):
        seen = patches(self.layer, tap.inputs)  # (rows, *positions, taps of the kernel, channels)
        if self.groups is None:
            return arranged(seen, features=(-2, -1))
        seen = _split_last(seen, self.groups)
        return arranged(seen, groups=(-2,), features=(-3, -1))

    def slopes(self, tap, slope):
        slope = _channels_last(self.layer, slope)
        if self.groups is None:
            return arranged(slope, features=(-1,))
        return arranged(_split_last(slope, self.groups), groups=(-2,), features=(-1,))


class DepthwiseWeights(ConvolutionWeights):
    """Of `DepthwiseConv1D`, `DepthwiseConv2D`: each channel is a group."""

    def inputs(self, tap):
        return arranged(patches(self.layer, tap.inputs), groups=(-1,), features=(-2,))


@dataclasses.dataclass(frozen=True, eq=False)
class EinsumWeights(Weights):
    """Of `EinsumDense`: axes that are summed over are inputs, axes of the kernel in the output alone are outputs.

    Attributes:
        of_inputs, of_outputs: Axes of the inputs and of the outputs: those of groups, positions and features.
    """

    of_inputs: tuple = ()
    of_outputs: tuple = ()

    def inputs(self, tap):
        groups, positions, features = self.of_inputs
        return arranged(tap.inputs, groups, features, positions)

    def slopes(self, tap, slope):
        groups, positions, features = self.of_outputs
        return arranged(slope, groups, features, positions)


class EmbeddingWeights(Weights):
    """Of `Embedding`: the input is a unit vector, given by the index of its 1, and the factor of inputs diagonal."""

    kinds = (DIAGONAL, MATRIX)
    sharing = "expand"  # a mean of unit vectors has no diagonal factor

    def inputs(self, tap):
        return arranged(tf.cast(tap.inputs, tf.int32)[..., tf.newaxis], features=(-1,))

    def slopes(self, tap, slope):
        return arranged(slope, features=(-1,))


class NormalizationWeights(Weights):
    """Scale and shift of a normalization: each channel is a group with the 2x2 block of its scale and shift, exact."""

    sharing = "exact"

    def inputs(self, tap):
        """What was scaled."""
        x = tap.inputs if self.kernel is None else _normalized(tap)
        x = arranged(x, groups=_axes(self.layer, x))
        return x[..., : self.size[0]]

    def slopes(self, tap, slope):
        return arranged(slope, groups=_axes(self.layer, slope))


@dataclasses.dataclass(frozen=True, eq=False)
class RecurrentWeights(Weights):
    """Of a recurrent layer, for the inputs or for the last state: every step is a position.

    Attributes:
        part: 0 for the weights of the inputs, 1 for those of the state.
    """

    part: int = 0

    def inputs(self, tap):
        return arranged(tap.inputs[self.part], features=(-1,))

    def slopes(self, tap, slope):
        width = self.size[1]
        begin = self.part * width if slope.shape[-1] > width else 0  # each part its own, where they are not added up
        return arranged(slope[..., begin : begin + width], features=(-1,))


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
    """Number of entries along some axes: an integer where the shape says so, else a tensor."""
    sizes = [x.shape[axis] for axis in axes]
    return math.prod(sizes) if None not in sizes else tf.reduce_prod(tf.gather(tf.shape(x), axes))


def patches(layer, images):
    """What each tap of the kernel of a convolution saw at each position, `(rows, *positions, taps, channels)`.

    Strided slices, one for each tap: the same for any number of dimensions, with dilation, compiled by XLA.
    """
    images = _channels_last(layer, images)
    cuts = [
        _axis(size if size is not None else tf.shape(images)[1 + i], *choices, layer.padding)
        for i, (size, *choices) in enumerate(
            zip(images.shape[1:-1], layer.kernel_size, layer.strides, layer.dilation_rate)
        )
    ]
    padded = tf.pad(images, [(0, 0), *[(before, after) for before, after, _, _ in cuts], (0, 0)])
    offsets = [[]]
    for _, _, _, starts in cuts:
        offsets = [[*offset, start] for offset in offsets for start in starts]
    seen = []
    for offset in offsets:
        window = [
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, (_, _, count, _), stride in zip(offset, cuts, layer.strides)
        ]
        seen.append(padded[(slice(None), *window)])
    return tf.stack(seen, axis=-2)


def _axis(size, taps, stride, dilation, padding):
    """`(zeros before, zeros after, positions, where each tap begins)` along one axis of a convolution."""
    reach = (taps - 1) * dilation + 1
    before = after = 0
    if padding == "same":
        needed = -(-size // stride) * stride - stride + reach - size
        needed = max(needed, 0) if isinstance(needed, int) else tf.maximum(needed, 0)
        before, after = needed // 2, needed - needed // 2
    elif padding == "causal":
        before = reach - 1
    return before, after, (size + before + after - reach) // stride + 1, [i * dilation for i in range(taps)]


def _channels_last(layer, x):
    if layer.data_format == "channels_last":
        return x
    return tf.transpose(x, [0, *range(2, x.shape.rank), 1])


def _split_last(x, groups):
    """`(..., groups * n)` to `(..., groups, n)`."""
    return tf.reshape(x, tf.concat([tf.shape(x)[:-1], [groups, x.shape[-1] // groups]], 0))


def weights_of(layer):
    """The `Weights` of a layer, a list; empty where the layer is of no kind that is known here."""
    for known, made in _KINDS:
        if _is(layer, known):
            return made(layer)
    return []


def _is(layer, known):
    """Whether `layer` computes what the class `known` computes: itself, or a subclass that has not changed `call`."""
    same = isinstance(layer, known) and type(layer).call is known.call
    plain = not getattr(layer, "lora_enabled", False) and getattr(layer, "quantization_mode", None) is None
    return same and plain


def _dense(layer):
    return [DenseWeights(layer, layer.kernel, layer.bias, tuple(layer.kernel.shape))]


def _convolution(layer):
    kernel, bias, g = layer.kernel, layer.bias if layer.use_bias else None, layer.groups
    *taps, channels, filters = kernel.shape
    taps = math.prod(taps)
    if g == 1:
        return [ConvolutionWeights(layer, kernel, bias, (taps * channels, filters))]
    size, split = (taps * channels, filters // g), (taps, channels, g, filters // g)
    return [ConvolutionWeights(layer, kernel, bias, size, groups=g, split=split, order=(2, 0, 1, 3))]


def _depthwise(layer):
    *taps, channels, multiplier = layer.kernel.shape
    taps, bias = math.prod(taps), layer.bias if layer.use_bias else None
    return [
        DepthwiseWeights(
            layer, layer.kernel, bias, (taps, multiplier),
            groups=channels, split=(taps, channels, multiplier), order=(1, 0, 2),
        )
    ]  # fmt: skip


def _einsum(layer):
    """Of `"input,kernel->output"`; nothing where an axis is in none of the parts that there are."""
    given, kernel, said = _equation(layer)
    together = given + kernel + said
    strange = any(together.count(c) == 1 or max(axes.count(c) for axes in (given, kernel, said)) > 1 for c in together)
    if strange or said[0] != given[0] or given[0] in kernel:
        return []
    groups = [c for c in said if c in kernel and c in given]
    positions = [c for c in said[1:] if c not in kernel]
    outputs = [c for c in said if c not in given]
    inputs = [c for c in kernel if c not in said]
    sizes = dict(zip(kernel, layer.kernel.shape))
    n_groups, d_in, d_out = (math.prod(sizes[c] for c in axes) for axes in (groups, inputs, outputs))
    biased = [c for c in said if c in (layer.bias_axes or "")] == [*groups, *outputs]
    return [
        EinsumWeights(
            layer, layer.kernel, layer.bias if biased else None, (d_in, d_out), groups=n_groups if groups else None,
            split=tuple(layer.kernel.shape), order=tuple(kernel.index(c) for c in (*groups, *inputs, *outputs)),
            of_inputs=tuple(tuple(given.index(c) for c in axes) for axes in (groups, positions, inputs)),
            of_outputs=tuple(tuple(said.index(c) for c in axes) for axes in (groups, positions, outputs)),
        )
    ]  # fmt: skip


def _equation(layer):
    """The axes of inputs, kernel and outputs as letters, with an ellipsis spelled out."""
    left, said = layer.equation.replace(" ", "").split("->")
    given, kernel = left.split(",")
    others = "".join(chr(ord("0") + i) for i in range(layer.input_spec.ndim - len(given.replace("...", ""))))
    return given.replace("...", others), kernel, said.replace("...", others)


def _embedding(layer):
    return [EmbeddingWeights(layer, layer.embeddings, None, tuple(layer.embeddings.shape))]


def _normalization(layer):
    if getattr(layer, "renorm", False) or getattr(layer, "synchronized", False) or getattr(layer, "rms_scaling", False):
        return []
    rms = isinstance(layer, keras.layers.RMSNormalization)
    scale, shift = (layer.scale, None) if rms else (layer.gamma, layer.beta)
    if scale is None and shift is None:
        return []
    channels = math.prod((shift if scale is None else scale).shape)
    return [NormalizationWeights(layer, scale, shift, (int(scale is not None), 1), groups=channels)]


def _axes(layer, x):
    """The axes that have a scale each."""
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return sorted(axis % x.shape.rank for axis in axes)


def _normalized(tap):
    """What a normalization scales and shifts, computed once more."""
    layer, x = tap.layer, tap.inputs
    if isinstance(layer, keras.layers.BatchNormalization):  # its call would move statistics
        x = _in_full_precision(x)
        of_batch = tap.options.get("training") and layer.trainable
        moving = (tf.cast(tf.convert_to_tensor(v), x.dtype) for v in (layer.moving_mean, layer.moving_variance))
        mean, variance = layer._moments(x, tap.options.get("mask")) if of_batch else moving
        return keras.ops.batch_normalization(x, mean, variance, layer.axis, epsilon=layer.epsilon)
    names = {"scale": None} if isinstance(layer, keras.layers.RMSNormalization) else {"gamma": None, "beta": None}
    if isinstance(layer, keras.layers.GroupNormalization):
        names = {"scale": False, "center": False}
    with overridden(layer, **names):
        return type(layer).call(layer, x)


def _in_full_precision(x):
    return x if x.dtype.size >= 4 else tf.cast(x, tf.float32)


def _recurrent(layer):
    cell = layer.cell
    if type(cell) not in RECURRENT_CELLS or layer.zero_output_for_mask:
        return []
    if getattr(cell, "implementation", 2) != 2:  # a mask for each gate
        return []
    kernel, recurrent, bias = cell.kernel, cell.recurrent_kernel, cell.bias
    after = getattr(cell, "reset_after", False)
    of_inputs = RecurrentWeights(layer, kernel, bias, tuple(kernel.shape), bias_row=0 if after else None)
    of_state = RecurrentWeights(
        layer, recurrent, bias if after else None, tuple(recurrent.shape), bias_row=1 if after else None, part=1
    )
    # a reset gate that comes first: what the last of the gates multiplies is no state, and is not seen
    return [of_inputs] if type(cell) is keras.layers.GRUCell and not after else [of_inputs, of_state]


_KINDS = [
    (keras.layers.Dense, _dense),
    (keras.layers.Conv1D, _convolution),
    (keras.layers.Conv2D, _convolution),
    (keras.layers.Conv3D, _convolution),
    (keras.layers.DepthwiseConv1D, _depthwise),
    (keras.layers.DepthwiseConv2D, _depthwise),
    (keras.layers.EinsumDense, _einsum),
    (keras.layers.Embedding, _embedding),
    *[(getattr(keras.layers, f"{kind}Normalization"), _normalization) for kind in ("Batch", "Layer", "Group", "RMS")],
    *[(getattr(keras.layers, kind), _recurrent) for kind in ("SimpleRNN", "LSTM", "GRU", "RNN")],
]
