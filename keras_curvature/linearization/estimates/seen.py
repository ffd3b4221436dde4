"""Inputs and slopes of layers in one forward pass, read off their taps, with sums and means.

The calls of a layer are a list of tensors `(groups, rows, positions, d)`, of inputs or of slopes. Each example has one
row or several, or all examples share the rows.
"""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.layers.weights import product


class Seen:
    """Inputs and slopes of the layers of some blocks, in one pass over a slice of the batch.

    Args:
        recorded: A `Pass` whose layers were tapped.
        blocks: A list of `Block`.
    """

    def __init__(self, recorded, blocks):
        self._pass, self.place, self._inputs = recorded, recorded.pure.place, {}
        wanted = {id(block.weights.layer) for block in blocks}
        self._taps = [tap for tap in recorded.taps if id(tap.layer) in wanted]
        _check_within_reach(self._taps, recorded)

    def inputs(self, block):
        """The inputs of all calls, `[(groups, rows, positions, d_in [+ 1])]`; of an embedding, indices."""
        if id(block) not in self._inputs:
            self._inputs[id(block)] = self._read(block)
        return self._inputs[id(block)]

    def _read(self, block):
        weights = block.weights
        seen = [trees.full_precision(weights.inputs(tap)) for tap in self._taps_of(block)]
        if not block.has_indices:  # a data set may not say how wide its examples are; the kernel does
            seen = [trees.shaped(a, [weights.groups or 1, *a.shape[1:3], weights.size[0]]) for a in seen]
        if weights.bias is None:
            return seen
        return [tf.concat([a, tf.ones([*sizes(a)[:3], 1], a.dtype)], -1) for a in seen]

    def slopes(self, cotangents=None):
        """A function of a block that gives the slopes of all calls, `[(groups, rows, positions, d_out)]`.

        Slopes of the loss, or of `<c, leaves>` if cotangents are given.
        """
        if cotangents is None:
            of_loss = {id(tap): slope for tap, slope in zip(self._pass.taps, self._pass.slopes())}
            slopes = [of_loss[id(tap)] for tap in self._taps]
        else:
            slopes = self._pass.slopes_at([tap.pre_activation for tap in self._taps], cotangents)
        found = {id(tap): _shaped(slope, tap.pre_activation) for tap, slope in zip(self._taps, slopes)}
        return lambda block: [block.weights.slopes(tap, found[id(tap)]) for tap in self._taps_of(block)]

    def _taps_of(self, block):
        return [tap for tap in self._taps if tap.layer is block.weights.layer]


def sum_square(parts):
    """`sum x x'` over rows and positions, `(groups, d, d)`."""
    flat = [_flat(x) for x in parts]
    return tf.add_n([gram(x, x) for x in flat])


def gram(x, y):
    """`x'y` in each group; a single group uses a plain matrix product, the faster kernel."""
    if x.shape[0] == 1:
        x, y = (tf.squeeze(x, 0),) * 2 if x is y else (tf.squeeze(x, 0), tf.squeeze(y, 0))
        return tf.matmul(x, y, transpose_a=True)[tf.newaxis]
    return tf.matmul(x, y, transpose_a=True)


def total(parts):
    """`sum x`, `(groups, d)`."""
    return tf.add_n([tf.reduce_sum(x, [1, 2]) for x in parts])


def frequencies(parts, block):
    """How often each index occurs."""
    ones = [tf.ones(sizes(x), block.dtype) for x in parts]
    return tf.add_n([tf.math.unsorted_segment_sum(o, x, block.shape[0]) for o, x in zip(ones, parts)])


def mean(of_all, parts, seen):
    """A sum over rows and positions as a mean, times the share of the slice."""
    return of_all * (seen.place.share(of_all.dtype) / tf.cast(count(parts), of_all.dtype))


def count(parts):
    """Rows times positions; indices of -1, which pad ragged inputs, are not counted."""
    if parts[0].dtype.is_integer:
        return tf.add_n([tf.math.count_nonzero(x >= 0, dtype=tf.int32) for x in parts])
    return sum(product(x, [1, 2]) for x in parts)


def _flat(x):
    return tf.reshape(x, [x.shape[0], product(x, [1, 2]), x.shape[3]])


def joined(parts, seen, block):
    """Calls side by side, `(groups, examples, positions, d)`."""
    _check_same_rows(parts, seen.place.examples, block.weights.layer)
    folded = [by_example(x, seen.place.examples) for x in parts]
    return folded[0] if len(folded) == 1 else tf.concat(folded, 2)


def _check_same_rows(parts, examples, layer):
    """Refuse calls on the batch beside calls on rows of no example, as far as the lengths are known."""
    lengths = [x.shape[1] for x in parts]
    apart = [n is not None and (not isinstance(examples, int) or n % max(examples, 1) != 0) for n in lengths]
    if any(apart) and not all(apart):
        raise ValueError(
            f"The layer {layer.name!r} is called on the batch, and on inputs of {lengths[apart.index(True)]} rows that "
            "belong to no example, so it has no per-example gradients. Use `KFAC` with its default "
            '`sharing="expand"`, or a method without Kronecker factors, such as `CurveBall` or `SOAP`.'
        )


def by_example(x, examples):
    """Moves several rows per example to the positions. Rows that all examples share count as one example."""
    groups, rows, positions, width = sizes(x)
    if isinstance(rows, int) and isinstance(examples, int):
        if rows == examples:  # also of no example, on a replica that has none
            return x
        kept = examples if examples and rows % examples == 0 else 1
    else:
        kept = tf.where(tf.equal(rows % tf.maximum(examples, 1), 0), examples, 1)
    if isinstance(kept, int):
        return x if kept == rows else tf.reshape(x, [groups, kept, rows // kept * positions, width])
    return tf.reshape(x, [groups, kept, tf.maximum(rows // tf.maximum(kept, 1), 1) * positions, width])


def sizes(x):
    """The shape, with tensors for unknown lengths."""
    return [product(x, [axis]) for axis in range(x.shape.rank)]


def _shaped(slope, pre_activation):
    """A slope with its static shape, which gradients of einsums lose; zeros if the loss does not depend on it."""
    return (
        trees.full_precision(tf.zeros_like(pre_activation))
        if slope is None
        else tf.ensure_shape(slope, pre_activation.shape)
    )


def _check_within_reach(taps, recorded):
    """Raise a `ValueError` for layers called in a loop or function of the model, where they cannot be recorded."""
    for tap in taps:
        if not recorded.reaches(tap):
            raise ValueError(
                f"The layer {tap.layer.name!r} is called inside a loop, a condition or a `tf.function` of the model, "
                "where its inputs and output gradients cannot be recorded for Kronecker factors. Use a subclass with "
                "its own `call`; its weights then have a diagonal instead of Kronecker factors:\n\n"
                f"    class Plain(keras.layers.{type(tap.layer).__name__}):\n"
                "        def call(self, *args, **kwargs):\n"
                "            return super().call(*args, **kwargs)\n"
            )
