"""SPlus: the sign of the momentum in the eigenbasis of Shampoo's preconditioner."""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.operators import axes
from keras_curvature.optimizers.by_axis import ByAxis
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import eigenbases
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.typing import LearningRate, Variables, Vector

ROUNDING = 30.0  # of the precision times the norm of a matrix: what an entry in another basis is off by, and more


@register
class SPlus(ByAxis):
    """SPlus: steps of equal size along all pairs of eigenvectors, so that old bases do no harm.

        M <- beta_1 M + (1 - beta_1) G,    L <- beta_2 L + (1 - beta_2) G G',    R <- beta_2 R + (1 - beta_2) G' G
        w <- w - learning_rate 2 / (m + n) Q_L sign(Q_L' M Q_R) Q_R'

    for a matrix of `m` by `n`, with the sign of each entry. `Q_L` and `Q_R` are the eigenvectors of `L` and `R`, from
    an eigendecomposition after the first step and in each `every`-th; until then they are the identity. Vectors, such
    as biases, move by `learning_rate * vector_scale` times the sign of the momentum. The authors evaluate the average
    of the weights: `SPlus(use_ema=True, ema_momentum=0.999)`.

    Reference: Frans, Levine and Abbeel, "A stable whitening optimizer for efficient neural network training" (2025),
    Algorithm 1, and the authors' code. Differences: (1) neighbouring axes are merged to at most `merge`, from the
    front, never down to one (there only matrices are transformed); a tensor of `k` axes has `k` factors, and one over
    their mean length in place of `2 / (m + n)`; (2) axes longer than `max_dimension` get no matrix; (3) Keras' average
    of the weights, which begins at the first weights and has no bias correction; (4) weight decay is Keras': before the
    step; (5) an entry that is rounding has the sign 0: the gradient of a softmax layer has a null space, in which the
    signs of rounding would be steps as large as all others; (6) the bases change in the steps 1, 1 + `every`, 1 + 2
    `every`, ... (there: 1, `every`, 2 `every`, ...).

    Args:
        learning_rate: About a hundred times that of Adam. Defaults to `0.1` (the authors).
        beta_1: Decay of the momentum. Defaults to `0.9` (the authors).
        beta_2: Decay of `L` and `R`. Defaults to `0.999` (the authors).
        every: Steps from one basis to the next. Defaults to `100` (the authors).
        vector_scale: Step of a vector's entries, in units of the learning rate. Defaults to `0.001` (the authors).
        max_dimension: Longest axis with a matrix. Defaults to `1000`; see `SOAP`.
        merge: Longest axis after merging. Defaults to `1000`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes` (failed bases; the old ones are kept), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.SPlus(use_ema=True, ema_momentum=0.999), loss="mse")
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 0.1, beta_1: float = 0.9, beta_2: float = 0.999, every: int = 100,
        vector_scale: float = 0.001, max_dimension: int = 1000, merge: int = 1000, name: str = "splus", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        for argument, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            check_number(self, argument, beta, low=0, high=1, open_high=True)
        check_number(self, "vector_scale", vector_scale, low=0)
        for argument, count in (("every", every), ("max_dimension", max_dimension), ("merge", merge)):
            check_count(self, argument, count)
        self.beta_1, self.beta_2, self.every, self.vector_scale = beta_1, beta_2, every, vector_scale
        self.max_dimension, self.merge = max_dimension, merge

    def create_state(self, variables: Variables) -> None:
        """The momentum, the factors, the bases."""
        self.create_tiles(variables, self.merge, longest=self.max_dimension, vectors=False)
        self._m = self.add_moments("m")
        self._factors = self.add_matrices("factor")
        self._bases = self.add_matrices("basis", "identity")

    def precondition(self, gradients: Vector) -> Vector:
        """The negative sign of the momentum in the bases, transformed back."""
        G, taken = self.split(gradients), self.taken()
        m = self.average(self._m, G, self.beta_1)
        Q = self.by_tile(trees.values(self._bases))
        signs = [_sign(axes.multiply_transposed(m_, q)) for m_, q in zip(m, Q)]
        turned = [axes.multiply(s, q) for s, q in zip(signs, Q)]
        scales = [len(shape) / sum(shape) if len(shape) > 1 else self.vector_scale for shape in self._shapes]

        moments = [axes.second_moment(G[i], k) for i, k in self._places]
        factors = self.average(self._factors, moments, self.beta_2)
        self.renew(self._bases, lambda: in_stacks(eigenbases.decompose, factors), taken)
        self.remember([*self._m, *self._factors], [*m, *factors])
        return self.join([-c * t for c, t in zip(scales, turned)], gradients)

    def linear_step(self) -> NotLinear:
        """No known limit."""
        return NotLinear("The steps of `SPlus` have a length of their own: no limit on the curvature is known.")


def _sign(tensor):
    """The sign of each entry; 0 where the entry is not larger than rounding."""
    precision = np.finfo(tensor.dtype.as_numpy_dtype).eps
    return tf.where(tf.abs(tensor) > ROUNDING * precision * tf.norm(tensor), tf.sign(tensor), tf.zeros_like(tensor))
