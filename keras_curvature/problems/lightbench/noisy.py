"""Functions of weights and step with draws in every step."""

import numpy as np
import tensorflow as tf

from keras_curvature.problems.lightbench.task import Task, below, near, objective
from keras_curvature.problems.lightbench.toys import SIZES, mean_square, normals

BATCH = 16  # of `minimax` and `wide_linear`


def _batch_size(weights, moment, largest):
    """Noise as of a batch of a size drawn between 1 and `largest`, relative to the norm of the weights."""
    (p,) = weights
    noise = moment.normal(p.shape, p.dtype)
    size = tf.cast(float(largest), p.dtype) ** (0.5 * moment.uniform([], p.dtype, stream=1))
    scale = tf.norm(p) / (tf.norm(noise) + 1e-6) / tf.sqrt(size)
    return mean_square(p + tf.stop_gradient(scale) * noise)


def _sparse(weights, moment, share):
    """Only entries that are drawn in this step or were in the last one."""
    (p,) = weights
    now = moment.uniform(p.shape, "float32") < share
    before = (moment.uniform(p.shape, "float32", back=1) < share) & (moment.step > 1)
    return mean_square(tf.where(now | before, p, tf.zeros_like(p)))


def _falling_noise(weights, moment, offset):
    (p,) = weights
    return mean_square(p + moment.normal(p.shape, p.dtype) / (offset + moment.time(p.dtype)))


def _offset(seed):
    """What the weights of `noisy_matmul` must cancel."""
    return tf.random.stateless_normal([64], [seed, 0])


def _noisy_matmul(weights, moment, depth):
    """Zero through `depth` random matrices, new ones for each of 128 examples."""
    x = tf.broadcast_to(weights[0] + tf.cast(_offset(moment.seed), weights[0].dtype), [128, 64])
    for i in range(depth):
        seed = tf.random.experimental.stateless_fold_in([16 * moment.seed, moment.step], i)
        matrices = tf.random.stateless_normal([128, 64, 64], seed, dtype=x.dtype) / 8.0
        y = tf.linalg.matvec(matrices, x, transpose_a=True)
        x = tf.nn.leaky_relu(y, 0.1)
    return mean_square(y)


def _sums(moment, size, dtype):
    """`(x, its cumulative sums)`, a batch of noise."""
    x = moment.normal([BATCH, size], dtype)
    return x, tf.cumsum(x, 1)


def _minimax(weights, moment, size):
    (p,) = weights
    prediction = 0.5 * tf.reduce_sum(tf.square(p[:size] + p[size:]))
    return mean_square(prediction - _sums(moment, size, p.dtype)[1])


def _wide_linear(weights, moment, size):
    x, sums = _sums(moment, size, weights[0].dtype)
    return mean_square(tf.matmul(x, weights[0]) - sums)


NOISY = [
    Task("batch_size_scaling", objective(normals(1024), _batch_size), near(1e-8), (65536, 8192, 1024, 128, 16, 2)),
    Task(
        "sparse_gradient", objective(normals(65536), _sparse), below(1e-4),
        (2**-1, 2**-3, 2**-6, 2**-8, 2**-11, 2**-14),
    ),
    Task("gradient_noise_scale", objective(normals(4096), _falling_noise), near(1e-3), (32, 16, 8, 4, 2, 1)),
    Task(
        "noisy_matmul", objective(normals(64), _noisy_matmul), near(1e-7, lambda knob, seed: -_offset(seed).numpy()),
        (1, 2, 8, 12, 16, 20), dtype="float32",
    ),
    Task(
        "minimax", objective(normals(lambda size: 2 * size), _minimax), near(1e-7), SIZES, dtype="float32",
        can_be_won=False,
    ),
    Task(
        "wide_linear", objective(normals(lambda size: (size, size)), _wide_linear),
        near(1e-7, lambda size, seed: -np.triu(np.ones((size, size)))), (4, 32, 512, 2048, 8192, 2**14),
        dtype="float32", can_be_won=False,
    ),
]  # fmt: skip
