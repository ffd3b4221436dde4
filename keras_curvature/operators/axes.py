"""Tensors seen along their axes: products with a matrix per axis, second moments of an axis, merged and cut axes.

A Kronecker product `A_1 x A_2 x ...` multiplies the vectorized tensor. It is never formed: each factor multiplies its
own axis. `batch` is the number of leading axes that count the tensors of a stack, each with its own matrices. Axes are
numbered after the batch axes.
"""

import math
from typing import NamedTuple

import tensorflow as tf


class ScaledSubspace(NamedTuple):
    """The matrix `outer I + U diag(scale) U'`, for `U` `(n, k)` with orthonormal columns or zeros."""

    U: tf.Tensor
    scale: tf.Tensor
    outer: tf.Tensor


def multiply(tensor, matrices, batch=0):
    """`matrices[k]` times `tensor` along axis `k`, for every `k`; `None` leaves the axis unchanged.

        out[i, j, ...] = sum_kl  matrices[0][i, k] matrices[1][j, l] ... tensor[k, l, ...]

    For an axis of length `n` a matrix is `(..., m, n)`, with the batch axes in front; without these it may also be a
    `ScaledSubspace`.
    """
    for axis, matrix in enumerate(matrices):
        if isinstance(matrix, ScaledSubspace):
            inside = _multiply_axis(tensor, matrix.U, axis, 0, transposed=True)
            tensor = matrix.outer * tensor + _multiply_axis(inside, matrix.U * matrix.scale, axis, 0)
        elif matrix is not None:
            tensor = _multiply_axis(tensor, matrix, axis, batch)
    return tensor


def multiply_transposed(tensor, matrices, batch=0):
    """`multiply` with the transposed matrices, for example to project on eigenvectors stored as columns."""
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            tensor = _multiply_axis(tensor, matrix, axis, batch, transposed=True)
    return tensor


def _multiply_axis(tensor, matrix, axis, batch, transposed=False):
    own = tensor.shape[batch:]
    if axis == len(own) - 1:  # from the right, without moving the memory
        rows = tf.reshape(tensor, [*tensor.shape[:batch], math.prod(own[:-1]), own[-1]])
        product = tf.matmul(rows, matrix, transpose_b=not transposed)
        return tf.reshape(product, [*tensor.shape[:-1], product.shape[-1]])
    lead, rest = math.prod(own[:axis]), math.prod(own[axis + 1 :])
    if lead == 1:
        columns = tf.reshape(tensor, [*tensor.shape[:batch], own[axis], rest])
        product = tf.matmul(matrix, columns, transpose_a=transposed)
    else:  # in the middle: one product for each index of the axes before it
        columns = tf.reshape(tensor, [*tensor.shape[:batch], lead, own[axis], rest])
        product = tf.matmul(tf.expand_dims(matrix, batch), columns, transpose_a=transposed)
    return tf.reshape(product, [*tensor.shape[: batch + axis], product.shape[-2], *own[axis + 1 :]])


def second_moment(tensor, axis, batch=0, other=None):
    """`T O'` of two tensors unfolded along an axis: `out[i, j] = sum tensor[.., i, ..] other[.., j, ..]`.

    The sum runs over all other axes. `other` defaults to `tensor`.
    """
    rows = unfold(tensor, axis, batch)
    return tf.matmul(rows, rows if other is None else unfold(other, axis, batch), transpose_b=True)


def unfold(tensor, axis, batch=0):
    """The tensor as a matrix with `axis` in the rows and all others, in their order, in the columns."""
    own = tensor.shape[batch:]
    if axis:
        order = [*range(batch), batch + axis, *[i for i in range(batch, tensor.shape.rank) if i != batch + axis]]
        tensor = tf.transpose(tensor, order)
    return tf.reshape(tensor, [*tensor.shape[:batch], own[axis], math.prod(own) // own[axis]])


def merged_shape(shape, limit, at_least=2):
    """The shape without axes of length one, and with neighbouring axes merged into axes of at most `limit`.

    Merging begins at the front, where a kernel `(height, width, in, out)` has its small axes. It stops at `at_least`
    axes, so a matrix stays a matrix.
    """
    lengths = [n for n in shape if n != 1] or [1]
    merged = [lengths[0]]
    for position, length in enumerate(lengths[1:], start=1):
        axes_if_kept = len(merged) + len(lengths) - position
        if axes_if_kept > at_least and merged[-1] * length <= limit:
            merged[-1] *= length
        else:
            merged.append(length)
    return tuple(merged)


def cut(length, size):
    """The lengths of the pieces that an axis is cut into: `size` each, and the rest in the last one."""
    return [min(size, length - start) for start in range(0, length, size)]


def split(tensor, size):
    """Cut a tensor into tiles of at most `size` along every axis; a list, in row-major order."""
    tiles = [tensor]
    for axis, length in enumerate(tensor.shape):
        lengths = cut(length, size)
        if len(lengths) > 1:
            tiles = [part for tile in tiles for part in tf.split(tile, lengths, axis)]
    return tiles


def join(tiles, shape, size):
    """Put the tiles of `split` together again, a tensor of the given shape."""
    for axis in reversed(range(len(shape))):
        parts = len(cut(shape[axis], size))
        if parts > 1:
            tiles = [tf.concat(tiles[i : i + parts], axis) for i in range(0, len(tiles), parts)]
    (whole,) = tiles
    return whole
