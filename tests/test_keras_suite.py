"""What Keras asks of its own optimizers, asked of these.

After `optimizer_test.py`, `loss_scale_optimizer_test.py`, `optimizer_sparse_test.py` and `sgd_test.py` of Keras 3.15.
On a list of variables and gradients only `Neumann` can run; what concerns the arguments is asked of all.
"""

import pickle
import warnings
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import LAYERWISE, OPTIMIZERS
from selection import some

import keras_curvature as kc

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_optimizer_of_bare_variables = pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in LAYERWISE])
# plain gradient descent
SGD = partial(kc.Neumann, learning_rate=1.0, alpha=0.0, beta=0.0, mu_start=0.0, mu_end=0.0, warmup_steps=0)
ONES = [[1.0, 1.0], [1.0, 1.0]]


def variable(start=((1.0, 2.0), (3.0, 4.0))):
    """A Keras variable."""
    return keras.Variable(np.array(start, "float32"))


def apply(optimizer, *pairs):
    """One step on pairs of a gradient and a variable."""
    optimizer.apply_gradients([(None if g is None else tf.constant(g), v) for g, v in pairs])


def quiet(make, **clipping):
    """The optimizer, without the warning of `Neumann` against clipping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(**clipping)


@every_optimizer
@pytest.mark.parametrize("argument", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_clipping_is_kept_and_clips(name, argument):
    optimizer = quiet(OPTIMIZERS[name], **{argument: 1.0})
    assert getattr(optimizer, argument) == 1.0 and optimizer.get_config()[argument] == 1.0
    gradient = np.array([50.0, 100.0], "float32")
    expected = np.clip(gradient, -1, 1) if argument == "clipvalue" else gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(optimizer._clip_gradients([tf.constant(gradient)])[0], expected, rtol=1e-6)


@every_optimizer
def test_two_ways_of_clipping_are_one_too_many(name):
    with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can"):
        OPTIMIZERS[name](clipnorm=0.1, global_clipnorm=0.1)


@every_optimizer
def test_pickles(name):
    optimizer = OPTIMIZERS[name]()
    assert pickle.loads(pickle.dumps(optimizer)).get_config() == optimizer.get_config()


@every_optimizer
def test_the_learning_rate_can_be_set(name):
    optimizer = OPTIMIZERS[name](learning_rate=0.25)
    assert float(optimizer.learning_rate.numpy()) == 0.25
    optimizer.learning_rate = 0.5
    assert float(optimizer.learning_rate.numpy()) == 0.5
    count = len(optimizer.variables)
    optimizer.learning_rate = keras.optimizers.schedules.PolynomialDecay(0.5, 4)
    assert len(optimizer.variables) == count - 1
    with pytest.raises(TypeError):
        optimizer.learning_rate = 0.5  # Keras: a schedule cannot be set over


@every_optimizer_of_bare_variables
def test_weights_of_the_optimizer_are_set(name):
    w = variable()
    first, second = OPTIMIZERS[name](), OPTIMIZERS[name]()
    first.build([w])
    for v in first.variables[2:]:
        v.assign(tf.cast(tf.ones_like(v.value) * 3, v.dtype))
    with pytest.raises(ValueError, match="You are calling"):
        second.set_weights([v.numpy() for v in first.variables])
    second.build([w])
    second.set_weights([v.numpy() for v in first.variables])
    for a, b in zip(first.variables, second.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@every_optimizer_of_bare_variables
def test_all_state_is_created_by_build_under_names_of_its_own(name):
    optimizer = OPTIMIZERS[name]()
    optimizer.build([variable(), variable([[1.0]])])
    paths = [v.path for v in optimizer.variables]
    assert len(set(paths)) == len(paths)
    assert any("skipped_steps" in path for path in paths)


def test_iterations_are_counted():
    optimizer, w = SGD(), variable()
    for step in range(3):
        assert int(optimizer.iterations.numpy()) == step
        apply(optimizer, (ONES, w))


def test_missing_gradients():
    with pytest.raises(ValueError, match="No gradients provided for any variable."):
        apply(SGD(), (None, variable()))
    one, two = variable(), variable()
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        apply(SGD(), (None, one), (ONES, two))
    np.testing.assert_allclose(one, [[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(two, [[0.0, 1.0], [2.0, 3.0]])


@every_optimizer_of_bare_variables
def test_a_gradient_for_each_variable_of_its_shape(name):
    optimizer, one, two = OPTIMIZERS[name](), variable(), variable([[1.0], [2.0]])
    optimizer.build([one, two])
    before = [one.numpy(), two.numpy()]
    for grads in ([tf.ones((2, 2))], [tf.ones((2, 2)), tf.ones((2, 1)), tf.ones(())]):
        with pytest.raises(ValueError, match=f"one gradient for each variable.*Received: {len(grads)} gradients for 2"):
            optimizer.apply(grads)
    with pytest.raises(ValueError, match=r"Received: a gradient of shape \(1, 2\) for .* of shape \(2, 1\)"):
        optimizer.apply([tf.ones((2, 2)), tf.ones((1, 2))])
    for now, then in zip((one, two), before):
        np.testing.assert_array_equal(now, then)


def overwritten(start=((1.0, 2.0), (3.0, 4.0))):
    """A variable that its gradient overwrites, as the scales of float8 layers."""
    w = variable(start)
    w.overwrite_with_gradient = True
    return w


def test_overwrite_with_gradient():
    optimizer, one, two = SGD(use_ema=True), overwritten(), variable()
    apply(optimizer, (ONES, one), (ONES, two))
    np.testing.assert_allclose(one, ONES)
    np.testing.assert_allclose(two, [[0.0, 1.0], [2.0, 3.0]])


def test_overwrite_with_gradient_and_accumulation():
    """As Keras does: an overwritten variable becomes the largest of the accumulated gradients."""
    optimizer, one, two = SGD(gradient_accumulation_steps=3), overwritten(), variable()
    gradients = [[[1.0, 2.0], [3.0, 4.0]], [[2.0, 3.0], [4.0, 5.0]], [[3.0, 1.0], [2.0, 1.0]]]
    for gradient in gradients[:2]:
        apply(optimizer, (gradient, one), (ONES, two))
        np.testing.assert_allclose(one, [[1.0, 2.0], [3.0, 4.0]])
    apply(optimizer, (gradients[2], one), (ONES, two))
    np.testing.assert_allclose(one, np.max(gradients, axis=0))
    np.testing.assert_allclose(two, [[0.0, 1.0], [2.0, 3.0]])


@pytest.mark.parametrize("name", ["neumann", "soap", "psgd", "square_root_free_adam"])
def test_the_other_variables_step_as_if_there_were_none_that_is_overwritten(name):
    alone, beside, optimizers = variable(), variable(), (OPTIMIZERS[name](), OPTIMIZERS[name](loss_scale_factor=4.0))
    scale = overwritten([1.0, 2.0, 3.0])
    for step in range(3):
        gradient = np.array([[1.0, -2.0], [0.5, step]], "float32")
        apply(optimizers[0], (gradient, alone))
        apply(optimizers[1], ([step, 1.0, 2.0], scale), (4.0 * gradient, beside))
    np.testing.assert_array_equal(scale, [2.0, 1.0, 2.0])
    np.testing.assert_allclose(beside, alone, rtol=1e-6)


def test_a_curved_model_refuses_weights_that_are_overwritten():
    for optimizer in (kc.Neumann(), kc.CurveBall(), "sgd"):
        model = kc.curved(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), micro_batches=2)
        model.layers[0].bias.overwrite_with_gradient = True
        model.compile(optimizer, "mse")
        before = model.get_weights()
        with pytest.raises(ValueError, match="cannot train weights with `overwrite_with_gradient`.*dense.*bias"):
            model.train_on_batch(np.ones((2, 2)), np.ones((2, 2)))
        for now, then in zip(model.get_weights(), before):
            np.testing.assert_array_equal(now, then)


def test_average_of_the_weights():
    w = variable([[3.0, 4.0], [5.0, 6.0]])
    optimizer = SGD(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)
    for down, average in ((1.0, 1.0), (2.0, 1.1)):
        apply(optimizer, (ONES, w))
        np.testing.assert_allclose(w, np.array([[3.0, 4.0], [5.0, 6.0]]) - down, rtol=1e-6)
        np.testing.assert_allclose(
            optimizer._model_variables_moving_average[0], np.array([[3.0, 4.0], [5.0, 6.0]]) - average, rtol=1e-6
        )
    apply(optimizer, (ONES, w))
    np.testing.assert_allclose(w, [[1.71, 2.71], [3.71, 4.71]], rtol=1e-6)


def test_constraints():
    w = keras.Variable(np.full((2, 2), -0.5, "float32"))
    w.constraint = keras.constraints.NonNeg()
    apply(SGD(learning_rate=1e-4), (np.zeros((2, 2), "float32"), w))
    np.testing.assert_array_equal(w, np.zeros((2, 2)))


def test_fixed_loss_scale():
    w = variable()
    optimizer = SGD(loss_scale_factor=1024.0)
    assert optimizer.scale_loss(1.0) == 1024.0
    apply(optimizer, (1024.0 * w.numpy(), w))
    np.testing.assert_array_equal(w, np.zeros((2, 2)))


def test_dynamic_loss_scale():
    w = variable()
    scaler = keras.optimizers.LossScaleOptimizer(SGD(), initial_scale=4.0, dynamic_growth_steps=2)
    apply(scaler, (4.0 * np.ones((2, 2), "float32"), w))
    np.testing.assert_allclose(w, [[0.0, 1.0], [2.0, 3.0]])
    apply(scaler, ([[np.inf, 1.0], [1.0, 1.0]], w))
    np.testing.assert_allclose(w, [[0.0, 1.0], [2.0, 3.0]])
    assert float(scaler.dynamic_scale.numpy()) == 2.0
    for scale in (2.0, 4.0):
        apply(scaler, (2.0 * np.ones((2, 2), "float32"), w))
        assert float(scaler.dynamic_scale.numpy()) == scale
    again = keras.optimizers.deserialize(keras.optimizers.serialize(scaler))
    assert again.get_config() == scaler.get_config()


def test_accumulation_of_gradients():
    w, optimizer = variable(), SGD(gradient_accumulation_steps=3)
    start = w.numpy()
    for _ in range(2):
        apply(optimizer, (ONES, w))
        np.testing.assert_array_equal(w, start)
        assert int(optimizer.iterations.numpy()) == 0
    apply(optimizer, (ONES, w))
    np.testing.assert_allclose(w, start - 1.0)
    assert int(optimizer.iterations.numpy()) == 1


@pytest.mark.parametrize("name", ["neumann", "neumann_resets"])
def test_accumulated_gradients_step_as_their_mean(name):
    gradients = np.random.default_rng(0).random((6, 3, 2, 1)).astype("float32")
    one, three = variable([[0.9], [0.5]]), variable([[0.9], [0.5]])
    whole = OPTIMIZERS[name](weight_decay=0.05)
    parts = OPTIMIZERS[name](weight_decay=0.05, gradient_accumulation_steps=3)
    for step in gradients:
        apply(whole, (step.mean(axis=0), one))
        for part in step:
            apply(parts, (part, three))
    np.testing.assert_allclose(one, three, rtol=1e-5)


def test_averages_with_accumulated_gradients_are_those_of_keras():
    options = {"gradient_accumulation_steps": 2, "use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    seen = []
    for make in (partial(keras.optimizers.SGD, learning_rate=1.0), SGD):
        w, optimizer = variable(), make(**options)
        for scale in range(9):
            apply(optimizer, (scale * np.array(ONES, "float32"), w))
            seen.append([w.numpy(), optimizer._model_variables_moving_average[0].numpy()])
    np.testing.assert_allclose(seen[:9], seen[9:], rtol=1e-6)


def test_weight_decay_and_what_is_excluded_from_it():
    decayed, by_name, by_variable = (keras.Variable([2.0], name=n) for n in ("kernel", "bias", "scale"))
    optimizer = SGD(weight_decay=0.004)
    optimizer.exclude_from_weight_decay(var_names=["bias"], var_list=[by_variable])
    apply(optimizer, *[([0.0], v) for v in (decayed, by_name, by_variable)])
    np.testing.assert_allclose([decayed.numpy(), by_name.numpy(), by_variable.numpy()], [[1.992], [2.0], [2.0]])


def test_callable_learning_rate():
    w, optimizer = variable(), SGD(learning_rate=lambda: 0.1)
    apply(optimizer, (ONES, w))
    np.testing.assert_allclose(w, [[0.9, 1.9], [2.9, 3.9]], rtol=1e-6)


def test_sparse_gradients_are_those_of_the_rows():
    dense, sparse = variable(), variable()
    slices = tf.IndexedSlices(tf.constant([[0.5, 0.5]]), tf.constant([1]), tf.constant([2, 2]))
    for made in ("neumann", "neumann_resets"):
        one, two = OPTIMIZERS[made](), OPTIMIZERS[made]()
        for _ in range(4):
            apply(one, ([[0.0, 0.0], [0.5, 0.5]], dense))
            two.apply_gradients([(slices, sparse)])
        np.testing.assert_allclose(sparse, dense, rtol=1e-6)


def test_plain_tensorflow_variables():
    w, plain = variable(), tf.Variable([[1.0, 2.0], [3.0, 4.0]])
    optimizer = kc.Neumann(0.1, warmup_steps=0)
    for _ in range(3):
        apply(optimizer, (ONES, w), (ONES, plain))
    np.testing.assert_allclose(w, plain)


@pytest.mark.parametrize("name", some(["neumann", "curveball", "hessian_free"], ["curveball"]))
def test_tensorflow_checkpoint(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = kc.curved(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
    model.compile(OPTIMIZERS[name](), "mse")
    x, y = np.random.random((2, 4, 2))
    model.train_on_batch(x, y)
    saved = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
    checkpoint = tf.train.Checkpoint(model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    model.train_on_batch(x, y)
    checkpoint.restore(path)
    for v, value in zip([*model.variables, *model.optimizer.variables], saved):
        np.testing.assert_array_equal(v.numpy(), value)


def test_without_curvature_it_is_nesterov_momentum():
    """The numbers of `sgd_test.py`, and Keras' own SGD to rounding."""
    gradient, first = np.arange(0.1, 1.05, 0.1, dtype="float32"), np.full(10, 0.01, "float32")
    options = {"alpha": 0.0, "beta": 0.0, "warmup_steps": 0}
    w, optimizer = variable(np.ones(10)), kc.Neumann(0.01, mu_start=0.0, mu_end=0.0, **options)
    apply(optimizer, (first, w))
    for step in range(5):
        golden = 0.9999 - step * 0.01 * gradient
        np.testing.assert_allclose(w, golden, rtol=5e-4, atol=5e-4)
        apply(optimizer, (gradient, w))
    ours, theirs = variable(np.ones(10)), variable(np.ones(10))
    one = kc.Neumann(0.01, mu_start=0.9, mu_end=0.9, **options)
    two = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
    for step in range(20):
        apply(one, (np.cos(step) * gradient, ours))
        apply(two, (np.cos(step) * gradient, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
