"""A batch is cut in three ways, and the results do not depend on the cut.

It is cut into the slices of replicas, into micro-batches (`micro_batches.py`), and, for methods that use a part of the
batch, into pieces. A `Place` holds the rows of the whole batch that a slice has. An evaluation runs `at` its place,
with two effects:

* A loss that is a mean over the examples is weighted by the slice's share of the examples. So the sum over slices is
  the mean over the batch, even for uneven slices; Keras gives every replica the same share. Two losses are means over
  other numbers: masked losses over the unmasked steps, and `reduction="mean_with_sample_weight"` over the weights. For
  these the result is the mean of per-slice means. It equals the mean over the batch if slices have the same number of
  steps, or the same sum of weights, per example; and always if the means over all examples are known, as where
  curvature is measured (`reductions.py`). A loss that returns one number for a slice is weighted by the share
  too. Some losses couple examples: contrastive losses, `Circle`, `Dice` and `Tversky` over the batch, the root of a
  mean. For these the mean of the slices' values is not the value of the whole batch, and `warn_of_coupled` warns.
* Random draws for each example (dropout masks, noise) are the rows of the whole batch's draw; see `randomness.py`.
"""

import contextlib
import contextvars
import dataclasses
import numbers
import warnings

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas
from keras_curvature.component import check, check_scalar

# per thread, and so per replica: replicas of a `MirroredStrategy` take turns within an evaluation
_place = contextvars.ContextVar("place", default=None)


@dataclasses.dataclass(frozen=True)
class Place:
    """Rows `start .. start + examples` of a batch of `total`; each an integer or an int32 tensor.

    `weighs_means`: whether Keras' means over the examples are weighted by the share of the slice.
    """

    start: object
    examples: object
    total: object
    weighs_means: bool = False

    @property
    def is_whole(self):
        """Whether this is known to be the whole batch."""
        return self.examples is self.total or self._is_share(1)

    @property
    def is_even(self):
        """Whether this is known to be the share that Keras assumes: the share of one of equal replicas."""
        return self.examples is self.total or self._is_share(replicas.count())

    def _is_share(self, parts):
        return isinstance(self.examples, int) and isinstance(self.total, int) and self.examples * parts == self.total

    @property
    def may_be_empty(self):
        """Whether the slice may have no examples, as on a replica at the last batch of an epoch."""
        return not self.is_whole and (not isinstance(self.examples, int) or self.examples == 0)

    def part(self, start, examples):
        """The place of rows of this slice."""
        return Place(self.start + start, examples, self.total)

    def share(self, dtype):
        """`examples / total`, a scalar."""
        if isinstance(self.examples, int) and isinstance(self.total, int):
            return tf.constant(self.examples / self.total, dtype)
        return tf.cast(self.examples, dtype) / tf.cast(self.total, dtype)

    def weigh(self, mean):
        """`mean` times the share; 0 instead of NaN without examples."""
        return self.unless_empty(mean * self.share(mean.dtype), tf.zeros_like(mean))

    def unless_empty(self, value, otherwise):
        """`value`, or `otherwise` if the slice has no examples."""
        return tf.where(self.examples > 0, value, otherwise) if self.may_be_empty else value

    def counted(self, sums):
        """A nest of sums over the slice's examples; 0 without examples, even if a layer's mean is NaN."""
        return tf.nest.map_structure(lambda s: self.unless_empty(s, tf.zeros_like(s)), sums)


def here():
    """The `Place` of the evaluation that runs on this thread; `None` for the whole batch."""
    return _place.get()


@contextlib.contextmanager
def at(place):
    """While open, this thread evaluates at `place`."""
    with keras_internals.holding(_place, None if place.is_whole else place):
        yield


_warned = set()


def warn_of_coupled(loss):
    """Warn once per name of a loss that its value on slices may differ from its value on the whole batch."""
    warn_once(
        f"The loss {loss!r} does not return an independent value for each example, and the batch is cut into slices "
        "(micro-batches, replicas or a curvature batch). The result is the mean of the slices' losses. It is the loss "
        "of the whole batch if the loss is a mean over examples, without sample weights. If the loss couples examples "
        "(contrastive losses, `Circle`, `Dice` over the batch, the root of a mean), use micro_batches=1 on one "
        "replica, or a loss that returns one value for each example."
    )


def warn_of_sums(model):
    """Warn once per name of a layer whose activity regularizer this Keras adds up over the batch."""
    if keras_internals.ACTIVITY_IS_A_MEAN:
        return
    for layer in keras_internals.layers_of(model):
        if getattr(layer, "activity_regularizer", None) is not None:
            warn_once(
                f"The batch is cut into slices (micro-batches, replicas or a curvature batch), and Keras "
                f"{keras.__version__} adds the `activity_regularizer` of {layer.name!r} up over the examples of a "
                "slice. Added losses are averaged over the slices, so it counts less. Use Keras 3.14 or newer, which "
                "takes the mean over the examples, or micro_batches=1 on one replica."
            )


def warn_once(message, stacklevel=3):
    """Warn, unless this process has warned in the same words before."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=stacklevel)


def graph():
    """The graph that is being traced; `None` in eager execution."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def examples(batch):
    """Number of examples of a nest of arrays: an integer if the shape is known, else a tensor."""
    first = next(a for a in keras.tree.flatten(batch) if a is not None)
    # ragged and sparse tensors stay as they are; their shape is int64
    return tf.cast(tf.shape(first)[0], tf.int32) if first.shape[0] is None else first.shape[0]


def rows(batch, start, length):
    """Rows `start .. start + length` of every array in a nest; `None` stays."""

    def cut(a):
        a = _dense(a)
        sizes = [length] + [-1] * (a.shape.rank - 1)
        return _known(tf.slice(a, [start] + [0] * (a.shape.rank - 1), sizes), length, a.shape)

    return keras.tree.map_structure(lambda a: None if a is None else cut(a), batch)


def check_piece(owner, size, index, names=("size", "index")):
    """`(size, index)` as `piece` takes them; refused unless they are a share or number of examples, and a number."""
    whole = isinstance(size, numbers.Integral)
    valid = isinstance(size, numbers.Real) and not isinstance(size, bool) and (size >= 1 if whole else 0 < size <= 1)
    expected = "a share of the batch in (0, 1] (a float) or a number of examples >= 1 (an integer)"
    check(owner, names[0], size, valid, expected)
    check_scalar(owner, names[1], index, low=0, integer=True)
    return int(size) if whole else float(size), index


def check_part(owner, part):
    """The same of `part=(size, index)`, or `None`."""
    if part is None:
        return None
    check(owner, "part", part, isinstance(part, (tuple, list)) and len(part) == 2, "`(size, index)`, or None")
    return check_piece(owner, *part, names=("part[0]", "part[1]"))


def piece(batch, size, index):
    """The `index`-th piece of a replica's slice of the batch; see `Linearization.chunk`."""
    available = examples(batch)
    if isinstance(available, int):  # then all lengths are numbers: XLA needs static shapes of slices
        share = size * available if isinstance(size, float) else size / replicas.count()
        length = max(1, min(round(share), available))
        pieces = max(1, available // length)
    else:
        share = size * tf.cast(available, tf.float32) if isinstance(size, float) else size / replicas.count()
        length = tf.clip_by_value(tf.cast(tf.math.round(share), tf.int32), 1, tf.maximum(available, 1))
        pieces = tf.maximum(available // length, 1)
    # strided rows, not consecutive ones: the pieces of the replicas' slices then make up the pieces of the batch
    first = tf.cast(index, tf.int32) % pieces

    def cut(a):
        a = _dense(a)
        return _known(tf.gather(a, first + pieces * tf.range(tf.minimum(length, available))), length, a.shape)

    return keras.tree.map_structure(lambda a: None if a is None else cut(a), batch)


def _dense(a):
    if isinstance(a, (tf.RaggedTensor, tf.SparseTensor)):
        raise ValueError(
            "A batch can be cut into micro-batches or parts only if it consists of dense arrays. Received: a "
            f"`{type(a).__name__}` of shape {tuple(a.shape)}. Give dense inputs (`x.to_tensor()`, "
            "`tf.sparse.to_dense(x)`), or do not cut the batch: micro_batches=1, and an optimizer without a "
            "`curvature_batch`."
        )
    return tf.convert_to_tensor(a)


def _known(a, length, shape):
    return tf.ensure_shape(a, [length if isinstance(length, int) else None, *shape[1:]])
