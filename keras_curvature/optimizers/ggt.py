"""GGT: full-matrix adaptive regularization on the span of the last gradients."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_number, register
from keras_curvature.optimizers.window import GradientWindow
from keras_curvature.solvers import dense
from keras_curvature.typing import LearningRate, Variables, Vector

ROUNDING = 1e-6  # added to the squared singular values (the code)


@register
class GGT(GradientWindow):
    """Full-matrix AdaGrad with a window: the inverse root of the matrix of the last moments, all weights together.

        m <- beta_1 m + (1 - beta_1) g,         M the last moments m, in columns, over the root of their number
        M = U diag(s) V',      w <- w - learning_rate * U (s + epsilon)^-3 s^2 U' m      about (M M')^-1/2 m

    Trains any `keras.Model`. A step costs two passes over the window and eigenvalues of `(window, window)`; the state,
    and so a checkpoint, is `window + 1` copies of the weights.

    Reference: Agarwal et al., "Efficient full-matrix adaptive regularization" (2019), Algorithm 1, and the authors'
    code in TensorFlow 1, `contrib/opt/python/training/ggt.py`. Difference: `m` has no part outside of the span of `M`,
    because it is the newest column, and none is added to the step. In the code, which adds `1e-6` to squared singular
    values, rounding leaves such a part: about 1e-6 of a step, and up to 1e-3 while rows of the window are empty.

    Args:
        learning_rate: About the length of a step of all weights together, whatever the gradient; large networks need
            more. Defaults to `0.1`, with which a dense network of width 32 had 1.13 or more of Adam's reduction of the
            loss in 150 steps, and a small convolutional network 1.03; with 1e-3 (the code) the dense one had 0.03
            (`tuning` data of `examples/benchmarks/defaults.py`).
        window: Number of moments. Defaults to `10` (the code; the paper: up to 200).
        beta_1: Decay of the moment. Defaults to `0.9` (the code).
        decay: The paper's `beta_2`: weight of a moment in relation to the next one, in (0, 1]. Defaults to `1.0` (the
            code).
        epsilon: Added to the singular values. Defaults to `1e-2` (the code).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.GGT(window=50), loss="sparse_categorical_crossentropy")
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 0.1, window: int = 10, beta_1: float = 0.9, decay: float = 1.0,
        epsilon: float = 1e-2, name: str = "ggt", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, window, decay, name=name, **kwargs)
        self.beta_1, self.epsilon = beta_1, epsilon
        check_number(self, "beta_1", beta_1, low=0, high=1, open_high=True)
        check_number(self, "epsilon", epsilon, low=0)

    def create_state(self, variables: Variables) -> None:
        """The moment, and the window."""
        super().create_state(variables)
        self._moment = self.add_optimizer_variables(variables, "moment")

    def precondition(self, gradients: Vector) -> Vector:
        """The step."""
        kept = [self.beta_1 * m for m in trees.values(self._moment)]
        moment = [m + (1.0 - self.beta_1) * g for m, g in zip(kept, gradients)]
        self.remember(self._moment, moment)
        seen = self.see(moment)
        squares, vectors = dense.eigenpairs(seen.K / seen.total)
        # rounding makes eigenvalues of 0 negative
        s = tf.sqrt(tf.maximum(squares, 0.0) + ROUNDING) + self.epsilon
        # M'm = (M'M) e, for the unit vector e of the newest column
        along = tf.linalg.matvec(vectors, seen.newest, transpose_a=True) * tf.math.divide_no_nan(squares, s**3)
        return trees.negative(self.combined(tf.linalg.matvec(vectors, along)))
