"""The supported layer classes, with their weights as matrices; see `weights.py`."""

import dataclasses
import math

import keras
import tensorflow as tf

from keras_curvature import keras_internals, trees
from keras_curvature.keras_internals import twin
from keras_curvature.linearization.layers.convolutions import convolution, depthwise
from keras_curvature.linearization.layers.taps import RECURRENT_CELLS
from keras_curvature.linearization.layers.weights import DIAGONAL, MATRIX, Weights, arranged


def weights_of(layer):
    """The `Weights` of a layer, a list; empty if the layer is not supported."""
    for known, made in _KINDS:
        if _is(layer, known):
            return made(layer)
    return []


def known_class(layer):
    """The supported class of which `layer` is an instance, or `None`."""
    return next((known for known, _ in _KINDS if isinstance(layer, known)), None)


def _is(layer, known):
    """Whether `layer` computes what `known` does: an instance without its own `call`, LoRA and quantization."""
    same = isinstance(layer, known) and type(layer).call is known.call and "call" not in vars(layer)
    plain = not getattr(layer, "lora_enabled", False) and getattr(layer, "quantization_mode", None) is None
    return same and plain


class DenseWeights(Weights):
    """The weights of `Dense`: all axes between the first and the last are positions."""

    def inputs(self, tap):
        return arranged(tap.inputs, features=(-1,))

    def slopes(self, tap, slope):
        return arranged(slope, features=(-1,))


def _dense(layer):
    return [DenseWeights(layer, layer.kernel, layer.bias, tuple(layer.kernel.shape))]


@dataclasses.dataclass(frozen=True, eq=False)
class EinsumWeights(Weights):
    """The weights of `EinsumDense`.

    The kernel's axes are groups if they are in the input and the output, input features if they are in the input only,
    and output features if they are in the output only.

    Attributes:
        of_inputs: The axes of the input that are groups, positions and features, a tuple of three tuples.
        of_outputs: The axes of the output, likewise.
    """

    of_inputs: tuple = ()
    of_outputs: tuple = ()

    def inputs(self, tap):
        groups, positions, features = self.of_inputs
        return arranged(tap.inputs, groups, features, positions)

    def slopes(self, tap, slope):
        groups, positions, features = self.of_outputs
        return arranged(slope, groups, features, positions)


def _einsum(layer):
    """For `"input,kernel->output"`; empty if an axis is neither a group, a position, an input nor an output."""
    given, kernel, output = _equation(layer)
    together = given + kernel + output
    repeated = any(axes.count(c) > 1 for axes in (given, kernel, output) for c in axes)
    strange = repeated or any(together.count(c) == 1 for c in together)
    if strange or output[0] != given[0] or given[0] in kernel:
        return []
    groups = [c for c in output if c in kernel and c in given]
    positions = [c for c in output[1:] if c not in kernel]
    outputs = [c for c in output if c not in given]
    inputs = [c for c in kernel if c not in output]
    sizes = dict(zip(kernel, layer.kernel.shape))
    n_groups, d_in, d_out = (math.prod(sizes[c] for c in axes) for axes in (groups, inputs, outputs))
    biased = [c for c in output if c in (layer.bias_axes or "")] == [*groups, *outputs]
    return [
        EinsumWeights(
            layer, layer.kernel, layer.bias if biased else None, (d_in, d_out), groups=n_groups if groups else None,
            split=tuple(layer.kernel.shape), order=tuple(kernel.index(c) for c in (*groups, *inputs, *outputs)),
            of_inputs=tuple(tuple(given.index(c) for c in axes) for axes in (groups, positions, inputs)),
            of_outputs=tuple(tuple(output.index(c) for c in axes) for axes in (groups, positions, outputs)),
        )
    ]  # fmt: skip


def _equation(layer):
    """The axes of input, kernel and output as letters, with digits for the axes of an ellipsis."""
    left, output = layer.equation.replace(" ", "").split("->")
    given, kernel = left.split(",")
    others = "".join(chr(ord("0") + i) for i in range(layer.input_spec.ndim - len(given.replace("...", ""))))
    return given.replace("...", others), kernel, output.replace("...", others)


class EmbeddingWeights(Weights):
    """The weights of `Embedding`: inputs are one-hot vectors, given by their indices, so their factor is diagonal."""

    kinds = (DIAGONAL, MATRIX)
    sharing = "expand"  # the factor of averaged one-hot vectors is not diagonal

    def inputs(self, tap):
        return arranged(tf.cast(tap.inputs, tf.int32)[..., tf.newaxis], features=(-1,))

    def slopes(self, tap, slope):
        return arranged(slope, features=(-1,))


def _embedding(layer):
    return [EmbeddingWeights(layer, layer.embeddings, None, tuple(layer.embeddings.shape))]


class NormalizationWeights(Weights):
    """Scale and shift of a normalization: each channel is a group with an exact 2x2 block."""

    sharing = "exact"

    def inputs(self, tap):
        """The normalized inputs: the scale multiplies them."""
        x = tap.inputs if self.kernel is None else _normalized(tap)
        x = arranged(x, groups=_axes(self.layer, x))
        return x[..., : self.size[0]]

    def slopes(self, tap, slope):
        return arranged(slope, groups=_axes(self.layer, slope))


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
    """The axes of the scale."""
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return sorted(axis % x.shape.rank for axis in axes)


def _normalized(tap):
    """The normalized inputs, computed again."""
    layer, x = tap.layer, tap.inputs
    if isinstance(layer, keras.layers.BatchNormalization):  # its call would update the moving statistics
        x = trees.full_precision(x)
        of_batch = tap.options.get("training") and layer.trainable
        moving = (tf.cast(tf.convert_to_tensor(v), x.dtype) for v in (layer.moving_mean, layer.moving_variance))
        mean, variance = keras_internals.batch_moments(layer, x, tap.options.get("mask")) if of_batch else moving
        return keras.ops.batch_normalization(x, mean, variance, layer.axis, epsilon=layer.epsilon)
    names = {"gamma": None, "beta": None}
    if isinstance(layer, keras.layers.RMSNormalization):  # Keras 3.10 cannot do without a scale
        names = {"scale": tf.ones(layer.scale.shape, layer.compute_dtype)}
    if isinstance(layer, keras.layers.GroupNormalization):
        names = {"scale": False, "center": False}
    return twin(layer, **names).call(x)


@dataclasses.dataclass(frozen=True, eq=False)
class RecurrentWeights(Weights):
    """The weights of a recurrent layer for its inputs or for its state: every time step is a position.

    Attributes:
        part: 0 for the weights of the inputs, 1 for those of the state.
    """

    part: int = 0

    def inputs(self, tap):
        return arranged(tap.inputs[self.part], features=(-1,))

    def slopes(self, tap, slope):
        width = self.size[1]
        begin = self.part * width if slope.shape[-1] > width else 0  # if they are not summed
        return arranged(slope[..., begin : begin + width], features=(-1,))


def _recurrent(layer):
    cell = layer.cell
    if type(cell) not in RECURRENT_CELLS or layer.zero_output_for_mask:
        return []
    if getattr(cell, "implementation", 2) != 2:  # dropout masks for each gate
        return []
    kernel, recurrent, bias = cell.kernel, cell.recurrent_kernel, cell.bias
    after = getattr(cell, "reset_after", False)
    of_inputs = RecurrentWeights(layer, kernel, bias, tuple(kernel.shape), bias_row=0 if after else None)
    of_state = RecurrentWeights(
        layer, recurrent, bias if after else None, tuple(recurrent.shape), bias_row=1 if after else None, part=1
    )
    # with the reset gate first, the recurrent kernel multiplies the reset state, which is not recorded
    return [of_inputs] if type(cell) is keras.layers.GRUCell and not after else [of_inputs, of_state]


_KINDS = [
    (keras.layers.Dense, _dense),
    (keras.layers.Conv1D, convolution),
    (keras.layers.Conv2D, convolution),
    (keras.layers.Conv3D, convolution),
    (keras.layers.DepthwiseConv1D, depthwise),
    (keras.layers.DepthwiseConv2D, depthwise),
    (keras.layers.EinsumDense, _einsum),
    (keras.layers.Embedding, _embedding),
    *[(getattr(keras.layers, f"{kind}Normalization"), _normalization) for kind in ("Batch", "Layer", "Group", "RMS")],
    *[(getattr(keras.layers, kind), _recurrent) for kind in ("SimpleRNN", "LSTM", "GRU", "RNN")],
]
