"""Arithmetic on lists of tensors, against NumPy on the concatenation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_curvature import trees

RANDOM = np.random.default_rng(0)
U, V = ([tf.constant(RANDOM.standard_normal(shape)) for shape in ((2, 3), (4,), ())] for _ in range(2))


def flat(vector):
    """The entries of a vector, as one array."""
    return np.concatenate([np.ravel(a) for a in vector])


def test_inner_products():
    np.testing.assert_allclose(trees.dot(U, V), flat(U) @ flat(V), 1e-14)
    np.testing.assert_allclose(trees.squared_norm(U), flat(U) @ flat(U), 1e-14)
    np.testing.assert_allclose(trees.norm(U), np.linalg.norm(flat(U)), 1e-14)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 1e-6), ("float32", 1e-6), ("float64", 1e-14)])
def test_inner_products_of_long_vectors(dtype, tolerance, rounds, monkeypatch):
    monkeypatch.setattr(trees, "rounds_products", lambda: rounds)
    u, v = (tf.cast(np.abs(RANDOM.standard_normal((2 * trees.PIECE // 128, 128))), dtype) for _ in range(2))
    expected = np.sum(tf.cast(u, "float64").numpy() * tf.cast(v, "float64").numpy())
    found = tf.function(lambda u, v: trees.dot([u], [v]))(u, v)
    assert found.dtype == trees.scalar_dtype([u])
    np.testing.assert_allclose(found, expected, tolerance)


def test_the_largest_entry_is_by_size():
    for entries, largest in (([1.0, -3.0], 3.0), ([2.0, 1.0], 2.0), ([0.0, 0.0], 0.0)):
        found = trees.largest([tf.constant(entries), tf.zeros([0])])
        assert found == largest and not np.signbit(found)


def test_sums_and_multiples():
    np.testing.assert_allclose(flat(trees.add(U, V)), flat(U) + flat(V))
    np.testing.assert_allclose(flat(trees.add(U, V, 0.3)), flat(U) + 0.3 * flat(V))
    np.testing.assert_allclose(flat(trees.add(U, V, tf.constant(2.0))), flat(U) + 2 * flat(V))
    np.testing.assert_allclose(flat(trees.subtract(U, V)), flat(U) - flat(V))
    np.testing.assert_allclose(flat(trees.scale(-3, U)), -3 * flat(U))
    np.testing.assert_allclose(flat(trees.negative(U)), -flat(U))
    assert not flat(trees.zeros_like(U)).any()
    assert [a.shape for a in trees.zeros_like(U)] == [a.shape for a in U]


def test_a_choice_is_not_harmed_by_a_nan_in_the_other():
    nan = trees.scale(float("nan"), U)
    np.testing.assert_array_equal(flat(trees.where(tf.constant(True), U, nan)), flat(U))
    np.testing.assert_array_equal(flat(trees.where(tf.constant(False), nan, V)), flat(V))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_finite(bad):
    assert trees.is_finite(U)
    assert not trees.is_finite([*U, tf.constant([1.0, bad], tf.float64)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_inner_products_are_not_summed_in_half_precision(dtype):
    vector = [tf.ones([5000], dtype)]
    assert trees.scalar_dtype(vector) == (tf.float64 if dtype == "float64" else tf.float32)
    assert trees.dot(vector, vector) == 5000
    assert trees.squared_norm(vector) == 5000
    assert trees.dot(vector, vector).dtype == trees.scalar_dtype(vector)
    for kept in (trees.scale(tf.constant(0.5), vector), trees.add(vector, vector, tf.constant(0.5))):
        assert kept[0].dtype == dtype


@pytest.mark.parametrize("count", [2**14 + 2, 8 * 16411, 10**6, 7**7])
def test_long_inner_products_are_as_exact_as_short_ones(count):
    """TensorFlow's matrix product of 10^6 numbers has an error of 2e-6."""
    u, v = (RANDOM.random(count, np.float32) for _ in range(2))
    found = [trees.dot([tf.constant(u)], [tf.constant(v)])]
    for compiled in (False, True):
        found.append(tf.function(trees.dot, jit_compile=compiled)([tf.constant(u)], [tf.constant(v)]))
    np.testing.assert_allclose(found, np.dot(u.astype(np.float64), v), 5e-7)


def test_one_float64_tensor_makes_the_scalars_float64():
    assert trees.scalar_dtype([tf.ones([2]), tf.ones([2], tf.float64)]) == tf.float64


def test_values_do_not_follow_the_variables():
    variable = keras.Variable(np.ones(3))
    values = trees.values([variable])
    variable.assign(np.zeros(3))
    np.testing.assert_array_equal(values[0], np.ones(3))


def test_count():
    assert trees.count(U) == 11
