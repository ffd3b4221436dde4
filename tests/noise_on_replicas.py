"""Noise and traces on one replica and on two, over logical CPUs; prints them as JSON. Run by `test_noise.py`."""

import json

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.monitor.noise.noise import noise
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.spectra.label_traces import layer_traces


def numbers(x, y):
    """What is found under the strategy of the caller."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(5, activation="tanh"), keras.layers.Dropout(0.2, seed=1), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    objective = Objective(model, (x, y), training=True, batch_size=64)  # 64 and 32 examples
    found = noise(objective, micro_batch=4, parts=8)
    traces = layer_traces(objective, draws=2).values
    known = [found.signal, found.noise, found.curvature, found.curved_noise, found.stderr["simple"], *traces.tolist()]
    return known + weighed(model, x, y)


def weighed(model, x, y):
    """The same of a mean over sample weights, 95 examples in one batch: the slices differ in weight and in length."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    model.compile("sgd", loss, jit_compile=False)
    weights = np.linspace(0.0, 2.0, 95).astype("float32")
    objective = Objective(model, (x[:95], y[:95], weights), training=True)
    loss, gradient = float(objective.loss()), float(trees.norm(objective.gradient()))
    found = noise(Objective(model, (x, y, np.append(weights, 3.0))), micro_batch=4, parts=8)
    return [loss, gradient, found.signal, found.noise, found.curved_noise]


tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
x = np.random.default_rng(0).standard_normal((96, 4)).astype("float32")
y = np.argmax(x[:, :3], axis=1).astype("int32")
one = numbers(x, y)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    two = numbers(x, y)
print(json.dumps({"one": one, "two": two}))
