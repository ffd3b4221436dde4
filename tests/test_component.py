"""Frozen records of choices: Keras saves them, and they say what is wrong with an argument and what came."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from keras_curvature import ArmijoLineSearch, ConjugateGradient, ConstantDamping, LevenbergMarquardt, NeumannSeries
from keras_curvature.component import Component, check_component, check_count, check_number, is_number, register

COMPONENTS = {
    "conjugate_gradient": ConjugateGradient(max_steps=7, progress_tolerance=0.0, residual_tolerance=0.1, truncate=True),
    "neumann_series": NeumannSeries(steps=3, rate=0.5),
    "constant_damping": ConstantDamping(0.25),
    "levenberg_marquardt": LevenbergMarquardt(2.0, decay=0.5, low=0.1, high=0.9, every=2, minimum=1e-6),
    "armijo": ArmijoLineSearch(slope=0.1, shrink=0.5, max_steps=3),
}
BAD = [
    (ConjugateGradient, "max_steps", 0), (ConjugateGradient, "max_steps", 2.5), (ConjugateGradient, "max_steps", True),
    (ConjugateGradient, "progress_tolerance", -1e-3), (ConjugateGradient, "residual_tolerance", "small"),
    (ConjugateGradient, "truncate", 1),
    (NeumannSeries, "steps", 0), (NeumannSeries, "rate", 0.0), (NeumannSeries, "rate", None),
    (ConstantDamping, "initial", -1.0), (ConstantDamping, "initial", float("inf")),
    (LevenbergMarquardt, "initial", 0.0), (LevenbergMarquardt, "initial", float("nan")),
    (LevenbergMarquardt, "decay", 1.0), (LevenbergMarquardt, "decay", 0), (LevenbergMarquardt, "every", 0),
    (LevenbergMarquardt, "low", 2.0), (LevenbergMarquardt, "high", "much"), (LevenbergMarquardt, "minimum", -1e-9),
    (ArmijoLineSearch, "slope", 0.0), (ArmijoLineSearch, "slope", 1), (ArmijoLineSearch, "shrink", 1.0),
    (ArmijoLineSearch, "max_steps", -1),
]  # fmt: skip


@pytest.mark.parametrize("name", COMPONENTS)
def test_round_trip_through_keras(name):
    component = COMPONENTS[name]
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(component)))
    assert config["registered_name"] == f"keras_curvature>{type(component).__name__}"
    again = keras.saving.deserialize_keras_object(config)
    assert again == component and type(again) is type(component)
    assert type(component).from_config(component.get_config()) == component
    assert component != type(component)()  # every field of the example is off its default


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_are_frozen_and_hashable(name):
    component = COMPONENTS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(component, dataclasses.fields(component)[0].name, 1)
    assert hash(component) == hash(dataclasses.replace(component))
    assert type(component).__name__ in repr(component)


@pytest.mark.parametrize("cls, name, value", BAD, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_a_bad_argument_is_named_with_what_came(cls, name, value):
    with pytest.raises(ValueError) as raised:
        cls(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"`{cls.__name__}`: `{name}` must be ")
    assert message.endswith(f"Received: {name}={value!r}")


def test_intervals_are_spelled_out():
    owner = ConstantDamping()
    with pytest.raises(ValueError, match=r"`a` must be a number in \[0, 1\)"):
        check_number(owner, "a", 1, low=0, high=1, open_high=True)
    with pytest.raises(ValueError, match=r"`a` must be a number in \(0, inf\)"):
        check_number(owner, "a", 0, low=0, open_low=True)
    with pytest.raises(ValueError, match=r"`n` must be an integer >= 3"):
        check_count(owner, "n", 2, low=3)


def test_numbers():
    assert is_number(1) and is_number(-0.5)
    assert not any(is_number(v) for v in (True, None, "1", float("nan"), float("inf"), 1j))


@pytest.mark.parametrize("value", [ConjugateGradient, "cg", None, ConstantDamping()])
def test_a_component_is_wanted_already_constructed(value):
    with pytest.raises(ValueError, match=r"`solver` must be a component such as `ConjugateGradient\(\)`, already"):
        check_component(ConstantDamping(), "solver", value, "solve", "ConjugateGradient()")


@register
@dataclasses.dataclass(frozen=True)
class Pair(Component):
    """A component that holds another."""

    damping: Component = ConstantDamping(1.0)
    factor: float = 2.0


def test_components_hold_components():
    pair = Pair(damping=LevenbergMarquardt(3.0))
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(pair)))
    assert keras.saving.deserialize_keras_object(config) == pair


def test_numbers_of_numpy_are_refused_with_what_to_write():
    """A config holds plain values, and `isinstance(np.int64(2), int)` is false."""
    with pytest.raises(ValueError, match=r"Received: max_steps=np.int64\(5\). Pass a number of Python, `max_steps=5`$"):
        ConjugateGradient(max_steps=np.int64(5))
    with pytest.raises(ValueError, match=r"`beta_1=0.5`$"):
        check_number("SOAP", "beta_1", np.float32(0.5), low=0.6)
