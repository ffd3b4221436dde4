"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_choice, check_count, check_flag, check_number, register
from keras_curvature.operators import axes
from keras_curvature.optimizers.hidden import SIGN, HiddenMatrices
from keras_curvature.optimizers.kl_factors import KLFactors
from keras_curvature.optimizers.limits import LinearStep, NotLinear, averaged
from keras_curvature.solvers.refresh import Refresh, check_every
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class SOAP(KLFactors, HiddenMatrices):
    """SOAP: Adam in a slowly changing basis in which the gradient's second moment is nearly diagonal.

        G~ = Q_L' G Q_R,    m~ <- beta_1 m~ + (1 - beta_1) G~,    v <- beta_2 v + (1 - beta_2) G~^2
        w <- w - learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t) Q_L (m~ / (sqrt(v) + epsilon)) Q_R'
        L <- beta_2 L + (1 - beta_2) G G',    R <- beta_2 R + (1 - beta_2) G' G

    `Q_L` and `Q_R` are the eigenvectors of `L` and `R`: by an eigendecomposition in the first step, by one power
    iteration and a QR decomposition in each `every`-th. A tensor has such a matrix for each of its axes; plain Adam
    steps the vectors, such as biases. The first step fills `L` and `R` and does not move the weights.

    With `factors="kl"` `L` and `R` are those of `KLShampoo` (KL-SOAP). With `sign=True` the step `S` of each matrix
    between the ends of the model, as of `Muon`, becomes `|S| sign(S) / |sign(S)|` (SOAP-Muon): as long as before, with
    equal singular values.

    Reference: Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam" (2024), Algorithm 3, and the authors'
    code. Differences from that code: (1) neighbouring axes are merged to at most `merge`, from the front, where Keras'
    kernels have their small axes, and never down to one: a 3x3 kernel of 16 by 32 channels is a 144 by 32 matrix
    (there: not at all, or, on request, while the product is at most `max_dimension`); (2) axes longer than 1000 get no
    matrix (there: 10000); (3) weight decay is Keras': before the step, and in the first one too; (4) a non-finite
    matrix leaves the old basis in place; (5) in the precision of the weights, float32 at least.

    For `"kl"`: Lin et al., "Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization" (2025), and
    `KLOpt` of github.com/yorkerlin/KL-Methods, which has no bias correction, and 0.9 and 0.98 for `beta_1` and
    `beta_2`. For `sign`: Vyas et al., "Improving SOAP using iterative whitening and Muon" (2025), and the code in
    github.com/nikhilvyas/SOAP_MUON, where the length of the sign is Muon's.

    Args:
        learning_rate: As for Adam. Defaults to `3e-3` (the authors).
        beta_1: Decay of the first moment. Defaults to `0.95` (the authors).
        beta_2: Decay of the second moment, and of `L` and `R`. Defaults to `0.95` (the authors).
        epsilon: Added to the root of the second moment. Defaults to `1e-8` (the authors).
        every: Steps from one basis to the next, or a `Refresh`. Defaults to `10` (the authors).
        max_dimension: Longest axis with a matrix; longer axes are not transformed. Defaults to `1000`: on a few CPU
            cores, longer decompositions cost more than the gradients of a small network. On accelerators, more is
            affordable.
        merge: Longest axis after merging. Defaults to `1000`.
        factors: `"shampoo"`, or `"kl"`: each factor sees the gradient whitened by the other ones. Defaults to
            `"shampoo"`.
        sign: Whether the steps of hidden matrices get equal singular values. Defaults to `False`.
        sides: `"all"`, or `"shortest"`: only the shortest axis of each matrix is transformed (one-sided SOAP), at about
            half the cost. Defaults to `"all"`.
        block_size: Longest axis of a tile; `None`: no axis is cut. Each tile has bases of its own, as in Shampoo. With
            small tiles a step costs less, and training takes more steps. The first step traces every tile: with 81
            tiles it took four times as long as with 25. It excludes `sign`. Defaults to `None` (the authors).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes` (failed bases; the old ones are kept), `refreshes` (with a `Refresh`: changed bases),
        `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.SOAP(), loss="mse")
    ```
    """

    idle_steps = 1

    def __init__(
        self, learning_rate: LearningRate = 3e-3, beta_1: float = 0.95, beta_2: float = 0.95, epsilon: float = 1e-8,
        every: int | Refresh = 10, max_dimension: int = 1000, merge: int = 1000,
        factors: Literal["shampoo", "kl"] = "shampoo", sign: bool = False,
        sides: Literal["all", "shortest"] = "all", block_size: int | None = None, name: str = "soap", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        for argument, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            check_number(self, argument, beta, low=0, high=1, open_high=True)
        check_number(self, "epsilon", epsilon, low=0, open_low=True)
        for argument, count in (("max_dimension", max_dimension), ("merge", merge)):
            check_count(self, argument, count)
        check_every(self, "every", every)
        check_choice(self, "factors", factors, ("shampoo", "kl"))
        check_flag(self, "sign", sign)
        check_choice(self, "sides", sides, ("all", "shortest"))
        self.beta_1, self.beta_2, self.epsilon, self.every = beta_1, beta_2, epsilon, every
        self.max_dimension, self.merge, self.factors, self.sign = max_dimension, merge, factors, sign
        self.sides, self.block_size = sides, block_size
        if block_size is not None:
            check_count(self, "block_size", block_size)
            check(self, "block_size", block_size, not sign, "None with `sign=True`, which is of whole matrices")
        self.count_refreshes()

    def create_state(self, variables: Variables) -> None:
        """Both moments in the basis, the factors, the basis."""
        merge = min(self.merge, self.block_size or self.merge)
        self.create_tiles(variables, merge, self.block_size, self.max_dimension, vectors=False, sides=self.sides)
        self._m, self._v = self.add_moments("m"), self.add_moments("v")
        self._factors = self.add_matrices("factor")
        self._bases = self.add_matrices("basis", "identity")
        self._eigenvalues = self.add_eigenvalues() if self.factors == "kl" else []

    def precondition(self, gradients: Vector) -> Vector:
        """The negative of Adam's step in the basis, transformed back."""
        G, bases, taken = self.split(gradients), trees.values(self._bases), self.taken()
        Q = self.by_tile(bases)
        turned = [axes.multiply_transposed(g, q) for g, q in zip(G, Q)]
        m = self.average(self._m, turned, self.beta_1, begun=taken > 0)
        v = self.average(self._v, [g * g for g in turned], self.beta_2, begun=taken > 0)
        scaled = self.adam(m, v, tf.maximum(taken, 1))
        direction = self._signed([axes.multiply(s, q) for s, q in zip(scaled, Q)])

        factors = self.average(self._factors, self._moments(G, bases, taken > 0), self.beta_2)
        m = self._turn(m, bases, factors, taken)
        self.remember([*self._m, *self._v, *self._factors], [*m, *v, *factors])
        return self.join(direction, gradients)

    def _moments(self, G, bases, begun):
        if self.factors == "shampoo":
            return [axes.second_moment(G[i], k) for i, k in self._places]
        values = trees.values(self._eigenvalues)
        moments, diagonals = self.whitened_moments(G, bases, self.whitening(values, begun))
        self.remember_eigenvalues(self._eigenvalues, values, diagonals, begun)
        return moments

    def _signed(self, direction):
        """The step, with equal singular values where it is a hidden matrix, if `sign`."""
        if not self.sign:
            return direction
        self.choose_hidden(self.trained, self.ends(self.trained))  # the model may be curved after it was loaded
        steps = [direction[i] for i in self._hidden]
        for i, unfolding, step, found in zip(self._hidden, self._unfoldings, steps, self.signs(steps, SIGN)):
            direction[i] = unfolding.tensor(found * tf.math.divide_no_nan(tf.norm(step), tf.norm(found)))
        return direction

    def linear_step(self) -> LinearStep | NotLinear:
        """Adam's momentum, between the current bases; no known limit with the sign."""
        if self.sign:
            return NotLinear("`SOAP(sign=True)` takes the sign of its steps: no limit on the curvature is known.")
        return LinearStep(averaged(self.beta_1), self._preconditioner)

    def _preconditioner(self):
        Q, v = self.by_tile(trees.values(self._bases)), trees.values(self._v)
        scales = self.adam_scales(v)

        def product(tiles):
            turned = [axes.multiply_transposed(b, q) for b, q in zip(tiles, Q)]
            return [axes.multiply(s * b, q) for s, b, q in zip(scales, turned, Q)]

        return self.operator(product)

    def _turn(self, m, old, factors, taken):
        """The next basis, remembered, and `m` in it."""
        if not self._places:
            return m

        # the eigenvalues of KL factors stay with their columns, which are not ordered by these Rayleigh quotients
        new = self.renew_bases(self._bases, factors, taken, sort=self.factors == "shampoo")

        def turn():
            plain = [axes.multiply(m_, q) for m_, q in zip(m, self.by_tile(old))]
            return [axes.multiply_transposed(m_, q) for m_, q in zip(plain, self.by_tile(new))]

        return turn() if self.period == 1 else tf.cond(tf.equal(taken % self.period, 0), turn, lambda: m)
