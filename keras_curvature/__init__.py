"""Curvature-aware optimizers for Keras: second-order training as an ordinary `compile` and `fit`."""

from keras_curvature import callbacks, problems
from keras_curvature.linearization import Linearization
from keras_curvature.monitor.operator import curvature
from keras_curvature.monitor.report.landscape import landscape
from keras_curvature.monitor.report.reporting import report
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
from keras_curvature.solvers import (
    ConjugateGradient,
    CoupledNewton,
    EigenRoot,
    KroneckerGeometry,
    LowRankGeometry,
    NeumannSeries,
)
from keras_curvature.steps import ArmijoLineSearch, ConstantDamping, LevenbergMarquardt
from keras_curvature.training.models import CurvatureModel, curved

__version__ = "0.1.0"

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
