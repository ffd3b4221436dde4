"""The recordings of all replicas: sums over slices, micro-batches and replicas in one word."""

from keras_curvature import replicas
from keras_curvature.linearization.pure.differentiable import differentiable_keras


class Recordings:
    """What `make(pure)` records on every replica, once or, with micro-batches, anew on each of them.

    Args:
        pure: A function of no arguments that gives the replica's `PureModel` or `MicroBatches`.
        make: A function of a `PureModel`.
        around: A function that gives the context to record in, opened around the replicas.
    """

    def __init__(self, pure, make, around=differentiable_keras):
        self._around, self._on_replica = around, {}

        def record():
            self._on_replica[replicas.identity()] = pure().record(make)

        with around():
            replicas.each(record)

    def here(self):
        """That of the replica of the caller."""
        return self._on_replica[replicas.identity()]

    def evaluated(self):
        """`(loss, outputs)`: the sum over the replicas, and what stays on them."""

        def evaluated():
            return self.here().evaluation.loss, self.here().evaluation.outputs

        with self._around():
            loss, outputs = replicas.each(evaluated)
        return replicas.add_up(loss), outputs

    def total(self, local, vectors=(), tangents=()):
        """`local(recording, *vectors, *tangents)`, a nest of tensors, summed over everything.

        `vectors` are the same on all replicas; `tangents` are nests with a row for each example.
        """
        return replicas.add_up(self._each("sum", local, vectors, tangents))

    def rows(self, local, vectors=(), tangents=()):
        """`local(recording, *vectors, *tangents)`, a nest of tensors with a row for each example, on each replica."""
        return self._each("rows", local, vectors, tangents)

    def _each(self, how, local, vectors, tangents):
        def run(vectors, tangents):
            return getattr(self.here(), how)(local, vectors, tangents)

        with self._around():
            return replicas.each(run, list(vectors), list(tangents))
