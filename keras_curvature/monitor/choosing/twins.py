"""A second model of the same layers, weights and loss, so that the first stays as it is."""

import inspect

import keras

from keras_curvature import keras_internals
from keras_curvature.keras_internals import Functional
from keras_curvature.linearization.fisher import of_losses
from keras_curvature.linearization.pure.functional import build_for
from keras_curvature.training.models import CurvedMixin, curved, has_own_train_step


def twin_of(owner, model, batch):
    """A model of the same layers, weights and loss, without metrics; curved as the model is.

    Raises:
        ValueError: The model cannot be made again, or its `compile` takes arguments of its own, which are not known.
    """
    given = {**keras_internals.compiled_with(model), "optimizer": "sgd", "metrics": None, "weighted_metrics": None}
    named = inspect.signature(type(model).compile).parameters.values()
    known = {*given, "self", "auto_scale_loss"}  # the last decides nothing for the copy's loss
    unknown = [p.name for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in known]
    if unknown:
        raise ValueError(
            f"`{owner.__name__}` trains a copy of the model, and `{type(model).__name__}.compile` takes "
            f"`{unknown[0]}`, of which the copy knows nothing. Make it an argument of the constructor."
        )
    try:
        # layers of this process are trusted, and found by their name also where nobody registered them
        classes = {type(layer).__name__: type(layer) for layer in keras_internals.layers_of(model)}
        with keras.saving.custom_object_scope(classes), keras_internals.trusting():
            copy = _same_layers(model)
        copy = curved(copy, model.micro_batches) if isinstance(model, CurvedMixin) else copy
        copy.compile(**given)
        build_for(copy, *batch)
        for layer, twin in zip(keras_internals.layers_of(model), keras_internals.layers_of(copy), strict=True):
            twin.trainable = layer.trainable
        for weight, twin in zip(model.weights, copy.weights, strict=True):
            twin.trainable = weight.trainable
        copy.set_weights(model.get_weights())
    except Exception as error:
        raise ValueError(
            f"`{owner.__name__}` trains a copy of the model, and `{type(model).__name__}` cannot be made again from "
            f"its `get_config()`: {error}. Give the model, or the layer, a `get_config` with the arguments of its "
            "constructor."
        ) from error
    return copy


def _same_layers(model):
    """A new model of the same layers, built or not; from a graph each layer is made by its own class.

    Not by `clone_model(model)`, which copies what a compiled model was compiled with from serialized form: a loss that
    is a function of a notebook cannot be found again.
    """
    graph = keras_internals.functional_of(model) if isinstance(model, keras.Sequential) else model
    own = type(model).call not in (keras.Sequential.call, Functional.call) or of_losses.is_of_compute_loss(model)
    own = own or has_own_train_step(model)
    if not own and isinstance(graph, Functional):
        copy = keras.models.clone_model(keras.Model(graph.input, graph.output))
        if len(copy.weights) == len(model.weights):  # else a subclass has layers outside of the graph
            return copy
    return type(model).from_config(model.get_config())
