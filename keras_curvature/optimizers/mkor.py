"""MKOR: K-FAC's inverses, each changed by one vector now and then."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.estimates.factors import kronecker_means_alone
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators.kronecker import from_left, times
from keras_curvature.optimizers import by_layer
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.clipping import clipped, set_clip
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers import direct
from keras_curvature.typing import LearningRate, Variables, Vector


@register
class MKOR(CurvatureOptimizer):
    """MKOR: the direction of K-FAC, with inverses of rank-one updates, and the length of the gradient, layer by layer.

        a, b: means of the layer's inputs and a 1, and of the slopes in its outputs
        J <- beta J + (1 - beta) I,   J_a <- (J_a^-1 + a a')^-1,   J_g <- (J_g^-1 + b b')^-1         every so many steps
        d = J_a dL/dW J_g,    d <- d |dL/dW| / |d|
        v <- momentum v - min(1, sqrt(kl_clip / (learning_rate^2 d'g))) d,    w <- w + learning_rate v

    by Sherman and Morrison: no matrix is inverted, and a change costs one product with a vector. `J` begins at `I` and
    stays positive definite and at most `I`, so there is no damping. As in `Eva`, the factors are made of means, but the
    inverses remember earlier ones. `|d|` is the norm of the kernel's part plus that of the bias's part. Weights without
    Kronecker factors get `d = dL/dW`, the step of SGD, and a warning names them.

    Reference: Mozaffari, Li, Zhang and Mehri Dehnavi, "MKOR: Momentum-enabled Kronecker-factor-based optimizer using
    rank-1 updates" (2023), Algorithm 1, and github.com/Mohammad-Mozaffari/mkor. Differences from that code, whose
    update of the inverses (without the factors of `beta` in the paper's) this is: (1) the first means count; there they
    are passed over; (2) inputs and slopes are not clipped at 100; (3) no factor is reset because an entry exceeds 2:
    none does here; (4) the state is in float32 at least; (5) the factor of an embedding's inputs is the identity; (6)
    tokens count as pixels do: `b` is a mean over them; (7) `kl_clip`; without it pixels from 0 to 255 diverge.

    Args:
        learning_rate: Multiple of `v` that is taken, of the size that SGD has. Defaults to `0.03`; a small network
            with batch normalization diverged at 0.1.
        momentum: Factor on the last step, in [0, 1). Defaults to `0.9` (the authors).
        beta: Factor on the old inverses, in [0, 1). Defaults to `0.95` (the authors).
        every: Steps between two changes of the inverses. Defaults to `10` (the authors).
        kl_clip: Largest `learning_rate^2 d'g`, with `g` the gradient; a positive number, or `None` for no limit. At the
            default learning rate it acts if `d'g > 11`, as in `KFAC`. Defaults to `1e-2`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `kl_clip` (the multiple of `d`), `failed_refreshes` (inverses that were not finite; the old ones are kept),
        `step_norm`, `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.MKOR(), loss="sparse_categorical_crossentropy")
    ```
    """

    needs = Needs(layers=True)
    reports = {"kl_clip": "mean", "failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.03, momentum: float = 0.9, beta: float = 0.95, every: int = 10,
        kl_clip: float | None = 1e-2, name: str = "mkor", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.momentum, self.beta, self.every = momentum, beta, every
        for argument, factor in (("momentum", momentum), ("beta", beta)):
            check_number(self, argument, factor, low=0, high=1, open_high=True)
        check_count(self, "every", every)
        set_clip(self, "kl_clip", kl_clip)

    def create_state(self, variables: Variables) -> None:
        """The last step, and the two inverses of each layer."""
        self._blocks, others, _ = kronecker.blocks(self.trained_model())
        by_layer.warn_of(self, self.trained_model(), others, "the gradient as it is")
        self._velocity = self.add_optimizer_variables(variables, "velocity")
        self._inverses = by_layer.create_factors(self, self._blocks, "inverse")

    def direction(self, lin: Linearization) -> Vector:
        """The next `v`."""
        found = list(lin.gradient)

        def changed():
            means = [x for pair in kronecker_means_alone(lin, self._blocks) for x in pair]
            return [self._changed(J, x) for J, x in zip(trees.values(self._inverses), means)]

        inverses = by_layer.pairs(self.refresh(self._inverses, self.every, changed))
        for block, (J_a, J_g) in zip(self._blocks, inverses):
            g = block.matrix(lin.gradient)
            own = block.tensors(times(from_left(J_a, g), J_g))
            scale = tf.math.divide_no_nan(_norm(block.tensors(g)), _norm(own))
            for i, tensor in zip(block.variables, own):
                # a bias of several rows is shared by blocks; each fills its own row and leaves zeros in the others
                tensor = tf.cast(scale, tensor.dtype) * tensor
                found[i] = tensor if found[i] is lin.gradient[i] else found[i] + tensor
        found = clipped(self, "kl_clip", found, lin.gradient)
        step = trees.add(trees.scale(self.momentum, trees.values(self._velocity)), found, -1.0)
        self.remember(self._velocity, step)
        return step

    def _changed(self, J, x):
        if J.shape.rank == x.shape.rank:  # the inputs are indices
            return J
        return direct.after_rank_one(self.beta * J + (1.0 - self.beta) * by_layer.identity(J.shape, J.dtype), x)

    def linear_step(self) -> NotLinear:
        """`NotLinear`: the length of a direction is set by the gradient."""
        return NotLinear("`MKOR` gives its directions the length of the gradient: no limit on the curvature is known.")


def _norm(tensors):
    return tf.add_n([trees.norm([tensor]) for tensor in tensors])
