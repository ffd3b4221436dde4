"""Which cases of a test run by default, which with `pytest -m slow` alone, and which with `pytest -m cross`."""

import pytest

SHARE = 8  # the whole crosses take hours


def some(cases, default):
    """All `cases` as parameters of a test: those that are not in `default` are marked slow.

    A case is a value, or a tuple of the values of several parameters.
    """
    unknown = [case for case in default if case not in cases]
    if unknown:
        raise ValueError(f"`default` must be some of the cases. Received: {unknown}, and the cases {list(cases)}")
    return [case if case in default else _slow(case) for case in cases]


def crossed(rows, columns, default=()):
    """All pairs as parameters of a test: those in `default` run always, one in `SHARE` is slow, the rest is `cross`.

    The slow pairs are diagonals of the table, so that each row and each column has its share of them.
    """
    table = {(row, column): is_on_a_diagonal(i, j) for i, row in enumerate(rows) for j, column in enumerate(columns)}
    unknown = [pair for pair in default if pair not in table]
    if unknown:
        raise ValueError(f"`default` must be some of the pairs. Received: {unknown}")
    return [pair if pair in default else _marked(pair, "slow" if often else "cross") for pair, often in table.items()]


def is_on_a_diagonal(i, j):
    """Whether the pair in row `i` and column `j` of `crossed` is slow."""
    return (i + j) % SHARE == 0


def _slow(case):
    return _marked(case if isinstance(case, tuple) else (case,), "slow")


def _marked(case, marker):
    return pytest.param(*case, marks=getattr(pytest.mark, marker))
