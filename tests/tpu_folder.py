"""The programs in `tpu/`, a folder that is no package, for the tests of it."""

import pathlib
import sys

import pytest

TPU = pathlib.Path(__file__).parent.parent / "tpu"
sys.path.insert(0, str(TPU))

import generated  # noqa: E402


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A generated dataset in four files."""
    folder = tmp_path_factory.mktemp("tfds")
    generated.write(folder, train=48, validation=11, sides=(40, 90))
    return str(folder)
