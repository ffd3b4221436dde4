"""Eva: K-FAC with vectors instead of matrices."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_number, register
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Function
from keras_curvature.operators.kronecker import BlockDiagonal
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.by_layer import pairs, warn_of
from keras_curvature.optimizers.clipping import clip_note
from keras_curvature.optimizers.limits import LinearStep, heavy_ball
from keras_curvature.solvers import direct
from keras_curvature.steps.trust_region import kl_clip as clip
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class Eva(CurvatureOptimizer):
    """Eva: the gradient of each layer, divided by the outer product of the mean input and the mean slope.

        a <- beta a_old + (1 - beta) mean of the layer's inputs and a 1,    b likewise, of the slopes in its outputs
        d = (ab' (ab')' + lambda I)^-1 dL/dW = (dL/dW - (a' dL/dW b) / (lambda + |a|^2 |b|^2) ab') / lambda
        v <- momentum v - min(1, sqrt(kl_clip / (learning_rate^2 d'g))) d,    w <- w + learning_rate v

    by Sherman and Morrison: no matrix is kept, and none is inverted. Costs little more than the gradient. Weights
    without Kronecker factors get `d = g`, the step of SGD, and a warning names them. They do not enter `d'g` and are
    not clipped, as in the authors' code: without curvature a length in its metric has no meaning.

    Reference: Zhang, Shi and Li, "Eva: practical second-order optimization with Kronecker-vectorized approximation"
    (2023), section 3, and the authors' code. Differences from the code: (1) `b` averages the slopes of per-example
    losses, as in the paper; in the code they are slopes of the mean loss, so `b` is N times smaller for N examples; (2)
    the means are over the whole batch of all replicas, not over the first 16 examples of each.

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `0.01` (the authors, with their `b`: 0.1).
        damping: `lambda`, positive. Defaults to `0.1` (the authors: 0.03).
        momentum: Factor on the last step. Defaults to `0.9`.
        beta: Decay of the averages of the vectors, in [0, 1). Defaults to `0.05`.
        kl_clip: Largest `learning_rate^2 d'g`, or `None`. It acts only if `d'g > kl_clip / learning_rate^2`, 10 by
            default. Defaults to `1e-3`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `kl_clip` (the multiple of `d`), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.Eva(), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs(layers=True)
    reports = {"kl_clip": "mean", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.01, damping: float = 0.1, momentum: float = 0.9, beta: float = 0.05,
        kl_clip: float | None = 1e-3, name: str = "eva", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.momentum, self.beta, self.kl_clip = damping, momentum, beta, kl_clip
        check_number(self, "damping", damping, low=0, open_low=True)
        check_number(self, "momentum", momentum, low=0, high=1, open_high=True)
        check_number(self, "beta", beta, low=0, high=1, open_high=True)
        check_number(self, "kl_clip", kl_clip, low=0, open_low=True, or_none=True)

    def create_state(self, variables: Variables) -> None:
        """The last step, and two vectors for each layer."""
        self._blocks, self._others, _ = kronecker.blocks(self.trained_model())
        warn_of(self, self.trained_model(), self._others, "the gradient as it is")
        self._velocity = self.add_optimizer_variables(variables, "velocity")
        self._vectors = [
            self.add_variable((*groups, d), initializer="zeros", dtype=variables[block.variables[0]].dtype,
                              name=f"{letter}_{i}", aggregation="none")
            for i, block in enumerate(self._blocks)
            for *groups, d, letter in ((*block.shape[:-1], "a"), (*block.shape[:-2], block.shape[-1], "b"))
        ]  # fmt: skip

    def direction(self, lin: Linearization) -> Vector:
        """The next `v`."""
        vectors = self._averaged(lin.kronecker_means(self._blocks))
        g = lin.gradient
        natural = self._operator(vectors) @ g
        step = [self.momentum * v - d for v, d in zip(self._velocity, self._clipped(natural, g))]
        self.remember(self._velocity, step)
        self.remember(self._vectors, vectors)
        return step

    def linear_step(self) -> LinearStep:
        """Heavy ball, times the inverse of the last step."""
        note = clip_note(self, "kl_clip")
        return LinearStep(heavy_ball(self.momentum), lambda: self._operator(trees.values(self._vectors)), note)

    def _operator(self, vectors):
        operators = [self._inverse(a, b) for a, b in pairs(vectors)]
        others = {i: self.trained[i] for i in self._others}
        ones = {i: tf.ones(tuple(v.shape), trees.wide(v.dtype)) for i, v in others.items()}
        return BlockDiagonal(self._blocks, operators, ones)

    def _averaged(self, means):
        """`[a, b, a, b, ...]`; the first ones as they are."""
        kept = tf.where(self.iterations == 0, tf.constant(0.0, tf.float64), tf.constant(self.beta, tf.float64))
        new = [vector for pair in means for vector in pair]
        return [
            tf.cast(kept, n.dtype) * tf.cast(old, n.dtype) + tf.cast(1.0 - kept, n.dtype) * n
            for old, n in zip(self._vectors, new)
        ]

    def _inverse(self, a, b):
        return Function(lambda matrices: [direct.solve_rank_one(a, b, self.damping, matrices[0])], psd=True)

    def _clipped(self, natural, g):
        """The directions of the layers, cut to the length that is allowed to all of them; the others as they are."""
        own = [i for i in range(len(g)) if i not in self._others]
        if self.kl_clip is None or not own:
            self.report(kl_clip=1.0)
            return natural
        nu = clip(self.kl_clip, self.learning_rate, trees.dot([natural[i] for i in own], [g[i] for i in own]))
        self.report(kl_clip=nu)
        return [d if i in self._others else tf.cast(nu, d.dtype) * d for i, d in enumerate(natural)]
