"""Scion: steps to the corner of a norm ball, with a norm for each kind of weight."""

import math
from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_component, check_flag, check_number, register
from keras_curvature.linearization.layers.ends import EMBEDDINGS
from keras_curvature.optimizers.hidden import SIGN, HiddenMatrices
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers.matrix_sign import MatrixSign
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class Scion(HiddenMatrices):
    """Scion: momentum, and the step that descends it most in the unit ball of the norm that suits the weight.

        M <- momentum M + (1 - momentum) G,    w <- w - learning_rate radius u(M)
        constrained:                           w <- (1 - learning_rate) w - learning_rate radius u(M)

        u(M) = sqrt(out / in) sign(M)              hidden matrices: the norm from the mean square of inputs to outputs
        u(M) = sqrt(out / in) sign(M) / positions  convolutions, whose inputs are those of one position
        u(M) = sign of each entry / width          embeddings and output layers; width: of the layer beside them
        u(M) = M / sqrt(mean(M^2))                 vectors

    where `sign(U S V') = U V'` for matrices. No second moment: one copy of the weights. `Muon` says how hidden matrices
    and both ends of the model are told apart; a model of several outputs has to be curved.

    Reference: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls and Cevher, "Training deep learning models with
    norm-constrained LMOs" (2025), Algorithms 1 and 2, and the authors' code. Differences: (1) four quintic steps of
    Newton-Schulz (there: five of Jordan's); (2) a convolution is one matrix of all its positions; (3) the weights keep
    Keras' initial values; there they begin on the sphere of the radius.

    Args:
        learning_rate: With `constrained`, the share of the weights that each step replaces. Defaults to `2**-12` (the
            authors, for a language model).
        momentum: Decay of the average of gradients. Defaults to `0.9` (the authors, who write `0.1`).
        radius: Factor on `u` for hidden matrices, convolutions and vectors. Defaults to `50` (the authors).
        radius_of_ends: Factor on `u` for embeddings and output layers. Defaults to `3000` (the authors).
        constrained: Whether steps also shrink the weights, which keeps them in the balls. Defaults to `False`.
        sign: `NewtonSchulz` or `PolarExpress`. Defaults to `NewtonSchulz("quintic", steps=4, bound="gram")`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.Scion(), loss="mse")
    ```
    """

    reports = {"step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 2**-12, momentum: float = 0.9, radius: float = 50.0,
        radius_of_ends: float = 3000.0, constrained: bool = False, sign: MatrixSign = SIGN, name: str = "scion",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        check_number(self, "momentum", momentum, low=0, high=1, open_high=True)
        for argument, value in (("radius", radius), ("radius_of_ends", radius_of_ends)):
            check_number(self, argument, value, low=0, open_low=True)
        check_flag(self, "constrained", constrained)
        check_component(self, "sign", sign, "sign", "NewtonSchulz()")
        self.momentum, self.radius, self.radius_of_ends = momentum, radius, radius_of_ends
        self.constrained, self.sign = constrained, sign

    def create_state(self, variables: Variables) -> None:
        """The momentum."""
        self.create_tiles(variables, merge=1, vectors=False)
        self._m = self.add_moments("m")

    def precondition(self, gradients: Vector) -> Vector:
        """The negative corner of each ball; with `constrained`, relative to the weights."""
        variables, M = self.trained, self.average(self._m, self.split(gradients), self.momentum)
        self.taken()
        self.remember(self._m, M)
        corners = self._corners(M, [v for v in variables if 0 not in v.shape], self.ends(variables))
        if self.constrained:
            corners = trees.add(corners, self.split(trees.values(variables)))
        return self.join(trees.negative(corners), gradients)

    def _corners(self, tiles, variables, at_ends):
        """`radius u(M)` of each tile."""
        self.choose_hidden(variables, at_ends)
        found, end = [None] * len(tiles), {id(v) for v in at_ends}
        for i, u, X in zip(self._hidden, self._unfoldings, self.signs([tiles[i] for i in self._hidden], self.sign)):
            rows, columns = u.size
            positions = math.prod(u.shape[:-2]) if len(u.shape) > 3 else 1
            found[i] = u.tensor(self.radius * math.sqrt(columns * positions / rows) / positions * X)
        for i, (tile, v) in enumerate(zip(tiles, variables)):
            if id(v) in end:
                width = v.shape[-1] if v.name == EMBEDDINGS else math.prod(v.shape[:-1])
                found[i] = self.radius_of_ends / width * tf.sign(tile)
            elif found[i] is None:
                size = tf.reduce_max(tf.abs(tile))
                unit = tf.math.divide_no_nan(tile, size)
                found[i] = self.radius * tf.math.divide_no_nan(unit, tf.sqrt(tf.reduce_mean(unit * unit)))
        return found

    def linear_step(self) -> NotLinear:
        """No known limit."""
        return NotLinear("The steps of `Scion` have a length of their own: no limit on the curvature is known.")
