"""How far to go: damping, line search, the minimum of a small quadratic. Pure: values in, values out."""

from keras_curvature.steps.damping import ConstantDamping, LevenbergMarquardt, as_damping
from keras_curvature.steps.line_search import ArmijoLineSearch

__all__ = ["ArmijoLineSearch", "ConstantDamping", "LevenbergMarquardt", "as_damping"]
