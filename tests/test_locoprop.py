"""LocoProp against local losses of single examples in NumPy, and against FOOF, where its many steps end."""

import keras
import numpy as np
import pytest
from cases import flat
from test_curveball import made, stepper
from test_kfac import cross_entropy, net, softmax

import keras_curvature as kc
from keras_curvature import Linearization, curved
from keras_curvature.linearization.estimates.local_losses import matches
from keras_curvature.linearization.layers import kronecker

float64 = pytest.mark.usefixtures("in_float64")


def with_ones(a):
    return np.c_[a, np.ones(len(a))]


def local_steps(W, a, d, f, m, v, rate, gamma, steps, momentum, beta, epsilon):
    """RMSProp on the local loss of one layer, example by example; the targets are computed once."""
    target, size = f(a @ W) - gamma * d, len(a)
    for k in range(steps):
        g = sum(np.outer(x, f(x @ W) - t) for x, t in zip(a, target)) / size / gamma
        v = beta * v + (1 - beta) * g**2
        m = momentum * m + max(1 - k / steps, 0.25) * g / np.sqrt(v + epsilon)
        W = W - rate * m
    return W, m, v


@float64
@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_trajectory_is_that_of_local_losses_example_by_example(loss):
    random = np.random.default_rng(0)
    settings = {"gamma": 0.7, "steps": 4, "momentum": 0.8, "beta": 0.9, "epsilon": 1e-3}
    optimizer = kc.LocoProp(0.05, loss=loss, **settings)
    model = made(net([random.standard_normal(s) for s in ((4, 5), (5,), (5, 3), (3,))]), optimizer, cross_entropy())
    step, state = stepper(model, optimizer), [(0.0, 0.0)] * 2
    f = np.tanh if loss == "matching" else lambda z: z
    for _ in range(4):
        x, y = random.standard_normal((6, 4)), np.eye(3)[random.integers(3, size=6)]
        w = model.get_weights()
        W, V = np.r_[w[0], w[1][None]], np.r_[w[2], w[3][None]]
        a = with_ones(x)
        h = np.tanh(a @ W)
        d_out = softmax(with_ones(h) @ V) - y
        d_hidden = d_out @ V[:-1].T * (1 - h**2)
        layers = ((W, a, d_hidden, f), (V, with_ones(h), d_out, lambda z: z))  # the last one has no activation
        after = [local_steps(*layer, *own, 0.05, **settings) for layer, own in zip(layers, state)]
        state = [own for _, *own in after]
        step(x, y)
        np.testing.assert_allclose(flat(model.trainable_variables), np.r_[tuple(W.ravel() for W, _, _ in after)], 1e-9)


@float64
def test_many_steps_on_the_squared_loss_end_where_foof_does():
    random = np.random.default_rng(1)
    x, y = random.standard_normal((12, 4)), random.standard_normal((12, 3))
    arrays, found = [random.standard_normal(s) for s in ((4, 3), (3,))], []
    for optimizer in (kc.LocoProp(2e-4, 0.3, 4000, "squared"), kc.FOOF(0.3, 1e-10, 0.0, output_clip=None)):
        model = made(net(arrays), optimizer, "mse")
        stepper(model, optimizer)(x, y)
        found.append(flat(model.trainable_variables))
    moved = np.abs(found[1] - np.concatenate([a.ravel() for a in arrays])).max()
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=0.02 * moved)


@float64
def test_a_frozen_bias_belongs_to_the_pre_activation():
    """There the matching loss would be around another point: the loss is the squared one."""
    random = np.random.default_rng(2)
    x, y = random.standard_normal((12, 4)), random.standard_normal((12, 3))
    arrays, found = [random.standard_normal(s) for s in ((4, 5), (5,), (5, 3), (3,))], []
    for loss in ("matching", "squared"):
        plain = net(arrays)
        plain.layers[0].bias.trainable = False
        optimizer = kc.LocoProp(0.05, loss=loss)
        model = made(plain, optimizer, "mse")
        stepper(model, optimizer)(x, y)
        found.append(flat(model.trainable_variables))
    np.testing.assert_allclose(*found, rtol=1e-12)


def network():
    """Groups, indices, normalization, convolutions, a weight of no known layer, softmax."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((6,), dtype="int32"), keras.layers.Embedding(5, 4), keras.layers.DepthwiseConv1D(2),
        keras.layers.LayerNormalization(), keras.layers.Conv1D(6, 2, activation="relu"), keras.layers.PReLU(),
        keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(8, activation="gelu"),
        keras.layers.Dense(3, activation="softmax"),
    ])  # fmt: skip


def batch(examples, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(5, size=(examples, 6)), np.eye(3)[random.integers(3, size=examples)]


def test_matching_losses_are_of_increasing_activations():
    blocks = kronecker.blocks(network())[0]
    assert [b.weights.layer.name.rsplit("_")[0] for b in blocks if matches(b)] == ["conv1d", "dense"]
    lstm = keras.Sequential([keras.Input((3, 2)), keras.layers.LSTM(4)])
    assert not any(map(matches, kronecker.blocks(lstm)[0]))


@float64
@pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")
@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_all_kinds_of_layers_train_and_slices_do_not_count(loss):
    (x, y), found = batch(7), []
    for micro_batches in (1, 3):
        optimizer = kc.LocoProp(1e-4, loss=loss, epsilon=1e-3)
        model = curved(network(), micro_batches=micro_batches)
        model.compile(optimizer, loss="categorical_crossentropy")
        optimizer.meet(model)
        before = float(Linearization(model, x, y).loss)
        for _ in range(2):
            assert optimizer.step(Linearization(model, x, y, micro_batches=micro_batches))["skipped_steps"] == 0
        assert float(Linearization(model, x, y).loss) < before
        found.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_allclose(*found, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "arguments",
    [{"gamma": 0.0}, {"steps": 0}, {"loss": "mse"}, {"momentum": 1.0}, {"beta": 1.0}, {"epsilon": 0.0}],
)  # fmt: skip
def test_bad_arguments_fail_at_construction(arguments):
    with pytest.raises(ValueError, match=f"`LocoProp`: `{next(iter(arguments))}`"):
        kc.LocoProp(**arguments)
