"""The weights of each layer, by the layer names that a user knows, and the choice of layers by name."""

import collections
import itertools
import re

import keras

from keras_curvature.component import check


def layers_of(model):
    """`{name: [indices]}`: the places of each layer's weights among the trainable variables.

    Layers are those of the model and of the models in it, in the order of their first weight. Parts of a layer (the
    projections of attention, the cell of a recurrent layer) count to the layer. Where several layers share a name, the
    names of their models come before it, `"encoder/dense"`, and where that is not enough a number follows, `"dense_2"`.
    Weights outside all layers get the model's name. Every weight is in exactly one layer.
    """
    places = {id(v): i for i, v in enumerate(model.trainable_variables)}
    found, taken = [], set()
    for path, layer in [*_leaves(model, ()), ((model.name,), model)]:
        own = [places[id(v)] for v in layer.trainable_variables if id(v) in places]
        own = [i for i in own if i not in taken]  # weights shared by two layers count to the first
        taken |= set(own)
        if own:
            found.append((path, sorted(own)))
    often = collections.Counter(path[-1] for path, _ in found)
    found.sort(key=lambda item: item[1])
    names = [path[-1] if often[path[-1]] == 1 else "/".join(path) for path, _ in found]
    return dict(zip(_numbered(names), [own for _, own in found], strict=True))


def check_layers(owner, layers):
    """Raise a `ValueError` in the name of `owner` unless `layers` are one or more names or regular expressions."""
    names = [layers] if isinstance(layers, str) else layers
    valid = isinstance(names, (list, tuple)) and len(names) > 0 and all(isinstance(name, str) for name in names)
    check(owner, "layers", layers, valid, "one or more names of layers, or regular expressions, or None")


def chosen(layers, known, argument="layers"):
    """The entries of `known`, `{name: indices}`, that names or regular expressions match.

    Raises:
        ValueError: An expression matches no layer; the message lists the layers.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in known):
            fault = _fault(pattern)
            no_layer = f"{pattern!r} matches no layer with trainable weights"
            what = f"{pattern!r} is no layer, and no valid regular expression: {fault}" if fault else no_layer
            raise ValueError(f"`{argument}`: {what}. The layers are: {', '.join(map(repr, known))}")
    return {name: own for name, own in known.items() if any(_matches(pattern, name) for pattern in patterns)}


def _matches(pattern, name):
    return pattern == name or (not _fault(pattern) and re.fullmatch(pattern, name) is not None)


def _fault(pattern):
    """What is wrong with a regular expression, in words; empty for a valid one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return ""


def _numbered(names):
    """Unique names: the second of a name gets `_2` or the first free number."""
    seen, taken = set(), set(names)
    for name in names:
        numbered = (f"{name}_{k}" for k in itertools.count(2))
        own = next(n for n in numbered if n not in taken) if name in seen else name
        seen.add(name)
        taken.add(own)
        yield own


def _leaves(model, path):
    """`(path, layer)` for the layers of a model that are not models."""
    for layer in model.layers:
        below = (*path, layer.name)
        if isinstance(layer, keras.Model):
            yield from _leaves(layer, below)
            yield below, layer  # for weights of its own that none of its layers has
        else:
            yield below, layer
