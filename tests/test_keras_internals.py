"""Every private name of Keras that the package leans on: it is there, and does what the package takes it to do.

A failure here means that the installed Keras has moved on, and names the function of the package to look at.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import HAS_XLA, MODELS, OwnLoss, OwnLossOfOldSignature, Subclassed, SubclassedWithout, float64
from keras import layers
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

from keras_curvature import Linearization, keras_internals
from keras_curvature.keras_internals import replaced
from keras_curvature.linearization.layers import taps
from keras_curvature.linearization.pure import differentiable, functional, precision

pytestmark = pytest.mark.versions


def test_keras_is_a_version_that_the_private_names_were_read_in():
    assert (3, 10) <= tuple(int(n) for n in keras.__version__.split(".")[:2]) <= (3, 15)
    assert keras.backend.backend() == "tensorflow"


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


X, Y = np.ones((4, 3), "float32"), np.array([0, 1, 0, 1])


# Of a model.


@pytest.mark.parametrize("make", [lambda: layers.Dropout(0.5), lambda: layers.LSTM(2, dropout=0.5)])
def test_layers_keep_their_seeds_in_variables_of_one_name(make):
    layer = make()
    if not layer.built:
        layer.build((None, 3, 2))
    (state,) = functional.seeds(layer.non_trainable_variables)
    before = state.numpy()
    layer(np.ones((2, 3, 2), "float32"), training=True)
    assert tuple(state.shape) == (2,) and (state.numpy() != before).any()


def test_a_layer_computes_as_its_policy_says_that_stands_there_at_the_time():
    layer, plain = layers.Dense(2, dtype="mixed_float16"), layers.Dense(2, dtype="float64")
    with precision.without_half_precision():
        assert layer(X).dtype == layer.dtype_policy.name == "float32"
        assert plain(X).dtype == "float64"
    assert layer(X).dtype == "float16" and layer.dtype_policy.name == "mixed_float16"
    layer.dtype_policy = "mixed_bfloat16"
    assert layer(X).dtype == "bfloat16" and keras.layers.Dense.from_config(layer.get_config()).dtype_policy.name == (
        "mixed_bfloat16"
    )


def test_compiled_losses_say_how_they_are_reduced(model):
    assert keras_internals.losses_of(model) == []
    keras_internals.build(model, (X, Y))
    assert [loss.reduction for loss in keras_internals.losses_of(model)] == ["sum_over_batch_size"]


def test_takes_training():
    assert keras_internals.takes_training(Subclassed()) is True
    assert keras_internals.takes_training(SubclassedWithout()) is False
    assert keras_internals.takes_training(keras.Sequential()) is True


def test_functional_of_is_the_graph_inside_a_sequential():
    dense = layers.Dense(2)
    model = keras.Sequential([keras.Input((3,)), dense, layers.ReLU()])
    inside = keras_internals.functional_of(model)
    assert isinstance(inside, keras_internals.Functional) and dense in inside.layers
    assert [tuple(t.shape) for t in inside.outputs] == [(None, 2)]
    np.testing.assert_array_equal(inside(X), model(X))
    assert keras_internals.functional_of(keras.Sequential([layers.Dense(2)])) is None  # not built yet


def test_made_by_is_the_layer_or_operation_and_what_it_was_given():
    given, other = keras.Input((3,)), keras.Input((2,))
    dense = layers.Dense(2)
    first, second = dense(given), dense(keras.ops.exp(given))
    together = keras.ops.add(second, other)
    assert keras_internals.made_by(first)[0] is dense and keras_internals.made_by(first)[1][0] is given
    operation, inputs = keras_internals.made_by(together)
    assert not isinstance(operation, layers.Layer) and inputs[0] is second and inputs[1] is other
    layer, (between,) = keras_internals.made_by(second)  # of its two calls, the second
    assert layer is dense and keras_internals.made_by(between)[1][0] is given
    begin, nothing = keras_internals.made_by(given)
    assert isinstance(begin, layers.InputLayer) and list(nothing) == []


@pytest.mark.parametrize("cls", [OwnLoss, OwnLossOfOldSignature])
def test_compute_loss_passes_training_to_those_who_take_it(cls):
    inputs = keras.Input((3,))
    model = cls(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    y = np.ones((4, 2), "float32")
    assert list(inspect.signature(model._compute_loss).parameters) == ["x", "y", "y_pred", "sample_weight", "training"]
    loss = keras_internals.compute_loss(model, X, y, model(X), None, training=True)
    assert loss.shape == () and np.isfinite(loss)


@pytest.mark.parametrize("data", [(X, Y, None), (tf.TensorSpec((None, 3)), tf.TensorSpec((None,), tf.int64))])
def test_build_builds_all_parts(model, data):
    for part in (model._compile_loss, model._compile_metrics, model.optimizer):
        assert part is not None and part.built is False
    assert not keras_internals.is_built(model)
    keras_internals.build(model, data)
    for part in (model._compile_loss, model._compile_metrics, model.optimizer):
        assert part.built is True
    assert keras_internals.is_built(model)


def test_build_for_does_nothing_a_second_time(model, monkeypatch):
    functional.build_for(model, X, Y, None)
    monkeypatch.setattr(type(model), "_symbolic_build", None)
    functional.build_for(model, X, Y, None)


class OwnMetrics(keras.Sequential):
    """A model that hides Keras' metrics."""

    @property
    def metrics(self):
        """None."""
        return []


@pytest.mark.parametrize("cls", [keras.Sequential, OwnMetrics])
def test_loss_tracker_is_the_mean_that_the_logs_show(cls):
    model = cls([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "sparse_categorical_crossentropy")
    keras_internals.build(model, (X, Y))
    keras_internals.loss_tracker(model).update_state(tf.constant(3.0), sample_weight=2)
    assert model._loss_tracker.result() == 3.0
    assert model.get_metrics_result() == ({"loss": 3.0} if cls is keras.Sequential else {})


def test_layers_of_lists_every_depth_and_own_weights_one_layer_alone():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Dense(3, trainable=False)])
    model = keras.Sequential([inner, layers.Dense(2)])
    model.build((None, 3))
    assert keras_internals.layers_of(model)[0] is model
    below = keras_internals.layers_of(model, include_self=False)
    assert model not in below and set(below) >= {inner, *inner.layers, *model.layers}
    assert keras_internals.own_weights(inner) == []
    frozen = inner.layers[1]
    assert [v is w for v, w in zip(keras_internals.own_weights(frozen), (frozen.kernel, frozen.bias))] == [True, True]


def test_compiled_with_is_what_was_given(model):
    loss, optimizer = (lambda y, z: (y - z) ** 2), keras.optimizers.SGD(0.1)
    model.compile(optimizer, loss, loss_weights=0.5)
    found = keras_internals.compiled_with(model)
    assert found["loss"] is loss and found["optimizer"] is optimizer and found["loss_weights"] == 0.5
    model.compile(**{**found, "optimizer": "adam"})  # all of it is taken by `compile`


def test_trusting_makes_lambda_layers_and_ends():
    layer = keras.layers.Lambda(lambda x: 2 * x)

    def is_made():
        try:
            return float(keras.layers.Lambda.from_config(layer.get_config())(tf.constant(3.0))) == 6.0
        except ValueError:  # Keras 3.10 does not mind
            return False

    before = is_made()
    with keras_internals.trusting():
        assert is_made()
    assert is_made() == before == (keras_internals.KERAS < (3, 11))


def test_is_under_strategy(model):
    assert not keras_internals.is_under_strategy(model)
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        assert keras_internals.is_under_strategy(keras.Sequential())


def test_a_fit_goes_on_at_the_epoch_that_a_callback_sets(model):
    begin = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: keras_internals.begin_at_epoch(model, 3))
    assert model.fit(X, Y, epochs=4, verbose=0, callbacks=[begin]).epoch == [3]


@pytest.mark.parametrize("data", [X, (X,), (X, Y)])
def test_an_epoch_iterator_says_what_a_batch_is_like(data):
    cls, name = keras_internals.STEPS_OF_EPOCH
    x, y = (data, None) if data is X else (*data, None)[:2]
    iterator = cls(x=x, y=y, batch_size=2, distribute_strategy=tf.distribute.get_strategy())
    specs = tf.nest.flatten(keras_internals.batch_spec(iterator))
    assert [tuple(spec.shape) for spec in specs] == [(2, 3), (2,)][: len(specs)]
    seen = []
    steps = keras_internals.changed_steps(getattr(iterator, name)(), iterator, lambda s: seen.extend(s) or seen)
    assert [len(step) for step in steps] == [3 if keras_internals.HAS_LAST_STEPS else 2] * 2
    assert [step[:2] for step in seen] == [(0, 0), (1, 1)]
    assert inspect.isgeneratorfunction(inspect.unwrap(getattr(cls, name)))


def test_fit_makes_its_iterator_over_the_epochs_before_any_other(model):
    (cls, fit), (iterator, init) = keras_internals.FIT, keras_internals.NEW_ITERATOR
    assert iterator is keras_internals.STEPS_OF_EPOCH[0] and init == "__init__"
    source = inspect.getsource(inspect.unwrap(getattr(cls, fit)))
    assert 0 < source.index("epoch_iterator = TFEpochIterator(") < source.index("callbacks.on_train_begin()")


# Of losses.


def test_changed_losses_are_those_of_a_copy(model):
    keras_internals.build(model, (X, Y))
    (loss,) = keras_internals.losses_of(model)
    changed = keras_internals.changed_losses(model, lambda loss: lambda y, z, weight: 2.0 * loss(y, z, weight))
    np.testing.assert_allclose(changed(Y, model(X)), 2.0 * loss(Y, model(X)), 1e-6)
    assert keras_internals.losses_of(model) == [loss]


def test_losses_know_their_function_and_its_options():
    own = type("Own", (keras.losses.MeanSquaredError,), {"call": lambda self, y, z: z})()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1, axis=1)
    assert keras_internals.function_of(loss) is keras.losses.sparse_categorical_crossentropy
    assert keras_internals.function_of(own) is None and keras_internals.function_of(keras.losses.Loss()) is None
    assert keras_internals.options_of(loss) == {"from_logits": True, "ignore_class": 1, "axis": 1}
    assert keras_internals.options_of(keras.losses.Loss()) == {}
    assert "axis" not in loss.get_config()  # why the private name


@pytest.mark.parametrize("mask", [None, np.array([[True, False], [True, True]])])
def test_batch_moments_are_those_that_the_layer_normalizes_by(mask):
    layer, x = layers.BatchNormalization(momentum=0.0), np.random.default_rng(0).random((2, 2, 3)).astype("float32")
    layer(x, training=True, mask=mask)
    mean, variance = keras_internals.batch_moments(layer, tf.constant(x), mask)
    np.testing.assert_allclose(mean, layer.moving_mean, 1e-6)
    np.testing.assert_allclose(variance, layer.moving_variance, 1e-6)


def test_metrics_results_are_shown_only_where_the_names_agree(model):
    model.train_on_batch(X, Y)
    own = model.get_metrics_result()
    assert model._get_metrics_result_or_logs(dict.fromkeys(own, -1.0)) == own
    assert model._get_metrics_result_or_logs({"other": -1.0}) == {"other": -1.0}


def test_the_train_step_is_still_the_one_that_was_read():
    source = inspect.getsource(TensorFlowTrainer.train_step)
    for line in (
        "if self._call_has_training_arg:", "self(x, training=True)", "loss = self._compute_loss(",
        "self._loss_tracker.update_state(", "loss = self.optimizer.scale_loss(loss)", "return self.compute_metrics(",
    ):  # fmt: skip
        assert line in source, line


def test_a_model_is_pickled_as_the_bytes_of_its_file(model):
    _, (file,) = model.__reduce__()
    again = keras_internals.unpickled(file)
    assert type(again) is type(model)
    np.testing.assert_array_equal(again.get_weights()[0], model.get_weights()[0])


def test_functional_is_the_class_behind_inputs_and_outputs():
    inputs = keras.Input((3,))
    assert isinstance(keras.Model(inputs, layers.Dense(1)(inputs)), keras_internals.Functional)


def test_a_model_clears_its_train_function_by_none(model):
    model.make_train_function()
    model.train_function = None
    model.make_train_function()
    assert model.train_function is not None


def test_what_a_layer_assigns_in_a_stateless_scope_is_seen_by_identity():
    variable, value = keras.Variable([1.0]), tf.constant([2.0])
    with keras.StatelessScope(state_mapping=[(variable, value)]) as scope:
        assert scope.get_current_value(variable) is value
        variable.assign([3.0])
        assert scope.get_current_value(variable) is not value
    assert variable.numpy() == [1.0]


# Of the backend.


@pytest.mark.parametrize("keepdims", [False, True])
def test_moments_are_those_that_replace_them(keepdims):
    x, axes = tf.constant(np.random.default_rng(0).standard_normal((4, 3, 2))), [0, 1]
    module, name = replaced.MOMENTS
    pairs = zip(differentiable._plain_moments(x, axes, keepdims), getattr(module, name)(x, axes, keepdims))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, 1e-12)


@pytest.mark.parametrize("layer", [layers.BatchNormalization, layers.LayerNormalization, layers.GroupNormalization])
def test_normalization_layers_ask_for_their_moments_by_that_name(layer, monkeypatch):
    asked, original = [], getattr(*replaced.MOMENTS)
    monkeypatch.setattr(*replaced.MOMENTS, lambda *args, **kw: asked.append(1) or original(*args, **kw))
    layer = layer(groups=2) if layer is layers.GroupNormalization else layer()
    layer(np.ones((4, 2), "float32"), training=True)
    assert asked


def test_max_pooling_layers_pool_by_that_name(monkeypatch):
    asked, original = [], getattr(*replaced.MAX_POOL)
    monkeypatch.setattr(*replaced.MAX_POOL, lambda *args, **kw: asked.append(kw or args) or original(*args, **kw))
    layers.MaxPooling2D()(np.ones((1, 4, 4, 1), "float32"))
    assert asked
    ours = list(inspect.signature(differentiable._max_pool).parameters)
    assert ours == ["original", *inspect.signature(original).parameters]


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_leave_cudnn_aside_while_linearized(name, monkeypatch):
    # where a GPU is there Keras takes cuDNN's kernel, whose backward pass has no derivative
    def cudnn(*args, **kwargs):
        raise AssertionError("cuDNN was used")

    rnn, _ = replaced.CUDNN_OK
    with float64():
        case = MODELS[name]().compile()
        functional.build_for(case.model, *case.batch)
        monkeypatch.setattr(rnn, "_is_gpu_available", lambda: True)
        monkeypatch.setattr(rnn, f"_cudnn_{name}", cudnn)
        with pytest.raises(AssertionError, match="cuDNN was used"):
            case.model(case.x, training=True)
        lin = Linearization(case.model, *case.batch)
        product = lin.gauss_newton() @ lin.gradient
        assert all(np.isfinite(p).all() for p in product)
        lin.hessian(), lin.hidden_gauss_newton(), lin.loss_at(product), lin.gradient_at(product)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_outputs_carry_their_logits(activation):
    z = tf.constant([[1.0, -2.0, 0.5]])
    y = layers.Activation(activation)(z)
    np.testing.assert_array_equal(keras_internals.logits_of(y), z)
    assert set(keras_internals.carried(y)) == {keras_internals.LOGITS}
    # and it is these that the cross-entropy reads
    other = tf.constant([[0.2, 0.3, 0.5]])
    keras_internals.carry(other, {keras_internals.LOGITS: z})
    crossentropy = {"softmax": keras.losses.categorical_crossentropy, "sigmoid": keras.losses.binary_crossentropy}
    target = tf.constant([[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        crossentropy[activation](target, other), crossentropy[activation](target, z, from_logits=True), 1e-6
    )


def test_outputs_carry_their_mask_and_the_loss_reads_it():
    y = layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0], [2, 2]]))
    np.testing.assert_array_equal(keras_internals.carried(y)["_keras_mask"], [[True, False], [True, True]])
    assert keras_internals.logits_of(y) is None
    y_pred, loss = tf.constant([[1.0], [5.0]]), keras.losses.MeanSquaredError()
    keras_internals.carry(y_pred, {"_keras_mask": tf.constant([True, False])})
    np.testing.assert_allclose(loss(tf.zeros((2, 1)), y_pred), 1.0, rtol=1e-6)


# Of layers.


def test_dense_layers_apply_their_activation_in_call():
    layer = layers.Dense(2, activation="tanh")
    x = np.ones((4, 3), "float32")
    with taps.dense() as noted:
        y = layer(x)
    (tap,) = noted[0]
    np.testing.assert_allclose(tf.tanh(tap.pre_activation), y, 1e-6)
    np.testing.assert_allclose(tap.pre_activation, x @ layer.kernel.numpy() + layer.bias.numpy(), 1e-6)
    assert layer.activation is keras.activations.tanh
    assert layers.Dense.call.__module__.startswith("keras")


@pytest.mark.parametrize("cls", [layers.SimpleRNN, layers.LSTM, layers.GRU])
def test_recurrent_layers_have_an_inner_loop_that_returns_last_and_sequence(cls):
    assert callable(cls.inner_loop)
    layer = cls(2)
    with taps.hidden_states() as noted:
        y = layer(np.ones((4, 3, 2), "float32"))
    (sequence,) = noted[0]
    assert sequence.shape == (4, 3, 2)
    np.testing.assert_array_equal(sequence[:, -1], y)
    assert layer.return_sequences is False


def test_variables_know_their_regularizer():
    layer = layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1))
    layer.build((None, 3))
    assert layer.kernel.regularizer.l2 == pytest.approx(0.1)
    assert layer.bias.regularizer is None


# Of optimizers.


def test_optimizers_hand_all_variables_to_one_update_of_the_backend():
    optimizer, variable = keras.optimizers.SGD(0.5), keras.Variable([1.0, 2.0])
    optimizer.build([variable])
    pairs = [(tf.ones(2), variable.value)]
    ((gradient, _),) = optimizer._all_reduce_sum_gradients(pairs)
    np.testing.assert_array_equal(gradient, np.ones(2))
    parameters = inspect.signature(optimizer._distributed_tf_update_step).parameters
    assert list(parameters) == ["distribution", "grads_and_vars", "learning_rate"]
    optimizer.apply([tf.ones(2)])
    np.testing.assert_allclose(variable, [0.5, 1.5])


def test_optimizers_know_their_variables_by_place_and_key():
    optimizer, first, second = keras.optimizers.SGD(0.5), keras.Variable([1.0]), keras.Variable([2.0])
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        elsewhere = keras.optimizers.SGD()
    optimizer.build([first, second])
    assert keras_internals.places_of(optimizer, [second, first]) == [1, 0]
    one, two = keras_internals.keys_of(optimizer, [first, second])
    assert one != two and keras_internals.keys_of(optimizer, [first.value]) == [one]
    assert [v is w for v, w in zip(keras_internals.trained_by(optimizer), (first, second))] == [True, True]
    assert keras_internals.strategy_of(optimizer) is tf.distribute.get_strategy()
    assert keras_internals.strategy_of(elsewhere) is not tf.distribute.get_strategy()


STATES = [
    (keras.optimizers.Adam(amsgrad=True), ["velocities", "velocity_hats"]),
    (keras.optimizers.Nadam(), ["velocities", "u_product"]),
    (keras.optimizers.Adamax(), ["u"]),
    (keras.optimizers.RMSprop(centered=True), ["velocities", "average_gradients"]),
    (keras.optimizers.Adagrad(), ["accumulators"]),
    (keras.optimizers.Adadelta(), ["accumulated_grads", "accumulated_delta_vars"]),
]


@pytest.mark.parametrize("optimizer, roles", STATES, ids=lambda value: getattr(value, "name", None))
def test_optimizers_keep_their_state_by_role(optimizer, roles):
    optimizer.build([keras.Variable([1.0, 2.0])])
    for role in roles:
        kept = keras_internals.state(optimizer, role)
        assert kept.shape == () if role == "u_product" else [v.shape for v in kept] == [(2,)]
    assert keras_internals.state(optimizer, "nothing of the kind") is None


def test_the_loss_scale_optimizer_of_mixed_float16():
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=8.0, dynamic_growth_steps=3)
    scaler.build([keras.Variable([1.0])])
    assert isinstance(scaler.inner_optimizer, keras.optimizers.SGD)
    assert scaler.dynamic_scale.value == 8 and scaler.step_counter.value == 0 and scaler.dynamic_growth_steps == 3
    assert keras.optimizers.SGD().loss_scale_factor is None


def test_decays():
    optimizer, first, second = keras.optimizers.SGD(0.5, weight_decay=0.1), keras.Variable([1.0]), keras.Variable([2.0])
    optimizer.build([first, second])
    optimizer.exclude_from_weight_decay(var_list=[second])
    assert keras_internals.decays(optimizer, first) is True and keras_internals.decays(optimizer, second) is False


# Of TensorFlow.


def test_the_default_strategy_uses_no_merge_calls():
    assert keras_internals.uses_merge_calls() is False
    assert keras_internals.has_several_workers(tf.distribute.MultiWorkerMirroredStrategy()) is False


def test_static_shape_keeps_what_is_known():
    @tf.function(input_signature=[tf.TensorSpec((None, 2))])
    def run(x):
        assert keras_internals.static_shape(tf.shape(x)).as_list() == [None, 2]
        return x

    run(tf.zeros((3, 2)))


def test_is_continuous():
    assert keras_internals.is_continuous("ResizeBilinearGrad") and keras_internals.is_continuous("StopGradient")
    assert not keras_internals.is_continuous("Shape") and not keras_internals.is_continuous("Less")


@pytest.mark.parametrize("compiled", [True, False] if HAS_XLA else [False])
def test_is_compiled(compiled):
    @tf.function(jit_compile=compiled)
    def run(x):
        assert keras_internals.is_compiled() is compiled
        return x

    run(tf.zeros(2))
