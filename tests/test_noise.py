"""Noise scale and traces by sampled labels, against gradients of single examples and dense matrices in float64."""

import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, flat, float64, put

from keras_curvature.monitor.noise import noise as noise_module
from keras_curvature.monitor.noise import parts as noise_parts
from keras_curvature.monitor.noise.average import NoiseAverage, two_batch_sizes
from keras_curvature.monitor.noise.noise import Noise, noise
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.operator import curvature
from keras_curvature.monitor.spectra import traces
from keras_curvature.monitor.spectra.label_traces import LayerTraces, layer_traces

ROWS = 48
CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def _in_float64():
    with float64():
        yield


def data(rows=ROWS, seed=0):
    """Inputs `(rows, 4)` and noisy labels."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, 4))
    return x, (x[:, :CLASSES] + random.standard_normal((rows, CLASSES))).argmax(1).astype("int32")


def network(reduction="sum_over_batch_size", regularizer=None, extra=(), outputs=CLASSES):
    """A small compiled classifier; the same weights every time."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(3, activation="tanh", kernel_regularizer=regularizer)
    model = keras.Sequential([keras.Input((4,)), hidden, *extra, keras.layers.Dense(outputs)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
    return model


def gradients_of(model, x, y, weights=None):
    """The gradient of the compiled loss of each row by itself, `(rows, weights)`."""
    rows = []
    for i in range(len(x)):
        row, given = slice(i, i + 1), None if weights is None else weights[i : i + 1]
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=y[row], y_pred=model(x[row]), sample_weight=given)
        rows.append(flat(tape.gradient(loss, model.trainable_variables)))
    return np.array(rows)


def split_by_variable(diagonal, objective):
    """The entries that belong to each trainable variable."""
    return np.split(diagonal, np.cumsum([v.shape.num_elements() for v in objective.variables])[:-1])


def dense(objective):
    """The matrix of an objective, by central differences of the gradient for the Hessian, else by products."""
    start, columns = flat(objective.weights), []
    if objective.kind == "hessian":
        for unit in 1e-5 * np.eye(len(start)):
            put(objective.variables, start + unit)
            ahead = flat(objective.gradient())
            put(objective.variables, start - unit)
            columns.append((ahead - flat(objective.gradient())) / 2e-5)
        put(objective.variables, start)
    else:
        sizes = np.cumsum([v.shape.num_elements() for v in objective.variables])[:-1]
        for unit in np.eye(len(start)):
            parts = zip(np.split(unit, sizes), objective.variables)
            columns.append(flat(objective.product([tf.constant(a.reshape(v.shape)) for a, v in parts])))
    return np.array(columns).T


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def objective(model):
    return Objective(model, data())


@pytest.fixture(scope="module")
def gradients(model):
    return gradients_of(model, *data())


@pytest.fixture(scope="module")
def measured(objective):
    return noise(objective, micro_batch=3, parts=4)


# The estimators: arithmetic.


def _partitions(rows, size):
    """All ways to cut rows into sets of a size."""
    if not rows:
        yield []
        return
    first, rest = rows[0], rows[1:]
    for others in itertools.combinations(rest, size - 1):
        left = [r for r in rest if r not in others]
        for sets in _partitions(left, size):
            yield [[first, *others], *sets]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_over_all_partitions_the_two_sizes_are_without_bias(size):
    """The mean over all partitions is the unbiased covariance and squared mean themselves, to rounding."""
    g = np.random.default_rng(0).standard_normal((8, 5)) + 0.5
    squared = g.mean(0) @ g.mean(0)
    means = [np.mean([np.sum(g[s].mean(0) ** 2) for s in sets]) for sets in _partitions(list(range(8)), size)]
    found = np.mean([two_batch_sizes(size, 8, m, squared) for m in means], 0)
    trace = np.trace(np.cov(g.T))
    np.testing.assert_allclose(found, [squared - trace / 8, trace], rtol=1e-12)


def test_over_all_partitions_the_curved_numbers_are_without_bias():
    random = np.random.default_rng(1)
    g, H = random.standard_normal((6, 4)) + 0.5, random.standard_normal((4, 4))
    H, found = H + H.T, []
    for sets in _partitions(list(range(6)), 2):
        means = np.array([g[s].mean(0) for s in sets])
        sizes = np.array([2.0, 2.0, 2.0])
        parts = noise_module._Parts(sizes, np.ones(3), 2 * np.sum(means**2, 1), means @ means.T, means @ H @ means.T)
        one = parts.noise()
        found.append([one.signal, one.noise, one.curvature, one.curved_noise])
    S, G = np.cov(g.T), g.mean(0)
    expected = [G @ G - np.trace(S) / 6, np.trace(S), G @ H @ G - np.trace(H @ S) / 6, np.trace(H @ S)]
    np.testing.assert_allclose(np.mean(found, 0), expected, rtol=1e-12)


def test_micro_batches_of_unequal_sizes_are_without_bias():
    """Over all ways to cut 7 examples into 3 + 2 + 2."""
    g, found = np.random.default_rng(2).standard_normal((7, 3)) + 1.0, []
    for first in itertools.combinations(range(7), 3):
        for sets in _partitions([i for i in range(7) if i not in first], 2):
            means = np.array([g[list(s)].mean(0) for s in [first, *sets]])
            sizes = np.array([3.0, 2.0, 2.0])
            one = noise_module._Parts(sizes, np.ones(3), sizes * np.sum(means**2, 1), means @ means.T, None).noise()
            found.append([one.signal, one.noise])
    trace = np.trace(np.cov(g.T))
    np.testing.assert_allclose(np.mean(found, 0), [np.sum(g.mean(0) ** 2) - trace / 7, trace], rtol=1e-12)


def test_standard_errors_are_those_of_repetitions():
    """Gaussian gradients with a known population, 300 times: the spread is what the jackknife says."""
    random, found = np.random.default_rng(3), []
    H, G, sizes = np.diag([4.0, 1.0, 0.1]), np.array([1.0, 0.5, 0.2]), np.full(16, 8.0)
    for _ in range(300):
        g = G + random.standard_normal((16, 8, 3))
        means = g.mean(1)
        squares = np.sum(g**2, (1, 2))  # micro-batches of one
        found.append(noise_module._Parts(sizes, sizes, squares, means @ means.T, means @ H @ means.T).noise())
    for name, value in {"signal": G @ G, "noise": 3.0, "curvature": G @ H @ G, "curved_noise": 5.1}.items():
        values = [getattr(one, name) for one in found]
        assert abs(np.mean(values) - value) < 4 * np.std(values) / np.sqrt(300), name
    for name in found[0].stderr:
        values, said = [getattr(one, name) for one in found], [one.stderr[name] for one in found]
        spread, typical = np.std(values), np.sqrt(np.mean(np.square(said)))
        if name in ("simple", "with_curvature", "best_rate"):  # ratios have tails
            spread, typical = np.subtract(*np.quantile(values, [0.75, 0.25])) / 1.349, np.median(said)
        assert 0.8 < typical / spread < 1.2, name



def test_the_average_is_a_ratio_of_averages():
    """Of single steps a third is negative, and the average of ratios is anywhere; the ratio of averages is right."""
    random, average, steps = np.random.default_rng(4), NoiseAverage(0.999), []
    G = np.full(4, 0.1)  # |G|^2 = 0.04, tr S = 4: a noise scale of 100
    for _ in range(6000):
        g = G + random.standard_normal((8, 4)) / np.sqrt(8)  # 8 micro-batches of 8
        steps.append(two_batch_sizes(8, 64, np.mean(np.sum(g**2, 1)), np.sum(g.mean(0) ** 2)))
        average = average.update(*steps[-1])
    signal, trace = np.transpose(steps)
    assert np.mean(signal < 0) > 0.3
    assert abs(average.scale - 100.0) < 10.0
    assert abs(average.signal - 0.04) < 0.004 and abs(average.noise - 4.0) < 0.1
    assert abs(np.mean(trace / signal) - 100.0) > 100.0


def test_averages_weigh_as_much_from_the_first_step_on():
    average = NoiseAverage()
    assert math.isnan(average.scale)
    for _ in range(3):
        average = average.update(2.0, 6.0)
        np.testing.assert_allclose([average.signal, average.noise, average.scale], [2.0, 6.0, 3.0], rtol=1e-12)
    assert average.update(math.nan, 1.0) is average
    mixed = NoiseAverage(0.5).update(1.0, 0.0).update(-4.0, 1.0)
    np.testing.assert_allclose(mixed.signal, (0.25 * 1.0 + 0.5 * -4.0) / 0.75)
    assert mixed.scale == math.inf  # no gradient to be seen yet


def test_half_of_the_progress_is_made_at_the_critical_batch():
    """Expected loss after a step on a quadratic: lowest at `rate(B)`, and half as much lower at `critical_batch`."""
    random = np.random.default_rng(5)
    H, S = (a @ a.T for a in random.standard_normal((2, 4, 4)))
    G = random.standard_normal(4)
    found = Noise(G @ G, np.trace(S), G @ H @ G, np.trace(H @ S), {}, 0, 0, 0)

    def gain(rate, batch):
        return rate * (G @ G) - 0.5 * rate**2 * (G @ H @ G + np.trace(H @ S) / batch)

    for batch in (1, 10, found.critical_batch, 1e12):
        best = found.rate(batch)
        assert gain(best, batch) > max(gain(0.99 * best, batch), gain(1.01 * best, batch))
    half = gain(found.rate(found.critical_batch), found.critical_batch)
    np.testing.assert_allclose(half, 0.5 * gain(found.best_rate, math.inf), rtol=1e-12)
    assert found.critical_batch == found.with_curvature


def test_what_cannot_be_divided():
    lost = Noise(-0.1, 5.0, -1.0, 2.0, {}, 0, 0, 0)
    assert lost.simple == math.inf and lost.critical_batch == math.inf
    assert math.isnan(lost.with_curvature) and math.isnan(lost.best_rate)
    plain = Noise(0.1, 5.0, None, None, {}, 0, 0, 0)
    assert plain.with_curvature is None and plain.best_rate is None and plain.rate(8) is None
    np.testing.assert_allclose([plain.critical_batch, plain.simple], 50.0)


# On models.


def test_numbers_are_those_of_parts_and_micro_batches(measured, gradients, objective):
    """Parts and micro-batches are what follows one another; the Hessian is dense."""
    parts = gradients.reshape(4, 12, -1)
    micro, H = parts.reshape(16, 3, -1).mean(1), dense(objective)
    G, means = gradients.mean(0), parts.mean(1)
    trace = 3 * np.sum((micro - G) ** 2) / 15
    np.testing.assert_allclose([measured.noise, measured.signal], [trace, G @ G - trace / ROWS], rtol=1e-10)
    trace = 12 * np.sum((means - G) * ((means - G) @ H)) / 3
    curved = [measured.curved_noise, measured.curvature]
    np.testing.assert_allclose(curved, [trace, G @ H @ G - trace / ROWS], rtol=1e-7)
    assert (measured.examples, measured.micro_batches, measured.products) == (ROWS, 16, 4)


def test_of_micro_batches_of_one_it_is_the_covariance(gradients, model):
    """With a part for each example `tr(HS)` is exact too: against the dense Gauss-Newton matrix."""
    objective = Objective(model, data(), kind="ggn")
    found = noise(objective, micro_batch=1, parts=ROWS)
    S, G, H = np.cov(gradients.T), gradients.mean(0), dense(objective)
    expected = [np.trace(S), G @ G - np.trace(S) / ROWS, np.trace(H @ S), G @ H @ G - np.trace(H @ S) / ROWS]
    np.testing.assert_allclose([found.noise, found.signal, found.curved_noise, found.curvature], expected, rtol=1e-10)


@pytest.mark.parametrize(("batch_size", "parts"), [(18, 4), (5, 2), (20, 16)])
def test_batches_and_parts_do_not_show(model, gradients, batch_size, parts):
    """Ragged batches (18 + 18 + 12; nine of 5 and one of 3; 20 + 20 + 8): micro-batches of one have one answer."""
    found = noise(Objective(model, data(), batch_size=batch_size), 1, parts, curvature=False)
    assert found.examples == found.micro_batches == ROWS
    S, G = np.cov(gradients.T), gradients.mean(0)
    np.testing.assert_allclose([found.noise, found.signal], [np.trace(S), G @ G - np.trace(S) / ROWS], rtol=1e-10)
    assert found.stderr["noise"] > 0


def test_sample_weights_are_part_of_the_noise_and_regularizers_are_none(gradients):
    model, (x, y) = network(regularizer=keras.regularizers.L2(0.1)), data()
    weights = np.linspace(0.0, 2.0, ROWS)
    weighed = gradients_of(model, x, y, weights)
    S, G = np.cov(weighed.T), weighed.mean(0)
    found = noise(Objective(model, (x, y, weights)), 1, 2, curvature=False)
    np.testing.assert_allclose([found.noise, found.signal], [np.trace(S), G @ G - np.trace(S) / ROWS], rtol=1e-10)
    unweighed = noise(Objective(model, (x, y)), 1, 2, curvature=False)
    np.testing.assert_allclose(unweighed.noise, np.trace(np.cov(gradients.T)), rtol=1e-10)


def weighed_regression(loss, x, y, weights, counts):
    """A linear model, and the gradients `w_i g_i / mean(w)` of its squared error, `(rows, 4)`, by NumPy.

    Args:
        x: Inputs `(rows, steps, 3)`.
        y: Targets `(rows, steps, 1)`.
        weights: `(rows, steps)`, the weights of the steps.
        counts: `w_i`, what the mean is taken over, `(rows,)`.
    """
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Masking(), keras.layers.Dense(1)])
    model.compile("sgd", loss)
    kernel, bias = model.get_weights()
    rest = weights * (x @ kernel + bias - y)[..., 0]
    seen = np.concatenate([x, np.ones([*x.shape[:2], 1])], -1)
    return model, 2 * np.einsum("nt,ntd->nd", rest, seen) / counts.mean()


@pytest.mark.parametrize(("size", "batch_size"), [(1, None), (2, None), (1, 8), (2, 6)])
@pytest.mark.parametrize("mean_over", ["weights", "steps", "weighed steps"])
def test_means_over_weights_or_steps_are_noisy_by_the_weights_of_the_examples(mean_over, size, batch_size):
    """Also where some micro-batches have no weight, or no step."""
    random, of_weights = np.random.default_rng(0), keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    steps = 1 if mean_over == "weights" else 4
    x, y = random.normal(size=(16, steps, 3)), random.normal(size=(16, steps, 1))
    weights = np.ones((16, steps))
    if steps > 1:  # sentences of 1 to 4 steps, and two of none
        weights *= np.arange(steps) < np.array([1, 4, 0, 0] + [2, 3, 1, 4] * 3)[:, np.newaxis]
        x *= weights[..., np.newaxis]
    given, loss = [], of_weights if mean_over != "steps" else keras.losses.MeanSquaredError()
    if mean_over != "steps":
        given = [np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 9.0] * 2)[:, np.newaxis] * np.ones((16, steps))]
        weights = weights * given[0]
    model, g = weighed_regression(loss, x, y, weights, weights.sum(1))
    objective = Objective(model, (x, y, *given), batch_size=batch_size)
    found = noise(objective, size, 4)
    g = g.reshape(-1, size, 4).mean(1)
    S, G = size * np.cov(g.T), g.mean(0)
    expected = [np.trace(S), G @ G - np.trace(S) / 16]
    np.testing.assert_allclose([found.noise, found.signal], expected, rtol=1e-9)
    np.testing.assert_allclose(G @ G, np.sum(flat(objective.gradient()) ** 2), rtol=1e-9)
    assert found.curved_noise > 0


def test_regularizers_are_no_noise_of_a_mean_over_weights_and_a_second_look_is_not_compiled():
    model, (x, y) = network("mean_with_sample_weight", keras.regularizers.L2(0.1)), data()
    weights = np.linspace(0.0, 2.0, ROWS)
    g = gradients_of(network(), x, y, weights) / weights.mean()
    objective = Objective(model, (x, y, weights))
    before = float(objective.loss())
    found = noise(objective, 1, 2, curvature=False)
    np.testing.assert_allclose(found.noise, np.trace(np.cov(g.T)), rtol=1e-10)
    whole = np.sum(flat(objective.gradient()) ** 2)
    np.testing.assert_allclose(found.signal + found.noise / ROWS, whole, rtol=1e-10)
    compiled = dict(objective.in_parts()._functions)
    assert noise(objective, 1, 2, curvature=False) == found and objective.in_parts()._functions == compiled
    assert float(objective.loss()) == before  # Keras' own, bit for bit
    plain = Objective(network(), (x, y))
    assert plain.in_parts() is plain


def test_a_sum_over_examples_has_the_noise_scale_of_the_mean(objective, measured):
    model = network(reduction="sum")
    found = noise(Objective(model, data()), micro_batch=3, parts=4)
    np.testing.assert_allclose(found.signal, ROWS**2 * measured.signal, rtol=1e-10)
    np.testing.assert_allclose(found.best_rate, measured.best_rate / ROWS, rtol=1e-7)
    np.testing.assert_allclose(
        [found.simple, found.with_curvature], [measured.simple, measured.with_curvature], rtol=1e-7
    )


def test_masks_are_noise_and_are_drawn_anew_for_every_example():
    """One example, 960 times: all noise is dropout's. Of `y = sum m_i w_i x_i / q` with masks `m` it is known."""
    inputs, keep = np.tile([[1.0, -2.0, 0.5]], (960, 1)), 0.75
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(1 - keep), keras.layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    put(model.trainable_variables, [0.3, -0.2, 1.0])
    masks = np.array(list(itertools.product([0, 1], repeat=3)))
    chance = np.prod(np.where(masks, keep, 1 - keep), 1)
    seen = masks / keep * inputs[0]
    g = 2 * (seen @ [0.3, -0.2, 1.0] - 0.5)[:, np.newaxis] * seen
    G = chance @ g
    trace, y = chance @ np.sum((g - G) ** 2, 1), np.full((960, 1), 0.5)
    found = noise(Objective(model, (inputs, y), training=True), micro_batch=8, curvature=False)
    assert abs(found.noise - trace) < 4 * found.stderr["noise"] < trace
    assert abs(found.signal - G @ G) < 4 * found.stderr["signal"]
    still = noise(Objective(model, (inputs, y)), micro_batch=8, curvature=False)
    assert still.noise < 1e-20 and still.signal > 0.1 and still.simple < 1e-18


def test_in_training_mode_normalization_is_of_the_micro_batch():
    model, (x, y) = network(extra=[keras.layers.BatchNormalization()]), data()
    before = [v.numpy() for v in model.variables]
    found = noise(Objective(model, (x, y), training=True), micro_batch=6, parts=4, curvature=False)
    for value, v in zip(before, model.variables):
        np.testing.assert_array_equal(value, v.numpy())
    means = []
    for rows in np.arange(ROWS).reshape(8, 6):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=y[rows], y_pred=model(x[rows], training=True))
        means.append(flat(tape.gradient(loss, model.trainable_variables)))
    trace = 6 * np.sum(np.var(means, 0)) * 8 / 7
    np.testing.assert_allclose(found.noise, trace, rtol=1e-10)
    np.testing.assert_allclose(found.signal, np.sum(np.mean(means, 0) ** 2) - trace / ROWS, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*MODELS, *[f"loss_{name}" for name in LOSSES]])
def test_on_every_model_the_micro_batches_make_up_the_batch(name, training):
    """`|g|^2 = |G|^2 + tr S / N` is that of the whole gradient, dropout's masks with it."""
    case = (LOSSES[name[5:]] if name.startswith("loss_") else MODELS[name])().compile()
    objective = Objective(case.model, tuple(a for a in case.batch if a is not None), training=training)
    of_keras = case.model._flatten_layers()
    by_slices = training and any(isinstance(layer, keras.layers.BatchNormalization) for layer in of_keras)
    found = noise(objective, micro_batch=3, parts=2, curvature=False)
    whole = np.sum(flat(objective.gradient()) ** 2)
    assert found.noise >= 0 and math.isfinite(found.signal)
    if not by_slices:
        np.testing.assert_allclose(found.signal + found.noise / found.examples, whole, rtol=1e-10)


# Traces by sampled labels.


def test_traces_are_those_of_the_dense_matrix_and_one_draw_is_within_6_percent():
    """512 examples, 50 draws; per variable and whole; L2 regularizers are part of the Gauss-Newton matrix."""
    objective = Objective(network(regularizer=keras.regularizers.L2(0.01)), data(512), kind="ggn")
    found = layer_traces(objective, draws=50)
    diagonal = split_by_variable(np.diag(dense(objective)), objective)
    expected = np.array([d.sum() for d in diagonal])
    assert np.all(np.abs(found.values - expected) < 4 * found.stderr) and np.all(found.stderr < 0.02 * expected)
    value, stderr = found.of()
    assert abs(value - expected.sum()) < 4 * stderr
    assert np.std(found.samples.sum(1)) < 0.06 * expected.sum()
    assert abs(found.of([0, 1])[0] - expected[:2].sum()) < 4 * found.of([0, 1])[1]
    other = layer_traces(objective, seed=1, draws=2)
    assert not np.any(np.isclose(other.samples, found.samples[:2], rtol=1e-6, atol=0.0))
    np.testing.assert_array_equal(layer_traces(objective, seed=0, draws=1).samples, found.samples[:1])


@pytest.mark.parametrize("name", ["conv2d", "embedding"])
def test_traces_of_other_layers_are_without_bias(name):
    """By random signs; of 6 examples in batches of 4 and 2."""
    case = MODELS[name]().compile()
    objective = Objective(case.model, (case.x, case.y), kind="fisher", batch_size=4)
    found = layer_traces(objective, draws=200)
    diagonal = split_by_variable(np.diag(dense(objective)), objective)
    assert np.all(np.abs(found.values - [d.sum() for d in diagonal]) < 4 * found.stderr)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_traces_through_batch_statistics_are_without_bias(batch_size):
    """Of 16 examples that all depend on each other; the oracle is tapes over Keras' own `stateless_call`."""
    model = network(extra=[keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.ReLU()])
    x, y = data(16)
    found = layer_traces(Objective(model, (x, y), training=True, batch_size=batch_size), draws=400)
    size = batch_size or 16
    expected = np.mean([gauss_newton_traces(model, x[i : i + size]) for i in range(0, 16, size)], 0)
    assert np.all(np.abs(found.values - expected) < 4 * found.stderr + 1e-14)
    assert found.stderr.sum() < 0.15 * expected.sum()
    c = curvature(model, (x, y), "ggn", training=True, batch_size=batch_size)
    by_products = traces.hutchinson(c, c.variables, 60, parts=c.layers)[1]
    for estimate, exact in zip(by_products.values(), np.split(expected, [2, 4, 6])):
        assert abs(estimate.value - exact.sum()) < 4 * estimate.stderr
    # normalization takes the bias out that is before it
    assert max(expected[3], found.values[3]) < 1e-20 < 1e-3 < expected[2]
    frozen = network(extra=[keras.layers.BatchNormalization(trainable=False)])
    assert not Objective(frozen, (x, y), training=True).mixes_examples


def gauss_newton_traces(model, x):
    """The trace of each variable's block on one batch in training mode, of a softmax cross-entropy."""
    weights, rest = [[v.value for v in a] for a in (model.trainable_variables, model.non_trainable_variables)]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        z, _ = model.stateless_call(weights, rest, tf.convert_to_tensor(x), training=True)
    p, rows = tf.nn.softmax(z).numpy(), [j.numpy().reshape(*z.shape, -1) for j in tape.jacobian(z, weights)]
    information = np.einsum("nk,kl->nkl", p, np.eye(CLASSES)) - np.einsum("nk,nl->nkl", p, p)
    return np.array([np.einsum("nkv,nkl,nlv->", j, information, j) for j in rows]) / len(x)


def test_standard_errors_of_traces():
    found = LayerTraces(np.array([[1.0, 5.0], [3.0, 3.0], [5.0, 1.0]]))
    np.testing.assert_allclose(found.values, [3.0, 3.0])
    np.testing.assert_allclose(found.stderr, 2.0 / math.sqrt(3))
    assert found.of() == (6.0, 0.0)  # the layers' errors cancel here
    assert math.isnan(LayerTraces(np.ones((1, 2))).of()[1])


# Several replicas, in a process of its own: two strategies in one process collide.


@pytest.mark.slow
def test_two_replicas_give_the_numbers_of_one():
    script = pathlib.Path(__file__).with_name("noise_on_replicas.py")
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(script.parents[1]), "CUDA_VISIBLE_DEVICES": "-1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    np.testing.assert_allclose(found["two"], found["one"], rtol=1e-5)


# What is refused.


def test_arguments_that_are_refused(objective):
    for name, value in (("micro_batch", 0), ("micro_batch", 2.0), ("parts", 1), ("curvature", 1)):
        with pytest.raises(ValueError, match=f"`noise`: `{name}` must be .* Received: {name}={value}"):
            noise(objective, **{name: value})
    for name, value in (("seed", -1), ("draws", 0)):
        with pytest.raises(ValueError, match=f"`layer_traces`: `{name}` must be .* Received: {name}={value}"):
            layer_traces(objective, **{name: value})
    with pytest.raises(ValueError, match="`decay` must be"):
        NoiseAverage(decay=1.0)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        noise(objective, 3, 4).rate(0)


def test_gradients_that_do_not_fit_into_memory_are_refused_with_the_bytes(objective, monkeypatch):
    """16 gradients and two products, of 8 bytes for each weight."""
    size = sum(v.shape.num_elements() for v in objective.variables)
    monkeypatch.setattr(noise_parts, "MEMORY", 10.5 * 8 * size)
    with pytest.raises(ValueError, match=rf"16 parts need {18 * 8 * size / 1e9:.3g} GB .*Pass `parts=8` or fewer"):
        noise(objective)
    assert noise(objective, parts=8, curvature=False).examples == ROWS


def test_one_micro_batch_is_refused(objective):
    with pytest.raises(ValueError, match=r"micro_batch=25 and 48 examples. Use a smaller `micro_batch`"):
        noise(objective, micro_batch=25)
    with pytest.raises(ValueError, match="larger than small=64: cut the batch into two micro-batches at least"):
        two_batch_sizes(64, 64, 1.0, 1.0)


def test_a_loss_without_labels_to_draw_is_refused():
    model, (x, y) = network(outputs=1), data()
    model.compile("sgd", "hinge")
    with pytest.raises(ValueError, match="(?i)hinge"):
        layer_traces(Objective(model, (x, y[:, np.newaxis])), draws=1)
    with pytest.raises(ValueError, match="not drawn"):
        layer_traces(Objective(network(), (x, y), kind="empirical_fisher"))
