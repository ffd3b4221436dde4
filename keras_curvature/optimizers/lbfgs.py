"""L-BFGS: the inverse Hessian from the last few steps, and a line search."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, register
from keras_curvature.optimizers.quasi_newton import Pair, QuasiNewton
from keras_curvature.optimizers.rows import Rows, add_rows
from keras_curvature.solvers import row_vectors
from keras_curvature.steps import HagerZhang
from keras_curvature.steps.search import Search
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class LBFGS(QuasiNewton):
    """Limited-memory BFGS, for full batches: a quasi-Newton step for little more than a gradient.

        w <- w - length * H g
        H <- V' H V + rho s s',   V = I - rho y s',   rho = 1 / s'y         for the last `memory` pairs (s, y),
                                          from H = gamma I, gamma = s'y / y'y of the newest pair

    with the length that the line search finds. A pair is kept if `s'y >= 1e-6 |g| |s|^2` (cautious), or is damped
    towards the present model so that `s'y >= 0.2 s'Bs`. Make the whole set one batch (`batch_size=len(x)`): one step of
    `fit` is then one iteration, and the memory goes on over calls of `fit` and through files. Both gradients of a pair
    are of one batch, so mini-batches work too, where they are large; `search=None` with a small `learning_rate` is for
    noisy ones. Costs about one evaluation of loss and gradient per step, one forward pass, two passes over the memory,
    and `2 memory + 2` copies of the weights.

    Reference: Liu and Nocedal (1989); Nocedal and Wright, "Numerical Optimization" (2006), Algorithms 7.4 and 7.5; in
    coordinates of the pairs: Byrd, Nocedal and Schnabel (1994), section 3; cautious pairs: Li and Fukushima (2001);
    damping: Powell (1978), Nocedal and Wright's Procedure 18.2. Differences from the papers: (1) where `-H g` does not
    descend, and after a search that finds no lower point, all pairs are forgotten; (2) the first trial is
    `-g min(1, 1/|g|)`, as in optax (SciPy: `-g / |g|`); (3) inner products of `y` with other pairs are differences of
    those of the two gradients, which each step needs anyway.

    Args:
        learning_rate: Multiple of the step that the search found; with `search=None` the length itself. Defaults to
            `1.0`.
        memory: Number of pairs. Defaults to `10` (SciPy, optax, TensorFlow Probability; PyTorch: 100).
        search: `HagerZhang()`, `StrongWolfe()` or `ArmijoLineSearch()`; `None`: no search. Defaults to `HagerZhang()`,
            which looks at slopes where losses are inexact, as in float32.
        update: `"cautious"`: drop pairs without enough curvature; `"damped"`: mend them. Defaults to `"cautious"`.
        initial_scale: `H` before the first pair, a positive number; `None`: `min(1, 1/|g|)`. Defaults to `None`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `evaluations` (of loss and gradient by the searches, summed over an epoch; a step that begins on another
    batch or at other weights takes one more), `step_length`, `pairs` in memory, `curvature` (`s'y / s's`),
    `gradient_max` (largest entry at the end of the step), `search_end` (1: conditions met; 2: evaluations used up; 3:
    interval as small as rounding; 4: no slope), `resets`, `overflows` (points of a search that were not finite),
    `step_norm`, `skipped_steps`.

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
        """The pairs, one in each row, first all `s`; `S'Y` and `Y'Y`; `gamma`; the products of the last gradient."""
        super().create_state(variables)
        self._memory = add_rows(self, variables, 2 * self.memory, "pairs")
        shape = (self.memory, self.memory)
        self._sy, self._yy = (
            self.add_variable(shape, dtype="float64", name=name, aggregation="none") for name in ("sy", "yy")
        )
        self._gamma = self.add_scalar(1.0, "gamma")
        like = {"dtype": "float64", "name": "products", "aggregation": "none"}
        self._products = [self.add_variable((2 * self.memory,), **like)]

    def kept(self, count: tf.Tensor) -> tf.Tensor:
        """At most `memory`."""
        return tf.minimum(count, self.memory)

    def products(self, gradient: Vector) -> list[tf.Tensor]:
        """`S'g` and `Y'g`, in one tensor."""
        return [tf.cast(row_vectors.coefficients(trees.values(self._memory), gradient), tf.float64)]

    def descent(self, gradient: Vector, products: list[tf.Tensor], count: tf.Tensor, scale: tf.Tensor) -> Vector:
        """`-H g`, one combination of all pairs and the gradient."""
        gamma = tf.where(count > 0, tf.cast(self._gamma.value, tf.float64), scale)
        combined = row_vectors.combine(-self._coefficients(products[0], count, gamma), trees.values(self._memory))
        return trees.add(combined, gradient, -gamma)

    def _coefficients(self, products, count, gamma):
        """The coefficients of all pairs in `H g - gamma g`, `(2 memory,)` in the order of the rows.

        The two-loop recursion in these coordinates. `R` is the upper triangle of `S'Y` of the pairs from old to new,
        `D` its diagonal. The first loop finds `a = R^-1 S'g`, the other `R^-T (D a + gamma (Y'Y a - Y'g))`.
        """
        used = self.kept(count)
        places = tf.range(self.memory)
        order, known = (count - used + places) % self.memory, places < used
        back = (places - (count - used)) % self.memory

        def ordered(matrix):
            matrix = tf.gather(tf.gather(matrix, order), order, axis=1)
            return tf.where(known[:, None] & known[None, :], matrix, tf.zeros_like(matrix))

        sg, yg = (tf.where(known, tf.gather(part, order), 0.0) for part in tf.split(products, 2))
        upper = tf.linalg.band_part(ordered(self._sy.value), 0, -1)
        R = upper + tf.linalg.diag(tf.where(known, tf.zeros((), tf.float64), 1.0))
        a = tf.linalg.triangular_solve(R, sg[:, None], lower=False)
        inner = tf.linalg.diag_part(upper)[:, None] * a + gamma * (tf.matmul(ordered(self._yy.value), a) - yg[:, None])
        b = tf.linalg.triangular_solve(R, inner, lower=False, adjoint=True)
        return tf.concat([tf.gather(b[:, 0], back), tf.gather(-gamma * a[:, 0], back)], 0)

    def learn(self, pair: Pair, products: list[tf.Tensor], count: tf.Tensor, scale: tf.Tensor) -> list[tf.Tensor]:
        """Put the pair in the place of the oldest; `y` has the products of the gradients that it is a difference of."""
        slot, (end,) = count % self.memory, self.products(pair.gradient)
        here = tf.range(self.memory) == slot
        with_y = pair.of_end * end + pair.of_begin * products[0]
        sy, yy = tf.split(with_y, 2)
        sy, yy = tf.where(here, pair.sy, sy), tf.where(here, pair.yy, yy)
        across, down = pair.learns & here[None, :], pair.learns & here[:, None]
        with tf.control_dependencies([end]):  # TensorFlow copies the whole memory if it writes while a product reads
            learns = tf.identity(pair.learns)
        self.remember(Rows(self._memory, [slot, self.memory + slot], learns), [pair.s, pair.y])
        self.remember(self._sy, tf.where(across, sy[:, None], self._sy.value))
        self.remember(self._yy, tf.where(across, yy[:, None], tf.where(down, yy[None, :], self._yy.value)))
        gamma = tf.cast(pair.sy / tf.where(pair.learns, pair.yy, 1.0), self._gamma.dtype)
        self.remember(self._gamma, tf.where(pair.learns, gamma, self._gamma.value))
        own = tf.stack([pair.sg, tf.cast(trees.dot(pair.y, pair.gradient), tf.float64)])
        return [tf.where(pair.learns & tf.tile(here, [2]), tf.repeat(own, self.memory), end)]
