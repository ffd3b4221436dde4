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

from keras_curvature.curvature import diagonal as diagonals
from keras_curvature.curvature import layers

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
    """`((dL/dw, whether the loss depends on each), [(mean of inputs, mean of slopes)])`: one backward pass."""
    seen = Seen(recording, blocks)
    gradient, of = seen.gradient_and_slopes()
    return gradient, [_means(block, seen, of(block)) for block in blocks]


class Seen:
    """What the layers of some blocks saw and said in one recording of a slice of the batch.

    Args:
        recording: A `LossRecording` whose layers were tapped.
        blocks: A list of `Block`.
    """

    def __init__(self, recording, blocks):
        self._recording, self.place = recording, recording.pure.place
        wanted = {id(block.weights.layer) for block in blocks}
        self._taps = [tap for tap in recording.taps if id(tap.layer) in wanted]
        _check_within_reach(self._taps, recording)

    def inputs(self, block):
        """The inputs of all calls, `[(groups, rows, positions, d_in [+ 1])]`; of an embedding, indices."""
        seen = [_wide(block.weights.inputs(tap)) for tap in self._taps_of(block)]
        if block.weights.bias is None:
            return seen
        return [tf.concat([a, tf.ones([*_sizes(a)[:3], 1], a.dtype)], -1) for a in seen]

    def slopes(self, cotangents):
        """A function of a block that gives the slopes of all calls, `[(groups, rows, positions, d_out)]`."""
        return self._by_block(self._recording.slopes_at([tap.said for tap in self._taps], cotangents))

    def gradient_and_slopes(self):
        """The gradient of the loss, and the slopes of the loss as a function of a block; one backward pass."""
        gradient, slopes = self._recording.gradient_and_slopes([tap.said for tap in self._taps])
        return gradient, self._by_block(slopes)

    def _by_block(self, slopes):
        found = {id(tap): _like_said(s, tap.said) for tap, s in zip(self._taps, slopes)}
        return lambda block: [block.weights.slopes(tap, found[id(tap)]) for tap in self._taps_of(block)]

    def _taps_of(self, block):
        return [tap for tap in self._taps if tap.layer is block.weights.layer]


def _factors(block, seen, passes):
    """`(A, G)`."""
    if not passes[0]:
        return tuple(tf.zeros(shape, block.dtype) for shape in block.factor_shapes)
    if block.sharing == "exact":
        A, G = _exactly(block, seen, passes)
    else:
        inputs, passes = seen.inputs(block), list(passes)
        if block.sharing == "reduce":
            inputs = [tf.reduce_mean(_joined(inputs, seen), 2, keepdims=True)]
            passes = [[tf.reduce_sum(_joined(slopes, seen), 2, keepdims=True)] for slopes in passes]
        squares = _frequencies(inputs, block) if block.has_indices else _sum_square(inputs)
        A = _mean(squares, inputs, seen)
        G = tf.add_n([_sum_square(slopes) for slopes in passes])
    return tuple(tf.reshape(factor, shape) for factor, shape in zip((A, G), block.factor_shapes))


def _exactly(block, seen, passes):
    """The block itself as `A`, for one output in each group, and 1 as `G`."""
    inputs = _joined(seen.inputs(block), seen)
    gradients = [tf.reduce_sum(inputs * _joined(slopes, seen), 2) for slopes in passes]  # (groups, examples, d_in)
    A = tf.add_n([tf.matmul(g, g, transpose_a=True) for g in gradients])
    return A, seen.place.share(A.dtype) * tf.ones(block.factor_shapes[1], A.dtype)


def _means(block, seen, slopes):
    """`(mean input, mean slope)`."""
    *groups, d_in, d_out = block.shape
    if not slopes:
        return tf.zeros([*groups, d_in], block.dtype), tf.zeros([*groups, d_out], block.dtype)
    inputs = seen.inputs(block)
    sums = _frequencies(inputs, block) if block.has_indices else _sum(inputs)
    a, b = _mean(sums, inputs, seen), _sum(slopes)
    b = b * (tf.cast(seen.place.examples, b.dtype) / tf.cast(_count(slopes), b.dtype))
    return tf.reshape(a, [*groups, d_in]), tf.reshape(b, [*groups, d_out])


def _second_moment(block, seen, passes, U_A, U_G):
    """The sum over examples of the squares of their projected gradients, shaped as the matrix of the block."""
    if not passes[0]:
        return tf.zeros(block.shape, block.dtype)
    inputs = _joined(seen.inputs(block), seen)
    slopes = [_rotated(_joined(slopes, seen), U_G) for slopes in passes]
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
        return _product(tf.square(a[:, :, 0]), tf.square(d[:, :, 0]))
    entries = math.prod([a.shape[0], a.shape[3], d.shape[3]])
    examples = a.shape[1]
    if examples is not None and examples * entries <= AT_A_TIME:
        return tf.reduce_sum(tf.square(tf.matmul(a, d, transpose_a=True)), 1)
    return _moment_in_pieces(a, d, max(1, min(AT_A_TIME // entries, examples or 64)))


def _moment_in_pieces(a, d, size):
    """The same, with the gradients of `size` examples at a time; zeros fill up the last piece."""
    pieces = -(-layers.product(a, [1]) // size)

    def cut(x):
        missing = pieces * size - layers.product(x, [1])
        x = tf.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
        groups, _, positions, width = _sizes(x)
        return tf.transpose(tf.reshape(x, [groups, pieces, size, positions, width]), [1, 0, 2, 3, 4])

    def add(total, piece):
        return total + tf.reduce_sum(tf.square(tf.matmul(*piece, transpose_a=True)), 1)

    zeros = tf.zeros([a.shape[0], a.shape[3], d.shape[3]], a.dtype)
    return tf.foldl(add, (cut(a), cut(d)), zeros, parallel_iterations=1)


def _moment_at_indices(indices, d, rows):
    """The same for unit vectors: a row of a gradient is the sum of the slopes where its index stands."""
    same = tf.cast(tf.equal(indices, tf.linalg.matrix_transpose(indices)), d.dtype)  # (1, examples, t, t)
    return tf.math.unsorted_segment_sum(d * tf.matmul(same, d), indices[..., 0], rows)


# Calls of a layer: lists of `(groups, rows, positions, d)`.


def _sum_square(parts):
    """`sum x x'` over rows and positions, `(groups, d, d)`."""
    flat = [_flat(x) for x in parts]
    return tf.add_n([_product(x, x) for x in flat])


def _product(x, y):
    """`x'y` in each group; of one group a plain matrix product, which is the faster kernel."""
    if x.shape[0] == 1:
        return tf.matmul(x[0], y[0], transpose_a=True)[tf.newaxis]
    return tf.matmul(x, y, transpose_a=True)


def _sum(parts):
    """`sum x`, `(groups, d)`."""
    return tf.add_n([tf.reduce_sum(x, [1, 2]) for x in parts])


def _frequencies(parts, block):
    """How often each index occurs."""
    ones = [tf.ones(_sizes(x), block.dtype) for x in parts]
    return tf.add_n([tf.math.unsorted_segment_sum(o, x, block.shape[0]) for o, x in zip(ones, parts)])


def _mean(total, parts, seen):
    """A sum over rows and positions as a mean, times the share of the slice."""
    return total * (seen.place.share(total.dtype) / tf.cast(_count(parts), total.dtype))


def _count(parts):
    return sum(layers.product(x, [1, 2]) for x in parts)


def _flat(x):
    return tf.reshape(x, [x.shape[0], layers.product(x, [1, 2]), x.shape[3]])


def _joined(parts, seen):
    """Calls side by side, `(groups, examples, positions, d)`."""
    folded = [_by_example(x, seen.place.examples) for x in parts]
    return folded[0] if len(folded) == 1 else tf.concat(folded, 2)


def _by_example(x, examples):
    """Rows that are several for each example, as positions. Rows that all examples share count as one example."""
    groups, rows, positions, width = _sizes(x)
    if isinstance(rows, int) and isinstance(examples, int):
        kept = examples if examples and rows % examples == 0 else 1
    else:
        kept = tf.where(tf.equal(rows % tf.maximum(examples, 1), 0), examples, 1)
    if isinstance(kept, int):
        return x if kept == rows else tf.reshape(x, [groups, kept, rows // kept * positions, width])
    return tf.reshape(x, [groups, kept, rows // tf.maximum(kept, 1) * positions, width])


def _sizes(x):
    """The shape, with tensors where it is not known."""
    return [layers.product(x, [axis]) for axis in range(x.shape.rank)]


def _like_said(slope, said):
    """A slope with the shape that some gradients (of einsums) have lost; zeros where the loss depends on nothing."""
    return _wide(tf.zeros_like(said)) if slope is None else tf.ensure_shape(slope, said.shape)


def _wide(x):
    return x if x.dtype.size >= 4 else tf.cast(x, tf.float32)


def _check_within_reach(taps, recording):
    """Refuse what was said inside a loop or function of the model's own: it cannot be differentiated in from here."""
    for tap in taps:
        if not tf.executing_eagerly() and tap.said.graph is not recording.graph:
            raise ValueError(
                f"The layer {tap.layer.name!r} is called inside a loop, a condition or a `tf.function` of the model, "
                "where its inputs and slopes cannot be seen, so its weights have no Kronecker factors. Give it a class "
                f"with a `call` of its own, and it is left to the diagonal:\n\n"
                f"    class Plain(keras.layers.{type(tap.layer).__name__}):\n"
                "        def call(self, *args, **kwargs):\n"
                "            return super().call(*args, **kwargs)\n"
            )
