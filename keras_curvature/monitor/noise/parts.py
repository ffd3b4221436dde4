"""Gradients of the parts of the examples, and sums over the micro-batches of each part."""

import math

import numpy as np
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.linearization import products
from keras_curvature.linearization.pure.micro_batches import MicroBatches

MEMORY = 8e9  # most bytes of gradients at a time


def check_memory(variables, parts):
    """Refuse more gradients than fit into memory."""
    each = sum(math.prod(v.shape) * max(4, tf.as_dtype(v.dtype).size) for v in variables)
    most = int(MEMORY // each)
    if most < parts + 2:  # beside the gradients there are two products at a time
        remedy = f"Pass `parts={most - 2}` or fewer." if most >= 4 else "Measure a smaller model."
        raise ValueError(
            f"`noise`: the gradients of {parts} parts need {(parts + 2) * each / 1e9:.3g} GB of memory, more than "
            f"{MEMORY / 1e9:.3g} GB. {remedy}"
        )


def sums_of_parts(objective, micro_batch, parts):
    """The sums over the micro-batches of each part, a list of at most `parts` dicts. Every batch goes into all parts.

    A dict has `"examples"`, `"batches"` (the number of micro-batches), `"squares"` (`sum_i b_i |g_i|^2`) and
    `"gradient"` (the mean gradient of the part, in float32 at least).
    """
    found = {}
    for i, part in enumerate(_each_part(objective, micro_batch, max(1, parts // objective.batches))):
        k = i % parts
        found[k] = tf.nest.map_structure(tf.add, found[k], part) if k in found else part
    return [part | {"gradient": trees.scale(1.0 / part["examples"], part["gradient"])} for part in found.values()]


def _each_part(objective, micro_batch, most):
    """The sums of one part after another: each batch's rows in order, cut into at most `most` parts."""
    devices = replicas.strategy_of(objective.model).num_replicas_in_sync
    for number, count in enumerate(objective.counts):
        shortest = count // devices  # of the replicas' slices
        pieces = _number_of_pieces(shortest, micro_batch, -(-most // devices))
        length = max(1, shortest // pieces)
        cut = -(-length // micro_batch)
        for index in range(pieces):
            sums = objective.on_batch(number, ("noise", length, cut), _sums(length, cut), index)
            yield from (tf.nest.map_structure(lambda s, r=r: s[r], sums) for r in range(devices))


def _number_of_pieces(examples, micro_batch, most):
    """Among the numbers of pieces near the largest possible one, the number that leaves out the fewest examples."""
    most = max(1, min(most, examples // micro_batch))
    return min(range((most + 1) // 2, most + 1), key=lambda pieces: (examples % pieces, -pieces))


def _sums(length, micro_batches):
    """A function of a `Linearization` and the index of a part that has `length` rows of each replica's slice.

    Its results have a row for each replica: every replica's rows are a part of their own.
    """

    def of_parts(lin, index):
        def here(whole, weights):
            part = MicroBatches(whole.part(index * length, length), micro_batches)
            sums = part.sum(lambda pure: _of_micro_batch(pure, weights))
            own = tf.one_hot(replicas.number(), replicas.count(), dtype=tf.float64)
            return tf.nest.map_structure(lambda s: tf.tensordot(tf.cast(own, s.dtype), s, 0), sums)

        return lin.total(here)

    return of_parts


def _of_micro_batch(pure, weights):
    _, gradient = products.gradient(pure, weights)
    # sums over many examples overflow, and lose digits, in half precision
    gradient = [trees.full_precision(g) for g in gradient]
    dtype = trees.scalar_dtype(gradient)
    examples, whole = tf.cast(pure.place.examples, dtype), tf.cast(pure.place.total, dtype)
    # the loss here is the micro-batch's share of the loss of the batch
    squares = trees.squared_norm(gradient) * whole**2 / examples
    counts = {"examples": examples, "batches": tf.ones([], dtype), "squares": squares}
    return counts | {"gradient": trees.scale(whole, gradient)}


def inner_products(left, right):
    """Inner products of two lists of vectors, a float64 array `(left, right)`."""
    total = 0.0
    for columns, rows in zip(zip(*right), zip(*left)):
        stacked = tf.stack(rows)
        axes = list(range(1, stacked.shape.rank))
        # sums of products, as in `trees.dot`: some devices round matrix products
        dots = [tf.reduce_sum(stacked * tf.cast(column, stacked.dtype), axes) for column in columns]
        total += np.stack([dot.numpy().astype(np.float64) for dot in dots], 1)
    return total
