"""No file but `keras_internals` uses a private name of Keras or TensorFlow; its tables list what it uses."""

import ast
import importlib
import inspect
import pathlib
import re

import keras
import pytest

import keras_curvature
from keras_curvature import keras_internals
from keras_curvature.keras_internals import replaced
from keras_curvature.training.models import CurvedMixin

pytestmark = pytest.mark.versions
ROOT = pathlib.Path(keras_curvature.__file__).parent
FILES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
OTHERS = [name for name in FILES if not name.startswith("keras_internals")]
PRIVATE_MODULES = ("keras.src", "tensorflow.python", "tensorflow.compiler")
# Methods of Keras' that a class of ours overrides, and the parameters that it counts on.
OVERRIDDEN = {
    (keras.Model, "_maybe_symbolic_build"): ["self", "iterator", "data_batch"],
    (keras.Model, "_make_function"): ["self", "step_function"],
    (keras.Model, "_get_metrics_result_or_logs"): ["self", "logs"],
    (keras.optimizers.Optimizer, "_clip_gradients"): ["self", "grads"],
    (keras.optimizers.Optimizer, "_apply_weight_decay"): ["self", "variables"],
    (keras.optimizers.Optimizer, "_distributed_tf_update_step"): [
        "self", "distribution", "grads_and_vars", "learning_rate",
    ],
    (keras.optimizers.Optimizer, "_update_model_variables_moving_average"): ["self", "trainable_variables"],
    (keras.optimizers.Optimizer, "_overwrite_model_variables_with_average_value"): ["self", "trainable_variables"],
}  # fmt: skip


def is_private(name):
    """Whether a name begins with an underscore and is not one of Python's, such as those of named tuples."""
    return name.startswith("_") and not name.endswith("__") and name not in ("_replace", "_fields", "_asdict")


def defined(tree):
    """The private names that a file gives to functions, variables, attributes and fields of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # of `object.__setattr__`, `__dict__`
            yield node.value


OURS = {name for name in (name for file in OTHERS for name in defined(FILES[file])) if is_private(name)}


@pytest.mark.parametrize("file", OTHERS)
def test_private_names_are_our_own(file):
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Attribute):
            assert node.attr != "__internal__", f"{file}:{node.lineno}"
            assert not is_private(node.attr) or node.attr in OURS, f"{file}:{node.lineno}: {node.attr}"
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(module.startswith(PRIVATE_MODULES) for module in modules), f"{file}:{node.lineno}"


MADE = [keras.Sequential(), keras.layers.Dense(1), keras.optimizers.SGD(), keras.callbacks.Callback()]


def of_keras_kind():
    """`(an instance of Keras' own class, a class of ours that Keras calls in its place, the private names in ours)`."""
    for file in OTHERS:
        module = importlib.import_module("keras_curvature." + file[:-3].replace("/", ".").removesuffix(".__init__"))
        for node in (node for node in FILES[file].body if isinstance(node, ast.ClassDef)):
            cls, names = getattr(module, node.name), {name for name in defined(node) if is_private(name)}
            if issubclass(cls, CurvedMixin) or cls in CurvedMixin.__mro__:
                yield MADE[0], cls, names
            for kind in (keras.layers.Layer, keras.optimizers.Optimizer, keras.callbacks.Callback):
                if issubclass(cls, kind):
                    yield next(made for made in MADE if isinstance(made, kind)), cls, names


def test_what_keras_defines_too_is_known_to_be_overridden():
    found = {}
    for made, cls, names in of_keras_kind():
        for name in names & {*dir(made)}:
            found.setdefault(name, []).append(cls)
    assert set(found) == {name for _, name in OVERRIDDEN}, found


@pytest.mark.parametrize("cls, name", OVERRIDDEN, ids=lambda value: getattr(value, "__name__", value))
def test_overridden_methods_take_what_ours_take(cls, name):
    assert list(inspect.signature(getattr(cls, name)).parameters) == OVERRIDDEN[cls, name]
    assert f".{name}`" in keras_internals.__doc__


def test_the_tables_name_every_function_and_constant():
    for name in keras_internals.__all__:
        documented = keras_internals.__doc__ + replaced.__doc__
        assert re.search(rf"\b{name}\b", documented), name
    for name in vars(replaced):
        assert not name.isupper() or f"`{name}`" in replaced.__doc__, name
