"""`report`: the curvature of a model in one call, as a table, a figure and numbers.

`measure` turns a `Curvature` into plain numbers; `table` and `figure` use only these numbers, so a saved report can be
drawn again.
"""

import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

import keras

from keras_curvature.component import check
from keras_curvature.monitor.matrix import Curvature
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.report.drawing import MISSING, png
from keras_curvature.monitor.report.figures import figure
from keras_curvature.monitor.report.measure import measure
from keras_curvature.monitor.report.table import table
from keras_curvature.typing import Kind

if TYPE_CHECKING:
    import matplotlib.figure

SUFFIXES = (".txt", ".json", ".png")


class Report(dict[str, Any]):
    """The result of `report`: plain numbers by name, nested by layer; `str` gives the table.

    Every number has its error beside it: `residual` for eigenvalues, `stderr` for estimates. `layers` is
    `{layer name: {"weights", "trace", "share", "sharpness", "per_weight"}}`, with the share of the sum of the layers'
    absolute traces; `cost["parts"]` has the products and seconds of each part.

    Example: `Report(json.load(open("curvature.json"))).figure()`
    """

    def __str__(self) -> str:
        return table(self)

    def __repr__(self) -> str:
        return f"<Report of {self['model']}: sharpness {self['sharpness']['value']:.4g}>"

    def figure(self) -> "matplotlib.figure.Figure":
        """Spectral density, shares of the layers, and lines through the loss, a `matplotlib.figure.Figure`."""
        return figure(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path.txt`, `path.json` and, where matplotlib is installed, `path.png`."""
        path, image = _stem(path), png(self)
        if image is None:
            self["caveats"] = [*self["caveats"], f"There is no {path}.png: {MISSING}"]
        else:
            with open(f"{path}.png", "wb") as file:
                file.write(image)
        with open(f"{path}.json", "w", encoding="utf-8") as file:
            json.dump(_finite(self), file, indent=1, allow_nan=False)
        with open(f"{path}.txt", "w", encoding="utf-8") as file:
            file.write(f"{self}\n")

    def _repr_png_(self):
        """The display in a notebook."""
        return png(self)


def report(
    model: keras.Model, data: Any, path: str | os.PathLike[str] | None = None, kind: Kind = "hessian",
    training: bool = False, examples: int | None = 1024, seed: int = 0, *, batch_size: int | None = None,
) -> Report:  # fmt: skip
    """Measure the curvature of a model's loss, print it as a table, and draw it.

    The report has the sharpness `lambda_1(B)` against the optimizer's limit, the most negative eigenvalue, the trace,
    the effective directions `tr(B) / lambda_1`, the gradient, the noise scale, the top eigenvalues, and the share of
    each layer. Each number comes with an error: the residual `|B u - lambda u|` for eigenvalues, the standard error for
    estimates. Nothing of the model or its optimizer changes. In a terminal, a bar shows the progress.

    Sharpness is not a property of the function: multiplying one ReLU layer by 10 and dividing the next by 10 leaves the
    function and changes the sharpness. Compare it with the learning rate, not with other models.

    Args:
        model: A compiled `keras.Model`.
        data: As `keras_curvature.curvature` takes it: `(x, y)`, a `tf.data.Dataset` or a `PyDataset`.
        path: Where to write `path.png`, `path.json` and `path.txt`; the folder is created. Optional.
        kind: `"hessian"`, `"ggn"`, `"fisher"` or `"empirical_fisher"`. Defaults to `"hessian"`.
        training: Whether layers run in training mode (batch statistics, dropout with fixed masks); the numbers then
            belong to the `batch_size`. Defaults to `False`, which tells how flat the trained function is.
        examples: Number of examples of `data` to use; `None` for all. Few examples overestimate the sharpness, 1024 by
            5-10 % in trained networks. Defaults to `1024`.
        seed: Of the objective and of fixed masks, an integer. Defaults to `0`.
        batch_size: Number of examples in a batch; matters only in training mode. Optional.

    Returns:
        A `Report`, a dict of plain numbers; `str(report)` is the table.

    Raises:
        ValueError: `path` cannot be written (checked before anything is computed), or as `curvature`.

    Example: `kc.report(model, (x_train, y_train), path="curvature")`
    """
    if path is not None:
        path = _checked(path)
    objective = Objective(model, data, kind, examples, batch_size, training, seed, asked_by=report)
    result = Report(measure(Curvature(objective), progress=sys.stdout.isatty()))
    if path is not None:
        result.save(path)
    print(result)
    return result


def _stem(path):
    """`path` without one of the suffixes that are added."""
    stem, suffix = os.path.splitext(os.fspath(path))
    return stem if suffix in SUFFIXES else os.fspath(path)


def _checked(path):
    """The stem of the files to write, after checking that they can be written."""
    expected = "the beginning of file names in a folder that can be written to"
    check(report, "path", path, isinstance(path, (str, os.PathLike)) and os.path.basename(_stem(path)), expected)
    folder = os.path.dirname(os.path.abspath(_stem(path)))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`report`: the folder of `path` cannot be made: {error}. Received: path={path!r}") from error
    targets = [f"{_stem(path)}{suffix}" for suffix in SUFFIXES]
    free = all(os.access(t, os.W_OK) and os.path.isfile(t) for t in targets if os.path.lexists(t))
    check(report, "path", path, os.access(folder, os.W_OK) and free, expected)
    return _stem(path)


def _finite(value):
    """`value` with `None` for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
