"""An argument of a linearization that cannot be meant is refused where it is given, by the name that was typed."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_curvature as kc
from keras_curvature import trees
from keras_curvature.linearization.estimates.trace_factors import trace_factors

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


def test_a_part_stays_with_other_arguments():
    np.testing.assert_array_equal(lin().chunk(3, 1).again(training=False).loss, lin().chunk(3, 1).loss)


# Vectors.

VECTORS = {
    "shift": lambda v: lin(shift=v).gradient,
    "loss_at": lambda v: [lin().loss_at(v)],
    "gradient_at": lambda v: lin().gradient_at(v),
    "take_gradient": lambda v: _taken(v),
    "hessian": lambda v: lin().hessian() @ v,
    "gauss_newton": lambda v: lin().gauss_newton() @ v,
    "push": lambda v: lin().gauss_newton().push(v).vector,
    "quadratic_form": lambda v: [lin().gauss_newton().quadratic_form(v, v)],
    "fisher": lambda v: lin().fisher("empirical") @ v,
    "rows": lambda v: [lin().rows() @ v],
    "bent": lambda v: [lin().rows().bent(v)],
}


def _taken(gradient):
    taker = lin()
    taker.take_gradient(gradient)
    return taker.gradient


def _vector(dtype="float32"):
    random = np.random.default_rng(1)
    return [random.integers(-2, 3, v.shape).astype(dtype) for v in model().trainable_variables]


@pytest.mark.parametrize("method", VECTORS)
def test_a_vector_is_a_list_of_numeric_tensors_with_the_shapes_of_the_weights(method):
    good = _vector()
    wrong = {
        "one for all": good[0], "too few": good[:3], "too many": [*good, good[0]], "another order": good[::-1],
        "flat": tf.zeros([24]), "None": None, "numbers": [1, 2], "of None": [None] * 4, "of strings": ["a"] * 4,
        "of lists": [a.tolist() for a in good], "complex": _vector("complex64"), "of words": _vector("str"),
        "a number": 3, "a dictionary": dict(enumerate(good)),
    }  # fmt: skip
    if method == "shift":
        del wrong["None"]
    for name, vector in wrong.items():
        with pytest.raises(ValueError, match=r"`\w+` must be a list of .* Received: "):
            pytest.fail(f"{name} gave {VECTORS[method](vector)}")


def test_both_vectors_of_a_quadratic_form_are_looked_at():
    H, good = lin().hessian(), lin().gradient
    for wrong in (good[0], good[:3], good[::-1]):
        refused(lambda u=wrong: H.quadratic_form(u, good), "`u` must be a list of 4 tensors")
        refused(lambda v=wrong: H.quadratic_form(good, v), "`vector` must be a list of 4 tensors")


def test_there_is_a_number_for_each_row():
    rows = lin().rows()
    for wrong in (tf.ones([23]), tf.ones([24, 1]), np.ones(1), 1.0):
        refused(lambda u=wrong: rows.transposed(u), "`rows` must be a number for each row, a tensor (24,)")
    refused(lambda: rows.gram(scale=[1.0, 2.0]), "`scale` must be a list of 4 numbers, one per variable")
    np.testing.assert_array_equal(rows.transposed(np.ones(24))[0], rows.transposed(tf.ones([24]))[0])


@pytest.mark.parametrize("method", VECTORS)
def test_other_dtypes_are_cast_to_that_of_the_weights(method):
    expected = VECTORS[method]([tf.constant(a) for a in _vector()])
    for vector in (
        _vector("float64"), _vector("int32"), tuple(_vector("float16")), [tf.constant(a) for a in _vector("float64")],
        [keras.Variable(a, dtype="float32") for a in _vector()],
        [tf.IndexedSlices(tf.constant(a), tf.range(len(a)), tf.constant(a.shape)) for a in _vector()],
    ):  # fmt: skip
        found = VECTORS[method](vector)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == "float32"
            np.testing.assert_allclose(ours, theirs, 1e-6, 1e-6)


def test_a_checked_vector_costs_nothing_in_a_graph():
    @tf.function
    def at(step):
        return [given is checked for given, checked in zip(step, trees.vector("step", step, model().weights))]

    assert all(at([tf.constant(a) for a in _vector()]))


# Seeds.


@pytest.mark.parametrize("seeds", [
    tf.zeros((1, 2), tf.int64), tf.zeros((5, 2), tf.int64), tf.zeros((0, 2), tf.int64), tf.zeros((2, 3), tf.int64),
    tf.zeros((2,), tf.int64), tf.zeros((2, 2)), 3, "ab", [[1, 2], [3, 4]],
])  # fmt: skip
def test_there_is_a_row_for_each_seed_of_the_model(seeds):
    message = "`Linearization`: `seeds` must be an integer tensor of shape (2, 2), a row for each seed of the model's"
    refused(lambda: kc.Linearization(model(0.5), X, Y, seeds=seeds), message)


def test_seeds_of_any_integer_type_draw_the_same():
    seeds = np.array([[1, 2], [3, 4]])
    losses = [kc.Linearization(model(0.5), X, Y, seeds=s).loss for s in (seeds, tf.constant(seeds, tf.int32))]

    @tf.function(input_signature=[tf.TensorSpec(None, tf.int64)])
    def of_unknown_shape(seeds):
        return kc.Linearization(model(0.5), X, Y, seeds=seeds).loss

    np.testing.assert_array_equal(*losses)
    np.testing.assert_allclose(of_unknown_shape(tf.constant(seeds)), losses[0], 1e-6)
    assert kc.Linearization(model(0.5), X, Y, seeds=seeds + 1).loss != losses[0]
    refused(lambda: lin(seeds=seeds), "of shape (0, 2)")
    np.testing.assert_array_equal(lin(seeds=seeds[:0]).loss, lin().loss)


DRAWS = {
    "hessian_diagonal": lambda seed: lin().hessian_diagonal(seed),
    "squared_gradients": lambda seed: lin().squared_gradients(seed),
    "fisher_rows": lambda seed: lin().fisher_rows("sampled", seed),
    "sampled_gradient": lambda seed: lin().sampled_gradient(seed),
    "fisher_diagonal": lambda seed: lin().fisher_diagonal(seed),
    "kronecker_factors": lambda seed: lin().kronecker_factors([], seed=seed),
    "kronecker_second_moments": lambda seed: lin().kronecker_second_moments([], [], seed=seed),
    "trace_factors": lambda seed: trace_factors(lin(), [], seed=seed),
}


@pytest.mark.parametrize("method", DRAWS)
def test_a_seed_is_an_integer(method):
    for seed in (None, "a", 1.5, True, [1], np.float32(1), tf.constant(1.0), tf.constant([1]), float("nan")):
        expected = "must be an integer, or a scalar integer tensor. Received: "
        refused(lambda s=seed: DRAWS[method](s), f"`{method}`: `seed` {expected}seed={seed!r}")


def test_integers_of_any_type_are_seeds():
    expected = DRAWS["hessian_diagonal"](3)[0]
    for seed in (np.int64(3), np.array(3), tf.constant(3), tf.constant(3, tf.int64)):
        np.testing.assert_array_equal(DRAWS["hessian_diagonal"](seed)[0], expected)


# The rest.


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, float("nan"), float("inf"), "a", True, [1.0], tf.ones([1]),
                                   tf.constant(0.0), tf.constant(float("nan"))])  # fmt: skip
def test_a_loss_scale_is_positive(scale):
    expected = "must be a finite number > 0, or a scalar tensor > 0. Received: "
    refused(lambda: lin(loss_scale=scale), f"`Linearization`: `loss_scale` {expected}loss_scale={scale!r}")


def test_a_loss_scale_is_a_number_of_any_type():
    for scale in (128, np.float32(2), tf.constant(2), np.array(2.0), keras.Variable(2.0)):
        np.testing.assert_allclose(lin(loss_scale=scale).gradient[0], lin().gradient[0], 1e-6)

    @tf.function
    def in_a_graph(scale):
        return lin(loss_scale=scale).gradient[0]

    np.testing.assert_allclose(in_a_graph(tf.constant(2.0)), lin().gradient[0], 1e-6)


@pytest.mark.parametrize("needs", ["hessian", 3, None, kc.Needs, {"hessian": True}])
def test_needs_are_an_object(needs):
    refused(lambda: lin(needs=needs), f"`needs` must be a `Needs`, such as `Needs(hessian=True)`. Received: {needs=}")


def test_other_arguments_have_the_names_of_the_arguments():
    refused(lambda: lin().again(foo=1), "`again` has no argument `foo`. Received: foo=1. It takes `batch`, `needs`,")
    for batch in (3, (), None, (X, Y, None, None), X):
        refused(lambda b=batch: lin().again(batch=b), "`again`: `batch` must be `(x, y, sample_weight)`")
    for batch in ((X, Y), [X, Y, None]):
        np.testing.assert_array_equal(lin().again(batch=batch).loss, lin().loss)


@pytest.mark.parametrize("x", [None, [], 3, "a", X.tolist(), (None, None)])
def test_inputs_are_tensors(x):
    refused(lambda: kc.Linearization(model(), x, Y), "`Linearization`: `x` must be the inputs of a batch, tensors or")
