"""Outputs whose first axis is not the batch: estimates from single examples are right, or refused in words."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat, float64
from selection import some

import keras_curvature as kc
from keras_curvature import Linearization

X = np.linspace(-1.0, 1.0, 6)[:, None]
Y = np.sin(3.0 * X)
X32, Y32 = X.astype("float32"), Y.astype("float32")
ENDS = np.asarray([[0.0], [1.0]])


class Boundary(keras.Model):
    """A network with its boundary values as another output, and a loss of both."""

    def __init__(self):
        super().__init__()
        self.net = keras.Sequential([
            keras.Input((1,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)
        ])  # fmt: skip

    def call(self, x):
        """`{"b": boundary values, "r": values}`."""
        return {"r": self.net(x), "b": self.net(tf.constant(ENDS, x.dtype))}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean of squares, and squares at the boundary."""
        return tf.reduce_mean((y_pred["r"] - y) ** 2) + tf.reduce_sum(y_pred["b"] ** 2)


class Transposed(keras.Model):
    """Two numbers for each example, with the examples last."""

    def __init__(self):
        super().__init__()
        self.net = keras.layers.Dense(2)

    def call(self, x):
        """`(2, batch)`."""
        return tf.transpose(self.net(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean of squares."""
        return tf.reduce_mean((tf.transpose(y_pred) - y) ** 2)


class Folded(Transposed):
    """The same numbers, two rows for each example."""

    def call(self, x):
        """`(2 batch, 1)`."""
        return tf.reshape(self.net(x), (-1, 1))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean of squares."""
        return tf.reduce_mean((tf.reshape(y_pred, (-1, 2)) - y) ** 2)


class Unknown(Transposed):
    """The same with a number of rows that only the graph knows."""

    def call(self, x):
        """`(2, batch)`."""
        return tf.transpose(self.net(x)[:, : tf.shape(x)[1] + 1])


def made(cls, optimizer="sgd"):
    """A curved and compiled model."""
    keras.utils.set_random_seed(1)
    model = kc.curved(cls())
    model.compile(optimizer=optimizer)
    return model


def by_examples(model, parts):
    """The sum of the outer products of the gradients of `parts`, functions of the model."""
    total = 0.0
    for part in parts:
        with tf.GradientTape() as tape:
            value = part(model)
        found = tape.gradient(value, [v.value for v in model.trainable_variables])
        g = np.concatenate([np.ravel(tf.zeros_like(v) if a is None else a)
                            for a, v in zip(found, model.trainable_variables)])  # fmt: skip
        total = total + np.outer(g, g)
    return total


def boundary_parts():
    """The examples of `Boundary` by weight `1 / N`, and its boundary as one more example of weight 1."""
    n = len(X)
    rows = [lambda m, i=i: tf.reduce_sum((m.net(X[i : i + 1]) - Y[i : i + 1]) ** 2) / n**0.5 for i in range(n)]
    return [*rows, lambda m: tf.reduce_sum(m.net(ENDS) ** 2)]


def folded_parts():
    """The examples of `Folded`."""
    n = len(X)
    return [lambda m, i=i: tf.reduce_mean((m.net(X[i : i + 1]) - Y[i : i + 1]) ** 2) / n**0.5 for i in range(n)]


@pytest.mark.parametrize(("cls", "parts"), [(Boundary, boundary_parts), (Folded, folded_parts)])
def test_estimates_over_examples_are_those_of_a_tape_over_each(cls, parts):
    with float64():
        model = made(cls)
        lin = Linearization(model, X, Y)
        expected = by_examples(model, parts())
        v = [tf.ones_like(w) for w in lin.weights]
        np.testing.assert_allclose(flat(lin.fisher("empirical") @ v), expected @ flat(v), rtol=1e-10)
        draw = tf.function(lambda seed: lin_of(model).squared_gradients(seed))
        found = np.stack([flat(draw(tf.constant(seed))) for seed in range(400)])
        error = np.abs(found.mean(0) - np.diag(expected)) / (found.std(0) / 20 + 1e-12)
        assert error.max() < 5.0


def lin_of(model):
    """The linearization of a model on the examples."""
    return Linearization(model, X, Y)


def empirical():
    """K-FAC with a Fisher matrix of single examples."""
    return kc.KFAC(fisher="empirical")


PAIRS = [(cls, make) for cls in (Boundary, Folded) for make in (kc.HessianFree, empirical)]


@pytest.mark.parametrize(("cls", "make"), some(PAIRS, [(Boundary, kc.HessianFree), (Folded, empirical)]))
def test_such_models_train_on_batches_of_unknown_size(cls, make):
    model = made(cls, make())
    data = tf.data.Dataset.from_tensor_slices((X32, Y32)).batch(4)
    losses = model.fit(data, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_a_batch_axis_that_only_the_data_tell_is_checked_when_the_graph_runs():
    model = made(Unknown)
    model(X32)

    @tf.function(input_signature=[tf.TensorSpec([None, 1]), tf.TensorSpec([None, 1])])
    def squares(x, y):
        return Linearization(model, x, y).squared_gradients()

    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="Transpose the output"):
        squares(X32, Y32)


@pytest.mark.parametrize("batches", ["known", "unknown"])
def test_a_layer_on_the_batch_and_on_the_boundary_has_no_gradients_of_single_examples(batches):
    model = made(Boundary, kc.EKFAC(fisher="empirical"))
    data = tf.data.Dataset.from_tensor_slices((X32, Y32)).batch(6, drop_remainder=batches == "known")
    with pytest.raises(ValueError, match="is called on the batch, and on inputs of 2 rows"):
        model.fit(data, shuffle=False, verbose=0)


@pytest.mark.parametrize("make", [
    kc.HessianFree, lambda: kc.KFAC(fisher="empirical"), lambda: kc.EKFAC(fisher="empirical")
])  # fmt: skip
def test_outputs_with_the_batch_last_are_refused_in_words(make):
    with pytest.raises(ValueError, match=r"output 0 .*of shape \(2, 6\) for 6 examples. Transpose the output"):
        made(Transposed, make()).train_on_batch(X32, Y32)


def unconditioned():
    """Hessian-free without the preconditioner, which needs gradients of single examples."""
    return kc.HessianFree(preconditioner=0.0)


@pytest.mark.parametrize(
    "make", some([unconditioned, kc.CurveBall, kc.AdaHessian, kc.SophiaH], [kc.CurveBall, kc.AdaHessian])
)
def test_the_methods_that_the_refusal_names_train_with_the_batch_last(make):
    assert np.isfinite(made(Transposed, make()).train_on_batch(X32, Y32)).all()
