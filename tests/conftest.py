"""What the tests of several methods share."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # one thread for each of the processes, before TensorFlow starts its own: small models gain nothing from more, and
    # the processes would wait for each other
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

from cases import float64


@pytest.fixture
def in_float64():
    """Keras in float64 for the length of a test; a module asks for it with `pytest.mark.usefixtures`."""
    with float64():
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with a generated ImageNet in four files."""
    import tpu_folder  # noqa: F401  # so that the next import is found

    import generated  # isort: skip

    folder = tmp_path_factory.mktemp("tfds")
    generated.write(folder, train=48, validation=11, sides=(40, 90))
    return str(folder)


def _owner(item):
    """What shares with others what one of them computes: a fixture of the module, a cached function, a case."""
    module = item.module.__name__
    if module == "test_products":  # everything about a case is computed once
        return f"{module} {item.callspec.params.get('name') if hasattr(item, 'callspec') else ''}"
    fixtures = {"two_replicas", "logistic", "shown", "complaints"} & set(item.fixturenames)
    whole = {"test_replicas", "test_scaling", "test_slices", "test_table_1", "test_tpu", "test_tpu_program"}
    return module if module in whole or fixtures else None


def pytest_collection_finish():
    """Let Python look for garbage seldom, and never again at what stands by now.

    Each test leaves graphs of thousands of objects, and by its own rule Python walks over all of them again and again:
    a sixth of the time of small files of tests, and stalls of half a minute in the whole suite.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep in one process of `pytest -n` what belongs together, and share out the rest."""
    for item in items:
        owner = _owner(item)
        if owner is not None:
            item.add_marker(pytest.mark.xdist_group(owner))
