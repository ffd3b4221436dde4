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
from keras_curvature.curvature import taps
from keras_curvature.curvature.functional import differentiable_keras
from keras_curvature.curvature.products import LossRecording


def squared_gradients(linearization, seed):
    """Mean over the batch of the squared per-example gradients, a vector.

    Args:
        linearization: A `Linearization` of a loss that is a mean over examples.
        seed: Integer tensor or number: the random signs are a function of it and of the replica.
    """
    with differentiable_keras(), taps.dense() as noted:

        def record():
            recording = linearization._record_loss(LossRecording)
            return _sums_of_squares(recording, noted.get(replicas.identity(), []), linearization.variables, seed)

        sums, examples = replicas.total(record)
    # each example's share of the mean loss is 1/N of its own loss: N^2 from the squares, 1/N from the mean
    return [tf.cast(examples, s.dtype) * s for s in sums]


def _sums_of_squares(recording, noted, variables, seed):
    """`(sum_i g_i^2, number of examples)` of one replica."""
    recording.require_leaves()
    examples = tf.shape(recording.leaves[0])[0]
    signs = tf.random.stateless_uniform([examples], [replicas.identity(), seed], 0, 2, tf.int32) * 2 - 1
    cotangents = [s * _along_batch(tf.cast(signs, s.dtype), s) for s in recording.slope]
    sums = [tf.square(h) for h in recording.pull(cotangents)]
    position = {id(v): i for i, v in enumerate(variables)}
    for tap in _once_each(noted):
        (said,) = recording.slopes_at([tap.said])  # float32 where the layer computes in half precision
        if said is None:
            continue
        kernel, bias = position.get(id(tap.layer.kernel)), position.get(id(tap.layer.bias))
        if kernel is not None:
            sums[kernel] = tf.cast(
                tf.matmul(tf.square(tf.cast(tap.inputs, said.dtype)), tf.square(said), transpose_a=True),
                sums[kernel].dtype,
            )
        if bias is not None:
            sums[bias] = tf.cast(tf.reduce_sum(tf.square(said), 0), sums[bias].dtype)
    return sums, tf.cast(examples, tf.float32)


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
