"""Adam without the square root, read as natural gradient descent with a diagonal Fisher matrix."""

from typing import Any, Literal, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_choice, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Diagonal
from keras_curvature.optimizers.arguments import with_needs
from keras_curvature.optimizers.by_weight import LimitedDiagonalOptimizer
from keras_curvature.optimizers.limits import LinearStep, averaged, steps_taken
from keras_curvature.typing import LearningRate, Vector


@register
class SquareRootFreeAdam(LimitedDiagonalOptimizer):
    """Adam without the square root: natural gradient descent with a running diagonal of the Fisher matrix.

    The length of a step is inversely proportional to the scale of the loss: scale regression targets to a variance
    near 1.

        m <- beta_1 m + (1 - beta_1) g
        v <- beta_2 v + (1 - beta_2) g^ * g^
        d = m / (v / (1 - beta_2^t) + epsilon),    w <- w - learning_rate * clip(d, -step_max, step_max)

    where `m` is corrected for bias like `v`. With `fisher="empirical"`, `g^` is the gradient itself: Adam with the
    exponent 1 of `v`, on any model, curved or not. With `"sampled"` it is the gradient with labels drawn from the
    model. Then `v` estimates the Fisher matrix itself, for one more backward pass. `epsilon` acts as a damping: the
    step grows with its inverse. Keeps two copies of the weights.

    Reference: Frans, "Second-order optimization" in "Notes on deep learning" (the sections "Adagrad and Adam" and
    "Fisher vs. empirical Fisher"), after Hwang, "FAdam" (2024). Differences: (1) momentum, which the notes' code leaves
    out (`beta_1=0`); (2) the default `epsilon`: with the 1e-6 of the notes the empirical form diverges there; (3) with
    `"sampled"`, a `g^` that is not finite is left out. As in the notes, `v` is made of squares of the mean gradient: of
    N examples about 1/N of the diagonal of the Fisher matrix; (4) `step_max`, which the notes do not have;
    `SquareRootFreeAdam.notes()` has no such limit.

    Args:
        learning_rate: Defaults to `1e-3`.
        beta_1: Decay of the average of gradients. Defaults to `0.9` (Adam).
        beta_2: Decay of the average of squares. Defaults to `0.999` (Adam, and the notes).
        epsilon: Damping. Defaults to `1e-4` (the notes: 1e-2 with `"sampled"`, and a learning rate of 1e-4). Without
            `step_max`, 1e-3 is safer.
        fisher: `"empirical"` or `"sampled"`. Defaults to `"empirical"`.
        step_max: Largest absolute entry of `d`, or `None` for no limit. Defaults to `3.0`, so that no weight moves by
            more than 0.003 in a step: on a small transformer 1.2 to 1.9 of Adam's reduction of the loss in the first
            150 steps, against 0.9 to 1.6 without limit (`examples/benchmarks/defaults.py`).
        **kwargs: See `CurvatureOptimizer`.

    Raises:
        ValueError: With `"sampled"`, at the first step, if the loss is not minus the logarithm of a likelihood that is
            known.

    Reports: `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.SquareRootFreeAdam(), loss="mse")
    ```
    """

    reports = {"step_norm": "mean", "skipped_steps": "sum"}
    needs = Needs(only_gradients=True)
    every = 1

    def __init__(
        self, learning_rate: LearningRate = 1e-3, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-4,
        fisher: Literal["empirical", "sampled"] = "empirical", step_max: float | None = 3.0,
        name: str = "square_root_free_adam", **kwargs: Any,
    ) -> None:  # fmt: skip
        check_choice(self, "fisher", fisher, ("empirical", "sampled"))
        needs = Needs(only_gradients=fisher == "empirical")
        super().__init__(learning_rate, name=name, **with_needs(kwargs, needs))
        self.beta_1, self.beta_2, self.epsilon, self.fisher = beta_1, beta_2, epsilon, fisher
        check_number(self, "beta_1", beta_1, 0.0, 1.0, open_high=True)
        check_number(self, "beta_2", beta_2, 0.0, 1.0, open_high=True)
        check_number(self, "epsilon", epsilon, 0.0, open_low=True)
        self.set_step_max(step_max)

    @classmethod
    def notes(cls, epsilon: float = 1e-2, **kwargs: Any) -> Self:
        """The method of the notes: labels drawn from the model, no momentum and no limit on the step.

        Args:
            epsilon: Damping. Defaults to `1e-2` (the notes).
            **kwargs: Arguments of the constructor. `learning_rate` defaults to `1e-4`, `beta_1` to `0.0`, `fisher` to
                `"sampled"` (the notes).

        Example: `SquareRootFreeAdam.notes()`
        """
        chosen = {"learning_rate": 1e-4, "beta_1": 0.0, "fisher": "sampled", "step_max": None}
        return cls(epsilon=epsilon, **{**chosen, **kwargs})

    def precondition(self, gradients: Vector) -> Vector:
        """With the squares of the gradients themselves."""
        return self._divide(gradients, lambda: gradients)

    def direction(self, lin: Linearization) -> Vector:
        """With the squares of gradients of drawn labels."""
        return self._divide(lin.gradient, lambda: lin.sampled_gradient(self.seed))

    def _divide(self, gradients, slopes):
        m, v, counts = self.follow(lambda: gradients, lambda: [tf.square(g) for g in slopes()])
        return self.limited(trees.negative(self._quotients(m, v, counts, self.iterations + 1)))

    def _quotients(self, m, v, counts, step):
        """`m^ / (v^ + epsilon)`, with `m` of so many steps."""
        found = []
        for a, b, n in zip(m, v, counts):
            taken, share = self.share(self.beta_1, step, a.dtype), self.share(self.beta_2, n, a.dtype)
            # no step while nothing is known of `v`
            found.append(tf.math.divide_no_nan(a * (share / taken), b + share * self.epsilon))
        return found

    def linear_step(self) -> LinearStep:
        """Momentum as of Adam; the denominator of the last step."""
        return LinearStep(averaged(self.beta_1), self._preconditioner, self.limit_note)

    def _preconditioner(self):
        v, counts = trees.values(self._D), tf.unstack(tf.identity(self._counts.value))
        return Diagonal(self._quotients([tf.ones_like(a) for a in v], v, counts, steps_taken(self)))
