"""A probe set: examples that are kept as tensors, so that what is measured on them does not move.

An operator that reads its data anew for every product is another operator every time: shuffled or augmented data give
Ritz values with tiny residuals that are 20-30 % off. So the data are read once, in their order, and kept.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.component import check
from keras_curvature.curvature import slices

# Batches of arrays, where nobody says how large: all examples up to the first number, else at most the second.
WHOLE, PART = 1024, 512


def batches(owner, data, examples, batch_size, dtype):
    """The probe set of some data, a list of `(x, y, sample_weight)`, nests of tensors.

    Args:
        owner: Whose argument `data` is, for messages.
        data: `(x, y)`, `(x, y, sample_weight)` or `x`, nests of arrays or tensors; or a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches of these.
        examples: The first that many, an integer, or `None` for all.
        batch_size: An integer; `None`: the batches of a data set as they are, and of arrays all examples at once, or
            equal parts of at most 512 where these are more than 1024.
        dtype: Floating numbers of NumPy become this.
    """
    if isinstance(data, tf.data.Dataset):
        read = _of_dataset(owner, data, examples)
    elif isinstance(data, keras.utils.PyDataset):
        read = _of_py_dataset(data, examples)
    else:
        check(owner, "data", data, not hasattr(data, "__next__") and not callable(data),
              "arrays `(x, y)`, a `tf.data.Dataset` or a `keras.utils.PyDataset`: a generator can be read only once")
        read, batch_size = [_tensors(owner, data, dtype)], batch_size or 0
    read = _first(owner, [_tensors(owner, batch, dtype) for batch in read], examples)
    return read if batch_size is None else _cut(owner, read, batch_size)


def count(batch):
    """Number of examples of a batch, an integer."""
    return int(slices.examples(batch))


def _of_dataset(owner, data, examples):
    infinite = int(data.cardinality().numpy()) == tf.data.INFINITE_CARDINALITY
    check(owner, "data", data, examples is not None or not infinite, "finite, or given with `examples=`")
    return _until(iter(data), examples)


def _of_py_dataset(data, examples):
    known = data.num_batches if data.num_batches is not None else len(data)
    return _until((data[i] for i in range(known)), examples)


def _until(read, examples):
    """Batches until there are so many examples."""
    found, left = [], float("inf") if examples is None else examples
    for batch in read:
        found.append(batch)
        left -= int(next(a for a in keras.tree.flatten(batch) if a is not None).shape[0])
        if left <= 0:
            break
    return found


def _tensors(owner, batch, dtype):
    """`(x, y, sample_weight)` of a batch in one of Keras' forms, of tensors."""

    def tensor(a):
        if a is None or tf.is_tensor(a):
            return a
        a = np.asarray(a)
        return tf.convert_to_tensor(a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a)

    unpacked = keras.utils.unpack_x_y_sample_weight(batch)
    made = tuple(keras.tree.map_structure(tensor, part) for part in unpacked)
    shapes = [tuple(a.shape) for a in keras.tree.flatten(made) if a is not None]
    equal = all(shape for shape in shapes) and len({shape[0] for shape in shapes}) == 1
    if not equal or shapes[0][0] == 0:
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold arrays with one row for each example, the same number in all, and "
            f"one at least. Received: arrays of shapes {shapes}"
        )
    return made


def _first(owner, read, examples):
    """The first `examples` of some batches."""
    check(owner, "data", read, len(read) > 0, "a data set with one batch at least")
    found, left = [], float("inf") if examples is None else examples
    for batch in read:
        if left > 0:
            found.append(batch if count(batch) <= left else slices.rows(batch, 0, int(left)))
        left -= count(batch)
    return found


def _cut(owner, read, size):
    """Batches of a size; 0 for what suits the number of examples."""
    whole = _joined(owner, read)
    rows = count(whole)
    if size == 0:
        parts = 1 if rows <= WHOLE else -(-rows // PART)
        size = -(-rows // parts)
    return [slices.rows(whole, start, min(size, rows - start)) for start in range(0, rows, size)]


def _joined(owner, read):
    if len(read) == 1:
        return read[0]

    def join(*parts):
        shapes = {tuple(part.shape[1:]) for part in parts if part is not None}
        if len(shapes) > 1:
            raise ValueError(
                f"`{owner.__name__}`: `batch_size` needs examples of one shape, to be put into other batches. "
                f"Received: `data` with examples of shapes {sorted(shapes)[:4]}. Leave `batch_size` out, and the "
                "batches of the data set stay as they are."
            )
        return None if parts[0] is None else tf.concat(parts, 0)

    return keras.tree.map_structure(join, *read)
