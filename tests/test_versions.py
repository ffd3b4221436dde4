"""What has to hold with every Keras and TensorFlow of the range; `.ci/matrix` runs it in an environment of each.

Numbers that depend on the version are compared with those of another one: `data/versions` holds files of the oldest and
the newest Keras, and the losses to which their training went on.
"""

import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from boards import Clock, boarded, numbers, texts
from cases import HAS_XLA, MODELS, flat, float64
from optimizers import AMPLIFY, FAMILIES
from saved_versions import FIT, X, Y, goes_on, made
from selection import some
from test_properties import on_two_replicas

import keras_curvature as kc

pytestmark = pytest.mark.versions
SAVED = pathlib.Path(__file__).parent / "data" / "versions"
LOSSES = {folder.name: json.loads((folder / "losses.json").read_text())["losses"] for folder in SAVED.iterdir()}


def tolerance(name):
    # bases of SOAP's first factors, of fewer examples than rows, are a matter of rounding: 2e-3 between processors
    return 1e-2 if name in (*AMPLIFY, "soap") else 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_training_is_that_of_other_versions(name):
    model = made(name)
    model.fit(**FIT, epochs=2)
    losses = goes_on(model)
    for version in LOSSES:
        np.testing.assert_allclose(losses, LOSSES[version][name], rtol=tolerance(name))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("version", LOSSES)
def test_weights_and_state_of_another_version_go_on(version, name):
    model = made(name)
    model.load_weights(SAVED / version / f"{name}.weights.h5")
    np.testing.assert_allclose(goes_on(model), LOSSES[version][name], rtol=tolerance(name))


# of a newer Keras not: it writes arguments of layers that an older one does not know, whatever the optimizer
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_an_older_version_goes_on(name):
    model = keras.models.load_model(SAVED / "3.10" / f"{name}.keras")
    np.testing.assert_allclose(goes_on(kc.curved(model)), LOSSES["3.10"][name], rtol=tolerance(name))


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_goes_on_as_the_one_that_was_not(name, tmp_path):
    model = made(name)
    model.fit(**FIT, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = kc.curved(keras.models.load_model(tmp_path / "model.keras"))
    np.testing.assert_allclose(goes_on(loaded), goes_on(model), rtol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("steps", some([1, 3], [1]))
@pytest.mark.parametrize("name", some(FAMILIES, ["curveball", "kfac"]))
def test_an_interrupted_run_goes_on_bit_for_bit(name, steps, tmp_path):
    def run(stop):
        keras.utils.clear_session()  # the names of a new process: TensorFlow optimizes graphs in the order of names
        model, seen = made(name), 0

        def count(batch, logs):
            nonlocal seen
            seen += 1
            if seen == stop:
                raise KeyboardInterrupt

        model.steps_per_execution = steps
        callbacks = [
            kc.callbacks.Checkpoint(str(tmp_path / str(stop is None)), every=steps),
            keras.callbacks.LambdaCallback(on_train_batch_end=count),
        ]
        model.fit(X, Y, batch_size=1, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]

    expected = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(2)
    for a, b in zip(run(-1), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.matrix
def test_two_replicas_train_as_one_device():
    found = on_two_replicas(*FAMILIES)
    for name in FAMILIES:
        # what is small, such as the largest entry of a gradient, is a difference of what is near 1
        np.testing.assert_allclose(found[name]["two"], found[name]["one"], rtol=1e-5, atol=1e-6, err_msg=name)


KINDS = [
    "dense", "conv2d", "batch_normalization", "layer_normalization", "lstm", "attention", "max_pooling", "dropout",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_dense_matrices(kind):
    with float64():
        case = MODELS[kind]()
        case.compile("sgd", jit_compile=False)
        model = case.model
        lin = kc.Linearization(model, case.x, case.y, case.sample_weight)
        v = [tf.constant(np.random.default_rng(i).standard_normal(w.shape)) for i, w in enumerate(lin.gradient)]

        def gradient(step):
            kept = model.get_weights()
            for w, d in zip(model.trainable_variables, v):
                w.assign_add(step * d)
            found = flat(kc.Linearization(model, case.x, case.y, case.sample_weight).gradient)
            model.set_weights(kept)
            return found

        differences = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
        product = flat(lin.hessian() @ v)
        assert np.linalg.norm(product - differences) <= 1e-6 * np.linalg.norm(differences)
        u = lin.gradient
        left, right = (sum(float(tf.reduce_sum(a * b)) for a, b in zip(p, q)) for p, q in (
            (u, lin.gauss_newton() @ v), (v, lin.gauss_newton() @ u),
        ))  # fmt: skip
        np.testing.assert_allclose(left, right, rtol=1e-8)


@pytest.mark.parametrize("name", ["neumann_resets", "kfac"])
def test_the_default_of_compile_trains(name):
    model = made(name)
    model.compile(model.optimizer, "mse", jit_compile="auto" if HAS_XLA else False)
    losses = model.fit(**FIT, epochs=4).history["loss"]
    assert losses[-1] < losses[0]


def test_the_report_says_the_largest_eigenvalue():
    model = made("curveball")
    hessian = kc.Linearization(model, X, Y).hessian()
    entries = np.eye(model.count_params(), dtype="float32")
    sizes = [int(np.prod(w.shape)) for w in model.trainable_variables]
    columns = []
    for e in entries:
        parts = np.split(e, np.cumsum(sizes)[:-1])
        columns.append(flat(hessian @ [tf.reshape(p, w.shape) for p, w in zip(parts, model.trainable_variables)]))
    found = kc.report(model, (X, Y))
    assert found["sharpness"]["value"] == pytest.approx(np.linalg.eigvalsh(np.stack(columns))[-1], rel=1e-3)
    assert model.name in str(found)


def test_the_board_writes_what_it_measures(tmp_path):
    model = made("adahessian")
    model.fit(**FIT, epochs=4, callbacks=[boarded(tmp_path, Clock(), report_at="end")])
    found = numbers(tmp_path / "curvature")
    assert found["1_stability/sharpness"] and all(np.isfinite(value) for _, value in found["1_stability/sharpness"])
    assert "report" in texts(tmp_path / "curvature")
