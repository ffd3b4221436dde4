"""Shared code of the Kronecker-factored methods: a list of blocks, with a pair of factors for each."""

import warnings

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.layers.reasons import reasons
from keras_curvature.solvers import dealing, direct

DECAY = 0.95  # Martens and Grosse (2015), section 5


def warn_of(optimizer, model, indices, instead):
    """Warn once about weights without Kronecker factors, with the reasons and the share of all weights."""
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
    """`[A, G, A, G, ...]` of the given kinds: variables that start at the identity."""

    def identity(shape, dtype):
        return tf.eye(shape[-1], batch_shape=shape[:-2], dtype=dtype)

    return [
        _create(optimizer, shape, block.dtype, f"{name}_{letter}_{i}", identity if kind == "matrix" else "ones")
        for i, block in enumerate(blocks)
        for letter, shape, kind in zip("AG", block.factor_shapes, block.kinds)
        if kind in kinds
    ]


def ones(optimizer, like, name):
    """A variable shaped like a block or a variable, initially 1."""
    return _create(optimizer, like.shape, like.dtype, name, "ones")


def _create(optimizer, shape, dtype, name, initializer):
    dtype = tf.as_dtype(dtype).name
    return optimizer.add_variable(tuple(shape), initializer=initializer, dtype=dtype, name=name, aggregation="none")


def pairs(values):
    """`[A, G, A, G, ...]` as `[(A, G), ...]`."""
    return list(zip(values[::2], values[1::2]))


def matrices(blocks):
    """The indices of the matrices among `[A, G, A, G, ...]`; the others are diagonals."""
    kinds = [kind for block in blocks for kind in block.kinds]
    return [i for i, kind in enumerate(kinds) if kind == "matrix"]


def averaged(old, new, counts):
    """`(running averages, which of them are finite)` of lists of tensors; `counts` estimates are in `old`."""
    kept = tf.minimum(1.0 - 1.0 / (tf.cast(counts, tf.float64) + 1.0), DECAY)
    averages = [
        tf.cast(k, n.dtype) * tf.cast(o, n.dtype) + tf.cast(1.0 - k, n.dtype) * n
        for o, n, k in zip(old, new, tf.unstack(kept))
    ]
    return averages, tf.stack([trees.sums_up(average) for average in averages])


def deal(function, blocks, items):
    """`{i: function(items[i])}` for the matrices among `[A, G, A, G, ...]`; each replica computes some.

    An item is a matrix, or a tuple that begins with one.
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
