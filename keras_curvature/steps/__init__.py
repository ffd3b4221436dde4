"""The length of a step: damping, checked steps, line search, the minimum of a small quadratic. Pure functions."""

from keras_curvature.steps.damping import ConstantDamping, Damping, LevenbergMarquardt, as_damping
from keras_curvature.steps.line_search import ArmijoLineSearch
from keras_curvature.steps.trial import Trial

__all__ = ["ArmijoLineSearch", "ConstantDamping", "Damping", "LevenbergMarquardt", "Trial", "as_damping"]
