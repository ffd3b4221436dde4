"""Estimates from labels drawn from the model. Each function is a method of `Linearization`."""

import tensorflow as tf

from keras_curvature.component import check_scalar
from keras_curvature.typing import Integer, Vector


def sampled_gradient(lin, seed: Integer = 0) -> Vector:
    """The gradient of the loss with labels drawn from the model, a vector; one backward pass.

    Args:
        seed: Integer tensor or number that the labels are a function of.

    Raises:
        ValueError: The loss is not minus the logarithm of a known likelihood.
    """
    check_scalar(sampled_gradient, "seed", seed, integer=True)
    return lin.passes.total(lambda recorded: recorded.pull(recorded.sampled_slope(seed)))


def fisher_diagonal(lin, seed: Integer = 0) -> Vector:
    """An unbiased, non-negative estimate of the diagonal of the Fisher matrix, a vector.

    The square of `sum_i J_i' c_i`, with the cotangents `c` of labels drawn from the model; see
    `fisher/sampling.py`. For a loss that is a mean over N examples it is N times the squared `sampled_gradient`; one
    backward pass.

    Args:
        seed: Integer tensor or number that the labels are a function of.

    Raises:
        ValueError: The loss is not minus the logarithm of a known likelihood.
    """
    check_scalar(fisher_diagonal, "seed", seed, integer=True)
    sums = lin.passes.total(lambda recorded: recorded.pull(recorded.cotangents("sampled", seed)))
    return [tf.square(s) for s in sums]
