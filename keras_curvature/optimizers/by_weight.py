"""Shared code of the diagonal methods: momentum over a running average of squares or curvatures."""

from collections.abc import Callable
from typing import Any, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_number
from keras_curvature.linearization.estimates import diagonals
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.typing import Config, Integer, Probe, Shape, Variables, Vector

LIMITED = "Where `step_max` cuts entries of a step, the gauge is an upper bound."


class DiagonalOptimizer(CurvatureOptimizer):
    """Base of the methods that divide momentum by a running average `D` of estimates of a diagonal.

        m <- beta_1 m + (1 - beta_1) g                 in every step
        D <- beta_2 D + (1 - beta_2) estimate          in step 0, every, 2 every, ...

    A non-finite estimate of a variable leaves its average unchanged and is counted in `failed_refreshes`. A subclass
    has the attributes `beta_1`, `beta_2` and `every`; with `beta_2=None` the average is the mean of all estimates.
    """

    def create_state(self, variables: Variables) -> None:
        """Create `m` (unless `beta_1` is 0), `D`, and the number of estimates in the average of each variable."""
        self._m = self.add_optimizer_variables(variables, "m") if self.beta_1 else []
        self._D = [
            self.add_variable(shape, dtype=v.dtype, name=f"{v.path.replace('/', '_')}_D", aggregation="none")
            for shape, v in zip(self.shapes(variables), variables)
        ]
        self._counts = self.add_variable((len(variables),), name="estimates", aggregation="none")

    def shapes(self, variables: Variables) -> list[Shape]:
        """The shape of the diagonal of each variable."""
        return [v.shape for v in variables]

    @property
    def seed(self) -> tf.Tensor:
        """The seed of this step, the same on every replica: the number of steps before it."""
        return tf.cast(self.iterations, tf.int32)

    def product(self, lin: Linearization, probe: Probe) -> Callable[[], tuple[Vector, Vector]]:
        """A function that returns `(z, H z)` for a random vector `z`; the Hessian shares the gradient's passes."""
        # outside the condition on the step: a Hessian inside it would need its own passes
        H, weights = lin.hessian(), lin.weights

        def product():
            z = diagonals.draw(weights, self.seed, probe)
            return z, H @ z

        return product

    def follow(
        self, gradient: Callable[[], Vector], estimate: Callable[[], Vector]
    ) -> tuple[Vector, Vector, Vector]:  # fmt: skip
        """`(m, D, counts)` after this step: the averages, and the numbers of estimates in `D`.

        Args:
            gradient: A function of no arguments that returns the gradient.
            estimate: A function of no arguments that returns an estimate of the diagonal; called in every `every`-th
                step.
        """
        if self.every > 1:  # outside the condition, so that the estimate can reuse its passes
            gradient()
        D, counts = self._average(estimate)
        return self._momentum(gradient()), D, counts

    def _momentum(self, gradient):
        if not self.beta_1:
            return gradient
        m = [tf.cast(g, old.dtype) * (1.0 - self.beta_1) + old * self.beta_1 for g, old in zip(gradient, self._m)]
        self.remember(self._m, m)
        return m

    def _average(self, estimate):
        counted = tf.identity(self._counts.value)

        def average():
            averages = [self._next(*each) for each in zip(estimate(), trees.values(self._D), tf.unstack(counted))]
            # `refresh` keeps the old average where the new one is not finite; the count must not change then
            fine = tf.stack([trees.has_finite_sum(average) for average in averages])
            return [*averages, counted + tf.cast(fine, counted.dtype)]

        *D, counts = self.refresh([*self._D, self._counts], self.every, average)
        due = tf.equal(self.iterations % self.every, 0)
        failed = tf.cast(len(D), counts.dtype) - tf.reduce_sum(counts - counted)
        self.report(failed_refreshes=tf.where(due, failed, tf.zeros_like(failed)))
        return D, tf.unstack(counts)

    def _next(self, estimate, average, count):
        if self.beta_2 is None:
            return average + (estimate - average) / tf.cast(count + 1.0, average.dtype)
        return average * self.beta_2 + estimate * (1.0 - self.beta_2)

    def share(self, beta: float, count: Integer, dtype: tf.DType) -> tf.Tensor:
        """`1 - beta^count`, the bias correction of an average that began at zero."""
        return 1.0 - tf.pow(tf.constant(beta, dtype), tf.cast(count, dtype))


class LimitedDiagonalOptimizer(DiagonalOptimizer):
    """A `DiagonalOptimizer` with a limit `step_max` on the entries of its steps, before the learning rate.

    Where an estimate of the curvature is small by chance, the quotient is large: the first steps of a method without
    limit raise the loss of a small network tenfold.
    """

    def set_step_max(self, step_max: float | None) -> None:
        """Keep the argument `step_max`: a positive number, or `None` for no limit."""
        self.step_max = step_max
        check_number(self, "step_max", step_max, low=0, open_low=True, or_none=True)

    def limited(self, step: Vector) -> Vector:
        """The step with its entries cut to `step_max`."""
        # NaN stays NaN; an infinite entry comes from a gradient that is not finite, which the life cycle sees
        bound = self.step_max
        return step if bound is None else [tf.clip_by_value(s, -bound, bound) for s in step]

    @property
    def limit_note(self) -> str | None:
        """What `stability` says of the limit."""
        return None if self.step_max is None else LIMITED

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict[str, Any] | None = None) -> Self:
        """A new optimizer from a config; without limit if the config is older than `step_max`."""
        return super().from_config({"step_max": None, **config}, custom_objects)
