"""Checks of the arguments of a `Linearization` that are not kept in one of its parts."""

import numbers

import keras

from keras_curvature.component import check, check_count, check_flag, check_scalar
from keras_curvature.linearization.needs import Needs


def check_plain(owner, x, needs, loss_scale, micro_batches, training):
    """Refuse arguments that can be judged without the model's weights."""
    _check_inputs(owner, x)
    check(owner, "needs", needs, isinstance(needs, Needs), "a `Needs`, such as `Needs(hessian=True)`")
    if loss_scale is not None:
        check_scalar(owner, "loss_scale", loss_scale, low=0, open_low=True)
    check_count(owner, "micro_batches", micro_batches)
    check_flag(owner, "training", training)


def _check_inputs(owner, x):
    """Refuse inputs without a tensor, and numbers that are no tensor: they have no first axis to count examples by."""
    leaves = [a for a in keras.tree.flatten(x) if a is not None]
    plain = [a for a in leaves if isinstance(a, (str, bytes, numbers.Number)) and not hasattr(a, "shape")]
    if plain or not leaves:
        received = f"{type(plain[0]).__name__} {plain[0]!r}" if plain else repr(x)
        raise ValueError(
            f"`{owner.__name__}`: `x` must be the inputs of a batch, tensors or arrays with the examples as their "
            f"first axis. Received: {received}{' in `x`. Convert lists by `np.asarray`' if plain else ''}"
        )


def changed(owner, now, changes):
    """The arguments `now` with some `changes`; refused if they have other names, or a `batch` of another form."""
    for name, value in changes.items():
        if name not in now:
            choices = ", ".join(f"`{choice}`" for choice in now)
            raise ValueError(
                f"`{owner.__name__}` has no argument `{name}`. Received: {name}={value!r}. It takes {choices}."
            )
    found = {**now, **changes}
    batch = found["batch"]
    valid = isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 3
    check(owner, "batch", batch, valid, "`(x, y, sample_weight)`, of which the last two are optional")
    return found
