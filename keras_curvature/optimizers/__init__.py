"""One method per file: a direction, carried to the weights by Keras."""

from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.curveball import CurveBall
from keras_curvature.optimizers.hessian_free import HessianFree
from keras_curvature.optimizers.neumann import Neumann
from keras_curvature.optimizers.two_loop_neumann import TwoLoopNeumann

__all__ = ["CurvatureOptimizer", "CurveBall", "HessianFree", "Neumann", "TwoLoopNeumann"]
