"""The edge of stability: the largest curvature at which an optimizer's steps do not diverge.

On a quadratic, a step increases the loss along every direction whose curvature is too large for the learning rate, even
with an exact gradient. Training reaches this edge and stays there (Cohen et al. 2021, 2022). So the number to look at
is not the sharpness but

    gauge = learning_rate * lambda_max(M^1/2 H M^1/2) / limit,          1 at the edge, for every optimizer

where the optimizer multiplies gradients by `M`, and its momentum determines the limit; see `optimizers/limits.py`.

Reference: Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient descent on neural networks typically occurs at the edge of
stability" (2021); Cohen et al., "Adaptive gradient methods at the edge of stability" (2022).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_curvature import keras_internals, replicas
from keras_curvature.component import check
from keras_curvature.monitor.keras_steps import OF_KERAS, REASONS
from keras_curvature.operators import LinearOperator
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import LinearStep, NotLinear, steps_taken

CLIPPED = "Clipping shortens steps: where it acts, the gauge is an upper bound."
OVERWRITTEN = "Weights are sometimes overwritten with their average: the gauge is for the steps in between."


@dataclasses.dataclass(frozen=True)
class Stability:
    """The largest stable curvature for the steps of an optimizer, at its current state.

    Attributes:
        rate: The learning rate of the next step, a float.
        limit: The bound on `rate` times the largest eigenvalue of `M H`; `None` where no bound is known.
        formula: `sharpness_limit` with its numbers, such as `"2(1+0.9)/0.05"`; `None` where no bound is known.
        preconditioner: `M`, a positive definite `LinearOperator` on vectors of all weights, at its current value;
            `None` for the identity.
        reason: A sentence that says why no bound is known; `None` where one is.
        note: A sentence on what the bound ignores, such as clipping; `None` where it ignores nothing.
    """

    rate: float
    limit: float | None = None
    formula: str | None = None
    preconditioner: LinearOperator | None = None
    reason: str | None = None
    note: str | None = None

    @property
    def sharpness_limit(self) -> float | None:
        """The largest stable eigenvalue of `M H`, `limit / rate`; `None` where there is no limit."""
        if self.limit is None:
            return None
        return self.limit / self.rate if self.rate else math.inf

    def gauge(self, sharpness: Any) -> Any:
        """`rate * sharpness / limit`: 1 at the edge; above 1, steps diverge along the sharpest direction.

        Args:
            sharpness: The largest eigenvalue of `M^1/2 H M^1/2`, a number or an array.

        Raises:
            ValueError: There is no limit.
        """
        if self.limit is None:
            raise ValueError(f"`Stability.gauge`: {self.reason}")
        return self.rate * sharpness / self.limit


def stability(optimizer: keras.Optimizer, variables: Sequence[keras.Variable] | None = None) -> Stability:
    """The largest curvature that is stable for an optimizer's learning rate, and the metric that it is measured in.

    On a quadratic with the Hessian `H`, and with a fixed optimizer state, every direction shrinks while

        learning_rate * lambda_max(M^1/2 H M^1/2) < limit

    | optimizer                          | limit (b: momentum or `beta_1`) | `M`, at the state of the last step      |
    |------------------------------------|---------------------------------|-----------------------------------------|
    | `SGD`                              | 2(1+b)                          | identity                                |
    | `SGD(nesterov=True)`, `Neumann`    | 2(1+b)/(1+2b)                   | identity                                |
    | `Adam`, `AdamW`, `amsgrad`         | 2(1+b)/(1-b)                    | 1 / (sqrt(v^) + epsilon), bias-corrected|
    | `Nadam`                            | 2(1+b)/(p(1-b)+q(1+b))          | as Adam; p, q: Keras' schedule          |
    | `Adamax`                           | 2(1+b)/(1-b)                    | 1 / (u + epsilon), bias-corrected       |
    | `RMSprop`, `centered`              | 2(1+b)                          | 1 / sqrt(v + epsilon)                   |
    | `Adagrad`, `Adadelta`              | 2                               | 1 / sqrt(sum + epsilon), ratio of both  |
    | `AdaHessian`, `SquareRootFreeAdam`,| 2(1+b)/(1-b)                    | the method's own                        |
    | `SOAP`, `KLShampoo`, `PSGD`,       |                                 |                                         |
    | `KBFGS`, `Shampoo(grafting=None)`, |                                 |                                         |
    | `SASSHA(rho=0)`                    |                                 |                                         |
    | `ESGD`                             | 2                               | the method's own                        |
    | `KFAC`, `EKFAC`, `Eva`, `FOOF`,    | 2(1+b)                          | the method's own, damping included      |
    | `SINGD`, `TNT`, `IFShampoo`        |                                 |                                         |
    | `CurveBall(beta=..., rho=...)`     | see `limits.OnTheQuadratic`     | identity                                |

    Decoupled weight decay subtracts `learning_rate * weight_decay` from the 2. For other optimizers, and for `KFAC` and
    `EKFAC` with `momentum=None` and `SOAP(sign=True)`, no limit is known: `limit` is `None`, and `reason` says why.

    `M` is fixed here, while a real step updates it first. Where a row of an embedding has long been in no batch, `v` is
    near 0 and `M` as large as `1 / epsilon`: on examples that use the row, this limit is far too strict.

    Reference: Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability" (2021), and
    "Adaptive gradient methods at the edge of stability" (2022).

    Args:
        optimizer: A Keras optimizer, which may be wrapped in a `LossScaleOptimizer`.
        variables: The weights that vectors consist of, in order, such as `model.trainable_variables`. Defaults to the
            weights that the optimizer was built for.

    Returns:
        A `Stability`.

    Raises:
        ValueError: `optimizer` is not a Keras optimizer.

    Example:

    ```python
    found = keras_curvature.stability(model.optimizer, model.trainable_variables)
    if found.limit is not None:
        print(found.gauge(sharpness))
    ```
    """
    check(stability, "optimizer", optimizer, isinstance(optimizer, keras.optimizers.Optimizer), "a Keras optimizer")
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, keras_internals.MULTI_OPTIMIZER):
        return Stability(math.nan, reason="`MultiOptimizer` trains with several optimizers, each with its own limit.")
    rate = replicas.read(optimizer.learning_rate)
    own = keras_internals.trained_by(optimizer) if optimizer.built else []
    variables = list(own if variables is None else variables)
    step = _step_of(optimizer, variables)
    M = _preconditioner(optimizer, step, variables) if isinstance(step, LinearStep) else None
    missing = [found for found in (step, M) if isinstance(found, NotLinear)]
    if missing:
        return Stability(rate, reason=missing[0].reason)
    decay = float(optimizer.weight_decay or 0.0)
    numbers = step.rule.limit(rate, decay), step.rule.formula(rate, decay)
    return Stability(rate, *numbers, M, note=_note(optimizer, step))


def _step_of(optimizer, variables):
    """The optimizer's step, a `LinearStep` or a `NotLinear`."""
    name = type(optimizer).__name__
    if isinstance(optimizer, CurvatureOptimizer):
        if optimizer.wrappers:
            return NotLinear(f"`{name}` with `{optimizer.wrappers[0]}` changes its steps: no limit is known.")
        return optimizer.linear_step()
    owner = next(cls for cls in type(optimizer).__mro__ if "update_step" in vars(cls))
    if owner in OF_KERAS:
        return OF_KERAS[owner](optimizer, variables)
    known = REASONS.get(owner, "has its own `update_step`, for which no limit on the curvature is known")
    return NotLinear(f"`{name}` {known}.")


def _preconditioner(optimizer, step, variables):
    """`M`, `None` for the identity, or a `NotLinear`."""
    if step.preconditioner is None:
        return None
    if not optimizer.built or steps_taken(optimizer) <= getattr(optimizer, "idle_steps", 0):
        return NotLinear(
            f"`{type(optimizer).__name__}` has not moved the weights yet: its preconditioner, and so the limit, exists "
            "after its first steps."
        )
    own = keras_internals.keys_of(optimizer, keras_internals.trained_by(optimizer))
    given = keras_internals.keys_of(optimizer, variables)
    ours = isinstance(optimizer, CurvatureOptimizer)
    if not (own == given if ours else set(given) <= set(own)):
        return NotLinear(
            f"`{type(optimizer).__name__}` was built for {len(own)} weights; these {len(given)} are other weights, "
            "or in another order."
        )
    return step.preconditioner()


def _note(optimizer, step):
    clips = optimizer.clipnorm or optimizer.clipvalue or optimizer.global_clipnorm
    overwrites = optimizer.use_ema and optimizer.ema_overwrite_frequency
    notes = [step.note, CLIPPED if clips else None, OVERWRITTEN if overwrites else None]
    return " ".join(note for note in notes if note) or None
