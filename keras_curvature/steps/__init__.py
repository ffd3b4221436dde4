"""The length of a step: damping, checked steps, line search, the minimum of a small quadratic. Pure functions."""

from keras_curvature.steps.damping import ConstantDamping, Damping, LevenbergMarquardt, Nielsen, as_damping
from keras_curvature.steps.grid_search import GridSearch
from keras_curvature.steps.line_search import ArmijoLineSearch
from keras_curvature.steps.trial import Trial

__all__ = [
    "ArmijoLineSearch", "ConstantDamping", "Damping", "GridSearch", "LevenbergMarquardt", "Nielsen", "Trial",
    "as_damping",
]  # fmt: skip
