"""Eva against its authors' code, step by step, and against its dense definition."""

import pathlib

import keras
import numpy as np
import pytest
from cases import flat
from selection import some
from test_curveball import stepper
from test_kfac import cross_entropy, made, net

from keras_curvature.optimizers.eva import Eva

REFERENCE = pathlib.Path(__file__).parent / "reference"

pytestmark = pytest.mark.usefixtures("in_float64")

RUNS = {
    "softmax": lambda: Eva(0.1, 0.03),
    "softmax_unclipped": lambda: Eva(0.01, 0.1, kl_clip=None),
    "mse": lambda: Eva(0.1, 0.03, momentum=0.5, kl_clip=1e-2),
    "conv": lambda: Eva(0.1, 0.03),
}


def convolutional(reference):
    """A convolution with strides, and a dense layer without bias."""
    layers = [
        keras.layers.Conv2D(4, 3, strides=2, padding="valid", activation="tanh"),
        keras.layers.Flatten(),
        keras.layers.Dense(5, use_bias=False),
    ]
    model = keras.Sequential([keras.Input((6, 6, 2)), keras.layers.ZeroPadding2D(1), *layers])
    model.set_weights([reference[name] for name in ("w0_init", "b0_init", "w1_init")])
    return model


@pytest.mark.parametrize("name", some(RUNS, ["mse", "conv"]))
def test_trajectory_is_that_of_the_authors_code(name):
    reference, optimizer = np.load(REFERENCE / f"eva_{name}.npz"), RUNS[name]()
    if name == "conv":
        model = convolutional(reference)
    else:
        model = net([reference[f"{kind}{layer}_init"] for layer in range(3) for kind in "wb"])
    step = stepper(made(model, optimizer, "mse" if name == "mse" else cross_entropy()), optimizer)
    for t in range(20):
        rows = slice(16 * (t % 4), 16 * (t % 4) + 16)
        seen = step(reference["x"][rows], reference["y"][rows])
        np.testing.assert_allclose(seen["loss"], reference["loss"][t], 1e-12, err_msg=f"step {t}")
        np.testing.assert_allclose(flat(model.trainable_variables), reference["weights"][t], 1e-11, 1e-11)
    for block, (a, b) in enumerate(zip(optimizer._vectors[::2], optimizer._vectors[1::2])):
        np.testing.assert_allclose(b, reference[f"b{block}"], 1e-10, 1e-12)
        if name != "conv" or block:  # a patch of the reference has its channels first
            np.testing.assert_allclose(a, reference[f"a{block}"], 1e-10, 1e-12)
