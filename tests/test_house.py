"""The size of the package's parts: short files, short functions."""

import ast
import pathlib
import statistics

import pytest

import keras_curvature

ROOT = pathlib.Path(keras_curvature.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LENGTHS = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}


def functions():
    """`{place: lines}` of every function and method, decorators not counted."""
    return {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("file", sorted(LENGTHS))
def test_no_file_is_longer_than_300_lines(file):
    assert LENGTHS[file] <= 300


def test_half_of_the_files_are_shorter_than_130_lines():
    assert statistics.median(LENGTHS.values()) < 130


def test_nine_functions_of_ten_are_shorter_than_30_lines():
    lengths = functions()
    long = {place: lines for place, lines in lengths.items() if lines >= 30}
    assert len(long) <= 0.1 * len(lengths), long
