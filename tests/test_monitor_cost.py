"""The benchmark of watching the curvature: its search and errors, what it counts, how it times the board."""

import importlib.util
import pathlib
import sys
import types

import keras
import numpy as np
import pytest

import keras_curvature as kc

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The benchmark, found as a script finds what stands beside it."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("monitor_cost", FOLDER / "monitor_cost.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["monitor_cost"] = module  # where its dataclass looks for types
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    for name in ("monitor_cost", "measuring", "step_cost"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def trained(bench):
    """A tiny network at two points of its training."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x, y = random.standard_normal((64, 4)).astype("float32"), random.integers(0, 3, 64).astype("int32")
    hidden = keras.layers.Dense(5, activation="relu")
    model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(3)])
    return bench.subject(model, (x, y), points=(12,), examples=32)


@pytest.mark.parametrize("answer", [1, 2, 3, 7, 8, 100])
def test_the_least_number_is_found(bench, answer):
    assert bench.least(lambda m: m >= answer, 100) == answer
    assert bench.least(lambda m: False, 100) is None


def test_errors_are_relative_and_the_worst_counts(bench):
    assert bench.off([1.0, -2.2], [1.0, -2.0]) == pytest.approx(0.1)
    assert bench.root_mean_square([3.0, -4.0]) == pytest.approx(12.5**0.5)


def test_weights_are_kept_before_and_at_each_point(bench, trained):
    assert sorted(trained.weights) == [12 - bench.EARLIER, 12]
    early, late = trained.weights[2], trained.weights[12]
    assert not np.allclose(early[0], late[0])
    np.testing.assert_array_equal(trained.at(2).get_weights()[0], early[0])


def test_what_is_asked_comes_out_as_eigvalsh_says(bench, trained):
    model = trained.at(12)
    curvature = kc.curvature(model, (trained.x, trained.y))
    dense = np.stack([_flat(curvature @ e) for e in _basis(curvature)])
    values, trace = np.linalg.eigvalsh(dense)[::-1], np.trace(dense)
    reference = {"top": list(values[: bench.TOP]), "trace": trace}
    rows = bench.questions(curvature, trained, 12, reference, set_up=0.0)
    found = {row["who"].split(", ")[-1]: row for row in rows if row["question"] in ("top", "trace")}
    cold, warm = (next(row for row in rows if row["question"] == f"sharpness, {t}") for t in ("cold", "warm"))
    assert max(cold["off"], warm["off"]) <= bench.SHARPNESS
    assert 1 <= warm["products"] <= cold["products"] <= len(dense)
    assert found["its rule"]["off"] <= 1e-3
    assert max(found[name]["off"] for name in ("Hutchinson", "deflated", "XTrace")) <= 3 * bench.TRACE
    said = []
    bench.say_rows([*rows, {"question": "density", "who": "another", "failed": "because"}], said.append)
    assert len(said) == len(rows) + 2
    assert said[-1].endswith("fails: because")
    assert "<= 10 yes" in said[1]


def test_the_clock_leaves_out_the_other_model_and_what_is_done_once(bench, monkeypatch):
    times, turns, budget = {"now": 0.0}, [], types.SimpleNamespace(once={})
    monkeypatch.setattr(bench.time, "perf_counter", lambda: times["now"])

    def other(seconds):
        turns.append(times["now"])
        times["now"] += 50.0

    monkeypatch.setattr(bench, "TURN", 2.0)
    monkeypatch.setattr(bench, "timed", lambda call, *args: (call(*args), 50.0))
    board = types.SimpleNamespace(_budget=budget, _probes=0)
    clock = bench.Turns(2.5, board, other)
    clock.set_model(keras.Model())
    clock.on_train_begin()
    for passed in (1.0, 1.0, 0.25, 0.75, 101.0, 0.5):  # the first one is not counted
        times["now"] += passed
        if passed == 101.0:
            budget.once["tracing"] = 101.0
        clock.on_train_batch_end(0)
    assert turns == [3.0]
    assert (clock.steps, clock.seconds) == (5, 2.5)
    assert clock.model.stop_training
    assert board._clock() == times["now"] - 50.0


def _basis(curvature):
    shapes = [w.shape for w in curvature.objective.weights]
    sizes = [int(np.prod(shape)) for shape in shapes]
    for row in np.eye(sum(sizes), dtype="float32"):
        yield [part.reshape(shape) for part, shape in zip(np.split(row, np.cumsum(sizes)[:-1]), shapes)]


def _flat(vector):
    return np.concatenate([np.ravel(part) for part in vector]).astype("float64")
