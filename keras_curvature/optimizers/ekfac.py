"""EKFAC: K-FAC with the second moments that it really has in the basis of its factors."""

import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.component import check, register
from keras_curvature.operators.kronecker import InEigenbasis
from keras_curvature.optimizers.kfac import KFAC, cubes, matrices, pairs
from keras_curvature.solvers import eigenbases


@register
class EKFAC(KFAC):
    """EKFAC: the gradient of each layer in the eigenbases of K-FAC's factors, divided by its second moments there.

        A = U_A diag U_A',  G = U_G diag U_G'                              every `inverses_every` steps
        S = E[(U_A' g U_G)^2]                                              g: the gradient of one example
        d = U_A ((U_A' dL/dW U_G) / (S + lambda)) U_G'

    and from there on as `KFAC`. Of all matrices with these eigenvectors that of `S` is nearest to the Fisher matrix;
    K-FAC's has the products of the eigenvalues instead. It is also fresher: `S` is looked at as often as the factors.
    A step takes four products with small matrices for each layer, where K-FAC takes two.

    Reference: George, Laurent, Bouthillier, Ballas and Vincent, "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis" (2018), Algorithm 1 with running averages (EKFAC-ra). Differences from the paper:
    (1) those of `KFAC`; (2) the average of `S`, `eps = min(1 - 1/t, 0.95)`, begins again with every new basis, for the
    old numbers belong to the old one.

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `0.01`; for `momentum=None`, 1 is the minimum.
        damping: `lambda`, a number, or a component. Defaults to `0.03`, for losses about the size of 1.
        momentum: As of `KFAC`. Defaults to `0.9`.
        factors_every: Steps between two looks at the factors, and at `S`. Defaults to `10`.
        inverses_every: Steps between two eigendecompositions, a multiple of `factors_every`. Defaults to `100`.
        fisher, sharing, kl_clip, curvature_batch: As of `KFAC`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: as `KFAC`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.EKFAC(), loss="sparse_categorical_crossentropy")
    ```
    """

    def __init__(
        self, learning_rate=0.01, damping=0.03, momentum=0.9, factors_every=10, inverses_every=100, fisher="sampled",
        sharing="expand", kl_clip=1e-3, curvature_batch=None, name="ekfac", **kwargs,
    ):  # fmt: skip
        super().__init__(
            learning_rate, damping, momentum, factors_every, inverses_every, fisher, sharing, kl_clip, curvature_batch,
            name, **kwargs,
        )  # fmt: skip
        valid = inverses_every % factors_every == 0
        check(self, "inverses_every", inverses_every, valid, f"a multiple of `factors_every` ({factors_every})")

    def _create_inverses(self):
        """Eigenbases of the factors that are matrices, and second moments."""
        self._bases = self._create_factors("basis", kinds=("matrix",))
        self._moments = [
            self._ones(block.shape, self._dtype(block), f"moment_{i}") for i, block in enumerate(self._blocks)
        ]

    def _inverse_operators(self, batch, factors, damping):
        """One for each block."""
        decomposed = self.refresh(self._bases, self.inverses_every, lambda: self._decomposed(factors))
        found = dict(zip(matrices(self._blocks), decomposed))
        bases = pairs([found.get(i) for i in range(len(factors))])

        def compute():
            seed = tf.cast(self.iterations, tf.int32)
            seen, _ = batch.kronecker_second_moments(self._blocks, bases, fisher=self.fisher, seed=seed)
            return self._averaged(self._moments, seen, self.iterations % self.inverses_every)

        moments = self.refresh(self._moments, self.factors_every, compute)
        return [
            InEigenbasis(*pair, 1.0 / (S + self._damping_of(batch, block.variables, damping, S)))
            for block, pair, S in zip(self._blocks, bases, moments)
        ]

    def _decomposed(self, factors):
        """Eigenvectors of all factors that are matrices; each replica computes some."""
        chosen = [factors[i] for i in matrices(self._blocks)]
        return replicas.deal(eigenbases.decompose, chosen, [cubes(factor) for factor in chosen])
