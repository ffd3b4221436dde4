"""Shared code of the methods with a matrix sign: which weights are matrices between the ends of the model, their signs.

On a curved model both ends are read from the model. A plain `keras.Model` passes its optimizer variables alone; there
the last kernel counts as the output layer. Where the two differ, the config of the optimizer notes the ends that it
has used: a file of a curved model is loaded as a plain one, which trains on with the same ends.
"""

import warnings
import weakref
from typing import Any, Self

import keras
import tensorflow as tf

from keras_curvature.linearization.layers import ends
from keras_curvature.operators.unfolding import Unfolding
from keras_curvature.optimizers.by_axis import ByAxis
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.solvers.matrix_parts import MatrixPart
from keras_curvature.solvers.matrix_sign import MatrixSign, NewtonSchulz
from keras_curvature.typing import Config, Variables, Vector

# In four steps below this bound, singular values of a hundredth of it end in [0.92, 1.15]; see `NewtonSchulz`.
SIGN = NewtonSchulz("quintic", steps=4, bound="gram")
STACKED = 2**20  # larger matrices are not copied into a stack with others


class HiddenMatrices(ByAxis):
    """Base of the methods that take the sign of matrices between the ends of the model."""

    _ends: tuple | None = None  # `(place, name, shape)` of the variables at the ends, where a plain model shows others

    def meet(self, model: keras.Model | None) -> None:
        """Remember the curved model, in which embeddings and output layers are found."""
        if model is not None:
            self._model = weakref.ref(model)

    def ends(self, variables: Variables) -> Variables:
        """The kernels of embeddings and of the output layers, as far as they are known; noted for the config.

        They are read from the curved model. Without one, they are those that were noted last.
        """
        model, plain = self.trained_model(), ends.ends_of_variables(variables)
        if model is not None and _has_all(model, variables):
            found = _chosen(variables, ends.ends_of_model(model))
            self._ends = None if found == _chosen(variables, plain) else found
        elif self._ends is not None and not all(_fits(variables, *end) for end in self._ends):
            warnings.warn(
                f"`{type(self).__name__}`: the config notes the embeddings and output layers of a model with other "
                f"weights, {self._ends}, which are ignored: the last kernel is taken for the output layer. Curve the "
                "model (`keras_curvature.curved`), which shows its layers.",
                stacklevel=3,
            )
            self._ends = None
        return plain if self._ends is None else [variables[place] for place, *_ in self._ends]

    def get_config(self) -> Config:
        """The config, with the ends of the model where a plain model does not show them."""
        config = super().get_config()
        if self._ends is not None:
            config["ends"] = [[i, name, list(shape)] for i, name, shape in self._ends]
        return config

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict[str, Any] | None = None) -> Self:
        """A new optimizer from a config, without the state."""
        config = dict(config)
        found = config.pop("ends", None)
        made = super().from_config(config, custom_objects)
        made._ends = None if found is None else tuple((i, name, tuple(shape)) for i, name, shape in found)
        return made

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
        return self._turned(in_stacks(sign.sign, self._turned(matrices), self._grouped(), largest=STACKED))

    def create_parts(self, part: MatrixPart) -> Variables:
        """The state of `part` for each chosen tile: random columns, the same in each run; empty if it has none."""
        states = []
        for i, u in zip(self._hidden, self._unfoldings):
            own = part.state_shape(min(u.size), max(u.size))
            if own is not None:

                def initial(shape, dtype, seed=i):
                    return tf.random.stateless_normal(shape, (0, seed), dtype=dtype)

                shape = (*u.stacked[:-2], *own)
                states.append(self.add_variable(shape, initial, self._dtype, name=f"part_{i}"))
        return states

    def parts(self, tiles: Vector, states: Vector, part: MatrixPart, sign: MatrixSign) -> tuple[Vector, Vector, Vector]:
        """`(steps, parts, states)` of the chosen tiles, the first two as matrices."""
        wide = self._turned([u.matrix(tile) for u, tile in zip(self._unfoldings, tiles)])
        own = states or [None] * len(wide)  # tensors alone may stand in the items that are stacked
        items = list(zip(wide, states)) if states else [(B,) for B in wide]

        def factors(item):
            return part.factors(item[0], item[1] if states else None, sign)

        found = in_stacks(factors, items, self._grouped(), largest=STACKED)
        results = [part.step(B, state, factors) for B, state, factors in zip(wide, own, found)]
        steps, taken, states = ([result[k] for result in results] for k in range(3))
        return self._turned(steps), self._turned(taken), [state for state in states if state is not None]

    def _turned(self, matrices):
        """Tall matrices of the chosen tiles transposed, so that all are wide; and back."""
        tall = [u.size[0] > u.size[1] for u in self._unfoldings]
        return [tf.linalg.matrix_transpose(X) if t else X for X, t in zip(matrices, tall)]

    def _grouped(self):
        return [u.heads is not None for u in self._unfoldings]


def _has_all(model, variables):
    """Whether the model trains these variables."""
    return {id(v) for v in variables} <= {id(v) for v in model.trainable_variables}


def _chosen(variables, found):
    """`(place, name, shape)` of those variables that were found, in the order of all."""
    here = {id(v) for v in found}
    return tuple((i, v.name, tuple(v.shape)) for i, v in enumerate(variables) if id(v) in here)


def _fits(variables, i, name, shape):
    return i < len(variables) and (variables[i].name, tuple(variables[i].shape)) == (name, shape)


def _full(variables):
    """The variables with a tile: those with entries."""
    return [v for v in variables if 0 not in v.shape]
