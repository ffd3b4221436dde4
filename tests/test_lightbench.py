"""LightBench: every task's function against its formula in NumPy, what wins, and the rules of a trial."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_curvature.problems import lightbench
from keras_curvature.problems.lightbench import parity
from keras_curvature.problems.lightbench.task import Moment

FOLDER = pathlib.Path(__file__).parent.parent / "examples" / "benchmarks" / "lightbench"
TASKS = lightbench.TASKS


def loaded(name):
    """A module of the benchmark's folder."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def losses(name, level, weights, steps, seed=0):
    """The losses of some steps at given weights."""
    model = TASKS[name].model(level, seed)
    if weights is not None:
        model.set_weights(weights)
    call = tf.function(lambda step: model(tf.reshape(step, [1, 1]))[0, 0], autograph=False)
    return np.array([call(tf.constant(step)).numpy() for step in steps])


def mean_square(x):
    return np.mean(np.square(x))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


# Formulas, with the knobs of `trivial` and `hard` written out.

FORMULAS = {
    "beale": lambda w, t, k: (
        (1.5 - (w[0][0] + 3) + (w[0][0] + 3) * (w[0][1] + 0.5)) ** 2
        + (2.25 - (w[0][0] + 3) + (w[0][0] + 3) * (w[0][1] + 0.5) ** 2) ** 2
        + (2.625 - (w[0][0] + 3) + (w[0][0] + 3) * (w[0][1] + 0.5) ** 3) ** 2
    ),
    "rosenbrock": lambda w, t, k: (1 - w[0][0]) ** 2 + (w[0][1] - w[0][0] ** 2) ** 2,
    "rastrigin": lambda w, t, k: np.mean(w[0] ** 2 + 10 - 10 * np.cos(2 * np.pi * w[0])),
    "discontinuous_gradient": lambda w, t, k: np.mean([x**2 if x < 0 else 2 * x for x in w[0]]),
    "saddle_point": lambda w, t, k: w[0][0] ** (2 * k + 1) + w[0][1] ** (2 * k + 1) + 10,
    "plateau_navigation": lambda w, t, k: sigmoid(k * (np.sum(w[0] ** 2) - 1)) - sigmoid(-k),
    "scale_invariant": lambda w, t, k: np.mean(np.log(1 + w[0] ** 2)),
    "momentum_utilization": lambda w, t, k: np.mean(w[0] ** 2 + k * np.sin(10 * w[0]) * np.cos(t / 10)),
    "layer_wise_scale": lambda w, t, k: (k * mean_square(w[0]) + mean_square(w[1]) + mean_square(w[2]) / k) / 3,
    "parameter_scale": lambda w, t, k: sum(map(mean_square, w)) / 3,
    "gradient_delay": lambda w, t, k: sum(mean_square(p) for i, p in enumerate(w) if t % (i + 1) == 0) / k,
    "adversarial_gradient": lambda w, t, k: mean_square(w[0]) + np.sin(1.1 * np.pi * t / k) * np.mean(w[0]),
    "dynamic_landscape": lambda w, t, k: mean_square(w[0] - np.sin(np.linspace(0, 2 * np.pi, 16384) + 1.1 * t / k)),
    "constrained_optimization": lambda w, t, k: np.mean((w[0] - 2) ** 2 + k * np.maximum(w[0] - 1, 0)),
    "quadratic_varying_scale": lambda w, t, k: np.sum(np.arange(1, k + 1) * w[0] ** 2) / (k * (k + 1) / 2),
    "quadratic_varying_target": lambda w, t, k: mean_square(w[0] - np.arange(k) / np.linalg.norm(np.arange(k))),
}
KNOBS = {
    "saddle_point": (1, 8), "plateau_navigation": (1, 12), "scale_invariant": (1, 4), "gradient_delay": (2, 64),
    "momentum_utilization": (0.004, 0.5), "layer_wise_scale": (2, 1e3), "parameter_scale": (1e3, 1e5),
    "adversarial_gradient": (1000, 7), "dynamic_landscape": (1000, 10), "constrained_optimization": (10, 1e6),
    "quadratic_varying_scale": (4, 8192), "quadratic_varying_target": (4, 8192),
}  # fmt: skip


def test_rows():
    assert len(TASKS) == 28
    assert sorted(len(task.levels) for task in TASKS.values()) == [1] * 4 + [6] * 24
    assert sum(len(task.levels) for task in TASKS.values() if task.can_be_won) == 136
    with pytest.raises(ValueError, match="`beale`: `level` must be one of.*'hard'"):
        TASKS["beale"].model("hard")


@pytest.mark.parametrize("name", FORMULAS)
def test_function(name):
    task = TASKS[name]
    for level, knob in zip(("trivial", "hard"), KNOBS.get(name, (None,))):
        start = task.model(level, seed=1).get_weights()
        assert str(start[0].dtype) == task.dtype
        weights = [0.3 * w + 0.1 for w in start]
        expected = [FORMULAS[name](weights, t, knob) for t in (1, 2, 6, 7)]
        np.testing.assert_allclose(losses(name, level, weights, (1, 2, 6, 7)), expected, 1e-5)


def test_starts():
    assert TASKS["beale"].model().get_weights()[0].tolist() == [-7.0, -4.0]
    for scale, w in zip((1e3, 1.0, 1e-3), TASKS["parameter_scale"].model("medium").get_weights()):
        assert w.std() == pytest.approx(scale, rel=0.1)
    start = np.log10(np.abs(TASKS["scale_invariant"].model("hard").get_weights()[0]))
    assert np.polyfit(np.linspace(-4, 4, 512), start, 1)[0] == pytest.approx(1.0, abs=0.05)
    first, again, other = (TASKS["minimax"].model(seed=seed).get_weights()[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# Draws.


def test_noise_of_a_batch_is_relative_to_the_weights():
    p = np.random.default_rng(0).standard_normal(1024)
    steps, largest = range(1, 301), 8192
    one, other, twice = (losses("batch_size_scaling", "easy", [c * p], steps) for c in (1, -1, 2))
    np.testing.assert_allclose(twice, 4 * one)
    shares = (0.5 * (one + other) - mean_square(p)) / mean_square(p)  # |noise|^2 / |p|^2
    exponents = -2 * np.log(shares) / np.log(largest)  # uniform
    assert exponents.min() > -1e-4 and exponents.max() < 1 + 1e-4
    assert np.mean(exponents) == pytest.approx(0.5, abs=0.06) and np.std(exponents) == pytest.approx(12**-0.5, abs=0.04)


def test_sparse_entries_are_those_of_this_step_and_of_the_last():
    share = 2**-3
    first, *rest = losses("sparse_gradient", "easy", [np.ones(65536)], (1, 2, 3, 4))
    assert first == pytest.approx(share, rel=0.05)
    np.testing.assert_allclose(rest, 1 - (1 - share) ** 2, rtol=0.05)


def test_falling_noise():
    steps = np.array([1, 10, 100])
    found = losses("gradient_noise_scale", "hard", [np.zeros(4096)], steps)
    np.testing.assert_allclose(found * (4 + steps) ** 2, 1.0, rtol=0.1)


def test_noisy_matmul_asks_for_the_negative_offset():
    task = TASKS["noisy_matmul"]
    model = task.model("easy", seed=3)
    offset = tf.random.stateless_normal([64], [3, 0]).numpy()
    one, two = (losses("noisy_matmul", "easy", [c - offset], [5], seed=3)[0] for c in (np.ones(64), 2 * np.ones(64)))
    assert two == pytest.approx(4 * one, rel=1e-4)  # homogeneous
    (flat,) = losses("noisy_matmul", "trivial", [np.ones(64) - offset], [5], seed=3)
    assert flat == pytest.approx(1.0, rel=0.05)  # a random matrix keeps the mean square, one layer has no activation
    assert losses("noisy_matmul", "easy", [-offset], [5], seed=3)[0] == 0.0
    model.set_weights([-offset])
    assert task.won(model, "easy", 1.0, seed=3) and not task.won(model, "easy", 1.0, seed=2)


def test_rows_that_cannot_be_won():
    model = TASKS["minimax"].model()
    with tf.GradientTape() as tape:
        loss = model(tf.constant([[3]]))
    (g,) = tape.gradient(loss, model.trainable_variables)
    np.testing.assert_array_equal(g[:4], g[4:])  # so `p0 - p1` stays, and the win asks for 0
    task, solution = TASKS["wide_linear"], np.triu(np.ones((32, 32)))
    model = task.model("easy")
    assert losses("wide_linear", "easy", [solution], [1])[0] < 1e-9
    model.set_weights([solution])
    assert not task.won(model, "easy", 0.0)
    model.set_weights([-solution])
    assert task.won(model, "easy", 1e9)


@pytest.mark.parametrize("name", ["xor_digit", "xor_spot", "xor_sequence"])
def test_parity(name):
    task = TASKS[name]
    model = task.model("easy", seed=1)
    layer = model.layers[-1]
    tokens, targets = (t.numpy() for t in layer.draw(Moment(tf.constant(2), 1), layer.length))
    if name == "xor_digit":
        assert tokens.shape == (256, 8)
        expected = [[sum(row) % 2] for row in tokens]
    elif name == "xor_spot":
        marks = tokens[:, 1] - 2
        assert tokens.shape == (256, 2, 8) and (marks == marks[0]).all() and set(marks[0]) <= {0, 1}
        expected = [[sum(row[marks[0] == 1]) % 2] for row in tokens[:, 0]]
    else:
        assert tokens.shape == (256, 2, 4)
        expected = (tokens[:, 0] != tokens[:, 1])[..., np.newaxis]
    np.testing.assert_array_equal(targets, expected)
    assert 0.4 < tokens.min(initial=1, where=tokens < 2) + np.mean(targets) < 1.6
    logits = layer.network(tokens).numpy()
    p = sigmoid(logits)
    entropy = -np.mean(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    np.testing.assert_allclose(model(tf.constant([[2]])), [[entropy]], rtol=1e-5)
    assert model.count_params() == sum(w.size for w in layer.network.get_weights())
    cells = [type(at) for at in TASKS[name + "_rnn"].model().layers[-1].network.layers]
    assert keras.layers.SimpleRNN in cells and keras.layers.LSTM not in cells
    assert parity.CELLS.keys() == {"", "_rnn"}


# The rules of a trial.


class Scripted:
    """A program with given losses."""

    def __init__(self, losses, block, win):
        self.task = TASKS["beale"]
        self._losses, self._block, self._win = np.array(losses), block, win

    def begin(self, rate):
        self.rate = rate

    def block(self, first):
        return self._losses[first - 1 : first - 1 + self._block]

    def wins(self, loss):
        return loss <= self._win


def test_a_trial_ends_by_a_win_or_a_loss_that_is_not_finite():
    play = loaded("play")
    budget = play.Budget(steps=12)
    falling = [8.0, 7, 6, 5, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2]
    assert play.trial(Scripted(falling, 4, 0.25), None, budget) == (True, 12)
    assert play.trial(Scripted(falling, 4, 3.0), None, budget) == (True, 8)
    broken = [8.0, 7, 6, 5, 1, np.nan, 0.1, 0.1]
    assert play.trial(Scripted(broken, 4, 1.0), None, budget) == (True, 5)  # a lucky loss before it
    assert play.trial(Scripted(broken, 4, 0.5), None, budget) == (False, 6)
    rising = [1.0, *range(2, 13)]
    assert play.trial(Scripted(rising, 4, 0.5), None, budget) == (False, 8)  # no new minimum in half of the steps


def test_trials_begin_with_the_defaults_and_share_decays():
    contestants = loaded("contestants")
    trials = contestants.CONTESTANTS["adam"].trials(12, seed=0)
    assert trials[0] == (None, {}) and len(trials) == 12
    rates, decays = zip(*trials[1:])
    assert 1e-7 <= min(rates) < 1e-3 < 1.0 < max(rates) <= 100
    assert [d == decays[4] for d in decays] == [False] * 4 + [True] * 5 + [False] * 2
    assert all(0 <= d["beta_1"] <= 1 and 0 <= d["beta_2"] < 1 for d in decays)
    assert contestants.CONTESTANTS["adam"].trials(12, seed=0) == trials != contestants.CONTESTANTS["adam"].trials(12, 1)


@pytest.mark.parametrize("curved", [False, True])
def test_a_program_takes_the_optimizers_steps(curved):
    play, contestants = loaded("play"), loaded("contestants")
    contestant = contestants.Contestant(lambda: keras.optimizers.SGD(8.0), curved=curved)
    program = play.Program(TASKS["quadratic_varying_target"], "easy", contestant, {}, seed=0)
    program.begin(4.0)  # halves the distance, of a mean of 16 squares; 8, the default, arrives
    w = program.model.get_weights()[0]
    target = np.arange(16) / np.linalg.norm(np.arange(16))
    expected = [np.mean((w - target) ** 2) * 0.25**i for i in range(10)]
    np.testing.assert_allclose(program.block(1)[:10], expected, rtol=1e-4)
    found = play.play(TASKS["quadratic_varying_target"], "easy", contestant, play.Budget(trials=2, steps=1000))
    assert found["won"] and found["trial"] == 1


def test_what_was_lost_with_less_is_played_again(tmp_path):
    run, budget = loaded("run"), {"trials": 30, "steps": 20_000, "seconds": 20.0}
    row = {"optimizer": "adam", "level": "trivial", "budget": budget}
    rows = [{**row, "task": "beale", "won": True}, {**row, "task": "rastrigin", "won": False}]
    out = tmp_path / "rows.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def left(**more):
        wanted = {"out": out, "optimizers": ["adam"], "tasks": "quick", "levels": 1, **budget, **more}
        chosen = run.chosen(types.SimpleNamespace(**wanted))
        assert {name for name, *_ in chosen} == {"adam"}
        return {task for _, task, _ in chosen}

    quick = {t.name for t in TASKS.values() if t.can_be_won and not t.name.startswith(("xor", "noisy_matmul"))}
    assert left() == left(trials=10) == quick - {"beale", "rastrigin"}
    assert left(trials=31) == left(steps=10**6) == left(seconds=60.0) == quick - {"beale"}


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, FOLDER / "run.py", "--out", out, "--tasks", "toys", "--levels", "1", "--trials", "1"]
    command += ["--steps", "512", "--processes", "1", "adam"]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 20 and {row["task"] for row in rows} <= set(TASKS)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:-2]))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(again) == 20
    key = lambda row: (row["task"], row["won"], row["steps"])  # noqa: E731
    assert sorted(map(key, again)) == sorted(map(key, rows))
    assert done.stdout.splitlines()[-1].split()[0] == "adam"
