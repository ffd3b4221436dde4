"""Training meets the edge of stability, for every optimizer its own: Cohen et al. (2021, 2022), in small.

Full-batch training sharpens the loss until the gauge is 1, and then keeps it there, where a quadratic would diverge:

    gauge = learning_rate * lambda_max(M^1/2 H M^1/2) / limit

The networks are those of the authors' code, as far as a minute allows: tanh, squared error, whole data sets of a few
hundred examples. They have tried gradient descent, momentum, Adam and RMSprop; SOAP, KL-Shampoo and PSGD do the same.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_curvature as kc
from keras_curvature.monitor.stability import stability
from keras_curvature.problems import data
from keras_curvature.solvers import lanczos

pytestmark = pytest.mark.slow
REACHED = 0.97  # of the limit: from there on a run is at the edge
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam


def digits():
    """500 images in [-0.5, 0.5] with their classes as unit vectors."""
    (x, y), _ = data("digits")
    return x[:500] - 0.5, keras.utils.to_categorical(y[:500], 10)


def chebyshev(degree=4, points=20):
    """The toy of the authors' code: a polynomial between -1 and 1."""
    x = np.linspace(-1, 1, points, dtype="float32")[:, np.newaxis]
    return x, np.cos(degree * np.arccos(x)).astype("float32")


def network(x, y, hidden):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(units, activation="tanh") for units in hidden]
    return keras.Sequential([keras.Input(x.shape[1:]), *layers, keras.layers.Dense(y.shape[-1])])


def half_squared_error(y, z):
    return 0.5 * tf.reduce_sum(tf.square(y - z), -1)


class Watch(keras.callbacks.Callback):
    """The gauge and the loss after each epoch; each look begins at the last one's eigenvector."""

    def __init__(self, x, y):
        super().__init__()
        self.data, self.start, self.gauges, self.losses = (x, y), None, [], []

    def on_train_begin(self, logs=None):
        self.probe = kc.curvature(self.model, self.data)

    def on_epoch_end(self, epoch, logs=None):
        found = stability(self.model.optimizer, self.model.trainable_variables)
        steps = 20 if self.start is None else 6
        like = self.model.trainable_variables
        pairs, _ = lanczos.extremes(self.probe, like, steps, start=self.start, metric=found.preconditioner)
        (self.start,) = pairs.vectors
        self.gauges.append(found.gauge(pairs.values[0]))
        self.losses.append(float(self.probe.loss))


def train(optimizer, x, y, hidden, steps, every=100):
    """`Watch` of full-batch training, looked at every so many steps."""
    model = network(x, y, hidden)
    model.compile(optimizer, half_squared_error, steps_per_execution=every)
    watch, batches = Watch(x, y), tf.data.Dataset.from_tensors((x, y)).repeat()
    model.fit(batches, epochs=steps // every, steps_per_epoch=every, callbacks=[watch], verbose=0, shuffle=False)
    return watch


def at_the_edge(watch):
    """The gauges from the first one that is at the edge."""
    gauges = np.array(watch.gauges)
    reached = gauges >= REACHED
    assert not reached[0] and reached.any(), "training has not come to the edge"
    return gauges[np.argmax(reached) :]


def falls_in_the_long_run(watch):
    """Whether the loss, which rises now and then, is much lower in the end."""
    return np.median(watch.losses[-10:]) < 0.5 * watch.losses[0]


@pytest.mark.parametrize("rate", [0.1, 0.07, 0.05])
def test_gradient_descent(rate):
    watch = train(SGD(rate), *digits(), (50, 50), steps=20_000)
    after = at_the_edge(watch)
    assert len(after) > 100
    assert 0.97 < np.median(after) < 1.05
    low, high = np.quantile(after, [0.1, 0.9])
    assert 0.97 < low < high < 1.05
    assert falls_in_the_long_run(watch)
    assert np.mean(np.diff(watch.losses) > 0) > 0.01  # but not always


@pytest.mark.parametrize(("rate", "nesterov"), [(0.12, False), (0.05, True)])
def test_momentum(rate, nesterov):
    watch = train(SGD(rate, momentum=0.9, nesterov=nesterov), *digits(), (50, 50), steps=10_000)
    after = at_the_edge(watch)
    assert len(after) > 50
    assert 0.95 < np.median(after) < 1.05
    assert falls_in_the_long_run(watch)


@pytest.mark.parametrize("rate", [0.2, 0.1])
def test_the_toy(rate):
    watch = train(SGD(rate), *chebyshev(), (100, 100), steps=20_000)
    assert 0.97 < np.median(at_the_edge(watch)) < 1.1
    assert falls_in_the_long_run(watch)


def test_adam_in_the_metric_of_its_preconditioner():
    x, y = digits()
    watch = train(Adam(1e-3, beta_1=0.9, beta_2=0.99), x, y, (50, 50), steps=8_000)
    after = at_the_edge(watch)
    assert len(after) > 40
    assert 0.9 < np.median(after) < 1.1
    raw = float(kc.curvature(watch.model, (x, y)).sharpness(steps=20).values[0])
    assert 1e-3 * raw / 38 < 0.1  # without the preconditioner it says nothing
    assert falls_in_the_long_run(watch)


PRECONDITIONED = {
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-4, rho=0.99),
    "nadam": lambda: keras.optimizers.Nadam(1e-3, beta_2=0.99),
    "soap": lambda: kc.SOAP(1e-3, beta_1=0.9, beta_2=0.99),
    "kl_shampoo": lambda: kc.KLShampoo(1e-3),
    "psgd": lambda: kc.PSGD(1e-3, momentum=0.9, every=5),
}


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_others_in_the_metrics_of_theirs(name):
    watch = train(PRECONDITIONED[name](), *digits(), (50, 50), steps=4_000)
    after = at_the_edge(watch)
    assert watch.gauges[0] < 0.5 and len(after) > 15
    assert 0.85 < np.median(after) < 1.15
    assert falls_in_the_long_run(watch)
