"""PSGD against its author's own code, given the same random numbers, and against the matrices that it shall find."""

import json
import math
import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat
from selection import some

from keras_curvature import Linearization, curved
from keras_curvature.operators import low_rank
from keras_curvature.operators.base import Function, dense
from keras_curvature.optimizers import psgd
from keras_curvature.optimizers.psgd import PSGD
from keras_curvature.solvers.kronecker_geometry import KroneckerGeometry
from keras_curvature.solvers.low_rank import LowRankGeometry
from keras_curvature.solvers.whitening import Draws

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

    def uniform(self, dtype, shape=()):
        start, count = self.taken[1], int(np.prod(shape))
        self.taken[1] += count
        return tf.cast(tf.reshape(self._uniforms[start : start + count], shape), dtype)


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


@pytest.mark.parametrize("name", some(RUNS, ["kronecker_whitening", "low_rank_newton"]))
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


# What is found: state in, state out, without an optimizer.


def fitted(plan, geometry, shapes, matrix, kind):
    """`P` after each `(rate, steps)` of the plan, of pairs `(v, matrix v)`; for whitening of `h = matrix v` alone."""
    zeros = [tf.zeros(shape, tf.float64) for shape in shapes]
    sizes = [int(np.prod(shape)) for shape in shapes]

    def response(v):
        product = tf.linalg.matvec(matrix, tf.concat([tf.reshape(a, [-1]) for a in v], 0))
        return [tf.reshape(part, a.shape) for part, a in zip(tf.split(product, sizes), v)]

    @tf.function
    def run(rate, start, end, state):
        made = geometry()
        object.__setattr__(made, "rate", rate)  # a tensor, for one trace; a component takes numbers

        def step(k, state):
            draws = Draws(k)
            v = draws.normal_like(zeros)
            return k + 1, made.fit(state, v if kind == "newton" else None, response(v), draws)

        return tf.while_loop(lambda k, state: k < end, step, (start, state))

    k, found, state = tf.constant(0), [], [
        (keras.initializers.get(initial) if isinstance(initial, str) else initial)(shape, dtype="float64")
        for _, shape, initial in geometry().specs(shapes)
    ]  # fmt: skip
    for rate, steps in plan:
        k, state = run(tf.constant(rate, tf.float64), k, k + steps, state)
        found.append(dense(geometry().operator(state, shapes), zeros).numpy())
    return found


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def symmetric(eigenvalues, seed=0):
    """A matrix and the inverse of its absolute value."""
    Q = orthogonal(len(eigenvalues), seed)
    return (Q * eigenvalues) @ Q.T, (Q / np.abs(eigenvalues)) @ Q.T


def distance(P, expected):
    return np.linalg.norm(P - expected) / np.linalg.norm(expected)


def full(max_skew=1e9):
    return KroneckerGeometry(max_skew=max_skew)


SMALL, LARGE = np.array([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 4.0, 8.0])
SIGNS = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
SHAPES = [(2, 2), (4,)]  # of the low-rank cases, one preconditioner for both


def one_factor():
    return full, [(6,)], *symmetric(np.geomspace(1, 20, 6))


def one_negative_factor():
    return full, [(6,)], *symmetric(-np.geomspace(1, 20, 6))


def two_factors():
    (A, P_A), (B, P_B) = symmetric(SMALL, 1), symmetric(LARGE, 2)
    return full, [(3, 4)], np.kron(A, B), np.kron(P_A, P_B)


def a_long_and_a_short_axis():
    A, P_A = symmetric(SMALL, 1)
    d = np.geomspace(1, 6, 12)
    return KroneckerGeometry, [(12, 3)], np.kron(np.diag(d), A), np.kron(np.diag(1 / d), P_A)


def diagonal_and_outer_product():
    u = orthogonal(8)[:, :1]
    H = np.diag(np.geomspace(1, 4, 8)) + 6 * u @ u.T
    return lambda: LowRankGeometry(rank=1), SHAPES, H, np.linalg.inv(H)


DEFINITE = [
    (two_factors, 1000, 0.1, 1e-8), (diagonal_and_outer_product, 2000, 0.5, 1e-3), (one_factor, 1000, 0.1, 1e-6),
    (one_negative_factor, 1000, 0.1, 1e-6), (a_long_and_a_short_axis, 1000, 0.1, 1e-6),
]  # fmt: skip


@pytest.mark.parametrize(("case", "steps", "rate", "tolerance"), some(DEFINITE, DEFINITE[:1]))
def test_newton_type_finds_the_inverse_of_a_definite_hessian_at_a_linear_rate(case, steps, rate, tolerance):
    geometry, shapes, H, expected = case()
    early, late = fitted([(rate, 20), (rate, steps)], geometry, shapes, H, "newton")
    assert distance(early, expected) > 0.05
    assert distance(late, expected) < tolerance


def an_indefinite_factor():
    return full, [(6,)], *symmetric(SIGNS * np.geomspace(1, 10, 6))


def an_indefinite_outer_product():
    u = orthogonal(8)[:, :1]
    return lambda: LowRankGeometry(rank=1), SHAPES, 2 * np.eye(8) - 5 * u @ u.T, np.linalg.inv(2 * np.eye(8) + u @ u.T)


def an_indefinite_diagonal():
    d = np.geomspace(1, 3, 8)
    return lambda: LowRankGeometry(rank=1), SHAPES, np.diag(np.resize(SIGNS, 8) * d), np.diag(1 / d)


NOISY = [
    (an_indefinite_factor, "newton"), (an_indefinite_outer_product, "newton"), (an_indefinite_diagonal, "newton"),
    (one_factor, "whitening"), (two_factors, "whitening"), (diagonal_and_outer_product, "whitening"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "kind"), some(NOISY, [(an_indefinite_factor, "newton"), (one_factor, "whitening")])
)
def test_absolute_value_of_an_indefinite_hessian_and_the_whitening_matrix_are_found_as_the_rate_falls(case, kind):
    # gradients drawn as `A v` have the second moment A A, and their whitening matrix is |A|^-1 too
    geometry, shapes, H, expected = case()
    plan = [(0.1, 5), (0.1, 500), (0.02, 1000), (0.004, 1500), (0.001, 3000)]
    early, *_, late = (distance(P, expected) for P in fitted(plan, geometry, shapes, H, kind))
    assert early > 0.15 and late < 0.06 and late < early / 5


# What fails, and what is wrong.


def classifier(optimizer):
    """`(step, optimizer)`: a small model, built; `step(broken)` takes one step, its Hessian product broken or not."""
    keras.utils.set_random_seed(0)
    model = curved(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(2)]))
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    x, y = tf.constant(random.standard_normal((8, 4))), tf.constant(random.standard_normal((8, 2)))
    hessian = Linearization.hessian

    def product(lin, v, bad):
        H_v = hessian(lin) @ v
        return [H_v[0], *[tf.where(bad, a / 0.0, a) for a in H_v[1:]]]  # of all but the first kernel

    @tf.function
    def step(bad):
        with mock.patch.object(Linearization, "hessian", lambda lin: Function(lambda v: product(lin, v, bad))):
            return optimizer.step(Linearization(model, x, y))

    return lambda broken=False: {name: float(value) for name, value in step(tf.constant(broken)).items()}


def values(variables):
    return [v.numpy() for v in variables]


@pytest.mark.parametrize("geometry", some(["kronecker", "low_rank"], ["kronecker"]))
def test_a_fit_that_fails_keeps_the_preconditioner_and_the_step_is_taken(geometry):
    optimizer = PSGD(kind="newton", geometry=geometry, momentum=0.5)
    step = classifier(optimizer)
    # in the first step, where the scale would have been found, and later
    for count in range(4):
        before, weights = values(optimizer._fitted), values(optimizer._trainable_variables)
        seen = step(broken=count % 2 == 0)
        assert seen["skipped_steps"] == 0
        assert all(np.isfinite(v).all() for v in values(optimizer.variables))
        assert any((a != b).any() for a, b in zip(values(optimizer._trainable_variables), weights))
        same = [bool((a == b).all()) for a, b in zip(values(optimizer._fitted), before)]
        alone = geometry == "kronecker" and count > 0  # the first scale is that of all weights
        own = [alone and v.name.split("_")[1] == "0" for v in optimizer._fitted]  # of the kernel that is not broken
        if count % 2:
            assert seen["failed_refreshes"] == 0 and not all(same)
        else:
            assert seen["failed_refreshes"] == len(own) - sum(own) and same == [not renewed for renewed in own]


@pytest.mark.parametrize("rows", [2**21, 2**20 + 7])
def test_inner_products_of_long_columns_are_exact(rows):
    """In one product each they have an error of 1e-5."""
    random = np.random.default_rng(0)
    A, b = random.random((rows, 2), "float32"), random.random((rows, 1), "float32")
    found = tf.function(low_rank.gram)([tf.constant(A)] * 2, [tf.constant(b)] * 2)
    np.testing.assert_allclose(found, 2 * A.astype("float64").T @ b.astype("float64"), rtol=1e-6)


def test_the_preconditioner_is_fitted_every_so_many_steps():
    optimizer = PSGD(kind="newton", every=3)
    step = classifier(optimizer)
    changed = []
    for _ in range(7):
        before = values(optimizer._fitted)
        step()
        changed.append(any((a != b).any() for a, b in zip(values(optimizer._fitted), before)))
    assert changed == [True, False, False, True, False, False, True]


def test_factors_are_full_where_they_are_no_larger_than_the_weight():
    def shapes(geometry, *weights):
        return [shape for name, shape, _ in geometry.specs(weights) if name.startswith("Q")]

    assert shapes(KroneckerGeometry(), (784, 128), (128,)) == [(784,), (128, 128), (128,)]
    assert shapes(KroneckerGeometry(max_size=100), (784, 128)) == [(784,), (128,)]
    assert shapes(KroneckerGeometry(max_skew=10), (784, 128)) == [(784, 784), (128, 128)]
    assert shapes(KroneckerGeometry(), (3, 3, 1, 16), (1, 1), ()) == [(3, 3), (3, 3), (16,), (1,), (1,)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PSGD(kind="hessian"), "kind='hessian'"), (lambda: PSGD(kind="momentum"), "momentum=0.0"),
        (lambda: PSGD(momentum=1.0), "momentum=1.0"), (lambda: PSGD(every=0), "every=0"),
        (lambda: PSGD(geometry="dense"), "geometry='dense'"), (lambda: PSGD(geometry=LowRankGeometry), "constructed"),
        (lambda: PSGD(clip=2.0), "clip=2.0"), (lambda: PSGD(clip=(2.0, -1.0)), "clip="),
        (lambda: KroneckerGeometry(rate=0), "rate=0"), (lambda: KroneckerGeometry(beta=1.0), "beta=1.0"),
        (lambda: KroneckerGeometry(initial=0.0), "initial=0.0"), (lambda: KroneckerGeometry(max_size=0), "max_size=0"),
        (lambda: KroneckerGeometry(max_skew=-1), "max_skew=-1"), (lambda: KroneckerGeometry(damping=-1), "damping=-1"),
        (lambda: LowRankGeometry(rank=0), "rank=0"),
        (lambda: PSGD(kind="newton", gradient_accumulation_steps=2), "gradient_accumulation_steps=2"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_config_holds_what_was_given():
    for made in (PSGD(), PSGD(kind="newton", clip=(1.0, 3.0), geometry=LowRankGeometry(rank=4)), PSGD(clip=None)):
        config = json.loads(json.dumps(made.get_config()))
        again = PSGD.from_config(config)
        assert again.get_config() == made.get_config() == config
        assert again.needs.only_gradients == (made.kind != "newton")
        assert float(again.learning_rate) == pytest.approx(0.01 if made.kind == "newton" else 0.001)


def test_numbers_are_drawn_alike_compiled_or_not_and_are_normal():
    def draw(seed):
        draws = Draws(seed)
        return draws.normal((1000,), tf.float32), draws.normal((40, 50), tf.float64), draws.uniform(tf.float32)

    seen, compiled = draw(tf.constant(3)), tf.function(draw, jit_compile=True)(tf.constant(3))
    for a, b in zip(seen, compiled):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    numbers = np.sort(np.ravel(seen[1]))
    shares = (np.arange(2000) + 0.5) / 2000
    assert np.abs(0.5 * (1 + np.vectorize(math.erf)(numbers / 2**0.5)) - shares).max() < 1.36 / 2000**0.5  # at 5%
    assert not np.array_equal(seen[0], draw(tf.constant(4))[0])
