"""The rows of the Jacobian as a dense array, by many products at a time; right for every layer.

Each column is a product `A e`, each row a product `A' e`: whichever are fewer are computed, by
`tf.vectorized_map`, which turns a product into products of matrices. So 129 columns of a network with 32 hidden units
on 900 examples took 15 ms, 30 gradients. Models with loops (recurrent layers) take one product at a time.
"""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.jacobian import frames
from keras_curvature.linearization.pure import slices

# Bytes that the intermediate results of the products of one call may take, roughly: they are as wide as the layers
# of the model, which are taken for 16 times as wide as its inputs and outputs.
AT_A_TIME = 2**28
WIDTH = 16
# For an unknown number of rows: up to this number of weights, columns.
FEW = 1024


def dense(frame, which):
    """The rows of a frame in some of the weights: for each part `(rows, weights)`.

    Args:
        frame: `OfOutputs` or `OfCotangents`.
        which: The indices of the variables, a list.
    """
    n, parts = trees.count([frame.recorded.weights[i] for i in which]), frame.parts()
    known = all(part.shape.is_fully_defined() for part in parts)
    by_columns = n <= (sum(part.shape.num_elements() for part in parts) if known else FEW)
    return (_by_columns if by_columns else _by_rows)(frame, which, n, parts)


def _by_columns(frame, which, n, parts):
    recorded = frame.recorded
    dtype, chosen = trees.scalar_dtype(recorded.weights), [recorded.weights[i] for i in which]

    def column(i):
        vector = trees.zeros_like(recorded.weights)
        for k, part in zip(which, trees.unflatten(tf.one_hot(i, n, dtype=dtype), chosen)):
            vector[k] = part
        found = frame.times(recorded.jvp(vector))
        return [tf.cast(tf.reshape(rows, [-1]), dtype) for rows in found]

    columns = batched(column, n, at_a_time(recorded), [dtype] * len(parts))
    return [tf.transpose(c) for c in columns]


def _by_rows(frame, which, n, parts):
    recorded = frame.recorded
    dtype = trees.scalar_dtype(recorded.weights)

    def of_part(k):
        count = parts[k].shape.num_elements() if parts[k].shape.is_fully_defined() else tf.size(parts[k])

        def row(i):
            unit = tf.one_hot(i, count, dtype=parts[k].dtype)
            unit = tf.ensure_shape(tf.reshape(unit, tf.shape(parts[k])), parts[k].shape)
            others = [unit if p == k else tf.zeros_like(a) for p, a in enumerate(parts)]
            pulled = frames.pull(recorded, frame.transposed(others))
            return tf.ensure_shape(trees.flatten([pulled[w] for w in which], dtype), [n])

        return batched(row, count, at_a_time(recorded), dtype)

    return [of_part(k) for k in range(len(parts))]


def at_a_time(recorded):
    """How many products to compute at a time."""
    tensors = tf.nest.flatten([recorded.pure.x, *recorded.leaves])
    tensors = [a for a in tensors if tf.is_tensor(a) and a.dtype.is_floating]
    if not tensors or not all(a.shape.is_fully_defined() for a in tensors):
        return 16
    widest = max(a.shape.num_elements() * a.dtype.size for a in tensors)
    return max(1, AT_A_TIME // max(1, WIDTH * widest))


def batched(fn, count, at_a_time, dtypes):
    """`fn(0), fn(1), ...`, stacked; so many at a time."""
    if _has_loops():  # `vectorized_map` fails for derivatives of loops
        return tf.map_fn(fn, tf.range(count), fn_output_signature=dtypes, parallel_iterations=1)
    if isinstance(count, int) and count <= at_a_time:
        return tf.vectorized_map(fn, tf.range(count))
    chunks = -(-count // at_a_time)

    def chunk(c):
        return tf.vectorized_map(lambda i: fn(c * at_a_time + i), tf.range(at_a_time))

    found = tf.map_fn(chunk, tf.range(chunks), fn_output_signature=dtypes, parallel_iterations=1)
    return tf.nest.map_structure(lambda a: _joined(a)[:count], found)  # the last chunk may have too many


def _has_loops():
    """Whether the graph has loops, such as those of recurrent layers."""
    graph = slices.graph()
    # Keras calls some of its loops inside functions; the lists that loops write stand in the graph itself
    types = () if graph is None else {op.type for op in graph.get_operations()}
    return any(name in ("While", "StatelessWhile") or name.startswith("TensorList") for name in types)


def _joined(a):
    """`(chunks, at_a_time, ...)` to `(chunks * at_a_time, ...)`."""
    rest = a.shape[2:]
    return tf.reshape(a, [-1, *rest] if rest.is_fully_defined() else tf.concat([[-1], tf.shape(a)[2:]], 0))
