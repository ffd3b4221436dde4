"""Shared code of the methods with a matrix sign: which weights are matrices between the ends of the model, their signs.

On a curved model both ends are read from the model. A plain `keras.Model` passes its optimizer variables alone; there
the last kernel counts as the output layer.
"""

import weakref

import keras
import tensorflow as tf

from keras_curvature.linearization.layers import ends
from keras_curvature.operators.unfolding import Unfolding
from keras_curvature.optimizers.by_axis import ByAxis
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.solvers.matrix_sign import MatrixSign, NewtonSchulz
from keras_curvature.typing import Variables, Vector

# In four steps below this bound, singular values of a hundredth of it end in [0.92, 1.15]; see `NewtonSchulz`.
SIGN = NewtonSchulz("quintic", steps=4, bound="gram")
STACKED = 2**20  # larger matrices are not copied into a stack with others


class HiddenMatrices(ByAxis):
    """Base of the methods that take the sign of matrices between the ends of the model."""

    def meet(self, model: keras.Model | None) -> None:
        """Remember the curved model, in which embeddings and output layers are found."""
        if model is not None:
            self._model = weakref.ref(model)

    def ends(self, variables: Variables) -> Variables:
        """The kernels of embeddings and of the output layers, as far as they are known."""
        model = self.trained_model()
        return ends.ends_of_variables(variables) if model is None else ends.ends_of_model(model)

    def choose_hidden(self, variables: Variables, left: Variables, per_head: bool = False) -> None:
        """Choose the tiles with a sign: `_hidden`, their numbers, and `_unfoldings`; all kernels but those `left`."""
        left_out = {id(v) for v in left}
        self._hidden = [
            i for i, (v, shape) in enumerate(zip(_full(variables), self._shapes, strict=True))
            if ends.is_kernel(v) and len(shape) > 1 and id(v) not in left_out
        ]  # fmt: skip
        self._unfoldings = [Unfolding(self._shapes[i], per_head) for i in self._hidden]

    def hidden_variables(self, variables: Variables) -> Variables:
        """The variables of the chosen tiles."""
        full = _full(variables)
        return [full[i] for i in self._hidden]

    def signs(self, tiles: Vector, sign: MatrixSign) -> Vector:
        """The signs of the chosen tiles, as matrices; those of one size together, and tall ones as wide ones."""
        matrices = [u.matrix(tile) for u, tile in zip(self._unfoldings, tiles)]
        tall = [u.size[0] > u.size[1] for u in self._unfoldings]
        grouped = [u.heads is not None for u in self._unfoldings]
        wide = [tf.linalg.matrix_transpose(X) if t else X for X, t in zip(matrices, tall)]
        found = in_stacks(sign.sign, wide, grouped, largest=STACKED)
        return [tf.linalg.matrix_transpose(X) if t else X for X, t in zip(found, tall)]


def _full(variables):
    """The variables with a tile: those with entries."""
    return [v for v in variables if 0 not in v.shape]
