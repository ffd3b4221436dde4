"""A model on each replica's share of a batch."""

from keras_curvature import replicas, trees
from keras_curvature.linearization.pure import slices
from keras_curvature.linearization.pure.functional import PureModel, checked_seeds
from keras_curvature.linearization.pure.micro_batches import MicroBatches


class OnReplicas:
    """The `PureModel` of every replica, or with micro-batches its `MicroBatches`.

    Args:
        model, batch: See `PureModel`; under a strategy, the batch of all replicas.
        shift: A vector: evaluate at the weights plus `shift`. Optional.
        part: `(size, index)` of a piece of the batch to use. Optional.
        micro_batches: Number of slices that each replica's share is cut into. Defaults to `1`.
        training, seeds: See `PureModel`.

    Attributes:
        examples: Number of examples of all replicas, an integer or tensor.
    """

    def __init__(self, model, batch, shift=None, part=None, micro_batches=1, training=True, seeds=None):
        self._model, self._micro_batches = model, micro_batches
        self._shift = None if shift is None else trees.vector("shift", shift, model.trainable_variables)
        self._part = slices.check_part("Linearization", part)
        seeds = checked_seeds("Linearization", model, seeds)
        self._how, self._shares, self._pure = {"training": training, "seeds": seeds}, {}, {}
        start, self.examples = replicas.place(self._take, *batch)
        replicas.each(self._open, start)

    # Called on a replica.

    def here(self):
        """The `PureModel` or `MicroBatches` of this replica."""
        return self._pure[replicas.identity()]

    def weights(self):
        """The weights, read on this replica, with the shift."""
        weights = trees.values(self._model.trainable_variables)
        return weights if self._shift is None else trees.add(weights, self._shift)

    def _take(self, *batch):
        """Take this replica's share of the batch, or a piece of it, and count its examples."""
        taken = batch if self._part is None else slices.piece(batch, *self._part)
        self._shares[replicas.identity()] = taken
        return slices.examples(taken[0])

    def _open(self, start):
        share = self._shares[replicas.identity()]
        examples = self.examples if replicas.count() == 1 else slices.examples(share[0])
        pure = PureModel(self._model, share, slices.Place(start, examples, self.examples), **self._how)
        self._pure[replicas.identity()] = pure if self._micro_batches == 1 else MicroBatches(pure, self._micro_batches)
