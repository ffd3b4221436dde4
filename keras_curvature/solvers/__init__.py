"""Solvers of `A x = b`, inverses, roots, eigenvalues and traces. They know operators, but no loss or variable."""

from keras_curvature.solvers.base import Solution, Solver
from keras_curvature.solvers.conjugate_gradient import ConjugateGradient
from keras_curvature.solvers.kronecker_geometry import KroneckerGeometry
from keras_curvature.solvers.low_rank import LowRankGeometry
from keras_curvature.solvers.matrix_parts import LowRankPart, RowPart
from keras_curvature.solvers.matrix_sign import NewtonSchulz, PolarExpress
from keras_curvature.solvers.neumann import NeumannSeries
from keras_curvature.solvers.nystrom import Nystrom
from keras_curvature.solvers.refresh import Refresh
from keras_curvature.solvers.roots import CoupledNewton, EigenRoot
from keras_curvature.solvers.running_roots import BinomialRoot, SketchedRoot
from keras_curvature.solvers.second_moment import GradientMoment, SecondMoment

__all__ = [
    "BinomialRoot",
    "ConjugateGradient",
    "CoupledNewton",
    "EigenRoot",
    "GradientMoment",
    "KroneckerGeometry",
    "LowRankGeometry",
    "LowRankPart",
    "NeumannSeries",
    "NewtonSchulz",
    "Nystrom",
    "PolarExpress",
    "Refresh",
    "RowPart",
    "SecondMoment",
    "SketchedRoot",
    "Solution",
    "Solver",
]
