"""The reasons for which weights have no Kronecker factors, for warnings."""

import keras

from keras_curvature import keras_internals
from keras_curvature.linearization.layers.kinds import known_class


def reasons(model, indices):
    """`[(path, reason)]` of some trainable variables of a model that have no block.

    Args:
        model: A built `keras.Model`.
        indices: Their indices in `model.trainable_variables`, the second result of `kronecker.blocks`.
    """
    users, cells = {}, {}
    for layer in keras_internals.layers_of(model):
        if isinstance(layer, keras.layers.RNN):
            cells[id(layer.cell)] = layer
        for v in keras_internals.own_weights(layer):
            users.setdefault(id(v), {})[id(layer)] = layer
    variables = [model.trainable_variables[i] for i in indices]
    return [(v.path, _reason(v, list(users.get(id(v), {}).values()), cells)) for v in variables]


def _reason(variable, layers, cells):
    if len(layers) > 1:
        return f"shared by the layers {' and '.join(repr(layer.name) for layer in layers)}"
    if not layers:
        return "belongs to no layer"
    (layer,) = layers
    if id(layer) in cells:
        return _of_recurrent(cells[id(layer)], layer)
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"quantized to {layer.quantization_mode}"
    known = known_class(layer)
    if known is None:
        kind = "no Kronecker factors for" if type(layer).__module__.startswith("keras.") else "custom layer of class"
        return f"{kind} `{type(layer).__name__}`"
    if type(layer).call is not known.call:
        return f"subclass `{type(layer).__name__}` with its own `call`"
    return _of_options(layer)


def _of_recurrent(layer, cell):
    if layer.zero_output_for_mask:
        return "recurrent layer with `zero_output_for_mask=True`"
    if getattr(cell, "recurrent_dropout", 0):
        return "recurrent layer with `recurrent_dropout`"
    if getattr(cell, "implementation", 2) != 2:
        return "recurrent layer with `implementation=1`"
    if getattr(cell, "reset_after", True) is False:
        return "recurrent kernel of a GRU with `reset_after=False`"
    return f"recurrent cell of class `{type(cell).__name__}`"


def _of_options(layer):
    for option in ("synchronized", "renorm", "rms_scaling"):
        if getattr(layer, option, False):
            return f"normalization with `{option}=True`"
    if isinstance(layer, keras.layers.EinsumDense):
        return f"`EinsumDense` whose equation {layer.equation!r} is not a matrix product"
    return f"no Kronecker factors for this use in `{type(layer).__name__}`"
