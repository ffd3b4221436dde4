"""Private names of `keras.Model` and `keras.layers.Layer`."""

import keras
from keras.src.models.functional import Functional
from keras.src.saving.serialization_lib import SafeModeScope

__all__ = ["Functional"]


def layers_of(layer, include_self=True):
    """All layers of a model or layer, nested ones included, in Keras' order; a list."""
    return layer._flatten_layers(include_self=include_self)


def own_weights(layer):
    """The trainable variables that a layer itself created, without those of its sublayers, and also if frozen."""
    return layer._trainable_variables


def functional_of(sequential):
    """The functional model inside a `Sequential`; `None` before it is built, or where its layers do not allow one."""
    return sequential._functional


def made_by(tensor):
    """`(operation, its inputs)` of a symbolic tensor: the layer or operation that made it; an input has no inputs."""
    operation, node, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node].input_tensors


def takes_training(model):
    """Whether `model.call` takes the argument `training`."""
    return model._call_has_training_arg


def compute_loss(model, x, y, y_pred, sample_weight, training=True):
    """`model.compute_loss`, also if an overridden version does not take `training`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)


def is_built(model):
    """Whether the model, its loss, metrics and optimizer are all built."""
    parts = (model, model.optimizer, model._compile_loss, model._compile_metrics)
    return all(part is None or part.built for part in parts)


def build(model, batch):
    """Build the model, its loss, metrics and optimizer for a batch such as `(x, y)`, of arrays or specs."""
    model._symbolic_build(data_batch=batch)


def compiled_with(model):
    """The arguments that a model was compiled with, as they were given; a dict."""
    return dict(model._compile_config.config)


def trusting():
    """A context in which `from_config` also makes `Lambda` layers: for configs of objects of this process."""
    return SafeModeScope(False)


def is_under_strategy(model):
    """Whether the model was created in the scope of a distribution strategy."""
    return model._distribute_strategy is not None


def begin_at_epoch(model, epoch):
    """Let the running `fit` begin at this epoch; `None`: at its own `initial_epoch`."""
    model._initial_epoch = epoch


def unpickled(file):
    """The model from the file that Keras' `__reduce__` pickles."""
    return keras.Model._unpickle_model(file)


def loss_tracker(model):
    """The metric that tracks the loss of a compiled model, also if `metrics` is overridden."""
    return next(metric for metric in keras.Model.metrics.fget(model) if metric.name == "loss")
