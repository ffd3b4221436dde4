"""Inputs that an optimizer keeps in its state, and takes batches of, in turn: a config holds no tensors."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.component import Component, check, register

EXPECTED = "an array, or a list or dictionary of arrays, of numbers, with one row for each example"


@register
@dataclasses.dataclass(frozen=True)
class ArraysLike(Component):
    """What a config says of held arrays.

    Args:
        shapes: A list for each array.
        dtypes: Of each array.
        names: Keys of a dictionary; `None` otherwise.
        single: Whether it is one array, and no list of one.
    """

    shapes: list[list[int]]
    dtypes: list[str]
    names: list[str] | None
    single: bool

    @property
    def examples(self):
        """How many rows they have."""
        return self.shapes[0][0]

    def packed(self, arrays):
        """The arrays in their structure."""
        if self.names is not None:
            return dict(zip(self.names, arrays, strict=True))
        return arrays[0] if self.single else list(arrays)


class HeldData:
    """The arrays of one argument of an optimizer, in its variables.

    Args:
        optimizer: The optimizer.
        argument: The name of the argument.
        data: What the user gave: arrays, `None`, or from a config an `ArraysLike`.
        part: How many examples a batch has: a share, a number, or `None` for all.
    """

    def __init__(self, optimizer, argument, data, part):
        # without the optimizer: Keras saves and loads every attribute of one, and would come back to it
        self._argument, self._part = argument, part
        self.described, self._arrays, self._variables = data, None, ()
        if data is None or isinstance(data, ArraysLike):
            return
        names = list(data) if isinstance(data, dict) else None
        single = not isinstance(data, (dict, list, tuple))
        given = list(data.values()) if names is not None else [data] if single else list(data)
        arrays = [np.asarray(a) if isinstance(a, np.ndarray) or tf.is_tensor(a) else None for a in given]
        valid = bool(arrays) and all(a is not None and a.ndim and a.dtype.kind in "fiub" for a in arrays)
        valid = valid and len({len(a) for a in arrays}) == 1 and len(arrays[0]) > 0
        check(optimizer, argument, _in_words(given), valid, EXPECTED)
        described = [list(map(int, a.shape)) for a in arrays], [a.dtype.name for a in arrays]
        self.described, self._arrays = ArraysLike(*described, names, single), arrays
        check(
            optimizer, "curvature_batch", part, part is None or isinstance(part, float) or part <= len(arrays[0]),
            f"at most the {len(arrays[0])} examples of `{argument}`",
        )  # fmt: skip

    def create(self, optimizer):
        """Create the variables, with the arrays for their values."""
        if self.described is None:
            return
        arrays = self._arrays
        self._variables = [
            optimizer.add_variable(
                tuple(shape), "zeros" if arrays is None else _with(arrays[i]), dtype, name=f"{self._argument}_{i}",
                aggregation="none",
            )
            for i, (shape, dtype) in enumerate(zip(self.described.shapes, self.described.dtypes))
        ]  # fmt: skip
        self._is_there = optimizer.add_scalar(float(arrays is not None), f"has_{self._argument}")
        self._begun = arrays is not None

    def batch(self, optimizer, like):
        """`(x, y, None)` of the next examples on all replicas, with targets as in the batch `like`."""
        self._require(optimizer)
        n, count = self.described.examples, replicas.count()
        size = n if self._part is None else self._part
        size = max(1, round(size * n)) if isinstance(size, float) else int(size)
        own = -(-size // count)
        iterations = tf.cast(optimizer.iterations, tf.int64)

        def drawn(y):
            rows = tf.range(own, dtype=tf.int64)
            at = (iterations * own * count + tf.cast(replicas.number(), tf.int64) * own + rows) % n
            x = [tf.gather(tf.convert_to_tensor(v), at) for v in self._variables]
            return self.described.packed(x), keras.tree.map_structure(lambda t: _repeated(t, rows), y)

        return *replicas.each(drawn, like[1]), None

    def _require(self, optimizer):
        """Refuse zeros in place of arrays that were neither given nor loaded."""
        if not self._begun:
            with tf.init_scope():
                self._begun = replicas.read(self._is_there.value) > 0
        if not self._begun:
            raise ValueError(
                f"`{type(optimizer).__name__}` was made from a config, which has the shapes of "
                f"`{self._argument}` alone: {self.described.shapes}. Load the saved state (a whole saved model, or its "
                f"weights with the optimizer), or give the data anew: `{self._argument}=...`."
            )


def _with(array):
    return lambda shape, dtype: tf.constant(array, dtype)


def _repeated(targets, rows):
    """The targets of a batch, from the first again as often as there are `rows`."""
    if targets is None:
        return None
    count = tf.shape(targets, tf.int64)[0]
    if targets.shape[0] is None:  # a replica may have none
        targets = tf.pad(targets, [(0, 1), *[(0, 0)] * (targets.shape.rank - 1)])
    return tf.gather(targets, rows % tf.maximum(count, 1))


def _in_words(given):
    return [f"{type(a).__name__} {getattr(a, 'shape', '')}" for a in given]
