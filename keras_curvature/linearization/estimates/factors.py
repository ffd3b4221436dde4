"""Kronecker factors and other sums over the examples of a batch, for the blocks of `kronecker.py`.

    factors          A, G                                        K-FAC
    second_moments   sum_n (U_A' (sum_t a_nt d_nt') U_G)^2       EKFAC: the diagonal of the Fisher matrix in the
                                                                 eigenbases U of the factors, exact per example
    means            mean_nt a_nt, mean_nt d_nt                  Eva

All are sums over slices: a function of a `Seen` returns the share of one slice.

References: see `kronecker.py`; George, Laurent, Bouthillier, Ballas and Vincent, "Fast approximate natural gradient
descent in a Kronecker-factored eigenbasis" (2018), Algorithm 1; Zhang, Shi and Li, "Eva: practical second-order
optimization with Kronecker-vectorized approximation" (2023), section 3.1.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import tensorflow as tf

from keras_curvature.component import check_scalar
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
from keras_curvature.linearization.layers.kronecker import Block
from keras_curvature.linearization.layers.weights import product
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Fisher, Integer, Vector

Pair: TypeAlias = tuple[tf.Tensor, tf.Tensor]
# Most entries of per-example gradients kept at a time, for examples with several positions.
AT_A_TIME = 2**23


def kronecker_factors(
    lin, blocks: Sequence[Block], diagonal: Sequence[int] = (), fisher: Fisher = "sampled", seed: Integer = 0
) -> tuple[list[Pair], Vector]:  # fmt: skip
    """Kronecker factors of blocks of the Fisher matrix of the loss; see `layers/kronecker.py`.

    `A (x) G` approximates the block of each layer; L2 regularizers (`l2`) are not included. Costs one backward pass to
    the activations, and another one with a `diagonal`; with `fisher="exact"`, this cost for each label.

    Args:
        blocks: Of `kronecker.blocks(model)`.
        diagonal: Indices of weights to estimate the diagonal of the Fisher matrix for, without bias.
        fisher: `"sampled"`: with labels drawn from the model; `"exact"`: with every possible label; `"empirical"`: with
            the true labels. Defaults to `"sampled"`.
        seed: Integer tensor or number that determines the draws.

    Returns:
        `([(A, G)], [tensor])`: a pair for each block, with the shapes of its `factor_shapes`, and a tensor shaped as
        the variable for each index in `diagonal`.

    Raises:
        ValueError: The `needs` of the linearization have no `layers`; a layer of `blocks` is called inside a loop of
            the model; labels are drawn, and the loss is not the negative logarithm of a known likelihood.
    """
    require(lin, "kronecker_factors", "layers")
    check_scalar(kronecker_factors, "seed", seed, integer=True)
    return summed(lin, blocks, diagonal, fisher, seed, factors_of)


def kronecker_second_moments(
    lin, blocks: Sequence[Block], bases: Sequence[Pair], diagonal: Sequence[int] = (), fisher: Fisher = "sampled",
    seed: Integer = 0,
) -> tuple[Vector, Vector]:  # fmt: skip
    """The diagonal of the Fisher matrix in the eigenbases of Kronecker factors; see `estimates/factors.py`.

    The exact sum over the examples of `(U_A' g U_G)^2`, with `g` the per-example gradient. Costs one backward pass, as
    the factors do. With the same `seed` it uses the same labels; if the same tensor is the `seed` in the same branch
    of a graph, both share the backward pass (not with micro-batches, which keep no pass).

    Args:
        blocks: Of `kronecker.blocks(model)`.
        bases: `[(U_A, U_G)]`, for each block eigenvectors as columns; `None` for a factor that is diagonal.
        diagonal, fisher, seed: See `kronecker_factors`.

    Returns:
        `([tensor], [tensor])`: one shaped as the matrix of each block, and one for each index in `diagonal`.

    Raises:
        ValueError: As `kronecker_factors`.
    """
    require(lin, "kronecker_second_moments", "layers")
    check_scalar(kronecker_second_moments, "seed", seed, integer=True)
    basis = {id(block): pair for block, pair in zip(blocks, bases, strict=True)}

    def of_block(block, seen, by_label):
        return _second_moment(block, seen, by_label, *basis[id(block)])

    return summed(lin, blocks, diagonal, fisher, seed, of_block)


def kronecker_means(lin, blocks: Sequence[Block]) -> list[Pair]:
    """The mean input of the layers of some blocks, and the loss' mean slope in their outputs.

    Uses the true labels, in the pass that gives the `gradient`. For a loss that is a mean over the examples, the slopes
    are per-example slopes, averaged over examples and positions.

    Args:
        blocks: Of `kronecker.blocks(model)`.

    Returns:
        `[(a, b)]`: vectors `([groups,] d_in [+ 1])`, with a 1 at the end for the bias, and `([groups,] d_out)`.

    Raises:
        ValueError: The `needs` of the linearization have no `layers`; a layer of `blocks` is called inside a loop of
            the model's.
    """
    require(lin, "kronecker_means", "layers")
    return lin.with_gradient(lambda recorded: _means_in(recorded, blocks))


def kronecker_means_alone(lin, blocks: Sequence[Block]) -> list[Pair]:
    """As `kronecker_means`, for a point whose `gradient` is not needed: it is not summed over the replicas."""
    require(lin, "kronecker_means_alone", "layers")
    return lin.passes.total(lambda recorded: _means_in(recorded, blocks))


def summed(lin, blocks, diagonal, fisher, seed, of_block):
    """`([of_block(block, seen, slopes by label)], [diagonal])`, summed over slices and replicas."""

    def local(recorded):
        seen, labels, slopes = recorded.once(key(blocks, fisher, seed), lambda: drawn(recorded, blocks, fisher, seed))
        signed = [_signed(recorded, cotangents, diagonal, seed) for cotangents in labels if diagonal]
        return [of_block(block, seen, [of(block) for of in slopes]) for block in blocks], signed

    found, signed = lin.passes.total(local)
    # squared after the sum over slices and replicas; see `diagonals.py`
    return found, [tf.add_n([tf.square(s) for s in each]) for each in zip(*signed)]


def drawn(recorded, blocks, fisher, seed):
    """`(Seen, labels, slopes)`: what one backward pass for each label shows."""
    seen, labels = Seen(recorded, blocks), _labels(recorded, fisher, seed)
    return seen, labels, [seen.slopes(cotangents) for cotangents in labels]


def key(blocks, fisher, seed):
    """What `drawn` is remembered by in a recorded pass."""
    return "drawn", tuple(id(block) for block in blocks), fisher, seed.ref() if tf.is_tensor(seed) else seed


def _labels(recorded, fisher, seed):
    """`[cotangents]`: one entry for each possible label; a single entry for drawn or true labels."""
    cotangents = recorded.cotangents(fisher, seed)
    return cotangents if fisher == "exact" else [cotangents]


def _signed(recorded, cotangents, diagonal, seed):
    """`sum_i s_i g_i` with random signs, for the weights outside all blocks; one more backward pass."""
    sums = recorded.pull(diagonals.signed(recorded, cotangents, seed))
    return [sums[i] for i in diagonal]


def factors_of(block, seen, by_label):
    """`(A, G)`."""
    if not by_label[0]:
        return tuple(tf.zeros(shape, block.dtype) for shape in block.factor_shapes)
    if block.sharing == "exact":
        A, G = _exactly(block, seen, by_label)
    else:
        inputs, by_label = shared(block, seen, by_label)
        squares = frequencies(inputs, block) if block.has_indices else sum_square(inputs)
        A = mean(squares, inputs, seen)
        G = tf.add_n([sum_square(slopes) for slopes in by_label])
    return tuple(tf.reshape(factor, shape) for factor, shape in zip((A, G), block.factor_shapes))


def shared(block, seen, by_label):
    """`(inputs, slopes by label)` as the block's `sharing` has them: with "reduce", one position for each example."""
    inputs, by_label = seen.inputs(block), list(by_label)
    if block.sharing == "reduce":
        inputs = [tf.reduce_mean(joined(inputs, seen, block), 2, keepdims=True)]
        by_label = [[tf.reduce_sum(joined(slopes, seen, block), 2, keepdims=True)] for slopes in by_label]
    return inputs, by_label


def _exactly(block, seen, by_label):
    """The block itself as `A`, for one output in each group, and 1 as `G`."""
    inputs = joined(seen.inputs(block), seen, block)
    # each (groups, examples, d_in)
    gradients = [tf.reduce_sum(inputs * joined(slopes, seen, block), 2) for slopes in by_label]
    A = tf.add_n([tf.matmul(g, g, transpose_a=True) for g in gradients])
    return A, seen.place.share(A.dtype) * tf.ones(block.factor_shapes[1], A.dtype)


def _means_in(recorded, blocks):
    seen = Seen(recorded, blocks)
    slopes = seen.slopes()
    return [_means(block, seen, slopes(block)) for block in blocks]


def _means(block, seen, slopes):
    """`(mean input, mean slope)`."""
    *groups, d_in, d_out = block.shape
    if not slopes:
        return tf.zeros([*groups, d_in], block.dtype), tf.zeros([*groups, d_out], block.dtype)
    inputs = seen.inputs(block)
    sums = frequencies(inputs, block) if block.has_indices else total(inputs)
    a, b = mean(sums, inputs, seen), total(slopes)
    b = b * (tf.cast(seen.place.examples, b.dtype) / tf.cast(count(inputs if block.has_indices else slopes), b.dtype))
    return tf.reshape(a, [*groups, d_in]), tf.reshape(b, [*groups, d_out])


def _second_moment(block, seen, by_label, U_A, U_G):
    """The sum over examples of the squares of their projected gradients, shaped as the matrix of the block."""
    if not by_label[0]:
        return tf.zeros(block.shape, block.dtype)
    inputs = joined(seen.inputs(block), seen, block)
    slopes = [_rotated(joined(slopes, seen, block), U_G) for slopes in by_label]
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
    """The same for any number of examples, `size` at a time; the last piece is padded with zeros."""
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
    """The same for one-hot inputs: a row of a gradient is the sum of the slopes at the positions with its index."""
    same = tf.cast(tf.equal(indices, tf.linalg.matrix_transpose(indices)), d.dtype)  # (1, examples, t, t)
    return tf.math.unsorted_segment_sum(d * tf.matmul(same, d), indices[..., 0], rows)
