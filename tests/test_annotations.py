"""Types: every public signature has them, and mypy reads them as a user's type checker would."""

import dataclasses
import inspect
import os
import pathlib
import subprocess
import sys
import types

import pytest

import keras_curvature as kc
from keras_curvature import callbacks, likelihoods, operators, optimizers, problems, solvers, steps

PACKAGE = pathlib.Path(kc.__file__).parent
TESTS = pathlib.Path(__file__).parent
MODULES = [kc, callbacks, likelihoods, operators, optimizers, problems, solvers, steps]
# operators of Python that a class gives a meaning of its own
OPERATORS = {"__init__", "__call__", "__matmul__", "__add__", "__radd__", "__mul__", "__rmul__"}
# what the functions return; a user has them in his hands too
RETURNED = [kc.monitor.matrix.Curvature, kc.monitor.noise.noise.Noise, kc.monitor.spectra.density.Density,
            kc.monitor.report.landscape.Landscape, kc.monitor.report.reporting.Report, kc.monitor.stability.Stability,
            kc.linearization.gauss_newton.GaussNewton, kc.linearization.gradients.Gradients,
            solvers.krylov.Eigenpairs, optimizers.limits.LinearStep, optimizers.limits.Rule]  # fmt: skip
# `(line of a program, the argument or name that mypy must complain about)`
MISTAKES = [
    ('kc.Neumann(warmup_steps="many")', "warmup_steps"),
    ("kc.Neumann(reset_every=2.5)", "reset_every"),
    ("kc.KFAC(damping=None)", "damping"),
    ('kc.KFAC(fisher="sample")', "fisher"),
    ("kc.CurveBall(damping=kc.ConjugateGradient())", "damping"),
    ("kc.HessianFree(solver=kc.NeumannSeries())", "solver"),
    ("kc.Shampoo(root=0.5)", "root"),
    ('kc.curved(model, micro_batches="4")', "curved"),
    ('kc.curvature(model, data, kind="gauss_newton")', "kind"),
    ("kc.curvature(model, data).tops(3)", "tops"),
    ("kc.ConjugateGradient(max_steps=0.5)", "ConjugateGradient"),
    ("kc.Identity() + 0.1", "Unsupported operand"),
    ("kc.callbacks.Checkpoint(3)", "Checkpoint"),
    ("kc.problems.get(3)", "get"),
    ("kc.Adam(0.1)", "Adam"),
]


def public(module):
    """The public objects of a module."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]  # fmt: skip
    return [getattr(module, name) for name in names]


def is_ours(thing):
    return (getattr(thing, "__module__", None) or "").split(".")[0] == PACKAGE.name


def functions_of(cls):
    """`(name, function)` of the public methods and getters, own and inherited from a class of the package."""
    for owner in (owner for owner in cls.__mro__ if is_ours(owner)):
        made = {"__init__"} if dataclasses.is_dataclass(owner) else set()  # from annotated fields, by `dataclasses`
        for name, value in vars(owner).items():
            if name in made or name.startswith("_") and name not in OPERATORS:
                continue
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            yield f"{owner.__qualname__}.{name}", value


def collected():
    """`{where: function}` of everything public."""
    things = [thing for module in MODULES for thing in public(module)] + RETURNED
    found = {}
    for thing in things:
        if isinstance(thing, type):
            found |= dict(functions_of(thing))
        elif callable(thing):
            found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    unwrapped = {where: inspect.unwrap(function) for where, function in found.items()}
    return {where: f for where, f in unwrapped.items() if isinstance(f, types.FunctionType) and is_ours(f)}


def missing(where, function):
    """What a function lacks: names of parameters, and `return`."""
    parameters = list(inspect.signature(function).parameters.values())
    if not where.startswith(PACKAGE.name) and parameters[0].name in ("self", "cls", "lin"):
        del parameters[0]  # `lin` is the `self` of the methods of `Linearization` that are in other files
    empty = inspect.Parameter.empty
    lacks = [p.name for p in parameters if p.annotation is empty]
    return lacks + ["return"] * (inspect.signature(function).return_annotation is empty)


def test_every_public_signature_has_types():
    found = collected()
    assert len(found) > 250
    lacking = {where: missing(where, f) for where, f in found.items()}
    assert {where: names for where, names in lacking.items() if names} == {}


def test_every_optimizer_is_among_the_names_that_a_type_checker_sees():
    text = (PACKAGE / "optimizers" / "__init__.py").read_text()
    for name in optimizers.__all__:
        assert f"import {name} as {name}\n" in text, name


def mypy(*arguments):
    """`(exit code, output)` of mypy, with the package as this process imports it."""
    pytest.importorskip("mypy")
    environment = {**os.environ, "MYPYPATH": str(PACKAGE.parent)}
    if PACKAGE.parent.name == "site-packages":  # refused there; found by `py.typed`
        del environment["MYPYPATH"]
    command = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "--no-error-summary", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


STRICTLY = ("--config-file", "", "--strict", "--ignore-missing-imports", "--follow-imports", "silent")


HEAD = ["import keras", "import keras_curvature as kc", "model, data = keras.Sequential(), None"]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What mypy says of a program that uses the package rightly and of one with mistakes, both in one run."""
    path = tmp_path_factory.mktemp("typed") / "mistakes.py"
    path.write_text("\n".join([*HEAD, *(line for line, _ in MISTAKES)]) + "\n")
    _, output = mypy(*STRICTLY, str(TESTS / "typed_program.py"), str(path))
    return output.splitlines()


def test_mypy_accepts_a_program_that_uses_the_package_rightly(complaints):
    assert [line for line in complaints if "mistakes.py:" not in line] == []


def test_mypy_finds_mistakes(complaints):
    found = [line for line in complaints if "mistakes.py:" in line and ": error:" in line]
    lines = [int(line.split("mistakes.py:")[1].split(":")[0]) for line in found]
    assert lines == [number + len(HEAD) + 1 for number in range(len(MISTAKES))], complaints
    for message, (line, named) in zip(found, MISTAKES):
        assert named in message, (line, message)


def test_mypy_accepts_the_package():
    if PACKAGE.parent != TESTS.parent:
        pytest.skip("of an installed package mypy reports nothing")
    assert mypy("--config-file", str(PACKAGE.parent / "setup.cfg"), str(PACKAGE)) == (0, "")
