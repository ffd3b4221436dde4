"""SENG against the dense empirical Fisher matrix of each layer, in float64, and its sketches against what they keep."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_curveball import made
from test_skfac import batch, cross_entropy, network

import keras_curvature as kc
from keras_curvature import SENG, Linearization, curved
from keras_curvature.linearization.jacobian import by_layers, sketches
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.needs import Needs

float64 = pytest.mark.usefixtures("in_float64")
without_factors = pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")


def step(model, optimizer, x, y, micro_batches=1):
    """One step, eagerly."""
    optimizer.step(Linearization(model, x, y, needs=optimizer.needs, micro_batches=micro_batches))


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors])


def gradients_of_examples(model, x, y, loss):
    """`[(examples, *shape)]` for each weight, each example by itself."""
    found = []
    for i in range(len(x)):
        with tf.GradientTape() as tape:
            value = loss(y[i : i + 1], model(x[i : i + 1], training=True))
        gradients = tape.gradient(value, [v.value for v in model.trainable_variables])
        found.append([tf.convert_to_tensor(g).numpy() for g in gradients])
    return [np.stack(each) for each in zip(*found)]


def by_hand(model, x, y, loss, damping):
    """The step before the learning rate: of each layer `(sum_i g_i g_i' / N + lambda I)^-1 g`, of others a quotient."""
    examples = gradients_of_examples(model, x, y, loss)
    blocks, others, _ = kronecker.blocks(model)
    d = [None] * len(examples)
    for block in blocks:
        rows = np.concatenate([examples[i].reshape(len(x), -1) for i in block.variables], 1)
        solved = -np.linalg.solve(rows.T @ rows / len(x) + damping * np.eye(rows.shape[1]), rows.mean(0))
        sizes = np.cumsum([examples[i][0].size for i in block.variables])[:-1]
        for i, part in zip(block.variables, np.split(solved, sizes)):
            d[i] = part.reshape(examples[i].shape[1:])
    for i in others:
        d[i] = -examples[i].mean(0) / (1 + damping)
    return d


@float64
@without_factors
@pytest.mark.parametrize("examples", [4, 40])
def test_a_step_is_the_natural_gradient_of_each_layer(examples):
    """Also with two calls of a layer's weights in an example, groups, indices and a weight of no known layer."""
    x, y = batch(examples)
    expected = by_hand(network(), x, y, cross_entropy(), 0.03)
    model, optimizer = network(), SENG(0.5, damping=0.03)
    made(model, optimizer, cross_entropy())
    before = flat(model.trainable_variables)
    step(model, optimizer, x, y)
    found = flat(model.trainable_variables) - before
    np.testing.assert_allclose(found, 0.5 * flat(expected), rtol=1e-8, atol=1e-11)


@float64
@without_factors
def test_a_fit_with_a_smaller_last_batch_has_batches_of_unknown_size():
    x, y = batch(7)
    expected, v = network(), 0.0
    for rows in (slice(0, 4), slice(4, 7)):
        v = 0.9 * v + flat(by_hand(expected, x[rows], y[rows], cross_entropy(), 0.1))
        start = np.cumsum([0, *(w.shape.num_elements() for w in expected.trainable_variables)])
        for w, begin, end in zip(expected.trainable_variables, start, start[1:]):
            w.assign_add(0.05 * v[begin:end].reshape(w.shape))
    model = curved(network())
    model.compile(SENG(0.05, damping=0.1), cross_entropy())
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    found, expected = flat(model.trainable_variables), flat(expected.trainable_variables)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)


@float64
@without_factors
def test_momentum_adds_up_and_a_smaller_last_batch_has_a_gram_of_its_own():
    model, optimizer = network(), SENG(0.1, damping=0.1, momentum=0.8)
    made(model, optimizer, cross_entropy())
    v = 0.0
    for examples, seed in ((8, 0), (3, 1)):
        x, y = batch(examples, seed)
        v = 0.8 * v + flat(by_hand(model, x, y, cross_entropy(), 0.1))
        before = flat(model.trainable_variables)
        step(model, optimizer, x, y)
        np.testing.assert_allclose(flat(model.trainable_variables) - before, 0.1 * v, rtol=1e-7, atol=1e-11)


@float64
@without_factors
def test_sketches_that_leave_nothing_out_change_nothing():
    x, y = batch(6)
    found = []
    for largest in (None, 0):
        model, optimizer = network(), SENG(0.5, damping=0.03, columns=99, rank=9, largest=largest)
        made(model, optimizer, cross_entropy())
        step(model, optimizer, x, y)
        found.append(flat(model.trainable_variables))
    np.testing.assert_allclose(*found, rtol=1e-8, atol=1e-10)


def layers(model, x, y):
    model.compile(loss=cross_entropy())
    lin = Linearization(model, x, y, needs=Needs(layers=True))
    return sketches.layers_of(lin, kronecker.blocks(model)[0])


@float64
@without_factors
def test_a_sketch_of_low_rank_keeps_the_largest_singular_values():
    for layer in layers(network(), *batch(5)):
        if layer.block.has_indices:
            continue
        rows = np.einsum("bgti,bgtj->bgij", layer.a, layer.d[:, 0])
        U, s, V = np.linalg.svd(rows, full_matrices=False)
        expected = np.einsum("bgir,bgr,bgrj->bgij", U[..., :1], s[..., :1], V[..., :1, :])
        sketch = sketches.of_low_rank(layer, 1)
        assert sketch.a.shape[2] == 1
        np.testing.assert_allclose(np.einsum("bgti,bgtj->bgij", sketch.a, sketch.d[:, 0]), expected, atol=1e-12)


@float64
def test_a_sampled_step_solves_the_sketched_least_squares():
    """`b = argmin |W (U'b - g)|^2 + lambda |b|^2` for the `W` that was drawn, and a mean of many is the product."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((7,)), keras.layers.Dense(6)])
    random = np.random.default_rng(0)
    x, y = random.standard_normal((5, 7)), np.eye(6)[random.integers(6, size=5)]
    (layer,), damping = layers(model, x, y), 0.2
    U = by_layers.dense(layer)
    U = np.concatenate([u.numpy().reshape(5, -1) for u in U], 1)  # kernel, then bias, which is the last row
    sample = sketches.Sample.drawn(layer, 4, 3)
    chosen = np.arange(8 * 6).reshape(8, 6)[np.ix_(sample.rows, sample.columns)].ravel()
    W = np.eye(48)[chosen] * np.sqrt(8 / 4 * 6 / 4)
    seen = sample.of_layer(layer)
    np.testing.assert_allclose(by_layers.gram(seen)[:, 0, :, 0], U @ W.T @ W @ U.T, atol=1e-12)

    optimizer = SENG(1.0, damping=damping, columns=4, largest=0)
    made(model, optimizer, cross_entropy())
    optimizer.iterations.assign(3)  # what the sample is drawn by
    g = U.sum(0) / np.sqrt(5)
    b = np.linalg.solve(U @ W.T @ W @ U.T + damping * np.eye(5), U @ W.T @ W @ g)
    before = flat(model.trainable_variables)
    step(model, optimizer, x, y)
    found = flat(model.trainable_variables) - before
    np.testing.assert_allclose(found, -(g - U.T @ b) / damping, rtol=1e-9, atol=1e-12)

    grams = [by_layers.gram(sketches.Sample.drawn(layer, 4, i).of_layer(layer))[:, 0, :, 0] for i in range(300)]
    exact = U @ U.T
    assert np.abs(np.mean(grams, 0) - exact).max() < 0.2 * np.abs(exact).max()


@float64
@without_factors
def test_steps_do_not_depend_on_the_slices():
    x, y = batch(7)
    found = []
    for micro_batches in (1, 3):
        optimizer = SENG(0.1, damping=0.1, largest=0, rank=1, columns=3)
        model = curved(network(), micro_batches=micro_batches)
        model.compile(optimizer, loss=cross_entropy())
        optimizer.meet(model)
        step(model, optimizer, x, y, micro_batches)
        found.append(flat(model.get_weights()))
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-12)


@float64
@without_factors
def test_rows_that_replicas_gather_have_the_products_of_the_layer():
    """As they are, or as one position, also of groups; the second where a row is smaller than what it is made of."""
    found = []
    for layer in layers(network(), *batch(5)):
        if layer.block.has_indices:
            continue
        rows, g = sketches._as_rows(layer), tf.random.stateless_normal(layer.block.shape, [1, 2], dtype=tf.float64)
        np.testing.assert_allclose(by_layers.gram(rows), by_layers.gram(layer), atol=1e-12)
        np.testing.assert_allclose(by_layers.times(rows, g), by_layers.times(layer, g), atol=1e-12)
        numbers = [sum(x.shape.num_elements() for x in (one.a, one.d[:, 0])) for one in (rows, layer)]
        found.append(sketches._rows_are_smaller(layer))
        assert found[-1] == (numbers[0] - 5 < numbers[1])  # but for the ones
    assert set(found) == {True, False}


@pytest.mark.slow
def test_two_replicas_train_as_one_with_sketches_of_convolutions():
    """Also where a replica has no example of the last batch."""
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, here / "sketches_on_replicas.py"], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    for name, found in json.loads(run.stdout.splitlines()[-1]).items():
        assert found["apart"] < 1e-10 < 1e-3 < found["way"], name


@pytest.mark.parametrize("arguments", [
    {"damping": 0.0}, {"momentum": 1.0}, {"rank": 0}, {"columns": 1.5}, {"largest": -1}, {"largest": True},
])  # fmt: skip
def test_what_it_cannot_do_is_told(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .* Received: {name}={value}"):
        SENG(**arguments)


def test_stability_knows_no_limit():
    assert "keeps no preconditioner" in kc.stability(SENG()).reason


def test_where_float32_holds_no_damping_it_is_the_rounding():
    """Targets of size 1e5: without it, the matrix of no batch has a Cholesky decomposition."""
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 5)).astype("float32")
    y = (1e5 * np.sin(x[:, :1])).astype("float32")
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)]
    model = curved(keras.Sequential([keras.Input((5,)), *layers]))
    model.compile(SENG(5.0), "mse", jit_compile=False)
    history = model.fit(x, y, batch_size=64, epochs=20, verbose=0).history
    assert not any(history["skipped_steps"]) and min(history["step_norm"]) > 0
    assert history["loss"][-1] < history["loss"][0]
