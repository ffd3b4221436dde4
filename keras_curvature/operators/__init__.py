"""Linear maps on weight space: they multiply, they never solve."""

from keras_curvature.operators.base import Function, Identity, LinearOperator, Scaled, Sum, dense
from keras_curvature.operators.diagonal import Diagonal

__all__ = ["Diagonal", "Function", "Identity", "LinearOperator", "Scaled", "Sum", "dense"]
