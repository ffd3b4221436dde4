"""The rows of the Jacobian as a dense array, by many products at a time; right for every layer.

Each column is a product `A e`, each row a product `A' e`: whichever are fewer are computed, by
`tf.vectorized_map`, which turns a product into products of matrices. So 129 columns of a network with 32 hidden units
on 900 examples took 15 ms, 30 gradients. Models with loops (recurrent layers) take one product at a time.

Such a product goes through all examples. Where the examples do not depend on each other, a row needs a pass through its
own example alone, and all rows cost as much as a few gradients. No one can tell that of a layer of the user's, so one
product with the rows is compared with the whole batch's, and where they differ the rows are computed as above.
"""

import keras
import tensorflow as tf

from keras_curvature import keras_internals, trees
from keras_curvature.linearization.jacobian import frames
from keras_curvature.linearization.layers import taps
from keras_curvature.linearization.pure import functional, slices
from keras_curvature.linearization.pure.matmul import vectorized_map

# Bytes that the intermediate results of the products of one call may take, roughly: they are as wide as the layers
# of the model, which are taken for 16 times as wide as its inputs and outputs.
AT_A_TIME = 2**28
WIDTH = 16
# Products with the whole batch that a row of each example may cost at most, to be computed by examples.
PASSES = 8
# How far two ways to a product may differ, relative to it, by the bytes of a number: the roots of the precisions.
SAME = {8: 2.0**-26, 4: 2.0**-11, 2: 2.0**-4}
# For an unknown number of rows: up to this number of weights, columns.
FEW = 1024


def dense(frame, which):
    """The rows of a frame in some of the weights: for each part `(rows, weights)`.

    Args:
        frame: `OfOutputs` or `OfCotangents`.
        which: The indices of the variables, a list.
    """
    n, parts = trees.count([frame.recorded.weights[i] for i in which]), frame.parts()
    if _may_stand_alone(frame, n, parts):
        try:
            found = _by_examples(frame, which, n)
        except (ValueError, TypeError, tf.errors.InvalidArgumentError):  # the model does not take one example, as where
            return _by_products(frame, which, n, parts)  # it compares pairs; another error comes again here
        return tf.cond(_agree(frame, which, found), lambda: found, lambda: _by_products(frame, which, n, parts))
    return _by_products(frame, which, n, parts)


def _by_products(frame, which, n, parts):
    known = all(part.shape.is_fully_defined() for part in parts)
    by_columns = n <= (sum(part.shape.num_elements() for part in parts) if known else FEW)
    return (_by_columns if by_columns else _by_rows)(frame, which, n, parts)


def _may_stand_alone(frame, n, parts):
    """Whether examples may be independent, are known in number, and are worth a pass each."""
    recorded = frame.recorded
    pure, examples = recorded.pure, recorded.pure.place.examples
    if not isinstance(examples, int) or examples < 2 or any(count is None for count in frame.counts()):
        return False
    arrays = [*keras.tree.flatten(pure.x), *recorded.leaves]
    if any(a is None or isinstance(a, (tf.RaggedTensor, tf.SparseTensor)) for a in arrays):
        return False
    if any(tuple(a.shape)[:1] != (examples,) for a in arrays):
        return False
    if any(spec.shape[0] is not None for spec in keras.tree.flatten(getattr(pure.model, "inputs", None) or [])):
        return False
    statistics = (keras.layers.BatchNormalization, keras.layers.SpectralNormalization)
    if any(isinstance(layer, statistics) for layer in keras_internals.layers_of(pure.model)):
        return False
    if functional.seeds(pure.stateful) or _has_loops():  # random numbers are those of the whole batch
        return False
    return PASSES * sum(frame.counts()) < min(n, sum(part.shape.num_elements() for part in parts))


def _by_examples(frame, which, n):
    """The rows of each example from a pass through this example alone."""
    recorded, examples = frame.recorded, frame.recorded.pure.place.examples
    dtype = trees.scalar_dtype(recorded.weights)

    def of_part(part, count):
        # for each leaf (rows of an example * examples, ...)
        cotangents = [tf.concat(of_leaf, 0) for of_leaf in zip(*(frame.unit(part, k) for k in range(count)))]

        def row(i):
            example, k = i // count, i % count
            with taps.closed():
                alone = recorded.alone(example, which)
            pulled = frames.pull(alone, [tf.gather(c, [k * examples + example]) for c in cotangents])
            return tf.ensure_shape(trees.flatten(pulled, dtype), [n])

        return batched(row, examples * count, at_a_time(recorded, examples, n * dtype.size), dtype)

    return [of_part(part, count) for part, count in enumerate(frame.counts())]


def _agree(frame, which, found):
    """Whether the product of these rows with some vector is that of the whole batch."""
    recorded = frame.recorded
    flat = tf.random.stateless_normal([found[0].shape[1]], (7, 11), dtype=found[0].dtype)
    whole = tf.concat(_product(frame, which, flat), 0)
    apart = tf.concat([tf.linalg.matvec(a, flat) for a in found], 0)
    dtypes = (recorded.pure.model.compute_dtype, *(leaf.dtype for leaf in recorded.leaves))
    least = min(tf.as_dtype(kind).size for kind in dtypes)
    return tf.norm(apart - whole) <= SAME[least] * tf.norm(whole)  # false for NaN


def _by_columns(frame, which, n, parts):
    recorded = frame.recorded
    dtype = trees.scalar_dtype(recorded.weights)

    def column(i):
        return _product(frame, which, tf.one_hot(i, n, dtype=dtype))

    columns = batched(column, n, at_a_time(recorded), [dtype] * len(parts))
    return [tf.transpose(c) for c in columns]


def _product(frame, which, flat):
    """The product of the rows with a flat vector of some weights: for each part `(rows,)`."""
    recorded = frame.recorded
    vector = trees.zeros_like(recorded.weights)
    for k, part in zip(which, trees.unflatten(flat, [recorded.weights[i] for i in which])):
        vector[k] = part
    return [tf.cast(tf.reshape(rows, [-1]), flat.dtype) for rows in frame.times(recorded.jvp(vector))]


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


def at_a_time(recorded, pieces=1, result=0):
    """How many products to compute at a time, each through a piece of the batch, with a result of so many bytes."""
    tensors = tf.nest.flatten([recorded.pure.x, *recorded.leaves])
    tensors = [a for a in tensors if tf.is_tensor(a) and a.dtype.is_floating]
    if not tensors or not all(a.shape.is_fully_defined() for a in tensors):
        return 16
    widest = max(a.shape.num_elements() * a.dtype.size for a in tensors)
    return max(1, AT_A_TIME // max(1, WIDTH * widest // pieces + result))


def batched(fn, count, at_a_time, dtypes):
    """`fn(0), fn(1), ...`, stacked; so many at a time."""
    if _has_loops():  # `vectorized_map` fails for derivatives of loops
        return tf.map_fn(fn, tf.range(count), fn_output_signature=dtypes, parallel_iterations=1)
    if isinstance(count, int) and count <= at_a_time:
        return vectorized_map(fn, tf.range(count))
    chunks = -(-count // at_a_time)

    def chunk(c):
        return vectorized_map(lambda i: fn(c * at_a_time + i), tf.range(at_a_time))

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
