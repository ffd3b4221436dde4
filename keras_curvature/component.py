"""Components: frozen records of options (a solver, a damping, a line search) that Keras can save.

An optimizer takes components as arguments: `HessianFree(solver=ConjugateGradient(max_steps=50))`. A component holds
numbers and other components, never a tensor, a variable or a model, so its fields are its `get_config`.
"""

import dataclasses
import numbers
from typing import Self, TypeVar

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.typing import Config

Class = TypeVar("Class")


@dataclasses.dataclass(frozen=True)
class Component:
    """Base of the records. A subclass is a frozen dataclass that checks its fields in `__post_init__`.

    ```python
    @register
    @dataclasses.dataclass(frozen=True)
    class Halving(Component):
        factor: float = 0.5
    ```
    """

    def get_config(self) -> Config:
        """The fields, as given; nested components in Keras' serialized form."""
        return {field.name: serialize(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The component that `get_config` described."""
        return cls(**{name: deserialize(value) for name, value in config.items()})


def register(cls: type[Class]) -> type[Class]:
    """Make `cls` known to Keras' saving under the package's name, so that a saved file finds it again."""
    return keras.saving.register_keras_serializable(package="keras_curvature")(cls)


def serialize(value):
    """`value`, with components in the form that a Keras config holds."""
    return keras.saving.serialize_keras_object(value) if isinstance(value, Component) else value


def deserialize(value):
    """The inverse of `serialize`."""
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value


def check(owner, name, value, valid, expected):
    """Raise a `ValueError` in Keras' form unless `valid`.

    `owner` is the object, class or function that the argument belongs to, or the name of one on a floor above.
    """
    if not valid:
        owner = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
        remedy = f". Pass a number of Python, `{name}={value.item()!r}`" if isinstance(value, np.generic) else ""
        raise ValueError(f"`{owner}`: `{name}` must be {expected}. Received: {name}={value!r}{remedy}")


def is_number(value):
    """Whether `value` is a plain finite real number (an `int` or a `float`, not a `bool`)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def check_number(owner, name, value, low=None, high=None, open_low=False, open_high=False, or_none=False):
    """Check that the argument is a number in the given interval; the message contains it. `or_none`: or `None`."""
    left, right = "(" if open_low or low is None else "[", ")" if open_high or high is None else "]"
    bounds = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"
    valid = is_number(value)
    valid = valid and (low is None or (value > low if open_low else value >= low))
    valid = valid and (high is None or (value < high if open_high else value <= high))
    _check_or_none(owner, name, value, valid, f"a number in {bounds}", or_none)


def check_count(owner, name, value, low=1, or_none=False):
    """Check that the argument is an integer of at least `low`; with `or_none`, or `None`."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= low
    _check_or_none(owner, name, value, valid, f"an integer >= {low}", or_none)


def _check_or_none(owner, name, value, valid, expected, or_none):
    check(owner, name, value, valid or (or_none and value is None), f"{expected}, or None" if or_none else expected)


def check_choice(owner, name, value, choices, expected=None):
    """Check that the argument is one of some strings, integers or `None`; the message lists them, or is `expected`."""
    # only then compared: an array has no truth value, and a list cannot be looked up
    plain = value is None or isinstance(value, (str, int))
    words = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices]
    check(owner, name, value, plain and value in choices, expected or f"{', '.join(words[:-1])} or {words[-1]}")


def check_flag(owner, name, value):
    """Check that the argument is `True` or `False`."""
    check(owner, name, value, isinstance(value, bool), "True or False")


def check_part(owner, name, value, or_none=True):
    """Check that the argument is a part: a share (a float) or a number (an integer); with `or_none`, or `None`."""
    expected = "a share in (0, 1], an integer >= 1, or None" if or_none else "a share in (0, 1] or an integer >= 1"
    valid = is_number(value) and (0 < value <= 1 if isinstance(value, float) else value >= 1)
    check(owner, name, value, valid or (or_none and value is None), expected)


def check_scalar(owner, name, value, low=None, open_low=False, integer=False):
    """Check that the argument is a finite number of at least `low`, or a scalar tensor; a value not known passes.

    `open_low`: larger than `low`; `integer`: an integer.
    """
    kind, bound = "an integer" if integer else "a finite number", ">" if open_low else ">="
    limit = "" if low is None else f" {bound} {low}"
    known = _known_scalar(value, integer)
    valid = known is not None and (known is ... or (abs(known) < float("inf") and _is_above(known, low, open_low)))
    check(owner, name, value, valid, f"{kind}{limit}, or a scalar {'integer ' if integer else ''}tensor{limit}")


def _is_above(value, low, open_low):
    return low is None or (value > low if open_low else value >= low)


def _known_scalar(value, integer=False):
    """The value of a real number or scalar tensor; `...` for a tensor of unknown value, `None` for anything else."""
    if isinstance(value, numbers.Integral if integer else numbers.Real):
        return None if isinstance(value, bool) else value
    if not hasattr(value, "dtype"):
        return None
    dtype = tf.as_dtype(value.dtype)
    is_real = dtype.is_integer or (dtype.is_floating and not integer)
    if not is_real or tf.TensorShape(value.shape).rank not in (0, None):
        return None
    # of a variable nothing is read: in a graph that would be an operation
    found = tf.get_static_value(value) if isinstance(value, (tf.Tensor, np.ndarray)) else None
    return ... if found is None else found


def check_component(owner, name, value, method, examples):
    """Check that the argument is a component with `method`; the message shows how to write one."""
    valid = isinstance(value, Component) and hasattr(value, method)
    check(owner, name, value, valid, f"a component such as `{examples}`, already constructed")
