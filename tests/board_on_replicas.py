"""What a board shows of a training on one replica and on two, over logical CPUs; prints it as JSON.

    python board_on_replicas.py FOLDER Adam|CurveBall ...

Run by `test_board.py` in a process of its own: two strategies in one process collide.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf
from boards import Clock, boarded, numbers

import keras_curvature as kc


def shown(folder, curve):
    """`{tag: [[step, number], ...]}` of a training under the strategy of the caller, and the weights it leaves."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(5, activation="tanh", name="hidden"), keras.layers.Dense(3, name="out"),
    ])  # fmt: skip
    model = kc.curved(model) if curve else model
    optimizer = kc.CurveBall() if curve else keras.optimizers.Adam(0.01)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    board = boarded(folder, Clock(), report_at=None)
    model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0, callbacks=[board])
    left = np.concatenate([w.ravel() for w in model.get_weights()])
    return {**numbers(f"{folder}/curvature"), "weights": [(i, w) for i, w in enumerate(left.tolist())]}


tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
x = np.random.default_rng(0).standard_normal((96, 4)).astype("float32")
y = np.argmax(x[:, :3], axis=1).astype("int32")
found, names, strategy = {}, sys.argv[2:], tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for name in names:
    one = shown(f"{sys.argv[1]}/{name}_one", name == "CurveBall")
    with strategy.scope():
        two = shown(f"{sys.argv[1]}/{name}_two", name == "CurveBall")
    found[name] = {"one": one, "two": two}
print(json.dumps(found))
