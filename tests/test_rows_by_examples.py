"""Rows of the Jacobian from a pass through each example alone, against products with the whole batch."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, WITHOUT_ROWS, by_central_differences, float64
from selection import some

import keras_curvature as kc
from keras_curvature import Linearization, problems
from keras_curvature.linearization.jacobian import columns

CASES = {**MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
USUAL = ["conv2d", "lstm", "shared_layer", "several_outputs", "loss_sample_weights", "loss_categorical_from_softmax"]


class Coupled(keras.layers.Layer):
    """Subtracts a share of the mean over the batch."""

    def __init__(self, share, **kwargs):
        super().__init__(**kwargs)
        self.share = share

    def call(self, x):
        return x - self.share * tf.reduce_mean(x, 0, keepdims=True)


@pytest.fixture
def ways(monkeypatch):
    """`ways(question)`: by products with the whole batch, and by examples where that can be; and the verdicts."""
    verdicts, agree = [], columns._agree

    def noted(*args):
        found = agree(*args)
        verdicts.append(found)
        return found

    monkeypatch.setattr(columns, "_agree", noted)

    def both(question):
        found = []
        for passes in (float("inf"), 0.0):
            monkeypatch.setattr(columns, "PASSES", passes)
            found.append(question())
        return *found, verdicts

    return both


def coupled(share, units=40):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(units, activation="tanh"), Coupled(share), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile("sgd", "mse")
    random = np.random.default_rng(0)
    return model, random.standard_normal((30, 3)), random.standard_normal((30, 2))


@pytest.mark.parametrize("name", some(sorted(set(CASES) - WITHOUT_ROWS), USUAL))
def test_rows_by_examples_are_the_rows(name, ways):
    with float64():
        case = CASES[name]().compile()

        def question():
            lin = Linearization(case.model, *case.batch, needs=kc.Needs(products=True))
            return lin.rows().dense().numpy()

        by_products, by_examples, _ = ways(question)
    np.testing.assert_allclose(by_examples, by_products, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
def test_a_physics_informed_network_has_rows_from_its_points_alone(how, ways):
    with float64():
        problem = problems.poisson(points=6, width=5)
        model, (x, y) = problem.compiled("sgd"), problem.data()
        Linearization(model, x, y)  # builds the metrics

        def rows():
            lin = Linearization(model, x, y)
            return lin.rows().dense(), lin.gradients_of_examples().dense()

        def question():
            compiled = tf.function(rows, autograph=False, jit_compile=how == "xla")
            return [a.numpy() for a in (rows if how == "eager" else compiled)()]

        by_products, by_examples, verdicts = ways(question)
    assert len(verdicts) == 2
    if how == "eager":
        assert all(bool(v) for v in verdicts)
    for a, b in zip(by_examples, by_products, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6])
def test_where_a_layer_mixes_examples_the_rows_are_those_of_the_whole_batch(share, ways):
    with float64():
        model, x, y = coupled(share)
        _, found, verdicts = ways(lambda: Linearization(model, x, y).rows().dense().numpy())
        J = by_central_differences(lambda: model(x), model.trainable_variables)
    assert [bool(v) for v in verdicts] == [False]
    np.testing.assert_allclose(found, np.sqrt(2.0 / 60) * J, atol=1e-8)


class Pairs(keras.layers.Layer):
    """Subtracts its neighbour from each example."""

    def call(self, x):
        pairs = tf.reshape(x, [-1, 2, x.shape[1]])
        return tf.reshape(pairs - pairs[:, ::-1], tf.shape(x))


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_model_that_takes_no_example_alone_has_the_rows_of_the_whole_batch(how, ways):
    with float64():
        _, x, y = coupled(0.0)
        layers = [keras.layers.Dense(40, activation="tanh"), Pairs(), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input((3,)), *layers])
        model.compile("sgd", "mse")
        ask = lambda: Linearization(model, x, y).rows().dense()  # noqa: E731
        made = lambda: ask if how == "eager" else tf.function(ask, autograph=False)  # noqa: E731
        _, found, verdicts = ways(lambda: made()().numpy())
        J = by_central_differences(lambda: model(x), model.trainable_variables)
    assert not verdicts
    np.testing.assert_allclose(found, np.sqrt(2.0 / 60) * J, atol=1e-8)


def test_a_layer_of_the_users_that_mixes_nothing_stands_alone(ways):
    with float64():
        model, x, y = coupled(0.0)
        by_products, found, verdicts = ways(lambda: Linearization(model, x, y).rows().dense().numpy())
    assert [bool(v) for v in verdicts] == [True]
    np.testing.assert_allclose(found, by_products, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_lower_precisions_stand_alone_too(policy, ways):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model, x, y = coupled(0.0)
        by_products, found, verdicts = ways(lambda: Linearization(model, x, y).rows().dense().numpy())
    finally:
        keras.config.set_dtype_policy(before)
    assert [bool(v) for v in verdicts] == [True]
    rounding = 1e-5 if policy == "float32" else 3e-2
    assert np.abs(found - by_products).max() <= rounding * np.abs(by_products).max()


def test_random_numbers_statistics_and_fixed_batches_do_not_stand_alone(ways):
    layers = {
        "dropout": lambda: (keras.Input((3,)), keras.layers.Dropout(0.5)),
        "batch_normalization": lambda: (keras.Input((3,)), keras.layers.BatchNormalization()),
        "fixed": lambda: (keras.Input((3,), batch_size=30), keras.layers.Activation("tanh")),
    }
    _, x, y = coupled(0.0)
    for name, made in layers.items():
        begin, layer = made()
        model = keras.Sequential([begin, layer, Coupled(0.0), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        a, b, verdicts = ways(lambda model=model: Linearization(model, x, y, seeds=None).rows().dense().numpy())
        assert not verdicts, name
        if name != "dropout":  # which draws another mask
            np.testing.assert_array_equal(a, b)


def test_micro_batches_and_pieces_have_the_same_rows(ways):
    with float64():
        problem = problems.poisson(points=6, width=5)
        (x, y), found = problem.data(), []
        for count in (1, 3):
            model = kc.curved(problem.compiled("sgd", seed=0), micro_batches=count)
            Linearization(model, x, y)
            ask = lambda model=model: Linearization(model, x, y).rows().dense()  # noqa: E731
            *both, verdicts = ways(lambda ask=ask: tf.function(ask, autograph=False)().numpy())
            found.extend(both)
            assert verdicts
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("examples", [1, 64])
def test_rows_of_sequences_in_single_precision(examples):
    """The product of `(n, 1, p, k)` by a kernel reads past its end in TensorFlow; other tests are in float64."""
    random = np.random.default_rng(0)
    x = random.standard_normal((examples, 8, 9))
    weights, found = [random.standard_normal(shape) for shape in ((9, 16), (16,), (16, 2), (2,))], {}
    for floatx in ("float64", "float32"):
        with float64() if floatx == "float64" else contextlib.nullcontext():
            hidden = keras.layers.Dense(16, activation="tanh")
            outputs = keras.layers.Dense(2), keras.layers.GlobalAveragePooling1D()
            model = keras.Sequential([keras.Input((8, 9)), hidden, *(outputs if examples > 1 else outputs[:1])])
            model.set_weights(weights)
            model.compile("sgd", "mse")
            y = np.zeros((examples, *model.output_shape[1:]))
            lin = Linearization(model, x.astype(floatx), y.astype(floatx), needs=kc.Needs(products=True))
            found[floatx] = lin.rows().dense().numpy()
    largest = np.abs(found["float64"]).max()
    np.testing.assert_allclose(found["float32"], found["float64"], rtol=1e-4, atol=1e-5 * largest)
