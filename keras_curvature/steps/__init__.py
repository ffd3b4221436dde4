"""The length of a step: damping, checked steps, line search, the minimum of a small quadratic. Pure functions."""

from keras_curvature.steps.damping import ConstantDamping, Damping, LevenbergMarquardt, Nielsen, as_damping
from keras_curvature.steps.grid_search import GridSearch
from keras_curvature.steps.hager_zhang import HagerZhang
from keras_curvature.steps.line_search import ArmijoLineSearch
from keras_curvature.steps.strong_wolfe import StrongWolfe
from keras_curvature.steps.trial import Trial
from keras_curvature.steps.trust_region import TrustRegion

__all__ = [
    "ArmijoLineSearch",
    "ConstantDamping",
    "Damping",
    "GridSearch",
    "HagerZhang",
    "LevenbergMarquardt",
    "Nielsen",
    "StrongWolfe",
    "Trial",
    "TrustRegion",
    "as_damping",
]
