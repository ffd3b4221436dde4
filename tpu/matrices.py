"""What a step reduces or keeps beside vectors of weight space: sizes of matrices and diagonals, by the model's layers.

Matrices travel as the package sends them: those of one size in one tensor, cut into as many parts as there are replicas
that compute them (`keras_curvature/solvers/dealing.py`).
"""

import collections
import math

from keras_curvature.linearization.layers import ends
from keras_curvature.operators.tiles import Tiles
from keras_curvature.optimizers import hidden
from keras_curvature.optimizers.by_layer import STACKED


def stacked(items, replicas, largest=math.inf):
    """Sizes of the tensors that hold the results of `items`, tuples of sizes; those of equal items share tensors."""
    sizes = []
    for item, count in collections.Counter(items).items():
        together = 1 if sum(item) > largest else -(-count // replicas)
        for begin in range(0, count, together):
            sizes += [min(together, count - begin) * size for size in item]
    return sizes


def pairs(model):
    """Sizes of the two Kronecker factors of each layer."""
    return [tuple(math.prod(block[:-2]) * n * n for n in block[-2:]) for block in model.blocks]


def of_kernel(block):
    """Size of the kernel of a layer with a bias."""
    *groups, rows, columns = block
    return math.prod(groups) * (rows - 1) * columns


def of_inputs(block, bias=True):
    """Size of the factor of a layer's inputs, of a layer with a bias with or without its row."""
    *groups, rows, _ = block
    return math.prod(groups) * (rows if bias else rows - 1) ** 2


def factors(model, replicas):
    """The factors of all layers, and a diagonal for each variable outside of these."""
    return [[*sum(pairs(model), ()), *model.outside]]


def inverses(model, replicas):
    """A matrix for each factor, each computed on one replica."""
    sizes = stacked(pairs(model), replicas, STACKED)
    return [sizes] if sizes else []


def squares(model, replicas):
    """What EKFAC estimates in its bases: a number for each weight of the layers."""
    return [[math.prod(block) for block in model.blocks]]


def means(model, replicas):
    """Eva's two vectors of each layer, in the call of the gradient."""
    return [[math.prod(block[:-2]) * n for block in model.blocks for n in block[-2:]]]


def signs(model, replicas, everywhere=False):
    """A sign for each kernel between the ends of the model, or for every kernel, each computed on one replica."""
    kernels = model.hidden + model.ends if everywhere else model.hidden
    sizes = stacked([(size,) for size in kernels], replicas, hidden.STACKED)
    return [sizes] if sizes else []


def kernels(variables, at_ends):
    """`(hidden, ends)`: sizes of the kernels among the variables, those that `at_ends` contains apart."""
    ids = {id(v) for v in at_ends}
    found = [v for v in variables if ends.is_kernel(v)]
    sizes = [[math.prod(v.shape) for v in found if (id(v) in ids) == end] for end in (False, True)]
    return tuple(map(tuple, sizes))


def lengths(model, merge, size=None, longest=None, vectors=True):
    """`[[n, ...]]`: for each tile the lengths of the axes that get a matrix."""
    tiles = Tiles(list(model.shapes), merge, size)
    return [
        [n for n, whole in zip(shape, origin) if (longest is None or whole <= longest) and (vectors or len(origin) > 1)]
        for shape, origin in zip(tiles.shapes, tiles.origins)
    ]
