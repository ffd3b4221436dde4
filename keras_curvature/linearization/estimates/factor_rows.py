"""The rows of Kronecker factors, one for each example: `A = X'X` and `G = D'D` without the matrices.

In the notation of `kronecker.py`, with `sharing="reduce"`: `X` has the rows `a_n / sqrt(N)`, with `a_n` the mean of an
example's inputs over its positions, and `D` the rows `d_n`, the sum of its slopes. With fewer examples than rows of a
factor they are the smaller form of it, and Woodbury's identity inverts it by a matrix of the size of the batch.

Reference: Tang, Jiang, Yu, Wu, Guo and Wang, "SKFAC: Training neural networks with faster Kronecker-factored
approximate curvature" (2021).
"""

from collections.abc import Sequence
from typing import Literal

import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.linearization.estimates.factors import Pair, drawn, factors_of, key, shared, summed
from keras_curvature.linearization.layers.kronecker import Block
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Integer, Vector


def has_rows(block: Block) -> bool:
    """Whether both factors of a block have rows; not those of embeddings and of normalization layers."""
    return block.sharing == "reduce"


def kronecker_rows(
    lin, blocks: Sequence[Block], diagonal: Sequence[int] = (), fisher: Literal["sampled", "empirical"] = "sampled",
    seed: Integer = 0,
) -> tuple[list[Pair], Vector]:  # fmt: skip
    """`(pairs, diagonals)` as `kronecker_factors` has them, but with the pair `(X, D)` where `has_rows(block)`.

    Args:
        lin: A `Linearization`.
        blocks: Of `kronecker.blocks(model, "reduce")`.
        diagonal, fisher, seed: See `kronecker_factors`; one backward pass, for one label of each example.

    Returns:
        `X` is `([groups,] examples, d_in)` and `D` `([groups,] examples, d_out)`, of the whole batch on all replicas.

    Raises:
        ValueError: As `kronecker_factors`; a layer is called on rows that belong to no example.
    """
    require(lin, "kronecker_rows", "layers")

    def local(recorded):
        seen, _, slopes = recorded.once(key(blocks, fisher, seed), lambda: drawn(recorded, blocks, fisher, seed))
        return [_rows(block, seen, slopes[0](block)) for block in blocks if has_rows(block)]

    def others(block, seen, by_label):
        return () if has_rows(block) else factors_of(block, seen, by_label)

    pairs, diagonals = [()] * len(blocks), []
    if diagonal or not all(has_rows(block) for block in blocks):  # replicas cannot sum nothing
        pairs, diagonals = summed(lin, blocks, diagonal, fisher, seed, others)
    rows = iter(lin.passes.rows(local))
    found = [tuple(_whole(x, block) for x in next(rows)) if has_rows(block) else pair
             for block, pair in zip(blocks, pairs)]  # fmt: skip
    return found, diagonals


def _rows(block, seen, slopes):
    """Of one slice, `(examples, groups, d)` each."""
    (inputs,), ((slopes,),) = shared(block, seen, [slopes])
    X, D = (tf.squeeze(x, 2) for x in (inputs, slopes))
    total = tf.cast(seen.place.total, X.dtype)
    return tf.transpose(X * tf.math.rsqrt(total), [1, 0, 2]), tf.transpose(D, [1, 0, 2])


def _whole(rows, block):
    """The rows of all replicas."""
    rows = tf.transpose(replicas.gather(rows), [1, 0, 2])
    return rows if len(block.shape) == 3 else tf.squeeze(rows, 0)
