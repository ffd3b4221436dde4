"""Gradients of examples by layers, of all that a layer sees, and sketches of them.

The rows are those of `by_layers.py`, with the slopes that the loss has in the outputs of each layer. With training-mode
batch normalization, where an example has no gradient of its own, they are the shares of the inputs and slopes at its
positions, as the Kronecker factors take them.

Two sketches make a layer smaller, and leave inner products of rows roughly as they are:

    of low rank     A_b = sum_t a_bt d_bt'  ~  sum_r a_br d_br'       the largest singular values of each row
    sampled         some entries of all `a`, and some of all `d`, times the roots of the inverses of their shares

The second is a sample of the rows and columns of each `A_b`. Both are exact if nothing is left out.

Both are of each example by itself, so every replica makes those of its own examples, and replicas gather only what the
Gram matrix is made of (`gathered`): samples, or the rows themselves where these are smaller. Sums over the examples
(`transposed`) are of the rows that stay on their replica.
"""

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.linearization.estimates.factors import drawn, key
from keras_curvature.linearization.estimates.seen import joined, sizes
from keras_curvature.linearization.jacobian import by_layers
from keras_curvature.linearization.jacobian.by_layers import Layer
from keras_curvature.linearization.layers.kronecker import Block
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Integer, Vector


def layers_of(lin, blocks: Sequence[Block], ranks: Sequence[int | None] | None = None) -> list[Layer]:
    """The rows of the empirical Fisher matrix, `F = A'A`, for each block; each replica has those of its examples.

    Args:
        lin: A `Linearization`.
        blocks: Of `kronecker.blocks(model)`.
        ranks: For each block the most positions that `of_low_rank` leaves; `None` for all. Defaults to all.

    Raises:
        ValueError: The `needs` of the linearization have no `layers`; a layer of `blocks` is called inside a loop of
            the model.
    """
    require(lin, "layers_of", "layers")
    ranks = [None] * len(blocks) if ranks is None else ranks

    def local(recorded):
        seen, _, (slopes,) = recorded.once(key(blocks, "empirical", 0), lambda: drawn(recorded, blocks, "empirical", 0))
        return [_of_block(block, seen, slopes(block), rank) for block, rank in zip(blocks, ranks, strict=True)]

    if not blocks:
        return []
    return [Layer(block, a, d) for block, (a, d) in zip(blocks, lin.passes.rows(local))]


def gathered(layer: Layer, sample: "Sample | None" = None) -> Layer:
    """A layer of all replicas, the same on all of them, or a sample of it: what its Gram matrix is made of.

    Args:
        layer: Of `layers_of`.
        sample: What to take of it. Defaults to all.
    """
    several = replicas.count() > 1

    def local(a, d):
        own = dataclasses.replace(layer, a=a, d=d)
        own = own if sample is None else sample.of_layer(own)
        own = _as_rows(own) if several and _rows_are_smaller(own) else own
        return own.a, own.d

    a, d = replicas.each(local, layer.a, layer.d)
    at = _place(layer)
    return dataclasses.replace(layer, a=replicas.gather(a, at), d=replicas.gather(d, at))


def transposed(layers: Sequence[Layer], coefficients: Sequence[tf.Tensor]) -> Vector:
    """`A' u` for each layer, shaped as the matrix of its block.

    Args:
        layers: Of `layers_of`.
        coefficients: `u` for each of them, `(examples, 1)`, with the examples of all replicas.
    """
    if not layers:
        return []  # replicas cannot sum nothing
    starts = [_place(layer)[0] for layer in layers]

    def local(starts, pairs):
        own = [dataclasses.replace(layer, a=a, d=d) for layer, (a, d) in zip(layers, pairs, strict=True)]
        parts = [tf.slice(u, [at, 0], [sizes(layer.a)[0], 1]) for layer, u, at in zip(own, coefficients, starts)]
        return [by_layers.transposed(layer, u) for layer, u in zip(own, parts)]

    return replicas.total(local, starts, [(layer.a, layer.d) for layer in layers])


def _place(layer):
    """`(start, total)`: where the rows of each replica are among those of all."""
    return replicas.place(lambda a: sizes(a)[0], layer.a)


def _of_block(block, seen, slopes, rank):
    """`(a, d)` of a `Layer`, of one slice."""
    if not slopes:  # a layer that is not called
        groups = block.shape[0] if len(block.shape) == 3 else 1
        d_in, d_out = (1 if block.has_indices else block.shape[-2]), block.shape[-1]
        a = tf.zeros([1, groups, 1, d_in], tf.int32 if block.has_indices else block.dtype)
        return a, tf.zeros([1, 1, groups, 1, d_out], block.dtype)
    a, d = (tf.transpose(joined(x, seen, block), [1, 0, 2, 3]) for x in (seen.inputs(block), slopes))
    layer = Layer(block, a, d[:, tf.newaxis])
    layer = layer if rank is None else of_low_rank(layer, rank)
    return layer.a, layer.d


def _rows_are_smaller(layer):
    """Whether a row has fewer entries as a matrix than as its inputs and slopes."""
    positions, d_in, d_out = layer.a.shape[2], layer.a.shape[-1], layer.d.shape[-1]
    return not layer.block.has_indices and positions is not None and d_in * d_out < positions * (d_in + d_out)


def _as_rows(layer):
    """A layer with the same rows at a single position: as its inputs, with the slope 1."""
    rows = by_layers.matrices_of(layer.a, layer.d)
    flat = tf.reshape(rows, [sizes(rows)[0], 1, 1, math.prod(rows.shape[1:])])
    return dataclasses.replace(layer, a=flat, d=tf.ones([sizes(rows)[0], 1, 1, 1, 1], rows.dtype))


def of_low_rank(layer: Layer, rank: int) -> Layer:
    """The layer with at most `rank` positions; of fewer as it is."""
    positions = layer.a.shape[2]
    if layer.block.has_indices or (positions is not None and positions <= rank):
        return layer
    # each row as Q_a (R_a R_d') Q_d'
    (Q_a, R_a), (Q_d, R_d) = (tf.linalg.qr(tf.linalg.matrix_transpose(x)) for x in (layer.a, layer.d[:, 0]))
    s, U, V = tf.linalg.svd(tf.matmul(R_a, R_d, transpose_b=True))
    half = tf.sqrt(s[..., :rank])[..., tf.newaxis, :]
    a, d = (tf.matmul(Q, X[..., :rank] * half) for Q, X in ((Q_a, U), (Q_d, V)))
    a, d = (tf.linalg.matrix_transpose(x) for x in (a, d))
    return dataclasses.replace(layer, a=a, d=d[:, tf.newaxis])


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some rows and columns of the matrix of a layer; `None` for all.

    Attributes:
        rows, columns: Indices.
        shape: The whole matrix, `([groups,] d_in [+ 1], d_out)`.
    """

    rows: tf.Tensor | None
    columns: tf.Tensor | None
    shape: tuple[int, ...]

    @classmethod
    def drawn(cls, layer: Layer, count: int, seed: Integer) -> "Sample":
        """At most `count` rows and columns, drawn without replacement."""

        def some(n, salt):
            if n <= count:
                return None
            # integers: with and without XLA the same, and XLA has no shuffle
            seeds = tf.stack([tf.cast(seed, tf.int32), salt])
            return tf.argsort(tf.random.stateless_uniform([n], seeds, None, None, tf.int32))[:count]

        d_in, d_out = layer.block.shape[-2:]
        return cls(None if layer.block.has_indices else some(d_in, 0), some(d_out, 1), layer.block.shape)

    def of_layer(self, layer: Layer) -> Layer:
        """The layer with the sampled entries of inputs and slopes."""
        a = layer.a if self.rows is None else self._taken(layer.a, self.rows, -1, -2)
        d = layer.d if self.columns is None else self._taken(layer.d, self.columns, -1, -1)
        return dataclasses.replace(layer, a=a, d=d)

    def of_matrix(self, matrix: tf.Tensor) -> tf.Tensor:
        """The sampled entries of a matrix of the layer."""
        if self.rows is not None:
            matrix = self._taken(matrix, self.rows, -2, -2)
        return matrix if self.columns is None else self._taken(matrix, self.columns, -1, -1)

    def _taken(self, x, indices, axis, of_shape):
        """Some entries along an axis, times the root of how many there are for each of them."""
        scale = (self.shape[of_shape] / indices.shape[0]) ** 0.5
        return tf.gather(x, indices, axis=axis) * trees.exactly(scale, x.dtype)
