"""Linear operators on weight space. Operators multiply; solvers solve."""

from keras_curvature.operators.base import Function, Identity, LinearOperator, Scaled, Sum, dense
from keras_curvature.operators.diagonal import Diagonal
from keras_curvature.operators.kronecker import BlockDiagonal, InEigenbasis, KroneckerProduct
from keras_curvature.operators.low_rank import LowRankSquare
from keras_curvature.operators.masked import Masked

__all__ = [
    "BlockDiagonal",
    "Diagonal",
    "Function",
    "Identity",
    "InEigenbasis",
    "KroneckerProduct",
    "LinearOperator",
    "LowRankSquare",
    "Masked",
    "Scaled",
    "Sum",
    "dense",
]
