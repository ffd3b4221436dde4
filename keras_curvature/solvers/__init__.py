"""Solvers of `A x = b`. They know operators; never a loss, a batch or a variable."""

from keras_curvature.solvers.base import Solution, Solver
from keras_curvature.solvers.conjugate_gradient import ConjugateGradient
from keras_curvature.solvers.neumann import NeumannSeries

__all__ = ["ConjugateGradient", "NeumannSeries", "Solution", "Solver"]
