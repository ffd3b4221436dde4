"""Names of the types in signatures.

TensorFlow and Keras have no types of their own, so a type checker takes what comes from them as `Any`. To a reader the
signatures say more: a `Vector` is a list of tensors, one for each trainable variable.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import keras
import tensorflow as tf

Scalar: TypeAlias = float | tf.Tensor
Integer: TypeAlias = int | tf.Tensor
Tensors: TypeAlias = Sequence[tf.Tensor]
Vector: TypeAlias = list[tf.Tensor]
Variables: TypeAlias = list[keras.Variable]
Shape: TypeAlias = tuple[int, ...]
LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], Scalar]
Model = TypeVar("Model", bound=keras.Model)

# The options that are strings.
Fisher: TypeAlias = Literal["sampled", "exact", "empirical"]
Sharing: TypeAlias = Literal["expand", "reduce"]
Probe: TypeAlias = Literal["rademacher", "gaussian", "exact"]
Kind: TypeAlias = Literal["hessian", "ggn", "fisher", "empirical_fisher"]

Config: TypeAlias = dict[str, Any]
Logs: TypeAlias = dict[str, Any] | None
