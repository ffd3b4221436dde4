"""The state of an optimizer in a file: its variables in order, and the name of the class that they belong to."""

import keras
import numpy as np

# The entry that holds the name, as bytes; the variables are under their numbers, as in Keras' files.
OWNER = "owner"


class StoredState:
    """What a file holds of one optimizer.

    A plain object, so that Keras' saving does not look for variables in it.

    Attributes:
        owner: The registered name of the class that saved it; `None` in files that do not say so, such as those of
            Keras' own optimizers.
        values: The variables' values in order, NumPy arrays.
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
        """Why this is the state of another class than `cls`, in words; `None` if it may be the state of `cls`."""
        if self.owner is not None:
            same = self.owner == owner_name(cls)
            return None if same else f"the saved optimizer is `{self.owner}` and this one is `{owner_name(cls)}`"
        # Files of earlier versions do not name the class, but count skipped steps: the one integer besides iterations.
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
