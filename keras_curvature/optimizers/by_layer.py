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

    def identity(shape, dtype):
        return tf.eye(shape[-1], batch_shape=shape[:-2], dtype=dtype)

    return [
        _create(optimizer, shape, block.dtype, f"{name}_{letter}_{i}", identity if kind == "matrix" else "ones")
        for i, block in enumerate(blocks)
        for letter, shape, kind in zip("AG", block.factor_shapes, block.kinds)
        if kind in kinds
    ]


def ones(optimizer, like, name):
    """A variable of ones with the shape and dtype of `like`, a block or a variable."""
    return _create(optimizer, like.shape, like.dtype, name, "ones")


def _create(optimizer, shape, dtype, name, initializer):
    dtype = tf.as_dtype(dtype).name
    return optimizer.add_variable(tuple(shape), initializer=initializer, dtype=dtype, name=name, aggregation="none")


def pairs(values):
    """`[A, G, A, G, ...]` as `[(A, G), ...]`."""
    return list(zip(values[::2], values[1::2]))


def matrices(blocks):
    """The indices in `[A, G, A, G, ...]` of the factors that are matrices; the other factors are diagonals."""
    kinds = [kind for block in blocks for kind in block.kinds]
    return [i for i, kind in enumerate(kinds) if kind == "matrix"]


def averaged(old, new, counts):
    """`(averages, finite)`: the running averages after `new`, and whether each is finite.

    Args:
        old: The averages so far, a list of tensors.
        new: The new estimates, a list of tensors.
        counts: Number of estimates in each average of `old`, a vector.
    """
    kept = tf.minimum(1.0 - 1.0 / (tf.cast(counts, tf.float64) + 1.0), DECAY)
    averages = [
        tf.cast(k, n.dtype) * tf.cast(o, n.dtype) + tf.cast(1.0 - k, n.dtype) * n
        for o, n, k in zip(old, new, tf.unstack(kept))
    ]
    return averages, tf.stack([trees.has_finite_sum(average) for average in averages])


def deal(function, blocks, items):
    """`{i: function(items[i])}` for the factors that are matrices; the replicas share the work.

    Args:
        function: A function of one item.
        blocks: The blocks.
        items: One for each factor in `[A, G, A, G, ...]`: a matrix, or a tuple that begins with a matrix.
    """
    places = matrices(blocks)
    chosen = [items[i] for i in places]
    costs = [_cubes(item[0] if isinstance(item, tuple) else item) for item in chosen]
    return dict(zip(places, dealing.deal(function, chosen, costs)))


def inverses(blocks, factors, dampings):
    """Inverses of `[A, G, A, G, ...]`, with the damping of each block split between its two factors."""
    split = []
    for block, both, damping in zip(blocks, pairs(factors), dampings):
        means = [_mean_eigenvalue(factor, kind) for factor, kind in zip(both, block.kinds)]
        split += direct.split_damping(*means, damping)
    items = list(zip(factors, split))
    found = deal(lambda item: direct.inverse(*item), blocks, items)
    return [found[i] if i in found else direct.inverse_of_diagonal(*item) for i, item in enumerate(items)]


def _cubes(matrix):
    """The cost of inverting or decomposing matrices `(..., d, d)`."""
    return matrix.shape.num_elements() * matrix.shape[-1]


def _mean_eigenvalue(factor, kind):
    return direct.mean_eigenvalue(factor) if kind == "matrix" else tf.reduce_mean(factor, -1)
