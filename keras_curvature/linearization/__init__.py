"""From a model and a batch to operators on weight space. Never solves, never steps."""

from keras_curvature.linearization.gauss_newton import GaussNewton
from keras_curvature.linearization.gradients import Gradients
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs

__all__ = ["GaussNewton", "Gradients", "Linearization", "Needs"]
