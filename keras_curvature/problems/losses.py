"""The sum of squared residuals: a loss, and the usual error of autoencoders."""

import keras
import tensorflow as tf
from keras import ops

from keras_curvature.linearization.fisher.likelihoods import Gaussian
from keras_curvature.typing import Config


@keras.saving.register_keras_serializable(package="keras_curvature")
class SumSquares(keras.losses.Loss):
    """Sum of squares `sum_j (y_pred_j - y_true_j)^2` of each sample, averaged over the batch.

    `keras.losses.MeanSquaredError` also divides by the number of outputs, so dampings, learning rates and published
    numbers differ by this factor. The Hessian in the outputs of a sample is `2 I`.

    Args:
        name: Name of the loss. Defaults to `"sum_squares"`.
        reduction: See `keras.losses.Loss`. Defaults to `"sum_over_batch_size"`.
        dtype: See `keras.losses.Loss`. Defaults to `None`.

    Example:

    >>> float(SumSquares()([[0.0, 0.0]], [[3.0, 4.0]]))
    25.0
    """

    convex_in_outputs = True  # so its Gauss-Newton matrix is positive semi-definite
    likelihood = Gaussian  # with variance 1/2; methods that draw labels need it

    def __init__(
        self, name: str = "sum_squares", reduction: str | None = "sum_over_batch_size", dtype: str | None = None
    ) -> None:  # fmt: skip
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return _sum_per_sample(ops.square(y_pred - ops.cast(y_true, y_pred.dtype)))

    def get_config(self) -> Config:
        return {"name": self.name, "reduction": self.reduction, "dtype": self.dtype}


@keras.saving.register_keras_serializable(package="keras_curvature")
def squared_error_of_logits(y_true, y_pred):
    """Squared error `sum_j (sigmoid(y_pred_j) - y_true_j)^2` of each sample, a metric.

    Deep autoencoders are trained with the cross-entropy and compared by this error (Sutskever et al. 2013, Table 1).
    """
    return _sum_per_sample(ops.square(ops.sigmoid(y_pred) - ops.cast(y_true, y_pred.dtype)))


def _sum_per_sample(values):
    return ops.sum(ops.reshape(values, (ops.shape(values)[0], -1)), axis=-1)  # (batch,)
