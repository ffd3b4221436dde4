"""Methods that remember the last gradients: one window of them, and the matrix of their inner products.

    K = G G',      G the rows of the window, the newest in the place of the oldest

A step takes two passes over the window: the inner products of the newest row with the others, and one combination of
the rows. Solutions in the span of the window are combinations whose weights follow from `K`, `(rows, rows)`: with the
newest row `g = G'e` and any function `f` of the matrix,

    f(G'G) g = G' f(K) e

so nothing of the size of the weights is decomposed, and nothing cancels.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.rows import Rows, add_rows
from keras_curvature.solvers.row_vectors import coefficients, combine
from keras_curvature.typing import LearningRate, Variables, Vector


class Seen(NamedTuple):
    """The window with its newest row; tensors are float64.

    Attributes:
        K: The inner products of the rows, each times its weight, `(rows, rows)`; zero for empty rows.
        newest: 1 for the newest row, `(rows,)`.
        total: The sum of the squared weights of the filled rows.
    """

    K: tf.Tensor
    newest: tf.Tensor
    total: tf.Tensor


class GradientWindow(CurvatureOptimizer):
    """Base of `MFAC` and `GGT`; see the module. A subclass calls `see` once in a step, then `combined`.

    Args:
        learning_rate: See `CurvatureOptimizer`.
        window: Number of rows: the state is as many copies of the weights.
        decay: Weight of a row in relation to the next one, in (0, 1].
        **kwargs: See `CurvatureOptimizer`.
    """

    needs = Needs(only_gradients=True)

    def __init__(self, learning_rate: LearningRate, window: int, decay: float, **kwargs: Any) -> None:
        super().__init__(learning_rate, **kwargs)
        self.window, self.decay = window, decay
        check_count(self, "window", window)
        check_number(self, "decay", decay, low=0, high=1, open_low=True)

    def create_state(self, variables: Variables) -> None:
        """The window, the inner products of its rows, and the number of vectors so far."""
        self._rows = add_rows(self, variables, self.window, "window")
        shape = (self.window, self.window)
        self._products = self.add_variable(shape, dtype="float64", name="products", aggregation="none")
        self._count = self.add_variable((), initializer="zeros", dtype="int32", name="count", aggregation="none")

    def see(self, vector: Vector) -> Seen:
        """Put a vector in the place of the oldest."""
        count = tf.identity(self._count.value)
        slot, places = count % self.window, tf.range(self.window)
        is_newest = tf.equal(places, slot)
        k = tf.cast(coefficients(trees.values(self._rows), vector), tf.float64)
        k = tf.where(is_newest, tf.cast(trees.squared_norm(vector), tf.float64), k)
        products = tf.where(is_newest[:, tf.newaxis], k, self._products.value)
        products = tf.where(is_newest, k[:, tf.newaxis], products)
        self.remember(Rows(self._rows, [slot]), [vector])
        self.remember(self._products, products)
        self.remember(self._count, count + 1)

        age = tf.cast((slot - places) % self.window, tf.float64)
        weights = tf.where(places <= count, tf.constant(self.decay, tf.float64) ** age, tf.zeros_like(age))
        self._now = vector, is_newest, weights
        K = weights[:, tf.newaxis] * products * weights
        return Seen(K, tf.cast(is_newest, tf.float64), tf.reduce_sum(weights * weights))

    def combined(self, x: tf.Tensor) -> Vector:
        """`G'x`, a vector, with the rows times their weights."""
        vector, is_newest, weights = self._now
        x = x * weights
        of_others = combine(tf.where(is_newest, tf.zeros_like(x), x), trees.values(self._rows))
        return trees.add(of_others, vector, tf.reduce_sum(tf.where(is_newest, x, tf.zeros_like(x))))
