"""Functions of weights and step, without randomness after the start."""

import numpy as np
import tensorflow as tf

from keras_curvature.problems.lightbench.task import Task, below, near, objective


def normals(*sizes):
    """`start` of standard normal vectors; a size is a number or a function of the knob."""

    def start(knob, random):
        return [random.standard_normal(size(knob) if callable(size) else size) for size in sizes]

    return start


def at(*point):
    """`start` at a point."""
    return lambda knob, random: [np.array(point)]


def mean_square(x):
    return tf.reduce_mean(tf.square(x))


def _beale(weights, moment, knob):
    x, y = weights[0][0] + 3.0, weights[0][1] + 0.5
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _rosenbrock(weights, moment, knob):
    x, y = tf.unstack(weights[0])
    return (1.0 - x) ** 2 + (y - x**2) ** 2


def _rastrigin(weights, moment, knob):
    (x,) = weights
    return tf.reduce_mean(x**2 + 10.0 * (1.0 - tf.cos(2.0 * np.pi * x)))


def _discontinuous(weights, moment, knob):
    (x,) = weights
    return tf.reduce_mean(tf.where(x < 0, x**2, 2.0 * x))


def _saddle(weights, moment, power):
    return tf.reduce_sum(weights[0] ** (2 * power + 1)) + 10.0


def _plateau(weights, moment, scale):
    height = scale * (tf.reduce_sum(weights[0] ** 2) - 1.0)
    return tf.sigmoid(height) - 1.0 / (1.0 + np.exp(scale))


def _log_scales(decades, random):
    return [np.logspace(-decades, decades, 512) * random.standard_normal(512)]


def _scale_invariant(weights, moment, decades):
    return tf.reduce_mean(tf.math.log1p(weights[0] ** 2))


def _momentum(weights, moment, weight):
    (x,) = weights
    return tf.reduce_mean(x**2 + weight * tf.sin(10.0 * x) * tf.cos(0.1 * moment.time(x.dtype)))


def _layers(weights, moment, scale):
    first, second, third = (mean_square(w) for w in weights)
    return (scale * first + second + third / scale) / 3.0


def _scaled_starts(scale, random):
    return [factor * random.standard_normal(1024) for factor in (scale, 1.0, 1.0 / scale)]


def _parameters(weights, moment, scale):
    return tf.add_n([mean_square(w) for w in weights]) / 3.0


def _delayed(weights, moment, count):
    """Weight `i` has a gradient in every `i + 1`-th step."""
    due = [tf.equal(moment.step % (i + 1), 0) for i in range(count)]
    return tf.add_n([tf.where(now, mean_square(w), tf.zeros([], w.dtype)) for now, w in zip(due, weights)]) / count


def _adversarial(weights, moment, period):
    (p,) = weights
    push = tf.sin(np.pi * 1.1 / period * moment.time(p.dtype))
    return mean_square(p) + push * tf.reduce_mean(p)


def _moving(weights, moment, period):
    (p,) = weights
    grid = tf.linspace(tf.zeros([], p.dtype), tf.constant(2.0 * np.pi, p.dtype), p.shape[0])
    return mean_square(p - tf.sin(grid + 1.1 / period * moment.time(p.dtype)))


def _constrained(weights, moment, penalty):
    (x,) = weights
    return tf.reduce_mean((x - 2.0) ** 2 + penalty * tf.nn.relu(x - 1.0))


def _on_the_border(weights, loss, knob, seed):
    return np.all(np.abs(weights[0] - 1.0) < 1e-3)


def _varying_scale(weights, moment, size):
    (p,) = weights
    scale = np.arange(1, size + 1) / (0.5 * size * (size + 1))
    return tf.reduce_sum(tf.constant(scale, p.dtype) * tf.square(p))


def _unit(size, seed=0):
    """`i / |i|` for `i = 0, 1, ...`."""
    i = np.arange(size, dtype=float)
    return i / np.linalg.norm(i)


def _varying_target(weights, moment, size):
    (p,) = weights
    return mean_square(p - tf.constant(_unit(size), p.dtype))


SIZES = (4, 16, 512, 8192, 2**15, 2**17)
# numbers twice in a row, or out of order, are the original's defaults for a level whose key is misspelt or missing
TOYS = [
    Task("beale", objective(at(-7.0, -4.0), _beale), below(1e-8)),
    Task("rosenbrock", objective(at(-7.0, -4.0), _rosenbrock), below(1e-9)),
    Task("rastrigin", objective(at(-2.2, -2.2), _rastrigin), below(1e-2)),
    Task("discontinuous_gradient", objective(normals(1024), _discontinuous), near(1e-4)),
    Task("saddle_point", objective(at(1.2, 1.9), _saddle), below(0.1), (1, 2, 4, 8, 16, 32)),
    Task("plateau_navigation", objective(at(1.5, 1.5), _plateau), below(1e-4), (1, 4, 8, 12, 16, 20)),
    Task("scale_invariant", objective(_log_scales, _scale_invariant), below(1e-3), (1, 2, 3, 4, 5, 6)),
    Task("momentum_utilization", objective(normals(1024), _momentum), below(1e-6), (0.004, 0.02, 0.1, 0.5, 1, 2)),
    Task("layer_wise_scale", objective(normals(1024, 1024, 1024), _layers), below(1e-4), (2, 10, 1e3, 1e3, 1e7, 1e9)),
    Task("parameter_scale", objective(_scaled_starts, _parameters), below(1e-4), (1e3, 10, 1e3, 1e5, 1e3, 1e3)),
    Task(
        "gradient_delay", objective(lambda count, random: list(random.standard_normal((count, 256))), _delayed),
        below(1e-4), (2, 4, 16, 64, 128, 256), patience=2,
    ),
    Task("adversarial_gradient", objective(normals(1024), _adversarial), near(1e-3), (1000, 100, 10, 7, 4, 2)),
    Task("dynamic_landscape", objective(normals(16384), _moving), below(0.01), (1000, 100, 20, 10, 6, 4)),
    Task(
        "constrained_optimization", objective(lambda knob, random: [np.zeros(16)], _constrained), _on_the_border,
        (1e1, 1e2, 1e4, 1e6, 1e8, 1e10), block=32,
    ),
    Task(
        "quadratic_varying_scale", objective(normals(lambda size: size), _varying_scale), near(1e-7), SIZES,
        dtype="float32",
    ),
    Task(
        "quadratic_varying_target", objective(normals(lambda size: size), _varying_target), near(1e-8, _unit), SIZES,
        dtype="float32",
    ),
]  # fmt: skip
