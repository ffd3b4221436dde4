"""PSGD against its author's own code, given the same random numbers, and against the matrices that it shall find."""

import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat

from keras_curvature import Linearization, curved
from keras_curvature.operators.base import dense
from keras_curvature.optimizers import psgd
from keras_curvature.optimizers.psgd import PSGD
from keras_curvature.solvers.low_rank import LowRankGeometry
from keras_curvature.solvers.whitening import KroneckerGeometry

REFERENCE = pathlib.Path(__file__).parent / "reference"
# the settings of each file; see its README
RUNS = {
    "kronecker_whitening": {"learning_rate": 0.02, "clip": (0.9, 1.5)},
    "kronecker_momentum": {
        "learning_rate": 0.02, "kind": "momentum", "momentum": 0.9,
        "geometry": KroneckerGeometry(rate=0.2, beta=0.5, max_size=20, max_skew=1e9),
    },
    "kronecker_newton": {"learning_rate": 0.1, "kind": "newton", "momentum": 0.9},
    "low_rank_whitening": {"learning_rate": 0.02, "geometry": LowRankGeometry(rank=3), "clip": (0.5, 1.2)},
    "low_rank_momentum": {
        "learning_rate": 0.02, "kind": "momentum", "momentum": 0.9, "geometry": LowRankGeometry(rank=3, initial=0.7),
    },
    "low_rank_newton": {
        "learning_rate": 0.1, "kind": "newton", "momentum": 0.5, "geometry": LowRankGeometry(rank=3),
        "global_clipnorm": 0.5,
    },
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("in_float64")


class Recorded:
    """`Draws` that hands out given numbers in their order."""

    def __init__(self, normals, uniforms):
        self._normals, self._uniforms, self.taken = normals, uniforms, [0, 0]

    def normal(self, shape, dtype):
        start, count = self.taken[0], int(np.prod(shape))
        self.taken[0] += count
        return tf.cast(tf.reshape(self._normals[start : start + count], shape), dtype)

    def normal_like(self, vector):
        return [self.normal(a.shape, a.dtype) for a in vector]

    def uniform(self, dtype):
        self.taken[1] += 1
        return tf.cast(self._uniforms[self.taken[1] - 1], dtype)


def network(arrays):
    """A convolution, a layer of four and a layer of one unit: axes of length one, a scalar, a tensor of four axes."""
    model = keras.Sequential([
        keras.Input((5, 5, 2)), keras.layers.Conv2D(3, 2, activation="tanh"), keras.layers.Flatten(),
        keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1),
    ])  # fmt: skip
    model.set_weights(arrays)
    return curved(model)


def state(optimizer, letter):
    """The state variables whose names begin with a letter, as one vector."""
    return flat([v for v in optimizer._fitted if v.name.startswith(f"{letter}")])


@pytest.mark.parametrize("name", RUNS)
def test_trajectory_is_that_of_the_authors_code(name):
    reference = np.load(REFERENCE / f"psgd_{name}.npz")
    model, optimizer = network([reference[f"w{i}_init"] for i in range(6)]), PSGD(**RUNS[name])
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    for letter in "UV":
        if f"{letter}_init" in reference:
            rows = [v for v in optimizer._fitted if v.name.startswith(letter)]
            cuts = np.cumsum([v.shape[0] for v in rows])[:-1]
            for variable, value in zip(rows, np.split(reference[f"{letter}_init"], cuts)):
                variable.assign(value)
    counts = [int(reference[f"{kind}_per_step"]) for kind in ("normals", "uniforms")]

    @tf.function
    def step(x, y, normals, uniforms):
        draws = Recorded(normals, uniforms)
        with mock.patch.object(psgd, "Draws", lambda seed: draws):
            lin = Linearization(model, x, y)
            loss = lin.loss
            optimizer.step(lin)
        assert draws.taken == counts
        return loss

    normal, uniform = np.random.RandomState(3), np.random.RandomState(4)
    for t, batch in enumerate(reference["order"].astype(int)):
        rows = slice(8 * batch, 8 * batch + 8)
        numbers = normal.standard_normal(counts[0]), reference["uniform_scale"] * uniform.uniform(size=counts[1])
        loss = step(reference["x"][rows], reference["y"][rows], *(tf.constant(n) for n in numbers))
        np.testing.assert_allclose(float(loss), reference["loss"][t], 1e-9)
        np.testing.assert_allclose(flat(model.trainable_variables), reference["weights_flat"][t], 1e-8, 1e-9)
    assert t == 19
    np.testing.assert_allclose(state(optimizer, "L"), reference["L"], 1e-8)
    if "Q" in reference:
        np.testing.assert_allclose(state(optimizer, "Q"), reference["Q"], 1e-7, 1e-8)
    else:
        P = optimizer._geometry.operator([v.value for v in optimizer._fitted], None)
        diagonal = np.diag(dense(P, [v.value for v in model.trainable_variables]))
        np.testing.assert_allclose(diagonal, reference["P"], 1e-7)
