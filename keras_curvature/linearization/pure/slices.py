"""A batch is cut in three ways, and none of them may show in what is computed.

Into the slices of replicas, into micro-batches (`micro_batches.py`), and, where a method asks for less, into pieces.
A `Place` says which rows of the whole batch a slice has. An evaluation runs `at` its place, and two things follow:

* A loss that is a mean over the examples counts by the slice's share of them: the sum over slices is the mean over
  the batch, also where slices are uneven. Keras gives every replica the same share. Two kinds of means are not over
  the examples, and the sum is the mean of the slices' means: of a masked loss, over the steps that the mask leaves; and
  with `reduction="mean_with_sample_weight"`, over the weights. Where slices have the same number of steps, or sum of
  weights, for each example, these are the whole batch's too.
  A loss that returns one number for a slice counts by the share too. If it couples examples (contrastive losses,
  `Circle`, `Dice` and `Tversky` over the batch, the root of a mean), the mean of the slices' values is not the value of
  the whole batch; `warn_of_coupled` says so.
* What is drawn at random for each example (dropout masks, noise) is what the whole batch would draw for it; see
  `randomness.py`.
"""

import contextlib
import contextvars
import dataclasses
import warnings

import keras
import tensorflow as tf

from keras_curvature import replicas

# per thread, and so per replica: those of a `MirroredStrategy` take turns within an evaluation
_place = contextvars.ContextVar("place", default=None)


@dataclasses.dataclass(frozen=True)
class Place:
    """Rows `start .. start + examples` of a batch of `total`; each an integer or an int32 tensor.

    `weighs_means`: whether Keras' means over the examples shall count by the share of the slice.
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
        """Whether this is known to be the share of the batch that Keras takes it for: one of equal replicas."""
        return self.examples is self.total or self._is_share(replicas.count())

    def _is_share(self, parts):
        return isinstance(self.examples, int) and isinstance(self.total, int) and self.examples * parts == self.total

    @property
    def may_be_empty(self):
        """Whether there may be no example here (a replica that the last batch of an epoch left without)."""
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
        """`mean` times the share; of no examples, 0 and not NaN."""
        return self.unless_empty(mean * self.share(mean.dtype), tf.zeros_like(mean))

    def unless_empty(self, value, otherwise):
        """`value`; where there is no example, `otherwise`."""
        return tf.where(self.examples > 0, value, otherwise) if self.may_be_empty else value

    def counted(self, sums):
        """A nest of sums over the examples here; of none 0, also where a layer has made a NaN of their mean."""
        return tf.nest.map_structure(lambda s: self.unless_empty(s, tf.zeros_like(s)), sums)


def here():
    """The `Place` of the evaluation that runs on this thread; `None` where it is the whole batch."""
    return _place.get()


@contextlib.contextmanager
def at(place):
    """While open, what this thread evaluates is at `place`."""
    token = _place.set(None if place.is_whole else place)
    try:
        yield
    finally:
        _place.reset(token)


_warned = set()


def warn_of_coupled(loss):
    """Say once for each name of a loss that its value on slices may not be that of the whole batch."""
    if loss in _warned:
        return
    _warned.add(loss)
    warnings.warn(
        f"The loss {loss!r} does not return an independent value for each example, and the batch is cut into slices "
        "(micro-batches, replicas or a curvature batch). The result is the mean of the slices' losses. It is the loss "
        "of the whole batch if the loss is a mean over examples. If the loss couples examples (contrastive losses, "
        "`Circle`, `Dice` over the batch, the root of a mean), use micro_batches=1 on one replica, or a loss that "
        "returns one value for each example.",
        stacklevel=2,
    )


def graph():
    """The graph that is being traced; `None` in eager execution."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def examples(batch):
    """Number of examples of a nest of arrays: an integer where the shape says so, else a tensor."""
    first = next(a for a in keras.tree.flatten(batch) if a is not None)
    # not made dense: ragged and sparse ones have a shape too, of int64
    return tf.cast(tf.shape(first)[0], tf.int32) if first.shape[0] is None else first.shape[0]


def rows(batch, start, length):
    """Rows `start .. start + length` of every array in a nest; `None` stays."""

    def cut(a):
        a = _dense(a)
        sizes = [length] + [-1] * (a.shape.rank - 1)
        return _known(tf.slice(a, [start] + [0] * (a.shape.rank - 1), sizes), length, a.shape)

    return keras.tree.map_structure(lambda a: None if a is None else cut(a), batch)


def piece(batch, size, index):
    """The `index`-th piece of a replica's slice of the batch; see `Linearization.chunk`."""
    available = examples(batch)
    if isinstance(available, int):  # and all the lengths are numbers too: XLA wants to know the shape of a slice
        share = size * available if isinstance(size, float) else size / replicas.count()
        length = max(1, min(round(share), available))
        pieces = max(1, available // length)
    else:
        share = size * tf.cast(available, tf.float32) if isinstance(size, float) else size / replicas.count()
        length = tf.clip_by_value(tf.cast(tf.math.round(share), tf.int32), 1, tf.maximum(available, 1))
        pieces = tf.maximum(available // length, 1)
    # every so many rows and not those in a row: then the pieces of the replicas' slices make up those of the batch
    first = tf.cast(index, tf.int32) % pieces

    def cut(a):
        a = _dense(a)
        return _known(tf.gather(a, first + pieces * tf.range(tf.minimum(length, available))), length, a.shape)

    return keras.tree.map_structure(lambda a: None if a is None else cut(a), batch)


def _dense(a):
    if isinstance(a, (tf.RaggedTensor, tf.SparseTensor)):
        raise ValueError(
            "A batch can be cut into micro-batches or pieces where it is made of dense arrays. Received: a "
            f"`{type(a).__name__}` of shape {tuple(a.shape)}. Give dense inputs (`x.to_tensor()`, "
            "`tf.sparse.to_dense(x)`), or use the batch whole: micro_batches=1, and an optimizer without a "
            "`curvature_batch`."
        )
    return tf.convert_to_tensor(a)


def _known(a, length, shape):
    return tf.ensure_shape(a, [length if isinstance(length, int) else None, *shape[1:]])
