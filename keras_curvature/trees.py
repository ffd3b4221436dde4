"""Vectors in weight space: lists of tensors, one per trainable variable, in the model's order.

A vector is a list as `tape.gradient` returns it, not flattened and without a class. These functions are the package's
arithmetic on vectors.
"""

import functools

import tensorflow as tf

from keras_curvature import keras_internals

# An inner product of more entries than `PIECE` is a sum of products of matrices of so many each, but not of less than
# `SHORT`. TensorFlow's kernel adds the entries of one product one after the other: at 10^8 entries in float32 the error
# of a single one is 0.3 %, of pieces 5e-8.
SHORT, PIECE = 2**10, 2**14


def scalar_dtype(vector):
    """The dtype of inner products: float64 for float64 vectors, else float32 (never bfloat16 or float16)."""
    return tf.float64 if any(a.dtype == tf.float64 for a in vector) else tf.float32


def rounds_products():
    """Whether products of matrices may be rounded to TF32 or bfloat16: on any device but CPUs."""
    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def sums_products():
    """Whether an inner product is to be a sum of products: where products of matrices may be rounded, and under XLA.

    XLA computes such a sum without the products in memory, and the program may be for another device than those here.
    """
    return keras_internals.is_compiled() or rounds_products()


def dot(u, v):
    """Inner product `<u, v>`, a scalar of `scalar_dtype(u)`."""
    dtype = scalar_dtype(u)
    return tf.add_n([_dot(tf.cast(a, dtype), tf.cast(b, dtype)) for a, b in zip(u, v)])


def _dot(a, b):
    """Inner product of two tensors.

    By products of matrices a long one takes a third of the time, and no memory.
    """
    size = piece(a.shape.num_elements() or 0)
    if size is None or sums_products():
        return tf.reduce_sum(a * b)
    return tf.reduce_sum(tf.matmul(tf.reshape(a, [-1, 1, size]), tf.reshape(b, [-1, 1, size]), transpose_b=True))


@functools.cache
def piece(count):
    """The largest divisor of `count` that is at most `PIECE`; `None` for a short vector, or if it is below `SHORT`."""
    pieces = range(-(-count // PIECE), count // SHORT + 1) if count > PIECE else ()
    return next((count // n for n in pieces if count % n == 0), None)


def squared_norm(v):
    """`<v, v>`, in one pass over the memory."""
    dtype = scalar_dtype(v)
    return 2.0 * tf.add_n([tf.nn.l2_loss(tf.cast(a, dtype)) for a in v])


def norm(v):
    """Euclidean norm of the whole vector, a scalar."""
    return tf.sqrt(squared_norm(v))


def add(u, v, scale=1.0):
    """`u + scale * v`."""
    if isinstance(scale, float) and scale == 1.0:
        return [a + b for a, b in zip(u, v)]
    return [a + exactly(scale, a.dtype) * b for a, b in zip(u, v)]


def subtract(u, v):
    """`u - v`."""
    return [a - b for a, b in zip(u, v)]


def scale(c, v):
    """`c * v`."""
    return [exactly(c, a.dtype) * a for a in v]


def along(path, t):
    """`t v_1 + t^2/2 v_2 + t^3/6 v_3 + ...`, for the list of vectors `path`."""
    point, share = scale(t, path[0]), t
    for power, v in enumerate(path[1:], 2):
        share = share * t / power
        point = add(point, v, share)
    return point


def negative(v):
    """`-v`."""
    return [-a for a in v]


def zeros_like(v):
    """The zero vector with the shapes of `v`."""
    return [tf.zeros_like(a) for a in v]


def where(condition, u, v):
    """`u` if the scalar `condition` holds, else `v`; a NaN in the other vector has no effect."""
    return [tf.where(condition, a, b) for a, b in zip(u, v)]


def nan_unless(condition, v):
    """`v` if the scalar `condition` holds, else NaN in every entry: a step that is not to be taken."""
    return where(condition, v, [a + float("nan") for a in v])


def is_finite(v):
    """Whether the norm of `v` is finite: false for a NaN, an infinity, or a vector too long for its dtype."""
    return tf.math.is_finite(squared_norm(v))


def has_finite_sum(a):
    """Whether the sum of all entries is finite (one pass); false if an entry is NaN or infinite."""
    return tf.math.is_finite(tf.reduce_sum(a))


def finite_or(v, other):
    """`(tensors of v, those of other where one has no finite sum; which of v have one, a vector of booleans)`."""
    good = tf.stack([has_finite_sum(a) for a in v])
    # unlike `tf.where`, this operation writes into the memory of `x`
    chosen = [tf.raw_ops.Select(condition=fine, x=a, y=b) for fine, a, b in zip(tf.unstack(good), v, other)]
    return chosen, good


def largest(v):
    """The largest absolute entry, a float32 scalar."""
    ends = [end for a in v if a.shape.num_elements() != 0 for end in (tf.reduce_max(a), -tf.reduce_min(a))]
    return tf.abs(tf.reduce_max(tf.stack([tf.cast(end, tf.float32) for end in ends])))  # no -0


def count(v):
    """Number of entries of `v`, a Python integer."""
    return sum(int(a.shape.num_elements()) for a in v)


def flatten(v, dtype=None):
    """The vector as one tensor `(n,)`, for dense methods on small models; by default in the dtype of inner products."""
    dtype = scalar_dtype(v) if dtype is None else dtype
    return tf.concat([tf.reshape(tf.cast(a, dtype), [-1]) for a in v], 0)


def unflatten(flat, like):
    """The inverse of `flatten`: a list of tensors with the shapes and dtypes of `like`."""
    parts = tf.split(flat, [int(a.shape.num_elements()) for a in like])
    return [tf.cast(tf.reshape(part, a.shape), a.dtype) for part, a in zip(parts, like)]


def values(variables):
    """The current values of Keras or TensorFlow variables, in float32 at least; later assignments do not move them."""
    return [full_precision(tf.convert_to_tensor(v)) for v in variables]


def exactly(scalar, dtype):
    """A number or scalar tensor in `dtype`; `tf.cast` would round a Python number to float32 first."""
    return tf.constant(scalar, dtype) if isinstance(scalar, (int, float)) else tf.cast(scalar, dtype)


def wide(dtype):
    """The dtype for arithmetic on values of `dtype`: float32 for half precision, else `dtype` itself."""
    dtype = tf.as_dtype(dtype)
    return tf.float32 if dtype.is_floating and dtype.size < 4 else dtype


def full_precision(tensor):
    """The tensor, cast to float32 if it is in half precision."""
    return tf.cast(tensor, wide(tensor.dtype))


def shaped(tensor, shape):
    """The tensor with its static shape, which TensorFlow loses for gradients of some matrix products."""
    return tensor if tensor.shape.is_fully_defined() else tf.ensure_shape(tensor, shape)


def vector(name, given, variables):
    """`given` as tensors in the dtypes of arithmetic with `variables`; refused unless it is a vector of numbers."""
    check(name, given, variables)
    for i, a in enumerate(given):
        dtype = tf.as_dtype(a.dtype)
        if not (dtype.is_floating or dtype.is_integer):
            raise ValueError(
                f"`{name}` must be a list of tensors, which must hold real numbers. Received: a tensor of dtype "
                f"{dtype.name} at index {i}"
            )
    return [tf.cast(tf.convert_to_tensor(a), wide(v.dtype)) for a, v in zip(given, variables)]


def check(name, vector, variables):
    """Raise a `ValueError` unless `vector` is a list of tensors with the shapes of `variables`."""
    shapes = [tuple(v.shape) for v in variables]
    listed = isinstance(vector, (list, tuple))
    entries = enumerate(vector if listed else ())
    bare = [f"{type(a).__name__} at index {i}" for i, a in entries if not (hasattr(a, "shape") and hasattr(a, "dtype"))]
    given = [tuple(a.shape) for a in vector] if listed and not bare else None
    if given != shapes:
        what = f"{len(given)} tensors of shapes {given[:4]}" if given is not None else f"{type(vector).__name__}"
        what = f"what is no tensor: {bare[0]}" if bare else what
        raise ValueError(
            f"`{name}` must be a list of {len(shapes)} tensors with the shapes of `model.trainable_variables`, or "
            f"those of the chosen `layers`: {shapes[:4]}{' ...' if len(shapes) > 4 else ''}. Received: {what}"
        )
