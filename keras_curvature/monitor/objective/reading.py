"""Read examples once and keep them as tensors, so that everything is measured on the same data.

An operator that rereads shuffled or augmented data for every product changes between products: its Ritz values are
20-30 % off although their residuals are tiny. So data are read once, in their order, and kept.
"""

import itertools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.component import check
from keras_curvature.linearization.pure import slices

# Default batches of arrays: all examples up to WHOLE, else at most PART; of large examples at most BYTES (28 images of
# 224 x 224), because activations take many times the inputs' memory.
WHOLE, PART, BYTES = 1024, 512, 2**24
MEMORY = 8e9  # most bytes of examples


def batches(owner, data, examples, batch_size, dtype):
    """Read data into a list of `(x, y, sample_weight)`, nests of tensors in the host's memory.

    Args:
        owner: The class or function to name in messages.
        data: `(x, y)`, `(x, y, sample_weight)` or `x`, nests of arrays or tensors; or a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches of these.
        examples: Use the first so many, an integer, or `None` for all.
        batch_size: An integer; the last batch has the rest. `None` keeps the batches of a data set. Of arrays it takes
            all examples at once or, above 1024 examples or 16 MB of inputs, parts of at most 512 examples and 16 MB,
            equal parts where the number of examples allows.
        dtype: NumPy's floating numbers become this.

    Raises:
        ValueError: `data` have another form, or need more than 8 GB.
    """
    if isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        known = _of_dataset(owner, data, examples)
    else:
        read_once = hasattr(data, "__next__") or callable(data)
        expected = "arrays `(x, y)`, a `tf.data.Dataset` or a `keras.utils.PyDataset`, which can be read more than once"
        check(owner, "data", data, not read_once, expected)
        known, batch_size = [data], batch_size or 0
    # a batch is copied to the accelerator when it is used
    with tf.device("CPU:0"):
        read = _first(owner, (_arrays(owner, batch) for batch in known), examples, dtype)
        check(owner, "data", data, len(read) > 0, "a data set with at least one batch")
        read = read if batch_size is None else _cut(owner, read, batch_size, dtype)
        return [_tensors(batch, dtype) for batch in read]


def dtype_of(model):
    """The dtype of floating data for a model: "float64" where a weight is, else Keras' `floatx`."""
    return "float64" if any(v.dtype == "float64" for v in model.variables) else keras.config.floatx()


def is_finite(read):
    """Whether all floating numbers in the batches are finite."""
    parts = [getattr(a, "flat_values", getattr(a, "values", a)) for a in keras.tree.flatten(read) if a is not None]
    with tf.device("CPU:0"):
        return all(bool(tf.reduce_all(tf.math.is_finite(part))) for part in parts if part.dtype.is_floating)


def count(batch):
    """Number of examples of a batch, an integer."""
    return int(slices.examples(batch))


def size_for(rows, bytes_each=1):
    """The default batch size: all examples, or the largest allowed size that leaves no rest."""
    most = max(1, BYTES // bytes_each)
    if rows <= min(WHOLE, most):
        return rows
    # a rest is a batch of another shape, for which everything is traced again
    most = min(PART, most)
    even = max(size for size in range(1, most + 1) if rows % size == 0)
    return even if even > most // 2 else -(-rows // -(-rows // most))


def _of_dataset(owner, data, examples):
    if isinstance(data, tf.data.Dataset):
        infinite = int(data.cardinality().numpy()) == tf.data.INFINITE_CARDINALITY
        known = iter(data)
    else:
        infinite = data.num_batches is None
        known = (data[i] for i in (itertools.count() if infinite else range(data.num_batches)))
    check(owner, "data", data, examples is not None or not infinite, "finite, or given with `examples=` to stop at")
    return known


def _arrays(owner, batch):
    """`(x, y, sample_weight)` of a batch in one of Keras' forms; tensors and NumPy arrays stay as they are."""

    def array(a):
        return a if a is None or tf.is_tensor(a) else np.asarray(a)

    parts = keras.utils.unpack_x_y_sample_weight(batch)
    made = tuple(None if part is None else keras.tree.map_structure(array, part) for part in parts)
    shapes = [tuple(a.shape) for a in keras.tree.flatten(made) if a is not None]
    equal = all(shapes) and len({shape[0] for shape in shapes}) == 1
    if not equal or shapes[0][0] == 0:
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold arrays with one row per example: equally many in all, at least "
            f"one. Received: arrays of shapes {', '.join(map(str, shapes)) or None}"
        )
    return made


def _tensors(batch, dtype):
    """Convert a batch to tensors."""

    def tensor(a):
        if a is None or tf.is_tensor(a):
            return a
        return tf.convert_to_tensor(a.astype(dtype, copy=False) if np.issubdtype(a.dtype, np.floating) else a)

    return keras.tree.map_structure(tensor, batch)


def _first(owner, read, examples, dtype):
    """The batches up to the first `examples` examples."""
    found, taken, left = [], 0, float("inf") if examples is None else examples
    for batch in read:
        found.append(batch if count(batch) <= left else _rows(batch, 0, int(left)))
        taken, left = taken + _bytes(found[-1], dtype), left - count(found[-1])
        _check_memory(owner, taken, sum(map(count, found)))
        if left <= 0:
            break
    return found


def _check_memory(owner, taken, examples):
    if taken > MEMORY:
        raise ValueError(
            f"`{owner.__name__}`: the examples are kept in memory, and {examples} of them need {taken / 1e9:.3g} GB, "
            f"more than {MEMORY / 1e9:.3g} GB. Pass `examples={max(1, int(examples * MEMORY / taken))}` or fewer."
        )


def _cut(owner, read, size, dtype):
    """Cut examples into batches of a size; 0 chooses one by `size_for`."""
    whole = read[0] if len(read) == 1 else keras.tree.map_structure(lambda *parts: _joined(owner, parts), *read)
    rows = count(whole)
    size = size or size_for(rows, _bytes(whole[0], dtype) // rows or 1)
    if size >= rows:
        return [whole]
    return [_rows(whole, start, min(size, rows - start)) for start in range(0, rows, size)]


def _rows(batch, start, length):
    """Rows `start .. start + length`; a view of a NumPy array."""

    def cut(a):
        return a[start : start + length] if isinstance(a, np.ndarray) else slices.rows(a, start, length)

    return keras.tree.map_structure(lambda a: None if a is None else cut(a), batch)


def _bytes(arrays, dtype):
    """Bytes of a nest of arrays as dense tensors."""
    dense = [a for a in keras.tree.flatten(arrays) if isinstance(a, (tf.Tensor, np.ndarray))]
    return sum(math.prod(a.shape) * _itemsize(a.dtype, dtype) for a in dense)


def _itemsize(own, dtype):
    return own.size if isinstance(own, tf.DType) else np.dtype(dtype if own.kind == "f" else own).itemsize


def _joined(owner, parts):
    shapes = {tuple(part.shape[1:]) for part in parts if part is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"`{owner.__name__}`: `batch_size` needs examples of one shape. Received: `data` with examples of "
            f"shapes {sorted(shapes)[:4]}. Leave `batch_size` out to keep the batches of the data set."
        )
    join = np.concatenate if isinstance(parts[0], np.ndarray) else tf.concat
    return None if parts[0] is None else join(parts, 0)


def scatter(strategy, arrays):
    """A list of tensors with a row for each example, cut into one slice for each replica of `strategy`.

    The result can be an argument of `each` and `total`, called in the scope of the strategy. If the rows do not divide
    evenly, the first replicas have one more.
    """
    parts = strategy.num_replicas_in_sync
    if parts == 1:
        return list(arrays)

    def slices_of(array):
        rows = array.shape[0]
        bounds = [rows // parts * i + min(rows % parts, i) for i in range(parts + 1)]

        def here(context):
            own = context.replica_id_in_sync_group
            return array[bounds[own] : bounds[own + 1]]

        return strategy.experimental_distribute_values_from_function(here)

    return [slices_of(array) for array in arrays]
