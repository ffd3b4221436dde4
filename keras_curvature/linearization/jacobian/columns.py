"""The rows of the Jacobian as a dense array, by many products at a time; right for every layer.

Each column is a product `R J e`, each row a product `J' R' e`: whichever are fewer are computed, by
`tf.vectorized_map`, which turns a product into products of matrices. So 129 columns of a network with 32 hidden units
on 900 examples took 15 ms, 30 gradients. Models with loops (recurrent layers) take one product at a time.
"""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.jacobian.roots import residuals, roots
from keras_curvature.linearization.pure import slices

# Bytes that the intermediate results of the products of one call may take, roughly: they are as wide as the layers
# of the model, which are taken for 16 times as wide as its inputs and outputs.
AT_A_TIME = 2**28
WIDTH = 16
# For an unknown number of rows: up to this number of weights, columns.
FEW = 1024


def dense(recorded):
    """`(rows, residuals)` of a `Pass`: for each leaf the rows `(rows, weights)`, and its residuals, shaped as it."""
    found, n = roots(recorded), trees.count(recorded.weights)
    known = all(leaf.shape.is_fully_defined() for leaf in recorded.leaves)
    by_columns = n <= (sum(leaf.shape.num_elements() for leaf in recorded.leaves) if known else FEW)
    return (_by_columns if by_columns else _by_rows)(recorded, found, n), residuals(recorded, found)


def _by_columns(recorded, found, n):
    dtype = trees.scalar_dtype(recorded.weights)

    def column(i):
        tangents = recorded.jvp(trees.unflatten(tf.one_hot(i, n, dtype=dtype), recorded.weights))
        return [tf.cast(tf.reshape(root.times(t), [-1]), dtype) for root, t in zip(found, tangents)]

    columns = _batched(column, n, _at_a_time(recorded), [dtype] * len(found))
    return [tf.transpose(c) for c in columns]


def _by_rows(recorded, found, n):
    dtype, scale = trees.scalar_dtype(recorded.weights), recorded.loss_scale

    def of_leaf(k):
        root, leaf = found[k], recorded.leaves[k]
        count = leaf.shape.num_elements() if leaf.shape.is_fully_defined() else tf.size(leaf)

        def row(i):
            unit = root.transposed(tf.reshape(tf.one_hot(i, count, dtype=root.values.dtype), root.shape))
            if scale is not None:  # in half precision a small cotangent would underflow
                unit *= tf.cast(scale, unit.dtype)
            cotangents = [tf.cast(unit, leaf.dtype) if k == i else tf.zeros_like(leaf)
                          for i, leaf in enumerate(recorded.leaves)]  # fmt: skip
            pulled = recorded.pull(cotangents)
            return tf.ensure_shape(tf.cast(trees.flatten(pulled), dtype), [n])

        return _batched(row, count, _at_a_time(recorded), dtype)

    return [of_leaf(k) for k in range(len(found))]


def _at_a_time(recorded):
    """How many products to compute at a time."""
    tensors = tf.nest.flatten([recorded.pure.x, *recorded.leaves])
    tensors = [a for a in tensors if tf.is_tensor(a) and a.dtype.is_floating]
    if not tensors or not all(a.shape.is_fully_defined() for a in tensors):
        return 16
    widest = max(a.shape.num_elements() * a.dtype.size for a in tensors)
    return max(1, AT_A_TIME // max(1, WIDTH * widest))


def _batched(fn, count, at_a_time, dtypes):
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
    """`(chunks, at_a_time, rows)` to `(chunks * at_a_time, rows)`."""
    return tf.reshape(a, tf.concat([[-1], tf.shape(a)[2:]], 0) if a.shape[2] is None else [-1, a.shape[2]])
