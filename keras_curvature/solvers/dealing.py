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


def in_stacks(fn, items, grouped=None, largest=None):
    """`[fn(item) for item in items]`: items of one size in one call, and the calls dealt to the replicas.

    One call for many small matrices keeps the graph small: the first step of a training waits for the graph.

    Args:
        fn: A function of an item, with any leading axis in addition: of matrices `(..., n, n)`, of diagonals
            `(..., n)`, of numbers `(...)`. It returns a nest of tensors with the same leading axis.
        items: Tensors or tuples of tensors, the same on all replicas.
        grouped: For each item, whether its tensors begin with an axis of groups. Defaults to none.
        largest: Items with more entries are not stacked, which would copy them. Defaults to no limit.
    """
    grouped = grouped or [False] * len(items)
    parts = _parts(items, grouped, largest)
    stacks = [_joined([items[i] for i in part], grouped[part[0]]) for part in parts]
    costs, found = [_cubes(stack) for stack in stacks], {}
    for part, result in zip(parts, deal(fn, stacks, costs)):
        found.update(zip(part, _parted(result, [items[i] for i in part], grouped[part[0]])))
    return [found[i] for i in range(len(items))]


def _parts(items, grouped, largest):
    """The positions of the items of each stack."""
    by_size = {}
    for i, (item, has_groups) in enumerate(zip(items, grouped)):
        tensors = tf.nest.flatten(item)
        alone = largest is not None and sum(t.shape.num_elements() for t in tensors) > largest
        key = has_groups, tuple((t.dtype, tuple(t.shape[int(has_groups) :])) for t in tensors), alone and i
        by_size.setdefault(key, []).append(i)
    shares = [(positions, -(-len(positions) // replicas.count())) for positions in by_size.values()]
    return [positions[i : i + size] for positions, size in shares for i in range(0, len(positions), size)]


def _joined(items, grouped):
    """Items as one, along their axes of groups or a new axis; one item as it is."""
    if len(items) == 1:
        return items[0]
    return tf.nest.map_structure(lambda *each: tf.concat(each, 0) if grouped else tf.stack(each), *items)


def _parted(result, items, grouped):
    """The results of the items, from what was computed of all together."""
    if len(items) == 1:
        return [result]
    lengths = [tf.nest.flatten(item)[0].shape[0] for item in items]
    cut = [tf.split(t, lengths) if grouped else tf.unstack(t) for t in tf.nest.flatten(result)]
    return [tf.nest.pack_sequence_as(result, list(each)) for each in zip(*cut)]


def _cubes(item):
    """The cost of inverting or decomposing all matrices of an item."""
    matrices = [t.shape for t in tf.nest.flatten(item) if t.shape.rank >= 2]
    return sum(shape.num_elements() * shape[-1] for shape in matrices)


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
