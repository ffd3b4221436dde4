"""Vectors that a user passes to a `Curvature`: of any length, in any number type, or refused in words."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_curvature as kc
from keras_curvature.monitor.matrix import Curvature
from keras_curvature.monitor.objective.objective import Objective

X = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 2)).astype("float32")


@pytest.fixture(scope="module")
def c():
    """The Gauss-Newton matrix of a perceptron in float32."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh", name="dense"), layers.Dense(2, name="last")])
    model.compile("sgd", "mse", jit_compile=False)
    return kc.curvature(model, (X, Y), kind="ggn")


def flat(vector):
    return np.concatenate([np.ravel(a) for a in vector]).astype(np.float64)


@pytest.mark.parametrize("scale, rank", [(1e-30, 0), (1e-20, 4), (1e-15, 0), (1e20, 0), (1e36, 4)])
def test_solutions_are_as_good_for_right_hand_sides_of_any_length(c, scale, rank):
    b = [np.asarray(a, np.float64) for a in c.gradient]
    one, found = c.solve(b, 0.5, rank=rank), c.solve([scale * a for a in b], 0.5, rank=rank)
    assert float(found.residual) <= 1e-6 and abs(int(found.steps) - int(one.steps)) <= 1
    np.testing.assert_allclose(flat(found.value) / scale, flat(one.value), rtol=1e-5, atol=1e-7)
    last = int(found.count) - 1
    np.testing.assert_allclose(flat(found.iterate(last)), flat(found.value), rtol=1e-6)
    assert float(found.quadratic(last)) == pytest.approx(scale**2 * float(one.quadratic(last)), rel=1e-4, abs=0)


def test_the_solution_for_zero_is_zero(c):
    found = c.solve([np.zeros(v.shape) for v in c.variables], 0.5, rank=4)
    assert not flat(found.value).any() and float(found.residual) == 0


@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(c, entry):
    bad = [np.full(v.shape, entry) for v in c.variables]
    with pytest.raises(ValueError, match="`vector` must be a finite vector. Received"):
        c.solve(bad, 0.5)
    with pytest.raises(ValueError, match="`start` must be a finite vector that is not zero"):
        c.sharpness(start=bad)


def test_a_solution_that_overflows_is_refused(c):
    with pytest.raises(ValueError, match="the solution overflows"):
        c.solve([np.full(v.shape, 1e38) for v in c.variables], 0.05)


def test_long_and_short_starts_are_directions(c):
    largest = c.sharpness(steps=20)
    for scale in (1e-30, 1e30):
        again = c.sharpness(start=[scale * a for a in largest.vectors[0]], steps=3)
        assert again.values[0] == pytest.approx(largest.values[0], rel=1e-4)


def test_arrays_of_all_real_numbers_are_taken(c):
    whole = [np.round(5 * np.random.default_rng(2).normal(size=v.shape)) for v in c.variables]
    expected = [flat(c @ [tf.constant(a, tf.float32) for a in whole])]
    expected += [flat(c.solve(whole, 0.5).value), c.sharpness(start=whole).values[0]]
    for dtype, make in itertools.product(("float64", "float16", "int32"), (np.asarray, tf.constant)):
        v = [make(a.astype(dtype)) for a in whole]
        found = [flat(c @ v), flat(c.solve(v, 0.5).value), c.sharpness(start=v).values[0]]
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    assert float(c.objective.loss_at(whole)) == float(c.objective.loss_at([tf.constant(a, tf.float64) for a in whole]))
    assert [a.dtype for a in c @ list(c.variables)] == [tf.float32] * 4


@pytest.mark.parametrize("place, entry, message", [
    (1, None, "Received: what is no tensor: NoneType at index 1"),
    (0, [1.0], "Received: what is no tensor: list at index 0"),
    (2, "a", "Received: what is no tensor: str at index 2"),
    (1, np.array(["a"] * 4), "must hold real numbers. Received: a tensor of dtype string at index 1"),
    (1, tf.zeros(4, tf.complex64), "must hold real numbers. Received: a tensor of dtype complex64 at index 1"),
    (1, np.zeros(5), "must be a list of 4 tensors"),
])  # fmt: skip
def test_entries_that_are_no_tensors_are_named(c, place, entry, message):
    v = [np.zeros(w.shape) for w in c.variables]
    v[place] = entry
    asks = {"vector": (lambda: c @ v, lambda: c.solve(v, 1.0)), "start": (lambda: c.sharpness(start=v),)}
    for name, calls in asks.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"`{name}` .*{message}"):
                call()


def test_weights_that_are_not_finite_are_refused():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])
    model.compile("sgd", "mse", jit_compile=False)
    c, fisher = kc.curvature(model, (X, Y), kind="ggn"), Objective(model, (X, Y), kind="fisher")
    v = c.gradient
    model.layers[0].kernel.assign(np.nan * model.layers[0].kernel)
    asks = (
        lambda: c.solve(v, 1.0), lambda: c.solve(v, 1.0, rank=3), lambda: c.top(2), c.trace, c.noise,
        lambda: c.trace(labels=True), lambda: Curvature(fisher).trace(labels=True),
    )  # fmt: skip
    for ask in asks:
        with pytest.raises(ValueError, match="not finite: at these weights the loss or one of its derivatives is NaN"):
            ask()


def test_pairs_of_another_matrix_are_refused(c):
    other = kc.curvature(c.objective.model, (X, Y))
    block, metric = c.block("dense"), kc.Identity()
    mine, theirs = (f"ggn of {', '.join(c.layers)}", f"hessian of {', '.join(c.layers)}")
    for pairs, of in {
        theirs: other.top(1), "ggn of dense": block.top(1), f"{mine}, under a metric": c.top(1, metric=metric),
        f"{mine} and {theirs}": c.top(1).beside(other.top(1)),
    }.items():  # fmt: skip
        for name, ask in {"trace": c.trace, "density": c.density}.items():
            with pytest.raises(ValueError, match=f"`{name}`: `pairs` must be `Eigenpairs` of this matrix, the {mine}. "
                               f"Received: pairs of the {pairs}$"):  # fmt: skip
                ask(pairs=of)
    assert c.trace(pairs=c.top(2).beside(c.extremes()[1])).value == pytest.approx(c.trace().value, rel=1e-5)
    with pytest.raises(ValueError, match=r"`pairs.vectors\[0\]` must be a list of 4 tensors"):
        c.trace(pairs=dataclasses.replace(block.top(1), matrix=""))


def test_messages_name_the_method_that_was_called(c):
    model, data = c.objective.model, (X, Y)
    zero, nan = ([number * np.ones(v.shape) for v in c.variables] for number in (0.0, np.nan))
    for message, call in {
        "`top`: `k` must be an integer >= 1": lambda: c.top(0),
        "`top`: `metric` must be a": lambda: c.top(metric=2.0),
        "`sharpness`: `steps` must be an integer >= 1": lambda: c.sharpness(steps=0),
        "`extremes`: `steps` must be an integer >= 1": lambda: c.extremes(steps=0),
        "`landscape`: `seed` must be an integer >= 0": lambda: kc.landscape(model, data, seed=-1),
        "`report`: `seed` must be an integer >= 0": lambda: kc.report(model, data, seed=-1),
        "`curvature`: `seed` must be less than 4294967296": lambda: kc.curvature(model, data, seed=2**70),
        r"`directions\['a'\]` must be a finite vector": lambda: kc.landscape(model, data, {"a": zero}),
        r"`directions\['direction 1'\]` must be a finite vector": lambda: kc.landscape(model, data, [nan]),
        r"'\(' is no layer, and no valid regular expression: missing \)": lambda: kc.curvature(
            model, data, layers=["("]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_largest_seed(c):
    c = kc.curvature(c.objective.model, (X, Y), "ggn", seed=2**32 - 1)
    assert c.top(2).converged.all() and float(c.solve(c.gradient, 1.0, rank=2).residual) < 1e-6
    trace = c.trace(4, labels=True)
    assert trace.value == pytest.approx(c.trace(26).value, abs=5 * trace.stderr)
    assert kc.landscape(c.objective.model, (X, Y), "random", points=3, seed=2**32 - 1).loss["random"].shape == (3,)


@pytest.mark.parametrize("wrong", [7, -1, 3, np.nan])
def test_labels_that_are_no_class_are_named(wrong):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    y = np.arange(32) % 3 + (0.0 if wrong != wrong else 0)
    y[-1] = wrong
    for loss in ("sparse_categorical_crossentropy", keras.losses.SparseCategoricalCrossentropy(from_logits=True)):
        model.compile("sgd", loss, jit_compile=False)
        with pytest.raises(ValueError, match="`curvature`: `data` must hold labels from 0 to 2, for the 3 outputs.* "
                           f"Received: 1 others, such as {wrong}"):  # fmt: skip
            kc.curvature(model, (X, y), batch_size=16)


def test_the_class_that_the_loss_ignores_is_no_wrong_label():
    model, y = keras.Sequential([keras.Input((3,)), layers.Dense(3)]), np.arange(32) % 4 - 1
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-1), jit_compile=False)
    assert np.isfinite(float(kc.curvature(model, (X, y)).loss))
