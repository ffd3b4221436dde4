"""Permanent replacement of functions of Keras and TensorFlow, which acts only while the package asks for it.

    guard(owner, name, substitute)      from now on `owner.name(...)` is `substitute(original, ...)`

The substitute reads a `contextvars.ContextVar` and calls `original` unless the package has set the variable. A context
variable is local to a thread and restored by a token, so threads, nested contexts and exceptions do not affect each
other. The threads of replicas get the context of their caller; see `replicas.each`.

The attributes of Keras' objects are not changed either: `twin(layer, activation=None)` is another layer with the same
variables.
"""

import contextlib
import functools
import threading

_lock = threading.Lock()
_guards = {}


def guard(owner, name, substitute):
    """Replace `owner.name(...)` by `substitute(original, ...)`. A second call does nothing.

    Args:
        owner: A module or a class.
        name: The name of a function in it.
        substitute: A module-level function; there is one for each name.
    """
    if is_guarded(owner, name):  # the usual case
        return
    with _lock:
        if not is_guarded(owner, name):
            _replace(owner, name, _guarded(getattr(owner, name), substitute))


def guard_attribute(owner, name, substitute):
    """Let attribute `name` of instances of class `owner` read as `substitute(instance, value)`."""
    with _lock:
        if not is_guarded(owner, name):
            _replace(owner, name, _GuardedAttribute(name, substitute))


def is_guarded(owner, name):
    """Whether `owner.name` is replaced."""
    return (owner, name) in _guards


def guards():
    """`{(owner, name): replacement}` for all replaced names."""
    return dict(_guards)


@contextlib.contextmanager
def holding(variable, value):
    """A context in which a `contextvars.ContextVar` has this value in this thread; yields the value."""
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
    """A data descriptor for an attribute that is stored in the instance's `__dict__`."""

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
    """A shallow copy of a layer or loss, with the same variables and other `attributes`.

    It serves one call; attributes that the call sets on it do not reach the original. `copy.copy` would serialize the
    layer instead.
    """
    other = object.__new__(type(keras_object))
    vars(other).update(vars(keras_object), **attributes)
    return other
