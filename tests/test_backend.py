"""At import: one error with the remedy, unless Keras runs on a TensorFlow that is recent enough."""

import configparser
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

from keras_curvature import backend

ROOT = pathlib.Path(__file__).parent.parent


def stub(folder, name, text):
    """A package of that name, before the one that is installed."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


def keras_on(name, version="3.15.1"):
    """The text of a stub of Keras with this backend."""
    return f"import types\n__version__ = {version!r}\nbackend = types.SimpleNamespace(backend=lambda: {name!r})\n"


def imported(folder, **environment):
    """What `import keras_curvature` says in a process that sees the stubs in `folder`; the end of its errors."""
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", "import keras_curvature"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip
    assert run.returncode != 0
    assert run.stderr.rpartition("\n    raise ImportError(")[1], run.stderr
    return run.stderr[run.stderr.rindex("ImportError: ") :]


@pytest.mark.parametrize("name", ["jax", "torch", "numpy"])
def test_another_backend_is_refused_with_the_remedy(tmp_path, name):
    stub(tmp_path, "keras", keras_on(name))
    stub(tmp_path, "tensorflow", "__version__ = '2.21.0'\n")
    message = imported(tmp_path)
    assert f"Received: the Keras backend '{name}'" in message and "KERAS_BACKEND=tensorflow" in message


def test_a_backend_that_is_not_installed_is_refused_with_the_remedy(tmp_path):
    stub(tmp_path, "keras", "import a_backend_that_is_not_installed\n")
    message = imported(tmp_path)
    assert "No module named 'a_backend_that_is_not_installed'" in message and "KERAS_BACKEND=tensorflow" in message


@pytest.mark.parametrize(
    ("keras", "tensorflow", "wrong", "wanted"),
    [
        ("3.9.2", "2.21.0", "keras", ">=3.10,<3.16"),
        ("3.16.0", "2.21.0", "keras", ">=3.10,<3.16"),
        ("3.15.1", "2.4", "tensorflow", ">=2.19,<2.22"),
        ("3.10.0", "2.22.0-rc0", "tensorflow", ">=2.19,<2.22"),
    ],
)
def test_versions_out_of_range_are_refused_with_the_remedy(tmp_path, keras, tensorflow, wrong, wanted):
    stub(tmp_path, "keras", keras_on("tensorflow", keras))
    stub(tmp_path, "tensorflow", f"__version__ = {tensorflow!r}\n")
    received = {"keras": keras, "tensorflow": tensorflow}[wrong]
    message = imported(tmp_path)
    assert f"Received: {wrong} {received}" in message and f"pip install '{wrong}{wanted}'" in message


@pytest.mark.parametrize("missing", ["tensorflow", "keras"])
def test_what_is_not_installed_is_named(monkeypatch, missing):
    found = types.SimpleNamespace(find_spec=lambda name: None if name == missing else name)
    monkeypatch.setattr(backend.importlib, "util", found)
    with pytest.raises(ImportError, match=f"`{missing}` is not installed. Install it:\n\n    pip install") as error:
        backend.check()
    extras = setup_cfg()["options.extras_require"]
    assert f"'{extras['tensorflow'].strip()}'" in str(error.value)
    on_a_tpu = [line for line in extras["tpu"].split("\n") if line and not line.startswith("#")]
    assert re.findall(r"'(.*?)'", str(error.value).splitlines()[-1]) == on_a_tpu


def setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_the_ranges_are_those_of_the_requirements():
    config = setup_cfg()
    ranges = {name: f"{name}>={a[0]}.{a[1]},<{b[0]}.{b[1]}" for name, (a, b) in backend.RANGES.items()}
    assert config["options"]["install_requires"].split() == [ranges["keras"], "numpy"]
    assert config["options.extras_require"]["tensorflow"].split() == [ranges["tensorflow"]]
