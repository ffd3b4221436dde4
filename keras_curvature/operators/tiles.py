"""Variables cut into tiles: tensors with few axes, each axis short enough for a square matrix.

A tile is a piece of one variable. Some papers on Shampoo call it a block; here a block is a diagonal block of the
curvature matrix.
"""

import dataclasses
import math

import tensorflow as tf

from keras_curvature.operators import axes


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a list of variables is cut into tiles: neighbouring small axes are merged, then long axes are cut.

    An empty variable has no tile.

    Args:
        variables: Shapes of the variables, a list of tuples.
        merge: Longest axis that merging may make, an integer.
        size: Longest axis of a tile, an integer; `None`: no axis is cut. Defaults to `None`.
    """

    variables: list
    merge: int
    size: int | None = None

    @property
    def shapes(self):
        """The shapes of all tiles, variable by variable."""
        found = []
        for shape in self._merged():
            rows = [()]
            for length in shape:
                rows = [(*row, part) for row in rows for part in axes.cut(length, self.size or length)]
            found += rows
        return found

    @property
    def origins(self):
        """For each tile, the merged shape of its variable."""
        found = []
        for shape in self._merged():
            found += [shape] * self._parts(shape)
        return found

    def split(self, vector):
        """Cut a list of tensors into tiles, one flat list."""
        tiles = []
        full = [tensor for tensor in vector if 0 not in tensor.shape]
        for tensor, shape in zip(full, self._merged(), strict=True):
            tiles += axes.split(tf.reshape(tensor, shape), self.size or max(shape))
        return tiles

    def join(self, tiles):
        """Put the tiles together to the list of tensors, the inverse of `split`."""
        vector, tiles, merged = [], list(tiles), iter(self._merged())
        for whole in self.variables:
            if 0 in whole:
                vector.append(tf.zeros(whole))
                continue
            shape = next(merged)
            parts = self._parts(shape)
            tensor, tiles = axes.join(tiles[:parts], shape, self.size or max(shape)), tiles[parts:]
            vector.append(tf.reshape(tensor, whole))
        return vector

    def _parts(self, shape):
        return math.prod(len(axes.cut(length, self.size or length)) for length in shape)

    def _merged(self):
        return [axes.merged_shape(shape, self.merge) for shape in self.variables if 0 not in shape]
