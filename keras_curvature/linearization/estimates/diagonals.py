"""Diagonals of curvature matrices.

`hessian_diagonal`: Hutchinson's estimate. With `z` of independent entries of mean 0 and variance 1,

    E[z * (H z)] = diag(H)

`squared_gradients`: the mean over the examples of the elementwise square of the per-example gradient. With the true
labels this is the diagonal of the empirical Fisher matrix, which preconditions Hessian-free optimization. With labels
drawn from the model it estimates the diagonal of the Fisher matrix. For a `Dense` layer `y = x W` the gradient of
example `i` is `x_i d_i'` and the sum of squares is `(x^2)' (d^2)`: one backward pass for the whole batch, exact if the
rows of `x` are the examples, nothing after the layer mixes them, and `W` has no other use. Other weights (convolutions,
recurrent cells, embeddings, layers used twice) get an unbiased estimate from one more backward pass: with a random sign
`s_i` per example, `E[(sum_i s_i g_i)^2] = sum_i g_i^2`, elementwise.
"""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_choice, check_count, check_scalar
from keras_curvature.linearization.fisher import sampling
from keras_curvature.linearization.layers import taps
from keras_curvature.linearization.products import Pass
from keras_curvature.linearization.pure import batch_axis, randomness, slices
from keras_curvature.typing import Fisher, Integer, Probe, Vector

PROBES = ("rademacher", "gaussian", "exact")
_BITS = [1, 2, 4, 8, 16, 32, 64, -128]  # the bits of a byte


def hessian_diagonal(lin, seed: Integer = 0, probe: Probe = "rademacher", probes: int = 1) -> Vector:
    """An unbiased estimate of the diagonal of the Hessian, a vector: the mean of `z * (H z)` over some `probes`.

    Args:
        seed: Integer tensor or number that determines the random vectors `z`, the same on all replicas.
        probe: `"rademacher"`: `z` of random signs, with the smallest variance; `"gaussian"`; `"exact"`: the diagonal
            itself, by one product for each weight. Defaults to `"rademacher"`.
        probes: Number of random vectors, an integer. Defaults to `1`.

    Raises:
        ValueError: An argument is invalid; the `needs` of the linearization lack `hessian`.
    """
    check_scalar(hessian_diagonal, "seed", seed, integer=True)
    expected = ", ".join(f'"{choice}"' for choice in PROBES)
    check_choice(hessian_diagonal, "probe", probe, PROBES, f"one of {expected}")
    check_count(hessian_diagonal, "probes", probes)
    H, weights = lin.hessian(), lin.weights
    if probe == "exact":
        return _exactly(H, weights)
    total = trees.zeros_like(weights) if probes > 1 else None
    for i in range(probes):
        z = draw(weights, probes * seed + i, probe)
        estimate = [a * b for a, b in zip(z, H @ z)]
        total = estimate if total is None else trees.add(total, estimate)
    return total if probes == 1 else trees.scale(1.0 / probes, total)  # type: ignore[return-value]


def draw(like, seed, probe="rademacher"):
    """A random vector with entries of mean 0 and variance 1, determined by the seed."""
    kind = _signs if probe == "rademacher" else randomness.normal
    return [kind(w.shape, [i, seed], w.dtype) for i, w in enumerate(like)]


def average_kernels(vector):
    """Means over the spatial axes of convolution kernels, kept as axes of length 1; other tensors unchanged.

    A tensor with four axes or more counts as a kernel, the spatial axes first. Kernels of one-dimensional convolutions
    have the shapes of attention projections, so they are left unchanged.
    """
    return [tf.reduce_mean(t, list(range(t.shape.rank - 2)), keepdims=True) if t.shape.rank >= 4 else t for t in vector]


def _signs(shape, seed, dtype):
    """-1 and 1, from one random bit each: a random word for each sign would cost as much as a matrix product."""
    size = shape.num_elements()
    words = tf.random.stateless_uniform([-(-size // 32)], seed, None, None, tf.int32)
    octets = tf.reshape(tf.bitcast(words, tf.int8), [1, -1])
    bits = tf.bitwise.bitwise_and(octets, tf.constant(_BITS, tf.int8)[:, tf.newaxis])
    signs = tf.where(tf.cast(bits, tf.bool), tf.ones([], dtype), -tf.ones([], dtype))
    return tf.reshape(tf.reshape(signs, [-1])[:size], shape)


def _exactly(H, weights):
    """The diagonal of `H` by one product for each weight, one after another."""
    diagonal = []
    for i, w in enumerate(weights):
        size = w.shape.num_elements()

        def entry(j, entries, i=i, w=w, size=size):
            unit = trees.zeros_like(weights)
            unit[i] = tf.reshape(tf.one_hot(j, size, dtype=w.dtype), w.shape)
            found = tf.reduce_sum((H @ unit)[i] * unit[i])
            return j + 1, tf.tensor_scatter_nd_update(entries, [[j]], found[tf.newaxis])

        _, entries = tf.while_loop(lambda j, _, size=size: j < size, entry, (0, tf.zeros([size], w.dtype)))
        diagonal.append(tf.reshape(entries, w.shape))
    return diagonal


def squared_gradients(lin, seed: Integer = 0, fisher: Fisher = "empirical") -> Vector:
    """The mean over the examples of the squared gradient of each, a vector, for a loss that is a mean over examples.

    Exact for `Dense` layers that are used once, on a row for each example, an unbiased estimate for others; see
    `estimates/diagonals.py`. Only an approximation where a kernel is also used outside of its layer, or where examples
    mix after a layer, as in batch normalization. Costs one forward and two backward passes.

    Args:
        seed: Integer tensor or number: it determines the random signs, together with the example's row in the batch.
        fisher: `"empirical"`: with the true labels; `"sampled"`: an estimate of the diagonal of the Fisher matrix, with
            labels drawn from the model. Defaults to `"empirical"`.

    Raises:
        ValueError: `fisher` is invalid; with `"sampled"`, the loss is not the negative logarithm of a known likelihood.
    """
    check_scalar(squared_gradients, "seed", seed, integer=True)
    check_choice(squared_gradients, "fisher", fisher, ("empirical", "sampled"))
    exact = set()
    with taps.dense() as noted:

        def local(pure, weights):
            recorded = Pass(pure, weights, lin.loss_scale, noted=noted)
            cotangents = sampling.of_examples(recorded) if fisher == "empirical" else recorded.cotangents(fisher, seed)
            signed_sum = recorded.pull(signed(recorded, cotangents, seed))
            squares = _sums_of_squares(recorded, cotangents, lin.variables)
            exact.update(squares)
            return [tf.cast(squares.get(i, h), h.dtype) for i, h in enumerate(signed_sum)]

        sums = lin.total(local)
    # squared after the sum over slices and replicas: the estimate does not depend on how the batch is cut
    return [s if i in exact else tf.square(s) for i, s in enumerate(sums)]


def signed(recorded, cotangents, seed):
    """`s_i c_i` with a random sign for each example."""
    place = recorded.pure.place
    with slices.at(place):
        signs = _random_signs([place.examples], [0, seed])

    def sign(i, c, rows):
        if rows is batch_axis.NONE:  # one more example, on each slice another one
            seeds = tf.stack([i + 1, tf.cast(seed, tf.int32)])
            return tf.cast(_random_signs([], tf.random.experimental.stateless_fold_in(seeds, place.start)), c.dtype)
        return _along_batch(tf.cast(batch_axis.spread(signs, rows), c.dtype), c)

    counts = batch_axis.per_example(recorded)
    return [sign(i, c, rows) * c for i, (c, rows) in enumerate(zip(cotangents, counts, strict=True))]


def _random_signs(shape, seed):
    """-1 and 1, integers."""
    return tf.random.stateless_uniform(shape, seed, 0, 2, tf.int32) * 2 - 1


def _sums_of_squares(recorded, cotangents, variables):
    """`sum_i g_i^2` over the examples of one `Pass`, `{index of a variable: tensor}` for those of `Dense` layers."""
    sums, position = {}, {id(v): i for i, v in enumerate(variables)}
    if any(rows is batch_axis.NONE for rows in batch_axis.per_example(recorded)):
        return {}  # every row of a layer's may be part of the one example that such an output counts as
    found = _once_each(recorded.taps, recorded.pure.place.examples)
    # float32 where a layer computes in half precision; all at once, for one walk down the layers
    for tap, slope in zip(found, recorded.slopes_at([tap.pre_activation for tap in found], cotangents)):
        if slope is None:
            continue
        kernel, bias = position.get(id(tap.layer.kernel)), position.get(id(tap.layer.bias))
        if kernel is not None:
            inputs = tf.cast(tap.inputs, slope.dtype)
            sums[kernel] = tf.matmul(tf.square(inputs), tf.square(slope), transpose_a=True)
        if bias is not None:
            sums[bias] = tf.reduce_sum(tf.square(slope), 0)
    return sums


def _once_each(noted, examples):
    """The taps of plain `Dense` layers that were called once, on a matrix `(batch, d_in)`."""

    def is_matrix(x):
        # a length that is known, and not the batch's: rows of something else than single examples
        return x.shape.rank == 2 and (x.shape[0] is None or not batch_axis.have_other_length(x.shape, examples))

    calls = {}
    for tap in noted:
        calls.setdefault(id(tap.layer), []).append(tap)
    return [c[0] for c in calls.values() if len(c) == 1 and is_matrix(c[0].inputs) and _plain(c[0].layer)]


def _plain(layer):
    return type(layer).__name__ == "Dense" and not getattr(layer, "lora_enabled", False)


def _along_batch(signs, like):
    return tf.reshape(signs, [-1] + [1] * (like.shape.rank - 1))
