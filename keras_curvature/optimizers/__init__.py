"""One method per file: a direction, carried to the weights by Keras. A new method adds one line here."""

from typing import TYPE_CHECKING

from keras_curvature.optimizers.adahessian import AdaHessian as AdaHessian
from keras_curvature.optimizers.base import CurvatureOptimizer as CurvatureOptimizer
from keras_curvature.optimizers.bfgs import BFGS as BFGS
from keras_curvature.optimizers.curveball import CurveBall as CurveBall
from keras_curvature.optimizers.diagonal_newton import DiagonalNewton as DiagonalNewton
from keras_curvature.optimizers.ekfac import EKFAC as EKFAC
from keras_curvature.optimizers.esgd import ESGD as ESGD
from keras_curvature.optimizers.eva import Eva as Eva
from keras_curvature.optimizers.foof import FOOF as FOOF
from keras_curvature.optimizers.gauss_newton import GaussNewton as GaussNewton
from keras_curvature.optimizers.ggt import GGT as GGT
from keras_curvature.optimizers.hessian_free import HessianFree as HessianFree
from keras_curvature.optimizers.if_shampoo import IFShampoo as IFShampoo
from keras_curvature.optimizers.kbfgs import KBFGS as KBFGS
from keras_curvature.optimizers.kfac import KFAC as KFAC
from keras_curvature.optimizers.kl_shampoo import KLShampoo as KLShampoo
from keras_curvature.optimizers.lbfgs import LBFGS as LBFGS
from keras_curvature.optimizers.lissa import LiSSA as LiSSA
from keras_curvature.optimizers.locoprop import LocoProp as LocoProp
from keras_curvature.optimizers.mfac import MFAC as MFAC
from keras_curvature.optimizers.mkor import MKOR as MKOR
from keras_curvature.optimizers.muon import Muon as Muon
from keras_curvature.optimizers.natural_gradient import NaturalGradient as NaturalGradient
from keras_curvature.optimizers.neumann import Neumann as Neumann
from keras_curvature.optimizers.newton import Newton as Newton
from keras_curvature.optimizers.newton_cg import NewtonCG as NewtonCG
from keras_curvature.optimizers.newton_muon import NewtonMuon as NewtonMuon
from keras_curvature.optimizers.nys_newton_cg import NysNewtonCG as NysNewtonCG
from keras_curvature.optimizers.psgd import PSGD as PSGD
from keras_curvature.optimizers.saddle_free_newton import SaddleFreeNewton as SaddleFreeNewton
from keras_curvature.optimizers.sassha import SASSHA as SASSHA
from keras_curvature.optimizers.scion import Scion as Scion
from keras_curvature.optimizers.seng import SENG as SENG
from keras_curvature.optimizers.shampoo import Shampoo as Shampoo
from keras_curvature.optimizers.singd import SINGD as SINGD
from keras_curvature.optimizers.skfac import SKFAC as SKFAC
from keras_curvature.optimizers.soap import SOAP as SOAP
from keras_curvature.optimizers.sophia import SophiaG as SophiaG
from keras_curvature.optimizers.sophia import SophiaH as SophiaH
from keras_curvature.optimizers.splus import SPlus as SPlus
from keras_curvature.optimizers.square_root_free_adam import SquareRootFreeAdam as SquareRootFreeAdam
from keras_curvature.optimizers.tnt import TNT as TNT
from keras_curvature.optimizers.two_loop_neumann import TwoLoopNeumann as TwoLoopNeumann

# A type checker cannot compute this list. Without it, it takes all names above as public.
if not TYPE_CHECKING:
    __all__ = [
        name for name, value in list(vars().items())
        if isinstance(value, type) and issubclass(value, CurvatureOptimizer)
    ]  # fmt: skip
