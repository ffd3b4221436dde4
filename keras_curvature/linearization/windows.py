"""An image under the window of a convolution or of a pooling layer, at each of its positions."""

import itertools

import tensorflow as tf


def entries(images, window, strides, dilation, padding, fill=0.0):
    """What each entry of a window meets: a list of tensors `(rows, *positions, channels)`, one for each entry.

    Strided slices work for any number of dimensions, with dilation, under XLA, and can be differentiated as often as
    needed.

    Args:
        images: `(rows, *sizes, channels)`.
        window, strides, dilation: One integer for each axis of the image.
        padding: `"valid"`, `"same"` or `"causal"`.
        fill: What stands outside of the image.
    """
    cuts = [
        _axis(size if size is not None else tf.shape(images)[1 + i], *choices, padding)
        for i, (size, *choices) in enumerate(zip(images.shape[1:-1], window, strides, dilation))
    ]
    around = [(0, 0), *[(before, after) for before, after, _, _ in cuts], (0, 0)]
    padded = tf.pad(images, around, constant_values=fill)
    found = []
    for offset in itertools.product(*(starts for _, _, _, starts in cuts)):
        places = [
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, (_, _, count, _), stride in zip(offset, cuts, strides)
        ]
        found.append(padded[(slice(None), *places)])
    return found


def _axis(size, length, stride, dilation, padding):
    """`(entries before, entries after, positions, where each entry of the window begins)`, along one axis."""
    reach = (length - 1) * dilation + 1
    before = after = 0
    if padding == "same":
        needed = -(-size // stride) * stride - stride + reach - size
        needed = max(needed, 0) if isinstance(needed, int) else tf.maximum(needed, 0)
        before, after = needed // 2, needed - needed // 2
    elif padding == "causal":
        before = reach - 1
    return before, after, (size + before + after - reach) // stride + 1, [i * dilation for i in range(length)]


def channels_last(x, data_format):
    """`x` with its channels in the last axis."""
    return x if data_format == "channels_last" else tf.transpose(x, [0, *range(2, x.shape.rank), 1])


def laid_out(x, data_format):
    """The inverse of `channels_last`."""
    return x if data_format == "channels_last" else tf.transpose(x, [0, x.shape.rank - 1, *range(1, x.shape.rank - 1)])
