"""L-BFGS: the inverse Hessian from the last few steps, and a line search."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, register
from keras_curvature.optimizers.quasi_newton import Pair, QuasiNewton
from keras_curvature.optimizers.rows import Row, add_rows
from keras_curvature.steps import HagerZhang
from keras_curvature.steps.search import Search
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class LBFGS(QuasiNewton):
    """Limited-memory BFGS, for full batches: a quasi-Newton step for little more than a gradient.

        w <- w - length * H g
        H <- V' H V + rho s s',   V = I - rho y s',   rho = 1 / s'y         for the last `memory` pairs (s, y),
                                          from H = gamma I, gamma = s'y / y'y of the newest pair (two-loop recursion)

    with the length that the line search finds. A pair is kept if `s'y >= 1e-6 |g| |s|^2` (cautious), or is damped
    towards the present model so that `s'y >= 0.2 s'Bs`. Make the whole set one batch (`batch_size=len(x)`): one step of
    `fit` is then one iteration, and the memory goes on over calls of `fit` and through files. Both gradients of a pair
    are of one batch, so mini-batches work too, where they are large; `search=None` with a small `learning_rate` is for
    noisy ones. Costs about one evaluation of loss and gradient per step, one forward pass, and `2 memory + 2` copies of
    the weights.

    Reference: Liu and Nocedal (1989); Nocedal and Wright, "Numerical Optimization" (2006), Algorithms 7.4 and 7.5;
    cautious pairs: Li and Fukushima (2001); damping: Powell (1978), their Procedure 18.2. Differences from the papers:
    (1) where `-H g` does not descend, and after a search that finds no lower point, all pairs are forgotten; (2) the
    first step is `-g min(1, 1/|g|)` long at first, as in SciPy and optax.

    Args:
        learning_rate: Multiple of the step that the search found; with `search=None` the length itself. Defaults to
            `1.0`.
        memory: Number of pairs. Defaults to `10` (SciPy, optax, TensorFlow Probability; PyTorch: 100).
        search: `HagerZhang()`, `StrongWolfe()` or `ArmijoLineSearch()`; `None`: no search. Defaults to `HagerZhang()`,
            which finds a minimum to the last digits also in float32.
        update: `"cautious"`: drop pairs without enough curvature; `"damped"`: mend them. Defaults to `"cautious"`.
        initial_scale: `H` before the first pair, a positive number; `None`: `min(1, 1/|g|)`. Defaults to `None`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `evaluations` (of loss and gradient, summed over an epoch), `step_length`, `pairs` in memory, `curvature`
    (`s'y / s's`), `gradient_max` (largest entry at the end of the step), `search_end` (1: conditions met; 2:
    evaluations used up; 3: interval as small as rounding; 4: no slope), `resets`, `overflows` (points of a search that
    were not finite), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.LBFGS(), loss="mse")
    stop = keras_curvature.callbacks.Converged(gradient=1e-6)
    model.fit(x, y, batch_size=len(x), epochs=1000, callbacks=[stop])
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 1.0, memory: int = 10, search: Search | None = HagerZhang(),
        update: Literal["cautious", "damped"] = "cautious", initial_scale: float | None = None, name: str = "lbfgs",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, search, update, initial_scale, name=name, **kwargs)
        self.memory = memory
        check_count(self, "memory", memory)

    def create_state(self, variables: Variables) -> None:
        """The pairs, one in each row; their `rho`, and `gamma`."""
        super().create_state(variables)
        self._s = add_rows(self, variables, self.memory, "s")
        self._y = add_rows(self, variables, self.memory, "y")
        self._rho = self.add_variable((self.memory,), dtype="float64", name="rho", aggregation="none")
        self._gamma = self.add_scalar(1.0, "gamma")

    def kept(self, count: tf.Tensor) -> tf.Tensor:
        """At most `memory`."""
        return tf.minimum(count, self.memory)

    def multiply(self, gradient: Vector, count: tf.Tensor, scale: tf.Tensor) -> Vector:
        """`H g` by the two-loop recursion; a loop over the pairs, newest first and back."""
        used = self.kept(count)
        places, rhos = tf.range(self.memory), tf.identity(self._rho.value)

        def first(i, q, alphas):
            slot = (count - 1 - i) % self.memory
            alpha = rhos[slot] * tf.cast(trees.dot(self._row(self._s, slot), q), tf.float64)
            return i + 1, trees.add(q, self._row(self._y, slot), -alpha), tf.where(places == slot, alpha, alphas)

        def second(i, r):
            slot = (count - used + i) % self.memory
            beta = rhos[slot] * tf.cast(trees.dot(self._row(self._y, slot), r), tf.float64)
            return i + 1, trees.add(r, self._row(self._s, slot), alphas[slot] - beta)

        one_by_one = {"parallel_iterations": 1}
        begin = (tf.constant(0), list(gradient), tf.zeros_like(rhos))
        _, q, alphas = tf.while_loop(lambda i, *_: i < used, first, begin, **one_by_one)
        q = trees.scale(tf.where(count > 0, tf.cast(self._gamma.value, tf.float64), scale), q)
        return tf.while_loop(lambda i, _: i < used, second, (tf.constant(0), q), **one_by_one)[1]

    def learn(self, pair: Pair, count: tf.Tensor, scale: tf.Tensor) -> None:
        """Put the pair in the place of the oldest."""
        slot = count % self.memory
        for memory, new in ((self._s, pair.s), (self._y, pair.y)):
            rows = [Row(variable, slot) for variable in memory]
            for row, value in zip(rows, trees.where(pair.learns, new, [row.read() for row in rows])):
                self.remember(row, value)
        sy = tf.where(pair.learns, pair.sy, 1.0)
        yy = tf.where(pair.learns, tf.cast(trees.squared_norm(pair.y), tf.float64), 1.0)
        here = pair.learns & (tf.range(self.memory) == slot)
        self.remember(self._rho, tf.where(here, 1.0 / sy, self._rho.value))
        self.remember(self._gamma, tf.where(pair.learns, tf.cast(sy / yy, self._gamma.dtype), self._gamma.value))

    @staticmethod
    def _row(memory, slot):
        """A row of the memory, a vector."""
        return [Row(variable, slot).read() for variable in memory]
