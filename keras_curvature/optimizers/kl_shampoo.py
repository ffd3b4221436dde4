"""KL-Shampoo: Shampoo whose factors are the best Kronecker-factored covariance in the Kullback-Leibler sense."""

import math
from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.operators import axes
from keras_curvature.optimizers.kl_factors import KLFactors, along
from keras_curvature.optimizers.limits import LinearStep, averaged
from keras_curvature.solvers.refresh import Refresh, check_every
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class KLShampoo(KLFactors):
    """KL-Shampoo: each factor sees the gradient whitened by the other ones, and no grafting is needed.

        L <- beta_2 L + (1 - beta_2) G R^-1 G' / d_R,    R <- beta_2 R + (1 - beta_2) G' L^-1 G / d_L
        M <- beta_1 M + (1 - beta_1) G,    w <- w - learning_rate L^(-1/2) M R^(-1/2)

    At convergence, `L x R` is nearest to the gradient's second moment in the Kullback-Leibler divergence of normal
    distributions. With `L = Q diag(l) Q'`, one power iteration and a QR decomposition update the basis `Q` in each
    `every`-th step. The eigenvalues are updated in every step, by the average of the same second moments in that basis.
    The first step fills the factors and does not move the weights. Adam steps the vectors, such as biases.

    Reference: Lin, Lowe, Dangel, Eschenhagen, Xu and Grosse, "Understanding and improving Shampoo and SOAP via
    Kullback-Leibler minimization" (2025, arXiv 2509.03378), and the authors' code, `KLOpt` of
    github.com/yorkerlin/KL-Methods. Differences from that code: (1) neighbouring axes are merged to at most `merge`,
    from the front, never down to one; (2) vectors are left to Adam with the same decays (there: to another
    optimizer), and an axis longer than `max_dimension` has no factor; (3) any number of axes, all from the same old
    eigenvalues: the code takes at most three, one after the other; (4) `learning_rate`: there 1e-4, for language
    models; (5) weight decay is Keras': before the step, in the first one too; (6) a non-finite matrix leaves the old
    basis in place; (7) in the precision of the weights, float32 at least (there bfloat16).

    Args:
        learning_rate: Defaults to `3e-3`; the first hundred steps or so are shorter, until `initial` is forgotten.
        beta_1: Decay of the momentum. Defaults to `0.9` (the authors).
        beta_2: Decay of the factors. Defaults to `0.98` (the authors).
        epsilon: Added to `sqrt(l_i r_j)`. Defaults to `1e-8` (the authors).
        every: Steps from one basis to the next, or a `Refresh`. Defaults to `10` (the authors).
        initial: Initial eigenvalues; larger ones make the first steps shorter. Defaults to `0.01` (the authors: 0.1,
            with which an LSTM had 0.44 of Adam's reduction of the loss in 150 steps of 512 examples, against 1.09;
            0.001 was worse on a transformer; `tuning` data of `examples/benchmarks/defaults.py`). Where squared
            gradients are near 1 or above, as of a loss that is a sum, first factors far too large last for some
            hundred steps, with short steps and old bases: take 0.1 there.
        max_dimension: Longest axis with a factor. Defaults to `1000`; see `SOAP`.
        merge: Longest axis after merging. Defaults to `1000`.
        block_size: Longest axis of a tile, which has factors of its own; see `SOAP`. Defaults to `None`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes` (failed bases; the old ones are kept), `refreshes` (with a `Refresh`: changed bases),
        `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.KLShampoo(), loss="mse")
    ```
    """

    idle_steps = 1

    def __init__(
        self, learning_rate: LearningRate = 3e-3, beta_1: float = 0.9, beta_2: float = 0.98, epsilon: float = 1e-8,
        every: int | Refresh = 10, initial: float = 0.01, max_dimension: int = 1000, merge: int = 1000,
        block_size: int | None = None, name: str = "kl_shampoo", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        for argument, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            check_number(self, argument, beta, low=0, high=1, open_high=True)
        for argument, value in (("epsilon", epsilon), ("initial", initial)):
            check_number(self, argument, value, low=0, open_low=True)
        for argument, count in (("max_dimension", max_dimension), ("merge", merge)):
            check_count(self, argument, count)
        check_every(self, "every", every)
        self.beta_1, self.beta_2, self.epsilon, self.every = beta_1, beta_2, epsilon, every
        check_count(self, "block_size", block_size, or_none=True)
        self.initial, self.max_dimension, self.merge, self.block_size = initial, max_dimension, merge, block_size
        self.count_refreshes()

    def create_state(self, variables: Variables) -> None:
        """The momentum, the factors with their bases and eigenvalues; a second moment for the vectors."""
        merge = min(self.merge, self.block_size or self.merge)
        self.create_tiles(variables, merge, self.block_size, self.max_dimension, vectors=False)
        self._m = self.add_moments("m")
        with_matrices = {i for i, _ in self._places}
        self._vectors = [i for i in range(len(self._shapes)) if i not in with_matrices]
        self._v = self.add_moments("v", self._vectors)
        self._factors = self.add_matrices("factor")
        self._bases = self.add_matrices("basis", "identity")
        self._eigenvalues = self.add_eigenvalues(self.initial)

    def precondition(self, gradients: Vector) -> Vector:
        """The negative whitened momentum."""
        G, taken = self.split(gradients), self.taken()
        begun = taken > 0
        m = self.average(self._m, G, self.beta_1, begun)
        bases, values = trees.values(self._bases), trees.values(self._eigenvalues)
        weights = self.whitening(values, begun)

        direction = trees.negative(self._whitened(m, self.by_tile(bases), self.by_tile(weights)))
        for i, adam in zip(self._vectors, self._adam(m, G, taken)):
            direction[i] = adam
        moments, diagonals = self.whitened_moments(G, bases, weights)
        factors = self.average(self._factors, moments, self.beta_2)
        self.remember([*self._m, *self._factors], [*m, *factors])
        self.remember_eigenvalues(self._eigenvalues, values, diagonals, begun)
        if bases:
            self.renew_bases(self._bases, factors, taken, sort=False)
        return self.join(direction, gradients)

    def linear_step(self) -> LinearStep:
        """An average of gradients, whitened by the current factors; for vectors, Adam's step."""
        return LinearStep(averaged(self.beta_1), self._preconditioner)

    def _preconditioner(self):
        Q, v = self.by_tile(trees.values(self._bases)), trees.values(self._v)
        weights = self.by_tile([tf.math.rsqrt(value) for value in trees.values(self._eigenvalues)])
        scales = self.adam_scales(v)

        def product(tiles):
            whitened = self._whitened(tiles, Q, weights)
            for i, scale in zip(self._vectors, scales):
                whitened[i] = scale * tiles[i]
            return whitened

        return self.operator(product)

    def _whitened(self, tiles, Q, weights):
        turned = [axes.multiply_transposed(b, q) for b, q in zip(tiles, Q)]
        return [axes.multiply(self._scaled(t, w), q) for t, w, q in zip(turned, weights, Q)]

    def _scaled(self, turned, weights):
        scale = math.prod(along(w, k, turned) for k, w in enumerate(weights) if w is not None)
        return turned * scale / (1.0 + self.epsilon * scale)

    def _adam(self, m, G, taken):
        v = self.average(self._v, [G[i] * G[i] for i in self._vectors], self.beta_2, taken > 0)
        self.remember(self._v, v)
        return self.adam([m[i] for i in self._vectors], v, tf.maximum(taken, 1))
