"""EKFAC: K-FAC with measured second moments in the eigenbasis of its factors."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, register
from keras_curvature.operators.kronecker import InEigenbasis
from keras_curvature.optimizers import by_layer
from keras_curvature.optimizers.kfac import KFAC
from keras_curvature.solvers import eigenbases
from keras_curvature.steps import Damping
from keras_curvature.typing import Fisher, LearningRate, Sharing


@register
class EKFAC(KFAC):
    """EKFAC: the gradient of each layer in the eigenbases of K-FAC's factors, divided by its second moments there.

        A = U_A diag U_A',  G = U_G diag U_G'                              every `inverses_every` steps
        S = E[(U_A' g U_G)^2]                                              g: the gradient of one example
        d = U_A ((U_A' dL/dW U_G) / (S + lambda)) U_G'

    then as `KFAC`. Among all matrices with these eigenvectors, the one with eigenvalues `S` is nearest to the Fisher
    matrix; K-FAC uses the products of the factors' eigenvalues. `S` is also newer: it is updated as often as the
    factors. A step takes four products with small matrices for each layer, where K-FAC takes two.

    Reference: George, Laurent, Bouthillier, Ballas and Vincent, "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis" (2018), Algorithm 1 with running averages (EKFAC-ra); Gao et al., "Eigenvalue-
    corrected natural gradient based on a new approximation" (2020), for `factors="tkfac"`. Differences from the paper:
    (1) the differences of `KFAC`; (2) the average of `S`, `eps = min(1 - 1/t, 0.95)`, restarts with every new basis,
    because the old numbers belong to the old basis; (3) a layer keeps its old basis and average if its factors cannot
    be decomposed, or if its new `S` is not finite.

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `0.01`; for `momentum=None`, 1 is the minimum.
        damping: `lambda`, a number, or a component. Defaults to `0.03`, for losses about the size of 1.
        momentum: See `KFAC`. Defaults to `0.9`.
        factors_every: Steps between two updates of the factors and of `S`. Defaults to `10`.
        inverses_every: Steps between two eigendecompositions, a multiple of `factors_every`; if they are equal, `S` is
            the last estimate alone. Defaults to `100`.
        fisher, sharing, kl_clip, curvature_batch: See `KFAC`.
        factors: See `KFAC`; with `"tkfac"` the bases are those of its factors (TEKFAC). Defaults to `"kfac"`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: as `KFAC`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.EKFAC(), loss="sparse_categorical_crossentropy")
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 0.01, damping: float | Damping = 0.03, momentum: float | None = 0.9,
        factors_every: int = 10, inverses_every: int = 100, fisher: Fisher = "sampled", sharing: Sharing = "expand",
        kl_clip: float | None = 1e-3, curvature_batch: float | None = None,
        factors: Literal["kfac", "tkfac"] = "kfac", name: str = "ekfac", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            learning_rate, damping, momentum, factors_every, inverses_every, fisher, sharing, kl_clip, curvature_batch,
            factors, name, **kwargs,
        )  # fmt: skip
        valid = inverses_every % factors_every == 0
        check(self, "inverses_every", inverses_every, valid, f"a multiple of `factors_every` ({factors_every})")

    def _create_inverses(self):
        """Eigenbases of the factors that are matrices, second moments, and how many looks are in these."""
        self._bases = by_layer.create_factors(self, self._blocks, "basis", kinds=("matrix",))
        self._moments = [by_layer.ones(self, block, f"moment_{i}") for i, block in enumerate(self._blocks)]
        self._moment_counts = self.add_variable((len(self._blocks),), name="moment_looks", aggregation="none")

    def _inverse_operators(self, batch, factors, damping):
        """One for each block."""
        bases, moments = self._refreshed_moments(batch, factors) if self._blocks else ([], [])
        return self._in_bases(bases, moments, batch.l2, damping)

    def _kept_operators(self, l2, damping):
        return self._in_bases(trees.values(self._bases), trees.values(self._moments), l2, damping)

    def _in_bases(self, bases, moments, l2, damping):
        return [
            InEigenbasis(*pair, 1.0 / (S + self._damping_of(l2, block.variables, damping, S)))
            for block, pair, S in zip(self._blocks, self._of_blocks(bases), moments)
        ]

    def _refreshed_moments(self, batch, factors):
        """`(bases, S)`; a block gets a basis and what is seen in it together, or keeps both."""
        old, counts = trees.values(self._bases), tf.identity(self._moment_counts.value)

        def compute():
            decomposed = self._decomposed(factors, old)
            good = [trees.has_finite_sum(U) for U in decomposed]
            fresh = tf.stack([self._is_due & _all(both) for both in self._of_blocks(good)])
            bases = self._chosen(fresh, decomposed, old)
            seed, pairs = tf.cast(self.iterations, tf.int32), self._of_blocks(bases)
            seen, _ = batch.kronecker_second_moments(self._blocks, pairs, fisher=self.fisher, seed=seed)
            since = tf.where(fresh, tf.zeros_like(counts), counts)
            moments, fine = by_layer.averaged(self._moments, seen, since)
            bases = self._chosen(fine, bases, old)
            # what failed is handed on, for `refresh` to drop and to count
            bases = [tf.where(fine, U, failed) for fine, U, failed in zip(good, bases, decomposed)]
            return [*bases, *moments, tf.where(fine, since + 1.0, counts)]

        *values, _ = self.refresh([*self._bases, *self._moments, self._moment_counts], self.factors_every, compute)
        return values[: len(old)], values[len(old) :]

    @property
    def _is_due(self):
        """Whether there are new bases where there is a look."""
        return tf.equal(self.iterations % self.inverses_every, 0)

    def _decomposed(self, factors, old):
        """Eigenvectors of all factors that are matrices, where they are due; each replica computes some."""

        def anew():
            found = by_layer.computed(_decomposed, self._blocks, factors)
            return [found[i] for i in by_layer.matrices(self._blocks)]

        return anew() if self.inverses_every == self.factors_every else tf.cond(self._is_due, anew, lambda: old)

    def _of_blocks(self, values):
        """Of values for the matrices, a pair for each block, with `None` for a factor that is a diagonal."""
        found = dict(zip(by_layer.matrices(self._blocks), values))
        return by_layer.pairs([found.get(i) for i in range(2 * len(self._blocks))])

    def _chosen(self, conditions, new, old):
        """Of bases, those of `new` in the blocks whose condition holds."""
        places = [i // 2 for i in by_layer.matrices(self._blocks)]
        return [tf.where(conditions[i], a, b) for i, a, b in zip(places, new, old)]


def _decomposed(A, G):
    """The eigenvectors of both factors of a block; a diagonal as it is."""
    both = [(A, G), (G, A)]
    return tuple(X if by_layer.is_diagonal(X, other) else eigenbases.decompose(X) for X, other in both)


def _all(conditions):
    """Whether there are any, and all hold."""
    known = [condition for condition in conditions if condition is not None]
    return tf.reduce_all(tf.stack(known)) if known else tf.constant(False)
