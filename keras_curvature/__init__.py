"""Curvature-aware optimizers for Keras: second-order training as an ordinary `compile` and `fit`."""

from keras_curvature import callbacks, problems
from keras_curvature.curvature import Linearization
from keras_curvature.landscape import landscape
from keras_curvature.models import CurvatureModel, curved
from keras_curvature.monitor import curvature
from keras_curvature.optimizers import (
    EKFAC,
    ESGD,
    KFAC,
    PSGD,
    SOAP,
    AdaHessian,
    CurvatureOptimizer,
    CurveBall,
    DiagonalNewton,
    Eva,
    HessianFree,
    KLShampoo,
    Neumann,
    Shampoo,
    SophiaG,
    SophiaH,
    SquareRootFreeAdam,
    TwoLoopNeumann,
)
from keras_curvature.report import report
from keras_curvature.solvers import (
    ConjugateGradient,
    CoupledNewton,
    EigenRoot,
    KroneckerGeometry,
    LowRankGeometry,
    NeumannSeries,
)
from keras_curvature.steps import ArmijoLineSearch, ConstantDamping, LevenbergMarquardt

__version__ = "0.1.0"

# `curvature` and `report` are functions here; `from keras_curvature.curvature import ...` finds the package.

__all__ = [
    "EKFAC",
    "ESGD",
    "KFAC",
    "PSGD",
    "SOAP",
    "AdaHessian",
    "ArmijoLineSearch",
    "ConjugateGradient",
    "ConstantDamping",
    "CoupledNewton",
    "CurvatureModel",
    "CurvatureOptimizer",
    "CurveBall",
    "DiagonalNewton",
    "EigenRoot",
    "Eva",
    "HessianFree",
    "KLShampoo",
    "KroneckerGeometry",
    "LevenbergMarquardt",
    "Linearization",
    "LowRankGeometry",
    "Neumann",
    "NeumannSeries",
    "Shampoo",
    "SophiaG",
    "SophiaH",
    "SquareRootFreeAdam",
    "TwoLoopNeumann",
    "callbacks",
    "curvature",
    "curved",
    "landscape",
    "problems",
    "report",
]
