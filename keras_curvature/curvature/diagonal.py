"""Diagonals of curvature matrices.

`squared_gradients`: the mean over the examples of the elementwise square of each example's own gradient, the
diagonal of the empirical Fisher matrix, with which Hessian-free optimization preconditions. For a `Dense` layer
`y = x W` the gradient of example `i` is `x_i d_i'` and the sum of squares is `(x^2)' (d^2)`: one backward pass
for the whole batch, exact. Other weights (convolutions, recurrent cells, embeddings, layers used twice) get an
unbiased estimate from one more backward pass: with a random sign `s_i` per example,
`E[(sum_i s_i g_i)^2] = sum_i g_i^2`, elementwise.
"""

import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.curvature import sampling, slices, taps
from keras_curvature.curvature.differentiable import differentiable_keras


def squared_gradients(linearization, seed, fisher="empirical"):
    """Mean over the batch of the squared per-example gradients, a vector.

    Args:
        linearization: A `Linearization` of a loss that is a mean over examples.
        seed: Integer tensor or number: the random signs are a function of it and of the example's row in the batch.
        fisher: `"empirical"`, with the true labels, or `"sampled"`, with labels drawn from what the model says.
    """
    sampling.check_fisher(squared_gradients, "fisher", fisher, ("empirical", "sampled"))
    exact = set()
    with differentiable_keras(), taps.dense() as noted:

        def local(pure):
            recording = linearization._record_loss(pure)
            cotangents = recording.cotangents(fisher, seed)
            signed = recording.pull(_signed(cotangents, pure.place, seed))
            taps = noted.pop(replicas.identity(), [])
            squares = _sums_of_squares(recording, cotangents, taps, linearization.variables)
            exact.update(squares)
            sums = [tf.cast(squares.get(i, h), h.dtype) for i, h in enumerate(signed)]
            return recording.evaluation, sums

        sums = linearization._sum(local)
    # squared here, when the slices of all replicas are in: the estimate does not depend on how the batch is cut
    return [s if i in exact else tf.square(s) for i, s in enumerate(sums)]


def _signed(cotangents, place, seed):
    """`s_i c_i` with a random sign for each example."""
    with slices.at(place):
        signs = tf.random.stateless_uniform([place.examples], [0, seed], 0, 2, tf.int32) * 2 - 1
    return [c * _along_batch(tf.cast(signs, c.dtype), c) for c in cotangents]


def _sums_of_squares(recording, cotangents, noted, variables):
    """`sum_i g_i^2` over the examples of one recording, `{index of a variable: tensor}` for those of `Dense` layers."""
    sums, position = {}, {id(v): i for i, v in enumerate(variables)}
    found = _once_each(noted)
    # float32 where a layer computes in half precision; all at once, for one walk down the layers
    for tap, said in zip(found, recording.slopes_at([tap.said for tap in found], cotangents)):
        if said is None:
            continue
        kernel, bias = position.get(id(tap.layer.kernel)), position.get(id(tap.layer.bias))
        if kernel is not None:
            inputs = tf.cast(tap.inputs, said.dtype)
            sums[kernel] = tf.matmul(tf.square(inputs), tf.square(said), transpose_a=True)
        if bias is not None:
            sums[bias] = tf.reduce_sum(tf.square(said), 0)
    return sums


def _once_each(noted):
    """The taps of plain `Dense` layers that were called once, on a matrix `(batch, d_in)`."""
    calls = {}
    for tap in noted:
        calls.setdefault(id(tap.layer), []).append(tap)
    return [c[0] for c in calls.values() if len(c) == 1 and c[0].inputs.shape.rank == 2 and _plain(c[0].layer)]


def _plain(layer):
    return type(layer).__name__ == "Dense" and not getattr(layer, "lora_enabled", False)


def _along_batch(signs, like):
    return tf.reshape(signs, [-1] + [1] * (like.shape.rank - 1))
