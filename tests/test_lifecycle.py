"""Everything that Keras does with a model goes on working: callbacks, files, averages, schedules, other optimizers."""

import inspect
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import prepare
from selection import some
from test_properties import assert_same, compiled, crossentropy, data, losses, network, state, values

import keras_curvature as kc
from keras_curvature.callbacks import SwapNeumannWeights
from keras_curvature.training import first_call
from keras_curvature.training.step import CurvedStep

REPORTS = {"damping", "beta", "rho", "reduction_ratio", "step_norm", "skipped_steps"}


def simple(make, curve=True, layers=None, **options):
    """A small regression network compiled with `make()`; equal every time."""
    keras.utils.set_random_seed(1)
    layers = layers or [keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model = kc.curved(model) if curve else model
    model.compile(make(), "mse", **options)
    return model


def neumann():
    """No warm-up and much momentum: the solution is far from the displaced weights."""
    return kc.Neumann(0.05, warmup_steps=0, mu_start=0.8, reset_every=3, beta=1e-8)


def regression(examples=16):
    """`x` (examples, 4), `y` (examples, 1)."""
    x = np.random.default_rng(0).standard_normal((examples, 4)).astype("float32")
    return x, x[:, :1] - x[:, 1:2]


def trained(model, epochs=1, **options):
    """The model after a `fit` on the regression data, in order."""
    model.fit(*regression(), batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options)
    return model


# Logs.


def test_reports_are_shown_wherever_keras_shows_numbers(tmp_path, capsys):
    x, y = data()
    model = compiled("curveball", network(), metrics=["accuracy"])
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    board = keras.callbacks.TensorBoard(str(tmp_path), write_graph=False)
    history = model.fit(
        x, y, batch_size=8, epochs=2, verbose=1, validation_data=(x, y), callbacks=[log, board], shuffle=False
    ).history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy", *REPORTS}
    assert all(len(numbers) == 2 for numbers in history.values())
    assert history["skipped_steps"] == [0.0, 0.0]
    assert history["damping"][-1] == pytest.approx(float(model.optimizer._damping.numpy()), rel=0.01)
    assert all(name in capsys.readouterr().out for name in ["damping: "])
    header = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert set(header) >= REPORTS | {"loss", "val_loss"}
    events = "".join(str(file) for file in (tmp_path / "train").glob("events*"))
    tags = {
        value.tag
        for event in tf.compat.v1.train.summary_iterator(events)
        for value in event.summary.value
    }  # fmt: skip
    assert {f"epoch_{name}" for name in REPORTS | {"loss"}} <= tags

    # nowhere else
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "accuracy"}
    assert len(model.evaluate(x, y, verbose=0)) == len(model.metrics_names) == 2
    assert set(model.test_on_batch(x, y, return_dict=True)) == {"loss", "accuracy"}
    assert set(model.train_on_batch(x, y, return_dict=True)) == {"loss", "accuracy", *REPORTS}
    assert model.predict(x, verbose=0).shape == (24, 3)


def test_a_metric_of_the_name_of_a_report_is_refused_and_one_after_it_is_shown():
    x, y = data()
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="damping")]
    model = compiled("curveball", network(), metrics=metrics)
    with pytest.raises(ValueError, match="`CurveBall` reports 'beta', 'damping'.*Received: 'damping' among"):
        model.fit(x, y, batch_size=8, verbose=0)
    # another optimizer does not report it: neither then nor in an evaluation the last optimizer's numbers stand there
    model = compiled("curveball", network())
    model.fit(x, y, batch_size=8, verbose=0)
    metrics = [keras.metrics.SparseCategoricalAccuracy(name=name) for name in ("damping", "beside")]
    model.compile(keras.optimizers.SGD(0.0), model.loss, metrics=metrics)
    evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    history = model.fit(x, y, batch_size=8, verbose=0).history
    assert set(history) == {"loss", "damping", "beside"}
    assert history["damping"] == history["beside"] and evaluated["damping"] == evaluated["beside"]


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples():
    x, y = regression(10)  # the last batch is smaller
    plain, curved = (simple(lambda: keras.optimizers.SGD(0.0), curve=False), simple(lambda: kc.Neumann(0.0)))
    for model in (plain, curved):
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(*[m.history.history["loss"] for m in (plain, curved)], rtol=1e-6)


def test_a_batch_that_was_skipped_does_not_count_in_the_loss_of_an_epoch():
    (x, y), model = regression(), simple(lambda: kc.Neumann(0.0, beta=0.0))
    broken = x.copy()
    broken[9] = np.nan  # of the second batch
    seen = []
    for inputs in (x[:8], broken, np.full_like(x, np.nan), x[:8]):
        model.fit(inputs, y[: len(inputs)], batch_size=8, shuffle=False, verbose=0)
        seen.append(model.history.history["loss"][0])
    assert np.isfinite(seen[0])
    np.testing.assert_array_equal(seen, [seen[0], seen[0], np.nan, seen[0]])
    model.reset_metrics()
    assert np.isnan(model.train_on_batch(broken[8:], y[8 : len(broken)], return_dict=True)["loss"])


class Reciprocal(keras.optimizers.schedules.LearningRateSchedule):
    """Infinite before the first step."""

    def __call__(self, step):
        """`1 / step`."""
        return 1.0 / tf.cast(step, tf.float32)


class Steepest(kc.CurvatureOptimizer):
    """A method with reports of its own."""

    reports = {"slope": "mean"}

    def direction(self, lin):
        """Downhill."""
        self.report(slope=tf.norm(lin.gradient[0]))
        return [-g for g in lin.gradient]


def test_the_sum_of_no_reports_is_zero():
    model = simple(kc.SOAP, layers=[keras.Input((4,)), keras.layers.Dense(1)])  # vectors, which have no factors
    assert trained(model).history.history["failed_refreshes"] == [0.0]


def test_of_accumulated_gradients_only_skipped_steps_are_reported():
    model = trained(simple(lambda: kc.SOAP(0.1, gradient_accumulation_steps=2)))
    assert set(model.history.history) == {"loss", "skipped_steps"}


def test_the_step_of_a_batch_that_is_passed_over_has_no_length():
    layers = [keras.Input((4,)), keras.layers.Dense(1, kernel_regularizer="l2")]
    model, (x, y) = simple(lambda: kc.Muon(0.1), layers=layers), regression()
    before = model.get_weights()
    logs = model.train_on_batch(x, y, sample_weight=np.zeros(16), return_dict=True)
    assert logs["step_norm"] == logs["skipped_steps"] == 0.0
    assert_same(model.get_weights(), before)


@pytest.mark.parametrize("make", [kc.SOAP, kc.Neumann, Steepest])
def test_a_rate_that_is_not_finite_moves_nothing(make):
    """As of a schedule that divides by the number of steps taken."""
    schedule = Reciprocal()
    model, (x, y) = simple(lambda: make(schedule)), regression()
    before = model.get_weights()
    logs = model.train_on_batch(x, y, return_dict=True)
    assert logs["skipped_steps"] == 1.0 and model.optimizer.iterations == 0
    assert_same([w.numpy() for w in model.weights], before)


def test_skipped_steps_are_reported_whatever_else_is():
    x, y = regression()
    broken = x.copy()
    broken[9] = np.nan
    model = simple(lambda: Steepest(0.1))
    history = model.fit(np.concatenate([x, broken]), np.concatenate([y, y]), batch_size=8, verbose=0).history
    assert set(history) == {"loss", "slope", "skipped_steps"}
    assert history["skipped_steps"] == [1.0]
    assert np.isfinite(history["slope"]).all()


def test_autograph_leaves_a_step_alone():
    files = []

    class Seen(Steepest):
        """Says from which file its code runs."""

        def direction(self, lin):
            """Downhill."""
            files.append(inspect.currentframe().f_code.co_filename)
            return super().direction(lin)

    model = simple(lambda: Seen(0.1))
    x, y = regression()
    tf.function(lambda: model.optimizer.step(kc.Linearization(model, x, y)))()
    gradients = [tf.zeros_like(v) for v in model.trainable_variables]
    optimizer = Seen(0.1)
    optimizer.build(model.trainable_variables)
    tf.function(lambda: optimizer.apply(gradients, model.trainable_variables))()
    assert len(files) >= 2
    assert set(files) == {__file__}


def test_losses_of_several_outputs_have_their_own_names():
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3)(inputs)
    outputs = {"a": keras.layers.Dense(1, name="a")(hidden), "b": keras.layers.Dense(1, name="b")(hidden)}
    seen = []
    for curve in (False, True):
        keras.utils.set_random_seed(3)
        model = keras.models.clone_model(keras.Model(inputs, outputs))
        model = kc.curved(model) if curve else model
        model.compile(kc.Neumann(0.0), {"a": "mse", "b": "mae"}, metrics={"a": ["mae"]}, loss_weights={"a": 2, "b": 1})
        x, y = regression()
        seen.append(model.fit(x, {"a": y, "b": -y}, verbose=0, batch_size=8, shuffle=False).history)
    plain, curved = seen
    assert {"loss", "a_loss", "b_loss", "a_mae"} == set(plain) == set(curved) - {"mu", "step_norm", "skipped_steps"}
    for key, value in plain.items():
        np.testing.assert_allclose(curved[key], value, rtol=1e-6)


def test_sample_weights_and_class_weights_count():
    x, y = data(16)
    weights = np.linspace(0.0, 2.0, 16).astype("float32")
    classes = {0: 1.0, 1: 3.0, 2: 0.5}
    for extra in ({"sample_weight": weights}, {"class_weight": classes}):
        seen = []
        for curve in (False, True):
            model = network(dropout=0)
            model = kc.curved(model) if curve else model
            model.compile(kc.Neumann(0.1, warmup_steps=0), crossentropy())
            model.fit(x, y, batch_size=8, verbose=0, shuffle=False, **extra)
            seen.append(model)
        np.testing.assert_allclose(*[m.history.history["loss"] for m in seen], rtol=1e-6)
        for a, b in zip(*[m.get_weights() for m in seen]):
            np.testing.assert_allclose(a, b, atol=1e-6)


# Ways to train.


def test_several_steps_per_execution_are_the_same_steps():
    one, two = simple(kc.CurveBall), simple(kc.CurveBall, steps_per_execution=2)
    assert_same(state(trained(one, 2)), state(trained(two, 2)))
    assert set(two.history.history) == {"loss", *REPORTS}


def test_a_keras_optimizer_trains_a_curved_model_as_a_plain_one():
    plain, curved = (simple(lambda: keras.optimizers.Adam(0.01), curve=curve) for curve in (False, True))
    assert_same(state(trained(plain, 2)), state(trained(curved, 2)))
    assert plain.history.history == curved.history.history


def test_curving_a_model_that_was_fitted_takes_effect():
    model = trained(simple(lambda: keras.optimizers.SGD(0.01), curve=False))
    kc.curved(model).compile(kc.HessianFree(), "mse")
    trained(model)
    assert int(model.optimizer.iterations.numpy()) == 2
    assert kc.curved(model) is model


@pytest.mark.parametrize("curve", [False, True])
def test_accumulated_gradients_are_those_of_the_big_batch(curve):
    def make(**options):
        return kc.Neumann(0.1, warmup_steps=1, beta=1e-8, **options)

    whole = simple(make, curve)
    whole.fit(*regression(), batch_size=8, epochs=2, shuffle=False, verbose=0)
    parts = simple(lambda: make(gradient_accumulation_steps=2), curve)
    parts.fit(*regression(), batch_size=4, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(whole.get_weights(), parts.get_weights()):
        np.testing.assert_allclose(a, b, atol=2e-6)


class Subclassed(keras.Model):
    """A model that is not built before it sees data."""

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(1)

    def call(self, x):
        """One output."""
        return self.head(x)


@pytest.mark.parametrize("make", [kc.Neumann, kc.CurveBall])
@pytest.mark.parametrize("model", [Subclassed, lambda: keras.Sequential([keras.layers.Dense(1)])])
def test_models_that_are_built_by_their_first_batch(make, model):
    for curve in (True, False) if make is kc.Neumann else (True,):
        made = kc.curved(model()) if curve else model()
        made.compile(make(), "mse")
        trained(made, 3)
        assert np.isfinite(made.history.history["loss"]).all()
        assert int(made.optimizer.iterations.numpy()) == 6


# What Keras does to the weights.


def test_schedules_and_plateaus_set_the_learning_rate():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [1.0, 0.0])  # 0 from the third step on
    model = trained(simple(lambda: kc.CurveBall(schedule)))
    before = model.get_weights()
    assert_same(trained(model).get_weights(), before)
    model = simple(lambda: kc.CurveBall(0.5))
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.1, patience=0, min_delta=1e3)
    trained(model, 3, callbacks=[plateau])
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.5e-2)
    assert "learning_rate" in model.history.history


@pytest.mark.parametrize("make", [kc.Neumann, kc.CurveBall])
def test_weights_decay_but_for_those_excluded(make):
    optimizer = make(0.5, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    # at inputs and targets of zero, and biases of zero, no gradient moves a kernel
    model = simple(lambda: optimizer, layers=[keras.Input((4,)), keras.layers.Dense(1, bias_initializer="ones")])
    (kernel, bias), zero = model.get_weights(), np.zeros((4, 4), "float32")
    model.train_on_batch(zero, np.ones((4, 1), "float32"))
    np.testing.assert_allclose(model.get_weights()[0], 0.95 * kernel, rtol=1e-6)
    np.testing.assert_array_equal(model.get_weights()[1], bias)


@pytest.mark.parametrize("make", some([kc.Neumann, kc.CurveBall], [kc.Neumann]))
def test_the_average_of_the_weights_is_left_at_the_end_of_fit(make):
    seen = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(model.get_weights()))
    model = simple(lambda: make(0.1, use_ema=True, ema_momentum=0.5))
    trained(model, callbacks=[note])
    for final, first, second in zip(model.get_weights(), *seen):
        np.testing.assert_allclose(final, 0.5 * first + 0.5 * second, atol=1e-6)
    model = simple(lambda: make(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2))
    trained(model)
    for average, final in zip(model.optimizer._model_variables_moving_average, model.get_weights()):
        np.testing.assert_array_equal(average.numpy(), final)


@pytest.mark.parametrize(
    ("make", "curve"),
    some([(kc.Neumann, True), (kc.CurveBall, True), (neumann, False)], [(kc.Neumann, True), (neumann, False)]),
)
def test_constraints_hold_after_every_step(make, curve):
    layer = keras.layers.Dense(1, kernel_constraint=keras.constraints.UnitNorm())
    make = make if make is neumann else lambda make=make: make(0.5)
    model = trained(simple(make, curve, layers=[keras.Input((4,)), layer]))
    np.testing.assert_allclose(np.linalg.norm(model.get_weights()[0]), 1.0, rtol=1e-6)


# Files.


def test_a_clone_trains_as_the_original():
    for model in (compiled("neumann", network(dropout=0)), compiled("neumann", network(kc.CurvatureModel, 0))):
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        if not isinstance(clone, kc.CurvatureModel):
            kc.curved(clone)
        clone.compile(kc.Neumann.from_config(model.optimizer.get_config()), crossentropy())
        assert losses(clone, *data(8)) == losses(model, *data(8))


def test_plain_keras_loads_the_file_of_a_curved_model(tmp_path):
    x, y = data()
    model = compiled("curveball", network())
    losses(model, x, y)
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        config = json.loads(archive.read("config.json"))
    assert (config["module"], config["class_name"]) == ("keras.src.models.functional", "Functional")
    config.pop("compile_config")  # only the optimizer is of this package
    assert "keras_curvature" not in json.dumps(config)
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert type(loaded) is type(network())
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.slow
def test_weights_alone_bring_the_state_of_the_optimizer_back(tmp_path):
    x, y = data()
    model = compiled("curveball", network(dropout=0))
    losses(model, x, y)
    model.save_weights(tmp_path / "m.weights.h5")
    other = compiled("curveball", network(dropout=0, seed=5))
    other.load_weights(tmp_path / "m.weights.h5")  # before the optimizer is built
    assert losses(other, x, y) == losses(model, x, y)
    assert_same(state(other), state(model))


@pytest.mark.parametrize("name", some(["curveball", "plain_neumann_resets"], ["plain_neumann_resets"]))
def test_a_state_that_waits_for_the_first_step_is_saved_too(name, tmp_path):
    x, y = data()
    model, waiting = compiled(name, network(dropout=0)), compiled(name, network(dropout=0, seed=5))
    losses(model, x, y)
    model.save_weights(tmp_path / "1.weights.h5")
    waiting.load_weights(tmp_path / "1.weights.h5")
    waiting.save_weights(tmp_path / "2.weights.h5")
    waiting.save(tmp_path / "2.keras")
    other = compiled(name, network(dropout=0, seed=6))
    other.load_weights(tmp_path / "2.weights.h5")
    loaded, _ = prepare(name, keras.models.load_model(tmp_path / "2.keras"))
    expected = losses(model, x, y)
    for again in (other, loaded):
        assert losses(again, x, y) == expected
        assert_same(state(again), state(model))


@pytest.mark.parametrize("file", some(["1.weights.h5", "1.keras"], ["1.keras"]))
def test_neumann_goes_on_from_the_middle_of_a_fit(file, tmp_path):
    whole = simple(neumann, curve=False)
    save = keras.callbacks.ModelCheckpoint(
        str(tmp_path / file.replace("1", "{epoch}")), save_weights_only="weights" in file
    )
    trained(whole, 2, callbacks=[save])
    if "weights" in file:
        resumed = simple(neumann, curve=False)
        resumed.load_weights(tmp_path / file)
    else:
        resumed = keras.models.load_model(tmp_path / file)
    assert_same(state(trained(resumed)), state(whole))


INTERRUPTED = """
import os, sys
import keras
from test_lifecycle import compiled, data, network
folder, stop, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

class Stopped(Exception):
    pass

class Stop(keras.callbacks.Callback):
    seen = 0
    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == stop:
            if name == names[-1]:
                os._exit(7)
            raise Stopped  # what comes after is another run, and the process is killed in the end

for name in names:
    model = compiled(name, network(dropout=0))
    backup = keras.callbacks.BackupAndRestore(os.path.join(folder, name))
    try:
        model.fit(*data(), batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[backup, Stop()])
    except Stopped:
        continue
    model.save_weights(os.path.join(folder, name + ".weights.h5"))
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path):
    names = ["plain_neumann_resets", "hessian_free", "curveball"]
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    for stop, code in ((5, 7), (0, 0)):  # in the middle of the second epoch; then again, to the end
        run = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(stop), *names],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == code, run.stderr[-2000:]
    for name in names:
        whole, resumed = (compiled(name, network(dropout=0)) for _ in range(2))
        losses(whole, *data(), epochs=3)
        resumed.optimizer.build(resumed.trainable_variables)
        resumed.load_weights(tmp_path / f"{name}.weights.h5")
        assert int(resumed.optimizer.iterations.numpy()) == 9
        assert_same(state(resumed), state(whole))


# Where the solution of Neumann is.


def answer(model):
    """`w - mu m` of a plain model that is being trained."""
    optimizer = model.optimizer
    mu = float(optimizer._mu(optimizer._t - 1))
    return [w.numpy() - mu * m.numpy() for w, m in zip(model.trainable_variables, optimizer._m)]


def test_the_end_of_fit_leaves_the_answer():
    displaced = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: displaced.append((values(model.trainable_variables), answer(model)))
    )
    model = simple(neumann, curve=False)
    trained(model, 2, callbacks=[note])
    w, expected = displaced[-1]
    assert max(np.abs(a - b).max() for a, b in zip(w, expected)) > 1e-3
    for a, b in zip(model.get_weights(), expected):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("curve", some([False, True], [False]))
def test_a_further_fit_goes_on_as_one_longer_fit_would(curve):
    options = {} if curve else {"callbacks": [SwapNeumannWeights()]}
    whole, parts = simple(neumann, curve), simple(neumann, curve)
    trained(whole, 4)
    for _ in range(2):
        trained(parts, 2, **options)
    for a, b in zip(whole.get_weights(), parts.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_swapped_weights_are_validated_and_saved(tmp_path):
    curved, plain = simple(neumann), simple(neumann, curve=False)
    save = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.weights.h5"), save_weights_only=True)
    trained(plain, 2, validation_data=regression(), callbacks=[SwapNeumannWeights(swap_on_epoch=True), save])
    answers = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: answers.append(curved.get_weights()))
    trained(curved, 2, validation_data=regression(), callbacks=[note])
    for key in ("loss", "val_loss"):
        np.testing.assert_allclose(plain.history.history[key], curved.history.history[key], rtol=1e-5)
    saved = simple(neumann, curve=False)
    for epoch, expected in enumerate(answers):
        saved.load_weights(tmp_path / f"{epoch + 1}.weights.h5")
        for a, b in zip(saved.get_weights(), expected):
            np.testing.assert_allclose(a, b, atol=1e-6)
    for a, b in zip(plain.get_weights(), curved.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_validation_with_swapped_weights_changes_nothing_of_the_training():
    one, two = simple(neumann, curve=False), simple(neumann, curve=False)
    trained(one, 2)
    trained(two, 2, validation_data=regression(), callbacks=[SwapNeumannWeights()])
    assert_same(state(one), state(two))


@pytest.mark.parametrize("make", some([kc.Neumann, kc.CurveBall], [kc.CurveBall]))
def test_a_fixed_loss_scale_changes_no_step(make):
    plain, scaled = (trained(simple(lambda f=factor: make(0.1, loss_scale_factor=f))) for factor in (None, 1024.0))
    for a, b in zip(plain.get_weights(), scaled.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["plain_neumann", "plain_soap"])
def test_a_plain_model_is_traced_once(name):
    """State that is created during a trace would make TensorFlow trace the train step a second time."""
    traces = []

    class Counting(keras.Sequential):
        def train_step(self, data):
            traces.append(1)
            return super().train_step(data)

    model, optimizer = prepare(name, Counting([keras.Input((3,)), keras.layers.Dense(1)]))
    model.compile(optimizer, loss="mse", jit_compile=False)
    model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    assert traces == [1]


CURVED = [kc.Neumann, kc.CurveBall, kc.KFAC, keras.optimizers.Adam]
ONCE = [("simple", kc.KFAC), ("late", kc.Neumann)]


@pytest.mark.parametrize(
    ("make", "optimizer"), some([(make, optimizer) for make in ("simple", "late") for optimizer in CURVED], ONCE)
)
def test_a_curved_model_is_traced_once(optimizer, make, monkeypatch):
    traces, real = [], CurvedStep.train_step
    monkeypatch.setattr(CurvedStep, "train_step", lambda model, data: (traces.append(1), real(model, data))[1])
    model = trained({"simple": simple, "late": late}[make](optimizer, metrics=["mae"], jit_compile=False))
    assert traces == [1]
    trained(model)
    assert traces == [1]


def late(optimizer, **options):
    """A curved model that is built by its first batch."""
    model = kc.curved(Subclassed())
    model.compile(optimizer(), "mse", **options)
    return model


class Impatient:
    """A timer whose time is over at once."""

    def __init__(self, seconds, function, args):
        self.start = lambda: function(*args)

    def cancel(self):
        pass


@pytest.mark.parametrize("options", [{"verbose": 2}, {"verbose": 0}])
def test_a_long_first_step_is_announced_once_where_there_is_a_progress_bar(options, monkeypatch, capsys):
    monkeypatch.setattr(first_call.threading, "Timer", Impatient)
    model = simple(kc.Neumann, jit_compile=False)
    for _ in range(2):
        model.fit(*regression(), epochs=2, **options)
    shown = capsys.readouterr().out.count(f"TensorFlow is compiling the train step of {model.name!r} by `Neumann`.")
    assert shown == (1 if options["verbose"] else 0)


def test_evaluation_builds_no_state_of_an_optimizer():
    model = simple(kc.KFAC)
    model.evaluate(*regression(), verbose=0)
    assert not model.optimizer.built
    assert len(trained(model).optimizer.variables) > 2
