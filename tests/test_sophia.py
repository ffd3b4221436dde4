"""Sophia-G against the authors' code, given its labels; Sophia-H by hand."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, flat, float64
from keras import layers

import keras_curvature as kc
from keras_curvature import Linearization
from keras_curvature.linearization.estimates import diagonals as diagonal
from keras_curvature.linearization.fisher import likelihoods
from keras_curvature.operators import dense
from keras_curvature.optimizers.sophia import SophiaG, SophiaH

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "sophia_g_classifier.npz")


@pytest.fixture(autouse=True)
def _in_float64():
    with float64():
        yield


def setting(name):
    """A setting of the reference, a number."""
    return REFERENCE[f"set_{name}"].item()


def test_sophia_g_takes_the_steps_of_the_authors_code_given_its_labels(monkeypatch):
    labels = iter(REFERENCE["labels"])
    given = {"sample": lambda likelihood, z, uniform: tf.constant(next(labels), tf.int32)}
    monkeypatch.setattr(likelihoods.SparseCategorical, "sample", given["sample"])
    model = keras.Sequential([keras.Input((8,)), layers.Dense(7, activation="tanh"), layers.Dense(5)])
    model.set_weights([REFERENCE[name] for name in ("w0_init", "b0_init", "w1_init", "b1_init")])
    optimizer = SophiaG(
        setting("lr"), beta_1=setting("beta_1"), beta_2=setting("beta_2"), gamma=setting("rho"), epsilon=1e-15,
        every=int(setting("every")), weight_decay=setting("weight_decay"),
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = kc.curved(model)
    model.compile(optimizer, loss, run_eagerly=True)  # labels are drawn when they are due
    steps = zip(REFERENCE["batch_indices"].astype(int), REFERENCE["weights_flat"], REFERENCE["unclipped"])
    for step, (rows, weights, unclipped) in enumerate(steps):
        model.reset_metrics()  # Keras 3.10 does not
        logs = model.train_on_batch(REFERENCE["x"][rows], REFERENCE["y"][rows], return_dict=True)
        np.testing.assert_allclose(flat(model.trainable_variables), weights, rtol=0, atol=1e-12)
        due = step % optimizer.every == 0  # with a new estimate alone it is counted
        np.testing.assert_allclose(logs["unclipped"], unclipped if due else np.nan, atol=1e-6)
    assert next(labels, None) is None


def test_sophia_h_follows_the_diagonal_of_the_hessian():
    case = LOSSES["mse"]()
    optimizer = SophiaH(0.03, beta_1=0.9, beta_2=0.6, gamma=0.5, every=2)
    case.compile(optimizer, run_eagerly=True)
    model, m, h = kc.curved(case.model), 0.0, 0.0
    for step in range(4):
        lin, weights = Linearization(model, *case.batch), flat(model.trainable_variables)
        if step % 2 == 0:
            u = flat(diagonal.draw(lin.weights, step, "gaussian"))
            h = 0.6 * h + 0.4 * u * (np.asarray(dense(lin.hessian(), lin.variables)) @ u)
        m = 0.9 * m + 0.1 * flat(lin.gradient)
        model.train_on_batch(*case.batch[:2])
        taken = np.clip(m / np.maximum(0.5 * h, 1e-12), -1, 1)
        assert 0.05 < (np.abs(taken) < 1).mean() < 0.95 and (h < 0).any()
        np.testing.assert_allclose(flat(model.trainable_variables), weights - 0.03 * taken, rtol=1e-9, atol=1e-12)


def test_sophia_g_draws_labels_of_every_output_by_its_own_likelihood():
    case = LOSSES["loss_weights_list"]().compile(SophiaG(0.01, every=1))
    model = kc.curved(case.model)
    losses = [model.train_on_batch(*case.batch[:2]) for _ in range(20)]
    losses = np.asarray([np.ravel(loss)[0] for loss in losses])
    assert losses[-1] < losses[0]


def test_sophia_g_names_a_loss_that_it_cannot_draw_labels_for():
    case = LOSSES["hinge"]().compile(SophiaG())
    with pytest.raises(ValueError, match="Labels cannot be sampled for loss=hinge.*`SophiaH`"):
        kc.curved(case.model).train_on_batch(*case.batch[:2])
    case.compile(SophiaH())
    assert np.isfinite(kc.curved(case.model).train_on_batch(*case.batch[:2])).all()


@pytest.mark.parametrize("method", [SophiaG, SophiaH])
@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"beta_1": 1.0}, r"`beta_1` must be a number in \[0.0, 1.0\). Received: beta_1=1.0"),
        ({"gamma": 0.0}, "`gamma` must be .* Received: gamma=0.0"),
        ({"epsilon": 0.0}, "`epsilon` must be .* Received: epsilon=0.0"),
        ({"every": 2.5}, "`every` must be an integer >= 1. Received: every=2.5"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(method, kwargs, match):
    with pytest.raises(ValueError, match=match):
        method(**kwargs)
