"""The edge of stability: how large a curvature the learning rate of an optimizer bears.

A step on a quadratic makes things worse along a direction whose curvature is too large for it, however good the
gradient is. Training meets this edge and stays at it (Cohen et al. 2021, 2022), so that the number to look at is not
the sharpness but

    gauge = learning_rate * lambda_max(M^1/2 H M^1/2) / limit,          1 at the edge, for every optimizer

with `M` what the optimizer multiplies gradients by, and a limit that its momentum decides; see `limits.py`.

Reference: Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient descent on neural networks typically occurs at the edge of
stability" (2021); Cohen et al., "Adaptive gradient methods at the edge of stability" (2022).
"""

import dataclasses
import math

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check
from keras_curvature.keras_internals import state
from keras_curvature.operators import Diagonal, LinearOperator
from keras_curvature.optimizers import limits
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.limits import LinearStep, NotLinear, steps_taken

CLIPPED = "Clipping makes steps shorter: where it acts, the gauge is an upper bound."
OVERWRITTEN = "The weights are overwritten with their average now and then: the gauge is of the steps in between."


@dataclasses.dataclass(frozen=True)
class Stability:
    """How large a curvature a step of an optimizer bears, at its present state.

    Attributes:
        rate: The learning rate of the next step, a float.
        limit: What `rate` times the largest eigenvalue of `M H` must stay below; `None` where no such number is known.
        formula: `sharpness_limit` with its numbers, such as `"2(1+0.9)/0.05"`; `None` likewise.
        preconditioner: `M`, a positive definite `LinearOperator` on vectors of all weights, fixed as it is now; `None`
            for the identity.
        reason: A sentence that says why there is no limit; `None` where there is one.
        note: A sentence on what the limit leaves out, such as clipping; `None` where that is nothing.
    """

    rate: float
    limit: float | None = None
    formula: str | None = None
    preconditioner: LinearOperator | None = None
    reason: str | None = None
    note: str | None = None

    @property
    def sharpness_limit(self):
        """The largest eigenvalue of `M H` that is borne, `limit / rate`; `None` where there is no limit."""
        if self.limit is None:
            return None
        return self.limit / self.rate if self.rate else math.inf

    def gauge(self, sharpness):
        """`rate * sharpness / limit`: 1 at the edge, above it the step diverges along the sharpest direction.

        Args:
            sharpness: The largest eigenvalue of `M^1/2 H M^1/2`, a number or an array.

        Raises:
            ValueError: There is no limit.
        """
        if self.limit is None:
            raise ValueError(f"`Stability.gauge`: {self.reason}")
        return self.rate * sharpness / self.limit


def stability(optimizer, variables=None):
    """The limit on the curvature that the optimizer's learning rate sets, and the metric in which curvature is meant.

    On a quadratic with the Hessian `H`, and with the state held as it is, a step shrinks every direction while

        learning_rate * lambda_max(M^1/2 H M^1/2) < limit

    | optimizer                          | limit (b: momentum or `beta_1`) | `M`, at the state of the last step      |
    |------------------------------------|---------------------------------|-----------------------------------------|
    | `SGD`                              | 2(1+b)                          | identity                                |
    | `SGD(nesterov=True)`, `Neumann`    | 2(1+b)/(1+2b)                   | identity                                |
    | `Adam`, `AdamW`, `amsgrad`         | 2(1+b)/(1-b)                    | 1 / (sqrt(v^) + epsilon), bias-corrected|
    | `Nadam`                            | 2(1+b)/(p(1-b)+q(1+b))          | likewise; p, q: Keras' schedule         |
    | `Adamax`                           | 2(1+b)/(1-b)                    | 1 / (u + epsilon), bias-corrected       |
    | `RMSprop`, `centered`              | 2(1+b)                          | 1 / sqrt(v + epsilon)                   |
    | `Adagrad`, `Adadelta`              | 2                               | 1 / sqrt(sum + epsilon), ratio of both  |
    | `AdaHessian`, `SquareRootFreeAdam`,| 2(1+b)/(1-b)                    | the method's own                        |
    | `SOAP`, `KLShampoo`, `PSGD`,       |                                 |                                         |
    | `Shampoo(grafting=None)`           |                                 |                                         |
    | `ESGD`                             | 2                               | the method's own                        |
    | `KFAC`, `EKFAC`, `Eva`             | 2(1+b)                          | the method's own, damping included      |
    | `CurveBall(beta=..., rho=...)`     | see `limits.OnTheQuadratic`     | identity                                |

    Decoupled weight decay takes `learning_rate * weight_decay` off the 2. Others have no such limit, and a `reason`.

    `M` is held as it is, and a real step renews it first. Where a row of an embedding has not been in a batch for long,
    `v` is near 0 and `M` as large as `1 / epsilon`: on examples that have the row, this limit is far too strict.

    Reference: Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability" (2021), and
    "Adaptive gradient methods at the edge of stability" (2022).

    Args:
        optimizer: A Keras optimizer; one inside of a `LossScaleOptimizer` is taken out.
        variables: The weights that vectors are made of, in order, such as `model.trainable_variables`. Defaults to
            those that the optimizer was built for.

    Returns:
        A `Stability`.

    Raises:
        ValueError: `optimizer` is not a Keras optimizer.

    Example:

    ```python
    found = stability(model.optimizer, model.trainable_variables)
    if found.limit is not None:
        print(found.gauge(sharpness))
    ```
    """
    check(stability, "optimizer", optimizer, isinstance(optimizer, keras.optimizers.Optimizer), "a Keras optimizer")
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
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
    """What the method says of its step."""
    name = type(optimizer).__name__
    if isinstance(optimizer, CurvatureOptimizer):
        return optimizer.linear_step()
    owner = next(cls for cls in type(optimizer).__mro__ if "update_step" in vars(cls))
    if owner in OF_KERAS:
        return OF_KERAS[owner](optimizer, variables)
    known = REASONS.get(owner, "has an `update_step` of its own, of which no limit on the curvature is known")
    return NotLinear(f"`{name}` {known}.")


def _preconditioner(optimizer, step, variables):
    """`M`, `None` for the identity, or a `NotLinear`."""
    if step.preconditioner is None:
        return None
    if not optimizer.built or steps_taken(optimizer) <= getattr(optimizer, "idle_steps", 0):
        return NotLinear(
            f"`{type(optimizer).__name__}` has not moved the weights yet: what it multiplies gradients by, and with it "
            "the limit, is there after the first steps."
        )
    own = keras_internals.keys_of(optimizer, keras_internals.trained_by(optimizer))
    given = keras_internals.keys_of(optimizer, variables)
    ours = isinstance(optimizer, CurvatureOptimizer)
    if not (own == given if ours else set(given) <= set(own)):
        return NotLinear(
            f"`{type(optimizer).__name__}` was built for {len(own)} weights, and these {len(given)} are others, or in "
            "another order."
        )
    return step.preconditioner()


def _note(optimizer, step):
    clips = optimizer.clipnorm or optimizer.clipvalue or optimizer.global_clipnorm
    overwrites = optimizer.use_ema and optimizer.ema_overwrite_frequency
    notes = [step.note, CLIPPED if clips else None, OVERWRITTEN if overwrites else None]
    return " ".join(note for note in notes if note) or None


# Keras' own. The formulas stand in each `update_step`; of what it computes, the state of the last step is taken.


def _diagonal(optimizer, variables, entries, *states):
    """`M` of `entries(*tensors)`, called with what the lists of `states` have for each of the variables."""
    places = keras_internals.places_of(optimizer, variables)
    rows = [trees.values([state[i] for state in states]) for i in places]
    return Diagonal([entries(*row) for row in rows])


def _sgd(optimizer, variables):
    b = float(optimizer.momentum)
    return LinearStep(limits.nesterov(b) if optimizer.nesterov else limits.heavy_ball(b))


def _adam(optimizer, variables):
    def preconditioner():
        t = steps_taken(optimizer)
        bias = math.sqrt(1.0 - optimizer.beta_2**t) / (1.0 - optimizer.beta_1**t)
        v = state(optimizer, "velocity_hats" if optimizer.amsgrad else "velocities")
        return _diagonal(optimizer, variables, lambda v: bias / (tf.sqrt(v) + optimizer.epsilon), v)

    return LinearStep(limits.averaged(optimizer.beta_1), preconditioner)


def _nadam(optimizer, variables):
    b, t = optimizer.beta_1, steps_taken(optimizer)
    kept = state(optimizer, "u_product")
    product = 1.0 if kept is None else replicas.read(kept)
    if product == 1.0:  # before the first step, also that of a loaded optimizer: Keras does not save it
        return LinearStep(limits.Rule(), lambda: NotLinear("`Nadam` has not taken a step since it was made or loaded."))
    u, following = (b * (1.0 - 0.5 * 0.96**s) for s in (t, t + 1))
    rule = limits.combined(b, following / (1.0 - product * following), (1.0 - u) / (1.0 - product))

    def preconditioner():
        bias = 1.0 - optimizer.beta_2**t
        v = state(optimizer, "velocities")
        return _diagonal(optimizer, variables, lambda v: 1.0 / (tf.sqrt(v / bias) + optimizer.epsilon), v)

    return LinearStep(rule, preconditioner)


def _adamax(optimizer, variables):
    def preconditioner():
        bias = 1.0 - optimizer.beta_1 ** steps_taken(optimizer)
        return _diagonal(optimizer, variables, lambda u: 1.0 / (bias * (u + optimizer.epsilon)), state(optimizer, "u"))

    return LinearStep(limits.averaged(optimizer.beta_1), preconditioner)


def _rmsprop(optimizer, variables):
    def entries(v, mean=0.0):
        return tf.math.rsqrt(v - mean * mean + optimizer.epsilon)

    def preconditioner():
        means = [state(optimizer, "average_gradients")] if optimizer.centered else []
        return _diagonal(optimizer, variables, entries, state(optimizer, "velocities"), *means)

    return LinearStep(limits.heavy_ball(optimizer.momentum), preconditioner)


def _adagrad(optimizer, variables):
    def preconditioner():
        sums = state(optimizer, "accumulators")
        return _diagonal(optimizer, variables, lambda total: tf.math.rsqrt(total + optimizer.epsilon), sums)

    return LinearStep(limits.Rule(), preconditioner)


def _adadelta(optimizer, variables):
    def entries(gradients, steps):
        return tf.sqrt((steps + optimizer.epsilon) / (gradients + optimizer.epsilon))

    def preconditioner():
        states = state(optimizer, "accumulated_grads"), state(optimizer, "accumulated_delta_vars")
        return _diagonal(optimizer, variables, entries, *states)

    return LinearStep(limits.Rule(), preconditioner)


OF_KERAS = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Nadam: _nadam,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.Adadelta: _adadelta,
}
REASONS = {
    keras.optimizers.Lion: "steps by the sign of its momentum, just as far however small the gradient is: there is no "
    "curvature at which its steps begin to diverge",
    keras.optimizers.Muon: "makes all singular values of its momentum equal, and steps just as far however small the "
    "gradient is: there is no curvature at which its steps begin to diverge",
    keras.optimizers.Lamb: "gives each step a length in proportion to the weights, however small the gradient is: "
    "there is no curvature at which its steps begin to diverge",
    keras.optimizers.Ftrl: "computes the weights from the sums of all gradients so far, not a step from the last one",
    keras.optimizers.ScheduleFreeAdamW: "takes its gradients at an average of all its steps, to which each adds less "
    "than the one before: there is no step that stays the same",
    keras.optimizers.Adafactor: "cuts each step to a length of its own choice, in proportion to the weights",
}
