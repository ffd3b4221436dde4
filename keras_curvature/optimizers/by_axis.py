"""Shared code of Shampoo, SOAP and KL-Shampoo: variables in blocks, and a matrix for each axis of a block.

A block is a variable with small neighbouring axes merged and long axes cut. State is kept per block: a moment has the
block's shape, a factor is `(n, n)` for an axis of length `n`. Lists of factors are flat, in the order of `_places`,
which holds the block and the axis of each factor.
"""

import math

import keras
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Function
from keras_curvature.operators.blocks import Blocks
from keras_curvature.optimizers.base import CurvatureOptimizer


class ByAxis(CurvatureOptimizer):
    """Base of the methods with a matrix per axis; see the module."""

    needs = Needs(only_gradients=True)
    reports = {"failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def create_blocks(self, variables, merge, size=None, longest=None, vectors=True):
        """Choose blocks and places.

        Axes longer than `longest` (before the cut) get no matrix; vectors get one only if `vectors`.
        """
        self._blocks = Blocks([tuple(v.shape) for v in variables], merge, size)
        self._shapes = self._blocks.shapes
        # not `iterations`: Keras also counts steps with a non-finite direction, which do not enter the state
        self._taken = self.add_variable((), dtype="int", name="taken", aggregation="none")
        # eigendecompositions do not support half precision
        wide = any(keras.backend.standardize_dtype(v.dtype) == "float64" for v in variables)
        self._dtype = "float64" if wide else "float32"
        self._places = [
            (i, k) for i, shape in enumerate(self._blocks.origins) for k, n in enumerate(shape)
            if (longest is None or n <= longest) and (vectors or len(shape) > 1)
        ]  # fmt: skip

    def add_moments(self, name, blocks=None):
        """A variable of zeros for each block, or for the given blocks."""
        blocks = range(len(self._shapes)) if blocks is None else blocks
        return [self.add_variable(self._shapes[i], dtype=self._dtype, name=f"{name}_{i}") for i in blocks]

    def add_matrices(self, name, initializer="zeros"):
        """A square variable for each place."""
        return [
            self.add_variable((self._shapes[i][k],) * 2, initializer, self._dtype, name=f"{name}_{i}_{k}")
            for i, k in self._places
        ]

    def taken(self):
        """The number of gradients in the state, a tensor; it is noted to increase by one with this step."""
        taken = tf.identity(tf.convert_to_tensor(self._taken))
        self.remember(self._taken, taken + 1)
        return taken

    def renew(self, variables, compute, taken, phase=0):
        """`refresh` at each `every`-th of the steps `taken`, and not of all `iterations`."""
        phase += tf.cast(self.iterations, taken.dtype) - taken
        return self.refresh(variables, self.every, compute, tf.cast(phase % self.every, self.iterations.dtype))

    def split(self, gradients):
        """The gradients' blocks, in the precision of the state."""
        return [tf.cast(block, self._dtype) for block in self._blocks.split(gradients)]

    def join(self, blocks, like):
        """The vector made of the blocks, in the dtypes of `like`."""
        return [tf.cast(tensor, other.dtype) for tensor, other in zip(self._blocks.join(blocks), like)]

    def operator(self, product):
        """A positive definite operator on vectors, from one on their blocks."""
        return Function(lambda vector: self.join(product(self.split(vector)), vector), psd=True)

    def by_block(self, flat):
        """A flat list grouped by block: a list over the block's axes, with `None` for axes without a value."""
        found = [[None] * len(shape) for shape in self._shapes]
        for (i, k), value in zip(self._places, flat):
            found[i][k] = value
        return found

    def correction(self, beta, steps):
        """`1 - beta^steps`, the sum of the weights in an average from zero; 1 where `beta` is 1, which means a sum."""
        if beta in (0.0, 1.0):
            return tf.constant(1.0, self._dtype)
        return -tf.math.expm1(tf.cast(steps, self._dtype) * math.log(beta))  # no digits lost where beta is close to 1

    def average(self, old, new, beta, begun=None):
        """`beta old + (1 - beta) new`, or their sum if `beta` is 1; without `begun`, `new` is left out."""
        share = 1.0 if beta == 1 else 1.0 - beta
        if begun is not None:
            share *= tf.cast(begun, self._dtype)
        return [beta * m + share * n for m, n in zip(old, new)]

    def adam(self, m, v, steps):
        """Adam's step from its two moments after `steps` gradients, in the form of Keras and PyTorch."""
        rate = -tf.sqrt(self.correction(self.beta_2, steps)) / self.correction(self.beta_1, steps)
        return [rate * m_ / (tf.sqrt(v_) + self.epsilon) for m_, v_ in zip(m, v)]

    def adam_scales(self, v):
        """The factors on the entries of the gradient in Adam's last step, without the sign."""
        return trees.negative(self.adam([tf.ones_like(a) for a in v], v, tf.identity(self._taken.value) - 1))
