"""Saddle-free Newton: absolute eigenvalues in a Krylov space."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_count, register
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers.krylov_space import krylov_space
from keras_curvature.typing import LearningRate, Vector


@register
class SaddleFreeNewton(CurvatureOptimizer):
    """Saddle-free Newton: repelled from saddles, by the absolute eigenvalues of the Hessian in a Krylov space.

        V = orthonormal basis of  g, H g, H^2 g, ...  (`rank` vectors, Lanczos),    V'H V = U diag(l) U'
        p = -V U (|l| + lambda)^-1 U'V'g,        lambda: one of `dampings` times max |l|, where the loss is lowest
        w <- w + learning_rate * p   if that loss is lower than before, else the weights stay

    Newton's step goes to the nearest point without slope, also if that is a saddle; with absolute eigenvalues the step
    along a direction of negative curvature goes downhill. The gradient is in the space, so nothing of it is left out.
    Costs `rank` Hessian products (each about two gradients), an evaluation of the loss for each damping, and `rank`
    copies of the weights within a step; no state.

    Reference: Dauphin et al., "Identifying and attacking the saddle point problem in high-dimensional non-convex
    optimization" (2014), Algorithm 1. Differences from the paper: (1) Krylov vectors of the same batch as the gradient;
    (2) dampings relative to the largest eigenvalue, so that the scale of the loss does not matter and the largest of
    them is always a short step; (3) a step that does not lower the loss is not taken.

    Args:
        learning_rate: Multiple of the accepted step. Defaults to `1.0`.
        rank: Number of Krylov vectors. Defaults to `20` (the paper: 500 on networks of some thousand weights).
        dampings: Multiples of the largest absolute Ritz value to try, positive numbers; each costs an evaluation of the
            loss. Defaults to `(100.0, 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-5)`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `damping`, `lowest` (smallest Ritz value), `krylov_vectors`, `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.SaddleFreeNewton(rank=50), loss="mse")
    model.fit(x, y, batch_size=len(x), epochs=50)
    ```
    """

    needs = Needs(hessian=True)
    reports = {
        "damping": "last", "lowest": "last", "krylov_vectors": "mean", "step_norm": "mean", "skipped_steps": "sum",
    }  # fmt: skip

    def __init__(
        self, learning_rate: LearningRate = 1.0, rank: int = 20,
        dampings: tuple[float, ...] = (100.0, 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-5), name: str = "saddle_free_newton",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.rank, self.dampings = rank, list(dampings) if isinstance(dampings, tuple) else dampings
        check_count(self, "rank", rank)
        positive = isinstance(self.dampings, list) and all(isinstance(d, (int, float)) and d > 0 for d in self.dampings)
        check(self, "dampings", dampings, positive and len(self.dampings) > 0, "a tuple of positive numbers")

    def direction(self, lin: Linearization) -> Vector:
        """The best of the steps, if it lowers the loss."""
        g = lin.gradient
        space = krylov_space(lin.hessian(), g, self.rank)
        values, vectors = tf.linalg.eigh(tf.where(space.finite, space.matrix, tf.zeros_like(space.matrix)))
        # the first vector of the basis is g / |g|; rows beyond the space have no part of it
        slopes = tf.cast(trees.norm(g), tf.float64) * vectors[0]

        def step(damping):
            return space.combine(-tf.linalg.matvec(vectors, slopes / (tf.abs(values) + damping)))

        largest = tf.reduce_max(tf.abs(values))
        # without any curvature the gradient is the step
        grid = tf.constant(self.dampings, tf.float64) * tf.where(largest > 0, largest, tf.ones_like(largest))
        losses = tf.map_fn(
            lambda damping: lin.loss_at(step(damping)), grid, fn_output_signature=lin.loss.dtype, parallel_iterations=1
        )
        losses = tf.where(tf.math.is_finite(losses), losses, losses.dtype.max)
        best = tf.argmin(losses)
        self.reject(tf.logical_not(losses[best] <= lin.loss))
        used = tf.range(space.matrix.shape[0]) < space.count
        inside = tf.reduce_sum(tf.where(used[:, None], vectors**2, 0.0), 0) > 0.5
        self.report(
            damping=grid[best], lowest=tf.reduce_min(tf.where(inside, values, values.dtype.max)),
            krylov_vectors=space.count,
        )  # fmt: skip
        # an overflowed product skips the step
        return trees.nan_unless(space.finite, step(grid[best]))

    def linear_step(self) -> NotLinear:
        """None: each step is tested on the loss."""
        return NotLinear(
            "`SaddleFreeNewton` divides by the curvature of each batch and tests the step on the loss: it takes "
            "curvature into account, however large."
        )
