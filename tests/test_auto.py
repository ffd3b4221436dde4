"""`kc.auto`: who runs and why not, who is chosen, and that the model is left as it was."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_curvature as kc
from keras_curvature.monitor.choosing import race
from keras_curvature.monitor.choosing.candidates import CANDIDATES, Candidate, Facts, facts_of
from keras_curvature.monitor.choosing.race import auto
from keras_curvature.monitor.choosing.twins import twin_of

SGD, ADAM = keras.optimizers.SGD, keras.optimizers.Adam


def data(count=64):
    """Inputs, and a linear function of them."""
    x = np.random.RandomState(0).randn(count, 4).astype("float32")
    return x, x @ np.array([[1.0], [-2.0], [0.5], [3.0]], "float32")


def linear(curved=False, loss="mse"):
    """A compiled model with one weight matrix."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model = kc.curved(model) if curved else model
    model.compile("adam", loss, metrics=["mae"])
    return model


@pytest.fixture
def candidates(monkeypatch):
    """A function that replaces the candidates by those given as `name=function`."""

    def replace(**makers):
        monkeypatch.setattr(race, "CANDIDATES", tuple(Candidate(name, make) for name, make in makers.items()))

    return replace


def objections(**changes):
    """`{name: objection}` of the real candidates."""
    usual = {"weights": 1000, "matrices": 900, "rows": 320, "batch": 32, "examples": 320, "curved": True}
    facts = Facts(**{**usual, "own_step": False, "squares": True, "convex": True, **changes})
    return {candidate.name.split(".")[-1]: candidate.objection(facts) for candidate in CANDIDATES}


# Who is chosen.


def test_the_lowest_loss_is_chosen_and_returned_new(candidates, capsys):
    candidates(still=lambda: SGD(0.0), good=lambda: SGD(0.1), diverges=lambda: SGD(1e3))
    model = linear()
    found = auto(model, data(), seconds=3)
    assert type(found) is SGD and float(found.learning_rate) == np.float32(0.1) and not found.built
    table = capsys.readouterr().out
    assert "5 weights, batches of 32 of 64 examples" in table
    assert [line.split()[0] for line in table.splitlines() if "<- chosen" in line] == ["good"]
    model.compile(found, "mse")
    model.fit(*data(), verbose=0)


@pytest.mark.parametrize("form", ["arrays", "dataset", "infinite", "sequence", "weighted"])
def test_data_come_as_for_fit(form, candidates, capsys):
    candidates(good=lambda: SGD(0.1))
    x, y = data()

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return x[32 * i : 32 * i + 32], y[32 * i : 32 * i + 32]

    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    given = {
        "arrays": (x, y), "dataset": batches, "infinite": batches.repeat(), "sequence": Sequence(),
        "weighted": (x, y, np.ones(64)),
    }[form]  # fmt: skip
    assert type(auto(linear(), given, seconds=0.5)) is SGD
    assert f"batches of {16 if form in ('dataset', 'infinite') else 32} of" in capsys.readouterr().out


def test_one_batch_of_all_data_is_known_as_such(candidates, capsys):
    candidates(good=lambda: SGD(0.1))
    auto(linear(), tf.data.Dataset.from_tensors(data()), seconds=0.5)
    auto(linear(), data(), batch_size=1000, seconds=0.5)
    assert capsys.readouterr().out.count("batches of 64 of 64 examples") == 2


def test_all_examples_of_large_arrays_take_part(candidates, capsys):
    candidates(good=lambda: SGD(0.1))
    auto(linear(), data(5000), batch_size=100, seconds=0.5)
    assert "batches of 100 of 5000 examples" in capsys.readouterr().out


def test_least_squares_in_one_batch_are_solved_by_their_rows(monkeypatch, capsys):
    chosen = ("kc.GaussNewton.levenberg_marquardt()", "keras.optimizers.Adam()")
    monkeypatch.setattr(race, "CANDIDATES", tuple(c for c in CANDIDATES if c.name in chosen))
    found = auto(linear(curved=True), data(), batch_size=64, seconds=8)
    assert type(found) is kc.GaussNewton and found.scaling == "more"


def test_whose_turn_comes_too_late_does_not_run(candidates, capsys):
    candidates(first=ADAM, second=lambda: SGD(0.1))
    assert type(auto(linear(), data(), seconds=1e-3)) is ADAM
    assert "not tried: no time was left; pass more than `seconds=0.001`" in capsys.readouterr().out


def test_a_refusal_in_words_is_shown(candidates, capsys):
    def refuses():
        return kc.KFAC()  # the model is not curved

    candidates(good=lambda: SGD(0.1), refuses=refuses)
    assert type(auto(linear(), data(), seconds=8)) is SGD
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "refuses" in line]
    assert "not tried: `KFAC` needs the model's layers" in line


# Who runs.


def test_methods_run_where_they_belong():
    assert objections(curved=False)["KFAC()"] == "the model is not curved: pass `kc.curved(model)`"
    assert "own `train_step`: compute the loss in" in objections(curved=False, own_step=True)["KFAC()"]
    assert objections(matrices=0)["SOAP()"] == "no weight is a matrix"
    assert objections()["KFAC()"] is objections()["SOAP()"] is objections()["Adam()"] is None
    assert "not all of the data" in objections()["LBFGS()"] and "less than 512" in objections()["levenberg_marquardt()"]
    assert "not curved" in objections(curved=False)["LBFGS()"]
    whole = objections(batch=320)
    assert whole["LBFGS()"] is whole["levenberg_marquardt()"] is None
    assert whole["GaussNewton()"] == "the loss is a mean squared error"
    classes = objections(batch=320, squares=False)
    assert classes["GaussNewton()"] is None and classes["levenberg_marquardt()"] == "the loss is no mean squared error"
    assert "not convex" in objections(batch=320, convex=False, squares=False)["GaussNewton()"]
    assert "seconds to solve" in objections(batch=320, weights=10**6, rows=10**4)["levenberg_marquardt()"]
    assert objections(batch=512, examples=None)["levenberg_marquardt()"] is None


def test_names_are_what_one_types():
    for candidate in CANDIDATES:
        made = eval(candidate.name, {"kc": kc, "keras": keras})  # noqa: S307
        assert {**made.get_config(), "name": 0} == {**candidate.make().get_config(), "name": 0}


@pytest.mark.parametrize(("loss", "squares"), [
    ("mse", True), (keras.losses.MeanSquaredError(), True), ("mae", False), (lambda y, z: (y - z) ** 2, False),
])  # fmt: skip
def test_least_squares_are_known_by_their_loss(loss, squares):
    model = linear(loss=loss)
    x, y = data()
    model.train_on_batch(x, y)
    assert facts_of(model, (tf.constant(x), tf.constant(y), None), 64).squares == squares


# Nothing changes.


def test_the_model_is_left_as_it_was(candidates):
    candidates(good=lambda: SGD(0.1), momentum=lambda: SGD(0.1, 0.9))
    model, (x, y) = linear(curved=True), data()
    model.fit(x, y, verbose=0)
    before, optimizer = [np.array(v) for v in [*model.variables, *model.optimizer.variables]], model.optimizer
    auto(model, (x, y), seconds=1, verbose=False)
    assert model.optimizer is optimizer
    for old, new in zip(before, [*model.variables, *model.optimizer.variables], strict=True):
        np.testing.assert_array_equal(old, new)


def test_frozen_weights_stay_frozen_and_all_start_alike(candidates, monkeypatch):
    seen = []
    monkeypatch.setattr(race, "_tried", lambda copy, candidate, *_: seen.append(
        ([np.array(w) for w in copy.weights], len(copy.trainable_variables))
    ) or race.Result(candidate, 1.0, 1, 1.0))  # fmt: skip
    candidates(a=ADAM, b=ADAM)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="frozen"), keras.layers.Dense(1)])
    model.get_layer("frozen").trainable = False
    model.compile("sgd", "mse")
    auto(model, data(), seconds=100, verbose=False)
    assert [trained for _, trained in seen] == [2, 2]
    for weights, _ in seen:
        for own, copied in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(own, copied)


def twin(model, x, y):
    """The copy that the race would train."""
    model.compute_loss(x, y, model(x))
    return twin_of(auto, model, (tf.constant(x), tf.constant(y), None))


def test_a_single_frozen_weight_stays_frozen():
    model, (x, y) = linear(), data()
    model.layers[0].kernel.trainable = False
    assert [w.path.split("/")[-1] for w in twin(model, x, y).trainable_variables] == ["bias"]


class Doubling(keras.layers.Layer):
    """Not registered."""

    def call(self, x):
        return 2 * x


class Late(keras.Model):
    """Makes its layer when it is built."""

    def build(self, shape):
        self.inner = keras.layers.Dense(1)
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        return self.inner(x)


class Besides(keras.Model):
    """A graph, and a layer outside of it."""

    def __init__(self, **kwargs):
        inputs = keras.Input((4,))
        super().__init__(inputs, keras.layers.Dense(1)(inputs), **kwargs)
        self.extra = keras.layers.Dense(2)
        self.extra.build((None, 4))


def sequential(*layers):
    """Layers between four inputs and one output."""
    return keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(1)])


@pytest.mark.parametrize("make", [
    lambda: sequential(Doubling()), lambda: sequential(keras.Sequential([keras.layers.Dense(3), Doubling()])),
    lambda: sequential(keras.layers.Lambda(lambda x: 2 * x)), Late, Besides,
], ids=["own layer", "own layer inside", "lambda", "late", "outside of the graph"])  # fmt: skip
def test_copies_of_every_kind_compute_the_same(make):
    model, (x, y) = make(), data()
    model.compile("sgd", lambda y, z: keras.ops.mean((y - z) ** 2, -1))
    copy = twin(model, x, y)
    np.testing.assert_array_equal(copy(x), model(x))
    assert copy.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)


@pytest.mark.parametrize("kind", ["list", "no targets", "sparse"])
def test_inputs_of_every_kind_train(kind, candidates):
    candidates(good=lambda: SGD(0.01))
    (x, y), inputs = data(), keras.Input((4,), sparse=kind == "sparse")
    if kind == "list":
        other = keras.Input((4,))
        model = keras.Model([inputs, other], [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(other)])
        model.compile("sgd", ["mse", "mae"])
        given = ([x, x], [y, y])
    elif kind == "no targets":
        class Own(keras.Model):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                assert y is None
                return keras.ops.mean(y_pred**2 * sample_weight[:, None])

        model = Own(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd")
        given = (x, None, np.ones(64))
    else:
        model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
        given = (tf.sparse.from_dense(x), y)
    assert type(auto(model, given, seconds=0.5, verbose=False)) is SGD


def test_seeds_do_not_move(candidates):
    candidates(good=lambda: SGD(0.01))
    model = sequential(keras.layers.Dropout(0.5), keras.layers.GaussianNoise(0.1))
    model.compile("sgd", "mse")
    model(data()[0])
    before = [np.array(v) for v in model.variables]
    state = random.getstate()
    auto(model, data(), seconds=0.3, verbose=False)
    assert random.getstate() == state
    for old, new in zip(before, model.variables):
        np.testing.assert_array_equal(old, new)


def test_a_model_of_a_strategy_with_one_replica_is_raced_in_its_scope(candidates):
    candidates(good=lambda: SGD(0.01))
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        model = linear()
    assert type(auto(model, data(), seconds=0.3, verbose=False)) is SGD


# Mistakes.


def test_arguments_of_an_own_compile_are_not_guessed():
    class Scaled(keras.Model):
        def compile(self, optimizer, loss="mse", alpha=1.0, **kwargs):
            self.alpha = alpha
            super().compile(optimizer=optimizer, loss=loss, **kwargs)

    inputs = keras.Input((4,))
    model = Scaled(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", alpha=7.0)
    with pytest.raises(ValueError, match="`Scaled.compile` takes `alpha`.*Make it an argument of the constructor"):
        auto(model, data(), seconds=0.3)


def test_if_nothing_can_be_tried_the_reason_is_given(candidates):
    class Silent(keras.Model):
        def train_step(self, data):
            return {"accuracy": tf.constant(1.0)}

    candidates(good=lambda: SGD(0.01))
    inputs = keras.Input((4,))
    model = Silent(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match='no optimizer could train the model.*returns no "loss"'):
        auto(model, data(), seconds=0.3, verbose=False)


def test_a_model_that_cannot_be_copied_is_refused():
    class Odd(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x):
            return self.inner(x)

        def get_config(self):
            return {"other": 1}

    model = Odd(keras.layers.Dense(1))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="trains a copy of the model, and `Odd` cannot be made again"):
        auto(model, data(), seconds=1)


def test_a_loss_that_is_never_finite_is_refused(candidates):
    candidates(diverges=lambda: SGD(0.1))
    x, y = data()
    with pytest.raises(ValueError, match="the training loss is not finite with any optimizer"):
        auto(linear(), (x, y * np.inf), seconds=0.5, verbose=False)


@pytest.mark.parametrize(("options", "expected"), [
    ({"batch_size": 0}, "batch_size=0"), ({"batch_size": 2.0}, "batch_size=2.0"), ({"seconds": 0}, "seconds=0"),
    ({"seconds": float("inf")}, "seconds=inf"), ({"seconds": "20"}, "seconds='20'"), ({"verbose": 2}, "verbose=2"),
])  # fmt: skip
def test_bad_arguments_are_named(options, expected):
    with pytest.raises(ValueError, match=expected):
        auto(linear(), data(), **options)


def test_data_that_do_not_fit_are_named():
    x, y = data()
    with pytest.raises(ValueError, match="auto"):
        auto(linear(), (x[:, :3], y))
    with pytest.raises(ValueError, match="auto"):
        auto(linear(), (x, y[:10]))
    with pytest.raises(ValueError, match="at least one batch"):
        auto(linear(), tf.data.Dataset.from_tensors((x, y)).take(0))
    with pytest.raises(ValueError, match="compile"):
        auto(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), (x, y))


def test_several_replicas_are_refused(monkeypatch):
    class Two:
        num_replicas_in_sync = 2

    monkeypatch.setattr(race.replicas, "strategy_of", lambda model: Two)
    with pytest.raises(ValueError, match="measures on one replica.*with 2"):
        auto(linear(), data())
