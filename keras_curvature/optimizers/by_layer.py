"""Shared code of the Kronecker-factored methods: a pair of factors `(A, G)` for each block of the curvature matrix.

A block belongs to one matrix of weights of one layer; see `linearization/layers/kronecker.py`. Factors of all blocks
are one flat list, `[A, G, A, G, ...]`.
"""

import warnings

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.layers.reasons import reasons
from keras_curvature.solvers import dealing, direct

DECAY = 0.95  # Martens and Grosse (2015), section 5
TAKES_TURNS = 1024  # rows of a matrix; to decompose a larger one takes half a second or more of two cores
STACKED = 2**18  # blocks with more entries in their factors are not copied into a stack with others


def warn_of(optimizer, model, indices, instead):
    """Warn about weights without Kronecker factors: the reasons, their share, and what their steps use instead."""
    if not indices:
        return
    named = [f"{path} ({reason})" for path, reason in reasons(model, indices)]
    all_weights = model.trainable_variables
    share = trees.count([all_weights[i] for i in indices]) / trees.count(all_weights)
    warnings.warn(
        f"`{type(optimizer).__name__}` knows no Kronecker factors for {', '.join(named)}: {share:.2g} of all weights. "
        f"Their steps use {instead}.",
        stacklevel=3,
    )


def create_factors(optimizer, blocks, name, kinds=("matrix", "diagonal")):
    """Variables for `[A, G, A, G, ...]`, those of the given kinds, with the identity as initial value."""

    return [
        create(optimizer, shape, block.dtype, f"{name}_{letter}_{i}", identity if kind == "matrix" else "ones")
        for i, block in enumerate(blocks)
        for letter, shape, kind in zip("AG", block.factor_shapes, block.kinds)
        if kind in kinds
    ]


def identity(shape, dtype):
    """The initial value of matrices, one or a stack of them."""
    return tf.eye(shape[-1], batch_shape=shape[:-2], dtype=dtype)


def ones(optimizer, like, name):
    """A variable of ones with the shape and dtype of `like`, a block or a variable."""
    return create(optimizer, like.shape, like.dtype, name, "ones")


def create(optimizer, shape, dtype, name, initializer):
    """A variable of an optimizer that is the same on all replicas."""
    dtype = tf.as_dtype(dtype).name
    return optimizer.add_variable(tuple(shape), initializer=initializer, dtype=dtype, name=name, aggregation="none")


def pairs(values):
    """`[A, G, A, G, ...]` as `[(A, G), ...]`."""
    return list(zip(values[::2], values[1::2]))


def matrices(blocks):
    """The indices in `[A, G, A, G, ...]` of the factors that are matrices; the other factors are diagonals."""
    kinds = [kind for block in blocks for kind in block.kinds]
    return [i for i, kind in enumerate(kinds) if kind == "matrix"]


def turns(blocks, count):
    """For each block the number of the turn, of `count`, in which its factors are decomposed.

    Blocks of small factors have the first turn, 0. The others share the turns after it, as evenly as their costs
    allow, so that no step waits for all of them.
    """
    costs = [sum(shape[-1] ** 3 for shape in _matrix_shapes(block)) for block in blocks]
    slow = [i for i, block in enumerate(blocks) if any(s[-1] > TAKES_TURNS for s in _matrix_shapes(block))]
    found, loads = [0] * len(blocks), dict.fromkeys(range(1, count), 0)
    for i in sorted(slow, key=lambda i: -costs[i]) if loads else []:
        found[i] = min(loads, key=loads.get)
        loads[found[i]] += costs[i]
    return found


def _matrix_shapes(block):
    return [shape for shape, kind in zip(block.factor_shapes, block.kinds) if kind == "matrix"]


def averaged(old, new, counts, decay=DECAY):
    """`(averages, finite)`: the running averages after `new`, and whether each is finite.

    Args:
        old: The averages so far, a list of tensors.
        new: The new estimates, a list of tensors.
        counts: Number of estimates in each average of `old`, a vector.
        decay: Largest weight of an old average.
    """
    kept = tf.minimum(1.0 - 1.0 / (tf.cast(counts, tf.float64) + 1.0), decay)
    # cast once for each dtype, not once for each factor
    shares = {d: [tf.unstack(tf.cast(part, d)) for part in (kept, 1.0 - kept)] for d in {n.dtype for n in new}}
    averages = []
    for i, (o, n) in enumerate(zip(old, new)):
        of_old, of_new = shares[n.dtype]
        averages.append(of_old[i] * tf.cast(o, n.dtype) + of_new[i] * n)
    return averages, tf.stack([trees.has_finite_sum(average) for average in averages])


def whole_or_nan(groups):
    """`(tensors, fine)`: a group with a number that is not finite becomes NaN as a whole, for `refresh` to drop.

    Args:
        groups: Lists of tensors that belong together, such as the next state of a layer.
    """
    fine = [tf.reduce_all([trees.has_finite_sum(x) for x in group]) for group in groups]
    found = [tf.where(good, x, tf.constant(float("nan"), x.dtype)) for good, group in zip(fine, groups) for x in group]
    return found, fine


def computed(function, blocks, factors, *more):
    """`[A', G', A', G', ...]` of `function(A, G, ...) -> (A', G')`, small blocks of one shape in one call.

    Each replica computes some of them.

    Args:
        function: Of the two factors of a block, of which one may be a diagonal, with any leading axis in addition.
        blocks: The blocks.
        factors: `[A, G, A, G, ...]`.
        *more: Lists of further arguments, a scalar for each block.
    """
    grouped = [len(block.shape) == 3 for block in blocks]
    items = []
    for block, has_groups, both, *scalars in zip(blocks, grouped, pairs(factors), *more):
        items.append((*both, *(tf.fill(block.shape[:1], c) if has_groups else c for c in scalars)))
    found = dealing.in_stacks(lambda item: function(*item), items, grouped, largest=STACKED)
    return [factor for both in found for factor in both]


def inverses(blocks, factors, dampings):
    """Inverses of `[A, G, A, G, ...]`, with the damping of each block split between its two factors."""
    return [] if not blocks else computed(inverse_pair, blocks, factors, dampings)


def is_diagonal(factor, other):
    """Whether a factor is the diagonal of a matrix, where the other one of its block is a matrix."""
    return factor.shape.rank < other.shape.rank


def inverse_pair(A, G, damping):
    """The inverses of both factors of a block, with the damping split between them."""
    means = mean_eigenvalue(A, G), mean_eigenvalue(G, A)
    of_A, of_G = direct.split_damping(*means, damping)
    return _inverse(A, G, of_A), _inverse(G, A, of_G)


def mean_eigenvalue(factor, other):
    """The mean eigenvalue of a factor, a matrix or a diagonal."""
    return tf.reduce_mean(factor, -1) if is_diagonal(factor, other) else direct.mean_eigenvalue(factor)


def _inverse(factor, other, damping):
    return (direct.inverse_of_diagonal if is_diagonal(factor, other) else direct.inverse)(factor, damping)
