"""The report against dense float64 computations, its table against its numbers, its files, and the command line."""

import configparser
import contextlib
import importlib.metadata
import io
import json
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import MODELS, flat, float64
from keras import layers

import keras_curvature as kc
from keras_curvature.command_line import main
from keras_curvature.monitor.operator import curvature
from keras_curvature.monitor.report.measure import _Asked, _caveats, _stability
from keras_curvature.monitor.report.numbers import count, number, with_error
from keras_curvature.monitor.report.reporting import Report, report
from keras_curvature.monitor.report.table import SHOWN_LAYERS, shown_layers, stability, table
from keras_curvature.monitor.spectra.density import Density
from keras_curvature.solvers.krylov import Eigenpairs


def classifier(optimizer=None, name="small"):
    """35 weights in two layers, and 40 examples `(x, y)` of 3 classes."""
    keras.utils.set_random_seed(1)
    stack = [keras.Input((4,)), layers.Dense(4, "tanh", name="a"), layers.Dense(3, name="b")]
    model = keras.Sequential(stack, name=name)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(0)
    for v in model.trainable_variables:  # not at a minimum, with a negative part
        v.assign_add(0.5 * random.standard_normal(v.shape))
    return model, (random.standard_normal((40, 4)), random.integers(0, 3, 40))


def dense(model, data):
    """Gradient and Hessian by nested tapes."""
    values = [v.value for v in model.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            loss = tf.reduce_mean(keras.losses.get(model.loss)(data[1], model(data[0], training=False)))
        gradient = inner.gradient(loss, values)
        parts = tf.unstack(tf.concat([tf.reshape(g, [-1]) for g in gradient], 0))
    rows = [outer.gradient(part, values, unconnected_gradients="zero") for part in parts]
    return float(loss), flat(gradient), np.stack([flat(row) for row in rows])


class Measured:
    """A model, its report with all that it wrote, and the dense matrices."""

    def __init__(self, folder):
        self.model, self.data = classifier(keras.optimizers.SGD(0.05, momentum=0.9))
        self.before = [v.numpy() for v in self.model.variables]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.report = report(self.model, self.data, path=folder / "curvature")
        self.folder, self.printed = folder, (out.getvalue(), err.getvalue())
        self.loss, self.gradient, self.hessian = dense(self.model, self.data)
        self.values, self.vectors = np.linalg.eigh(self.hessian)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with float64():
        return Measured(tmp_path_factory.mktemp("report") / "new")


def close(estimate, true, errors=4):
    """Whether the true number is within so many standard errors."""
    return abs(estimate["value"] - true) <= errors * estimate["stderr"] + 1e-9 * abs(true)


# The numbers.


def test_eigenvalues_are_those_of_the_dense_hessian(measured):
    said, values = measured.report, measured.values
    assert said["sharpness"]["value"] == pytest.approx(values[-1], rel=1e-5)
    assert [pair["value"] for pair in said["top"]] == pytest.approx(values[::-1][: len(said["top"])], rel=1e-4)
    assert said["outliers"] == 2 and len(said["top"]) == 5
    assert said["most_negative"]["value"] == pytest.approx(values[0], rel=1e-2)
    assert values[0] < -0.01
    for pair in [*said["top"], said["most_negative"]]:
        assert np.abs(values - pair["value"]).min() <= pair["residual"] + 1e-12


def test_the_gauge_is_the_rate_by_the_limit_of_heavy_ball(measured):
    stable = measured.report["stability"]
    assert stable["limit"] == pytest.approx(76)
    assert stable["gauge"] == pytest.approx(0.05 * measured.values[-1] / 3.8, rel=1e-5)
    assert stable["sharpness"] is None and stable["reason"] is None
    assert f"of the limit 76.0 = {stable['formula']}: stable" in str(measured.report)


def test_the_trace_and_its_shares_are_those_of_the_dense_hessian(measured):
    said, hessian = measured.report, measured.hessian
    assert close(said["trace"], np.trace(hessian))
    assert 0 < said["trace"]["stderr"] < 0.4 * np.trace(hessian)
    cuts = {"a": slice(0, 20), "b": slice(20, 35)}
    assert list(said["layers"]) == list(cuts)
    for name, cut in cuts.items():
        layer, block = said["layers"][name], hessian[cut, cut]
        assert layer["weights"] == len(block)
        assert close(layer["trace"], np.trace(block))
        assert layer["per_weight"] == pytest.approx(layer["trace"]["value"] / len(block))
        nearest = np.abs(np.linalg.eigvalsh(block) - layer["sharpness"]["value"]).min()
        assert nearest <= layer["sharpness"]["residual"] + 1e-12
        assert layer["sharpness"]["value"] == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=0.05)
    assert sum(abs(layer["share"]) for layer in said["layers"].values()) == pytest.approx(1)
    assert sum(layer["trace"]["value"] for layer in said["layers"].values()) == pytest.approx(said["trace"]["value"])


def test_what_is_made_of_them_is_too(measured):
    said, values = measured.report, measured.values
    share = np.maximum(-values, 0).sum() / np.abs(values).sum()
    assert close(said["negative_share"], share) and said["negative_share"]["stderr"] < 0.1
    assert said["effective_directions"]["value"] == pytest.approx(said["trace"]["value"] / said["sharpness"]["value"])
    assert said["gradient"]["norm"] == pytest.approx(np.linalg.norm(measured.gradient), rel=1e-9)
    cosine = abs(measured.gradient @ measured.vectors[:, -1]) / np.linalg.norm(measured.gradient)
    assert said["gradient"]["cosine"] == pytest.approx(cosine, rel=1e-3)
    assert said["loss"] == pytest.approx(measured.loss, rel=1e-12)


def test_the_gradients_error_is_that_of_the_examples(measured):
    model, (x, y) = measured.model, measured.data
    each = np.stack([dense_gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    expected = np.sqrt(np.var(each, axis=0, ddof=1).sum() / len(x))
    assert measured.report["gradient"]["stderr"] == pytest.approx(expected, rel=0.3)


def dense_gradient(model, x, y):
    """The gradient of a few examples."""
    with tf.GradientTape() as tape:
        loss = model.loss(y, model(x))
    return flat(tape.gradient(loss, [v.value for v in model.trainable_variables]))


def test_the_spectrum_is_whole(measured):
    said, values = measured.report, measured.values
    density = Density(*(np.array(said["density"][key]) for key in ("nodes", "weights")), 35)
    found = [pair["value"] for pair in said["top"]] + [said["most_negative"]["value"]]
    np.testing.assert_array_equal(density.nodes[:, -6:], [found] * 3)
    np.testing.assert_allclose(density.weights[:, -6:], 1 / 35)
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-12)
    # the others lie between the ends, and none at the zeros that taking the found ones out would leave
    assert values[0] * 1.01 < density.nodes[:, :-6].min() and density.nodes[:, :-6].max() < values[-6] * 1.01
    nearest = np.abs(values).min()
    assert density.mass(-nearest / 2, nearest / 2) < 0.05
    assert density.moment(1) == pytest.approx(values.mean(), abs=5 * said["trace"]["stderr"] / 35)


def test_nothing_is_changed(measured):
    for variable, value in zip(measured.model.variables, measured.before):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert int(measured.model.optimizer.iterations) == 0


# The text.


def test_nothing_but_the_table_is_printed(measured):
    assert measured.printed == (f"{measured.report}\n", "")


def test_the_table_says_the_numbers(measured):
    said, lines = measured.report, str(measured.report).splitlines()
    assert lines[0].startswith("curvature of small    35 weights · 40 examples · Hessian · eval mode · float64 · loss ")
    row = {line.split("  ")[0]: line for line in lines[1:]}
    for name, key in (("sharpness", "value"), ("trace", "value"), ("most negative", "value")):
        value, error = re.match(rf"{name} +(-?[\d.]+) ± ([\d.e-]+)", row[name]).groups()
        assert float(value) == pytest.approx(said[name.replace(" ", "_")][key], rel=0.01)
        assert float(error) > 0
    top = row[next(name for name in row if name.startswith("top:"))]
    assert re.match(r"top: \S+ \S+ \| \S+ \S+ \S+ .* 2 = classes - 1 before the bar", top)
    for name, layer in said["layers"].items():
        weights, share = re.match(rf"{name} +(\d+) +(-?[\d.]+) %", row[name]).groups()
        assert int(weights) == layer["weights"] and float(share) == pytest.approx(100 * layer["share"], abs=0.06)
        assert row[name].count("#") == max(0, round(20 * layer["share"]))
    assert f"{said['cost']['products']} products" in str(said)


def test_the_cost_is_that_of_its_parts(measured):
    cost = measured.report["cost"]
    assert sum(part["products"] for part in cost["parts"].values()) == cost["products"] > 100
    assert sum(part["seconds"] for part in cost["parts"].values()) <= cost["seconds"]


@pytest.mark.parametrize(
    "value, error, text",
    [
        (69.03, 5.04, "69.0 ± 5.0"), (10.4213, 0.0031, "10.42 ± 3e-03"), (2.31, 0.71, "2.31 ± 0.71"),
        (-1.163, 0.02, "-1.163 ± 0.020"), (123456.0, 789.0, "123 456 ± 789"), (0.0, 0.0, "0 ± 0"),
        (1.5e-7, 2e-9, "1.50e-07 ± 2e-09"), (3.0, float("nan"), "3.00 ± nan"), (0.5, 12.0, "0 ± 12"),
    ],
)  # fmt: skip
def test_numbers_with_errors(value, error, text):
    assert with_error(value, error) == text


def test_numbers_as_people_write_them():
    assert [count(160), count(38282), count(25600000)] == ["160", "38 282", "25 600 000"]
    written = [number(v, 3) for v in (0.0, 10.42, 1234.6, 0.01234, 1.2e9, float("inf"))]
    assert written == ["0", "10.4", "1 235", "0.0123", "1.20e+09", "inf"]


@pytest.mark.parametrize("gauge, words", [(0.137, "stable"), (0.98, "at the edge"), (1.4, "unstable")])
def test_the_limit_in_words(gauge, words):
    sentence = stability({"limit": 76.0, "gauge": gauge, "formula": "2(1+0.9)/0.05", "of_training": True})
    assert re.match(r"(13.7|98.0|140) % of the limit 76.0 = 2\(1\+0.9\)/0.05: " + words, sentence)


def test_of_many_layers_the_largest_and_the_others(measured):
    layer = measured.report["layers"]["a"]
    many = {f"layer_{i}": layer | {"share": i / 435, "weights": 10 * i + 1} for i in range(30)}
    shown = shown_layers(many)
    assert len(shown) == SHOWN_LAYERS and shown[0][0] == "layer_11" and shown[-1][0] == "11 others"
    assert sum(layer["share"] for _, layer in shown) == pytest.approx(1)
    assert sum(layer["weights"] for _, layer in shown) == sum(layer["weights"] for layer in many.values())
    assert shown[-1][1]["trace"]["value"] == pytest.approx(11 * layer["trace"]["value"])
    whole = Report(measured.report, layers=many)
    assert "11 others" in str(whole)
    assert len(whole.figure().axes[1].get_yticks()) == SHOWN_LAYERS


# The files.


def test_the_files_are_the_report(measured):
    names = sorted(path.name for path in measured.folder.iterdir())
    assert names == ["curvature.json", "curvature.png", "curvature.txt"]
    assert (measured.folder / "curvature.txt").read_text() == measured.printed[0]
    loaded = Report(json.loads((measured.folder / "curvature.json").read_text()))
    assert loaded == measured.report and str(loaded) == str(measured.report)
    assert (measured.folder / "curvature.png").stat().st_size > 10_000


def test_the_figure_shows_the_numbers(measured):
    density, shares, lines = measured.report.figure().axes
    top = [pair["value"] for pair in measured.report["top"]]
    assert np.concatenate([line.get_xdata() for line in density.lines]) == pytest.approx(top)
    widths = [bar.get_width() for bar in shares.patches]
    assert widths[:2] == [layer["share"] for layer in measured.report["layers"].values()]
    assert widths[2:] == pytest.approx([20 / 35, 15 / 35])
    assert [label.get_text() for label in shares.get_yticklabels()] == ["a", "b"]
    assert len(lines.lines) == 3
    drawn = measured.report["landscape"]
    assert lines.lines[0].get_ydata() == pytest.approx(drawn["loss"]["sharpest"])
    expected = measured.loss + 0.5 * measured.values[-1] + abs(measured.gradient @ measured.vectors[:, -1])
    assert drawn["quadratic"]["sharpest"][0] == pytest.approx(expected, rel=1e-4)


def test_a_notebook_shows_the_figure(measured):
    assert measured.report._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("outliers, bar", [(2, True), (5, False), (7, False), (None, False)])
def test_a_bar_only_where_there_are_eigenvalues_behind_it(measured, outliers, bar):
    text = table(Report(measured.report, outliers=outliers))
    assert (" | " in text) == ("before the bar" in text) == bar


def test_without_matplotlib_there_is_the_table(measured, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    copy = Report(measured.report)
    copy.save(tmp_path / "curvature.png")  # the ending may be there
    assert copy._repr_png_() is None
    assert str(Report(json.loads((tmp_path / "curvature.json").read_text()))) == str(copy)
    text = " ".join((tmp_path / "curvature.txt").read_text().split())
    assert 'needs matplotlib: pip install "keras_curvature[monitor]"' in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curvature.json", "curvature.txt"]


def test_what_is_not_finite_is_null(measured, tmp_path):
    broken = Report(measured.report, landscape=json.loads(json.dumps(measured.report["landscape"])))
    broken["landscape"]["loss"]["sharpest"][0] = float("inf")
    broken.save(tmp_path / "curvature")
    loaded = Report(json.loads((tmp_path / "curvature.json").read_text()))
    assert loaded["landscape"]["loss"]["sharpest"][0] is None
    assert np.isnan(loaded.figure().axes[2].lines[0].get_ydata()[0])


@pytest.mark.parametrize("where", ["file/curvature", "folder/", 3])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(where, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "curvature.json").mkdir(parents=True)
    for path in [tmp_path / where if where != "folder/" else f"{tmp_path}/folder/"] if where != 3 else [3]:
        with pytest.raises(ValueError, match="`report`: .*`?path`? .*Received: path="):
            report(None, None, path=path)
    with pytest.raises(ValueError, match="`path` must be the beginning of file names"):
        report(None, None, path=tmp_path / "folder" / "curvature")


# Other models.


def test_adams_limit_is_on_the_preconditioned_hessian(in_float64):
    model, data = classifier(keras.optimizers.Adam(1e-3))
    model.fit(*data, batch_size=40, epochs=3, verbose=0)
    said = report(model, data)
    _, _, hessian = dense(model, data)
    optimizer = model.optimizer
    v = flat(optimizer._velocities) / (1 - 0.999**3)
    root = np.sqrt(1 / (np.sqrt(v) + 1e-7) / (1 - 0.9**3))  # as Keras corrects the bias of both
    expected = np.linalg.eigvalsh(root[:, None] * hessian * root)[-1]
    assert said["stability"]["sharpness"]["value"] == pytest.approx(expected, rel=1e-3)
    assert said["stability"]["gauge"] == pytest.approx(1e-3 * expected / 38, rel=1e-3)
    assert "in Adam's metric" in str(said)


def test_a_curved_regression_without_a_limit_by_its_gauss_newton_matrix():
    keras.utils.set_random_seed(0)
    model = kc.curved(keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization()]))
    model.compile(kc.HessianFree(), "mse")
    random = np.random.default_rng(0)
    x, y = random.standard_normal((24, 3)).astype("float32"), random.standard_normal((24, 2)).astype("float32")
    said = report(model, (x, y), kind="ggn", training=True, batch_size=8)
    assert "Gauss-Newton · train mode, batches of 8" in str(said)
    assert said["most_negative"] is None and said["negative_share"] is None and said["outliers"] is None
    assert said["stability"]["reason"] in " ".join(str(said).split()) and said["stability"]["limit"] is None
    assert any("batches of 8" in caveat for caveat in said["caveats"])
    matrix = np.stack([flat(row) for row in _rows(curvature(model, (x, y), "ggn", batch_size=8, training=True))])
    assert said["sharpness"]["value"] == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-3)
    assert said.figure() is not None


def test_the_limit_of_training_says_nothing_of_eval_mode():
    sentence = stability({"limit": 76.0, "gauge": 0.137, "formula": "2/r", "of_training": False})
    assert sentence == "13.7 % of the limit 76.0 = 2/r: but of the model in eval mode, see below"


def _rows(operator):
    for place, variable in enumerate(operator.variables):
        for i in range(int(np.prod(variable.shape))):
            unit = [np.zeros(v.shape, "float32") for v in operator.variables]
            unit[place].flat[i] = 1
            yield operator @ [tf.constant(u) for u in unit]


def test_a_layer_that_is_dead_has_no_curvature(in_float64):
    dead = layers.Dense(3, "relu", bias_initializer=keras.initializers.Constant(-100.0), name="dead")
    model = keras.Sequential([keras.Input((2,)), dead, layers.Dense(2, name="alive")])
    model.compile(keras.optimizers.Lion(), "mse")
    random = np.random.default_rng(0)
    said = report(model, (random.standard_normal((8, 2)), random.standard_normal((8, 2))))
    assert said["sharpness"]["value"] == pytest.approx(1)  # of each of the two biases: 2 / outputs
    none, all_of_it = said["layers"]["dead"], said["layers"]["alive"]
    assert [none["sharpness"]["value"], none["trace"]["value"], none["share"]] == pytest.approx([0, 0, 0], abs=1e-12)
    assert close(all_of_it["trace"], 2) and all_of_it["share"] == pytest.approx(1)
    assert said["negative_share"]["value"] == pytest.approx(0, abs=1e-12)
    assert "nearly convex: 0 ± 0 %" in str(said) and "no limit is known, see below" in str(said)
    assert "`Lion` steps by the sign" in " ".join(str(said).split())
    assert said.figure() is not None


@pytest.mark.parametrize(
    "compiled, training, expected",
    [
        ({"loss": "mse"}, False, ["Batch normalization uses its moving statistics here"]),
        ({"loss": "mse"}, True, ["Train mode: the numbers belong to batches of 6"]),
        ({"loss": keras.losses.MeanSquaredError(reduction="sum")}, False, ["The loss is a sum"]),
        ({"loss": "mse", "optimizer": keras.optimizers.AdamW(weight_decay=0.004)}, False, ["weight decay of 0.004"]),
        ({"loss": "mse", "optimizer": keras.optimizers.SGD(clipnorm=1.0)}, False, ["Clipping shortens steps"]),
    ],
)
def test_what_the_numbers_do_not_say(compiled, training, expected):
    case = MODELS["batch_normalization"]()
    case.model.compile(**compiled)
    asked = _Asked(curvature(case.model, (case.x, case.y), training=training))
    asked.top = Eigenpairs(np.array([1.0]), [None], np.array([0.0]), 0, np.array([True]))
    answers = _stability(asked)
    assert answers["stability"]["of_training"] in (training, None)
    said = list(_caveats(asked.measured, answers))
    assert "not a property of the function" in said[0]
    assert all(any(text in sentence for sentence in said[1:]) for text in expected)


# The command line.


@pytest.fixture
def saved(tmp_path):
    """A saved model and data for it."""
    model, (x, y) = classifier("sgd", "loaded")
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x.reshape(40, 2, 2).astype("float32"), y=y)
    np.savez(tmp_path / "other.npz", x=x[:, :3], y=y)
    return tmp_path


def test_the_command_line_prints_the_report(saved, capsys, monkeypatch):
    given = [str(saved / "model.keras"), "--data", str(saved / "data.npz"), "--kind", "ggn", "--path", str(saved / "c")]
    monkeypatch.setattr(sys, "argv", ["keras-curvature", "report", *given, "--examples", "32"])
    setup = configparser.ConfigParser()
    setup.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    name, script = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    importlib.metadata.EntryPoint(name, script, "console_scripts").load()()
    printed = capsys.readouterr().out
    assert printed.startswith("curvature of loaded    35 weights · 32 examples · Gauss-Newton · eval mode")
    assert printed == (saved / "c.txt").read_text()


def test_a_model_without_a_loss_gets_one(saved, capsys):
    model = keras.models.load_model(saved / "model.keras", compile=False)
    model.save(saved / "bare.keras")
    given = [str(saved / "bare.keras"), "--data", str(saved / "data.npz"), "--kind", "ggn"]
    _refused(given, capsys, "was saved without a loss. Pass one, such as: --loss sparse_categorical_crossentropy")
    main(["report", *given, "--loss", "sparse_categorical_crossentropy", "--from_logits"])
    assert "The model has no optimizer" in capsys.readouterr().out


def _refused(given, capsys, message, status=2):
    with pytest.raises(SystemExit) as error:
        main(["report", *given])
    said = capsys.readouterr().err if status == 2 else error.value.code
    assert message in " ".join(said.split())
    assert status == 1 or error.value.code == status


def test_mistakes_on_the_command_line(saved, capsys):
    model, folder = str(saved / "model.keras"), str(saved)
    _refused([f"{folder}/none.keras", "--data", "digits"], capsys, "there is no file")
    _refused([model, "--data", "imagenet"], capsys, "--data must be one of cifar10, digits, mnist")
    _refused([model, "--data", f"{folder}/none.npz"], capsys, "there is no file")
    _refused([model, "--data", f"{folder}/other.npz"], capsys, "--data must have examples of shape (4,)")
    _refused([model, "--data", "mnist", "--data_dir", folder], capsys, 'there is no folder "mnist"')
    _refused([model, "--data", f"{folder}/data.npz", "--kind", "hesse"], capsys, "invalid choice: 'hesse'")
    _refused([model, "--data", f"{folder}/data.npz", "--examples", "0"], capsys, "`examples` must be an integer", 1)
    _refused([model, "--data", f"{folder}/data.npz", "--loss", "mse", "--from_logits"], capsys, "needs a cross-ent")
    _refused([model], capsys, "the following arguments are required: --data")
    _refused([model, "--data", f"{folder}/data.npz", "--examples", "many"], capsys, "invalid int value: 'many'")


@pytest.mark.parametrize("given, message", [
    ([], "the following arguments are required: subcommand"),
    (["measure"], "argument subcommand: invalid choice: 'measure'"),
])  # fmt: skip
def test_a_subcommand_is_needed(given, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(given)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_help_names_the_arguments(capsys):
    with pytest.raises(SystemExit) as error:
        main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert not error.value.code
    assert "also write PATH.png, PATH.json and PATH.txt" in said and "Example: keras-curvature report" in said


def test_the_table_is_a_function_of_the_numbers(measured):
    assert table(json.loads(json.dumps(measured.report))) == str(measured.report)
