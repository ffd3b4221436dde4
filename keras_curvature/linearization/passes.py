"""The `Pass` of every replica: sums over micro-batches and replicas in one word."""

import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.linearization.pure.differentiability import NotDifferentiable


class Passes:
    """One forward pass over the whole batch, recorded on every replica; with micro-batches, anew for every question.

    Args:
        pure: A function of no arguments that gives the replica's `PureModel` or `MicroBatches`.
        make: A function of a `PureModel` that gives a `Pass`, or what else is recorded of a forward pass.
        around: A function that gives the context to record in, opened around the replicas.
    """

    def __init__(self, pure, make, around):
        self._around, self._on_replica = around, {}
        self._record = lambda: pure().record(make)

        def record():
            self._on_replica[replicas.identity()] = self._record()

        with around():
            replicas.each(record)

    def here(self):
        """That of the replica of the caller, a `KeptPass` or `RepeatedPass`."""
        return self._on_replica[replicas.identity()]

    def prepare(self):
        """Have the gradient recorded, for Hessian products."""
        with self._around():
            replicas.each(lambda: self.here().prepare())

    def evaluated(self):
        """`(loss, outputs)`: the sum over the replicas, and what stays on them."""

        def evaluated():
            return self.here().evaluation.loss, self.here().evaluation.outputs

        with self._around():
            loss, outputs = replicas.each(evaluated)
        return replicas.add_up(loss), outputs

    def total(self, question, vectors=(), tangents=()):
        """`question(recorded, *vectors, *tangents)`, a nest of tensors, summed over everything.

        `vectors` are the same on all replicas; `tangents` are nests with a row for each example.
        """
        return replicas.add_up(self._each("sum", question, vectors, tangents))

    def rows(self, question, vectors=(), tangents=()):
        """`question(recorded, *vectors, *tangents)`, a nest of tensors with a row for each example, on each replica."""
        return self._each("rows", question, vectors, tangents)

    def _each(self, how, question, vectors, tangents):
        def run(vectors, tangents):
            try:
                return getattr(self.here(), how)(question, vectors, tangents)
            except NotDifferentiable:
                if tf.executing_eagerly():  # names of layers are known in a graph alone, where this raises
                    tf.function(lambda: getattr(self._record(), how)(question, vectors, tangents), autograph=False)()
                raise

        with self._around():
            return replicas.each(run, list(vectors), list(tangents))
