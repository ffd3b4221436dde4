"""The benchmark of defaults: what a run records, how it is scored, and that a killed program goes on where it was."""

import importlib.util
import json
import math
import pathlib

import keras
import numpy as np
import pytest

import keras_curvature as kc

PATH = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks" / "defaults.py"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark with one tiny problem, two methods and four steps."""
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("defaults", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "defaults", module)  # where its dataclass looks for types
    spec.loader.exec_module(module)
    tiny = module.Setting(model, data, keras.losses.MeanSquaredError, scales=(1.0, 10.0))
    monkeypatch.setattr(module, "METHODS", {"Adam": keras.optimizers.Adam, "CurveBall": kc.CurveBall})
    for name, value in {"PROBLEMS": {"tiny": tiny}, "STEPS": 4, "LOOKS": (1, 4), "BATCHES": (8,)}.items():
        monkeypatch.setattr(module, name, value)
    return module


@kc.problems.seeded
def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


def data(collection):
    random = np.random.RandomState(0 if collection == "tuning" else 1)
    x = random.randn(48, 3).astype("float32")
    return (x[:32], x[:32, :2]), (x[32:], x[32:, :2])


def records(path):
    """The lines of a file of runs, without what a clock says."""
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def test_every_optimizer_of_the_package_is_in_the_grid():
    spec = importlib.util.spec_from_file_location("defaults_as_it_is", PATH)
    module = importlib.util.module_from_spec(spec)
    sys = __import__("sys")
    sys.path.insert(0, str(PATH.parent))
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(PATH.parent))
    wanted = {
        name for name, value in vars(kc).items()
        if isinstance(value, type) and issubclass(value, kc.CurvatureOptimizer) and value is not kc.CurvatureOptimizer
    }  # fmt: skip
    assert set(module.METHODS) == {"Adam", *wanted} and len(wanted) > 20
    assert set(module.ITERATIVE) < wanted and set(module.SMALL) == set(module.ITERATIVE)


@pytest.mark.slow
def test_runs_are_repeatable_and_an_interrupted_program_goes_on(bench, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    bench.train(str(whole), ["Adam", "CurveBall"], ["tiny"], "judged")
    found = records(whole)
    assert [(run["method"], run["scale"]) for run in found] == [
        ("Adam", 1.0), ("Adam", 10.0), ("CurveBall", 1.0), ("CurveBall", 10.0)
    ]  # fmt: skip
    cut.write_text("".join(whole.read_text().splitlines(keepends=True)[1:3]))
    bench.train(str(cut), ["Adam", "CurveBall"], ["tiny"], "judged")
    assert sorted(map(str, records(cut))) == sorted(map(str, found))
    # the loss of the first look and the sharpness of a linear model, by hand
    (x, y), _ = data("judged")
    kernel, bias = model(1).get_weights()
    np.testing.assert_allclose(found[0]["losses"][0], np.mean((x @ kernel + bias - y) ** 2), rtol=1e-4)
    inputs = np.c_[x, np.ones(len(x))]
    np.testing.assert_allclose(found[0]["sharpness"], np.linalg.eigvalsh(inputs.T @ inputs / len(x))[-1], rtol=0.01)
    assert [len(run["losses"]) for run in found] == [3] * 4


def test_the_score_is_the_reduction_over_adams_after_as_many_steps(bench):
    adam = {"losses": [3.0, 2.5, 2.0, 1.0], "finite": True}
    assert bench.score({"losses": [3.0, 2.5, 1.0], "finite": True}, adam) == 2.0
    assert bench.score({"losses": [3.0, 9.0, 2.0, 2.0], "finite": True}, adam) == 0.5
    assert bench.score({"losses": [3.0, 2.5, 2.0, 3.5], "finite": True}, adam) == -math.inf
    assert bench.score({"losses": [3.0, math.nan], "finite": False}, adam) == -math.inf


def test_the_table_counts_what_failed(bench):
    at = {"problem": "tiny", "batch": 8, "seed": 0, "finite": True, "validation": 1.0, "sharpness": 2.0}
    runs = [
        {"method": "Adam", "scale": 1.0, "losses": [3.0, 1.0], **at},
        {"method": "Adam", "scale": 10.0, "losses": [3.0, 1.0], **at},
        {"method": "CurveBall", "scale": 1.0, "losses": [3.0, 0.0], **at},
        {"method": "CurveBall", "scale": 10.0, "losses": [3.0, 2.0], **at},
    ]
    lines = list(bench.report(runs))
    (line,) = [line for line in lines if line.startswith("CurveBall") and "of" in line]
    assert line.split() == ["CurveBall", "1.50", "0.50", "1", "of", "2"]
