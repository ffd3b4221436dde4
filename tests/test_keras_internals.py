"""Every private name of Keras 3.15 that the package leans on: it is there, and does what the package takes it to do.

A failure here means that the installed Keras has moved on, and names the function of the package to look at.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import MODELS, OwnLoss, OwnLossOfOldSignature, Subclassed, SubclassedWithout, float64
from keras import layers
from keras.src.backend.tensorflow import nn as keras_nn
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.models.functional import Functional

from keras_curvature import Linearization
from keras_curvature.linearization.layers import taps
from keras_curvature.linearization.pure import differentiable, functional


def test_keras_is_the_version_that_the_private_names_were_read_in():
    assert keras.__version__.split(".")[:2] == ["3", "15"]
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
    layer = layers.Dense(2, dtype="mixed_float16")
    assert layer(X).dtype == tf.float16
    layer._dtype_policy = keras.DTypePolicy("float32")
    assert layer(X).dtype == tf.float32


def test_compiled_losses_say_how_they_are_reduced(model):
    functional.build_for(model, X, Y, None)
    assert [compiled.loss.reduction for compiled in model._compile_loss._flat_losses] == ["sum_over_batch_size"]


def test_call_has_training_arg():
    assert Subclassed()._call_has_training_arg is True
    assert SubclassedWithout()._call_has_training_arg is False
    assert keras.Sequential()._call_has_training_arg is True


@pytest.mark.parametrize("cls", [OwnLoss, OwnLossOfOldSignature])
def test_compute_loss_passes_training_to_those_who_take_it(cls):
    inputs = keras.Input((3,))
    model = cls(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    y = np.ones((4, 2), "float32")
    assert list(inspect.signature(model._compute_loss).parameters) == ["x", "y", "y_pred", "sample_weight", "training"]
    loss = model._compute_loss(x=X, y=y, y_pred=model(X), sample_weight=None, training=True)
    assert loss.shape == () and np.isfinite(loss)


def test_lazy_parts_are_built_by_symbolic_build(model):
    for part in (model._compile_loss, model._compile_metrics, model.optimizer):
        assert part is not None and part.built is False
    model._symbolic_build(data_batch=(X, Y, None))
    for part in (model._compile_loss, model._compile_metrics, model.optimizer):
        assert part.built is True


def test_build_for_does_nothing_a_second_time(model, monkeypatch):
    functional.build_for(model, X, Y, None)
    monkeypatch.setattr(type(model), "_symbolic_build", None)
    functional.build_for(model, X, Y, None)


def test_loss_tracker_is_the_mean_that_the_logs_show(model):
    model._symbolic_build(data_batch=(X, Y, None))
    model._loss_tracker.update_state(tf.constant(3.0), sample_weight=2)
    assert model.get_metrics_result()["loss"] == 3.0


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


def test_functional_is_the_class_behind_inputs_and_outputs():
    inputs = keras.Input((3,))
    assert isinstance(keras.Model(inputs, inputs), Functional)


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
    pairs = zip(differentiable._plain_moments(x, axes, keepdims), keras_nn._compute_moments(x, axes, keepdims))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, 1e-12)


@pytest.mark.parametrize("layer", [layers.BatchNormalization, layers.LayerNormalization, layers.GroupNormalization])
def test_normalization_layers_ask_for_their_moments_by_that_name(layer, monkeypatch):
    asked, original = [], keras_nn._compute_moments
    monkeypatch.setattr(keras_nn, "_compute_moments", lambda *args, **kw: asked.append(1) or original(*args, **kw))
    layer = layer(groups=2) if layer is layers.GroupNormalization else layer()
    layer(np.ones((4, 2), "float32"), training=True)
    assert asked


def test_the_replaced_functions_come_back():
    originals = keras_nn._compute_moments, keras_nn.max_pool, differentiable.keras_rnn.cudnn_ok
    with pytest.raises(ZeroDivisionError), differentiable.differentiable_keras(twice=True):
        assert keras_nn._compute_moments is differentiable._plain_moments
        raise ZeroDivisionError
    assert (keras_nn._compute_moments, keras_nn.max_pool, differentiable.keras_rnn.cudnn_ok) == originals


def test_max_pooling_layers_pool_by_that_name(monkeypatch):
    asked, original = [], keras_nn.max_pool
    monkeypatch.setattr(keras_nn, "max_pool", lambda *args, **kw: asked.append(kw or args) or original(*args, **kw))
    layers.MaxPooling2D()(np.ones((1, 4, 4, 1), "float32"))
    assert asked
    assert list(inspect.signature(original).parameters) == list(inspect.signature(differentiable._max_pool).parameters)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_leave_cudnn_aside_while_linearized(name, monkeypatch):
    # where a GPU is there Keras takes cuDNN's kernel, whose backward pass has no derivative
    def cudnn(*args, **kwargs):
        raise AssertionError("cuDNN was used")

    with float64():
        case = MODELS[name]().compile()
        functional.build_for(case.model, *case.batch)
        monkeypatch.setattr(differentiable.keras_rnn, "cudnn_ok", lambda *args, **kwargs: True)
        monkeypatch.setattr(differentiable.keras_rnn, f"_cudnn_{name}", cudnn)
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
    np.testing.assert_array_equal(y._keras_logits, z)
    # and it is these that the cross-entropy reads
    other = tf.constant([[0.2, 0.3, 0.5]])
    other._keras_logits = z
    crossentropy = {"softmax": keras.losses.categorical_crossentropy, "sigmoid": keras.losses.binary_crossentropy}
    target = tf.constant([[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        crossentropy[activation](target, other), crossentropy[activation](target, z, from_logits=True), 1e-6
    )


def test_outputs_carry_their_mask_and_the_loss_reads_it():
    y = layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0], [2, 2]]))
    np.testing.assert_array_equal(y._keras_mask, [[True, False], [True, True]])
    y_pred, loss = tf.constant([[1.0], [5.0]]), keras.losses.MeanSquaredError()
    y_pred._keras_mask = tf.constant([True, False])
    assert loss(tf.zeros((2, 1)), y_pred) == 1.0


# Of layers.


def test_dense_layers_apply_their_activation_in_call():
    layer = layers.Dense(2, activation="tanh")
    x = np.ones((4, 3), "float32")
    with taps.dense() as noted:
        y = layer(x)
    (tap,) = noted[0]
    np.testing.assert_allclose(tf.tanh(tap.said), y, 1e-6)
    np.testing.assert_allclose(tap.said, x @ layer.kernel.numpy() + layer.bias.numpy(), 1e-6)
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
    assert optimizer._get_variable_index(variable) == 0
    assert optimizer._var_key(variable) == optimizer._var_key(variable.value)
    assert [v is variable for v in optimizer._trainable_variables] == [True]
    optimizer.apply([tf.ones(2)])
    np.testing.assert_allclose(variable, [0.5, 1.5])
    assert optimizer._iterations is optimizer.iterations


def test_the_loss_scale_optimizer_of_mixed_float16():
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=8.0, dynamic_growth_steps=3)
    scaler.build([keras.Variable([1.0])])
    assert isinstance(scaler.inner_optimizer, keras.optimizers.SGD)
    assert scaler.dynamic_scale.value == 8 and scaler.step_counter.value == 0 and scaler.dynamic_growth_steps == 3
    assert keras.optimizers.SGD().loss_scale_factor is None


# Of TensorFlow.


def test_the_default_strategy_uses_no_merge_calls():
    assert tf.__internal__.distribute.strategy_supports_no_merge_call() is True
