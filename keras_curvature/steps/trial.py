"""A checked step: try it, compare the loss with the prediction, accept or reject the step, adapt the damping.

    ratio = (f(w + s) - f(w)) / q(s),        q: the change that the quadratic model of the loss predicts

The ratio is 1 if the model is exact, minus infinity if the loss increased, and NaN if the loss is NaN. It is 0 if the
loss did not change, also for a step of zero, which more damping may cure. The methods differ in two things, because
their reference codes do:

* Whether `q` includes the damping: it does in CurveBall (its authors' code), and not in Martens' Hessian-free
  optimization and in kfac-jax.
* Which of `every` steps is checked: the first (CurveBall), or the last (kfac-jax).

References: Martens, "Deep learning via Hessian-free optimization" (2010), section 4.1; Nocedal and Wright, "Numerical
Optimization" (2006), Algorithm 4.1.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_choice
from keras_curvature.steps.damping import Damping
from keras_curvature.typing import Vector

ACCEPTS = ("lower", "finite", "any")


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result of a trial; scalar tensors.

    Attributes:
        value: The next damping (or radius).
        ratio: The reduction ratio; NaN if the step was not checked.
        accepted: Whether to take the step; true if it was not checked.
    """

    value: tf.Tensor
    ratio: tf.Tensor
    accepted: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Trial:
    """When to check a step, which steps to accept, and how the damping adapts. Pure: values in, values out.

    Args:
        rule: How the damping adapts: `LevenbergMarquardt`, or any record with `every` and `update(value, ratio)`, such
            as the radius of a trust region. With `every=None` nothing adapts.
        accepts: Which losses are accepted: `"lower"`, those not higher than before; `"finite"`; or `"any"`, if another
            part such as a line search decides. Defaults to `"lower"`.
        at: Which of `every` steps is checked, `"first"` or `"last"`. Defaults to `"first"`.
        always: Whether to check the other steps too. A rejected step then adapts the damping at once. Defaults to
            `False`.

    Example:

    ```python
    trial = Trial(LevenbergMarquardt.martens())
    checked = trial.check(iterations, damping, before=lin.loss, after=lambda: lin.loss_at(step),
                          predicted=lambda: slope + 0.5 * curvature)
    ```
    """

    rule: Damping
    accepts: Literal["lower", "finite", "any"] = "lower"
    at: Literal["first", "last"] = "first"
    always: bool = False

    def __post_init__(self):
        check_choice(self, "accepts", self.accepts, ACCEPTS, f"one of {', '.join(map(repr, ACCEPTS))}")
        check_choice(self, "at", self.at, ("first", "last"))

    @property
    def looks(self) -> bool:
        """Whether any step is checked."""
        return bool(self.rule.every) or self.always

    def check(
        self, iterations: tf.Tensor, value: tf.Tensor, before: tf.Tensor, after: Callable[[], tf.Tensor],
        predicted: Callable[[], tf.Tensor],
    ) -> Checked:  # fmt: skip
        """Check the step that is about to be taken.

        Args:
            iterations: Number of steps before this one, an integer tensor.
            value: The damping (or radius), a scalar tensor.
            before: `f(w)`, a scalar tensor, computed outside the condition, so that other parts of the step can use it.
            after: Function that returns `f(w + s)`. It is called only if the step is checked, as `predicted` is.
            predicted: Function that returns `q(s)`.

        Returns:
            A `Checked`.
        """

        def look():
            old, new = before, after()
            ratio = reduction_ratio(new - old, tf.cast(predicted(), old.dtype))
            return tf.cast(ratio, tf.float64), self._accepts(old, new)

        def idle():
            return tf.constant(float("nan"), tf.float64), tf.constant(True)

        due, every_step = self._due(iterations), self.always or self.rule.every == 1
        if not self.looks:
            ratio, accepted = idle()
        else:
            ratio, accepted = look() if every_step else tf.cond(due, look, idle)
            adapts = due | tf.logical_not(accepted)
            value = tf.where(adapts, self.rule.update(value, ratio), value)
        return Checked(value, ratio, accepted)

    def _due(self, iterations):
        if not self.rule.every:
            return tf.constant(False)
        phase = 0 if self.at == "first" else self.rule.every - 1
        return tf.equal(iterations % self.rule.every, phase)

    def _accepts(self, old, new):
        if self.accepts == "any":
            return tf.constant(True)
        return new <= old if self.accepts == "lower" else tf.math.is_finite(new)


class Attempt(NamedTuple):
    """A step with one damping or radius.

    Attributes:
        step: The step, a vector.
        taken: Whether it is taken.
        finite: Whether all that it was made of is finite: else no other damping helps.
        next: The next state of the damping or radius.
        reports: What the optimizer reports of it, scalars by name.
    """

    step: Vector
    taken: tf.Tensor
    finite: tf.Tensor
    next: tf.Tensor
    reports: dict[str, tf.Tensor]


def first_taken(
    attempt: Callable[[tf.Tensor], Attempt], state: tf.Tensor, like: Vector, most: int, **reports: tf.Tensor
) -> Attempt:  # fmt: skip
    """The first of so many attempts that is taken, or the last one.

    Args:
        attempt: Function from the state of a damping or radius to an `Attempt`.
        state: The first state.
        like: A vector like the steps.
        most: The most attempts, an integer.
        **reports: Tensors like the reports of an attempt.
    """
    if most == 1:
        return attempt(state)
    begin = Attempt(trees.zeros_like(like), tf.constant(False), tf.constant(True), state, reports)
    again = lambda count, last: (count < most) & last.finite & tf.logical_not(last.taken)  # noqa: E731
    body = lambda count, last: (count + 1, attempt(last.next))  # noqa: E731
    return tf.while_loop(again, body, (tf.constant(0), begin), parallel_iterations=1)[1]


def reduction_ratio(change, predicted):
    """The change of the loss divided by the predicted change; see the module."""
    ratio = tf.where(change == 0, tf.zeros_like(change), change / predicted)
    return tf.where(change > 0, tf.constant(float("-inf"), change.dtype), ratio)
