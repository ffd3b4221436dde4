"""From a model and a batch to operators on weight space. Never solves, never steps."""

from keras_curvature.curvature.gauss_newton import GaussNewton
from keras_curvature.curvature.linearization import Gradients, Linearization

__all__ = ["GaussNewton", "Gradients", "Linearization"]
