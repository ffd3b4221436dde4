"""Kronecker-factored operators: a Kronecker product for each block of weights.

The weights of a block are a matrix `W` `(d_in, d_out)`. With `vec(W)` its rows, one after the other,

    (A (x) G) vec(W) = vec(A W G)

so a product costs `d_in^2 d_out + d_in d_out^2` multiplications, and the `(d_in d_out)^2` entries of the matrix are
never formed. A factor is a symmetric matrix, or a vector if it is diagonal. `W`, `A` and `G` may have a leading axis of
groups, with one product for each group.
"""

import dataclasses
from typing import Any

import tensorflow as tf

from keras_curvature.operators.base import LinearOperator
from keras_curvature.typing import Vector


@dataclasses.dataclass(frozen=True)
class KroneckerProduct(LinearOperator):
    """`[W] -> [A W G]`, for one matrix `W` or a stack with one matrix for each group.

    Args:
        A: Factor of the inputs, `(d_in, d_in)`, or `(d_in,)` if it is diagonal.
        G: Factor of the output gradients, `(d_out, d_out)`, or `(d_out,)` if it is diagonal.
        psd: Whether both are positive semi-definite. Defaults to `True`.
    """

    A: tf.Tensor
    G: tf.Tensor
    psd: bool = True

    def multiply(self, vector: Vector) -> Vector:
        (W,) = vector
        return [times(from_left(self.A, W), self.G)]


@dataclasses.dataclass(frozen=True)
class InEigenbasis(LinearOperator):
    """`[W] -> [U_A (s * (U_A' W U_G)) U_G']`: diagonal in the eigenbases of the factors of a Kronecker product.

    Args:
        U_A: Orthonormal eigenvectors of `A` as columns; `None` if `A` is diagonal.
        U_G: Orthonormal eigenvectors of `G`; `None` if `G` is diagonal.
        values: `s`, the eigenvalues, with the shape of `W`.
        psd: Whether no eigenvalue is negative. Defaults to `True`.
    """

    U_A: tf.Tensor | None
    U_G: tf.Tensor | None
    values: tf.Tensor
    psd: bool = True

    def multiply(self, vector: Vector) -> Vector:
        (W,) = vector
        return [out_of_basis(self.values * into_basis(W, self.U_A, self.U_G), self.U_A, self.U_G)]


@dataclasses.dataclass(frozen=True)
class BlockDiagonal(LinearOperator):
    """A block-diagonal operator: one operator for each block of weights, and a diagonal for the other weights.

    Args:
        blocks: A list of `Block` (see `layers/kronecker.py`): `matrix(vector)` returns the weights of a block as a
            matrix, and `scatter(matrix, vector)` writes the matrix back into a vector.
        operators: For each block, an operator on `[matrix]`.
        diagonal: `{index: entries}` for tensors of a vector outside all blocks. The product is zero for weights that
            are neither in a block nor here.
        psd: Whether all operators and the diagonal are positive semi-definite. Defaults to `True`.
    """

    blocks: list[Any]
    operators: list[LinearOperator]
    diagonal: dict[int, tf.Tensor]
    psd: bool = True

    def multiply(self, vector: Vector) -> Vector:
        product = [tf.zeros_like(v) for v in vector]
        for index, entries in self.diagonal.items():
            product[index] = entries * vector[index]
        for block, operator in zip(self.blocks, self.operators):
            (image,) = operator @ [block.matrix(vector)]
            block.scatter(image, product)
        return product


def from_left(A, W):
    """`A W`."""
    return A[..., tf.newaxis] * W if _is_diagonal(A, W) else tf.matmul(A, W)


def times(W, G):
    """`W G`."""
    return W * G[..., tf.newaxis, :] if _is_diagonal(G, W) else tf.matmul(W, G)


def into_basis(W, U_A, U_G):
    """`U_A' W U_G`; a basis of `None` is the identity."""
    W = W if U_A is None else tf.matmul(U_A, W, transpose_a=True)
    return W if U_G is None else tf.matmul(W, U_G)


def out_of_basis(W, U_A, U_G):
    """`U_A W U_G'`."""
    W = W if U_A is None else tf.matmul(U_A, W)
    return W if U_G is None else tf.matmul(W, U_G, transpose_b=True)


def _is_diagonal(factor, W):
    return factor.shape.rank < W.shape.rank
