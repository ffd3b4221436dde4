"""Which cases of a test run by default, and which with `pytest -m slow` alone."""

import pytest


def some(cases, default):
    """All `cases` as parameters of a test: those that are not in `default` are marked slow.

    A case is a value, or a tuple of the values of several parameters.
    """
    unknown = [case for case in default if case not in cases]
    if unknown:
        raise ValueError(f"`default` must be some of the cases. Received: {unknown}, and the cases {list(cases)}")
    return [case if case in default else _slow(case) for case in cases]


def _slow(case):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
