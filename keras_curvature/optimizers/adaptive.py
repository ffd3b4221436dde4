"""K-FAC's inverses and EKFAC's bases computed anew by a `Refresh`, each block by itself, where its factors moved."""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.optimizers import by_layer
from keras_curvature.solvers.dealing import in_stacks

NEVER = -1.0  # no trace and no damping has this value


def create_last(optimizer, blocks):
    """A variable for the traces of both factors of each block and its damping at its last inverse, `(blocks, 3)`."""

    def never(shape, dtype):
        return tf.fill(shape, tf.constant(NEVER, dtype))

    return optimizer.add_variable((len(blocks), 3), never, name="last_traces", aggregation="none")


def inverses(optimizer, blocks, factors, dampings, variables, last):
    """The next `variables`, `[A^-1, G^-1, ...]`: anew where a trace or the damping has changed by the tolerance.

    `factors` is a function that returns `[A, G, ...]`; called where there is a look.
    """
    every = optimizer.inverses_every
    before = tf.identity(last.value)

    def compute():
        given = factors()
        now = tf.stack([_sizes(*pair, d, last.dtype) for pair, d in zip(by_layer.pairs(given), dampings)])
        due = every.changed(now, before)
        found = _pairs_anew(blocks, given, dampings, variables, tf.unstack(due))
        good = tf.stack([tf.reduce_all([trees.has_finite_sum(x) for x in pair]) for pair in by_layer.pairs(found)])
        return [*found, tf.where((due & good)[:, tf.newaxis], now, before)]

    *values, after = optimizer.refresh([*variables, last], every.check_every, compute)
    optimizer.report(refreshes=tf.reduce_sum(tf.cast(tf.reduce_any(after != before, 1), tf.float32)))
    return values


def _sizes(A, G, damping, dtype):
    """The mean eigenvalues of both factors, over all groups, and the damping."""
    means = [tf.reduce_mean(by_layer.mean_eigenvalue(*pair)) for pair in ((A, G), (G, A))]
    return tf.stack([tf.cast(x, dtype) for x in (*means, damping)])


def _pairs_anew(blocks, factors, dampings, variables, due):
    """`[A^-1, G^-1, ...]`; small blocks of one shape together, and not where none of them is due."""

    def of_stack(item):
        A, G, damping, is_due, *old = item
        new = tf.cond(tf.reduce_any(is_due), lambda: by_layer.inverse_pair(A, G, damping), lambda: tuple(old))
        return tuple(tf.where(_beside(is_due, b), a, b) for a, b in zip(new, old))

    grouped, items = [len(block.shape) == 3 for block in blocks], []
    scalars = zip(blocks, grouped, dampings, due)
    old = by_layer.pairs(trees.values(variables))
    for (block, has_groups, *both), pair, kept in zip(scalars, by_layer.pairs(factors), old):
        items.append((*pair, *(tf.fill(block.shape[:1], x) if has_groups else x for x in both), *kept))
    return [x for pair in in_stacks(of_stack, items, grouped, largest=by_layer.STACKED) for x in pair]


def _beside(condition, x):
    """A condition for each of the matrices or diagonals of a stack."""
    return tf.reshape(condition, [*condition.shape, *[1] * (x.shape.rank - condition.shape.rank)])


def bases(blocks, factors, old, every):
    """Eigenvectors of the factors that are matrices, anew where they no longer diagonalize a factor.

    Returns:
        `(bases, [for each block whether one of its bases is new])`.
    """
    places = by_layer.matrices(blocks)
    grouped = [len(blocks[place // 2].shape) == 3 for place in places]
    items = [(factors[place], basis) for place, basis in zip(places, old)]
    found = in_stacks(lambda item: every.eigenbasis(*item), items, grouped, largest=by_layer.STACKED)
    return found, moved(blocks, found, old)


def moved(blocks, bases, old):
    """For each block whether one of its bases is another one, a list."""
    found = [tf.constant(False)] * len(blocks)
    for place, a, b in zip(by_layer.matrices(blocks), bases, old):
        found[place // 2] |= tf.reduce_any(a != b)
    return found
