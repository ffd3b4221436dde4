"""Saves what each family of methods trained with the installed Keras, and how its training goes on.

    python tests/saved_versions.py FOLDER

`tests/data/versions` has such folders from the oldest and the newest Keras; `test_versions.py` loads them with others.
"""

import json
import pathlib
import sys

import keras
import numpy as np
from optimizers import FAMILIES, OPTIMIZERS

import keras_curvature as kc

X = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
Y = np.sin(X[:, :2])
FIT = {"x": X, "y": Y, "batch_size": 4, "shuffle": False, "verbose": 0}


def made(name):
    """A small curved model, compiled with a method of the registry; the same weights every time.

    Without XLA, which `tensorflow-tpu` does not have for the host.
    """
    stack = [keras.Input((3,)), keras.layers.Dense(4, activation="tanh", name="a"), keras.layers.Dense(2, name="b")]
    model = kc.curved(keras.Sequential(stack))
    random = np.random.default_rng(0)
    model.set_weights([0.5 * random.standard_normal(w.shape) for w in model.get_weights()])
    model.compile(OPTIMIZERS[name](), "mse", jit_compile=False)
    return model


def goes_on(model):
    """The losses of two more epochs."""
    return model.fit(**FIT, epochs=2).history["loss"]


def main(folder):
    """Save `NAME.keras`, `NAME.weights.h5` and `losses.json` of all families."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = {}
    for name in FAMILIES:
        model = made(name)
        model.fit(**FIT, epochs=2)
        model.save(folder / f"{name}.keras")
        model.save_weights(folder / f"{name}.weights.h5")
        losses[name] = goes_on(model)
    (folder / "losses.json").write_text(json.dumps({"keras": keras.__version__, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
