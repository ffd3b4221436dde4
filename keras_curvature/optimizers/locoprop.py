"""LocoProp: some steps on a loss of each layer by itself, for one backward pass."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_choice, check_count, check_number, register
from keras_curvature.linearization.estimates.inputs import input_second_moments
from keras_curvature.linearization.estimates.local_losses import inputs_of_examples, matches, matching_changes
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators.kronecker import from_left
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.by_layer import warn_of
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.typing import LearningRate, Variables, Vector

LEAST = 0.25  # share of the learning rate that is left of it in the last local steps (the authors)


@register
class LocoProp(CurvatureOptimizer):
    """LocoProp: in each step, some steps of RMSProp on a local loss of each layer, with its inputs and targets held.

        l(W) = 1/2 |W' a - (z - gamma dL/dz)|^2               "squared" (LocoProp-S), z = W' a before the step
        l(W) = F(W' a) - (f(z) - gamma dL/dz)' W' a           "matching" (LocoProp-M), F' = f the layer's activation
        for k = 0 ... steps - 1:
            g <- gradient of the mean of l / gamma            dL/dW at the first one
            v <- beta v + (1 - beta) g^2
            m <- momentum m + max(1 - k / steps, 1/4) g / sqrt(v + epsilon)
            W <- W - learning_rate m

    with `a` the inputs of the layer and a 1. The step reuses one backward pass: the layers share nothing but their
    targets. With many steps, the squared loss ends where `FOOF` without damping ends, with `gamma` for a learning rate.
    Layers without an increasing activation, or with a bias that is no row of `W` (a frozen one), have the squared loss;
    softmax of a `Dense` layer has its matching loss. Weights without Kronecker factors have a linear loss, of slope
    `dL/dW`, and a warning names them.

    Reference: Amid, Anil and Warmuth, "LocoProp: Enhancing backprop via local loss optimization" (2022), Algorithm 1,
    and `locoprop_training.ipynb` of github.com/google-research/google-research. Differences from that code: (1) `gamma`
    multiplies the slope of the loss of an example; there that of the mean of 1000, so that its 10 is 0.01 here; (2)
    gradients are divided by `gamma`, so that `epsilon=1e-5` there is `1e-7` here; (3) `m` has no learning rate in it,
    and `v` begins at 0; there at 1.

    Args:
        learning_rate: Of the local steps. Defaults to `1e-4` (the authors: `1e-5`, beside their momentum of 0.999).
        gamma: Step of the targets along the slopes, positive. Defaults to `0.1` (the authors: 0.01).
        steps: Local steps in each step. Defaults to `10` (the authors).
        loss: `"matching"` or `"squared"`. The matching loss keeps the inputs of each layer for all examples, of
            convolutions all patches, and multiplies them twice in each local step. The squared loss needs their second
            moment alone. Defaults to `"matching"` (the authors' code).
        momentum: Factor on the old `m`, in [0, 1). Defaults to `0.99` (the authors: 0.999).
        beta: Decay of `v`, in [0, 1). Defaults to `0.9` (the authors).
        epsilon: Positive. Defaults to `1e-7` (the authors).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.LocoProp(), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs(layers=True)
    reports = {"step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 1e-4, gamma: float = 0.1, steps: int = 10,
        loss: Literal["matching", "squared"] = "matching", momentum: float = 0.99, beta: float = 0.9,
        epsilon: float = 1e-7, name: str = "locoprop", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.gamma, self.steps, self.loss = gamma, steps, loss
        self.momentum, self.beta, self.epsilon = momentum, beta, epsilon
        check_number(self, "gamma", gamma, low=0, open_low=True)
        check_count(self, "steps", steps)
        check_choice(self, "loss", loss, ("matching", "squared"))
        for argument in ("momentum", "beta"):
            check_number(self, argument, getattr(self, argument), low=0, high=1, open_high=True)
        check_number(self, "epsilon", epsilon, low=0, open_low=True)

    def create_state(self, variables: Variables) -> None:
        """The two averages of RMSProp."""
        self._blocks, others, _ = kronecker.blocks(self.trained_model())
        warn_of(self, self.trained_model(), others, "a linear local loss")
        self._m = self.add_optimizer_variables(variables, "m")
        self._v = self.add_optimizer_variables(variables, "v")
        self._matching = [b for b in self._blocks if self.loss == "matching" and matches(b)]
        self._squared = [b for b in self._blocks if b not in self._matching]

    def direction(self, lin: Linearization) -> Vector:
        """`(W after the last local step - W) / learning_rate`."""
        g, change = lin.gradient, self._change_of_gradient(lin)

        def local_step(k, moved, m, v):
            now = trees.add(g, change(moved))
            v = [self.beta * old + (1.0 - self.beta) * tf.square(new) for old, new in zip(v, now)]
            share = tf.maximum(1.0 - tf.cast(k, tf.float64) / self.steps, LEAST)
            m = [
                self.momentum * old + tf.cast(share, new.dtype) * new * tf.math.rsqrt(square + self.epsilon)
                for old, new, square in zip(m, now, v)
            ]
            return k + 1, trees.subtract(moved, m), m, v

        begin = (tf.constant(0), trees.zeros_like(g), trees.values(self._m), trees.values(self._v))
        _, moved, m, v = tf.while_loop(lambda k, *_: k < self.steps, local_step, begin, maximum_iterations=self.steps)
        self.remember(self._m, m)
        self.remember(self._v, v)
        return moved

    def _change_of_gradient(self, lin):
        """A function of `(W' - W) / learning_rate` that gives the change of the local gradients, both vectors."""
        moments = input_second_moments(lin, self._squared) if self._squared else []
        inputs = inputs_of_examples(lin, self._matching) if self._matching else []
        weights = [tf.cast(block.matrix(lin.weights), block.dtype) for block in self._matching]
        rate, examples = tf.convert_to_tensor(self.learning_rate), lin.examples

        def change(moved):
            moved = trees.scale(rate / self.gamma, moved)
            found = trees.zeros_like(moved)
            for block, A in zip(self._squared, moments):
                block.scatter(from_left(A, block.matrix(moved)), found)
            moves = [self.gamma * block.matrix(moved) for block in self._matching]
            changes = matching_changes(self._matching, inputs, weights, moves, examples) if self._matching else []
            for block, C in zip(self._matching, changes):
                block.scatter(C / self.gamma, found)
            return found

        return change

    def linear_step(self) -> NotLinear:
        """`NotLinear`: the length of a step is RMSProp's."""
        return NotLinear("`LocoProp` divides gradients by their size: no limit on the curvature is known.")
