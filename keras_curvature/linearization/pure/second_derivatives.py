"""Gradients of gradient operations that TensorFlow 2.21 lacks, or has wrong.

A curvature product differentiates a gradient. If TensorFlow computes the gradient of an operation by another operation,
such as `ResizeBicubicGrad`, that one needs a gradient too. Most of them are linear in the incoming gradient `g`:

    ResizeBicubicGrad(g) = R' g,        so its gradient is   u -> R u,   the resize itself.

`ADDED` has gradients for operations without any. Each function takes the operation and the gradients of its outputs, as
`tf.RegisterGradient` requires.

TensorFlow's tapes do not keep the inputs of an operation that is registered as not differentiable, so such a gradient
operation cannot get a derivative. For the forward operation `INSTEAD` has another gradient, with the same values and
with a derivative.
"""

import tensorflow as tf


def _attributes(op, *names):
    return {name: op.get_attr(name) for name in names}


def _text(attribute):
    return attribute.decode() if isinstance(attribute, bytes) else attribute


def _bilinear(op, g):
    """Gradient of `ResizeBilinear(images, size)`."""
    image, how = (
        tf.stop_gradient(op.inputs[0]),
        _attributes(op, "align_corners", "half_pixel_centers"),
    )

    @tf.custom_gradient
    def transposed(g):
        def again(u):
            return tf.raw_ops.ResizeBilinear(images=u, size=tf.shape(g)[1:3], **how)  # float32, as `g`

        # `stop_gradient`, because the tape must not differentiate the operation itself
        return tf.raw_ops.ResizeBilinearGrad(grads=tf.stop_gradient(g), original_image=image, **how), again

    return [transposed(g), None]


def _fake_quant_args(op, g):
    """Gradient of `FakeQuantWithMinMaxArgs(inputs)`: `g` for inputs within the range, else 0."""
    inputs, how = (
        op.inputs[0],
        _attributes(op, "min", "max", "num_bits", "narrow_range"),
    )
    inside = tf.raw_ops.FakeQuantWithMinMaxArgsGradient(gradients=tf.ones_like(inputs), inputs=inputs, **how)
    return g * tf.stop_gradient(inside)


def _fake_quant_vars(gradient, add):
    """Gradient of `FakeQuantWithMinMaxVars[PerChannel](inputs, min, max)`.

    It is `g` for inputs within the range, and for `min` and `max` the sum of `g` over the inputs beyond them.
    """

    def of_all(op, g):
        inputs, low, high = op.inputs
        how = _attributes(op, "num_bits", "narrow_range")
        inside = tf.stop_gradient(gradient(gradients=tf.ones_like(inputs), inputs=inputs, min=low, max=high, **how)[0])
        beyond = (1.0 - inside) * g
        below = inputs < 0.5 * (low + high)
        zero = tf.zeros_like(beyond)
        return [
            inside * g,
            add(tf.where(below, beyond, zero)),
            add(tf.where(below, zero, beyond)),
        ]

    return of_all


def _by_channel(values):
    return tf.reduce_sum(tf.reshape(values, [-1, tf.shape(values)[-1]]), 0)


def _resize(resize):
    """Gradient of `Resize...Grad(grads, ...)`: the resize."""

    def gradient(op, u):
        how = _attributes(op, "align_corners", "half_pixel_centers")
        return [resize(images=u, size=tf.shape(op.inputs[0])[1:3], **how), None]

    return gradient


def _scale_and_translate(op, u):
    """Gradient of `ScaleAndTranslateGrad(grads, image, scale, translation)`, of antialiased and Lanczos resizing."""
    grads, _, scale, translation = op.inputs
    again = tf.raw_ops.ScaleAndTranslate(
        images=u, size=tf.shape(grads)[1:3], scale=scale, translation=translation,
        kernel_type=_text(op.get_attr("kernel_type")), antialias=op.get_attr("antialias"),
    )  # fmt: skip
    return [tf.cast(again, grads.dtype), None, None, None]


def _crop_and_resize(op, u):
    """Gradient of `CropAndResizeGradImage(grads, boxes, box_ind, image_size)`: `<u, output> = <crop of u, grads>`."""
    grads, boxes, box_ind, _ = op.inputs
    method = _text(op.get_attr("method"))
    size = tf.shape(grads)[1:3]
    crop = tf.raw_ops.CropAndResize(image=u, boxes=boxes, box_ind=box_ind, crop_size=size, method=method)
    if method != "bilinear":  # "nearest" is piecewise constant in the boxes
        return [crop, None, None, None]
    of_boxes = tf.raw_ops.CropAndResizeGradBoxes(grads=grads, image=u, boxes=boxes, box_ind=box_ind)
    return [crop, of_boxes, None, None]


def _softsign(op, u):
    """Gradient of `SoftsignGrad(gradients, features) = gradients / (1 + |features|)^2`."""
    gradients, features = op.inputs
    of_gradients = u / tf.square(1.0 + tf.abs(features))
    return [
        of_gradients,
        -2.0 * tf.sign(features) * of_gradients * gradients / (1.0 + tf.abs(features)),
    ]


def _local_response_normalization(op, u):
    """Gradient of `LRNGrad(input_grads, input_image, output_image)`: `LRN` from basic operations, derived twice."""
    grads, image, _ = op.inputs
    radius, bias, alpha, beta = [op.get_attr(name) for name in ("depth_radius", "bias", "alpha", "beta")]
    with tf.GradientTape() as outer:
        outer.watch([grads, image])
        with tf.GradientTape() as inner:
            inner.watch(image)
            near = tf.linalg.band_part(tf.ones([tf.shape(image)[-1]] * 2, image.dtype), radius, radius)
            normalized = image * tf.pow(bias + alpha * tf.tensordot(tf.square(image), near, 1), -beta)
        gradient = inner.gradient(normalized, image, output_gradients=grads)
    return [*outer.gradient(gradient, [grads, image], output_gradients=u), None]


def _sparse_segment(reduce):
    """Gradient of `SparseSegment...Grad(grad, indices, segment_ids, output_dim0)`: the reduction of segments."""

    def gradient(op, u):
        grad, indices, segment_ids, _ = op.inputs
        rows = tf.shape(grad)[0]
        return [
            reduce(data=u, indices=indices, segment_ids=segment_ids, num_segments=rows),
            None,
            None,
            None,
        ]

    return gradient


def _fill_empty_rows(op, of_values, of_default):
    """Gradient of `SparseFillEmptyRowsGrad(reverse_index_map, grad_values)`: a gather, and the sum of the rest."""
    reverse_index_map, grad_values = op.inputs
    rest = tf.fill(tf.shape(grad_values), of_default)
    return [
        None,
        tf.tensor_scatter_nd_update(rest, reverse_index_map[:, tf.newaxis], of_values),
    ]


def _max_pool(again):
    """Gradient of `MaxPoolGrad(inputs, outputs, g)`: the entry of `u` at the largest input of each window.

    TensorFlow writes the result over `u` where both have the same shape, also while it still reads from `u`: with
    windows one step apart and padding. With the padding done before, the shapes differ.
    """

    def gradient(op, u):
        inputs, outputs, _ = op.inputs
        how = _attributes(op, "ksize", "strides", "padding", "data_format")
        padding, around = _text(how["padding"]), None
        if padding == "EXPLICIT":
            given = list(op.get_attr("explicit_paddings"))
            around = list(zip(given[::2], given[1::2]))
        elif padding == "SAME" and all(s == 1 or n == 1 for s, n in zip(how["strides"], inputs.shape)):
            around = [((k - 1) // 2, k // 2) for k in how["ksize"]]
        if around is not None:
            inputs = tf.pad(inputs, around, constant_values=tf.constant(-float("inf"), inputs.dtype))
            u, padding = tf.pad(u, around), "VALID"
        how |= {"padding": padding, "data_format": _text(how["data_format"])}
        found = again(orig_input=inputs, orig_output=outputs, grad=u, **how)
        return [tf.zeros_like(op.inputs[0]), tf.zeros_like(op.inputs[1]), found]

    return gradient


# For operations that are not in TensorFlow's gradient registry: differentiating them raises a `LookupError`.
ADDED = {
    "CropAndResizeGradImage": _crop_and_resize,
    "LRNGrad": _local_response_normalization,
    "RaggedFillEmptyRowsGrad": _fill_empty_rows,
    "ResizeBicubicGrad": _resize(tf.raw_ops.ResizeBicubic),
    "ResizeNearestNeighborGrad": _resize(tf.raw_ops.ResizeNearestNeighbor),
    "ScaleAndTranslateGrad": _scale_and_translate,
    "SoftsignGrad": _softsign,
    "SparseFillEmptyRowsGrad": _fill_empty_rows,
    "SparseSegmentMeanGrad": _sparse_segment(tf.raw_ops.SparseSegmentMeanWithNumSegments),
    "SparseSegmentSqrtNGrad": _sparse_segment(tf.raw_ops.SparseSegmentSqrtNWithNumSegments),
    "SparseSegmentSumGrad": _sparse_segment(tf.raw_ops.SparseSegmentSumWithNumSegments),
}

# For operations whose gradient operation is registered as not differentiable, or whose registered gradient is wrong.
INSTEAD = {
    "FakeQuantWithMinMaxArgs": _fake_quant_args,
    "FakeQuantWithMinMaxVars": _fake_quant_vars(tf.raw_ops.FakeQuantWithMinMaxVarsGradient, tf.reduce_sum),
    "FakeQuantWithMinMaxVarsPerChannel": _fake_quant_vars(
        tf.raw_ops.FakeQuantWithMinMaxVarsPerChannelGradient, _by_channel
    ),
    "MaxPool3DGrad": _max_pool(tf.raw_ops.MaxPool3DGradGrad),
    "MaxPoolGrad": _max_pool(tf.raw_ops.MaxPoolGradGrad),
    "ResizeBilinear": _bilinear,
}
