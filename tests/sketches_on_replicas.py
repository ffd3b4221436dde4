"""Trains with sketches of convolutions on one device and on two replicas; prints the largest differences as JSON.

Run by `test_seng.py` in a process of its own. The last batch of an epoch has one example, so that a replica has none.
"""

import json
import warnings

import keras
import numpy as np
import tensorflow as tf
from cases import float64
from keras import layers

import keras_curvature as kc

# of 16 and 9 positions
SKETCHES = {
    "low rank": {"rank": 1, "columns": 99}, "both": {"rank": 1, "columns": 3}, "sample": {"rank": 20, "columns": 3},
}  # fmt: skip


def trained(**settings):
    """The weights that are left."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((9, 6, 6, 2)), random.integers(0, 3, 9)
    keras.utils.set_random_seed(0)
    model = kc.curved(keras.Sequential([
        keras.Input((6, 6, 2)), layers.Conv2D(4, 3, activation="tanh"),
        layers.Conv2D(6, 2, groups=2, activation="tanh"), layers.Flatten(), layers.Dense(3),
    ]))  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kc.SENG(0.1, damping=0.1, largest=0, **settings), loss, jit_compile=False)
    model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
    return np.concatenate([w.ravel() for w in model.get_weights()])


def main():
    """Prints `{name: {"apart": largest difference, "way": how far from training without sketches}}`."""
    warnings.filterwarnings("ignore")
    cpu, two = tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy, found = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), {}
    with float64():
        exact = trained(rank=99, columns=99)
        for name, settings in SKETCHES.items():
            one = trained(**settings)
            with strategy.scope():
                apart = np.abs(trained(**settings) - one).max()
            found[name] = {"apart": float(apart), "way": float(np.abs(one - exact).max())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
