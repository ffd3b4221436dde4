"""The `Pass` of every replica, with sums over micro-batches and replicas."""

import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.linearization.pure.differentiability import NotDifferentiable


class Passes:
    """One forward pass over the whole batch, recorded on every replica; micro-batches record it again for every
    question.

    Args:
        pure: A function of no arguments that gives the replica's `PureModel` or `MicroBatches`.
        make: A function of a `PureModel` that gives a `Pass`, or another record of a forward pass.
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
        """The pass of the caller's replica, a `KeptPass` or `RepeatedPass`."""
        return self._on_replica[replicas.identity()]

    def prepare(self):
        """Have the gradient recorded, for Hessian products."""
        with self._around():
            replicas.each(lambda: self.here().prepare())

    def evaluated(self):
        """`(loss, outputs)`: the loss summed over the replicas, and the outputs of each replica."""

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
                if tf.executing_eagerly():  # only a graph knows the names of layers; this raises there
                    tf.function(lambda: getattr(self._record(), how)(question, vectors, tangents), autograph=False)()
                raise

        with self._around():
            return replicas.each(run, list(vectors), list(tangents))
