"""Sums over replicas: the one file of the package that says `tf.distribute`. No mathematics.

A batch under a distribution strategy is cut into one slice per replica. Everything of the slice (activations,
outputs, tapes) stays on its replica; what a method computes with (gradients, curvature products, inner
products) is the sum over the replicas. Three verbs say so:

    `cross(fn, *args)`   leave the replicas: run `fn` once for all of them
    `each(fn, *args)`    run `fn` on every replica; what it returns stays there
    `total(fn, *args)`   run `fn` on every replica and sum what it returns

A strategy that synchronizes by merge calls (`MirroredStrategy` on CPUs, `MultiWorkerMirroredStrategy`) refuses
a collective inside a `tf.while_loop` or `tf.cond` of a replica, but allows a loop *around* the replicas; this
is why `cross` comes first and the loops of conjugate gradients stand outside. Where a strategy has no merge
calls (TPUs, and the default strategy) `cross` stays where it is, and `total` is an `all_reduce`.
"""

import contextlib

import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer


def uses_merge_calls():
    """Whether the strategy synchronizes by merge calls, so that loops and conditions have to stand outside."""
    return not tf.__internal__.distribute.strategy_supports_no_merge_call()


def count():
    """Number of replicas in sync, a Python integer."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def here():
    """Number of replicas in sync where the caller is one of them, else 1."""
    return 1 if tf.distribute.get_replica_context() is None else count()


def cross(fn, *args):
    """Run `fn(*args)` once for all replicas. `args` are what this replica has; `fn` sees the values of all."""
    context = tf.distribute.get_replica_context()
    if context is None or count() == 1 or not uses_merge_calls():
        return fn(*args)
    return context.merge_call(lambda strategy, *args: fn(*args), args=args)


@contextlib.contextmanager
def keras_outside():
    """While open, Keras' optimizers work where `cross` leads, on gradients that are summed already.

    Keras leaves the replicas by one merge call for each thing that an optimizer does, and in the middle of a `tf.cond`
    (accumulated gradients, averages of the weights) that is refused. Outside already, there is nothing to leave.
    """
    interim = tf.__internal__.distribute.interim
    originals = interim.maybe_merge_call, TFOptimizer._all_reduce_sum_gradients

    def maybe_merge_call(fn, strategy, *args, **kwargs):
        if tf.distribute.in_cross_replica_context():
            return fn(strategy, *args, **kwargs)
        return originals[0](fn, strategy, *args, **kwargs)

    interim.maybe_merge_call = maybe_merge_call
    TFOptimizer._all_reduce_sum_gradients = lambda optimizer, grads_and_vars: grads_and_vars
    try:
        yield
    finally:
        interim.maybe_merge_call, TFOptimizer._all_reduce_sum_gradients = originals


def each(fn, *args):
    """Run `fn(*args)` on every replica; the result stays there, fit to be an argument of `each` or `total`."""
    if count() > 1 and tf.distribute.in_cross_replica_context():
        return tf.distribute.get_strategy().run(fn, args=args)
    return fn(*args)


def total(fn, *args):
    """The sum over replicas of `fn(*args)`, a nest of tensors, the same on all of them."""
    return add_up(each(fn, *args))


def add_up(values):
    """Sum a nest of per-replica tensors over the replicas."""
    if count() == 1:
        return values
    strategy, context = tf.distribute.get_strategy(), tf.distribute.get_replica_context()
    if context is None:
        return tf.nest.map_structure(lambda v: strategy.reduce(tf.distribute.ReduceOp.SUM, v, axis=None), values)
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def identity():
    """A key for Python objects that belong to one replica, such as its gradient tape; call it inside `each`."""
    context = tf.distribute.get_replica_context()
    number = 0 if context is None else context.replica_id_in_sync_group
    static = number if isinstance(number, int) else tf.get_static_value(number)
    return 0 if static is None else int(static)  # a TPU traces one program for all its replicas
