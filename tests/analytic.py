"""Functions of a few weights, as Keras models whose loss is the function: the usual tests of optimizers."""

import keras
import numpy as np
import tensorflow as tf
from cases import put
from keras import ops

import keras_curvature as kc


@keras.saving.register_keras_serializable(package="keras_curvature_tests")
class OfWeights(keras.layers.Layer):
    """A layer whose output, for any input, is a function of its weights; `function` is a key of `FUNCTIONS`."""

    def __init__(self, function, size, **kwargs):
        super().__init__(**kwargs)
        self.function, self.size = function, size

    def build(self, shape):
        self.w = self.add_weight(shape=(self.size,), initializer="zeros", name="w")

    def call(self, x):
        return 0.0 * x + FUNCTIONS[self.function](self.w)


def the_output(y, output):
    """The loss: the output itself."""
    return output[:, 0]


def himmelblau(w):
    return (w[0] ** 2 + w[1] - 11.0) ** 2 + (w[0] + w[1] ** 2 - 7.0) ** 2


def rosenbrock(w):
    return 100.0 * (w[1] - w[0] ** 2) ** 2 + (1.0 - w[0]) ** 2


def matyas(w):
    return 0.26 * (w[0] ** 2 + w[1] ** 2) - 0.48 * w[0] * w[1]


def beale(w):
    return sum((c - w[0] * (1.0 - w[1] ** k)) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625)))


def zakharov(w):
    weighted = ops.sum(0.5 * ops.cast(np.arange(1, w.shape[0] + 1), w.dtype) * w)
    return ops.sum(w**2) + weighted**2 + weighted**4


def eggholder(w):
    a, b = w[1] + 47.0, w[0]
    return -a * ops.sin(ops.sqrt(ops.abs(b / 2.0 + a))) - b * ops.sin(ops.sqrt(ops.abs(b - a)))


# convex: the log of a sum of exponentials of fixed linear forms, and a quadratic
FORMS = np.cos(np.outer(np.arange(1, 13), np.arange(1, 9)) * 0.7)


def log_sum_exp(w):
    forms = ops.matmul(ops.cast(FORMS, w.dtype), w[:, None])[:, 0]
    return ops.logsumexp(forms) + 0.05 * ops.sum(ops.cast(np.arange(1, 9), w.dtype) * w**2)


def flat(w):
    return 0.0 * ops.sum(w) + 3.0


def unbounded(w):
    return ops.sum(w)


def wall(w):
    """A logarithm: not a number beyond 1, and falling steeply towards it from afar."""
    return ops.sum(-ops.log(1.0 - w) + 1e4 * (w - 0.9) ** 2)


FUNCTIONS = {
    f.__name__: f
    for f in (himmelblau, rosenbrock, matyas, beale, zakharov, eggholder, log_sum_exp, flat, unbounded, wall)
}
ONE, NOTHING = np.ones((1, 1)), np.zeros((1, 1))


def function_model(function, start, optimizer, **kwargs):
    """A curved, compiled model whose loss is `FUNCTIONS[function]` of its weights, at `start`."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, OfWeights(function, len(start))(inputs))
    put(model.trainable_variables, start)
    model = kc.curved(model)
    model.compile(optimizer, loss=the_output, **kwargs)
    return model


def steps(model, most, gradient=1e-8):
    """The logs of each step, until the largest entry of the gradient is small; each step's numbers are its own."""
    logs = []
    for _ in range(most):
        model.reset_metrics()
        logs.append(model.train_on_batch(ONE, NOTHING, return_dict=True))
        if logs[-1].get("gradient_max", 1.0) <= gradient:
            break
    return logs


def weights(model):
    """The weights, a NumPy vector."""
    return model.trainable_variables[0].numpy()


def value_and_gradient(function, w):
    """The function and its gradient at a NumPy vector, as NumPy numbers."""
    w = tf.constant(w)
    with tf.GradientTape() as tape:
        tape.watch(w)
        value = FUNCTIONS[function](w)
    return float(value), tape.gradient(value, w).numpy()
