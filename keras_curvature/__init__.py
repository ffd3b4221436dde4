"""Curvature-aware optimizers for Keras: second-order training as an ordinary `compile` and `fit`."""

from keras_curvature import callbacks, problems
from keras_curvature.curvature import Linearization
from keras_curvature.models import CurvatureModel, curved
from keras_curvature.optimizers import CurvatureOptimizer, CurveBall, HessianFree, Neumann, TwoLoopNeumann
from keras_curvature.solvers import ConjugateGradient, NeumannSeries
from keras_curvature.steps import ArmijoLineSearch, ConstantDamping, LevenbergMarquardt

__version__ = "0.1.0"

__all__ = [
    "ArmijoLineSearch",
    "ConjugateGradient",
    "ConstantDamping",
    "CurvatureModel",
    "CurvatureOptimizer",
    "CurveBall",
    "HessianFree",
    "LevenbergMarquardt",
    "Linearization",
    "Neumann",
    "NeumannSeries",
    "TwoLoopNeumann",
    "callbacks",
    "curved",
    "problems",
]
