"""Kronecker factors, and what else is summed over the examples of a batch for the blocks of `kronecker.py`.

    factors          A, G                                        K-FAC
    second_moments   sum_n (U_A' (sum_t a_nt d_nt') U_G)^2       EKFAC: the diagonal of the Fisher matrix in the
                                                                 eigenbases U of the factors, exact per example
    means            mean_nt a_nt, mean_nt d_nt                  Eva

All are sums over slices: what a function of a `Seen` gives is a share, and those of all slices add up.

References: those of `kronecker.py`; George, Laurent, Bouthillier, Ballas and Vincent, "Fast approximate natural
gradient descent in a Kronecker-factored eigenbasis" (2018), Algorithm 1; Zhang, Shi and Li, "Eva: practical
second-order optimization with Kronecker-vectorized approximation" (2023), section 3.1.
"""

import math

import tensorflow as tf

from keras_curvature.linearization.estimates import diagonals
from keras_curvature.linearization.estimates.seen import (
    Seen,
    count,
    frequencies,
    gram,
    joined,
    mean,
    sizes,
    sum_square,
    total,
)
from keras_curvature.linearization.layers.weights import product

# Entries of the gradients of single examples that are kept at a time, where examples have several positions.
AT_A_TIME = 2**23


def factors(linearization, blocks, diagonal, fisher, seed):
    """As `Linearization.kronecker_factors` explains."""

    def of_block(seen, block, passes):
        return _factors(block, seen, passes)

    return _summed(linearization, blocks, diagonal, fisher, seed, of_block)


def second_moments(linearization, blocks, bases, diagonal, fisher, seed):
    """As `Linearization.kronecker_second_moments` explains."""
    basis = {id(block): pair for block, pair in zip(blocks, bases, strict=True)}

    def of_block(seen, block, passes):
        return _second_moment(block, seen, passes, *basis[id(block)])

    return _summed(linearization, blocks, diagonal, fisher, seed, of_block)


def _summed(linearization, blocks, diagonal, fisher, seed, of_block):
    def local(recording):
        seen = Seen(recording, blocks)
        passes = _labels(recording, fisher, seed)
        slopes = [seen.slopes(cotangents) for cotangents in passes]
        signed = [_signed(recording, cotangents, diagonal, seed) for cotangents in passes if diagonal]
        return [of_block(seen, block, [of(block) for of in slopes]) for block in blocks], signed

    found, signed = linearization.tapped(blocks).total(local)
    # squared when the slices of all replicas are in; see `diagonal.py`
    return found, [tf.add_n([tf.square(s) for s in each]) for each in zip(*signed)]


def _labels(recording, fisher, seed):
    """`[cotangents]`, one for each label that there is; of drawn or true labels, one."""
    cotangents = recording.cotangents(fisher, seed)
    return cotangents if fisher == "exact" else [cotangents]


def _signed(recording, cotangents, diagonal, seed):
    """`sum_i s_i g_i` with random signs, for the weights that are in no block; one more backward pass."""
    signed = recording.pull(diagonals._signed(cotangents, recording.pure.place, seed))
    return [signed[i] for i in diagonal]


def means(recording, blocks):
    """`(dL/dw, [(mean of inputs, mean of slopes)])` of a recording, shares of a slice; one backward pass."""
    seen = Seen(recording, blocks)
    gradient, of = seen.gradient_and_slopes()
    return gradient, [_means(block, seen, of(block)) for block in blocks]


def _factors(block, seen, passes):
    """`(A, G)`."""
    if not passes[0]:
        return tuple(tf.zeros(shape, block.dtype) for shape in block.factor_shapes)
    if block.sharing == "exact":
        A, G = _exactly(block, seen, passes)
    else:
        inputs, passes = seen.inputs(block), list(passes)
        if block.sharing == "reduce":
            inputs = [tf.reduce_mean(joined(inputs, seen), 2, keepdims=True)]
            passes = [[tf.reduce_sum(joined(slopes, seen), 2, keepdims=True)] for slopes in passes]
        squares = frequencies(inputs, block) if block.has_indices else sum_square(inputs)
        A = mean(squares, inputs, seen)
        G = tf.add_n([sum_square(slopes) for slopes in passes])
    return tuple(tf.reshape(factor, shape) for factor, shape in zip((A, G), block.factor_shapes))


def _exactly(block, seen, passes):
    """The block itself as `A`, for one output in each group, and 1 as `G`."""
    inputs = joined(seen.inputs(block), seen)
    gradients = [tf.reduce_sum(inputs * joined(slopes, seen), 2) for slopes in passes]  # (groups, examples, d_in)
    A = tf.add_n([tf.matmul(g, g, transpose_a=True) for g in gradients])
    return A, seen.place.share(A.dtype) * tf.ones(block.factor_shapes[1], A.dtype)


def _means(block, seen, slopes):
    """`(mean input, mean slope)`."""
    *groups, d_in, d_out = block.shape
    if not slopes:
        return tf.zeros([*groups, d_in], block.dtype), tf.zeros([*groups, d_out], block.dtype)
    inputs = seen.inputs(block)
    sums = frequencies(inputs, block) if block.has_indices else total(inputs)
    a, b = mean(sums, inputs, seen), total(slopes)
    b = b * (tf.cast(seen.place.examples, b.dtype) / tf.cast(count(slopes), b.dtype))
    return tf.reshape(a, [*groups, d_in]), tf.reshape(b, [*groups, d_out])


def _second_moment(block, seen, passes, U_A, U_G):
    """The sum over examples of the squares of their projected gradients, shaped as the matrix of the block."""
    if not passes[0]:
        return tf.zeros(block.shape, block.dtype)
    inputs = joined(seen.inputs(block), seen)
    slopes = [_rotated(joined(slopes, seen), U_G) for slopes in passes]
    if block.has_indices:
        moments = [_moment_at_indices(inputs, d, block.shape[0]) for d in slopes]
    else:
        inputs = _rotated(inputs, U_A)
        moments = [_moment(inputs, d) for d in slopes]
    return tf.reshape(tf.add_n(moments), block.shape)


def _rotated(x, U):
    """`x U` in each group; `None` is the identity."""
    if U is None:
        return x
    return tf.matmul(x, U if len(U.shape) == 2 else U[:, tf.newaxis])


def _moment(a, d):
    """`sum_n (sum_t a_nt d_nt')^2`, `(groups, d_in, d_out)`."""
    if a.shape[2] == 1:
        return gram(tf.square(a[:, :, 0]), tf.square(d[:, :, 0]))
    entries = math.prod([a.shape[0], a.shape[3], d.shape[3]])
    examples = a.shape[1]
    if examples is not None and examples * entries <= AT_A_TIME:
        return tf.reduce_sum(tf.square(tf.matmul(a, d, transpose_a=True)), 1)
    return _moment_in_pieces(a, d, max(1, min(AT_A_TIME // entries, examples or 64)))


def _moment_in_pieces(a, d, size):
    """The same, with the gradients of `size` examples at a time; zeros fill up the last piece."""
    pieces = -(-product(a, [1]) // size)

    def cut(x):
        missing = pieces * size - product(x, [1])
        x = tf.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
        groups, _, positions, width = sizes(x)
        return tf.transpose(tf.reshape(x, [groups, pieces, size, positions, width]), [1, 0, 2, 3, 4])

    def add(total, piece):
        return total + tf.reduce_sum(tf.square(tf.matmul(*piece, transpose_a=True)), 1)

    zeros = tf.zeros([a.shape[0], a.shape[3], d.shape[3]], a.dtype)
    return tf.foldl(add, (cut(a), cut(d)), zeros, parallel_iterations=1)


def _moment_at_indices(indices, d, rows):
    """The same for unit vectors: a row of a gradient is the sum of the slopes where its index stands."""
    same = tf.cast(tf.equal(indices, tf.linalg.matrix_transpose(indices)), d.dtype)  # (1, examples, t, t)
    return tf.math.unsorted_segment_sum(d * tf.matmul(same, d), indices[..., 0], rows)
