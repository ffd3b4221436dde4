"""Measuring at the edges: nothing trainable, a few weights, one example, no gradient, no curvature, half precision."""

import contextlib
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import float64
from keras import layers
from selection import some

import keras_curvature as kc
from keras_curvature.monitor.report.reporting import Report
from keras_curvature.monitor.spectra import traces
from keras_curvature.operators import Function

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 1)).astype("float32")
ONE_CLASS = np.zeros(32, "int32")


def compiled(*stack, loss="mse", inputs=6):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((inputs,)), *stack])
    model.compile("sgd", loss, jit_compile=False)
    return model


def one_class():
    """A classifier with one class: loss and gradient are zero, and the Hessian is rounding at most."""
    return compiled(layers.Dense(1), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def flat_loss():
    """A model whose loss, gradient and Hessian are exactly zero."""
    return compiled(layers.Dense(1), loss=lambda y, outputs: 0.0 * keras.ops.mean(outputs, -1))


def reported(model, data, **options):
    """The report, and its text."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = kc.report(model, data, **options)
    return found, str(found)


# Nothing trainable.


@pytest.mark.parametrize("ask", [
    kc.curvature, kc.report, kc.landscape, lambda model, data: kc.curvature(model, data, kind="fisher"),
])  # fmt: skip
def test_a_model_without_trainable_weights_is_refused(ask):
    model = compiled(layers.Dense(1))
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="has no trainable weights.*Set `trainable = True`"):
        ask(model, (X, Y))


# A few weights: everything is exact.


@pytest.mark.parametrize("weights", [1, 2, 3, 6])
def test_a_few_weights_are_measured_exactly(weights):
    """Against the closed form of linear regression: H = 2 x'x / N."""
    with float64():
        x = X[:, :weights].astype("float64")
        c = kc.curvature(compiled(layers.Dense(1, use_bias=False), inputs=weights), (x, Y))
        H, values = 2 * x.T @ x / len(x), np.linalg.eigvalsh(2 * x.T @ x / len(x))
        for trace in (c.trace(), c.trace(pairs=c.top(1)), *c.trace(by_layer=True).values()):
            assert trace.value == pytest.approx(np.trace(H), rel=1e-12)
            assert (trace.stderr, trace.products) == (0.0, weights)
        entries, errors = c.diagonal(stderr=True)
        density = c.density()
        np.testing.assert_allclose(entries[0].numpy().ravel(), np.diag(H), rtol=1e-12)
        np.testing.assert_array_equal(errors[0], 0)
        np.testing.assert_allclose(density.nodes, values[np.newaxis], rtol=1e-12)
        assert density.mass(high=np.mean(values[:2])) == pytest.approx(1 / weights if weights > 1 else 1)
        np.testing.assert_allclose(c.top(50).values, values[::-1], rtol=1e-12)
        np.testing.assert_allclose(c.top(50, most_negative=True).values, values, rtol=1e-12)


@pytest.mark.parametrize("weights", [1, 2, 5])
def test_xtrace_of_a_few_weights_has_no_error(weights):
    A = np.random.default_rng(0).normal(size=(weights, weights))
    operator = Function(lambda v: [keras.ops.matmul(A + A.T, v[0])])
    found = traces.xtrace(operator, [keras.ops.zeros(weights, "float64")], 30)
    assert found.value == pytest.approx(2 * np.trace(A), abs=1e-12) and found.stderr == 0


def test_a_report_of_one_weight_is_exact():
    with float64():
        report, said = reported(compiled(layers.Dense(1, use_bias=False), inputs=1), (X[:, :1].astype("float64"), Y))
    exact = 2 * np.mean(X[:, 0].astype("float64") ** 2)
    for number in (report["trace"], *(layer["trace"] for layer in report["layers"].values())):
        assert number["value"] == pytest.approx(exact, rel=1e-12) and number["stderr"] == 0
    assert "nan" not in said


# Little to see.


def test_one_example_has_no_noise_to_measure():
    model = compiled(layers.Dense(1))
    report, said = reported(model, (X[:1], Y[:1]))
    assert report["noise"] is None and "nan" not in said
    assert report["sharpness"]["value"] == pytest.approx(2 * ((X[0] ** 2).sum() + 1), rel=1e-5)
    with pytest.raises(ValueError, match="at least two micro-batches.*micro_batch=8 and 1 examples"):
        kc.curvature(model, (X[:1], Y[:1])).noise()


@pytest.mark.filterwarnings("error")
def test_no_curvature_and_no_gradient_are_zero_and_said():
    report, said = reported(flat_loss(), (X, ONE_CLASS))
    assert report["sharpness"]["value"] == report["trace"]["value"] == report["gradient"]["norm"] == 0
    assert report["effective_directions"] is None and np.isnan(report["noise"]["simple"]["value"])
    assert "none: the gradient is zero on these examples" in said and "nan" not in said
    assert report.figure() is not None
    c = kc.curvature(flat_loss(), (X, ONE_CLASS))
    assert (c.density().negative.value, c.density().effective_rank, c.trace().value) == (0, 0, 0)


def test_a_direction_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="the gradient is zero at these weights"):
        kc.landscape(one_class(), (X, ONE_CLASS), directions="gradient", points=3)


def test_weights_without_filters_have_no_random_direction():
    model = compiled(layers.Dense(1))
    model.layers[-1].kernel.trainable = False
    model.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match="a random direction moves filters.*Use directions='sharpest'"):
        kc.landscape(model, (X, Y), points=3)
    report, _ = reported(model, (X, Y))
    assert list(report["landscape"]["loss"]) == ["sharpest"] and report["trace"]["value"] == pytest.approx(2.0)
    assert report.figure() is not None


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_examples_without_weight_have_no_loss(reduction):
    model = compiled(layers.Dense(1), loss=keras.losses.MeanSquaredError(reduction=reduction))
    c = kc.curvature(model, (X, Y, np.zeros(32, "float32")), batch_size=8)
    assert float(c.loss) == c.top(1).values[0] == 0


# Losses that couple examples, in several batches.


def named(name, fn):
    """A loss function with a name of its own, so that it is warned of anew."""
    fn.__name__ = name
    return fn


COUPLED = {
    "dice": lambda name: keras.losses.Dice(name=name),
    "dice_of_classes": lambda name: keras.losses.Dice(axis=(0,), name=name),
    "tversky": lambda name: keras.losses.Tversky(name=name),
    "circle": lambda name: keras.losses.Circle(name=name),
    "root": lambda name: named(name, lambda y, z: tf.sqrt(tf.reduce_mean((y - z) ** 2))),
    "one_number": lambda name: named(name, lambda y, z: tf.reduce_mean((y - z) ** 2)),
    "sum": lambda name: keras.losses.Dice(name=name, reduction="sum"),
}
# Keras' circle loss takes labels of classes, and unit vectors
COUPLED_DATA = {"circle": (X, np.arange(32) % 4)}


def of_coupled(name, label):
    keras.utils.set_random_seed(0)
    last = [layers.Dense(2, "sigmoid")] if name != "circle" else [layers.Dense(2), layers.UnitNormalization()]
    model = compiled(*last, loss=COUPLED[name](label))
    x, y = COUPLED_DATA.get(name, (X, (X[:, :2] > 0).astype("float32")))
    return model, x, y


@pytest.mark.parametrize(
    ("name", "weighs"), [(name, weighs) for name in COUPLED for weighs in (False, True) if name != "dice_of_classes"]
    + [("dice_of_classes", False)],
)  # fmt: skip
def test_a_loss_that_couples_examples_is_warned_of_in_several_batches_once(name, weighs):
    label = f"{name}_{weighs}".lower()
    model, x, y = of_coupled(name, label)
    data = (x, y, np.linspace(0.5, 1.5, 32).astype("float32")) if weighs else (x, y)
    kc.curvature(model, data)  # one batch: no warning, or the test fails
    with pytest.warns(UserWarning, match=f"`curvature`: the loss '{label}' .* 4 batches.*pass batch_size=32") as caught:
        c = kc.curvature(model, data, batch_size=8)
    assert len(caught) == 1 and caught[0].filename == __file__
    rows = [[a[i : i + 8] for a in data] for i in range(0, 32, 8)]
    parts = [float(model.compute_loss(x, y, model(x), *weights)) for x, y, *weights in rows]
    assert float(c.loss) == pytest.approx(np.mean(parts), rel=1e-5)
    kc.curvature(model, data, batch_size=8)


@pytest.mark.parametrize("measure", [kc.report, kc.landscape], ids=lambda f: f.__name__)
def test_every_function_that_sums_batches_warns_of_coupled_losses(measure):
    model, x, y = of_coupled("dice", f"dice_of_{measure.__name__}")
    with pytest.warns(UserWarning) as caught:
        measure(model, (x, y), batch_size=16)
    said = [str(w.message) for w in caught if "2 batches" in str(w.message)]
    assert len(said) == 1 and f"`{measure.__name__}`: the loss 'dice_of_" in said[0]


def test_the_board_warns_of_coupled_losses_once(tmp_path):
    model, x, y = of_coupled("dice", "dice_of_board")
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    board = kc.callbacks.CurvatureBoard(tmp_path, data=batches, report_at=None)
    with pytest.warns(UserWarning) as caught:
        model.fit(x, y, epochs=2, verbose=0, callbacks=[board])
    said = [str(w.message) for w in caught if "4 batches" in str(w.message)]
    assert len(said) == 1 and "(`CurvatureBoard`: `data` of one batch)" in said[0]


def test_losses_of_each_example_are_not_warned_of():
    model = compiled(layers.Dense(2, "sigmoid"), loss=keras.losses.Dice(axis=(1,)))
    kc.curvature(model, (X, (X[:, :2] > 0).astype("float32")), batch_size=8)


def test_an_unknown_error_is_said_in_words():
    report, _ = reported(compiled(layers.Dense(1)), (X, Y))
    for error in (float("nan"), None):  # as measured, and as read from JSON
        for scale in report["noise"].values():
            scale |= {"value": 67.0, "stderr": error}
        said = str(Report(report))
        assert said.count("error unknown, too few examples") == 2 and "nan" not in said and "67.0" in said


# Half precision.


@pytest.mark.parametrize("policy", some(["float16", "bfloat16"], ["bfloat16"]))
def test_noise_of_half_precision_weights_is_summed_in_float32(policy):
    """Within the rounding of half precision of the same weights in float32; sums of squares there reach 65504."""
    scale, found = 60.0, {}
    keras.config.set_dtype_policy(policy)
    try:
        half = compiled(layers.Dense(4, "tanh"), layers.Dense(1))
    finally:
        keras.config.set_dtype_policy("float32")
    full = compiled(layers.Dense(4, "tanh"), layers.Dense(1))
    full.set_weights([np.asarray(w, "float32") for w in half.get_weights()])
    for name, model in {"half": half, "full": full}.items():
        found[name] = kc.curvature(model, (X, scale * Y)).noise(4)
    for name in ("signal", "noise", "simple"):
        assert getattr(found["half"], name) == pytest.approx(getattr(found["full"], name), rel=0.1), name
        assert np.isfinite(found["half"].stderr[name]) == np.isfinite(found["full"].stderr[name])


# A `train_step` of the model's own.


class Distilled(keras.Model):
    """Trains something else than its compiled loss."""

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True)))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class Complete(Distilled):
    """Has a loss that can be measured, without a compiled one."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_mean(tf.square(y_pred))


def of_own_step(cls, **compiled):
    inputs = keras.Input((3,))
    model = cls(inputs, keras.layers.Dense(2)(inputs))
    model.compile("sgd", **compiled)
    return model


TWELVE = np.random.default_rng(0).standard_normal((12, 3)).astype("float32"), np.zeros((12, 2), "float32")


@pytest.mark.parametrize("measure", [kc.curvature, kc.report, kc.landscape], ids=lambda f: f.__name__)
def test_a_loss_that_only_the_train_step_knows_is_refused(measure):
    with pytest.raises(ValueError, match=f"`{measure.__name__}`: `Distilled` computes its loss in its own `train_step"):
        measure(of_own_step(Distilled), TWELVE)


def test_where_the_train_step_may_train_another_loss_there_is_a_warning():
    with pytest.warns(UserWarning, match="`curvature`: `Distilled` has its own `train_step`. What is measured is"):
        kc.curvature(of_own_step(Distilled, loss="mse"), TWELVE)
    with pytest.warns(UserWarning, match="`Complete` has its own"):
        assert kc.curvature(of_own_step(Complete), TWELVE).sharpness().values[0] > 0


def test_the_board_warns_of_a_train_step_once(tmp_path):
    model = of_own_step(Distilled, loss="mse")
    with pytest.warns(UserWarning) as caught:
        model.fit(*TWELVE, epochs=3, verbose=0, callbacks=[kc.callbacks.CurvatureBoard(tmp_path)])
    assert len([w for w in caught if "own `train_step`" in str(w.message)]) == 1
