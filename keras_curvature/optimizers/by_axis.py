"""Shared code of the methods by axes, such as Shampoo and SOAP: variables cut into tiles, and a matrix for each axis.

A tile is a piece of one variable, after merging small neighbouring axes and cutting long axes; a variable that is not
cut is one tile. State is kept per tile: a moment has the tile's shape, a factor is `(n, n)` for an axis of length `n`.
Lists of factors are flat, in the order of `_places`, which holds the tile and the axis of each factor.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.needs import Needs
from keras_curvature.operators import Function, LinearOperator
from keras_curvature.operators.tiles import Tiles
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.lifecycle import Lifecycle
from keras_curvature.solvers import eigenbases
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.typing import Integer, Variables, Vector


class ByAxis(CurvatureOptimizer):
    """Base of the methods with a matrix for each axis."""

    needs = Needs(only_gradients=True)
    reports = {"failed_refreshes": "sum", "step_norm": "mean", "skipped_steps": "sum"}

    def create_tiles(
        self, variables: Variables, merge: int, size: int | None = None, longest: int | None = None,
        vectors: bool = True, sides: str = "all",
    ) -> None:  # fmt: skip
        """Choose the tiles and the axes that get a matrix.

        Axes longer than `longest` (before the cut) get no matrix; vectors get one only if `vectors`. With
        `sides="shortest"` only the shortest of the axes left in a tile gets one. For `merge` and `size` see `Tiles`.
        """
        self._tiles = Tiles([tuple(v.shape) for v in variables], merge, size)
        self._shapes = self._tiles.shapes
        # not `iterations`: Keras also counts steps with a non-finite direction, which do not enter the state
        self._taken = self.add_variable((), dtype="int", name="taken", aggregation="none")
        # eigendecompositions do not support half precision
        wide = any(keras.backend.standardize_dtype(v.dtype) == "float64" for v in variables)
        self._dtype = "float64" if wide else "float32"
        self._places = [
            (i, k) for i, shape in enumerate(self._tiles.origins) for k, n in enumerate(shape)
            if (longest is None or n <= longest) and (vectors or len(shape) > 1)
        ]  # fmt: skip
        if sides == "shortest":
            # of equal ones the last, the outputs of a kernel
            shortest: dict[int, int] = {}
            for i, k in self._places:
                if i not in shortest or self._shapes[i][k] <= self._shapes[i][shortest[i]]:
                    shortest[i] = k
            self._places = list(shortest.items())

    def add_moments(self, name: str, tiles: Iterable[int] | None = None) -> Variables:
        """A variable of zeros for each tile, or for the tiles with the given numbers."""
        tiles = range(len(self._shapes)) if tiles is None else tiles
        return [self.add_variable(self._shapes[i], dtype=self._dtype, name=f"{name}_{i}") for i in tiles]

    def add_matrices(self, name: str, initializer: str = "zeros", dtype: str | None = None) -> Variables:
        """A square variable for each axis that gets a matrix; in half precision only if `dtype` says so."""
        add = self.add_variable if dtype is None else super(Lifecycle, self).add_variable
        return [
            add((self._shapes[i][k],) * 2, initializer, dtype or self._dtype, name=f"{name}_{i}_{k}")
            for i, k in self._places
        ]

    def taken(self) -> tf.Tensor:
        """The number of gradients in the state, a tensor; this step increases it by one."""
        taken = tf.identity(tf.convert_to_tensor(self._taken))
        self.remember(self._taken, taken + 1)
        return taken

    @property
    def period(self) -> int:
        """Steps from one look at the matrices to the next."""
        return self.every if isinstance(self.every, int) else self.every.check_every

    def count_refreshes(self) -> None:
        """Report `refreshes` too, where `every` is a `Refresh`."""
        if not isinstance(self.every, int):
            self.reports = {"refreshes": "sum", **type(self).reports}

    def renew(
        self, variables: Variables, compute: Callable[[], Vector], taken: tf.Tensor, phase: Integer = 0
    ) -> Vector:  # fmt: skip
        """`refresh` every `period` gradients in the state, instead of every `period` `iterations`."""
        phase += tf.cast(self.iterations, taken.dtype) - taken
        return self.refresh(variables, self.period, compute, tf.cast(phase % self.period, self.iterations.dtype))

    def renew_bases(self, variables: Variables, factors: Vector, taken: tf.Tensor, sort: bool) -> Vector:
        """The next bases of eigenvectors: a decomposition of the first factors, then refined when `every` says so."""
        old, adaptive = trees.values(variables), not isinstance(self.every, int)

        def first():
            return in_stacks(eigenbases.decompose, factors)

        def later():
            refine = self.every.basis if adaptive else eigenbases.refine
            return in_stacks(lambda pair: refine(*pair, sort), list(zip(factors, old)))

        new = self.renew(variables, lambda: tf.cond(taken > 0, later, first), taken)
        self._report_refreshes(old, new)
        return new

    def _report_refreshes(self, old, new):
        """How many matrices changed."""
        if not isinstance(self.every, int):
            self.report(refreshes=tf.add_n([tf.cast(tf.reduce_any(a != b), tf.float32) for a, b in zip(old, new)]))

    def split(self, gradients: Vector) -> Vector:
        """The tiles of the gradients, in the dtype of the state."""
        return [tf.cast(tile, self._dtype) for tile in self._tiles.split(gradients)]

    def join(self, tiles: Vector, like: Vector) -> Vector:
        """The vector that the tiles were cut from, in the dtypes of `like`."""
        return [tf.cast(tensor, other.dtype) for tensor, other in zip(self._tiles.join(tiles), like)]

    def operator(self, product: Callable[[Vector], Vector]) -> LinearOperator:
        """A positive definite operator on vectors, from `product`, a function of their tiles."""
        return Function(lambda vector: self.join(product(self.split(vector)), vector), psd=True)

    def by_tile(self, flat: Iterable[Any]) -> list[list[Any]]:
        """Values in the order of `_places` as a list for each tile, with `None` for axes without a matrix."""
        found = [[None] * len(shape) for shape in self._shapes]
        for (i, k), value in zip(self._places, flat):
            found[i][k] = value
        return found

    def correction(self, beta: float, steps: tf.Tensor) -> tf.Tensor:
        """Adam's bias correction `1 - beta^steps`; 1 if `beta` is 1, which means a sum instead of an average."""
        if beta in (0.0, 1.0):
            return tf.constant(1.0, self._dtype)
        return -tf.math.expm1(tf.cast(steps, self._dtype) * math.log(beta))  # `expm1` is exact for beta close to 1

    def average(self, old: Variables, new: Vector, beta: float, begun: tf.Tensor | None = None) -> Vector:
        """`beta old + (1 - beta) new`, or the sum of both if `beta` is 1; if `begun` is false, `beta old`."""
        share = 1.0 if beta == 1 else 1.0 - beta
        if begun is not None:
            share *= tf.cast(begun, self._dtype)
        return [beta * m + share * n for m, n in zip(old, new)]

    def adam(self, m: Vector, v: Vector, steps: tf.Tensor) -> Vector:
        """Adam's step from its two moments after `steps` gradients, as Keras computes it."""
        rate = -tf.sqrt(self.correction(self.beta_2, steps)) / self.correction(self.beta_1, steps)
        return [rate * m_ / (tf.sqrt(v_) + self.epsilon) for m_, v_ in zip(m, v)]

    def adam_scales(self, v: Vector) -> Vector:
        """The positive factor on each entry of the gradient in Adam's last step."""
        return trees.negative(self.adam([tf.ones_like(a) for a in v], v, tf.identity(self._taken.value) - 1))
