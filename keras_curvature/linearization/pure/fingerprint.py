"""A number that tells batches apart: a hash of every entry, whatever the order of the examples."""

import keras
import tensorflow as tf

from keras_curvature import trees

# Factors of the finalizer of MurmurHash3, as int32.
FIRST, SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32


def fingerprint(batch):
    """A hash of the examples of a slice, a scalar of int32; those of slices add up to that of the whole batch.

        sum_n h(x_n) + h(h(x_n), y_n) + h(h(x_n), weight_n),    h(v) = mix(sum_j c_j bits(v_j)),  c_j odd

    All sums wrap around. Equal batches have equal numbers, also with their examples in another order; other batches
    have the same one with a probability of about 2^-32. One pass over the data, without a copy on CPUs.

    Args:
        batch: A nest of arrays, such as `(x, y, sample_weight)`; `None` counts as nothing. Ragged and sparse tensors
            count as a whole.
    """
    first, total = None, tf.constant(0)
    for i, leaf in enumerate(leaf for leaf in keras.tree.flatten(batch) if leaf is not None):
        for part in tf.nest.flatten(leaf, expand_composites=True):
            rows = _mixed(_rows(part, whole=part is not leaf) + (i + 1))
            if first is None:
                first = rows
            else:  # with the row of the same example; arrays of another length, such as a graph's edges, go round
                partners = tf.range(tf.size(rows)) % tf.maximum(tf.size(first), 1)
                rows = _mixed(rows + FIRST * tf.gather(tf.concat([first, [0]], 0), partners))
            total += tf.reduce_sum(rows)
    return total


def _rows(tensor, whole):
    """`sum_j c_j bits(v_j)` of each row `(rows,)`, or of all entries `(1,)` if `whole`."""
    tensor = tf.convert_to_tensor(tensor)
    bits = _bits(tensor)
    rows = 1 if whole or tensor.shape.rank == 0 else tf.shape(tensor)[0]
    bits = tf.reshape(bits, tf.stack([rows, tf.size(bits) // tf.maximum(rows, 1)]))
    factors = tf.bitwise.bitwise_or(_mixed(tf.range(1, tf.shape(bits)[1] + 1)), 1)
    if trees.sums_products():
        return tf.reduce_sum(bits * factors, 1)
    return tf.matmul(bits, factors[:, tf.newaxis])[:, 0]


def _bits(tensor):
    """The entries as int32, two for each of eight bytes."""
    if tensor.dtype == tf.string:
        return tf.cast(tf.strings.to_hash_bucket_fast(tensor, 2**31 - 1), tf.int32)
    if tensor.dtype.is_integer or tensor.dtype.is_bool:
        return tf.cast(tensor, tf.int32)
    return tf.bitcast(trees.full_precision(tensor), tf.int32)


def _mixed(h):
    """A number in which each bit depends on all bits of `h`."""
    h = SECOND * (_folded(h, 16) * FIRST)
    return _folded(h, 13)


def _folded(h, bits):
    return tf.bitwise.bitwise_xor(h, tf.bitwise.right_shift(h, bits))
