"""FOOF: gradient descent on the outputs of each layer."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.operators import Function
from keras_curvature.optimizers.by_inputs import ByInputs
from keras_curvature.optimizers.by_layer import warn_of
from keras_curvature.optimizers.clipping import clip_note, clipped, set_clip
from keras_curvature.optimizers.limits import LinearStep, heavy_ball
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class FOOF(ByInputs):
    """FOOF: the step of the weights that moves the outputs of each layer along their own negative gradient.

        A <- eps A_old + (1 - eps) mean_n sum_t a_nt a_nt'        a: inputs of the layer and a 1, at its positions t
        M <- momentum M + dL/dW
        w <- w - learning_rate nu d,    d = (A + damping I)^-1 M                   eps = min(1 - 1/t, 0.95)
        nu = min(1, sqrt(output_clip / (learning_rate^2 d'M)))

    Without damping and momentum, `-(A^-1 dL/dW)' a_nt` is the least-squares fit of a linear map of the inputs to the
    negative gradients in the outputs of the single examples. It is K-FAC without its factor of the slopes, and takes
    no backward pass but that of the gradient. Weights without Kronecker factors step as weights with an input of 1 do,
    by `M / (1 + damping)`, and a warning names them.

    Reference: Benzing, "Gradient descent on neurons and its link to approximate second-order optimization" (2022),
    section 4, and github.com/freedbee/Neuron_Descent_and_KFAC. Differences from that code: (1) `A` is a mean over the
    examples; there it is a mean for convolutions and a sum for dense layers, so that `damping=100` with batches of 100
    is 1 here, and a learning rate of 30 is 0.3; (2) biases are a row of the matrix; there they keep their initial
    values; (3) `A` is averaged over every `factors_every`-th batch; (4) `output_clip`, which the code does not have:
    `learning_rate^2 d'M` is, up to the damping, the mean square by which a step moves the outputs of the layers,
    summed over all of them. `output_clip=None` is the method without it.

    Args:
        learning_rate: Defaults to `0.1` (the code: 0.3), with which three small networks on digits ended at a lower
            loss than with Adam. If the loss is a mean over many outputs, as of an autoencoder, its slopes are small:
            choose more.
        damping: Added to `A`, which has the scale of squared inputs; not negative. Defaults to `1.0` (the code, with
            batches of 100).
        momentum: Factor on the old `M`, in [0, 1). Defaults to `0.9` (the code: 0).
        output_clip: Largest `learning_rate^2 d'M`, a positive number, or `None` for no limit. Defaults to `0.1`, which
            changed nothing on a small dense and a small convolutional network. On MobileNetV2 with batches of 8 the
            loss, 1.9 at first, rose to 3.4 with this limit and to 21 without (to 5.5 at a learning rate of 0.01).
        factors_every: Steps between two updates of `A`. Defaults to `10` (as in `KFAC`).
        inverses_every: Steps between two inversions; the replicas share the work. Defaults to `100` (the code).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `output_clip` (`nu`), `failed_refreshes` (factors and inverses that were not finite; the old ones are
        kept), `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.FOOF(), loss="sparse_categorical_crossentropy")
    ```
    """

    reports = {"output_clip": "mean", "failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.1, damping: float = 1.0, momentum: float = 0.9, factors_every: int = 10,
        inverses_every: int = 100, output_clip: float | None = 0.1, name: str = "foof", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.momentum = damping, momentum
        set_clip(self, "output_clip", output_clip)
        self.factors_every, self.inverses_every = factors_every, inverses_every
        check_number(self, "damping", damping, low=0)
        check_number(self, "momentum", momentum, low=0, high=1, open_high=True)
        check_count(self, "factors_every", factors_every)
        check_count(self, "inverses_every", inverses_every)

    def create_state(self, variables: Variables) -> None:
        """The sum of gradients, the second moments of the inputs and their inverses."""
        blocks, self._others, _ = kronecker.blocks(self.trained_model())
        warn_of(self, self.trained_model(), self._others, "the gradient divided by `1 + damping`")
        self._velocity = self.add_optimizer_variables(variables, "velocity")
        self.create_moments_of_inputs(blocks)

    def direction(self, lin: Linearization) -> Vector:
        """`-nu (A + damping I)^-1 M`."""
        M = trees.add(lin.gradient, trees.values(self._velocity), self.momentum)
        self.remember(self._velocity, M)
        inverses = self.inverses_of_inputs(
            lin, self.factors_every, self.inverses_every, lambda mean: tf.fill(tf.shape(mean), self._like(mean))
        )
        return trees.negative(clipped(self, "output_clip", self._preconditioned(M, inverses), M))

    def linear_step(self) -> LinearStep:
        """Heavy ball, times the inverses of the last step."""
        return LinearStep(heavy_ball(self.momentum), self._preconditioner, clip_note(self, "output_clip"))

    def _preconditioner(self):
        inverses = self.kept_inverses()
        return Function(lambda vector: self._preconditioned(vector, inverses), psd=True)

    def _like(self, mean):
        return trees.exactly(float(self.damping), mean.dtype)

    def _preconditioned(self, vector, inverses):
        found = self.divided(vector, inverses)
        for i in self._others:
            found[i] = vector[i] / (1.0 + self.damping)
        return found
