"""BFGS with a dense inverse Hessian, and its self-scaled relatives."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_choice, register
from keras_curvature.optimizers.quasi_newton import Pair, QuasiNewton
from keras_curvature.steps import HagerZhang
from keras_curvature.steps.search import Search
from keras_curvature.typing import LearningRate, Variables, Vector

# The dense matrix is n x n in float64.
MOST_BYTES = 4e9
# On the first length that the last decrease predicts, as in SciPy's `line_search`.
MARGIN = 1.01


@register
class BFGS(QuasiNewton):
    """BFGS and the self-scaled Broyden family, with a dense inverse Hessian: for full batches, some thousand weights.

        H <- ( H - H y y'H / (y'H y) + phi (y'H y) v v' ) / tau + s s' / s'y,      v = s / s'y - H y / (y'H y)

    BFGS has `phi = tau = 1`. Self-scaling (`tau`) corrects eigenvalues of `H` that are too large in one step; Broyden's
    `phi` moves between BFGS and DFP. On physics-informed networks both end at errors that are digits below those of
    BFGS. The matrix is in float64, also for weights in float32. Costs about one evaluation of loss and gradient per
    step, and `n^2` numbers for `n` weights: 5000 weights are 200 MB.

    Reference: Nocedal and Wright, "Numerical Optimization" (2006), Algorithm 6.1; Al-Baali (1998) for the scaling; the
    choice of `phi` and `tau` of Urban, Stefanou and Pons, "Unveiling the optimization process of physics-informed
    neural networks" (2025), after Al-Baali, Spedicato and Maggioni (2014). Differences from the papers: (1) cautious
    pairs, as in `LBFGS`; (2) where `-H g` does not descend, and after a search that finds no lower point, `H` is
    forgotten; (3) the old `H` is kept where a coefficient is not finite; (4) with scaling a search begins at the length
    where a parabola falls as far as the last step, if that is less than 1, as in SciPy's code, which theirs builds on.

    Args:
        learning_rate: Multiple of the step that the search found; with `search=None` the length itself. Defaults to
            `1.0`.
        scaling: `None`: BFGS; `"self_scaled"`: `tau = min(1, 1/b)` with `b = s'H^-1 s / s'y`; `"broyden"`: self-scaled
            Broyden. Defaults to `None`.
        search: `HagerZhang()`, `StrongWolfe()` or `ArmijoLineSearch()`; `None`: no search. Defaults to `HagerZhang()`.
        update: `"cautious"`: drop pairs without enough curvature; `"damped"`: mend them. Defaults to `"cautious"`.
        initial_scale: `H` before the first pair, a positive number; `None`: `min(1, 1/|g|)`. After the first step
            BFGS without scaling begins at `s'y / y'y`, as Nocedal and Wright advise. Defaults to `None`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: As `LBFGS`.

    Raises:
        ValueError: When it is built: the matrix would need more than 4 GB.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.BFGS(scaling="broyden"), loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=1000)
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 1.0, scaling: Literal["self_scaled", "broyden"] | None = None,
        search: Search | None = HagerZhang(), update: Literal["cautious", "damped"] = "cautious",
        initial_scale: float | None = None, name: str = "bfgs", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, search, update, initial_scale, name=name, **kwargs)
        self.scaling = scaling
        check_choice(self, "scaling", scaling, (None, "self_scaled", "broyden"))

    def create_state(self, variables: Variables) -> None:
        """`H`, dense."""
        super().create_state(variables)
        size = trees.count(variables)
        needed = 8.0 * size**2
        if needed > MOST_BYTES:
            raise ValueError(
                f"`BFGS` keeps a dense matrix of float64 numbers, {needed / 1e9:.1f} GB for this model. Received: a "
                f"model with {size} trainable weights; at most {int((MOST_BYTES / 8) ** 0.5)} fit. Use `LBFGS()`."
            )
        if self.scaling:
            self._decrease = self.add_scalar(0.0, "decrease")
        self._H = self.add_variable((size, size), dtype="float64", name="inverse_hessian", aggregation="none")

    def first_length(self, slope: tf.Tensor) -> tf.Tensor:
        """1; with scaling, no longer than where a parabola would fall as far as the last step."""
        if self.scaling is None:
            return super().first_length(slope)
        predicted = -2.0 * MARGIN * tf.cast(self._decrease.value, tf.float64) / slope
        return tf.where((predicted > 0) & (predicted < 1), predicted, 1.0)

    def descent(self, gradient: Vector, products: list[tf.Tensor], count: tf.Tensor, scale: tf.Tensor) -> Vector:
        """`-H g`, one dense product."""
        dense = tf.linalg.matvec(self._H.value, trees.flatten(gradient, tf.float64))
        return trees.where(count > 0, trees.unflatten(-dense, gradient), trees.scale(-scale, gradient))

    def learn(self, pair: Pair, products: list[tf.Tensor], count: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        """Update `H` by the pair."""
        s, y, sy = trees.flatten(pair.s, tf.float64), trees.flatten(pair.y, tf.float64), pair.sy
        first = tf.equal(count, 0)
        begin = scale if self.scaling else sy / tf.tensordot(y, y, 1)
        identity = tf.eye(tf.size(s), dtype=tf.float64)
        # without scaling the first H is that of `LBFGS`
        old = tf.cond(first, lambda: begin * identity, lambda: tf.identity(self._H.value))
        Hy = tf.linalg.matvec(old, y)
        yHy = tf.tensordot(y, Hy, 1)
        phi, tau = self._coefficients(sy, yHy, pair.sBs, first, tf.cast(tf.size(s), tf.float64))
        v = s / sy - Hy / yHy
        new = (old - _outer(Hy, Hy) / yHy + phi * yHy * _outer(v, v)) / tau + _outer(s, s) / sy
        if self.scaling:
            self.remember(self._decrease, tf.cast(pair.decrease, self._decrease.dtype))
        good = pair.learns & tf.math.is_finite(tf.reduce_sum(new))
        self.remember(self._H, tf.cond(good, lambda: new, lambda: tf.identity(self._H.value)))
        return []

    def _coefficients(self, sy, yHy, sBs, first, size):
        """`(phi, tau)` of the update, float64 scalars."""
        one = tf.ones((), tf.float64)
        if self.scaling is None:
            return one, one
        b, h = sBs / sy, yHy / sy
        if self.scaling == "self_scaled":
            return one, tf.where(first, one, tf.minimum(one, 1.0 / b))
        # in exact arithmetic h b >= 1, with equality only where H y and s are parallel
        a = tf.maximum(h * b - 1.0, 1e-15)
        c = tf.sqrt(a / (1.0 + a))
        low = tf.minimum(one, h * (1.0 - c))
        theta = tf.maximum((low - 1.0) / a, tf.minimum(1.0 / low, (1.0 - b) / b))
        sigma = 1.0 + a * theta
        root = tf.pow(tf.abs(sigma), 1.0 / (1.0 - size))
        high = tf.minimum(one, 1.0 / b)
        scaled = tf.where(theta <= 0, tf.minimum(high * root, sigma), high * tf.minimum(root, 1.0 / theta))
        return (1.0 - theta) / sigma, tf.where(first, h / sigma, scaled)


def _outer(a, b):
    return a[:, None] * b[None, :]
