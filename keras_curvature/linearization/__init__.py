"""From a model and a batch to operators on weight space. Never solves, never steps."""

from keras_curvature.linearization.gauss_newton import GaussNewton
from keras_curvature.linearization.linearization import Gradients, Linearization

__all__ = ["GaussNewton", "Gradients", "Linearization"]
