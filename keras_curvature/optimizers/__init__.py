"""One method per file: a direction, carried to the weights by Keras."""

from keras_curvature.optimizers.adahessian import AdaHessian
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.curveball import CurveBall
from keras_curvature.optimizers.diagonal_newton import DiagonalNewton
from keras_curvature.optimizers.ekfac import EKFAC
from keras_curvature.optimizers.esgd import ESGD
from keras_curvature.optimizers.eva import Eva
from keras_curvature.optimizers.hessian_free import HessianFree
from keras_curvature.optimizers.kfac import KFAC
from keras_curvature.optimizers.kl_shampoo import KLShampoo
from keras_curvature.optimizers.neumann import Neumann
from keras_curvature.optimizers.psgd import PSGD
from keras_curvature.optimizers.shampoo import Shampoo
from keras_curvature.optimizers.soap import SOAP
from keras_curvature.optimizers.sophia import SophiaG, SophiaH
from keras_curvature.optimizers.square_root_free_adam import SquareRootFreeAdam
from keras_curvature.optimizers.two_loop_neumann import TwoLoopNeumann

__all__ = [
    "EKFAC",
    "ESGD",
    "KFAC",
    "PSGD",
    "SOAP",
    "AdaHessian",
    "CurvatureOptimizer",
    "CurveBall",
    "DiagonalNewton",
    "Eva",
    "HessianFree",
    "KLShampoo",
    "Neumann",
    "Shampoo",
    "SophiaG",
    "SophiaH",
    "SquareRootFreeAdam",
    "TwoLoopNeumann",
]
