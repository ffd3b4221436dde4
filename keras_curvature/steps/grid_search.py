"""Grid search: the best of many lengths of a step."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_curvature.component import Component, check_count, check_number, register


@register
@dataclasses.dataclass(frozen=True)
class GridSearch(Component):
    """The length with the lowest loss among `1, shrink, shrink^2, ...`.

        s = argmin_k f(w + shrink^k d),       k = 0 ... count - 1

    Costs `count - 1` evaluations of the loss in each step.

    Reference: Mueller and Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradients" (2023), section
    4, and its code, whose defaults these are.

    Args:
        shrink: Factor between two lengths, in (0, 1). Defaults to `0.5`.
        count: Number of lengths. Defaults to `31`.

    Example: `GaussNewton(line_search=GridSearch())`
    """

    shrink: float = 0.5
    count: int = 31

    def __post_init__(self):
        check_number(self, "shrink", self.shrink, low=0, high=1, open_low=True, open_high=True)
        check_count(self, "count", self.count)

    def search(
        self, loss_along: Callable[[tf.Tensor], tf.Tensor], loss: tf.Tensor, slope: tf.Tensor, first: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
        """Find the best length.

        Args:
            loss_along: Function from a scalar length `s` to the loss `f(w + s d)`.
            loss: `f(w)`, a scalar.
            slope: `g'd`, a scalar; not used.
            first: `f(w + d)`, a scalar; the caller has computed it.

        Returns:
            `(length, loss)`, scalars; `(0, f(w))` if no length lowers the loss.
        """
        one = tf.ones_like(loss)

        def better(length, value, best, lowest):
            lower = value < lowest  # false for NaN
            return tf.where(lower, length, best), tf.where(lower, value, lowest)

        def shorten(i, length, best, lowest):
            length = self.shrink * length
            return i + 1, length, *better(length, loss_along(length), best, lowest)

        begin = (tf.constant(1), one, *better(one, first, tf.zeros_like(loss), loss))
        *_, best, lowest = tf.while_loop(lambda i, *_: i < self.count, shorten, begin)
        return best, lowest
