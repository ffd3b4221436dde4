"""Nothing is replaced and put back: threads, nested contexts and errors leave Keras and TensorFlow as they are."""

import contextvars
import inspect
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_curvature as kc
from keras_curvature import replicas
from keras_curvature.keras_internals import guards, replaced, twin
from keras_curvature.linearization.layers import taps
from keras_curvature.linearization.pure import differentiable, precision, slices
from keras_curvature.linearization.pure.differentiable import differentiable_keras

X = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
Y = (X[:, :1] > 0).astype("int32")


def model(seed):
    """A tiny model with all that a Hessian needs computed otherwise; equal weights for equal seeds."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([
        keras.Input((4,)), layers.Dense(4), layers.LayerNormalization(), layers.Dropout(0.5, seed=seed),
        layers.Dense(2, activation="softmax"),
    ])  # fmt: skip
    model.compile(kc.CurveBall(), "sparse_categorical_crossentropy", jit_compile=False)
    return model


def measured(model):
    """The largest eigenvalue of the Hessian."""
    return kc.curvature(model, (X, Y)).top(1).values.tolist()


def trained(model):
    """The losses of two epochs of a second-order method."""
    return kc.curved(model).fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]


def evaluated(model):
    """Keras' own loss in training mode and in inference."""
    return [float(tf.reduce_mean(model(X, training=True)[:, 0])), model.evaluate(X, Y, verbose=0)]


def test_threads_compute_what_they_compute_one_by_one():
    work = [measured, trained, evaluated, measured, trained]
    expected = [do(model(seed)) for seed, do in enumerate(work)]
    models, found = [model(seed) for seed in range(len(work))], [None] * len(work)
    barrier, noted = threading.Barrier(len(work)), guards.guards()

    def run(i):
        barrier.wait()
        found[i] = work[i](models[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, alone in zip(found, expected):
        np.testing.assert_allclose(ours, alone, rtol=1e-5)
    check_names(noted)


def check_names(noted):
    """Every name is the one permanent guard of it that `noted` has, or the original."""
    names = [value for value in vars(replaced).values() if isinstance(value, tuple) and isinstance(value[1], str)]
    names += [*replaced.GENERATORS, *replaced.RECURRENT_LOOPS, (layers.Dense, "call")]
    assert len(names) > 14
    for owner, name in names:
        stands = inspect.getattr_static(owner, name, None)
        if (owner, name) in noted:
            assert stands is noted[owner, name]
            if hasattr(stands, "__wrapped__"):  # one guard, not two; all guards have the same code
                assert stands.__wrapped__.__code__ is not stands.__code__
        elif stands is not None:
            assert stands.__module__.startswith(("keras", "tensorflow"))


OPENINGS = {
    "differentiable": lambda: differentiable_keras(),
    "twice": lambda: differentiable_keras(twice=True),
    "without_control_edges": differentiable.without_control_edges,
    "without_half_precision": precision.without_half_precision,
    "slice": lambda: slices.at(slices.Place(0, 2, 4)),
    "dense": taps.dense,
    "calls": lambda: taps.calls([layers.Dense(2), layers.LSTM(2), layers.BatchNormalization()]),
    "hidden_states": taps.hidden_states,
    "keras_outside": replicas.keras_outside,
}


@pytest.mark.parametrize("name", OPENINGS)
def test_an_error_leaves_nothing_behind(name):
    before = dict(contextvars.copy_context())
    with OPENINGS[name]():
        assert dict(contextvars.copy_context()) != before
    noted = guards.guards()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), OPENINGS[name](), OPENINGS[name]():
            raise ZeroDivisionError
        assert dict(contextvars.copy_context()) == before
        assert guards.guards() == noted
    check_names(noted)


def test_an_opening_that_fails_leaves_nothing_behind():
    before = dict(contextvars.copy_context())
    with pytest.raises(RuntimeError), taps.calls([layers.Dense(2), object()]):
        pass
    assert dict(contextvars.copy_context()) == before


def test_nested_openings_move_random_counters_once():
    whole = keras.random.normal([7, 3], seed=5)
    with differentiable_keras(), differentiable_keras(twice=True), slices.at(slices.Place(2, 3, 7)):
        part = keras.random.normal([3, 3], seed=5)
    np.testing.assert_array_equal(part, whole[2:5])


def test_nested_taps_note_a_call_each():
    layer = layers.Dense(2, activation="tanh")
    with taps.calls([layer]) as outer, taps.dense() as inner:
        y = layer(X)
    ((first,), (second,)) = outer[0], inner[0]
    assert first.layer is second.layer is layer and first.pre_activation is second.pre_activation
    np.testing.assert_array_equal(tf.tanh(first.pre_activation), y)
    layer(X)
    assert len(outer[0]) == len(inner[0]) == 1


@pytest.mark.parametrize("cls", [layers.SimpleRNN, layers.LSTM, layers.GRU])
def test_hidden_states_and_calls_note_the_same_loop(cls):
    layer, sequence = cls(2), np.ones((3, 4, 2), "float32")
    plain = layer(sequence)
    with taps.calls([layer]) as calls, taps.hidden_states() as states:
        np.testing.assert_allclose(layer(sequence), plain, 1e-6)
    assert len(calls[0]) == len(states[0]) == 1 and states[0][0].shape == (3, 4, 2)


def test_another_thread_has_the_originals(monkeypatch):
    asked, original = [], differentiable._plain_moments
    monkeypatch.setattr(differentiable, "_plain_moments", lambda *args: asked.append(1) or original(*args))
    moments = getattr(*replaced.MOMENTS)
    with differentiable_keras(twice=True):
        other = threading.Thread(target=lambda: getattr(*replaced.MOMENTS)(tf.constant([[1.0, 2.0]]), [1], False))
        other.start()
        other.join()
        assert asked == []
        getattr(*replaced.MOMENTS)(tf.constant([[1.0, 2.0]]), [1], False)
    assert asked == [1] and inspect.unwrap(moments) is inspect.unwrap(getattr(*replaced.MOMENTS))


def test_a_twin_shares_variables_and_nothing_else():
    layer = layers.Dense(2, activation="tanh")
    y = layer(X)
    other = twin(layer, activation=None)
    other.units = 7
    assert other.kernel is layer.kernel and layer.units == 2 and layer.activation is keras.activations.tanh
    np.testing.assert_array_equal(tf.tanh(other(X)), y)
