"""Convolutions as matrices: the kernel unrolled, on patches of the image; see `weights.py`."""

import math

import tensorflow as tf

from keras_curvature.linearization import windows
from keras_curvature.linearization.layers.weights import Weights, arranged


def convolution(layer):
    """The `Weights` of a `Conv1D`, `Conv2D` or `Conv3D`."""
    kernel, bias, g = layer.kernel, layer.bias if layer.use_bias else None, layer.groups
    *window, channels, filters = kernel.shape
    area = math.prod(window)
    if g == 1:
        return [ConvolutionWeights(layer, kernel, bias, (area * channels, filters))]
    size, split = (area * channels, filters // g), (area, channels, g, filters // g)
    return [ConvolutionWeights(layer, kernel, bias, size, groups=g, split=split, order=(2, 0, 1, 3))]


def depthwise(layer):
    """The `Weights` of a `DepthwiseConv1D` or `DepthwiseConv2D`."""
    *window, channels, multiplier = layer.kernel.shape
    area, bias = math.prod(window), layer.bias if layer.use_bias else None
    return [
        DepthwiseWeights(
            layer, layer.kernel, bias, (area, multiplier),
            groups=channels, split=(area, channels, multiplier), order=(1, 0, 2),
        )
    ]  # fmt: skip


class ConvolutionWeights(Weights):
    """The weights of `Conv1D`, `Conv2D`, `Conv3D`: a position is a patch of the image, flattened as the kernel."""

    def inputs(self, tap):
        unrolled = patches(self.layer, tap.inputs)  # (rows, *positions, entries of the window, channels)
        if self.groups is None:
            return arranged(unrolled, features=(-2, -1))
        unrolled = _split_last(unrolled, self.groups)
        return arranged(unrolled, groups=(-2,), features=(-3, -1))

    def slopes(self, tap, slope):
        slope = windows.channels_last(slope, self.layer.data_format)
        if self.groups is None:
            return arranged(slope, features=(-1,))
        return arranged(_split_last(slope, self.groups), groups=(-2,), features=(-1,))


class DepthwiseWeights(ConvolutionWeights):
    """The weights of `DepthwiseConv1D` and `DepthwiseConv2D`: each channel is a group."""

    def inputs(self, tap):
        return arranged(patches(self.layer, tap.inputs), groups=(-1,), features=(-2,))


def patches(layer, images):
    """The inputs of a convolution under its window at each position, `(rows, *positions, window, channels)`."""
    images = windows.channels_last(images, layer.data_format)
    found = windows.entries(images, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding)
    return tf.stack(found, axis=-2)


def _split_last(x, groups):
    """`(..., groups * n)` to `(..., groups, n)`."""
    return tf.reshape(x, tf.concat([tf.shape(x)[:-1], [groups, x.shape[-1] // groups]], 0))
