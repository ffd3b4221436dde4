"""Functions of Keras and TensorFlow that the package computes otherwise: replaced once, for good, never put back.

    guard(owner, name, substitute)      from now on `owner.name(...)` is `substitute(original, ...)`

The substitute looks at a `contextvars.ContextVar` and calls `original` unless a function of the package has set it. A
context variable belongs to one thread and is restored by a token, so other threads, nested contexts and errors midway
cannot leave anything behind. The threads of replicas get the context of their caller; see `replicas.each`.

Nothing is written into objects of Keras, either: `twin(layer, activation=None)` is another layer with the same
variables.
"""

import contextlib
import functools
import threading

_lock = threading.Lock()
_guards = {}


def guard(owner, name, substitute):
    """Let `substitute(original, *args, **kwargs)` answer every call of `owner.name`; a second time nothing happens.

    Args:
        owner: A module or a class.
        name: The name of a function in it.
        substitute: A function at the top of a module, one for each name.
    """
    if is_guarded(owner, name):  # the usual case
        return
    with _lock:
        if not is_guarded(owner, name):
            _replace(owner, name, _guarded(getattr(owner, name), substitute))


def guard_attribute(owner, name, substitute):
    """Let `substitute(instance, value)` answer whenever attribute `name` of an instance of class `owner` is read."""
    with _lock:
        if not is_guarded(owner, name):
            _replace(owner, name, _GuardedAttribute(name, substitute))


def is_guarded(owner, name):
    """Whether `owner.name` has a substitute."""
    return (owner, name) in _guards


def guards():
    """`{(owner, name): what stands there}` for all names that have a substitute."""
    return dict(_guards)


@contextlib.contextmanager
def holding(variable, value):
    """While open, a `contextvars.ContextVar` has this value on this thread; yields the value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def _replace(owner, name, value):
    setattr(owner, name, value)
    _guards[owner, name] = value


def _guarded(original, substitute):
    @functools.wraps(original)  # Keras reads the signature
    def guarded(*args, **kwargs):
        return substitute(original, *args, **kwargs)

    return guarded


class _GuardedAttribute:
    """A data descriptor over the attribute of that name in the instance's own dictionary."""

    def __init__(self, name, substitute):
        self._name, self._substitute = name, substitute

    def __get__(self, instance, owner=None):
        if instance is None:
            return self
        if self._name not in vars(instance):
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self._name!r}")
        return self._substitute(instance, vars(instance)[self._name])

    def __set__(self, instance, value):
        vars(instance)[self._name] = value

    def __delete__(self, instance):
        vars(instance).pop(self._name, None)


def twin(keras_object, **attributes):
    """An object like `keras_object`, a layer or loss, with the same variables and settings but for `attributes`.

    Made for one call: what that call writes into the twin does not reach the original. `copy.copy` would serialize.
    """
    other = object.__new__(type(keras_object))
    vars(other).update(vars(keras_object), **attributes)
    return other
