"""Kronecker factors whose product has the trace of the block of the Fisher matrix.

    A = sum_nt |d_nt|^2 a_nt a_nt',    G = sum_nt |a_nt|^2 d_nt d_nt' / sum_nt |a_nt|^2 |d_nt|^2

in the notation of `kronecker.py`, where the product of K-FAC's factors takes inputs and slopes for independent. Each
example counts as much as it does in the trace. With `sharing="reduce"` the means and sums over the positions take the
place of `a_nt` and `d_nt`. Factors that are exact already (normalization layers) stay as they are.

Reference: Gao, Liu, Huang, Wang, Wang, Xu and Yu, "A trace-restricted Kronecker-factored approximation to natural
gradient" (2020), section 3.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_curvature.component import check_scalar
from keras_curvature.linearization.estimates.factors import Pair, factors_of, kronecker_factors, shared, summed
from keras_curvature.linearization.estimates.seen import sum_square
from keras_curvature.linearization.layers.kronecker import Block
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Fisher, Integer, Vector


def trace_factors(
    lin, blocks: Sequence[Block], diagonal: Sequence[int] = (), fisher: Fisher = "sampled", seed: Integer = 0
) -> tuple[list[Pair], Vector]:  # fmt: skip
    """As `Linearization.kronecker_factors`, but `A` and `G` as above, without the division of `G`.

    So both can be averaged, and `tr A = tr G` is the trace of the block; see `restricted`.
    """
    require(lin, "trace_factors", "layers")
    check_scalar(trace_factors, "seed", seed, integer=True)
    return summed(lin, blocks, diagonal, fisher, seed, _weighted)


FACTORS = {"kfac": kronecker_factors, "tkfac": trace_factors}


def restricted(blocks: Sequence[Block], factors: Vector) -> Vector:
    """`[A, G / tr G, ...]` of `[A, G, ...]`: products with the trace of `A`; exact factors as they are."""
    found = list(factors)
    for i, block in enumerate(blocks):
        if block.sharing != "exact":
            G = factors[2 * i + 1]
            found[2 * i + 1] = tf.math.divide_no_nan(G, tf.linalg.trace(G)[..., tf.newaxis, tf.newaxis])
    return found


def _weighted(block, seen, by_label):
    if not by_label[0] or block.sharing == "exact":
        return factors_of(block, seen, by_label)
    inputs, by_label = shared(block, seen, by_label)
    # roots of the weights, on both sides of a square: the factors are symmetric to the last bit
    of_slopes = [tf.sqrt(tf.add_n([_squared(d) for d in labels])) for labels in zip(*by_label)]
    G = tf.add_n([sum_square(_times(inputs, slopes, block)) for slopes in by_label])
    if block.has_indices:
        A = tf.add_n([
            tf.math.unsorted_segment_sum(tf.square(w), i, block.shape[0]) for w, i in zip(of_slopes, inputs)
        ])  # fmt: skip
    else:
        A = sum_square([a * w for a, w in zip(inputs, of_slopes)])
    return tuple(tf.reshape(factor, shape) for factor, shape in zip((A, G), block.factor_shapes))


def _times(inputs, slopes, block):
    """The slopes, times the norms of the inputs; one-hot inputs have norm 1."""
    return slopes if block.has_indices else [d * tf.sqrt(_squared(a)) for a, d in zip(inputs, slopes)]


def _squared(x):
    return tf.reduce_sum(tf.square(x), -1, keepdims=True)
