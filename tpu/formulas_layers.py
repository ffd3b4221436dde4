"""The formulas of `formulas.py` for methods that learn inverses from means, or have a loss for each layer."""

import collections
import math

from costs import Method, Work
from matrices import STACKED, means, of_inputs, stacked

import keras_curvature as kc
from keras_curvature.operators.tiles import Tiles


def moments(model, replicas):
    """The second moment of the inputs of each layer."""
    return [[of_inputs(block) for block in model.blocks]]


def kbfgs(optimizer, step):
    """The means of a layer's inputs and slopes, in the call of the gradient, the second moments of its inputs; the
    means again after the step, and the loss. In the first steps the inverses.
    """

    def of(model, replicas):
        return means(model, replicas) + moments(model, replicas) + means(model, replicas)

    def inverted(model, replicas):
        return [stacked([(of_inputs(block),) for block in model.blocks], replicas, STACKED)]

    def kept(model):
        of_slopes = sum(math.prod(b[:-2]) * (b[-1] ** 2 + 2 * b[-1]) for b in model.blocks)
        return 2 * sum(map(of_inputs, model.blocks)) + len(model.blocks) + of_slopes

    begin = Work(reductions=2, vectors=1, scalars=2, others=of, forward=2, backward=1, slopes=1)
    return Method(
        {"step": begin, "cond": Work(others=inverted)}, 1, 7, 2, {"cond": 0}, kept=kept, matrices=True, traffic=13,
    )  # fmt: skip


def mkor(optimizer, step):
    """The means of a layer's inputs and slopes now and then, and two inverses for each layer."""

    def kept(model):
        return sum(math.prod(b[:-2]) * n * n for b in model.blocks for n in b[-2:])

    return Method(
        {"step": step, "cond": Work(others=means)}, 1, 5, 2, {"cond": 1 / optimizer.every}, kept=kept, matrices=True,
        traffic=9,
    )  # fmt: skip


def locoprop(optimizer, step):
    """Of layers with a squared loss the second moments of the inputs; of the others, in each local step, the change of
    the gradient.
    """

    def split(model):
        matched = model.matched if optimizer.loss == "matching" else ()
        matched = matched or (False,) * len(model.blocks)
        return [[b for b, own in zip(model.blocks, matched) if own == side] for side in (False, True)]

    def of(model, replicas):
        squared, _ = split(model)
        return [[of_inputs(block) for block in squared]] if squared else []

    def changes(model, replicas):
        _, matching = split(model)
        return [[math.prod(block) for block in matching]] if matching else []

    return Method(
        {"step": Work(**{**step.__dict__, "others": of}), "while": Work(others=changes)}, 2, 6, 1,
        {"while": optimizer.steps}, matrices=True, traffic=8 + 8 * optimizer.steps,
    )  # fmt: skip


def if_shampoo(optimizer, step):
    """A factor for each axis, and its momentum; those of one weight are one item of work."""

    def of(model):
        shapes = Tiles(list(model.shapes), optimizer.merge).shapes
        found = [(shape, [n * n for n in shape if n <= optimizer.max_dimension]) for shape in shapes]
        return [(shape, sizes) for shape, sizes in found if sizes]

    def moved(model, replicas):
        items = collections.Counter(shape for shape, _ in of(model))
        sizes = dict(of(model))
        return [[n for shape, count in items.items() for n in stacked([(*sizes[shape],) * 2] * count, replicas)]]

    return Method(
        {"step": step, "cond": Work(others=moved)}, 1, 10, turns={"cond": 1 / optimizer.every},
        kept=lambda model: sum(2 * sum(sizes) + 1 for _, sizes in of(model)), matrices=True, traffic=9,
    )  # fmt: skip


FORMULAS = {kc.KBFGS: kbfgs, kc.MKOR: mkor, kc.LocoProp: locoprop, kc.IFShampoo: if_shampoo}
