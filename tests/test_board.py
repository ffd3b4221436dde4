"""`CurvatureBoard`: what it shows against dense matrices, what it leaves as it was, what it costs, what goes wrong."""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from boards import Clock, arrays, boarded, numbers, read, tags, texts
from cases import float64
from selection import some
from tensorboard.plugins.custom_scalar import layout_pb2

import keras_curvature as kc
from keras_curvature import keras_internals, replicas
from keras_curvature.monitor.board import axis, failures, first_batch, layout, pages, panels
from keras_curvature.monitor.board import board as board_module
from keras_curvature.monitor.board.advice import Advice
from keras_curvature.monitor.board.budget import Budget, Costs
from keras_curvature.monitor.objective import reading
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.operator import Curvature
from keras_curvature.monitor.spectra.density import Density
from keras_curvature.solvers import flat
from keras_curvature.training.reports import reported_of

HERE = pathlib.Path(__file__).parent
RATE, MOMENTUM, BATCH = 0.1, 0.8, 16


def digits(rows=56, seed=0):
    """Inputs in four dimensions, and labels of three classes."""
    x = np.random.default_rng(seed).standard_normal((rows, 4)).astype(keras.config.floatx())
    return x, np.argmax(x[:, :3] + 0.5 * np.roll(x[:, :3], 1, 0), axis=1).astype("int32")


def small(seed=0):
    """A tanh network of 35 weights."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential([
        keras.Input((4,)), layers.Dense(4, activation="tanh", name="hidden"), layers.Dense(3, name="out"),
    ])  # fmt: skip


def compiled(model, optimizer, **arguments):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False, **arguments)
    return model


# What is shown, against dense matrices.


class Weights(keras.callbacks.Callback):
    """Notes the weights before each step, and after the last."""

    def on_train_begin(self, logs=None):
        self.before = []

    def on_train_batch_begin(self, batch, logs=None):
        self.before.append([w.numpy() for w in self.model.trainable_variables])


@tf.function(reduce_retracing=True)
def gradient_and_hessian(vector, x, y):
    """Of the loss of `small()`, whose weights are laid end to end; by nested tapes."""
    with tf.GradientTape() as outer:
        outer.watch(vector)
        with tf.GradientTape() as inner:
            inner.watch(vector)
            parts, shapes = tf.split(vector, [16, 4, 12, 3]), ([4, 4], [4], [4, 3], [3])
            W1, b1, W2, b2 = (tf.reshape(part, shape) for part, shape in zip(parts, shapes))
            log_p = tf.nn.log_softmax(tf.tanh(x @ W1 + b1) @ W2 + b2)
            loss = -tf.reduce_mean(tf.gather(log_p, y, batch_dims=1))
        gradient = inner.gradient(loss, vector)
    return gradient, outer.jacobian(gradient, vector)


def dense(weights, x, y):
    """Gradient and Hessian of the loss at some weights; float64."""
    found = gradient_and_hessian(tf.constant(np.concatenate([w.ravel() for w in weights])), x, y)
    return [a.numpy() for a in found]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A training with heavy ball in float64 that is measured at every step: board, what it wrote, weights, data."""
    folder = tmp_path_factory.mktemp("shown")
    with float64():
        x, y = digits()
        model = compiled(small(), keras.optimizers.SGD(RATE, momentum=MOMENTUM))
        board, weights = boarded(folder, Clock(), report_at="end"), Weights()
        model.fit(x, y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0, callbacks=[board, weights])
    return {"folder": folder / "curvature", "weights": weights.before, "x": x, "y": y,
            "numbers": numbers(folder / "curvature"), "limits": numbers(folder / "curvature" / "limit")}  # fmt: skip


@pytest.fixture(scope="module")
def oracle(shown):
    """`{step: (weights, gradient, Hessian)}` on the first batch, before the step that follows."""
    steps = [step for step, _ in shown["numbers"]["3_step/gradient_norm"]]
    batch = shown["x"][:BATCH], shown["y"][:BATCH]
    return {s: (shown["weights"][s], *dense(shown["weights"][s], *batch)) for s in steps}


def test_it_measures_from_the_first_step_on(shown):
    steps = [step for step, _ in shown["numbers"]["1_stability/sharpness"]]
    assert steps[:2] == [1, 2] and len(steps) >= 5


@pytest.mark.parametrize(("tag", "tolerance"), [
    ("1_stability/sharpness", 2e-2), ("1_stability/gauge", 2e-2), ("1_stability/most_negative", 5e-2),
    ("3_step/gradient_norm", 1e-6), ("3_step/curvature_along_gradient", 1e-6), ("3_step/best_rate", 1e-6),
])  # fmt: skip
def test_numbers_of_a_measurement_are_those_of_the_dense_matrix(tag, tolerance, shown, oracle):
    formula = {
        "1_stability/sharpness": lambda g, H: np.linalg.eigvalsh(H)[-1],
        "1_stability/gauge": lambda g, H: RATE * np.linalg.eigvalsh(H)[-1] / (2 * (1 + MOMENTUM)),
        "1_stability/most_negative": lambda g, H: np.linalg.eigvalsh(H)[0],
        "3_step/gradient_norm": lambda g, H: np.linalg.norm(g),
        "3_step/curvature_along_gradient": lambda g, H: g @ H @ g / (g @ g),
        "3_step/best_rate": lambda g, H: g @ g / (g @ H @ g),
    }[tag]
    found = shown["numbers"][tag]
    assert found
    for step, value in found:
        _, g, H = oracle[step]
        # 10 products from a random vector (20 of the smallest); later on they are 5 from the vector before
        np.testing.assert_allclose(value, formula(g, H), rtol=min(tolerance, 1e-3) if step == 1 else tolerance)


@pytest.mark.parametrize("tag", ["sharpness", "most_negative"])
def test_an_eigenvalue_lies_within_each_residual(tag, shown, oracle):
    residuals = dict(shown["numbers"][f"1_stability/{tag}_residual"])
    for step, value in shown["numbers"][f"1_stability/{tag}"]:
        apart = np.abs(np.linalg.eigvalsh(oracle[step][2]) - value).min()
        assert apart <= residuals[step] * abs(value) + 1e-6 * abs(value)  # TensorBoard's numbers are of 32 bits
        assert tag == "most_negative" or residuals[step] <= panels.FAR


def test_a_start_that_is_far_off_takes_more_products(monkeypatch):
    runs, extremes = [], Curvature.extremes

    def counted(self, *arguments):
        runs.append(extremes(self, *arguments))
        return runs[-1]

    monkeypatch.setattr(Curvature, "extremes", counted)
    with float64():
        x, y = digits()
        model = compiled(small(), "sgd")
        asked = panels.Panels(kc.curvature(model, (x, y), training=True), BATCH)
        for seed in (0, 1):
            model.set_weights([3 * w for w in small(seed).get_weights()])
            asked.begin(model)
            asked._gradient()
            asked._sharpness()
        _, H = dense(model.get_weights(), x, y)
    residuals = [run[0].residuals[0] / run[0].values[0] for run in runs]
    assert [run[0].products for run in runs] == [10, 5, 5] and residuals[1] > panels.FAR
    assert asked.values["1_stability/sharpness_residual"] == residuals[2] < residuals[1]
    assert asked.sharpness == pytest.approx(np.linalg.eigvalsh(H)[-1], rel=1e-2)


def test_the_share_of_the_gradient_in_the_sharpest_direction(shown, oracle):
    step, value = shown["numbers"]["3_step/gradient_in_sharpest"][0]
    _, g, H = oracle[step]
    u = np.linalg.eigh(H)[1][:, -1]
    np.testing.assert_allclose(value, (u @ g) ** 2 / (g @ g), rtol=5e-3)


def test_the_noise_scale_is_that_of_the_gradients_of_single_examples(shown, oracle):
    """`tr(S) / |G|^2`, with the covariance of the 16 gradients, and its share taken out of `|g|^2`."""
    for step, value in shown["numbers"]["2_noise/noise_scale"]:
        weights, g, _ = oracle[step]
        single = [dense(weights, shown["x"][i : i + 1], shown["y"][i : i + 1])[0] for i in range(BATCH)]
        noise = np.var(single, axis=0, ddof=1).sum()
        np.testing.assert_allclose(value, noise / (g @ g - noise / BATCH), rtol=1e-5)
        assert dict(shown["numbers"]["2_noise/gauge"])[step] == pytest.approx(BATCH / value)


def test_an_update_is_that_of_the_step_after_the_measurement(shown, oracle):
    checked = 0
    for step, value in shown["numbers"]["3_step/update_norm"]:
        before, g, _ = oracle[step]
        move = [b - a for a, b in zip(before, shown["weights"][step + 1])]
        flat_move = np.concatenate([m.ravel() for m in move])
        np.testing.assert_allclose(value, np.linalg.norm(flat_move), rtol=1e-6)
        layers = [(move[:2], before[:2]), (move[2:], before[2:])]
        ratios = [np.sqrt(sum((m**2).sum() for m in a)) / np.sqrt(sum((w**2).sum() for w in b)) for a, b in layers]
        shown_here = {t: dict(shown["numbers"][f"3_step/{t}"])[step] for t in (
            "cosine", "update_to_weight_max", "update_to_weight_median")}  # fmt: skip
        np.testing.assert_allclose(shown_here["update_to_weight_max"], max(ratios), rtol=1e-6)
        np.testing.assert_allclose(shown_here["update_to_weight_median"], np.median(ratios), rtol=1e-6)
        cosine = -flat_move @ g / np.linalg.norm(flat_move) / np.linalg.norm(g)
        np.testing.assert_allclose(shown_here["cosine"], cosine, rtol=1e-5)
        checked += 1
    assert checked >= 3


def test_two_updates_in_a_row_are_compared(shown):
    flat_weights = np.stack([np.concatenate([w.ravel() for w in weights]) for weights in shown["weights"]])
    moves = np.diff(flat_weights, axis=0)
    found = shown["numbers"]["3_step/cosine_of_updates"]
    assert len(found) >= 2
    for step, value in found:  # the second of them begins at this step
        one, two = moves[step - 1], moves[step]
        np.testing.assert_allclose(value, one @ two / np.linalg.norm(one) / np.linalg.norm(two), rtol=1e-5)


def test_shares_of_the_layers_add_up(shown, oracle):
    shares = {tag: dict(values) for tag, values in shown["numbers"].items() if tag.startswith("6_layers/trace_share/")}
    assert set(shares) == {"6_layers/trace_share/hidden", "6_layers/trace_share/out"}
    trace, directions, sharpness = (dict(shown["numbers"][t]) for t in (
        "6_layers/trace", "6_layers/effective_directions", "1_stability/sharpness"))  # fmt: skip
    for step in trace:
        assert sum(share[step] for share in shares.values()) == pytest.approx(1.0)
        assert directions[step] == pytest.approx(trace[step] / sharpness[step], rel=1e-6)


def normalized(seed=0):
    """A network with batch statistics, in training mode of those of the batch."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential([
        keras.Input((4,)), layers.Dense(5, name="hidden"), layers.BatchNormalization(name="normal"),
        layers.Activation("tanh"), layers.Dense(3, name="out"),
    ])  # fmt: skip


def slopes(model, x, y):
    """The gradient of the loss of a batch in training mode, flat."""
    with tf.GradientTape() as tape:
        log_p = tf.nn.log_softmax(model(x, training=True))
        loss = -tf.reduce_mean(tf.gather(log_p, y, batch_dims=1))
    return np.concatenate([g.numpy().ravel() for g in tape.gradient(loss, model.trainable_variables)])


def gauss_newton_traces(model, x):
    """Of each variable's block in training mode: `tr sum_n J_n' (diag p_n - p_n p_n') J_n / N`, by all of J."""
    with tf.GradientTape() as tape:
        z = model(x, training=True)
    p = tf.nn.softmax(z).numpy()
    H = np.eye(3) * p[:, None] - p[:, :, None] * p[:, None]
    J = [np.reshape(j, (*z.shape, -1)) for j in tape.jacobian(z, model.trainable_variables)]
    return [np.einsum("nca,ncd,nda->", j, H, j) / len(x) for j in J]


@pytest.mark.parametrize(("make", "micro_batch"), [(small, 1), (normalized, 4)])
def test_traces_and_noise_are_those_of_all_jacobians_and_gradients(make, micro_batch, monkeypatch):
    monkeypatch.setattr(panels, "DRAWS", 500)
    with float64():
        (x, y), model = digits(BATCH), compiled(make(), "sgd")
        asked = panels.Panels(kc.curvature(model, (x, y), training=True), BATCH)
        asked.begin(model)
        asked._layers()
        asked._noise_scale()
        exact = gauss_newton_traces(model, x)
        cuts = [slice(i, i + micro_batch) for i in range(0, BATCH, micro_batch)]
        single = np.stack([slopes(model, x[cut], y[cut]) for cut in cuts])
    found, whole = asked.values, asked.values["6_layers/trace"]
    assert abs(whole - sum(exact)) <= 4 * found["6_layers/trace_stderr"] <= 0.3 * whole
    for name, own in asked.measured.layers.items():
        expected = sum(exact[i] for i in own)
        assert found[f"6_layers/trace_share/{name}"] * whole == pytest.approx(expected, abs=0.06 * sum(exact))
    noise, g = micro_batch * np.var(single, axis=0, ddof=1).sum(), single.mean(0)
    expected = noise / (g @ g - noise / BATCH)
    assert expected > 0 and found["2_noise/noise_scale"] == pytest.approx(expected, rel=1e-6)


def test_limits_are_second_lines_of_the_same_name(shown):
    limits, values = shown["limits"], shown["numbers"]
    assert {"1_stability/gauge", "1_stability/sharpness", "2_noise/gauge", "3_step/best_rate"} <= set(limits)
    for tag, points in limits.items():
        assert [step for step, _ in points] == [step for step, _ in values[tag]]
    assert {value for _, value in limits["1_stability/gauge"]} == {1.0}
    np.testing.assert_allclose([v for _, v in limits["1_stability/sharpness"]], 2 * (1 + MOMENTUM) / RATE, rtol=1e-6)
    np.testing.assert_allclose([v for _, v in limits["3_step/best_rate"]], RATE, rtol=1e-6)
    for _, value in limits.get("2_noise/noise_scale", []):
        assert value == BATCH


def test_the_loss_is_the_mean_since_the_last_point(shown):
    losses = dict(shown["numbers"]["3_step/loss"])
    last = max(losses)
    assert last == len(shown["weights"])  # the end of the last epoch is there, and every step has one point at most
    x, y = shown["x"], shown["y"]
    # at the end of an epoch all that was not shown before is in one mean; here the step before was shown too
    previous = max(step for step in losses if step < last)
    found, seen = 0.0, 0
    for step in range(previous, last):
        rows = slice(BATCH * (step % 4), BATCH * (step % 4 + 1))
        W1, b1, W2, b2 = shown["weights"][step]
        logits = np.tanh(x[rows] @ W1 + b1) @ W2 + b2
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        found -= log_p[np.arange(len(log_p)), y[rows]].sum()
        seen += len(log_p)
    assert losses[last] == pytest.approx(found / seen, rel=1e-5)


def test_the_layout_asks_questions_and_finds_its_numbers(shown):
    content = arrays(shown["folder"], "custom_scalars__config__")[-1][1].item()
    found = layout_pb2.Layout.FromString(content)
    assert [category.title for category in found.category] == [
        "Is the step stable?", "Is the batch of the right size?", "How far does a step go?", "Where is the curvature?",
    ]  # fmt: skip
    patterns = [tag for c in found.category for chart in c.chart for tag in chart.multiline.tag]
    matched = {tag for tag in shown["numbers"] if any(re.match(pattern, tag) for pattern in patterns)}
    assert matched == set(shown["numbers"]) - set(layout.BOUNDS)
    for chart in (chart for category in found.category for chart in category.chart):
        wanted = chart.multiline.tag or [chart.margin.series[0].value]
        assert any(re.match(pattern, tag) for tag in shown["numbers"] for pattern in wanted)
    assert found.category[0].chart[0].title.startswith("stability gauge")


def test_every_number_is_described(shown):
    events = read(shown["folder"])
    for tag in shown["numbers"]:
        assert len(events.SummaryMetadata(tag).summary_description) > 20


def test_texts_are_the_page_about_the_board_and_the_report(shown):
    found = texts(shown["folder"])
    about = found["about"][-1][1]
    assert "Hessian of the loss" in about and "35 weights" in about
    assert "training mode, on 16 examples in 1 batch" in about and f"2(1+{MOMENTUM:g})/{RATE:g}" in about
    assert len(found["report"]) == 1 and found["report"][0][1].startswith("```")
    assert "eval mode" in found["report"][0][1] and "hidden" in found["report"][0][1]
    assert tags(shown["folder"], "images") == ["report_figure"]
    width, height, png = arrays(shown["folder"], "report_figure")[0][1]
    assert tf.io.decode_png(png).shape[:2] == (int(height), int(width))


def test_the_spectrum_has_all_eigenvalues(shown, oracle):
    step, bars = arrays(shown["folder"], pages.SPECTRUM)[-1]
    assert step == len(shown["weights"]) and bars.shape == (axis.BINS, 3)
    assert np.allclose(bars[1:, 0], bars[:-1, 1])
    assert (10 ** bars[:, 2] - 1).sum() == pytest.approx(35)
    assert "log10" in read(shown["folder"]).SummaryMetadata(pages.SPECTRUM).summary_description


def test_bars_of_a_known_spectrum():
    eigenvalues = np.array([[-0.02, 0.0, 0.0, 0.0, 0.5, 0.5, 40.0, 90.0]])
    density = Density(eigenvalues, np.full((1, 8), 1 / 8), 8)
    line = axis.Axis.of(density)
    assert line.unit == 1e-2  # three decades below the largest
    np.testing.assert_allclose(line.place(np.array([-0.99, 0.09, 99.99])), [-2, 1, 4], rtol=1e-12)
    bars = line.bars(density, 8)
    places, draws = line.place(eigenvalues[0]), np.random.default_rng(0).standard_normal(200_000)
    edges = np.concatenate([[-np.inf], bars[1:, 0], [np.inf]])  # each eigenvalue is a Gaussian on the axis
    expected = sum(np.histogram(place + axis.WIDTH * draws, edges)[0] for place in places) / len(draws)
    np.testing.assert_allclose(10 ** bars[:, 2] - 1, expected, atol=0.01)
    wilder = Density(np.array([[1e6, -1e6]]), np.array([[0.5, 0.5]]), 8)  # off the axis that the first one has set
    heights = 10 ** line.bars(wilder, 8)[:, 2] - 1
    assert heights.sum() == pytest.approx(8) and heights[:4].sum() > 3.9 and heights[-4:].sum() > 3.9


def test_adam_is_measured_in_its_own_metric(tmp_path):
    with float64():
        x, y = digits()
        model = compiled(small(), keras.optimizers.Adam(0.01))
        weights, board = Weights(), boarded(tmp_path, Clock(), report_at=None)
        state = []

        class State(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                if len(weights.before) == 2:  # after one step
                    state.extend(v.numpy().ravel() for v in self.model.optimizer._velocities)

        model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[weights, State(), board])
        _, H = dense(weights.before[1], x[:BATCH], y[:BATCH])
    # what Keras' step of Adam multiplies the average of the gradients by, after one step
    root = np.sqrt(np.sqrt(1 - 0.999) / (1 - 0.9) / (np.sqrt(np.concatenate(state)) + 1e-7))
    expected = np.linalg.eigvalsh(root[:, None] * H * root)[-1]
    found, limits = numbers(tmp_path / "curvature"), numbers(tmp_path / "curvature" / "limit")
    (step, value), (_, gauge) = (found[f"1_stability/{t}"][0] for t in ("preconditioned_sharpness", "gauge"))
    assert step == 1
    assert value == pytest.approx(expected, rel=1e-3)
    assert gauge == pytest.approx(0.01 * expected * (1 - 0.9) / (2 * (1 + 0.9)), rel=1e-3)
    assert limits["1_stability/preconditioned_sharpness"][0][1] == pytest.approx(2 * (1 + 0.9) / (1 - 0.9) / 0.01)
    assert "1_stability/sharpness" not in limits and "3_step/best_rate" not in found


# Training is what it was.


def regularized(seed=0):
    """Batch statistics and random masks."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential([
        keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(), layers.Activation("tanh"),
        layers.Dropout(0.3), layers.Dense(3),
    ])  # fmt: skip


def endless(x, y):
    """Batches of two sizes from a Python generator."""
    while True:
        for start in range(0, 40, 8):
            yield x[start : start + 8], y[start : start + 8]


def trained(make, fit, callbacks=(), **arguments):
    """All that a training leaves: history, variables, and the state of the global generators."""
    model = compiled(make["model"](), make["optimizer"](), metrics=["accuracy"], **arguments)
    random.seed(0)
    history = model.fit(**fit(), verbose=0, callbacks=list(callbacks)).history
    drawn = [random.random(), *np.random.random(2), *keras.random.normal((2,)).numpy(), *tf.random.normal((2,)).numpy()]
    return history, [v.numpy() for v in (*model.variables, *model.optimizer.variables)], drawn


def assert_equal_bits(one, other):
    assert one[0].keys() == other[0].keys()
    for name in one[0]:
        np.testing.assert_array_equal(one[0][name], other[0][name])
    assert len(one[1]) == len(other[1])
    for a, b in zip(one[1], other[1]):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one[2], other[2])


ADAM = {"model": regularized, "optimizer": keras.optimizers.Adam}
TRAININGS = {
    "arrays": (ADAM, lambda x, y: {"x": x, "y": y, "batch_size": 16, "epochs": 2}, {}),
    "steps_per_execution": (
        {"model": small, "optimizer": lambda: keras.optimizers.Adam(gradient_accumulation_steps=2)},
        lambda x, y: {"x": endless(x, y), "steps_per_epoch": 7, "epochs": 2}, {"steps_per_execution": 3},
    ),
    "curved": (
        {"model": lambda: kc.curved(small()), "optimizer": kc.CurveBall},
        lambda x, y: {"x": x, "y": y, "sample_weight": np.linspace(0, 1, len(x)), "batch_size": 16, "epochs": 2}, {},
    ),
}  # fmt: skip
SLOW_TRAININGS = ["curved", "steps_per_execution"]


@pytest.mark.filterwarnings("ignore:.shuffle=True. was passed:UserWarning")
@pytest.mark.parametrize("name", some(TRAININGS, [name for name in TRAININGS if name not in SLOW_TRAININGS]))
def test_training_with_the_board_is_bit_for_bit_training_without_it(name, tmp_path):
    make, fit, arguments = TRAININGS[name]
    x, y = digits()
    board = boarded(tmp_path, Clock(), report_at="end" if name == "arrays" else None)
    with_board = trained(make, lambda: fit(x, y), [board], **arguments)
    assert_equal_bits(with_board, trained(make, lambda: fit(x, y), **arguments))
    assert len(numbers(tmp_path / "curvature")["1_stability/sharpness"]) >= 2
    assert len(texts(tmp_path / "curvature").get("report", [])) == (1 if name == "arrays" else 0)


@pytest.mark.slow
def test_training_in_half_precision_is_bit_for_bit_that_without_the_board(tmp_path):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        x, y = digits()
        make = {"model": small, "optimizer": keras.optimizers.Adam}
        fit = lambda: {"x": x, "y": y, "batch_size": 16, "epochs": 2}  # noqa: E731
        board = boarded(tmp_path, Clock(), report_at=None)
        assert_equal_bits(trained(make, fit, [board]), trained(make, fit))
    finally:
        keras.config.set_dtype_policy(policy)
    found = numbers(tmp_path / "curvature")
    assert len(found["1_stability/sharpness"]) >= 2 and "1_stability/gauge" in found


@pytest.mark.filterwarnings("ignore:.shuffle=True. was passed:UserWarning")
@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_data_set_that_shuffles_is_another_one_for_the_board(own, tmp_path, monkeypatch):
    """Reading it moves its order, once: what the docstring warns of, and that what it says to do is enough."""
    x, y = digits()
    reports, seen, read, batches = [], [], [], reading.batches

    def shuffled():
        return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(64, seed=1).batch(16)

    def report(measured):
        reports.append(measured)
        seen.append(float(measured.loss))
        raise failures.NotFinite("enough")

    monkeypatch.setattr(board_module, "measure", report)
    monkeypatch.setattr(reading, "batches", lambda *arguments: read.append(1) or batches(*arguments))
    make, data = {"model": small, "optimizer": keras.optimizers.Adam}, shuffled()
    board = boarded(tmp_path, Clock(), data=data, report_at="epoch", examples=32)
    with pytest.warns(UserWarning, match="enough"):
        with_board = trained(make, lambda: {"x": shuffled() if own else data, "epochs": 3}, [board])
    without = trained(make, lambda: {"x": shuffled(), "epochs": 3})
    assert len(reports) == 3 and len(set(map(id, reports))) == 1 and len(set(seen)) == 3
    assert not reports[0].objective.training and reports[0].objective.examples == 32 and len(read) == 1
    if own:
        assert_equal_bits(with_board, without)
    else:
        assert any((a != b).any() for a, b in zip(with_board[1], without[1]))


class Once(keras.callbacks.Callback):
    """Watches the first batch of a `fit`."""

    def on_train_begin(self, logs=None):
        self.batch = None

    def on_epoch_begin(self, epoch, logs=None):
        if self.batch is None:
            first_batch.watch(self.model, self.take)

    def take(self, batch):
        self.batch = batch


def ending(x, y):
    """A data set of which nobody knows the length, with batches of several sizes."""
    spec = tf.TensorSpec((None, 4), x.dtype), tf.TensorSpec((None,), y.dtype)
    batches = [(x[a:b], y[a:b]) for a, b in ((0, 8), (8, 16), (16, 20), (20, 27))]
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)


@pytest.mark.filterwarnings("ignore:.shuffle=True. was passed:UserWarning", "ignore:Your input ran out of data")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("eagerly", [False, True])
def test_the_first_batch_is_seen_in_passing(steps, eagerly):
    x, y = digits()
    traces, results, once = [], [], Once()
    for callbacks in ([], [once]):
        model = compiled(small(), "sgd", metrics=["accuracy"], steps_per_execution=steps, run_eagerly=eagerly)
        count, own = [], model.train_step
        model.train_step = lambda data, own=own, count=count: (count.append(1), own(data))[1]
        history = model.fit(ending(x, y), epochs=2, verbose=0, callbacks=callbacks).history
        results.append((history, [v.numpy() for v in model.variables], []))
        traces.append(len(count))
    assert_equal_bits(*results)
    assert traces[0] == traces[1]  # not traced another time
    np.testing.assert_array_equal(once.batch[0], x[:8])
    np.testing.assert_array_equal(once.batch[1], y[:8])


# What it costs.


def test_a_budget_counts_what_is_done_once_apart():
    clock = Clock(0.0)
    budget = Budget({"measurements": 0.1}, clock)

    def work(seconds):
        clock.now += seconds

    assert budget.timed("measurements", lambda: work(5.0), once=True) == 5.0
    clock.now += 10.0
    assert budget.elapsed == 10.0
    assert budget.allows("measurements", 1.0) and not budget.allows("measurements", 1.01)
    budget.timed("measurements", lambda: work(0.5))
    assert budget.spent["measurements"] == 0.5 and budget.once["measurements"] == 5.0
    assert budget.allows("measurements", 0.55) and not budget.allows("measurements", 0.56)  # of 10.5 seconds


def test_what_was_done_once_is_taken_to_cost_its_products():
    costs = Costs()
    costs.product = 0.1
    costs.note("sharpness", 30.0)  # tracing and all
    assert costs.expected("sharpness", 5) == 0.5
    costs.note("sharpness", 0.7)
    assert costs.expected("sharpness", 5) == 0.7


class Seconds(keras.callbacks.Callback):
    """Every step takes so many seconds of a clock."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def on_train_batch_end(self, batch, logs=None):
        self.clock.now += self.seconds


def test_a_training_is_measured_within_the_budget(tmp_path, monkeypatch):
    """Steps and passes over the examples take fixed times on the test's clock, however fast the machine is."""
    clock, on_batch = Clock(0.0), Objective.on_batch

    def pass_over(self, *arguments):
        clock.now += 0.05
        return on_batch(self, *arguments)

    monkeypatch.setattr(Objective, "on_batch", pass_over)
    x, y = digits()
    model, board = compiled(small(), keras.optimizers.Adam()), boarded(tmp_path, clock, budget=0.05, report_at=None)
    data = tf.data.Dataset.from_tensors((x, y)).repeat()
    model.fit(
        data, steps_per_epoch=150, epochs=8, shuffle=False, verbose=0, callbacks=[board, Seconds(clock, 0.1)],
    )  # fmt: skip
    spent, steps = board._budget.spent, numbers(tmp_path / "curvature")["1_stability/preconditioned_sharpness"]
    assert len(steps) == board._measurements >= 3
    assert board._budget.elapsed >= 120.0  # of 1200 steps; the first measurement is not in it
    assert spent["measurements"] + spent["density"] <= 0.05 * board._budget.elapsed
    assert sum(spent.values()) <= 0.055 * board._budget.elapsed


@pytest.mark.parametrize("budget", [pytest.param(0.02, marks=pytest.mark.slow), 0.2])
def test_the_budget_is_kept(budget, tmp_path, monkeypatch):
    clock, spent, steps = Clock(0.0), [], 400

    class Fake:
        """Stands for `Panels`: pieces that take their time, and nothing else."""

        def __init__(self, *_):
            self.values, self.limits, self.weights, self.gradient = {}, {}, [], []
            self.pieces = [
                panels.Piece("a", self.of(8.0, 0.3), 2), panels.Piece("b", self.of(3.0, 1.0), 4, every=3),
            ]  # fmt: skip

        def of(self, first, then):
            def ask(_):
                clock.now += first if not ask.asked else then
                ask.asked += 1
                spent.append((clock.now, 0.0 if ask.asked == 1 else then))

            ask.asked = 0
            return ask

        def begin(self, model):
            """Nothing to do."""

        def again(self):
            clock.now += 0.4 * panels.WARM

        def update(self, *_):
            return {}

        def bounce(self):
            return {}

    class Second(keras.callbacks.Callback):
        """Every step takes a second."""

        def on_train_batch_begin(self, batch, logs=None):
            clock.now += 1.0

    monkeypatch.setattr(board_module, "Panels", Fake)
    monkeypatch.setattr(board_module, "curvature", lambda *_, **__: None)
    for name in ("_write_about", "_draw_spectrum"):
        monkeypatch.setattr(board_module.CurvatureBoard, name, lambda self: None)
    board = boarded(tmp_path, clock, budget, report_at=None)
    x = np.zeros((1, 4), "float32")
    data = tf.data.Dataset.from_tensors((x, np.zeros(1, "int32"))).repeat(steps)
    compiled(small(), "sgd").fit(data, shuffle=False, verbose=0, callbacks=[Second(), board])
    allowed = 0.75 * budget  # the rest is for the spectrum
    total = 0.0
    for now, seconds in spent:
        total += seconds
        assert seconds == 0.0 or total <= allowed * (now - 13.0) + 1e-9  # 13.0: what was done once
    assert total > 0.5 * allowed * steps  # and it is made use of
    assert sum(board._budget.once.values()) == pytest.approx(13.0)
    assert sum(board._budget.spent.values()) <= (budget + 0.005) * (clock.now - 13.0)  # live numbers and all


def test_a_budget_of_nothing_leaves_what_training_has_anyway(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no curvature is built")

    monkeypatch.setattr(board_module, "curvature", refuse)
    x, y = digits()
    model = compiled(kc.curved(small()), kc.CurveBall())
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[boarded(tmp_path, Clock(), budget=0)])
    found = numbers(tmp_path / "curvature")
    assert {"3_step/loss", "3_step/learning_rate", "1_stability/damping", "4_solver/beta", "4_solver/rho",
            "3_step/step_norm", "1_stability/steps_skipped", "1_stability/reduction_ratio"} == set(found)  # fmt: skip
    last, _, _ = reported_of(model).sums()["damping"]
    assert found["1_stability/damping"][-1][1] == pytest.approx(last)
    titles = [c.title for c in layout_pb2.Layout.FromString(
        arrays(tmp_path / "curvature", "custom_scalars__config__")[-1][1].item()).category]  # fmt: skip
    assert titles == ["Is the step stable?", "How far does a step go?", "What does the solver do?"]


# Over and over.


def test_two_measurements_of_the_same_weights_are_equal_bit_for_bit(tmp_path):
    x, y = digits()
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dropout(0.3), keras.layers.Dense(3)]
    model = compiled(keras.Sequential([keras.Input((4,)), *layers]), keras.optimizers.Adam())
    model.fit(x, y, batch_size=16, verbose=0)
    found = []
    for _ in range(2):
        asked = panels.Panels(kc.curvature(model, (x, y), training=True), 16)
        asked.begin(model)
        for piece in asked.pieces:
            piece.ask(asked)
        found.append((asked.values, asked.limits, asked.bars(asked.density())))
    assert found[0][0] == found[1][0] and found[0][1] == found[1][1] and len(found[0][0]) > 10
    np.testing.assert_array_equal(found[0][2], found[1][2])


def test_a_run_that_goes_on_continues_its_curves(tmp_path):
    x, y = digits()
    model = compiled(small(), keras.optimizers.SGD(0.1))
    for _ in range(2):
        model.fit(x, y, batch_size=16, verbose=0, callbacks=[boarded(tmp_path, Clock(), budget=0)])
    # sorted, because two files of one second come in the order of their names
    steps = sorted(step for step, _ in numbers(tmp_path / "curvature")["3_step/loss"])
    assert steps == sorted(set(steps)) and {1, 4, 5, 8} <= set(steps) <= set(range(1, 9))


@pytest.mark.parametrize("evaluates", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_validation_does_not_pass_for_training(evaluates, tmp_path):
    x, y = digits()

    class Evaluate(keras.callbacks.Callback):
        """Takes the metrics at an epoch's end."""

        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(x, y[::-1], verbose=0)

    model = compiled(kc.curved(small()), kc.CurveBall())
    callbacks = [Evaluate()] if evaluates else []
    history = model.fit(
        x, y, batch_size=len(x), epochs=3, validation_data=None if evaluates else (x, y[::-1]), verbose=0,
        callbacks=[*callbacks, boarded(tmp_path, Clock(), budget=0)],
    ).history  # fmt: skip
    found = numbers(tmp_path / "curvature")
    for tag, name in (("3_step/loss", "loss"), ("4_solver/beta", "beta"), ("1_stability/damping", "damping")):
        assert [value for _, value in found[tag]] == pytest.approx(history[name])


@pytest.mark.slow
def test_a_report_after_each_epoch(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(board_module.CurvatureBoard, "_draw_report", lambda board: written.append(board._step()))
    fitted(tmp_path, report_at="epoch")
    assert written == [4, 8]


@pytest.mark.skipif(not keras_internals.MULTI_OPTIMIZER, reason="this Keras has no `MultiOptimizer`")
def test_several_optimizers_have_no_one_rate(tmp_path):
    def chosen(variable):
        return first if "hidden" in variable.path else second

    first, second = keras.optimizers.SGD(0.1), keras.optimizers.Adam()
    model = compiled(small(), keras.optimizers.MultiOptimizer(chosen))
    found = fitted(tmp_path, model=model, budget=0)
    assert set(found) == {"3_step/loss"} and max(step for step, _ in found["3_step/loss"]) == 8


def test_a_model_without_an_optimizer_is_measured(tmp_path):
    class Own(keras.Sequential):
        """Descends by itself."""

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            for w, g in zip(self.trainable_variables, tape.gradient(loss, self.trainable_variables)):
                w.assign_sub(0.1 * g)
            self._loss_tracker.update_state(loss)
            return {"loss": self._loss_tracker.result()}

    model = Own([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(None, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    with pytest.warns(UserWarning, match="`Own` has its own `train_step`"):  # which may train another loss
        found = fitted(tmp_path, model=model)
    assert len(found["1_stability/sharpness"]) > 2 and "1_stability/gauge" not in found
    assert max(step for step, _ in found["3_step/loss"]) == 8
    assert "without an optimizer" in texts(tmp_path / "curvature")["about"][-1][1]


# What goes wrong.


def fitted(folder, callbacks=(), model=None, **arguments):
    """A short training with a board."""
    x, y = digits()
    model = model or compiled(small(), keras.optimizers.SGD(0.1))
    board = boarded(folder, Clock(), **{"report_at": None, **arguments})
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[*callbacks, board])
    return numbers(folder / "curvature")


def test_a_piece_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("no noise today")

    monkeypatch.setattr(panels.Panels, "_noise_scale", fail)
    with pytest.warns(UserWarning, match="the noise scale failed with RuntimeError: no noise today") as caught:
        found = fitted(tmp_path)
    assert len(caught) == 1
    assert len(found["1_stability/sharpness"]) > 2 and not any(tag.startswith("2_noise") for tag in found)
    assert "Left out because it failed: the noise scale." in texts(tmp_path / "curvature")["about"][-1][1]


def test_a_piece_whose_products_overflow_comes_back(tmp_path, monkeypatch):
    asked, ask = [], panels.Panels._sharpness

    def overflow(self):
        asked.append(1)
        if len(asked) == 2:
            raise flat.ProductNotFinite
        ask(self)

    monkeypatch.setattr(panels.Panels, "_sharpness", overflow)
    with pytest.warns(UserWarning, match="the sharpness is not measured while products") as caught:
        found = fitted(tmp_path)
    steps = {tag: [step for step, _ in points] for tag, points in found.items()}
    assert len(caught) == 1 and len(asked) > 3
    every, known = steps["3_step/gradient_norm"], steps["1_stability/sharpness"]
    assert known == [*every[:1], *every[2:]]
    assert "Left out" not in texts(tmp_path / "curvature")["about"][-1][1]


@pytest.mark.slow
def test_no_sharpness_of_another_measurement_is_divided_by(tmp_path, monkeypatch):
    asked, ask = [], panels.Panels._sharpness

    def fail(self):
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError("no sharpness any more")
        ask(self)

    monkeypatch.setattr(panels.Panels, "_sharpness", fail)
    with pytest.warns(UserWarning, match="no sharpness any more") as caught:
        found = fitted(tmp_path)
    assert len(caught) == 1 and len(asked) == 2
    assert len(found["6_layers/trace"]) >= 2 and len(found["6_layers/effective_directions"]) == 1


def test_a_measurement_that_fails_ends_measuring_and_not_training(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "out of memory")

    monkeypatch.setattr(board_module, "curvature", fail)
    with pytest.warns(UserWarning, match="measuring failed with ResourceExhaustedError: out of memory") as caught:
        found = fitted(tmp_path)
    assert len(caught) == 1 and "continue without it" in str(caught[0].message)
    assert set(found) == {"3_step/loss", "3_step/learning_rate"} and len(found["3_step/loss"]) > 2


def test_a_disk_that_is_full_ends_the_board_and_not_training(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(pages.Events, "scalars", fail)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        fitted(tmp_path)
    assert len(caught) <= 2  # what is measured, and what training has anyway


def test_weights_that_are_not_finite_are_not_measured(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                self.model.trainable_variables[0].assign(np.full((4, 4), np.nan))

    with pytest.warns(UserWarning, match="are not finite. Curvature is not measured until they are") as caught:
        found = fitted(tmp_path, [Break()])
    assert len(caught) == 1
    assert 1 <= len(found["1_stability/sharpness"]) <= 2
    assert all(np.isfinite(value) for points in found.values() for _, value in points)


def test_ctrl_c_ends_training(tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(panels.Panels, "_sharpness", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path)


def test_several_processes_show_what_training_has_once_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "of_several_workers", lambda strategy: True)
    with pytest.warns(UserWarning, match="not measured where several processes train"):
        found = fitted(tmp_path)
    assert {tag: [step for step, _ in points] for tag, points in found.items()} == {
        "3_step/loss": [4, 8], "3_step/learning_rate": [4, 8],
    }  # fmt: skip


def test_only_the_chief_of_several_processes_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "of_several_workers", lambda strategy: True)
    monkeypatch.setattr(board_module, "is_chief", lambda strategy: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fitted(tmp_path) == {}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"kind": "hess"}, "`kind` must be one of 'hessian', 'ggn', 'fisher', 'empirical_fisher'"),
    ({"budget": 1.0}, r"`budget` must be a number in \[0, 1\)"),
    ({"budget": -0.1}, r"`budget` must be a number in \[0, 1\)"),
    ({"examples": 0}, "`examples` must be an integer >= 1"),
    ({"report_at": "batch"}, '`report_at` must be "end", "epoch" or None. Received: report_at=.batch'),
    ({"log_dir": ""}, "`log_dir` must be a path"),
])  # fmt: skip
def test_arguments_are_checked_at_construction(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kc.callbacks.CurvatureBoard(**{"log_dir": str(tmp_path), **arguments})


def test_a_folder_that_cannot_be_written_is_refused_at_construction(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`log_dir` must be a folder that can be written. Received: log_dir=.*file"):
        kc.callbacks.CurvatureBoard(tmp_path / "file" / "logs")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is permitted to root")
def test_a_folder_without_permission_is_refused_at_construction(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="change its permissions"):
        kc.callbacks.CurvatureBoard(tmp_path / "logs")


# Advice.


def test_advice_is_given_once_when_a_limit_is_crossed():
    advice = Advice()
    said = [advice.of({"1_stability/gauge": gauge}) for gauge in (1.2, 1.2, 0.9, 1.1, 1.2, 1.3, 1.4, 0.9, 2, 2, 2)]
    assert [len(sentences) for sentences in said] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert "bounces along the sharpest direction (stability gauge 1.30" in said[5][0]
    assert [len(advice.of({"2_noise/gauge": g})) for g in (3, 3, 3, 3, 0.1, 0.1, 0.1)] == [0, 0, 1, 0, 0, 0, 1]


def test_advice_names_the_layer_that_has_it_all():
    advice, share = Advice(), "6_layers/trace_share/"
    assert advice.of({f"{share}a": 0.7, f"{share}b": 0.3}) == []
    assert advice.of({f"{share}a": 0.1, f"{share}b": 0.9}) == ["One layer, `b`, has 90% of the trace."]
    assert advice.of({f"{share}a": 0.1, f"{share}b": 0.9}) == []
    assert advice.of({f"{share}a": 0.5, f"{share}b": 0.5}) == []
    assert advice.of({f"{share}a": 0.9, f"{share}b": 0.1}) == ["One layer, `a`, has 90% of the trace."]


def test_advice_is_written_as_text(tmp_path):
    with float64():
        found = fitted(tmp_path, model=compiled(small(), keras.optimizers.SGD(5.0)))
    gauges = [value for _, value in found["1_stability/gauge"]]
    assert sum(np.array(gauges) > 1) >= 3
    said = [text for _, text in texts(tmp_path / "curvature")["advice"]]
    assert any("bounces along the sharpest direction" in text for text in said)


# Two replicas, in a process of its own: two strategies in one collide.


def on_replicas(folder, name):
    """`{tag: points}` on one device and on two replicas."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, HERE / "board_on_replicas.py", folder, name], capture_output=True, text=True, timeout=1800,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Adam", "CurveBall"])
def test_two_replicas_show_what_one_device_shows(name, tmp_path):
    found = on_replicas(tmp_path, name)
    one, two = found["one"], found["two"]
    assert set(one) == set(two) and {"1_stability/sharpness", "2_noise/gauge", "6_layers/trace"} <= set(one)
    for tag in one:
        assert [step for step, _ in one[tag]] == [step for step, _ in two[tag]]
        values = np.array([[a, b] for (_, a), (_, b) in zip(one[tag], two[tag])])
        # the share of one direction is what is least determined
        np.testing.assert_allclose(values[:, 1], values[:, 0], rtol=1e-5, atol=1e-6, err_msg=tag)
