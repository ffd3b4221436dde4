"""Batches larger than memory: passes over slices of a replica's batch, one after another.

    f(w) = sum_i f_i(w),      H v = sum_i H_i v,      G v = sum_i J_i' H_L J_i v

with `f_i` the loss of slice `i`, times its share of the batch. Every pass evaluates each slice again, in a loop that
keeps sums (vectors) and rows (outputs and their tangents) but no activations. So the memory is that of one slice. Each
product costs its own forward pass, which the products of a whole batch would share.

The slices behave as parts of the batch: dropout masks are the rows of the batch's mask, and seeds advance as in one
pass. Only `BatchNormalization` normalizes each slice by itself, and its moving statistics take in the slices one after
another. Every output of the model must have the batch as its first axis, so that the slices can be concatenated.
"""

import weakref

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas
from keras_curvature.linearization.pure import batch_axis, slices
from keras_curvature.linearization.pure.functional import Evaluation


class MicroBatches:
    """A `PureModel` on slices of a batch; at most as many slices as examples.

    Args:
        pure: A `PureModel` of the whole share of the replica.
        count: Number of slices, an integer.
    """

    def __init__(self, pure, count):
        _check_layers(pure.model)
        self._pure, place = pure, pure.place
        self._state = [*self._pure.state, *[tf.identity(v.value) for v in self._pure.counting]]
        known = isinstance(place.examples, int)
        self._count = max(1, min(count, place.examples)) if known else tf.clip_by_value(place.examples, 1, count)
        self._length = place.examples // self._count if known and place.examples % self._count == 0 else None
        if self._length is None and not tf.executing_eagerly():
            _check_not_compiled(count, place.examples)

    def sum(self, local):
        """`local(pure)`, a nest of tensors, added up over the slices."""
        return self.sweep(lambda pure: (local(pure), []))[0]

    def record(self, make):
        """`make(pure)`, a `Pass`, on each slice, for its sums and rows."""
        return RepeatedPass(self, make)

    def commit(self, evaluation):
        """See `PureModel.commit`."""
        self._pure.commit(evaluation)

    def sweep(self, local, *tangents):
        """Run `local(pure, *tangents) -> (sums, rows)` on the slices in turn.

        Args:
            local: A function of a slice's `PureModel` and of its rows of `tangents`.
            *tangents: Nests of tensors with a row for each example.

        Returns:
            `(sums, rows, state)`: nests of sums over the slices and of concatenated rows, and the model's state and
            counters after the last slice, `None` for unchanged variables.
        """
        touched = []

        def on_slice(i, state):
            start, length = self._slice(i)
            pure = self._part(start, length, state)
            sums, rows = local(pure, *slices.rows(tangents, start, length))
            moved = [None] * len(state) if pure.evaluation is None else _state_after(pure.evaluation)
            touched[:] = [new is not None for new in moved]
            return sums, rows, [old if new is None else new for new, old in zip(moved, state)]

        sums, rows, state = (self._one_by_one if tf.executing_eagerly() else self._looped)(on_slice)
        sums = self._pure.place.counted(sums)
        return sums, rows, [new if moved else None for new, moved in zip(state, touched)]

    def _slice(self, i):
        if self._length is not None:
            return i * self._length, self._length
        start = i * self._pure.place.examples // self._count
        return start, (i + 1) * self._pure.place.examples // self._count - start

    def _part(self, start, length, state):
        # statistics pass from slice to slice; seeds start again, because the slices are parts of one draw
        own = len(self._pure.stateful)
        begin = [now if now.dtype.is_floating else first for now, first in zip(state[:own], self._state)]
        return self._pure.part(start, length, [*begin, *state[own:]])

    def _one_by_one(self, on_slice):
        total, parts, state = None, [], self._state
        for i in range(self._count):
            sums, rows, state = on_slice(i, state)
            total = sums if total is None else tf.nest.map_structure(tf.add, total, sums)
            parts.append(rows)
        return total, tf.nest.map_structure(lambda *rows: tf.concat(rows, 0), *parts), state

    def _looped(self, on_slice):
        # traced first, for the structure and shapes of the results, and called by the loop
        traced = tf.function(on_slice, autograph=False).get_concrete_function(tf.constant(0), self._state)
        sums, rows, _ = traced.structured_outputs
        zeros = [tf.zeros(s.shape, s.dtype) for s in tf.nest.flatten(sums)]
        arrays = [
            tf.TensorArray(r.dtype, self._count, element_shape=r.shape, infer_shape=self._length is not None)
            for r in tf.nest.flatten(rows)
        ]

        def body(i, state, total, arrays):
            sums, rows, state = traced(i, state)
            total = [t + s for t, s in zip(total, tf.nest.flatten(sums))]
            return i + 1, state, total, [a.write(i, r) for a, r in zip(arrays, tf.nest.flatten(rows))]

        begin = [_after_other_loops(), self._state, zeros, arrays]
        end, state, total, arrays = tf.while_loop(lambda i, *_: i < self._count, body, begin, parallel_iterations=1)
        _loops[slices.graph()][replicas.identity()] = end.op.name
        whole = [_joined(a.stack()) if self._length else a.concat() for a in arrays]
        return tf.nest.pack_sequence_as(sums, total), tf.nest.pack_sequence_as(rows, whole), state


class RepeatedPass:
    """`make(pure)`, a `Pass`, computed again on every slice for every question; compare `KeptPass`, of one slice.

    The first question brings the evaluation along, so that a gradient costs one forward and one backward pass.
    """

    def __init__(self, micro_batches, make):
        self._micro_batches, self._make = micro_batches, make
        self._graph, self._evaluation = slices.graph(), None

    @property
    def evaluation(self):
        """The `Evaluation` of the whole; a forward pass, where none was made yet."""
        if self._evaluation is not None:
            return self._evaluation
        return self._sweep(lambda recorded: ([], []), note=True)[2]

    def prepare(self):
        """Nothing: each pass is made for one question."""

    def sum(self, local, vectors=(), tangents=()):
        """`local(recorded, *vectors, *tangents)`, a nest of tensors, added up over the slices."""
        return self._sweep(lambda recorded, *rows: (local(recorded, *vectors, *rows), []), *tangents)[0]

    def rows(self, local, vectors=(), tangents=()):
        """`local(recorded, *vectors, *tangents)`, a nest of tensors, concatenated along the batch."""
        return self._sweep(lambda recorded, *rows: ([], local(recorded, *vectors, *rows)), *tangents)[1]

    def _sweep(self, local, *tangents, note=False):
        # the tensors of a first pass inside a loop or condition cannot be used outside
        keep = self._evaluation is None and slices.graph() is self._graph
        structure = []

        def on_slice(pure, *rows):
            recorded = self._make(pure)
            evaluation = recorded.evaluation
            _check_rows(pure, evaluation.outputs)
            found = local(recorded, *rows)
            if not (keep or note):
                return [[part] for part in found]
            structure[:] = [evaluation.outputs]
            return [found[0], evaluation.loss], [found[1], *_taken_apart(evaluation.outputs)]

        (sums, *loss), (rows, *outputs), state = self._micro_batches.sweep(on_slice, *tangents)
        if not loss:
            return sums, rows, None
        own = len(self._micro_batches._pure.stateful)
        evaluation = Evaluation(_put_together(structure[0], *outputs), None, loss[0], state[:own], state[own:])
        if keep:
            self._evaluation = evaluation
        return sums, rows, evaluation


def _state_after(evaluation):
    return [*evaluation.state, *evaluation.counters]


def _taken_apart(outputs):
    """`(tensors, attributes they carry)` of the outputs of a model."""
    flat = keras.tree.flatten(outputs)
    return flat, [keras_internals.carried(y) for y in flat]


def _put_together(structure, flat, carried):
    for y, found in zip(flat, carried):
        keras_internals.carry(y, found)
    return keras.tree.pack_sequence_as(structure, flat)


def _joined(stacked):
    """`(slices, rows, ...)` to `(slices * rows, ...)`."""
    rest = stacked.shape[2:]
    shape = [-1, *rest] if rest.is_fully_defined() else tf.concat([[-1], tf.shape(stacked)[2:]], 0)
    return tf.ensure_shape(tf.reshape(stacked, shape), [None, *rest])


# By graph and replica, the name of the last loop's end; the tensor itself would keep the graph alive.
_loops = weakref.WeakKeyDictionary()


def _after_other_loops():
    """0, after the earlier loops have ended: two loops at a time would need the memory of two slices."""
    graph = slices.graph()
    last = _loops.setdefault(graph, {}).get(replicas.identity())
    with tf.control_dependencies([graph.get_operation_by_name(last)] if last else []):
        return tf.identity(tf.constant(0))


def _check_layers(model):
    synchronized = [layer.name for layer in keras_internals.layers_of(model) if getattr(layer, "synchronized", False)]
    if synchronized and replicas.count() > 1:
        raise ValueError(
            f"`micro_batches` on {replicas.count()} replicas does not support synchronized normalization, because each "
            f"replica loops over its slices separately. Received: {synchronized[0]!r} with synchronized=True. Use "
            "synchronized=False, or micro_batches=1."
        )


def _check_rows(pure, outputs):
    """Raise a `ValueError` for outputs whose first axis is known not to be the batch."""
    examples = pure.place.examples
    for i, y in enumerate(keras.tree.flatten(outputs)):
        if tf.is_tensor(y) and y.shape.rank is not None and batch_axis.have_other_length(y.shape, examples):
            raise ValueError(
                "`micro_batches` needs outputs with the batch as their first axis, to concatenate those of slices. "
                f"{batch_axis.described(pure.model, i, outputs, y.shape, examples)} Give it a row for each example, "
                "pass the model's own losses to `add_loss`, or use micro_batches=1."
            )


def _check_not_compiled(count, examples):
    if keras_internals.is_compiled():
        here = f"{examples} examples" if isinstance(examples, int) else "an unknown number of examples"
        raise ValueError(
            f"`micro_batches={count}` under XLA (`jit_compile=True`, or a TPU) needs slices of equal and known "
            f"size. Received: {here} on each replica. Use batches of a fixed size that micro_batches (times the "
            "number of replicas) divides, such as `dataset.batch(batch_size, drop_remainder=True)`; or compile "
            "with `jit_compile=False`, on a GPU or CPU."
        )
