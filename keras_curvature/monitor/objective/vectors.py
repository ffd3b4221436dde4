"""Vectors and eigenpairs that a user passes."""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check
from keras_curvature.solvers.krylov import Eigenpairs
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


def check_pairs(owner, pairs, matrix, variables):
    """Refuse what is no `Eigenpairs` of a matrix.

    Args:
        owner: The function to name in messages.
        pairs: `Eigenpairs`, or `None`.
        matrix: The matrix in words, as `Eigenpairs.matrix`.
        variables: Those that vectors must be shaped like.
    """
    check(owner, "pairs", pairs, pairs is None or isinstance(pairs, Eigenpairs), "`Eigenpairs` of `top`, or None")
    if pairs is None:
        return
    if pairs.matrix not in ("", matrix):
        raise ValueError(
            f"`{owner.__name__}`: `pairs` must be `Eigenpairs` of this matrix, the {matrix}. Received: pairs of the "
            f"{pairs.matrix}"
        )
    for i, vector in enumerate(pairs.vectors):
        trees.check(f"pairs.vectors[{i}]", vector, variables)
