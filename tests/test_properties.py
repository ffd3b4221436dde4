"""What every optimizer of the registry can do: each test is one property, crossed with all of them."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from cases import MODELS, float64
from optimizers import (
    FAMILIES,
    FEW,
    FEW_PLAIN_OR_CURVED,
    GRADIENTS_SUFFICE,
    LAYERWISE,
    ONE_OF_EACH,
    OPTIMIZERS,
    PLAIN,
    PLAIN_FAMILIES,
    prepare,
)
from selection import crossed, some

import keras_curvature as kc

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
few_optimizers = pytest.mark.parametrize("name", some(OPTIMIZERS, FEW))
few_plain_or_curved = pytest.mark.parametrize("name", some([*OPTIMIZERS, *PLAIN], FEW_PLAIN_OR_CURVED))


def data(examples=24, seed=0):
    """Classes that can be learnt: `x` (examples, 4), `y` (examples,)."""
    x = np.random.default_rng(seed).standard_normal((examples, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1).astype("int32")


def network(cls=keras.Model, dropout=0.2, normalized=True, seed=1):
    """A small classifier with batch statistics and dropout; equal seeds, equal weights."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6, activation="tanh")(inputs)
    x = keras.layers.BatchNormalization()(x) if normalized else x
    x = keras.layers.Dropout(dropout)(x) if dropout else x
    return cls(inputs, keras.layers.Dense(3)(x))


def crossentropy():
    """The loss of the network, in Keras' float type of the moment."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(name, model, **kwargs):
    """`model`, curved unless the name says plain, and compiled with the optimizer of that name."""
    model, optimizer = prepare(name, model)
    model.compile(optimizer, crossentropy(), **kwargs)
    return model


def losses(model, x, y, epochs=1, batch_size=8):
    """The loss after each batch of a `fit`, a list."""
    seen = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, callbacks=[note])
    return seen


def values(variables):
    """Their values, a list of arrays."""
    return [v.numpy() for v in variables]


def state(model):
    """All numbers of a model and its optimizer, a list of arrays."""
    return values([*model.variables, *model.optimizer.variables])


def assert_passed_over(model, x, y, expected):
    """Training on the batch changes nothing at all but the number of skipped steps, which is then `expected`."""
    model.optimizer.build(model.trainable_variables)
    counter = model.optimizer.skipped_steps
    rest = [v for v in [*model.variables, *model.optimizer.variables] if v is not counter]
    model.reset_metrics()  # Keras 3.10 does not
    before = values(rest)
    logs = model.train_on_batch(x, y, return_dict=True)
    assert_same(values(rest), before)
    assert int(counter.numpy()) == expected
    assert logs.get("skipped_steps", 1.0) == 1.0  # a plain model's logs do not say


def assert_same(first, second):
    """Bit for bit."""
    assert len(first) == len(second)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


OF_BARE_VARIABLES = [name for name in OPTIMIZERS if name not in LAYERWISE]
# of each class one, where it is there within a few steps; by default every second
SOON_THERE = [name for name in ONE_OF_EACH if name in OF_BARE_VARIABLES and OPTIMIZERS[name].steps < 500]


@pytest.mark.parametrize("name", some(OF_BARE_VARIABLES, SOON_THERE[::2]))
def test_reaches_the_minimum_of_a_quadratic(name):
    problem = kc.problems.quadratic(dimension=6, condition=10.0)
    method = OPTIMIZERS[name]
    model = kc.curved(problem.compiled(method(**method.on_a_quadratic)))
    model.fit(*problem.data(method.steps), batch_size=1, verbose=0)
    assert model.evaluate(*problem.data(1), verbose=0) < 1e-5
    np.testing.assert_allclose(model.get_weights()[0], problem.solution()[0], atol=1e-2)


@pytest.mark.parametrize("name", some(LAYERWISE, ["kfac", "eva"]))
def test_reaches_the_minimum_of_a_linear_regression(name):
    keras.utils.set_random_seed(0)
    x, w = (np.random.default_rng(seed).standard_normal(shape) for seed, shape in enumerate(((32, 4), (4, 2))))
    model = kc.curved(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    method = OPTIMIZERS[name]
    model.compile(method(**method.on_a_quadratic), "mse")
    repeated = np.tile(x, (method.steps, 1))  # the whole in each batch
    model.fit(repeated, repeated @ w, batch_size=32, shuffle=False, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], w, atol=1e-2)


@few_plain_or_curved
def test_training_goes_on_from_a_file_and_passes_over_batches_that_are_not_finite(name, tmp_path):
    (x, y), file = data(), tmp_path / "model.keras"
    # Keras' files hold no seeds: after loading the masks are others. And its own step lets a NaN into batch statistics
    model = compiled(name, network(dropout=0, normalized=name not in PLAIN))
    losses(model, x, y)
    model.save(file)
    loaded = keras.models.load_model(file)
    assert type(loaded) is type(network())  # plain Keras' own
    assert losses(prepare(name, loaded)[0], x, y) == losses(model, x, y)
    assert_same(state(loaded), state(model))

    for count, bad in enumerate((np.nan, np.inf)):
        broken = x[:8].copy()
        broken[2, 1] = bad
        assert_passed_over(model, broken, y[:8], count + 1)
    assert np.isfinite(losses(model, x, y)).all()
    assert int(model.optimizer.skipped_steps.numpy()) == 2


@few_plain_or_curved
def test_a_batch_whose_gradient_alone_is_not_finite_is_passed_over(name):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, use_bias=False)(inputs)
    root = keras.ops.sqrt(keras.ops.square(hidden))  # its derivative at an example of zeros: 0 / 0
    model, optimizer = prepare(name, keras.Model(inputs, keras.layers.Dense(1)(root)))
    model.compile(optimizer, "mse")
    x, _ = data(8)
    y, broken = x[:, :1] - x[:, 1:2], np.concatenate([x[:7], np.zeros((1, 4), "float32")])
    assert np.isfinite(model.evaluate(broken, y, verbose=0))
    assert_passed_over(model, broken, y, 1)  # the first step, which CurveBall checks by its loss
    model.train_on_batch(x, y)
    before = model.get_weights()
    model.train_on_batch(x, y)
    assert max(np.abs(a - b).max() for a, b in zip(model.get_weights(), before)) > 0
    assert_passed_over(model, broken, y, 2)
    assert all(np.isfinite(v).all() for v in state(model))


@pytest.mark.parametrize("curve", [False, True])
def test_a_step_that_overflows_is_passed_over_with_all_that_keras_does_besides(curve, monkeypatch):
    x, y = data()
    model = kc.curved(network(normalized=False, dropout=0)) if curve else network(normalized=False, dropout=0)
    model.compile(kc.SOAP(weight_decay=0.5, use_ema=True), crossentropy(), jit_compile=False)
    monkeypatch.setattr(model.optimizer, "precondition", lambda gradients: [np.inf * g for g in gradients])
    assert_passed_over(model, x[:8], y[:8], 1)


@few_optimizers
def test_a_model_is_saved_before_its_first_fit(name, tmp_path):
    file, (x, y) = tmp_path / "model.keras", data()
    model = compiled(name, network(dropout=0))
    model.save(file)
    loaded = keras.models.load_model(file)
    assert_same(loaded.get_weights(), model.get_weights())
    assert losses(kc.curved(loaded), x, y) == losses(model, x, y)
    assert_same(state(loaded), state(model))


@pytest.mark.parametrize("name", some(["neumann_resets", "curveball"], ["curveball"]))
def test_a_curvature_model_is_saved_and_loaded_as_itself(name, tmp_path):
    (x, y), file = data(), tmp_path / "model.keras"
    model = compiled(name, network(kc.CurvatureModel, dropout=0))
    losses(model, x, y)
    model.save(file)
    loaded = keras.models.load_model(file)
    assert isinstance(loaded, kc.CurvatureModel)
    assert losses(loaded, x, y) == losses(model, x, y)
    assert_same(state(loaded), state(model))


@pytest.mark.parametrize("name", some([*OPTIMIZERS, *PLAIN], FEW[:1]))
def test_compiled_by_xla_as_a_graph_and_eagerly_it_is_the_same_training(name):
    x, y = data()
    ways = {"graph": {"jit_compile": False}, "xla": {"jit_compile": True}, "eager": {"run_eagerly": True}}
    seen = {}
    for way, options in ways.items():
        model = compiled(name, network(dropout=0, normalized=False), **options)
        seen[way] = [*losses(model, x, y), *model.get_weights()]
    for way in ("xla", "eager"):
        for value, expected in zip(seen[way], seen["graph"]):
            np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=way)


@pytest.fixture(params=["mixed_bfloat16", "mixed_float16"])
def mixed(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@few_plain_or_curved
def test_trains_in_mixed_precision(name, mixed):
    x, y = data()
    model = compiled(name, network(dropout=0, normalized=False))
    seen = np.array(losses(model, x, y, epochs=5))
    counted = seen[np.isfinite(seen)]  # the mean of an epoch is NaN as long as all its batches overflowed
    assert len(counted) >= len(seen) - (2 if mixed == "mixed_float16" else 0)
    assert np.mean(counted[-3:]) < np.mean(counted[:3])
    if mixed == "mixed_float16":
        scaler = model.optimizer
        assert isinstance(scaler, keras.optimizers.LossScaleOptimizer)
        inner = scaler.inner_optimizer
        rest = [*model.variables, *[v for v in inner.variables if v is not inner.skipped_steps]]
        # beyond the range of float16: the loss, and then the scaled gradient alone
        for factor, scale in ((1e6, 1024.0), (1.0, 2.0**60)):
            scaler.dynamic_scale.assign(scale)
            before, skipped = values(rest), int(inner.skipped_steps.numpy())
            model.train_on_batch(factor * x[:8], y[:8])
            assert float(scaler.dynamic_scale.numpy()) == scale / 2
            assert int(inner.skipped_steps.numpy()) == skipped + (name not in PLAIN)  # where Keras itself skips
            assert_same(values(rest), before)


@pytest.mark.parametrize("name", some(GRADIENTS_SUFFICE, [name for name in FEW if name in GRADIENTS_SUFFICE]))
def test_a_plain_model_trains_as_a_curved_one(name):
    x, y = data()
    plain = network()
    plain.compile(OPTIMIZERS[name](), crossentropy())
    curved = compiled(name, network())
    np.testing.assert_allclose(losses(plain, x, y, epochs=4), losses(curved, x, y, epochs=4), rtol=1e-5)
    for a, b in zip(plain.get_weights(), curved.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@few_optimizers
def test_micro_batches_train_as_the_whole_batch(name):
    x, y = data()
    trained = []
    for micro_batches in (1, 2):
        with float64():
            model = compiled(name, network(normalized=False), jit_compile=False)
            model.micro_batches = micro_batches
            losses(model, x, y)
            trained.append(model.get_weights())
    for whole, sliced in zip(*trained):
        np.testing.assert_allclose(sliced, whole, rtol=0, atol=1e-10)


@every_optimizer
def test_its_record_tells_whether_gradients_suffice(name):
    method = OPTIMIZERS[name]
    assert method.by_gradient == method().needs.only_gradients
    assert type(method()) is method.cls


def test_the_registry_has_every_class():
    exported = {getattr(kc, name) for name in kc.optimizers.__all__} - {kc.CurvatureOptimizer}
    assert exported <= {method.cls for method in OPTIMIZERS.values()}
    assert [OPTIMIZERS[name].cls for name in ONE_OF_EACH] == list(dict.fromkeys(m.cls for m in OPTIMIZERS.values()))


@every_optimizer
def test_its_config_makes_it_again(name):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.3, 10, 0.5)
    for made in (OPTIMIZERS[name](), OPTIMIZERS[name](learning_rate=schedule, weight_decay=0.1, clipnorm=None)):
        config = made.get_config()
        again = type(made).from_config(json.loads(json.dumps(config)))
        assert again.get_config() == config
        stored = json.loads(json.dumps(keras.optimizers.serialize(made)))
        again = keras.optimizers.deserialize(stored)
        assert type(again) is type(made) and again.get_config() == config


# Two replicas in a process of its own, once for all of a list of optimizers: two strategies in one process collide.

FAMILIES_ON_REPLICAS = [*FAMILIES, *PLAIN_FAMILIES, "shampoo", "ekfac"]
REPLICATED = [*FAMILIES_ON_REPLICAS, *[name for name in ONE_OF_EACH if name not in FAMILIES_ON_REPLICAS]]
OTHERS = [name for name in REPLICATED if name not in FEW_PLAIN_OR_CURVED]


@functools.cache
def on_two_replicas(*names):
    """`{name: {"one": numbers, "two": numbers}}` of training on one device and on two replicas."""
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, here / "two_replicas.py", *names],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def two_replicas():
    """`two_replicas(name)`: what was found of a name, in a run for the few or in a run for all other optimizers."""
    return lambda name: on_two_replicas(*(OTHERS if name in OTHERS else FEW_PLAIN_OR_CURVED))[name]


# All of them, with all kinds of layers: test_replicas.py.
@pytest.mark.parametrize("name", some(REPLICATED, FEW_PLAIN_OR_CURVED))
def test_two_replicas_train_as_one_device(name, two_replicas):
    found = two_replicas(name)
    assert "error" not in found, found["error"]
    one, two = found["one"], found["two"]
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6 if name in PLAIN else 0)


@pytest.mark.parametrize("statistics", ["each replica's", "synchronized"])
def test_batch_statistics_are_of_a_replica_or_of_all(statistics, two_replicas):
    found = two_replicas(statistics)
    np.testing.assert_allclose(found["two"], found["hand"], rtol=1e-5, atol=1e-6)
    other = two_replicas("synchronized" if statistics == "each replica's" else "each replica's")
    assert np.abs(np.subtract(found["hand"], other["hand"])).max() > 1e-3  # the two can be told apart


def test_weights_that_the_loss_does_not_reach_are_left_alone_by_keras_optimizers(two_replicas):
    one, two = two_replicas("decayed")["one"], two_replicas("decayed")["two"]
    assert one[0] == two[0] == 0.0
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_a_gradient_that_is_one_object_on_all_replicas_counts_for_each(two_replicas):
    one, two = two_replicas("by hand")["one"], two_replicas("by hand")["two"]
    assert one != [1.0, 1.0, 1.0]
    np.testing.assert_allclose(two, one, rtol=1e-6)


def test_what_is_done_every_so_many_steps_is_skipped_in_between_on_replicas_too(two_replicas):
    passes = two_replicas("forward passes")
    assert passes == {"one": [2, 1, 1, 2], "two": [4, 2, 2, 4]}


@pytest.mark.parametrize("name", some(["shampoo", "soap", "kfac", "ekfac"], ["kfac"]))
def test_each_replica_decomposes_its_share_of_the_matrices(name, two_replicas):
    found = two_replicas(name)["decompositions"]
    (one,), two = found["one"].values(), found["two"]
    # a stack of matrices of one size is one operation, and may be cut in two
    assert set(two) == {"CPU:0", "CPU:1"}
    assert max(two.values()) < one <= sum(two.values()) < 2 * one


# Each kind of layer with each optimizer: a few by default, more with `-m slow`, all others with `-m cross`.

PAIRS = [
    ("batch_normalization_2d", "curveball"), ("lstm", "neumann_resets"), ("several_outputs", "hessian_free_chunk"),
    ("subclassed", "hessian_free"), ("shared_layer", "neumann"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")
@pytest.mark.parametrize(("kind", "name"), crossed(MODELS, OPTIMIZERS, PAIRS))
def test_trains_every_kind_of_layer(kind, name):
    case = MODELS[kind]().compile(OPTIMIZERS[name]())
    history = kc.curved(case.model).fit(*case.batch[:2], epochs=3, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert sum(history["skipped_steps"]) == 0
