"""Imports go down: no part of the package imports from a floor above its own, or from another part of its floor."""

import ast
import importlib
import pathlib
import sys

import pytest

import keras_curvature

ROOT = pathlib.Path(keras_curvature.__file__).parent
# Each part of the package, and the floor it stands on.
FLOORS = {
    "backend": 0,
    "keras_internals": 0,  # below all others, which see Keras' and TensorFlow's private names through it
    "typing": 0,
    "trees": 1, "replicas": 1, "component": 1,
    "operators": 2, "steps": 2,
    "linearization": 3, "solvers": 3,
    "optimizers": 4, "problems": 4,
    "training": 5,
    "monitor": 6,
    "callbacks": 7, "command_line": 7,
    "__init__": 8,
}  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py"))


def module_name(path):
    """`keras_curvature.solvers.base` for its path; a package's `__init__` is the package."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def part(module):
    """The part of the package that a module belongs to, a key of `FLOORS`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(path):
    """The modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in below}
    return {name for name in found if name.split(".")[0] == "keras_curvature"}


def test_every_part_stands_on_a_floor():
    assert {part(module) for module in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    own = part(module)
    for other in {part(name) for name in imported(MODULES[module])} - {own}:
        assert FLOORS[other] < FLOORS[own], f"{module} imports {other}, which is above it or beside it"


def test_no_import_is_cyclic():
    edges = {module: imported(path) - {module} for module, path in MODULES.items()}
    # a package's own __init__ gathers its files, and these do not look back
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a cycle: {' -> '.join([*open_[open_.index(module):], module])}"
        if module in done:
            return
        open_.append(module)
        for other in edges[module]:
            visit(other)
        open_.pop()
        done.add(module)

    for module in edges:
        visit(module)


def test_only_one_file_says_tf_distribute():
    says = {module_name(p) for p in FILES if "tf.distribute" in p.read_text()}
    assert says == {"keras_curvature.replicas"}


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_no_name_is_both_a_module_and_something_else(package):
    found = importlib.import_module(package)
    for module in (name for name in MODULES if name.rpartition(".")[0] == package):
        name = module.rpartition(".")[2]
        assert getattr(found, name, None) is sys.modules.get(module), f"{package}.{name}"
