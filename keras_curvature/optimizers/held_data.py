"""Inputs that an optimizer keeps in its state, and takes batches of, in turn: a config holds no tensors."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.component import Component, check, register

EXPECTED = "an array, or a list or dictionary of arrays, of finite numbers, with one row for each example"


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
        valid = valid and all(a.dtype.kind != "f" or np.isfinite(a).all() for a in arrays)
        check(optimizer, argument, _in_words(given, arrays), valid, EXPECTED)
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

    def batch(self, optimizer, lin):
        """`(x, y, None)` of the next examples on all replicas, with targets as in the batch of a `Linearization`."""
        self._require(optimizer)
        like = lin.batch
        self._check_inputs(optimizer, like[0], getattr(lin.model, "inputs", None))
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

    def _check_inputs(self, optimizer, x, inputs):
        """Refuse other arrays than the model takes: `x` of a batch, and the symbolic `inputs`, where the model has any.

        Keras would name neither the argument nor, where there are too many arrays, the fault.
        """
        own, names = self.described, sorted(x) if isinstance(x, dict) else None
        count = len(keras.tree.flatten(x))
        fits = count == len(own.shapes) and names == (None if own.names is None else sorted(own.names))
        expected = "one array" if count == 1 else f"a list of {count} arrays"
        expected = expected if names is None else f"a dictionary with the keys {names}"
        expected = f"{expected}, as the inputs of the batch"
        if fits and inputs is not None and len(inputs) == count:
            wanted = [tuple(t.shape) for t in inputs]
            of_own = own.shapes if own.names is None else [s for _, s in sorted(zip(own.names, own.shapes))]
            fits = all(_is_of_shape(s[1:], w[1:]) for s, w in zip(of_own, wanted))
            expected += f", of the shapes {wanted}"
        received = f"arrays of the shapes {own.shapes}"
        received += "" if own.names is None else f" with the keys {own.names}"
        if not fits:
            raise ValueError(
                f"`{type(optimizer).__name__}`: `{self._argument}` must be {expected}. Received: {received}"
            )

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


def _is_of_shape(shape, wanted):
    """Whether the shape of an example is one that Keras takes, which adds or drops a last axis of length 1."""
    shape, wanted = ([*s[:-1]] if s and s[-1] == 1 else [*s] for s in (shape, wanted))
    return len(shape) == len(wanted) and all(w is None or w == n for n, w in zip(shape, wanted))


def _in_words(given, arrays):
    """What came, of each array its type, its shape and whether it has what is not finite; of many the first ones."""
    words = [" ".join([type(a).__name__, *_of_array(array)]) for a, array in zip(given[:3], arrays)]
    return words if len(given) <= 3 else [*words, f"... {len(given)} in all"]


def _of_array(array):
    if array is None:
        return []
    not_finite = array.dtype.kind == "f" and not np.isfinite(array).all()
    return [f"of {array.dtype}", str(array.shape), *(["with NaN or infinity"] if not_finite else [])]
