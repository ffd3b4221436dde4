"""Curvature-aware optimizers for Keras: second-order training as an ordinary `compile` and `fit`."""

# `backend` stands first: it refuses a Keras that does not run on TensorFlow, in words
from keras_curvature import backend, callbacks, operators, optimizers, problems  # noqa: F401
from keras_curvature.linearization import Linearization, Needs
from keras_curvature.linearization.fisher import likelihoods
from keras_curvature.monitor.choosing.race import auto
from keras_curvature.monitor.operator import curvature
from keras_curvature.monitor.report.landscape import landscape
from keras_curvature.monitor.report.reporting import report
from keras_curvature.monitor.stability import stability
from keras_curvature.operators import Identity, LinearOperator
from keras_curvature.optimizers import *  # noqa: F403
from keras_curvature.optimizers.widths import mup_scales
from keras_curvature.solvers import (
    BinomialRoot,
    ConjugateGradient,
    CoupledNewton,
    EigenRoot,
    GradientMoment,
    KroneckerGeometry,
    LowRankGeometry,
    LowRankPart,
    NeumannSeries,
    NewtonSchulz,
    Nystrom,
    PolarExpress,
    Refresh,
    RowPart,
    SecondMoment,
    SketchedRoot,
)
from keras_curvature.steps import (
    ArmijoLineSearch,
    ConstantDamping,
    GridSearch,
    HagerZhang,
    LevenbergMarquardt,
    Nielsen,
    StrongWolfe,
    TrustRegion,
)
from keras_curvature.training.models import CurvatureModel, curved

__version__ = "0.1.0"

__all__ = [
    *optimizers.__all__,  # type: ignore[attr-defined]
    "ArmijoLineSearch",
    "BinomialRoot",
    "ConjugateGradient",
    "ConstantDamping",
    "CoupledNewton",
    "CurvatureModel",
    "EigenRoot",
    "GradientMoment",
    "GridSearch",
    "HagerZhang",
    "Identity",
    "KroneckerGeometry",
    "LevenbergMarquardt",
    "LinearOperator",
    "Linearization",
    "LowRankGeometry",
    "LowRankPart",
    "Needs",
    "NeumannSeries",
    "NewtonSchulz",
    "Nielsen",
    "Nystrom",
    "PolarExpress",
    "Refresh",
    "RowPart",
    "SecondMoment",
    "SketchedRoot",
    "StrongWolfe",
    "TrustRegion",
    "auto",
    "callbacks",
    "curvature",
    "curved",
    "landscape",
    "likelihoods",
    "mup_scales",
    "operators",
    "problems",
    "report",
    "stability",
]
