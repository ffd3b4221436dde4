"""Newton's method with the clipped diagonal of the Hessian."""

from typing import Any, Literal, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_number, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.typing import LearningRate, Vector


@register
class DiagonalNewton(CurvatureOptimizer):
    """Diagonal Newton: each entry of the gradient is divided by its own curvature, and both are clipped.

        h = clip(diag(H), curvature_min, curvature_max)
        w <- w - learning_rate * clip(g / h, -step_max, step_max)

    Many weights of a neural network have zero or negative curvature, and without clipping training diverges. The method
    keeps no state between steps. Each probe costs one Hessian product.

    Reference: Frans, "Second-order optimization" in "Notes on deep learning" (the section "Diagonal Newton", and its
    example on CIFAR-10, whose bounds on the curvature are the default here; `DiagonalNewton.notes()` has all its
    settings). Differences: (1) the diagonal is Hutchinson's estimate, or exact; the code of the notes differentiates
    the sum of the gradient, which gives the row sums of the Hessian instead of its diagonal; (2) a step in which the
    estimate is not finite is skipped.

    Args:
        learning_rate: Defaults to `0.2` (the notes: 0.01, for 20,000 steps). With 0.1 it reached 0.54 of Adam's
            reduction of the loss in 150 steps on a small LSTM with batches of 512; with 0.2, 1.0 (`tuning` data of
            `examples/benchmarks/defaults.py`).
        curvature_min: Smallest curvature to divide by. Defaults to `0.5` (the notes).
        curvature_max: Largest curvature to divide by. Defaults to `3.0` (the notes).
        step_max: Largest absolute entry of a step before the learning rate; `None`: no limit. Defaults to `0.05` (the
            notes: 0.5, with which the loss of a normalized network nearly doubled at the learning rate of 0.2).
        probes: Number of random vectors whose estimates are averaged, or `"exact"`: one product for each weight,
            for small models. Defaults to `1`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.DiagonalNewton(), loss="mse")
    ```
    """

    needs = Needs(hessian=True)
    reports = {"step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.2, curvature_min: float = 0.5, curvature_max: float = 3.0,
        step_max: float | None = 0.05, probes: int | Literal["exact"] = 1, name: str = "diagonal_newton", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.curvature_min, self.curvature_max = curvature_min, curvature_max
        self.step_max, self.probes = step_max, probes
        check_number(self, "curvature_min", curvature_min, 0.0, open_low=True)
        check_number(self, "curvature_max", curvature_max, curvature_min)
        check_number(self, "step_max", step_max, low=0, open_low=True, or_none=True)
        counted = isinstance(probes, int) and not isinstance(probes, bool) and probes >= 1
        exact = isinstance(probes, str) and probes == "exact"
        check(self, "probes", probes, counted or exact, 'an integer >= 1, or "exact"')

    @classmethod
    def notes(cls, learning_rate: LearningRate = 0.01, step_max: float | None = 0.5, **kwargs: Any) -> Self:
        """The settings of the notes.

        Args:
            learning_rate: Defaults to `0.01` (the notes).
            step_max: Defaults to `0.5` (the notes).
            **kwargs: Arguments of the constructor.

        Example: `DiagonalNewton.notes()`
        """
        return cls(learning_rate, step_max=step_max, **kwargs)

    def direction(self, lin: Linearization) -> Vector:
        """`-clip(g / h)`."""
        if self.probes == "exact":
            found = lin.hessian_diagonal(probe="exact")
        else:
            found = lin.hessian_diagonal(tf.cast(self.iterations, tf.int32), probes=self.probes)
        h = [tf.clip_by_value(x, self.curvature_min, self.curvature_max) for x in found]
        steps = [-g / x for g, x in zip(lin.gradient, h)]
        if self.step_max is not None:
            steps = [tf.clip_by_value(s, -self.step_max, self.step_max) for s in steps]
        # clipping turns an infinite estimate into a finite step; adding `0 * estimate` keeps the step non-finite
        return trees.add(steps, [0.0 * x for x in found])

    def linear_step(self) -> NotLinear:
        """`NotLinear`: the method keeps no preconditioner."""
        return NotLinear(
            "`DiagonalNewton` divides each gradient by the curvature of its own batch and keeps no preconditioner: no "
            "limit on the curvature is known."
        )
