"""Which weights belong to which layer, by the names that a user knows the layers by."""

import collections
import itertools

import keras


def layers_of(model):
    """`{name: [indices]}`: for each layer with trainable weights their places among the trainable variables.

    Layers are those of the model and of the models in it, in the order of their first weight; what a layer is made of
    (the projections of attention, the cell of a recurrent layer) is part of it. A name that several layers have gets
    the names of their models put before it, `"encoder/dense"`, and where that is not enough a number after it,
    `"dense_2"`. Weights of no layer have the model's name. Every weight is in one layer.
    """
    places = {id(v): i for i, v in enumerate(model.trainable_variables)}
    found, taken = [], set()
    for path, layer in [*_leaves(model, ()), ((model.name,), model)]:
        own = [places[id(v)] for v in layer.trainable_variables if id(v) in places]
        own = [i for i in own if i not in taken]  # shared by two layers, they are the first one's
        taken |= set(own)
        if own:
            found.append((path, sorted(own)))
    often = collections.Counter(path[-1] for path, _ in found)
    found.sort(key=lambda item: item[1])
    names = [path[-1] if often[path[-1]] == 1 else "/".join(path) for path, _ in found]
    return dict(zip(_numbered(names), [own for _, own in found], strict=True))


def _numbered(names):
    """Names of which no two are equal: the second of a name gets `_2` or the first number that is free."""
    seen, taken = set(), set(names)
    for name in names:
        numbered = (f"{name}_{k}" for k in itertools.count(2))
        own = next(n for n in numbered if n not in taken) if name in seen else name
        seen.add(name)
        taken.add(own)
        yield own


def _leaves(model, path):
    """`(path, layer)` for the layers of a model that are no models."""
    for layer in model.layers:
        below = (*path, layer.name)
        if isinstance(layer, keras.Model):
            yield from _leaves(layer, below)
            # weights of its own, that none of its layers has
            yield below, layer
        else:
            yield below, layer
