"""The curvature of a model as one operator with questions."""

import re

from keras_curvature import trees
from keras_curvature.curvature.probes import Probes
from keras_curvature.operators import LinearOperator


def curvature(
    model, data, kind="hessian", layers=None, examples=None, batch_size=None, training=False, seed=0,
):  # fmt: skip
    probes = Probes(model, data, kind, examples, batch_size, training, seed)
    return Curvature(probes, layers)


class Curvature(LinearOperator):
    def __init__(self, probes, layers=None):
        self.probes = probes
        self.layers = layers_of(probes.model)

    @property
    def variables(self):
        return self.probes.variables

    @property
    def psd(self):
        return self.probes.psd

    @property
    def loss(self):
        return self.probes.loss()

    @property
    def gradient(self):
        return self.probes.gradient()

    def multiply(self, vector):
        return self.probes.product(vector)


def layers_of(model):
    """`{name: [indices of trainable variables]}` of the leaf layers of a model that have any, in its order."""
    index = {id(v): i for i, v in enumerate(model.trainable_variables)}
    found = {}
    for i, v in enumerate(model.trainable_variables):
        found.setdefault(v.path.rsplit("/", 1)[0], []).append(i)
    return found
