"""Max pooling with derivatives of derivatives that are cheap, and that XLA has in every precision.

TensorFlow's forward mode is `MaxPoolGradGrad`. It takes 2-5 times as long as a forward pass. XLA has it in float32
alone, so a model in `mixed_bfloat16` would not compile.
"""

import keras
import tensorflow as tf

from keras_curvature import keras_internals
from keras_curvature.linearization import windows


def max_pool(original, inputs, pool_size, strides, padding, data_format):
    """Keras' max pooling; `original` is Keras' own, and the other arguments are its.

    * Adjacent windows of images: the output tangent is the input tangent at each window's maximum.
    * Other windows under XLA: the entries of a window are compared one by one, which XLA makes one loop. Without XLA
      that would take 18 times as long as `MaxPoolGradGrad` on a CPU.
    """
    dimensions, data_format = inputs.shape.rank - 2, data_format or keras.config.image_data_format()
    size = (pool_size,) * dimensions if isinstance(pool_size, int) else tuple(pool_size)
    step = size if strides is None else (strides,) * dimensions if isinstance(strides, int) else tuple(strides)
    if data_format == "channels_last" and dimensions == 2 and size == step and padding == "valid":
        return _adjacent(inputs, size)
    if not keras_internals.is_compiled():
        return original(inputs, pool_size, strides, padding, data_format)
    outputs = _compared(windows.channels_last(inputs, data_format), size, step, padding)
    return windows.laid_out(outputs, data_format)


def _adjacent(inputs, size):
    """Max pooling of images with adjacent windows of this size."""
    window = {"ksize": [1, *size, 1], "strides": [1, *size, 1], "padding": "VALID"}

    @tf.custom_gradient
    def pool(x):
        y = tf.raw_ops.MaxPool(input=x, **window)
        largest = tf.stop_gradient(
            tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=tf.ones_like(y), **window)
        )

        def gradient(dy):
            mean = tf.raw_ops.AvgPoolGrad(orig_input_shape=tf.shape(x), grad=dy, **window)
            return largest * (float(size[0] * size[1]) * mean)

        return y, gradient

    return pool(inputs)


def _compared(images, size, step, padding):
    """Max pooling as a choice between the entries of each window; of equal ones the first, as in TensorFlow."""
    first, *others = windows.entries(images, size, step, (1,) * len(size), padding, fill=-float("inf"))
    largest, place = tf.stop_gradient(first), tf.zeros_like(first, "int32")
    for i, entry in enumerate(map(tf.stop_gradient, others), start=1):
        larger = (entry > largest) | tf.math.is_nan(entry)  # NaN wins, so that a loss is NaN where Keras' would be
        largest, place = tf.where(larger, entry, largest), tf.where(larger, i, place)
    chosen = first
    for i, entry in enumerate(others, start=1):
        chosen = tf.where(place == i, entry, chosen)
    return chosen
