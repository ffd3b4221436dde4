"""Methods with a limit on `learning_rate^2 d'g`: their first steps with it and without it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat

import keras_curvature as kc
from keras_curvature import Linearization

METHODS = {"foof": (kc.FOOF, "output_clip"), "tnt": (kc.TNT, "kl_clip"), "singd": (kc.SINGD, "kl_clip"),
           "mfac": (kc.MFAC, "kl_clip"), "mkor": (kc.MKOR, "kl_clip")}  # fmt: skip


def first_step(optimizer, seed=0):
    """`(its change of the weights, the gradient before it, what it reports)`."""
    random = np.random.default_rng(seed)
    model = kc.curved(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    model.set_weights([random.standard_normal((4, 3)), random.standard_normal(3)])
    model.compile(optimizer, "mse")
    lin = Linearization(model, *(tf.constant(random.standard_normal((8, n))) for n in (4, 3)))
    before, gradient = flat(model.trainable_variables), flat(lin.gradient)
    reported = optimizer.step(lin)
    return flat(model.trainable_variables) - before, gradient, reported


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_is_too_long_is_cut_to_the_limit(name):
    cls, argument = METHODS[name]
    step, gradient, reported = first_step(cls(0.1, **{argument: None}))
    assert argument not in reported
    length = 0.1 * -step @ gradient  # learning_rate^2 d'g, of a first step, which has no momentum
    for share in (0.25, 4.0):
        cut, _, reported = first_step(cls(0.1, **{argument: share * length}))
        factor = min(1.0, share**0.5)
        np.testing.assert_allclose(cut, factor * step, rtol=1e-9)
        np.testing.assert_allclose(reported[argument], factor, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_bad_limits_fail_at_construction(name):
    cls, argument = METHODS[name]
    with pytest.raises(ValueError, match=f"`{cls.__name__}`: `{argument}` must be a number in .0, inf.* Received"):
        cls(**{argument: 0.0})
