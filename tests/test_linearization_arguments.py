"""An argument of a linearization that cannot be meant is refused where it is given, by the name that was typed."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_curvature as kc

X, Y = np.random.default_rng(0).standard_normal((2, 8, 3)).astype("float32")


@functools.cache
def model(dropout=0.0):
    """Two small layers, with a dropout before each unless it is 0."""
    keras.utils.set_random_seed(0)
    blocks = [[keras.layers.Dropout(dropout)] * (dropout > 0) + [keras.layers.Dense(3)] for _ in range(2)]
    made = keras.Sequential([keras.Input((3,)), *sum(blocks, [])])
    made.compile("sgd", "mse")
    return made


def lin(**arguments):
    """A linearization of the model."""
    return kc.Linearization(model(), X, Y, **arguments)


def refused(make, message, error=ValueError):
    """Assert that `make()` raises an error with a part of its text."""
    with pytest.raises(error, match=re.escape(message)):
        make()


# Parts of the batch.


@pytest.mark.parametrize("size", [0, -3, True, 1.5, 0.0, float("nan"), np.float32(1.5), "a", None, [2], tf.constant(2)])
def test_a_size_is_a_share_or_a_number_of_examples(size):
    expected = "must be a share of the batch in (0, 1] (a float) or a number of examples >= 1 (an integer). Received: "
    refused(lambda: lin().chunk(size), f"`chunk`: `size` {expected}size={size!r}")
    refused(lambda: lin(part=(size, 0)), f"`Linearization`: `part[0]` {expected}part[0]={size!r}")


@pytest.mark.parametrize("index", [-1, 0.5, None, True, "a", [0], tf.constant(0.0), tf.constant(-1), np.array([1])])
def test_an_index_is_an_integer(index):
    expected = "must be an integer >= 0, or a scalar integer tensor >= 0. Received: "
    refused(lambda: lin().chunk(2, index), f"`chunk`: `index` {expected}index={index!r}")
    refused(lambda: lin(part=(2, index)), f"`Linearization`: `part[1]` {expected}part[1]={index!r}")


@pytest.mark.parametrize("part", [3, (0.5,), (1, 2, 3), "ab", 0.5])
def test_a_part_has_two_numbers(part):
    refused(lambda: lin(part=part), f"`part` must be `(size, index)`, or None. Received: part={part!r}")


def test_numbers_of_numpy_and_tensors_are_as_good():
    half, third = lin().chunk(0.5, 1).loss, lin().chunk(3, 1).loss
    np.testing.assert_array_equal(lin().chunk(np.float32(0.5), np.int64(1)).loss, half)
    np.testing.assert_array_equal(lin().chunk(np.int64(3), tf.constant(1)).loss, third)
    np.testing.assert_array_equal(lin().chunk(3, keras.Variable(1, dtype="int64")).loss, third)

    @tf.function
    def in_a_graph(index):
        return lin().chunk(3, index).loss

    np.testing.assert_allclose(in_a_graph(tf.constant(1)), third, 1e-6)
