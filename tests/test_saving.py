"""Every way that Keras has of saving and loading a model, for every optimizer: weights and state come back."""

import copy
import inspect
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import FAMILIES, GRADIENTS_SUFFICE, ONE_OF_EACH, OPTIMIZERS
from selection import some
from test_properties import assert_same

import keras_curvature as kc


def layers():
    """`(inputs, outputs)` of a small network."""
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")(inputs)
    return inputs, keras.layers.Dense(2, name="output")(hidden)


KINDS = {
    "plain": lambda: keras.Model(*layers(), name="net"),
    "curved": lambda: kc.curved(keras.Model(*layers(), name="net")),
    "born": lambda: kc.CurvatureModel(*layers(), name="net"),
}


def make(name, kind):
    """A compiled model that was not fitted."""
    model = KINDS[kind]()
    model.compile(OPTIMIZERS[name](name="optimizer"), "mse")
    return model


def fit_to(model, seed):
    """Give the weights and all state of the optimizer some values, as a `fit` would."""
    model.optimizer.build(model.trainable_variables)
    random = np.random.default_rng(seed)
    for variable in [*model.variables, *model.optimizer.variables]:
        integer = "int" in variable.dtype
        value = random.integers(1, 9, variable.shape) if integer else random.uniform(0.1, 1, variable.shape)
        variable.assign(value.astype(variable.dtype))
    return model


def state(model):
    """Everything that has a value, of a model whose optimizer is built by now."""
    model.optimizer.build(model.trainable_variables)
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def test_what_a_class_accepts_is_in_its_config():
    """Arguments of a base class are arguments of the class too, or refused."""
    for cls in {method.cls for method in OPTIMIZERS.values()}:
        own = inspect.signature(cls.__init__).parameters
        for base in cls.__mro__[1 : cls.__mro__.index(kc.CurvatureOptimizer)]:
            if "__init__" not in vars(base):
                continue
            for name, argument in inspect.signature(base.__init__).parameters.items():
                if name not in own and argument.default is not inspect.Parameter.empty:
                    with pytest.raises(TypeError, match=name):
                        cls(**{name: argument.default})
    made = kc.NewtonMuon.from_config(kc.NewtonMuon.dion(part=kc.LowRankPart(2)).get_config())
    assert made.part == kc.LowRankPart(2)


# Ways that give another model.


def as_it_was(model, loaded):
    """The loaded model, curved if the file says no more of it than its plain class."""
    return kc.curved(loaded) if isinstance(model, kc.CurvatureModel) else loaded


def keras_file(model, folder):
    """`model.save`, of the present format."""
    model.save(folder / "m.keras")
    return as_it_was(model, keras.models.load_model(folder / "m.keras"))


def model_checkpoint(model, folder):
    """`ModelCheckpoint` of whole models."""
    callback = keras.callbacks.ModelCheckpoint(str(folder / "m.keras"))
    callback.set_model(model)
    callback.on_epoch_end(0, {})
    return as_it_was(model, keras.models.load_model(folder / "m.keras"))


def pickled(model, folder):
    """`pickle`, which is what joblib, Ray and multiprocessing use."""
    return pickle.loads(pickle.dumps(model))


def deep_copy(model, folder):
    """`copy.deepcopy`."""
    return copy.deepcopy(model)


def configs(model, folder):
    """`get_config` of model and optimizer, and the values of their variables."""
    made = as_it_was(model, type(model).from_config(model.get_config()))
    made.compile(type(model.optimizer).from_config(model.optimizer.get_config()), "mse")
    made.set_weights(model.get_weights())
    made.optimizer.build(made.trainable_variables)
    made.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])
    return made


def clone(model, folder):
    """`clone_model`, and the values of the variables."""
    made = as_it_was(model, keras.models.clone_model(model))
    made.compile(type(model.optimizer).from_config(model.optimizer.get_config()), "mse")
    made.set_weights(model.get_weights())
    made.optimizer.build(made.trainable_variables)
    made.optimizer.set_weights([v.numpy() for v in model.optimizer.variables])
    return made


COPIES = [keras_file, model_checkpoint, pickled, deep_copy, configs, clone]


# Ways that write into a model: each returns the function that loads.


def weights_file(model, folder):
    """`save_weights` and `load_weights`."""
    model.save_weights(folder / "m.weights.h5")
    return lambda other: other.load_weights(folder / "m.weights.h5")


def sharded_weights(model, folder):
    """The same in several files."""
    model.save_weights(folder / "m.weights.json", max_shard_size=0.01)
    return lambda other: other.load_weights(folder / "m.weights.json")


def weights_of_a_keras_file(model, folder):
    """`load_weights` of a file that holds the whole model."""
    model.save(folder / "m.keras")
    return lambda other: other.load_weights(folder / "m.keras")


def weights_checkpoint(model, folder):
    """`ModelCheckpoint` of the weights."""
    callback = keras.callbacks.ModelCheckpoint(str(folder / "m.weights.h5"), save_weights_only=True)
    callback.set_model(model)
    callback.on_epoch_end(0, {})
    return lambda other: other.load_weights(folder / "m.weights.h5")


def backup(model, folder):
    """`BackupAndRestore`."""
    callback = keras.callbacks.BackupAndRestore(str(folder / "backup"))
    callback.set_model(model)
    callback.on_epoch_end(0)

    def load(other):
        callback.set_model(other)
        callback.on_train_begin()

    return load


def tensorflow_checkpoint(model, folder):
    """`tf.train.Checkpoint`, which restores variables that exist."""
    path = tf.train.Checkpoint(model, optimizer=model.optimizer).save(str(folder / "checkpoint"))

    def load(other):
        other.optimizer.build(other.trainable_variables)
        tf.train.Checkpoint(other, optimizer=other.optimizer).restore(path).assert_consumed()

    return load


def state_tree(model, folder):
    """`get_state_tree` and `set_state_tree`."""
    tree = model.get_state_tree("numpy_array")

    def load(other):
        other.optimizer.build(other.trainable_variables)
        other.set_state_tree(tree)

    return load


INTO_A_MODEL = [weights_file, sharded_weights, weights_of_a_keras_file, weights_checkpoint, backup,
                tensorflow_checkpoint, state_tree]  # fmt: skip
QUICK = [*[(name, "curved") for name in FAMILIES], ("kfac", "born"), ("neumann_resets", "plain")]
ALL = [
    *[(name, kind) for kind in ("curved", "born") for name in ONE_OF_EACH],
    *[(name, "plain") for name in ONE_OF_EACH if name in GRADIENTS_SUFFICE],
]
CASES = some(ALL, QUICK)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_copies_are_of_the_same_kind_and_in_the_same_state(name, kind, tmp_path):
    model = fit_to(make(name, kind), 1)
    expected = state(model)
    for way in COPIES:
        other = way(model, tmp_path)
        assert isinstance(other, kc.CurvatureModel) == (kind != "plain"), way
        assert type(other.optimizer) is type(model.optimizer), way
        assert other.optimizer.get_config() == model.optimizer.get_config(), way
        assert_same(state(other), expected)
        assert_same(state(model), expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_files_bring_the_state_back_into_any_model(name, kind, tmp_path):
    model = fit_to(make(name, kind), 1)
    expected = state(model)
    for way in INTO_A_MODEL:
        folder = tmp_path / way.__name__
        folder.mkdir()
        for target in ("the same", "new", "fitted"):
            fit_to(model, 1)
            load = way(model, folder)
            other = fit_to(model, 2) if target == "the same" else make(name, kind)
            load(fit_to(other, 2) if target == "fitted" else other)
            assert_same(state(other), expected)


# Curved models remain what they are.


def test_a_curved_model_is_an_instance_of_both_classes():
    for model in (kc.curved(KINDS["plain"]()), KINDS["born"](), kc.curved(keras.Sequential([keras.Input((3,))]))):
        assert isinstance(model, kc.CurvatureModel) and isinstance(model, keras.Model)
        assert issubclass(type(model), kc.CurvatureModel)
    assert not isinstance(KINDS["plain"](), kc.CurvatureModel)
    assert not isinstance(keras.layers.Dense(1), kc.CurvatureModel)


def test_copies_keep_the_number_of_micro_batches():
    for kind in ("curved", "born"):
        model = make("neumann", kind)
        model.micro_batches = 2
        assert [way(model, None).micro_batches for way in (pickled, deep_copy)] == [2, 2]


def test_a_registered_class_is_found_by_its_name_when_curved(tmp_path):
    @keras.saving.register_keras_serializable(package="test_saving", name="Hidden")
    class Local(keras.Model):
        """A class that cannot be imported."""

        def __init__(self):
            super().__init__()
            self.head = keras.layers.Dense(2)

        def call(self, x):
            """The outputs."""
            return self.head(x)

        def get_config(self):
            """Nothing."""
            return {}

    model = kc.curved(Local())
    model(np.ones((1, 3), "float32"))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded) is Local
    assert_same(loaded.get_weights(), model.get_weights())
    assert isinstance(pickle.loads(pickle.dumps(model)), kc.CurvatureModel)


# The state of another optimizer.


def saved_by(optimizer, folder, fitted=True):
    """`(weights file, weights)` of a plain model with a Keras optimizer or one of ours."""
    model = kc.curved(KINDS["plain"]())
    model.compile(optimizer, "mse")
    model = fit_to(model, 3) if fitted else model
    model.save_weights(folder / "m.weights.h5")
    return folder / "m.weights.h5", model.get_weights()


FOREIGN = {
    "adam": keras.optimizers.Adam,
    "sgd": keras.optimizers.SGD,  # without momentum it has no more state than one of ours before its first step
    "other_settings": lambda: kc.AdaHessian(use_ema=True),
    "same_shapes": kc.SophiaH,  # the state of AdaHessian looks the same
}


@pytest.mark.parametrize("skip_mismatch", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_state_is_left_out_with_a_warning_and_the_weights_are_loaded(foreign, fitted, skip_mismatch, tmp_path):
    path, weights = saved_by(FOREIGN[foreign](), tmp_path)
    model = make("adahessian", "curved")
    before = state(fit_to(model, 1))[len(model.variables) :] if fitted else None
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer 'optimizer'"):
        model.load_weights(path, skip_mismatch=skip_mismatch)
        model.optimizer.build(model.trainable_variables)
    assert_same(model.get_weights(), weights)
    expected = before or state(make("adahessian", "curved"))[len(model.variables) :]
    assert_same([v.numpy() for v in model.optimizer.variables], expected)


LATER = [(cls, since) for cls in (kc.LBFGS, kc.BFGS, kc.KBFGS) for since in range(len(cls.later))]


@pytest.mark.parametrize("cls, since", LATER)
def test_state_of_an_earlier_version_that_lacks_variables_is_loaded(cls, since):
    def trained(epochs):
        keras.utils.set_random_seed(0)
        model = kc.curved(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
        model.compile(cls(), "mse", jit_compile=False)
        x = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
        return model, model.fit(x, np.sin(x[:, :2]), batch_size=8, epochs=epochs, verbose=0).history["loss"]

    (model, _), store = trained(2), {}
    old = model.optimizer
    later = [v.name in cls.later[since:] for v in old.variables]
    assert sum(later) == len(cls.later) - since
    old.save_own_variables(store)
    entries = [store[str(i)] for i, is_later in enumerate(later) if not is_later]
    again, _ = trained(1)
    kept = [v.numpy() for v in again.optimizer.variables]
    again.optimizer.load_own_variables({"owner": store["owner"], **{str(i): v for i, v in enumerate(entries)}})
    for new, before, there, is_later in zip(again.optimizer.variables, old.variables, kept, later):
        np.testing.assert_array_equal(new, there if is_later else before)


def test_a_run_that_has_not_begun_brings_its_learning_rate_only_to_its_own_class(tmp_path):
    path, weights = saved_by(kc.AdaHessian(0.5), tmp_path, fitted=False)
    model = make("adahessian", "curved")
    model.load_weights(path)
    model.optimizer.build(model.trainable_variables)
    assert float(model.optimizer.learning_rate.numpy()) == 0.5
    other = make("sophia_h", "curved")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        other.load_weights(path)
    assert float(other.optimizer.learning_rate.numpy()) == pytest.approx(0.01)
    assert_same(other.get_weights(), weights)


def test_state_of_the_right_number_and_another_shape_is_left_out_as_a_whole(tmp_path):
    model = make("adahessian", "curved")
    state_of = model.optimizer
    fit_to(model, 1)
    values = {str(i): v.numpy() for i, v in enumerate(state_of.variables)}
    last = str(len(values) - 1)
    values[last] = values[last][:1]
    values["1"] = np.float32(7.0)
    before = state(model)
    with pytest.warns(UserWarning, match=rf"its variable {last} .* and the saved one has shape \(1,\)"):
        state_of.load_own_variables(values)
    assert_same(state(model), before)


@pytest.mark.parametrize("name", ["curveball", "soap", "kfac"])
def test_a_model_from_an_hdf5_file_trains(name, tmp_path):
    model = make(name, "curved")
    model.compile(model.optimizer, keras.losses.MeanSquaredError())
    fit_to(model, 1).save(tmp_path / "m.h5")
    loaded = kc.curved(keras.models.load_model(tmp_path / "m.h5"))
    assert_same(loaded.get_weights(), model.get_weights())
    loaded.fit(np.ones((2, 3), "float32"), np.zeros((2, 2), "float32"), epochs=3, verbose=0)
    assert any((a != b).any() for a, b in zip(loaded.get_weights(), model.get_weights()))


# The optimizer of a class with a `compile` of its own.


@keras.saving.register_keras_serializable("test_saving")
class CompilesItself(keras.Sequential):
    """A model that is compiled when it is made, as the tasks of KerasHub are; Keras does not restore its optimizer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compile()

    def compile(self, optimizer="adam", loss="mse", **kwargs):
        """Keras', with defaults."""
        super().compile(optimizer=optimizer, loss=loss, **kwargs)


def test_a_model_that_its_class_compiled_says_which_optimizer_trains_it(tmp_path):
    data = np.ones((2, 3), "float32"), np.ones((2, 1), "float32")
    model = kc.curved(CompilesItself([keras.Input((3,)), keras.layers.Dense(1)]))
    model.compile(kc.CurveBall())
    model.fit(*data, verbose=0)  # without a warning
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning) as caught:
        loaded = kc.curved(keras.models.load_model(tmp_path / "m.keras"))
    assert all("own" not in str(w.message) for w in caught)
    with pytest.warns(UserWarning, match="`CompilesItself` has a `compile` of its own.* `Adam`"):
        loaded.fit(*data, verbose=0)
    loaded.fit(*data, verbose=0)  # said once
    loaded.compile(kc.CurveBall())
    loaded.fit(*data, verbose=0)
