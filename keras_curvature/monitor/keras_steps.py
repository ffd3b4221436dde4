"""The steps of Keras' own optimizers, as linear steps on a quadratic.

The formulas are those of each `update_step`. The preconditioner comes from the optimizer's state after its last step.
"""

import math

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.keras_internals import state
from keras_curvature.operators import Diagonal
from keras_curvature.optimizers import limits
from keras_curvature.optimizers.limits import LinearStep, NotLinear, steps_taken


def _diagonal(optimizer, variables, entries, *states):
    """The diagonal `M` of `entries(*tensors)`, called with each variable's tensors in the lists `states`."""
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
    if product == 1.0:  # before the first step, also of a loaded optimizer, since Keras does not save it
        unknown = NotLinear("`Nadam` has not taken a step since it was created or loaded.")
        return LinearStep(limits.Rule(), lambda: unknown)
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
# by name: an older Keras may lack one
_REASONS = {
    "Lion": "steps by the sign of its momentum, equally far for any size of the gradient: there is no curvature at "
    "which its steps begin to diverge",
    "Muon": "makes all singular values of its momentum equal, and steps equally far for any size of the gradient: "
    "there is no curvature at which its steps begin to diverge",
    "Lamb": "gives each step a length in proportion to the weights, for any size of the gradient: there is no "
    "curvature at which its steps begin to diverge",
    "Ftrl": "computes the weights from the sums of all gradients so far, not a step from the last one",
    "ScheduleFreeAdamW": "takes its gradients at an average of all its steps, and each step changes that average less "
    "than the one before: there is no fixed linear step",
    "Adafactor": "limits the length of each step in proportion to the weights",
}
REASONS = {getattr(keras.optimizers, name): why for name, why in _REASONS.items() if hasattr(keras.optimizers, name)}
