"""What a row of the Jacobian is: for each example one or several rows, `J' c` for some cotangents `c`.

A frame is made from a `Pass`, on every slice. Its rows are tensors with an axis for the examples, the `parts`:

    times(J v)        the rows times a vector, from the tangents of the leaves
    transposed(u)     the cotangents whose `J' c` is the sum of the rows, each times its `u`
    unit(part, k)     the cotangents of row `k` of every example
"""

import math

import tensorflow as tf

from keras_curvature.linearization.jacobian import roots
from keras_curvature.linearization.pure import batch_axis


class OfOutputs:
    """A row for each entry of each leaf: `R J` with the root `R` of the second derivative of the loss."""

    def __init__(self, recorded):
        self.roots, self.recorded = roots.roots(recorded), recorded

    def parts(self):
        """The residuals, shaped as the leaves."""
        return roots.residuals(self.recorded, self.roots)

    def counts(self):
        """How many rows each part has for an example; `None` if that is not known."""
        entries = [leaf.shape[1:] for leaf in self.recorded.leaves]
        return [math.prod(shape) if shape.is_fully_defined() else None for shape in entries]

    def times(self, tangents):
        return [root.times(tangent) for root, tangent in zip(self.roots, tangents)]

    def transposed(self, parts):
        return [root.transposed(u) for root, u in zip(self.roots, parts)]

    def unit(self, part, k):
        root, leaf = self.roots[part], self.recorded.leaves[part]
        entry = tf.one_hot(k, self.counts()[part], dtype=root.values.dtype)
        ones = tf.ones([tf.shape(leaf)[0], 1], entry.dtype)
        found = root.transposed(tf.reshape(ones * entry, root.shape))
        return [found if i == part else tf.zeros_like(other) for i, other in enumerate(self.recorded.leaves)]


class OfCotangents:
    """A row for each example and each of some cotangents of all leaves: one part, `(examples, cotangents)`.

    Args:
        recorded: A `Pass`.
        cotangents: A list of lists shaped as the leaves, which carry the loss scale.
    """

    def __init__(self, recorded, cotangents):
        self.recorded, (self._lengths, self._count) = recorded, (_lengths(recorded), len(cotangents))
        # each (cotangents, *leaf)
        self._stacked = [tf.stack([roots.wide(recorded, c) for c in of_leaf]) for of_leaf in zip(*cotangents)]

    def parts(self):
        """Zeros: nothing is known of residuals."""
        return [tf.zeros([self.recorded.pure.place.examples, self._count], self._stacked[0].dtype)]

    def counts(self):
        """How many rows an example has, in a list."""
        return [self._count]

    def times(self, tangents):
        found = 0.0
        for c, tangent, n in zip(self._stacked, tangents, self._lengths):
            product = c * tf.cast(tangent, c.dtype)
            rows = tf.reduce_sum(product, list(range(2, product.shape.rank)))  # (cotangents, rows)
            found += tf.reduce_sum(tf.reshape(rows, [self._count, -1, n]), -1)
        return [tf.transpose(found)]

    def transposed(self, parts):
        u, found = tf.transpose(parts[0]), []  # (cotangents, examples)
        for c, n in zip(self._stacked, self._lengths):
            of_rows = tf.repeat(tf.cast(u, c.dtype), n, axis=1)
            of_rows = tf.reshape(of_rows, tf.concat([tf.shape(c)[:2], tf.ones([c.shape.rank - 2], tf.int32)], 0))
            found.append(tf.reduce_sum(c * of_rows, 0))
        return found

    def unit(self, part, k):
        return [c[k] for c in self._stacked]


def of_slopes(recorded):
    """The frame of the gradients of the examples: one row for each."""
    return OfCotangents(recorded, [roots.slopes_of_examples(recorded)])


def of_fisher(kind, seed):
    """A function of a `Pass` that gives the frame of a Fisher matrix, which is the sum of `row' row`."""

    def frame(recorded):
        found = recorded.cotangents(kind, seed)
        return OfCotangents(recorded, list(found) if kind == "exact" else [found])

    return frame


def pull(recorded, cotangents):
    """`J' c` for cotangents in full precision, through the loss scale of half precision."""
    scale = 1.0 if recorded.loss_scale is None else recorded.loss_scale
    return recorded.pull([
        tf.cast(c * tf.cast(scale, c.dtype), leaf.dtype) for c, leaf in zip(cotangents, recorded.leaves)
    ])  # fmt: skip


def _lengths(recorded):
    """How many rows of each leaf belong to one example."""
    found = batch_axis.per_example(recorded)
    if any(n is batch_axis.NONE for n in found):
        raise ValueError(
            "Gradients of examples need outputs with a row for each example. Received: outputs of shapes "
            f"{[tuple(leaf.shape) for leaf in recorded.leaves]}. Pass the others to `add_loss`; or use "
            "`GaussNewton(solver=ConjugateGradient())`, which needs no rows."
        )
    return [n if isinstance(n, int) else tf.maximum(n, 1) for n in found]  # 0 on a replica without examples
