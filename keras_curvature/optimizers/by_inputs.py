"""Shared code of FOOF, K-BFGS and Newton-Muon: second moments of the inputs of each layer, and their inverses."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.estimates.inputs import input_second_moments
from keras_curvature.linearization.layers.kronecker import Block
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators.kronecker import from_left
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.by_layer import DECAY, STACKED, averaged, create, identity
from keras_curvature.solvers import direct
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.typing import Vector


class ByInputs(CurvatureOptimizer):
    """Base of the methods with the inverse of a matrix `A` for the inputs of each layer."""

    needs = Needs(layers=True)

    def create_moments_of_inputs(self, blocks: Sequence[Block]) -> None:
        """Create the averages of `A`, their inverses, and the number of estimates in each average."""

        def add(name, i, block):
            begin = "ones" if block.has_indices else identity
            return create(self, block.factor_shapes[0], block.dtype, f"{name}_{i}", begin)

        self._blocks = list(blocks)
        self._factors = [add("factor", i, block) for i, block in enumerate(self._blocks)]
        self._inverses = [add("inverse", i, block) for i, block in enumerate(self._blocks)]
        self._counts = self.add_variable((len(self._blocks),), name="looks", aggregation="none")

    def inverses_of_inputs(
        self, lin: Linearization, factors_every: int, inverses_every: int, damping: Callable[[tf.Tensor], tf.Tensor]
    ) -> Vector:  # fmt: skip
        """`(A + damping I)^-1` for each block; `damping` is a function of the mean eigenvalue of `A`."""
        if not self._blocks:
            return []
        factors = self.moments_of_inputs(lin, factors_every)
        return self.refresh(self._inverses, inverses_every, lambda: self.inverted(factors, damping))

    def inverted(self, factors: Vector, damping: Callable[[tf.Tensor], tf.Tensor]) -> Vector:
        """`(A + damping I)^-1` for each `A`, computed now; `damping` is a function of the mean eigenvalue of `A`."""
        return _inverses(self._blocks, factors, damping)

    def divided(self, vector: Vector, inverses: Vector) -> Vector:
        """The vector with each block multiplied by its inverse; tensors outside the blocks as they are."""
        found = list(vector)
        for block, inverse in zip(self._blocks, inverses, strict=True):
            tensors = block.tensors(from_left(inverse, block.matrix(vector)))
            for i, tensor in zip(block.variables, tensors, strict=True):
                # a bias of several rows is shared by blocks; each fills its own row and leaves zeros in the others
                found[i] = tensor if found[i] is vector[i] else found[i] + tensor
        return found

    def kept_inverses(self) -> Vector:
        """The inverses of the last step."""
        return trees.values(self._inverses)

    def moments_of_inputs(self, lin: Linearization, every: int, decay: float = DECAY) -> Vector:
        """The running average of `A` for each block."""

        def compute():
            counts = tf.identity(self._counts.value)
            averages, fine = averaged(self._factors, input_second_moments(lin, self._blocks), counts, decay)
            return [*averages, counts + tf.cast(fine, counts.dtype)]

        *values, _ = self.refresh([*self._factors, self._counts], every, compute)
        return values


def _inverses(blocks, factors, damping):
    """The inverses; matrices of one size together, shared among the replicas."""
    found, matrices = {}, []
    for i, (block, A) in enumerate(zip(blocks, factors)):
        if block.has_indices:
            found[i] = direct.inverse_of_diagonal(A, damping(tf.reduce_mean(A, -1)))
        else:
            matrices.append((i, A, damping(direct.mean_eigenvalue(A)), len(A.shape) == 3))
    inverses = in_stacks(
        lambda item: direct.inverse(*item), [(A, d) for _, A, d, _ in matrices], [g for *_, g in matrices], STACKED
    )
    found.update(zip((i for i, *_ in matrices), inverses))
    return [found[i] for i in range(len(blocks))]
