"""SENG: the natural gradient of each layer, from gradients of examples and sketches of them."""

import math
from typing import Any

import numpy as np
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.jacobian import by_layers, sketches
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.by_layer import warn_of
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.typing import LearningRate, Variables, Vector

ROUNDING = 4.0  # roundings of the trace of `U U'` that the damping is at least


@register
class SENG(CurvatureOptimizer):
    """SENG: each layer's gradient divided by the empirical Fisher matrix of the batch, solved by its rows.

    The length of a step is inversely proportional to the scale of the loss: scale regression targets to a variance
    near 1.

        d = -(U'U + lambda I)^-1 g = -(g - U' b) / lambda       U: a row for each example, F = U'U the block of a layer
        b = argmin_b |W (U' b - g)|^2 + lambda |b|^2            W a sketch, or the identity
        v <- momentum v + d,    w <- w + learning_rate v

    The matrix of a layer is not approximated by factors, as `KFAC` does, and the rows are not formed: `U U'`, of the
    size of the batch, comes from the inputs and slopes of the layer. Only layers with more than `largest` weights are
    sketched: their rows have at most the rank `rank`, and `W` takes at most `columns` rows and columns of the layer's
    matrix. Weights without Kronecker factors step by `g / (1 + lambda)`, and a warning names them. A step takes one
    backward pass besides the gradient, and keeps nothing but the momentum.

    Reference: Yang, Xu, Wen, Chen and Xu, "Sketch-based empirical natural gradient methods for deep learning" (2022),
    sections 2 and 3, and the authors' code, github.com/yangorwell/SENG. 20 steps in float64 equal those of the code to
    1e-14 with dense, convolutional and batch normalization layers, if the code refreshes its matrices in each step; for
    sketched layers also with differences 6 to 8 undone. Differences: (1) rows are those of each batch. The authors keep
    those of one batch for 200 to 1000 steps, which takes memory for as many copies of the weights as the batch has
    examples, and on CIFAR take them from batches of 256 alone; (2) `W` has the same rows and columns of the matrix for
    all examples, as in the code, drawn anew in each step without replacement; (3) positions that share weights are
    summed in each example's row, as in the code, also in embeddings and in every normalization layer (the code: batch
    normalization alone); (4) replicas gather what `U U'` is made of, for each example the sketch, or the inputs and
    slopes of the layer, or its row where that is smaller, and sum `U' b`; (5) regularizers enter the gradient
    alone; (6) `U' b` of a sketched layer is the sum over its examples: the code replaces it by a product of two
    such sums, which made a first step 4 times as long; (7) samples are multiplied by the root of the inverse of
    their share, so that `W'W` is the identity in the mean: the code multiplies by the inverse; (8) the low rank is
    that of each example's gradient: the code projects on singular vectors of its slopes; (9) the code also samples
    entries of the rows of smaller layers, above `columns^2` weights; (10) weight decay is Keras': before the step,
    not part of `v`; (11) the damping is at least four roundings of the trace of `U U'`: with less, as with float32
    and targets of size 1e5, that matrix has no Cholesky decomposition, and no step was taken.

    Args:
        learning_rate: Multiple of `v`. Defaults to `0.05` (the authors' recipe for CIFAR-10).
        damping: `lambda`, on the scale of the loss, positive. Less makes longer steps. Defaults to `0.5` (that recipe:
            2.0). With 2.0 it had 0.88 of Adam's reduction of the loss in 150 steps on a small LSTM with batches of 32,
            with 0.5 1.87, and about as much on other networks (`tuning` data of `examples/benchmarks/defaults.py`).
        momentum: Factor on the old `v`, in [0, 1). Defaults to `0.9`.
        rank: Rank of the rows of a sketched layer, for layers with more positions. Defaults to `16` (the authors).
        columns: Rows and columns of a sketched layer that `W` takes. Defaults to `256` (the authors).
        largest: Most weights of a layer without a sketch; `None` for no sketches. Defaults to `1_000_000` (the
            authors).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.SENG(), loss="sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=128)
    ```
    """

    needs = Needs(layers=True)
    reports = {"step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.05, damping: float = 0.5, momentum: float = 0.9, rank: int = 16,
        columns: int = 256, largest: int | None = 1_000_000, name: str = "seng", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.momentum = damping, momentum
        self.rank, self.columns, self.largest = rank, columns, largest
        check_number(self, "damping", damping, low=0, open_low=True)
        check_number(self, "momentum", momentum, low=0, high=1, open_high=True)
        check_count(self, "rank", rank)
        check_count(self, "columns", columns)
        check_count(self, "largest", largest, low=0, or_none=True)

    def create_state(self, variables: Variables) -> None:
        """The momentum."""
        self._blocks, self._others, _ = kronecker.blocks(self.trained_model())
        warn_of(self, self.trained_model(), self._others, "the gradient divided by `1 + damping`")
        self._velocity = self.add_optimizer_variables(variables, "velocity")

    def direction(self, lin: Linearization) -> Vector:
        """The momentum with the natural gradient of each layer."""
        d = [tf.zeros(g.shape, trees.wide(g.dtype)) for g in lin.gradient]
        ranks = [self.rank if self._is_sketched(block) else None for block in self._blocks]
        layers = sketches.layers_of(lin, self._blocks, ranks)
        gradients = [layer.block.matrix(lin.gradient) for layer in layers]
        solved = [self._coefficients(layer, g) for layer, g in zip(layers, gradients)]
        parts = sketches.transposed(layers, [b for b, _ in solved])
        for layer, g, part, (_, damping) in zip(layers, gradients, parts, solved):
            layer.block.scatter(-((tf.cast(g, part.dtype) - part) / damping), d)
        for i in self._others:
            d[i] = -lin.gradient[i] / (1.0 + self.damping)
        v = trees.add(d, trees.values(self._velocity), self.momentum)
        self.remember(self._velocity, v)
        return v

    def linear_step(self) -> NotLinear:
        """`NotLinear`: the method keeps no preconditioner."""
        return NotLinear(
            "`SENG` divides each gradient by the Fisher matrix of its own batch and keeps no preconditioner: no limit "
            "on the curvature is known."
        )

    def _is_sketched(self, block):
        return self.largest is not None and math.prod(block.shape) > self.largest

    def _coefficients(self, layer, g):
        """`(b, lambda)`, `(examples, 1)` and a scalar, for the gradient as the matrix of the layer."""
        sketched = self._is_sketched(layer.block)
        sample = sketches.Sample.drawn(layer, self.columns, self.iterations) if sketched else None
        seen = sketches.gathered(layer, sample)
        g = tf.cast(g, seen.d.dtype)
        right = by_layers.times(seen, g if sample is None else sample.of_matrix(g))  # (examples, 1)
        gram = by_layers.gram(seen)[:, 0, :, 0]
        damping = trees.exactly(float(self.damping), gram.dtype)
        damping = tf.maximum(damping, ROUNDING * np.finfo(gram.dtype.as_numpy_dtype).eps * tf.linalg.trace(gram))
        damped = tf.linalg.set_diag(gram, tf.linalg.diag_part(gram) + damping)
        return tf.linalg.cholesky_solve(tf.linalg.cholesky(damped), right), damping
