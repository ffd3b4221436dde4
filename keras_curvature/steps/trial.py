"""One checked step: try it, compare the loss with the prediction, accept the step or not, adapt the damping.

    ratio = (f(w + s) - f(w)) / q(s),        q: the change that the quadratic model of the loss predicts

The ratio is 1 where the model is right. It is minus infinity where the loss rose, 0 where it did not change (a step of
zero too: with more damping there may be one), and NaN where it is not a number. Two things differ between methods,
because their reference runs do:

* Whether `q` has the damping in it: it has for CurveBall (its authors' code), and has not for Martens' Hessian-free
  optimization and for kfac-jax.
* Which of every so many steps is checked: the first (CurveBall), or the last (kfac-jax).

References: Martens, "Deep learning via Hessian-free optimization" (2010), section 4.1; Nocedal and Wright, "Numerical
Optimization" (2006), Algorithm 4.1.
"""

import dataclasses

import tensorflow as tf

from keras_curvature.component import check

ACCEPTS = ("lower", "finite", "any")


@dataclasses.dataclass(frozen=True)
class Checked:
    """What came of a trial; scalar tensors.

    Attributes:
        value: The next damping (or radius).
        ratio: The reduction ratio, NaN where the step was not looked at.
        accepted: Whether to take the step; true where it was not looked at.
    """

    value: tf.Tensor
    ratio: tf.Tensor
    accepted: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Trial:
    """When to look at a step, what to accept, and how to adapt. Pure: values in, values out.

    Args:
        rule: What adapts: `LevenbergMarquardt`, or any record with `every` and `update(value, ratio)`, such as the
            radius of a trust region. `every=None`: nothing is adapted.
        accepts: The losses that are accepted: `"lower"`: not higher than before; `"finite"`; or `"any"`, where
            something else (a line search) decides. Defaults to `"lower"`.
        at: Which of `every` steps is checked, `"first"` or `"last"`. Defaults to `"first"`.
        always: Whether to look at the other steps too; those that are not accepted adapt at once. Defaults to `False`.

    Example:

    ```python
    trial = Trial(LevenbergMarquardt.martens())
    checked = trial.check(iterations, damping, before=lin.loss, after=lambda: lin.loss_at(step),
                          predicted=lambda: slope + 0.5 * curvature)
    ```
    """

    rule: object
    accepts: str = "lower"
    at: str = "first"
    always: bool = False

    def __post_init__(self):
        check(self, "accepts", self.accepts, self.accepts in ACCEPTS, f"one of {', '.join(map(repr, ACCEPTS))}")
        check(self, "at", self.at, self.at in ("first", "last"), '"first" or "last"')

    @property
    def looks(self):
        """Whether any step is looked at."""
        return bool(self.rule.every) or self.always

    def check(self, iterations, value, before, after, predicted):
        """`Checked`, of the step that is about to be taken.

        Args:
            iterations: Number of steps before this one, an integer tensor.
            value: The damping (or radius), a scalar tensor.
            before: `f(w)`, a scalar tensor; computed outside of the condition, where other parts of the step find it.
            after: Function that gives `f(w + s)`. Called where the step is looked at, as `predicted` is.
            predicted: Function that gives `q(s)`.
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


def reduction_ratio(change, predicted):
    """The change of the loss over the predicted one; see the module."""
    ratio = tf.where(change == 0, tf.zeros_like(change), change / predicted)
    return tf.where(change > 0, tf.constant(float("-inf"), change.dtype), ratio)
