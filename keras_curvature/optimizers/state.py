"""Saving and loading of optimizers: the config, and the state together with the name of its class."""

import inspect
import warnings
from typing import Any, ClassVar, Self

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import component
from keras_curvature.optimizers.averages import AveragedWeights
from keras_curvature.typing import Config, LearningRate

# The entry that holds the class name, as bytes. As in Keras' files, the variables' entries are named by their numbers.
OWNER = "owner"


class StoredState:
    """The state of one optimizer in a file.

    A plain object, so that Keras' saving does not look for variables in it.

    Attributes:
        owner: The registered name of the class that saved it; `None` if the file does not name the class, as files of
            Keras' own optimizers.
        values: The values of the variables in order, a list of NumPy arrays.
    """

    def __init__(self, owner=None, values=()):
        self.owner, self.values = owner, list(values)

    @classmethod
    def of(cls, store):
        """Read the state from the store that Keras passes to `load_own_variables`."""
        entries = {key: store[key] for key in store.keys()}  # noqa: SIM118, an h5 entry is no dict
        owner = entries.pop(OWNER, None)
        owner = None if owner is None else np.asarray(owner).astype(np.uint8).tobytes().decode()
        return cls(owner, [np.asarray(entries[str(i)]) for i in range(len(entries)) if str(i) in entries])

    def write(self, store):
        """Write the state to the store that Keras passes to `save_own_variables`."""
        for i, value in enumerate(self.values):
            store[str(i)] = value
        if self.owner is not None:
            store[OWNER] = np.frombuffer(self.owner.encode(), np.uint8)

    def foreign_to(self, cls):
        """Why this is not the state of a `cls`, in words; `None` if it may be."""
        if self.owner is not None:
            same = self.owner == owner_name(cls)
            return None if same else f"the saved optimizer is `{self.owner}` and this one is `{owner_name(cls)}`"
        # Files of earlier versions do not name the class. They have a second integer: the number of skipped steps.
        if any(_is_integer(value.dtype) for value in self.values[1:]):
            return None
        return f"the saved optimizer, with {len(self.values)} variables, is not a `{owner_name(cls)}`"

    def mismatch(self, variables):
        """The first difference from `variables`, in words; `None` if every value fits its variable."""
        if len(self.values) != len(variables):
            return f"it has {len(variables)} variables whereas the saved optimizer has {len(self.values)} variables"
        for i, (variable, value) in enumerate(zip(variables, self.values)):
            if tuple(variable.shape) != value.shape or _is_integer(variable.dtype) != _is_integer(value.dtype):
                return (
                    f"its variable {i} `{variable.name}` has shape {tuple(variable.shape)} and dtype {variable.dtype}, "
                    f"and the saved one has shape {value.shape} and dtype {value.dtype}"
                )
        return None


def owner_name(cls):
    """The name under which Keras saves an optimizer class."""
    return keras.saving.get_registered_name(cls)


def _is_integer(dtype):
    return "int" in str(dtype)


class SavedOptimizer(AveragedWeights):
    """The part of `CurvatureOptimizer` that Keras calls to save and load.

    Attributes:
        later: Names of variables that files of earlier versions lack, one variable each, in the order of their coming.
            They keep their values when such a file is loaded.
    """

    later: ClassVar[tuple[str, ...]] = ()

    def __init__(self, learning_rate: LearningRate, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self._waiting = StoredState()  # loaded, but not assigned before `build`
        self._unbuilt_count = len(self.variables)  # iterations, and a learning rate that is no schedule

    def load_own_variables(self, store: Any) -> None:
        """Load the state; before `build`, keep it and assign it in `build`.

        The state of another optimizer, or of one with other settings, is skipped as a whole, with Keras' warning.
        """
        stored = StoredState.of(store)
        foreign = stored.foreign_to(type(self))
        if foreign is not None:
            self._skip(foreign)
        elif self.built:
            self._take_over(stored)
        else:
            self._waiting = stored

    def _load_waiting(self):
        """Assign the state that was loaded before `build`."""
        waiting, self._waiting = self._waiting, StoredState()
        with tf.init_scope():
            self._take_over(waiting)

    def _take_over(self, stored):
        """Assign a stored state to the variables; if it does not fit, assign nothing and warn."""
        if not stored.values:
            return
        variables = self.variables
        lacking = len(variables) - len(stored.values)
        if stored.owner is not None and len(stored.values) <= self._unbuilt_count:
            variables = variables[: len(stored.values)]  # saved before the first step
        elif 0 < lacking <= len(self.later):
            variables = [variable for variable in variables if variable.name not in self.later[-lacking:]]
        problem = stored.mismatch(variables)
        if problem is not None:
            self._skip(problem)
            return
        for variable, value in zip(variables, stored.values):
            variable.assign(value)

    def _skip(self, problem):
        warnings.warn(
            f"Skipping variable loading for optimizer '{self.name}', because {problem}. `{type(self).__name__}` keeps "
            "the state it has; the weights of the model are loaded as usual. To continue a run, compile with the class "
            "and the arguments of the optimizer that was saved.",
            stacklevel=3,
        )

    def save_own_variables(self, store: Any) -> None:
        """Save the state; before `build`, save the state that was loaded."""
        if self._waiting.values:
            self._waiting.write(store)
        else:
            StoredState(owner_name(type(self)), [variable.numpy() for variable in self.variables]).write(store)

    def get_config(self) -> Config:
        """Keras' config and the arguments of `__init__`, with components in serialized form."""
        config = super().get_config()
        for name in inspect.signature(type(self).__init__).parameters:
            if name not in ("self", "kwargs", "learning_rate"):
                config[name] = component.serialize(getattr(self, name))
        return config

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict[str, Any] | None = None) -> Self:
        """A new optimizer from a config, without the state."""
        own = inspect.signature(cls.__init__).parameters
        config = {k: component.deserialize(v) if k in own and k != "learning_rate" else v for k, v in config.items()}
        return super().from_config(config, custom_objects)
