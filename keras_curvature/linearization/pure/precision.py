"""Full precision for models whose layers compute in half precision, while they are measured."""

import contextlib
import contextvars

import keras

from keras_curvature import keras_internals
from keras_curvature.keras_internals import replaced

_full = contextvars.ContextVar("without_half_precision", default=False)


@contextlib.contextmanager
def without_half_precision():
    """While open, layers that keep float32 weights and compute in half precision compute in float32."""
    keras_internals.guard_attribute(*replaced.DTYPE_POLICY, _policy)
    with keras_internals.holding(_full, True):
        yield


def _policy(layer, policy):
    """The dtype policy that a layer goes by now."""
    if not _full.get():
        return policy
    own = policy[layer.path] if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and layer.path else policy
    halves = own.variable_dtype == "float32" and own.compute_dtype in ("float16", "bfloat16")
    return keras.DTypePolicy("float32") if halves else policy
