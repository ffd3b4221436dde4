"""SKFAC: K-FAC of the batch alone, inverted by matrices of the size of the batch."""

from typing import Any, Literal, Self

import tensorflow as tf

from keras_curvature.component import check, check_choice, register
from keras_curvature.linearization.estimates.factor_rows import has_rows, kronecker_rows
from keras_curvature.linearization.layers import kronecker
from keras_curvature.operators import Function
from keras_curvature.operators.kronecker import KroneckerProduct
from keras_curvature.optimizers import by_layer
from keras_curvature.optimizers.kfac import KFAC
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import direct
from keras_curvature.steps import Damping
from keras_curvature.typing import LearningRate, Variables


@register
class SKFAC(KFAC):
    """SKFAC: `KFAC` with the factors of the batch alone, which take no memory and no inverse of their size.

        A = X'X,  (A + delta I)^-1 = (I - X' (X X' + delta I)^-1 X) / delta          X: a row for each example
        G = D'D,  likewise                                                             (Woodbury)

    and then as `KFAC`, with its `pi` and `kl_clip`. The step is that of `KFAC(factors_every=1, inverses_every=1,
    sharing="reduce")` without averages over batches. `KFAC` keeps two pairs of matrices of the width of each layer;
    here nothing is kept but the momentum, and a matrix of the size of the batch is factorized. That pays for layers
    wider than the batch is large. Each step takes a backward pass for the drawn labels. Embeddings and normalization
    layers have their small factors, also of the batch alone.

    Reference: Tang, Jiang, Yu, Wu, Guo and Wang, "SKFAC: Training neural networks with faster Kronecker-factored
    approximate curvature" (2021). Differences from the paper: (1) those of `KFAC`; (2) the positions of convolutions
    are summed by `sharing="reduce"`, which is the second of its two ways; (3) factors are those of each batch.

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `0.01`; for `momentum=None`, 1 is the minimum.
        damping: `lambda`, a positive number, or a component. Defaults to `0.03`, for losses about the size of 1.
        momentum: See `KFAC`. Defaults to `0.9`.
        fisher: `"sampled"` or `"empirical"`; see `KFAC`. Defaults to `"sampled"`.
        kl_clip, curvature_batch: See `KFAC`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: as `KFAC`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.SKFAC(), loss="sparse_categorical_crossentropy")
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 0.01, damping: float | Damping = 0.03, momentum: float | None = 0.9,
        fisher: Literal["sampled", "empirical"] = "sampled", kl_clip: float | None = 1e-3,
        curvature_batch: float | None = None, name: str = "skfac", **kwargs: Any,
    ) -> None:  # fmt: skip
        check_choice(self, "fisher", fisher, ("sampled", "empirical"))
        super().__init__(
            learning_rate, damping, momentum, 1, 1, fisher, "reduce", kl_clip, curvature_batch, "kfac", name=name,
            **kwargs,
        )  # fmt: skip
        check(self, "damping", damping, self._rule.initial > 0, "positive: the factors are singular")

    @classmethod
    def adaptive(  # type: ignore[override]
        cls, learning_rate: LearningRate = 1.0, damping: float | Damping | None = None, **kwargs: Any
    ) -> Self:
        """As `KFAC.adaptive`, without the periods of factors and inverses."""
        chosen = KFAC.adaptive(damping=damping).damping
        return cls(learning_rate, chosen, **{"momentum": None, **kwargs})

    def create_state(self, variables: Variables) -> None:
        """The last step, the damping, and the diagonals of the weights without factors."""
        self._blocks, self._diagonal, _ = kronecker.blocks(self.trained_model(), self.sharing)
        by_layer.warn_of(self, self.trained_model(), self._diagonal, "the diagonal of the Fisher matrix")
        self._velocity = self.add_optimizer_variables(variables, "velocity")
        self._damping = self.add_scalar(self._rule.initial, "damping")
        self._diagonals = [by_layer.ones(self, variables[i], f"diagonal_{i}") for i in self._diagonal]
        self._counts = self.add_variable((len(self._diagonals),), name="looks", aggregation="none")

    def linear_step(self) -> NotLinear:
        """`NotLinear`: the method keeps no preconditioner."""
        return NotLinear(
            "`SKFAC` divides each gradient by the Fisher matrix of its own batch and keeps no preconditioner: no limit "
            "on the curvature is known."
        )

    def _inverse(self, batch, damping):
        """An operator."""
        pairs, found = kronecker_rows(batch, self._blocks, self._diagonal, self.fisher, self._seed)
        operators = [
            self._inverse_of(block, *pair, self._damping_of(batch.l2, block.variables, damping, pair[0]))
            for block, pair in zip(self._blocks, pairs)
        ]
        return self._side_by_side(operators, self._averaged_diagonals(found), batch.l2, damping)

    def _averaged_diagonals(self, found):
        def average():
            counts = tf.identity(self._counts.value)
            averages, fine = by_layer.averaged(self._diagonals, found, counts)
            return [*averages, counts + tf.cast(fine, counts.dtype)]

        if not found:
            return []
        *diagonals, _ = self.refresh([*self._diagonals, self._counts], 1, average)
        return diagonals

    def _inverse_of(self, block, first, second, damping):
        """The inverse of a block, from its rows or its factors."""
        if len(block.shape) == 3:
            damping = tf.fill(block.shape[:1], damping)
        if not has_rows(block):
            return KroneckerProduct(*by_layer.inverse_pair(first, second, damping))
        means = [tf.reduce_sum(tf.square(rows), [-2, -1]) / rows.shape[-1] for rows in (first, second)]
        of_A, of_G = direct.split_damping(*means, damping)

        def product(matrices):
            (W,) = matrices
            W = tf.linalg.matrix_transpose(direct.solve_by_rows(first, of_A, W))
            return [tf.linalg.matrix_transpose(direct.solve_by_rows(second, of_G, W))]

        return Function(product, psd=True)
