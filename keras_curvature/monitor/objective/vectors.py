"""Vectors that a user passes."""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.typing import Variables, Vector


def taken(name: str, vector: Vector, variables: Variables) -> Vector:
    """The vector as tensors in the dtypes of the variables, in float32 at least; it may have arrays of other numbers.

    Args:
        name: The argument to name in messages.
        vector: A list of tensors, variables or NumPy arrays.
        variables: Those that the vector must be shaped like.

    Raises:
        ValueError: It is no list of tensors with these shapes, or holds what is no real number.
    """
    trees.check(name, vector, variables)
    for i, a in enumerate(vector):
        dtype = tf.as_dtype(a.dtype)
        if not (dtype.is_floating or dtype.is_integer):
            raise ValueError(f"`{name}` must hold real numbers. Received: a tensor of dtype {dtype.name} at index {i}")
    return [tf.cast(tf.convert_to_tensor(a), trees.wide(v.dtype)) for a, v in zip(vector, variables)]
