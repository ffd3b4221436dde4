"""What the tests of several methods share."""

import pytest
from cases import float64


@pytest.fixture
def in_float64():
    """Keras in float64 for the length of a test; a module asks for it with `pytest.mark.usefixtures`."""
    with float64():
        yield
