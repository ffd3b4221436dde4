"""Files that were saved before the package got its present layout load, and train on as they would have."""

import json
import pathlib

import keras
import numpy as np
import pytest
from selection import some

import keras_curvature as kc
from keras_curvature import keras_internals

SAVED = pathlib.Path(__file__).parent / "data" / "saved"
# what training went on to, in the process that saved the file
LOSSES = json.loads((SAVED / "losses.json").read_text())


# a newer Keras writes arguments of layers that an older one does not know; `test_versions.py` has files of an older one
@pytest.mark.skipif(keras_internals.KERAS < (3, 15), reason="saved by Keras 3.15")
@pytest.mark.parametrize("name", some(LOSSES, ["Neumann", "CurveBall", "KFAC"]))
def test_a_file_of_the_former_layout_goes_on(name):
    model = keras.models.load_model(SAVED / f"{name}.keras")
    assert type(model.optimizer) is getattr(kc, name)
    model = model if isinstance(model, kc.CurvatureModel) else kc.curved(model)
    x = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
    y = np.sin(x[:, :2])
    losses = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False).history["loss"]
    np.testing.assert_allclose(losses, LOSSES[name], rtol=1e-4)
