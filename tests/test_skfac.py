"""SKFAC against K-FAC with dense factors of one batch, in float64, and Woodbury's identity against an inverse."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_curveball import made, stepper

import keras_curvature as kc
from keras_curvature import KFAC, SKFAC, Linearization, curved
from keras_curvature.solvers import direct

float64 = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4), (2, 3, 5)])
def test_the_solution_by_rows_is_that_of_the_inverse(shape, static):
    random = np.random.default_rng(0)
    X, W = random.standard_normal(shape), random.standard_normal((*shape[:-2], shape[-1], 2))
    damping = tf.constant(random.uniform(0.1, 0.3, shape[:-2]))
    spec = tf.TensorSpec(shape if static else (*shape[:-2], None, shape[-1]), tf.float64)
    solve = tf.function(lambda X: direct.solve_by_rows(X, damping, tf.constant(W)), input_signature=[spec])
    damped = np.swapaxes(X, -1, -2) @ X + damping.numpy()[..., None, None] * np.eye(shape[-1])
    np.testing.assert_allclose(solve(tf.constant(X)), np.linalg.solve(damped, W), rtol=1e-10)


def network():
    """Groups, indices, normalization, a convolution, a weight of no known layer."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((6,), dtype="int32"), keras.layers.Embedding(5, 4), keras.layers.DepthwiseConv1D(2),
        keras.layers.LayerNormalization(), keras.layers.Conv1D(6, 3), keras.layers.PReLU(),
        keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3),
    ])  # fmt: skip


def batch(examples, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(5, size=(examples, 6)), np.eye(3)[random.integers(3, size=examples)]


def cross_entropy():
    return keras.losses.CategoricalCrossentropy(from_logits=True)


@float64
@pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")
@pytest.mark.parametrize("examples", [4, 40])
@pytest.mark.parametrize("fisher", some(["sampled", "empirical"], ["sampled"]))
def test_a_step_is_that_of_kfac_with_the_factors_of_the_batch(fisher, examples):
    x, y = batch(examples)
    found = []
    for cls, more in ((SKFAC, {}), (KFAC, {"factors_every": 1, "inverses_every": 1, "sharing": "reduce"})):
        optimizer = cls(0.1, 0.05, fisher=fisher, **more)
        model = made(network(), optimizer, cross_entropy())
        stepper(model, optimizer)(x, y)
        found.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    start = np.concatenate([w.ravel() for w in network().get_weights()])
    assert np.abs(found[0] - start).max() > 1e-3
    np.testing.assert_allclose(found[0], found[1], rtol=1e-8, atol=1e-10)


@float64
@pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")
def test_a_later_step_knows_nothing_of_earlier_batches():
    """From the second batch, a new optimizer takes the same step, but for momentum and the averaged diagonals."""
    keras.utils.set_random_seed(0)
    arrays = [np.random.default_rng(0).standard_normal(s) for s in ((4, 9), (9,), (9, 3), (3,))]
    found = []
    for batches in ((0, 1), (1,)):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(9, activation="tanh"), keras.layers.Dense(3)])
        optimizer = SKFAC(0.1, momentum=0.0, fisher="empirical")
        made(model, optimizer, cross_entropy())
        step = stepper(model, optimizer)
        for seed in batches:
            random = np.random.default_rng(seed)
            model.set_weights(arrays)
            step(random.standard_normal((5, 4)), np.eye(3)[random.integers(3, size=5)])
        found.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_array_equal(*found)


@float64
@pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")
def test_rows_do_not_depend_on_the_slices():
    x, y = batch(7)
    found = []
    for micro_batches in (1, 3):
        optimizer = SKFAC(0.1, fisher="empirical")
        model = curved(network(), micro_batches=micro_batches)
        model.compile(optimizer, loss=cross_entropy())
        optimizer.meet(model)
        optimizer.step(Linearization(model, x, y, micro_batches=micro_batches))
        found.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-12)


@float64
def test_it_keeps_nothing_but_its_momentum():
    optimizer = SKFAC()
    model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(40), keras.layers.Dense(3)])
    made(model, optimizer, "mse")
    weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert sum(int(np.prod(v.shape)) for v in optimizer.variables) < weights + 10


@float64
def test_adaptive_chooses_its_steps():
    optimizer = SKFAC.adaptive()
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(9, activation="tanh"), keras.layers.Dense(2)])
    made(model, optimizer, "mse")
    x = random.standard_normal((12, 4))
    step, y = stepper(model, optimizer), np.c_[np.sin(x[:, 0]), x[:, 1] * x[:, 2]]
    seen = [step(x, y) for _ in range(15)]
    assert seen[-1]["loss"] < 0.3 * seen[0]["loss"] and optimizer.momentum is None
    assert SKFAC.from_config(optimizer.get_config()).get_config() == optimizer.get_config()


def test_what_it_cannot_do_is_told():
    with pytest.raises(ValueError, match='`fisher` must be "sampled" or "empirical". Received: fisher=\'exact\''):
        SKFAC(fisher="exact")
    with pytest.raises(ValueError, match="`damping` must be positive"):
        SKFAC(damping=0.0)
    assert "keeps no preconditioner" in kc.stability(SKFAC()).reason
