"""Steps for given gradients against published implementations; `reference/README.md` says which ones, how they ran."""

import dataclasses
import functools
import pathlib
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat, put
from selection import some
from test_curveball import stepper
from test_kfac import cross_entropy, made
from test_soap import cut, trajectory

import keras_curvature as kc
from keras_curvature.linearization.jacobian import sketches
from keras_curvature.solvers.second_moment import SecondMoment

FOLDER = pathlib.Path(__file__).parent / "reference"
REFERENCE = np.load(FOLDER / "matrix_trajectories.npz")
REFERENCE_OF_LAYERS = FOLDER / "net_trajectories.npz"
SHAPES = [(6, 6), (4, 4), (3, 7), (2, 2, 2, 3), (5,), (7, 3)]
SQUARE, MATRICES, KERNELS, ALL = (
    [0, 1],
    [0, 1, 2, 5],
    [0, 1, 2, 3, 5],
    [0, 1, 2, 3, 4, 5],
)
JORDAN, EXPRESS = kc.NewtonSchulz(), kc.PolarExpress()

pytestmark = pytest.mark.usefixtures("in_float64")


class Uncorrected(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that takes Adam's bias corrections out of the steps."""

    def __init__(self, rate, beta_1, beta_2):
        self.rate, self.beta_1, self.beta_2 = rate, beta_1, beta_2

    def __call__(self, step):
        t = keras.ops.maximum(keras.ops.cast(step, "float64"), 1.0)  # the first step does not move
        return self.rate * (1 - self.beta_1**t) / keras.ops.sqrt(1 - self.beta_2**t)


@dataclasses.dataclass(frozen=True)
class Run:
    """The variables by their numbers, what makes the optimizer, the factor on the gradients."""

    variables: list
    optimizer: functools.partial
    scale: float = 1.0

    def start(self):
        return self._of(REFERENCE["start"])

    def shapes(self):
        return [SHAPES[i] for i in self.variables]

    def seen(self):
        """The weights after each step of our optimizer."""
        gradients = self.scale * np.array([self._of(row) for row in REFERENCE["gradients"]])
        return trajectory(self.optimizer(), self.start(), gradients, self.shapes())

    def steps(self, weights):
        """For each variable the steps between the weights, `(steps, size)`."""
        rows = np.diff(weights, axis=0, prepend=self.start()[None])
        parts = [cut(row, self.shapes()) for row in rows]
        return [np.array([part[i].ravel() for part in parts]) for i in range(len(self.variables))]

    def _of(self, vector):
        parts = cut(vector, SHAPES)
        return np.concatenate([parts[i].ravel() for i in self.variables])


def muon(rate=0.02, **settings):
    return functools.partial(kc.Muon, rate, **{"adam_for": [], "sign": JORDAN, **settings})


def kl_soap(rate, beta_1, beta_2, every):
    schedule = Uncorrected(rate, beta_1, beta_2)
    return functools.partial(kc.SOAP, schedule, beta_1, beta_2, every=every, merge=1, factors="kl")


scion = functools.partial(kc.Scion, 0.01, radius=2.0, radius_of_ends=5.0, sign=JORDAN)
splus = functools.partial(kc.SPlus, 0.1, 0.8, 0.9, merge=1)
RUNS = {
    "klsoap_every1": Run(SQUARE, kl_soap(0.01, 0.9, 0.98, every=1)),
    "klsoap_clamped": Run(SQUARE, kl_soap(0.01, 0.8, 0.9, every=3), scale=0.01),
    "jordan": Run(KERNELS, muon(scale="jordan")),
    "torch_original": Run(MATRICES, muon(scale="jordan")),
    "torch_rms": Run(MATRICES, muon(momentum=0.9, nesterov=False)),
    "optax_rms": Run(KERNELS, muon(momentum=0.9, nesterov=False)),
    "optax_spectral_descent": Run(
        KERNELS,
        functools.partial(kc.Muon.spectral_descent, 0.01, sign=JORDAN, adam_for=[]),
    ),
    "normuon": Run(
        MATRICES,
        muon(momentum=0.9, scale="jordan", normalization=SecondMoment(beta=0.8)),
    ),
    "dion_muon": Run(MATRICES, muon(sign=EXPRESS)),
    "dion_cautious_decay": Run(
        MATRICES, muon(momentum=0.9, nesterov=False, sign=EXPRESS, weight_decay=2.0, cautious_decay=True)
    ),
    "dion_normuon": Run(
        MATRICES,
        muon(
            momentum=0.9,
            nesterov=False,
            scale="scion",
            sign=EXPRESS,
            normalization=SecondMoment(beta=0.8),
        ),
    ),
    "scion_constrained": Run(ALL, functools.partial(scion, momentum=0.9, constrained=True)),
    "scion_unconstrained": Run(ALL, functools.partial(scion, momentum=0.7)),
    "hyperball": Run(MATRICES, muon(0.05, momentum=0.9, sign=kc.NewtonSchulz("quintic"), hyperball=True)),
    "ggt": Run(ALL, functools.partial(kc.GGT, 0.01, window=6, beta_1=0.8)),
    "splus_every1": Run([0, 1, 4], functools.partial(splus, every=1)),
    "splus_every100": Run([0, 1, 4], functools.partial(splus, every=100)),
    "cautious_adam": Run(
        [0, 4, 5],
        muon(0.01, beta_1=0.8, beta_2=0.9, epsilon=1e-6, adam_for=["."], cautious=True),
    ),
}
DEFAULT = ["klsoap_clamped", "dion_normuon", "scion_constrained", "ggt", "splus_every1"]


@pytest.mark.parametrize("name", some(RUNS, DEFAULT))
def test_the_weights_are_those_of_the_reference(name):
    run, reference = RUNS[name], REFERENCE[name]
    moved = np.abs(reference - run.start()).max()
    assert moved > 0.01
    np.testing.assert_allclose(run.seen(), reference, rtol=0, atol=1e-6 * moved)


DIRECTIONS = {  # the lengths of these steps differ, as the docstrings say
    "asgo": Run(
        MATRICES,
        functools.partial(
            kc.Shampoo, 0.01, beta_1=0.9, beta_2=0.8, epsilon=1e-10, every=1, grafting=None, sides="shortest"
        ),
    ),
    "adamuon": Run(
        MATRICES, muon(momentum=0.9, nesterov=False, normalization=SecondMoment("entry", beta=0.8))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some(DIRECTIONS, ["asgo"]))
def test_the_directions_are_those_of_the_reference(name):
    run = DIRECTIONS[name]
    for own, other in zip(run.steps(run.seen()), run.steps(REFERENCE[name])):
        own, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (own, other))
        # AdaMuon's small entries see the epsilon, which is added elsewhere
        np.testing.assert_allclose(own, other, atol=1e-6 if name == "asgo" else 1e-5)


def test_mfac_steps_as_the_authors_code_once_its_window_is_full():
    run = Run(ALL, functools.partial(kc.MFAC, 0.01, window=6, damping=0.1, kl_clip=None))
    for own, other in zip(run.steps(run.seen()), run.steps(REFERENCE["mfac"])):
        np.testing.assert_allclose(own[5:], other[5:], atol=1e-9 * np.abs(other).max())
        assert np.abs(own[4] - other[4]).max() > 0.01 * np.abs(other).max()  # the code divides by 6 from the start


# Methods that look at the layers, in a net.


def singd(**settings):
    return functools.partial(kc.SINGD, 0.05, momentum=0.7, rate=0.2, **{"damping": 0.3, "kl_clip": None, **settings})


newton_muon = functools.partial(kc.NewtonMuon, 0.02, momentum=0.9, sign=JORDAN, epsilon=1e-12)
foof = functools.partial(kc.FOOF, 0.3, damping=0.5, output_clip=None)
OF_LAYERS = {
    "singd_traces": singd(alpha=0.5, every=2),
    "singd_ikfac": singd(alpha=0.0, every=1, traces=False, damping=0.5),
    "singd_diagonal": singd(alpha=0.3, every=1, structure="diagonal"),
    "newton_muon_every1": functools.partial(newton_muon, every=1),
    "newton_muon_every3": functools.partial(newton_muon, every=3),
    "spring": functools.partial(kc.GaussNewton.spring, learning_rate=0.1, damping=0.02, momentum=0.9),
    "egn_mse": functools.partial(kc.GaussNewton.gram, learning_rate=0.5, damping=0.2),
    "foof_every1": functools.partial(foof, momentum=0.0, factors_every=1, inverses_every=1),
    "foof_every4": functools.partial(foof, momentum=0.0, factors_every=2, inverses_every=4),
    "foof_momentum": functools.partial(foof, momentum=0.9, factors_every=2, inverses_every=20),
}

PROBLEMS = {"newton_muon": ["newton_muon_every1", "newton_muon_every3"], "spring": ["spring", "egn_mse"]}


def tanh_net(arrays):
    """A tanh net with a linear output layer and no biases where the arrays have none."""
    kernels, biased = [w for w in arrays if w.ndim == 2], any(w.ndim == 1 for w in arrays)
    layers = [
        keras.layers.Dense(w.shape[1], activation=None if w is kernels[-1] else "tanh", use_bias=biased)
        for w in kernels
    ]
    model = keras.Sequential([keras.Input(kernels[0].shape[:1]), *layers])
    model.set_weights(arrays)
    return model


@pytest.mark.parametrize("name", some(OF_LAYERS, ["foof_every4", "spring"]))
def test_the_weights_of_a_net_are_those_of_the_reference(name):
    problem = next((problem for problem, names in PROBLEMS.items() if name in names), "singd")
    reference, optimizer = np.load(REFERENCE_OF_LAYERS), OF_LAYERS[name]()
    arrays = [reference[key] for key in sorted(reference) if key.startswith(f"{problem}_init")]
    whole = problem == "spring"  # one batch of all cases
    model = made(tanh_net(arrays), optimizer, "mse" if whole else cross_entropy())
    step = stepper(model, optimizer)
    for t in range(20):
        rows = slice(None) if whole else slice(8 * (t % 4), 8 * (t % 4) + 8)
        step(reference[f"{problem}_x"][rows], reference[f"{problem}_y"][rows])
        np.testing.assert_allclose(flat(model.trainable_variables), reference[name][t], atol=1e-6, err_msg=f"step {t}")


REFERENCE_OF_SENG = FOLDER / "seng.npz"
SENG = {
    "dense": ("dense", {}),
    "conv": ("conv", {}),
    "conv_of_low_rank": ("conv", {"largest": 0, "rank": 3}),  # leaves nothing out: 3 channels, 16 positions
}


def start_of_seng(reference, problem):
    return [reference[key] for key in sorted(reference) if key.startswith(f"{problem}_init")]


def normalized_net(arrays):
    """A convolution, batch normalization, tanh and a dense layer."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(3, 3, padding="same"),
            layers.BatchNormalization(epsilon=1e-5),
            layers.Activation("tanh"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    put(model.trainable_variables, np.concatenate([w.ravel() for w in arrays]))
    return model


@pytest.mark.parametrize("name", some(SENG, ["conv"]))
def test_the_weights_of_seng_are_those_of_the_authors_code(name):
    (problem, settings), reference = SENG[name], np.load(REFERENCE_OF_SENG)
    arrays, optimizer = start_of_seng(reference, problem), kc.SENG(0.05, damping=0.1, **settings)
    model = made((tanh_net if problem == "dense" else normalized_net)(arrays), optimizer, cross_entropy())
    assert np.abs(reference[problem] - flat(model.trainable_variables)).max() > 1
    step = stepper(model, optimizer)
    for t in range(20):
        rows = slice(8 * (t % 4), 8 * (t % 4) + 8)
        step(reference[f"{problem}_x"][rows], reference[f"{problem}_y"][rows])
        np.testing.assert_allclose(flat(model.trainable_variables), reference[problem][t], atol=1e-11)


def test_the_weights_of_seng_are_those_of_the_authors_code_for_its_samples():
    """That code multiplies by the inverse shares, ours by their roots: as a damping and a rate that are smaller."""
    reference = np.load(REFERENCE_OF_SENG)
    shares = (4 / 6) ** 2
    optimizer = kc.SENG(0.05 * shares, damping=0.1 * shares, largest=0, columns=4)
    model = made(tanh_net(start_of_seng(reference, "sampled")), optimizer, cross_entropy())
    assert np.abs(reference["sampled"] - flat(model.trainable_variables)).max() > 1
    for t in range(20):
        pairs = zip(reference["sampled_rows"][t], reference["sampled_columns"][t])
        samples = [sketches.Sample(tf.constant(rows), tf.constant(columns), (6, 6)) for rows, columns in pairs]
        batch = slice(8 * (t % 4), 8 * (t % 4) + 8)
        x, y = (tf.constant(reference[f"sampled_{kind}"][batch]) for kind in "xy")
        with mock.patch.object(sketches.Sample, "drawn", side_effect=samples) as drawn:
            optimizer.step(kc.Linearization(model, x, y, needs=optimizer.needs))
        assert drawn.call_count == 2  # one for each layer
        np.testing.assert_allclose(flat(model.trainable_variables), reference["sampled"][t], atol=1e-11)
