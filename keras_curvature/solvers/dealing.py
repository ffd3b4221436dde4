"""Sharing work on a list of items, such as inverses and roots of matrices, among the replicas.

Every replica has all items. Each item is computed on one replica, and one sum over replicas distributes all results.
"""

import tensorflow as tf

from keras_curvature import replicas


def deal(fn, items, costs=None):
    """`[fn(item) for item in items]`, each item computed on one replica only.

    Use it for expensive work on items that are the same on all replicas.

    Args:
        fn: A function of one item, a tensor or nest of tensors, that returns a nest of tensors of static shapes.
        items: A list, the same on all replicas.
        costs: The cost of each item, a list of numbers; the replicas get shares of about equal cost. Defaults to equal
            costs.
    """
    if replicas.count() == 1 or not items:
        return [fn(item) for item in items]
    owners = _owners(costs or [1] * len(items))

    def share(items):
        return [_on_one(owner, fn, item) for owner, item in zip(owners, items)]

    return replicas.total(share, list(items))


def _owners(costs):
    """The replica of each item: the most expensive item first, to the replica with the least work so far."""
    loads, owners = [0] * replicas.count(), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _on_one(owner, fn, item):
    """`fn(item)` on replica `owner`, zeros on the other replicas; call it inside `replicas.each`."""
    spec = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), item)
    like = tf.function(fn, autograph=False).get_concrete_function(spec).structured_outputs

    def idle():
        return tf.nest.map_structure(lambda t: tf.zeros(t.shape, t.dtype), like)

    own = replicas.number()
    static = own if isinstance(own, int) else tf.get_static_value(own)
    if static is None:  # a TPU runs one program on all its replicas
        return tf.cond(tf.equal(own, owner), lambda: fn(item), idle)
    return fn(item) if int(static) == owner else idle()
