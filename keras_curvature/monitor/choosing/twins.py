"""A second model of the same layers, weights and loss, so that the first stays as it is."""

import keras

from keras_curvature import keras_internals
from keras_curvature.keras_internals import Functional
from keras_curvature.linearization.fisher import of_losses
from keras_curvature.linearization.pure.functional import build_for
from keras_curvature.training.models import CurvedMixin, curved


def twin_of(owner, model, batch):
    """A model of the same layers, weights and loss, without metrics; curved as the model is."""
    try:
        copy = _same_layers(model)
        if isinstance(model, CurvedMixin):
            copy = curved(copy, model.micro_batches)
        for layer, twin in zip(keras_internals.layers_of(model), keras_internals.layers_of(copy), strict=True):
            twin.trainable = layer.trainable
        given = keras_internals.compiled_with(model)
        copy.compile(**{**given, "optimizer": "sgd", "metrics": None, "weighted_metrics": None})
        build_for(copy, *batch)
        copy.set_weights(model.get_weights())
    except Exception as error:
        raise ValueError(
            f"`{owner.__name__}` trains a copy of the model, and `{type(model).__name__}` cannot be copied from its "
            f"`get_config()`: {error}. Give the model, or the layer, a `get_config` with the arguments of its "
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
    own = own or type(model).train_step not in (keras.Model.train_step, CurvedMixin.train_step)
    if own or not isinstance(graph, Functional):
        return type(model).from_config(model.get_config())
    return keras.models.clone_model(keras.Model(graph.input, graph.output))
