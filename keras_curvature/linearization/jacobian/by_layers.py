"""The rows of the Jacobian by layers: from the inputs and slopes of each layer, without an array of rows.

Let `a_bt` be the input of a layer at position `t` of example `b`, and `d_bkt` the slope of row `k` of this example in
the layer's output. The rows of its weights, and its share of the Gram matrix, are

    A_bk = sum_t a_bt d_bkt'                                (d_in [+ 1], d_out)
    (A A')_bk,cl = sum_ts (a_bt' a_cs) (d_bkt' d_cls)       at one position: (a a') * (d d'), elementwise

One backward pass to the activations gives the slopes of one row of every example. It takes that no layer mixes the
examples (`layers/apart.py`). Weights that no tapped layer has are left to products (`columns.py`).

Reference: Ren and Goldfarb, "Efficient subsampled Gauss-Newton and natural gradient methods for training neural
networks" (2019), section 4, for layers with one position.
"""

import dataclasses
import math

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.estimates.seen import Seen, sizes
from keras_curvature.linearization.jacobian import columns
from keras_curvature.linearization.layers import apart, kronecker
from keras_curvature.linearization.pure import batch_axis
from keras_curvature.linearization.pure.matmul import matmul, vectorized_map

# Most entries of the rows of one layer kept at a time.
AT_A_TIME = 2**24
# Examples in a batch whose size is not known, for the choice between two ways.
USUAL = 64


@dataclasses.dataclass(frozen=True)
class Layer:
    """The inputs and slopes of one layer.

    Attributes:
        block: The `Block`.
        a: Inputs `(examples, groups, positions, d_in [+ 1])`; of an embedding, indices.
        d: Slopes `(examples, rows of an example, groups, positions, d_out)`.
    """

    block: kronecker.Block
    a: tf.Tensor
    d: tf.Tensor


def usable(recorded):
    """The blocks of the model that have rows by layers in a `Pass`, a list; empty where examples may mix."""
    pure = recorded.pure
    if not recorded.taps or apart.mixing(pure.model, pure.training) is not None:
        return []
    examples, blocks = pure.place.examples, kronecker.blocks(pure.model)[0]
    for leaf in recorded.leaves:
        # a row for each example; of other lengths it may be several, or none
        if leaf.shape[0] is not None and batch_axis.have_other_length(leaf.shape, examples):
            return []
        if not leaf.shape[1:].is_fully_defined():
            return []
    taps = {}
    for tap in recorded.taps:
        taps.setdefault(id(tap.layer), []).append(tap)
    return [block for block in blocks if _is_usable(recorded, block, taps.get(id(block.weights.layer), []))]


def _is_usable(recorded, block, taps):
    """Whether all calls of a layer can be recorded, have a row for each example, and as many positions as is known."""
    if not taps or not all(recorded.reaches(tap) for tap in taps):
        return False
    examples, slopes = recorded.pure.place.examples, [block.weights.slopes(tap, tap.pre_activation) for tap in taps]
    same = all(d.shape[1] is None or not isinstance(examples, int) or d.shape[1] == examples for d in slopes)
    return same and all(d.shape[2] is not None for d in slopes)


def seen(frame, blocks):
    """`[(a, d)]` of `Layer` for each block, with the rows of the slice's examples."""
    recorded = frame.recorded
    noted = Seen(recorded, blocks)
    inputs = [tf.transpose(tf.concat(noted.inputs(block), 2), [1, 0, 2, 3]) for block in blocks]
    scale = 1.0 if recorded.loss_scale is None else recorded.loss_scale

    def of_row(part):
        def slopes(k):
            unit = frame.unit(part, k)
            pulled = [
                tf.cast(c * tf.cast(scale, c.dtype), leaf.dtype) for c, leaf in zip(unit, recorded.leaves, strict=True)
            ]
            of = noted.slopes(pulled)
            return [tf.concat(of(block), 2) for block in blocks]  # each (groups, examples, positions, d_out)

        return slopes

    dtypes, found = [trees.wide(block.dtype) for block in blocks], []
    for part, count in enumerate(frame.counts()):
        if count == 1:
            found.append([d[tf.newaxis] for d in of_row(part)(0)])
        else:
            found.append(columns.batched(of_row(part), count, columns.at_a_time(recorded), dtypes))
    together = [tf.concat(parts, 0) for parts in zip(*found)]  # (rows, groups, examples, positions, d_out)
    together = [tf.ensure_shape(d, [sum(frame.counts()), *d.shape[1:]]) for d in together]
    return [(a, tf.transpose(d, [2, 0, 1, 3, 4])) for a, d in zip(inputs, together, strict=True)]


# Of one layer.


def scaled(layer, scales):
    """The layer with the rows of each variable times the root of its number in `scales`."""
    roots = [tf.sqrt(tf.cast(scales[i], layer.d.dtype)) for i in layer.block.variables]
    if len(roots) == 1:
        return dataclasses.replace(layer, d=layer.d * roots[0])
    of_kernel, of_bias = (tf.fill([n], root) for n, root in zip((layer.a.shape[-1] - 1, 1), roots))
    return dataclasses.replace(layer, a=layer.a * tf.concat([of_kernel, of_bias], 0))


def gram(layer):
    """`A A'`, `(examples, rows, examples, rows)`."""
    groups, positions = layer.a.shape[1:3]
    if layer.block.has_indices or (positions is not None and _pairs_are_cheaper(layer)):
        return _gram_by_pairs(layer)
    if groups == 1 and positions is None:  # of a batch of unknown size, which may have several rows for each example
        is_one = tf.equal(tf.shape(layer.a)[2], 1)
        return tf.cond(is_one, lambda: _gram_of_one_position(layer), lambda: _gram_by_rows(layer))
    return _gram_of_one_position(layer) if groups == positions == 1 else _gram_by_rows(layer)


def _gram_of_one_position(layer):
    rows, a = sizes(layer.d)[:2], layer.a[:, 0, 0]
    flat = tf.reshape(layer.d, [-1, layer.d.shape[-1]])
    of_slopes = tf.reshape(tf.matmul(flat, flat, transpose_b=True), [*rows, *rows])
    return of_slopes * tf.matmul(a, a, transpose_b=True)[:, tf.newaxis, :, tf.newaxis]


def _gram_by_rows(layer):
    rows = sizes(layer.d)[:2]
    found = tf.add_n([tf.matmul(A, A, transpose_b=True) for A in _in_pieces(layer)])
    return tf.reshape(found, [*rows, *rows])


def squares(layer):
    """The sum over all rows of `A^2`, shaped as the matrix of the block."""
    a, d, block = layer.a, layer.d, layer.block
    if block.has_indices:
        same = tf.cast(_same(a[:, :, :, tf.newaxis, 0], a[:, :, tf.newaxis, :, 0]), d.dtype)  # (b, 1, t, t)
        moments = tf.reduce_sum(d * tf.matmul(same[:, tf.newaxis], d), [1, 2])  # (b, t, d_out)
        return tf.math.unsorted_segment_sum(moments, a[:, 0, :, 0], block.shape[0])
    if a.shape[1] == a.shape[2] == 1:
        return tf.matmul(tf.square(a[:, 0, 0]), tf.reduce_sum(tf.square(d[:, :, 0, 0]), 1), transpose_a=True)
    width = [a.shape[1], -1, d.shape[-1]]
    pieces = [tf.reshape(tf.reduce_sum(tf.square(A), 0), width) for A in _in_pieces(layer)]
    return tf.reshape(tf.concat(pieces, 1), block.shape)


def times(layer, matrix):
    """`A v`, `(examples, rows)`, for `v` as the matrix of the block."""
    if layer.block.has_indices:
        at = layer.a[:, 0, :, 0]  # (examples, positions)
        found = tf.gather(matrix, tf.maximum(at, 0))
        found = tf.where((at >= 0)[..., tf.newaxis], found, tf.zeros_like(found))[:, tf.newaxis]
    else:
        found = matmul(layer.a, tf.reshape(matrix, [layer.a.shape[1], layer.a.shape[3], layer.d.shape[-1]]))
    return tf.einsum("bgtj,bkgtj->bk", found, layer.d)


def transposed(layer, u):
    """`A' u` for `u` of shape `(examples, rows)`, as the matrix of the block."""
    a, block = layer.a, layer.block
    d = tf.einsum("bk,bkgtj->bgtj", u, layer.d)
    if block.has_indices:
        return tf.math.unsorted_segment_sum(d[:, 0], a[:, 0, :, 0], block.shape[0])
    return tf.reshape(tf.einsum("bgti,bgtj->gij", a, d), block.shape)


def dense(layer):
    """`A`: a tensor `(examples * rows, *shape)` for each variable of the block."""
    a, d, block = layer.a, layer.d, layer.block
    if block.has_indices:
        one_hot = tf.one_hot(a[:, 0, :, 0], block.shape[0], dtype=d.dtype)
        matrices = tf.einsum("bti,bktj->bkij", one_hot, d[:, :, 0])
    else:
        matrices = matrices_of(a, d)
    matrices = tf.reshape(matrices, [-1, *block.shape])
    return vectorized_map(block.tensors, matrices)


def matrices_of(a, d):
    """The rows as matrices `(examples, rows, groups, d_in, d_out)`, of inputs that are no indices, and slopes."""
    return tf.einsum("bgti,bkgtj->bkgij", a, d)


def _in_pieces(layer):
    """The rows as matrices `(examples * rows, entries)`, for some of the input features at a time."""
    a, d = layer.a, layer.d
    examples, count, groups, _, d_out = d.shape
    size = max(1, AT_A_TIME // ((examples or USUAL) * count * groups * d_out))
    for begin in range(0, a.shape[-1], size):
        A = matrices_of(a[..., begin : begin + size], d)
        yield tf.reshape(A, [-1, math.prod(A.shape[2:])])


def _pairs_are_cheaper(layer):
    """Whether the products of all pairs of positions take fewer operations than those of the rows."""
    examples, count, _, positions, d_out = layer.d.shape
    d_in, rows = layer.a.shape[-1], (examples or USUAL) * count
    by_rows = rows * d_in * d_out * (positions + rows)
    by_pairs = (examples or USUAL) ** 2 * positions**2 * (d_in + count * d_out) + rows**2 * positions * d_out
    return positions > 1 and by_pairs < by_rows


def _gram_by_pairs(layer):
    """The same from products of all pairs of positions, for one example after another."""

    def of_example(one):
        a, d = one  # (groups, t, d_in), (rows, groups, t, d_out)
        if layer.block.has_indices:
            inner = tf.cast(_same(a[:, :, tf.newaxis], layer.a[:, :, tf.newaxis])[..., 0], d.dtype)  # (c, g, t, s)
        else:
            inner = tf.einsum("gti,cgsi->cgts", a, layer.a)
        along = tf.einsum("cgts,clgsj->clgtj", inner, layer.d)
        return tf.einsum("kgtj,clgtj->kcl", d, along)

    count = layer.d.shape[1]
    spec = tf.TensorSpec([count, layer.d.shape[0], count], layer.d.dtype)
    found = tf.map_fn(of_example, (layer.a, layer.d), fn_output_signature=spec, parallel_iterations=1)
    return tf.ensure_shape(found, [layer.d.shape[0], *spec.shape])


def _same(one, other):
    """Whether indices are the same; -1 stands for no index."""
    return tf.equal(one, other) & (one >= 0)
