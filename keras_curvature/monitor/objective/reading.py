"""A probe set: examples that are kept as tensors, so that what is measured on them does not move.

An operator that reads its data anew for every product is another operator every time: shuffled or augmented data give
Ritz values with tiny residuals that are 20-30 % off. So the data are read once, in their order, and kept.
"""

import itertools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.component import check
from keras_curvature.linearization.fisher.convexity import name_of
from keras_curvature.linearization.pure import slices

# Batches of arrays, where nobody says how large: all examples up to the first number, else at most the second; and of
# large examples (28 images of 224 x 224) no more bytes than the third, because activations are many times that.
WHOLE, PART, BYTES = 1024, 512, 2**24
MEMORY = 8e9  # most bytes of a probe set


def batches(owner, data, examples, batch_size, dtype):
    """The probe set of some data, a list of `(x, y, sample_weight)`, nests of tensors in the host's memory.

    Args:
        owner: Whose argument `data` is, for messages.
        data: `(x, y)`, `(x, y, sample_weight)` or `x`, nests of arrays or tensors; or a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches of these.
        examples: The first that many, an integer, or `None` for all.
        batch_size: An integer, of which the last batch has what is left; `None`: the batches of a data set as they are,
            and of arrays all examples at once or, where these are more than 1024 or 16 MB of inputs, parts of at most
            512 and 16 MB, equal ones where the number of examples allows.
        dtype: Floating numbers of NumPy become this.

    Raises:
        ValueError: `data` are none of these; they need more than 8 GB.
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
        check(owner, "data", data, len(read) > 0, "a data set of one batch at least")
        read = read if batch_size is None else _cut(owner, read, batch_size, dtype)
        return [_tensors(batch, dtype) for batch in read]


def is_finite(read):
    """Whether all floating numbers of some batches are finite."""
    parts = [getattr(a, "flat_values", getattr(a, "values", a)) for a in keras.tree.flatten(read) if a is not None]
    with tf.device("CPU:0"):
        return all(bool(tf.reduce_all(tf.math.is_finite(part))) for part in parts if part.dtype.is_floating)


def count(batch):
    """Number of examples of a batch, an integer."""
    return int(slices.examples(batch))


def size_for(rows, bytes_each=1):
    """The batch size for so many examples: all of them, or the largest that is not too large and leaves no rest."""
    most = max(1, BYTES // bytes_each)
    if rows <= min(WHOLE, most):
        return rows
    # a rest is a batch of another shape, for which everything is traced once more
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
    """`(x, y, sample_weight)` of a batch in one of Keras' forms, of tensors and NumPy's arrays as they are."""

    def array(a):
        return a if a is None or tf.is_tensor(a) else np.asarray(a)

    parts = keras.utils.unpack_x_y_sample_weight(batch)
    made = tuple(None if part is None else keras.tree.map_structure(array, part) for part in parts)
    shapes = [tuple(a.shape) for a in keras.tree.flatten(made) if a is not None]
    equal = all(shapes) and len({shape[0] for shape in shapes}) == 1
    if not equal or shapes[0][0] == 0:
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold arrays with a row for each example, the same number in all, and one "
            f"at least. Received: arrays of shapes {', '.join(map(str, shapes)) or None}"
        )
    return made


def _tensors(batch, dtype):
    """A batch of tensors."""

    def tensor(a):
        if a is None or tf.is_tensor(a):
            return a
        return tf.convert_to_tensor(a.astype(dtype, copy=False) if np.issubdtype(a.dtype, np.floating) else a)

    return keras.tree.map_structure(tensor, batch)


def _first(owner, read, examples, dtype):
    """The first `examples` of some batches."""
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
    """Batches of a size; 0 for what suits the number of examples."""
    whole = read[0] if len(read) == 1 else keras.tree.map_structure(lambda *parts: _joined(owner, parts), *read)
    rows = count(whole)
    size = size or size_for(rows, _bytes(whole[0], dtype) // rows or 1)
    if size >= rows:
        return [whole]
    return [_rows(whole, start, min(size, rows - start)) for start in range(0, rows, size)]


def _rows(batch, start, length):
    """Rows `start .. start + length`; of NumPy's arrays a view."""

    def cut(a):
        return a[start : start + length] if isinstance(a, np.ndarray) else slices.rows(a, start, length)

    return keras.tree.map_structure(lambda a: None if a is None else cut(a), batch)


def _bytes(arrays, dtype):
    """Bytes of the dense tensors that a nest of arrays becomes."""
    dense = [a for a in keras.tree.flatten(arrays) if isinstance(a, (tf.Tensor, np.ndarray))]
    return sum(math.prod(a.shape) * _itemsize(a.dtype, dtype) for a in dense)


def _itemsize(own, dtype):
    return own.size if isinstance(own, tf.DType) else np.dtype(dtype if own.kind == "f" else own).itemsize


def _joined(owner, parts):
    shapes = {tuple(part.shape[1:]) for part in parts if part is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"`{owner.__name__}`: `batch_size` needs examples of one shape, to be put into other batches. Received: "
            f"`data` with examples of shapes {sorted(shapes)[:4]}. Leave `batch_size` out, and the batches of the data "
            "set stay as they are."
        )
    join = np.concatenate if isinstance(parts[0], np.ndarray) else tf.concat
    return None if parts[0] is None else join(parts, 0)


def check_inputs(owner, model, x):
    """Refuse inputs of another shape than a model of known inputs takes."""
    inputs, given = getattr(model, "inputs", None), keras.tree.flatten(x)
    if not inputs or (isinstance(x, dict) and len(given) >= len(inputs)):
        return  # a dict may hold more than the model takes, and is matched by names
    takes, got = [tuple(i.shape) for i in inputs], [tuple(a.shape) for a in given]
    if len(takes) != len(got) or not all(map(_takes, takes, got)):
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold inputs of the shape that the model {model.name!r} takes: "
            f"{', '.join(map(str, takes))}. Received: inputs of shape {', '.join(map(str, got))}"
        )


def check_targets(owner, model, y):
    """Refuse targets of another shape than one of Keras' losses takes, for a model with one output of known shape."""
    if type(model).compute_loss is not keras.Model.compute_loss or model.loss is None:
        return  # a loss of its own
    if y is None:
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold targets for the loss of the model {model.name!r}, as `(x, y)`. "
            "Received: inputs alone"
        )
    outputs = getattr(model, "outputs", None) or []
    if len(outputs) != 1 or not tf.is_tensor(y) or not _is_of_keras(model.loss):
        return
    says, got = tuple(outputs[0].shape), tuple(y.shape)
    takes = says[:-1] if "sparse" in name_of(model.loss).lower() else says
    if not (_takes(takes, got) or (len(got) == len(takes) + 1 and got[-1] == 1 and _takes(takes, got[:-1]))):
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold targets of shape {takes}, for the loss {name_of(model.loss)} of the "
            f"model {model.name!r}, whose outputs have the shape {says}. Received: targets of shape {got}"
        )


def _is_of_keras(loss):
    """Whether it is one of Keras' losses that compare outputs and targets entry by entry, or class by class."""
    of = type(loss) if isinstance(loss, keras.losses.Loss) else loss
    known = isinstance(loss, str) or getattr(of, "__module__", "").startswith("keras.")
    return known and name_of(loss).lower().replace("_", "") not in ("ctc", "categoricalgeneralizedcrossentropy")


def _takes(shape, got):
    # Keras gives what has one number for each example an axis
    got = (*got, 1) if len(got) == len(shape) - 1 and shape[-1] == 1 else got
    return len(shape) == len(got) and all(a is None or a == b for a, b in zip(shape, got))
