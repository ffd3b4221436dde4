"""Line search: shorten a step until the loss decreases enough.

The record is pure: `search` takes the loss as a function of the step length, and returns a length. `begin` and
`advance` are the same rule as a `Search`, for methods that want the gradient at the end too.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_curvature.component import Component, check_count, check_number, register
from keras_curvature.steps.search import BUDGET, CONDITIONS_MET, KEEP, SEARCHING, TRIAL, Point, State


@register
@dataclasses.dataclass(frozen=True)
class ArmijoLineSearch(Component):
    """Backtracking line search with the condition of Armijo.

        f(w + s d) <= f(w) + slope * s * g'd,       s = 1, shrink, shrink^2, ...

    Reference: Nocedal and Wright, "Numerical Optimization" (2006), Algorithm 3.1. The defaults are those of Martens'
    Hessian-free code.

    Args:
        slope: Fraction of the first-order decrease that the loss must reach, in (0, 1). Defaults to `1e-2`.
        shrink: Factor between two trials, in (0, 1). Defaults to `0.8`.
        max_steps: Largest number of lengths to try before the step is rejected. Defaults to `60`.

    Example: `HessianFree(line_search=ArmijoLineSearch(shrink=0.5))`
    """

    slope: float = 1e-2
    shrink: float = 0.8
    max_steps: int = 60

    def __post_init__(self):
        check_number(self, "slope", self.slope, low=0, high=1, open_low=True, open_high=True)
        check_number(self, "shrink", self.shrink, low=0, high=1, open_low=True, open_high=True)
        check_count(self, "max_steps", self.max_steps)

    def search(
        self, loss_along: Callable[[tf.Tensor], tf.Tensor], loss: tf.Tensor, slope: tf.Tensor, first: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
        """Find the first length that meets the condition.

        Args:
            loss_along: Function from a scalar length `s` to the loss `f(w + s d)`.
            loss: `f(w)`, a scalar.
            slope: `g'd`, a scalar, negative along a descent direction.
            first: `f(w + d)`, a scalar; the caller has computed it.

        Returns:
            `(length, loss)`, scalars; `(0, f(w))` if no length is accepted.
        """

        def too_high(length, value):
            # a NaN is too high; TensorFlow's graphs turn `not (value <= ...)` into `value > ...`, which is false for it
            return (value > loss + self.slope * length * slope) | tf.math.is_nan(value)

        def shorten(i, length, value):
            length = self.shrink * length
            return i + 1, length, loss_along(length)

        _, length, value = tf.while_loop(
            lambda i, length, value: too_high(length, value) & (i < self.max_steps - 1),
            shorten,
            (tf.constant(0), tf.ones_like(loss), first),
        )
        rejected = too_high(length, value)
        return tf.where(rejected, tf.zeros_like(length), length), tf.where(rejected, loss, value)

    @property
    def max_evaluations(self) -> int:
        """Largest number of evaluations as a `Search`."""
        return self.max_steps

    def begin(self, start: Point, first: tf.Tensor) -> State:
        """The state before the first evaluation."""
        return State(first, tf.constant(KEEP), tf.constant(SEARCHING), tf.constant(1))

    def advance(self, start: Point, state: State, trial: Point) -> State:
        """The state after a trial; `memory` counts them."""
        low = trial.loss <= start.loss + self.slope * trial.length * start.slope
        end = tf.where(low, CONDITIONS_MET, tf.where(state.memory < self.max_steps, SEARCHING, BUDGET))
        keep, following = tf.where(low, TRIAL, KEEP), self.shrink * trial.length
        return state._replace(next=following, keep=keep, end=end, memory=state.memory + 1)
