"""Newton-Muon: Muon on gradients divided by the second moment of each layer's inputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.optimizers.by_inputs import ByInputs
from keras_curvature.optimizers.by_layer import warn_of
from keras_curvature.optimizers.hidden import SIGN
from keras_curvature.optimizers.muon import Muon
from keras_curvature.solvers.matrix_parts import MatrixPart
from keras_curvature.solvers.matrix_sign import MatrixSign
from keras_curvature.solvers.second_moment import Normalization
from keras_curvature.typing import LearningRate, Variables, Vector

TINY = 1e-8  # added to the ridge (the authors), for inputs that are all zero


@register
class NewtonMuon(ByInputs, Muon):
    """Newton-Muon: `Muon`, with the gradient of each hidden kernel divided by the second moment of its inputs.

        K <- eps K_old + (1 - eps) mean_n sum_t z_nt z_nt',    eps = min(1 - 1/t, 0.95)      z: inputs of the layer
        G = (K + ridge tr(K)/n I)^-1 dL/dW
        M <- momentum M + (1 - momentum) G,    w <- w - learning_rate scale sign(N)          N: see `Muon`

    `K` and its inverse are updated in every `every`-th step, from the batch of that step. All other weights step as
    with `Muon`, and hidden kernels of layers without Kronecker factors too; a warning names these.

    Reference: Du and Su, "The Newton-Muon optimizer" (2026), and github.com/zhehangdu/Newton-Muon. Differences from
    that code: (1) those of `Muon`; (2) the first step has an inverse already (there: step 32), and `K` has no initial
    value (there: 0.001); (3) one matrix for all inputs of a layer (there: four blocks for the inputs of the second
    layer of an MLP); (4) a failed inverse is reported and the old one kept (there: the identity is taken).

    Args:
        learning_rate: As for `Muon`. Defaults to `3e-3`.
        every: Steps between two updates of `K` and its inverse; the replicas share the work. Defaults to `32` (the
            authors).
        ridge: Added to `K`, in units of its mean eigenvalue; positive. Defaults to `0.2` (the authors).
        momentum, nesterov, scale, sign, normalization, per_head, adam_for, adam_rate, beta_1, beta_2, epsilon, part:
            See `Muon`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes` (moments and inverses that were not finite; the old ones are kept), `step_norm`,
        `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.NewtonMuon(), loss="mse")
    ```
    """

    reports = {"failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 3e-3, every: int = 32, ridge: float = 0.2, momentum: float = 0.95,
        nesterov: bool = True, scale: Literal["moonlight", "jordan", "scion", "nuclear"] = "moonlight",
        sign: MatrixSign = SIGN, normalization: Normalization | None = None, per_head: bool = False,
        adam_for: Sequence[str] | None = None, adam_rate: float = 1.0, beta_1: float = 0.9, beta_2: float = 0.999,
        epsilon: float = 1e-8, part: MatrixPart | None = None, name: str = "newton_muon", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            learning_rate, momentum=momentum, nesterov=nesterov, scale=scale, sign=sign, normalization=normalization,
            per_head=per_head, adam_for=adam_for, adam_rate=adam_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon,
            part=part, name=name, **kwargs,
        )  # fmt: skip
        self.every, self.ridge = every, ridge
        check_count(self, "every", every)
        check_number(self, "ridge", ridge, low=0, open_low=True)

    def create_state(self, variables: Variables) -> None:
        """That of `Muon`, the second moments of the inputs of the hidden kernels and their inverses."""
        super().create_state(variables)
        hidden = {id(v) for v in self.hidden_variables(variables)}
        found = [b for b in kronecker.blocks(self.trained_model())[0] if b.weights.kernel is not None]
        blocks = [
            dataclasses.replace(b, variables=b.variables[:1], weights=dataclasses.replace(b.weights, bias=None))
            for b in found if id(variables[b.variables[0]]) in hidden
        ]  # fmt: skip
        known = {b.variables[0] for b in blocks}
        others = [i for i, v in enumerate(variables) if id(v) in hidden and i not in known]
        warn_of(self, self.trained_model(), others, "the gradient as it is")
        self.create_moments_of_inputs(blocks)

    def direction(self, lin: Linearization) -> Vector:
        """Muon's step, of the divided gradients."""
        inverses = self.inverses_of_inputs(lin, self.every, self.every, lambda mean: self.ridge * mean + TINY)
        return self.precondition(self.divided(lin.gradient, inverses))
