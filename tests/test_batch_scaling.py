"""The benchmark of batch sizes: what a run counts, what stops it, and that a killed program goes on where it was."""

import importlib.util
import json
import math
import pathlib

import keras
import numpy as np
import pytest
from selection import some

import keras_curvature as kc

PATH = pathlib.Path(__file__).parents[1] / "examples" / "benchmarks" / "batch_scaling.py"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark with one tiny problem, two batch sizes and three rates."""
    spec = importlib.util.spec_from_file_location("batch_scaling", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "batch_scaling", module)  # where its dataclass looks for types
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZES", (8, 32))
    monkeypatch.setattr(module, "RATES", (0.001, 0.1, 1.0))
    monkeypatch.setattr(module, "METHODS", {name: module.METHODS[name] for name in ("SGD", "CurveBall")})
    tiny = module.Setting("Tiny", model, lambda folder: (data(), None), target=0.5, epochs=10)
    monkeypatch.setattr(module, "PROBLEMS", {"tiny": tiny})
    return module


@kc.problems.seeded
def model():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3)(hidden))


def data():
    random = np.random.RandomState(0)
    x = random.randn(100, 6).astype("float32")
    return x, (x @ random.randn(6, 3)).argmax(axis=1).astype("int32")


def records(path):
    """The lines of a file of runs, without what a clock says."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("milliseconds", "seconds")} for entry in entries]


def test_the_grid_and_the_batch_sizes_are_geometric():
    spec = importlib.util.spec_from_file_location("batch_scaling_as_it_is", PATH)
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = module
    spec.loader.exec_module(module)
    assert module.SIZES[0] == 64
    assert module.SIZES[-1] == 8192
    assert all(b == 2 * a for a, b in zip(module.SIZES, module.SIZES[1:]))
    np.testing.assert_allclose(np.diff(np.log10(module.RATES)), 1 / 3, atol=0.02)
    assert list(module.METHODS) == ["SGD", "Adam", "Neumann", "CurveBall"]
    defaults = [rate for _, rate in module.METHODS.values()]
    assert all(module.RATES[0] < rate < module.RATES[-1] for rate in defaults)
    assert all(make().learning_rate.numpy() == np.float32(rate) for make, rate in module.METHODS.values())


def test_looks_resolve_every_step_at_first_and_four_percent_later(bench):
    looks = list(bench.looks(500))
    assert looks[:25] == list(range(1, 26))
    assert looks[-1] == 500
    assert all(a < b <= max(a + 1, math.ceil(1.04 * a)) for a, b in zip(looks, looks[1:]))


def test_a_stream_of_batches_shows_every_example_once_in_an_epoch_at_any_size(bench):
    streams = []
    for size in (8, 32, 200):
        stream = bench.batches(100, size, seed=3)
        streams.append(np.concatenate([next(stream) for _ in range(math.ceil(200 / size))])[:200])
    for rows in streams:
        np.testing.assert_array_equal(rows, streams[0])
        assert sorted(rows[:100]) == sorted(rows[100:]) == list(range(100))
    assert not np.array_equal(rows[:100], rows[100:])


def test_a_run_ends_for_one_of_the_reasons(bench):
    best = {"steps": 20, "losses": [2.0 - 0.1 * step for step in range(1, 21)]}

    def verdict(step, loss, best=best):
        return bench.verdict(step, loss, start=2.0, target=0.5, best=best)

    assert verdict(7, 0.4) == "reached"
    assert verdict(20, 0.4) == "reached"
    assert verdict(7, math.nan) == verdict(7, math.inf) == verdict(7, 201.0) == "diverged"
    assert verdict(20, 0.6) == "slower"
    assert verdict(9, 1.9) is None  # too early to tell
    assert verdict(10, 1.6) == "slower"  # the best one had 1.5 after 5 steps
    assert verdict(10, 1.4) is None
    assert verdict(1000, 0.6, best=None) is None


def test_a_run_is_the_training_that_keras_does(bench):
    x, y = data()
    setting = bench.dataclasses.replace(bench.PROBLEMS["tiny"], target=0.0, steps=7)
    runner = bench.Runner(setting, "SGD", 8, x, y)
    runner.run(0.3, seed=2)
    found = runner.run(0.1, seed=1)  # and what the run before it left behind does not count
    plain, stream = model(1), bench.batches(100, 8, seed=1)
    plain.compile(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), loss=bench.loss_of_logits())
    for _ in range(7):
        rows = next(stream)
        plain.train_on_batch(x[rows], y[rows])
    for ours, theirs in zip(runner.model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (found["end"], found["steps"]) == ("budget", 7)
    np.testing.assert_allclose(found["loss"], plain.evaluate(x, y, verbose=0), rtol=1e-3)


@pytest.mark.parametrize("method", some(["SGD", "CurveBall"], ["CurveBall"]))
def test_slices_of_a_large_batch_change_nothing(bench, monkeypatch, method):
    setting = bench.dataclasses.replace(bench.PROBLEMS["tiny"], target=0.0, steps=5)
    weights = []
    for size in (32, 8):
        monkeypatch.setattr(bench, "SLICE", size)
        runner = bench.Runner(setting, method, 32, *data())
        runner.run(0.1, seed=0)
        weights.append(runner.model.get_weights())
    for whole, sliced in zip(*weights):
        np.testing.assert_allclose(sliced, whole, rtol=1e-4, atol=1e-5)


def test_a_killed_program_goes_on_and_ends_as_if_it_had_not_been(bench, tmp_path, monkeypatch, capsys):
    ran = []
    run = bench.Runner.run
    monkeypatch.setattr(bench.Runner, "run", lambda self, *args: ran.append(args) or run(self, *args))
    out = tmp_path / "whole"
    bench.main(["--out", str(out)])
    path, planned = out.with_suffix(".jsonl"), len(ran)
    everything = records(path)
    assert len(everything) == 1 + planned == 1 + 4 * (3 + 2)  # two methods and two sizes, three rates and two seeds

    cut = tmp_path / "cut.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:8]) + lines[8][:20])  # killed while the eighth run was written
    ran.clear()
    bench.main(["--out", str(tmp_path / "cut")])
    assert len(ran) == planned - 7
    assert records(cut) == everything
    ran.clear()
    bench.main(["--out", str(tmp_path / "cut")])
    assert not ran

    monkeypatch.setitem(bench.PROBLEMS, "tiny", bench.dataclasses.replace(bench.PROBLEMS["tiny"], data=None))
    capsys.readouterr()
    bench.main(["--only_draw", "--out", str(out), "--figure", str(tmp_path / "figure.png")])
    assert capsys.readouterr().out.strip() == out.with_suffix(".txt").read_text().strip()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_table_tells_medians_edges_and_what_was_not_reached(bench, tmp_path):
    runs = bench.Runs(str(tmp_path / "runs.jsonl"))
    runs.begin("tiny", bench.settings_of("tiny", None))

    def add(method, size, rate, seed, steps, end="reached", loss=0.4):
        cell = {"problem": "tiny", "method": method, "size": size, "rate": rate, "seed": seed, "end": end}
        runs.append({**cell, "steps": steps, "loss": loss, "milliseconds": 2.0, "seconds": 0.1})

    for size, steps in ((8, (40, 50, 44)), (32, (20, 30, 22))):
        add("SGD", size, 0.1, 0, steps[0] + 1)
        add("SGD", size, 1.0, 0, steps[0])
        add("SGD", size, 0.001, 0, steps[0], loss=0.45)  # as fast, but not as low
        for seed in (1, 2):
            add("SGD", size, 1.0, seed, steps[seed])
    add("CurveBall", 32, 0.1, 0, 30, end="budget", loss=0.7)
    found = bench.row(bench.Runs(runs.path), "tiny", "SGD", 32)
    assert (found["rate"], found["steps"], found["counts"], found["examples"]) == (1.0, 22, [20, 22, 30], 704)
    lines = list(bench.table(runs, "tiny"))
    (large,) = [line for line in lines if line.split()[:2] == ["32", "SGD"]]
    assert large.split() == ["32", "SGD", "1", "22", "20,", "22,", "30", "704", "50%", "1.0", "highest", "rate"]
    (other,) = [line for line in lines if "CurveBall" in line]
    assert "not reached" in other
    assert "0.7" in other
    assert "2 rates to come" in other
    bench.draw(runs, ["tiny"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_runs_with_other_settings_are_refused(bench, tmp_path):
    runs = bench.Runs(str(tmp_path / "runs.jsonl"))
    runs.begin("tiny", bench.settings_of("tiny", None))
    with pytest.raises(SystemExit, match="other settings .epochs: 10 there, 5.0 now.. Pass another --out"):
        bench.main(["--budget", "5", "--out", str(tmp_path / "runs")])
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_nothing_to_draw_and_no_budget_are_errors(bench, tmp_path, capsys):
    with pytest.raises(SystemExit, match="There are no runs"):
        bench.main(["--only_draw", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        bench.main(["--budget", "0"])
    assert "--budget must be positive. Received: --budget 0" in capsys.readouterr().err


def test_a_folder_without_the_data_is_an_error_before_anything_is_written(bench, tmp_path, monkeypatch, capsys):
    cifar10 = bench.dataclasses.replace(bench.PROBLEMS["tiny"], data=lambda folder: kc.problems.data("cifar10", folder))
    monkeypatch.setitem(bench.PROBLEMS, "cifar10", cifar10)
    with pytest.raises(SystemExit):
        bench.main(["--data_dir", str(tmp_path), "--out", str(tmp_path / "runs")])
    assert f"data_dir='{tmp_path}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
