"""The number that tells batches apart, and what quasi-Newton methods use it for."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_curvature as kc
from keras_curvature.linearization.pure import fingerprint as module
from keras_curvature.linearization.pure.fingerprint import fingerprint

RANDOM = np.random.default_rng(0)


def batch(n=12):
    """Images, labels and weights."""
    x = RANDOM.standard_normal((n, 5, 3)).astype("float32")
    return x, RANDOM.integers(0, 9, n), RANDOM.random(n).astype("float32")


def number(*arrays):
    return int(fingerprint(arrays))


def test_it_is_a_sum_over_examples_in_any_order():
    x, y, w = batch()
    order = RANDOM.permutation(12)
    whole = number(x, y, w)
    assert number(x[order], y[order], w[order]) == whole
    parts = [int(fingerprint((x[s], y[s], w[s]))) for s in (slice(0, 7), slice(7, 12), slice(12, 12))]
    assert (sum(parts) - whole) % 2**32 == 0 and parts[2] == 0


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_any_change_of_an_entry_shows(changed):
    arrays = list(batch())
    before = number(*arrays)
    for i in range(12):
        one = arrays[changed].copy()
        one[i] += np.spacing(one[i]) if changed != 1 else 1
        assert number(*arrays[:changed], one, *arrays[changed + 1 :]) != before
    for other in (arrays[changed][::-1], np.roll(arrays[changed], 1, 0)):  # the same entries, of other examples
        assert number(*arrays[:changed], other, *arrays[changed + 1 :]) != before


def test_numbers_of_random_batches_differ():
    found = {number(np.full((4, 2), i), np.arange(4) + j) for i in range(8) for j in range(12)}
    assert len(found) == 96


KINDS = {
    "half": lambda: tf.constant([[1.0, 2.0]], tf.float16),
    "float64": lambda: tf.constant([[1.0, 2.0 + 1e-15]], tf.float64),
    "bytes": lambda: tf.constant([[1, 2]], tf.uint8),
    "flags": lambda: tf.constant([[True, False]]),
    "words": lambda: tf.constant([["a", "b"]]),
    "ragged": lambda: tf.ragged.constant([[1, 2], [3]]),
    "sparse": lambda: tf.sparse.from_dense([[0.0, 1.0], [2.0, 0.0]]),
    "structured": lambda: {"nodes": tf.ones((4, 2)), "edges": tf.ones((7, 2), tf.int32)},
    "one number": lambda: tf.constant(3.0),
    "empty": lambda: tf.zeros((0, 3)),
}


def of_unknown_shape(value):
    """The spec of a tensor, as far as its type allows without its shape."""
    spec = tf.type_spec_from_value(value)
    return tf.TensorSpec([None] * spec.shape.rank, spec.dtype) if isinstance(spec, tf.TensorSpec) else spec


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_all_kinds_have_one_in_graphs_of_unknown_shapes_too(kind):
    value = KINDS[kind]()
    expected = number(value, tf.ones((4, 1)))
    specs = tf.nest.map_structure(of_unknown_shape, value)
    found = tf.function(lambda v: fingerprint((v, tf.ones((4, 1)), None)), input_signature=[specs], autograph=False)
    assert int(found(value)) == expected and expected != number(tf.ones((4, 1)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_compiled_and_on_accelerators_it_is_the_same(dtype, monkeypatch):
    arrays = tuple(tf.constant(a.astype(dtype)) for a in batch())
    expected = int(fingerprint(arrays))
    assert int(tf.function(lambda *a: fingerprint(a), jit_compile=True)(*arrays)) == expected
    monkeypatch.setattr(module.trees, "sums_products", lambda: True)
    assert int(fingerprint(arrays)) == expected


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_batch_of_the_same_loss_takes_its_own_gradient(micro_batches):
    """At zeros in the output layer, the loss of every balanced batch is log(10) to the last digit."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="relu"), keras.layers.Dense(10, kernel_initializer="zeros")]
    model = kc.curved(keras.Sequential([keras.Input((6,)), *layers]), micro_batches)
    optimizer = kc.LBFGS(initial_scale=1e-6, search=kc.ArmijoLineSearch())
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    x, y = RANDOM.standard_normal((40, 6)).astype("float32"), np.tile(np.arange(10), 4)
    halves = [slice(0, 20), slice(20, 40)]
    model.train_on_batch(x[halves[0]], y[halves[0]])
    expected = kc.Linearization(model, x[halves[1]], y[halves[1]]).gradient
    model.train_on_batch(x[halves[1]], y[halves[1]])
    first_y = np.concatenate([v.numpy()[optimizer.memory].ravel() for v in optimizer._memory])
    assert np.abs(first_y).max() < 1e-4  # of the two ends of a step that is 1e-6 long
    second = kc.Linearization(model, x[halves[1]], y[halves[1]]).gradient
    before = np.concatenate([np.ravel(g) for g in expected])
    change = np.concatenate([np.ravel(g) for g in second]) - before
    second_y = np.concatenate([v.numpy()[optimizer.memory + 1].ravel() for v in optimizer._memory])
    np.testing.assert_allclose(second_y, change, atol=1e-2 * np.abs(before).max())
