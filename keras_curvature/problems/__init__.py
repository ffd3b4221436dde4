"""Things to train on: analytic problems with known answers, small networks, data by name.

A `Problem` is a recipe. `problem.model(seed)`, `problem.loss()` and `problem.data()` make a fresh model, a
fresh loss and numpy arrays, so that two optimizers can start from the same weights and see the same samples:

    problem = problems.get("rosenbrock")
    model = problem.compiled(keras.optimizers.SGD(1e-3, momentum=0.95), seed=3)
    x, y = problem.data()
    model.fit(x, y, batch_size=problem.batch_size)

`PROBLEMS` lists them all by name. Nothing here knows an optimizer of this package: the models are plain Keras
models.
"""

from keras_curvature.problems.analytic import quadratic, rahimi_recht, rosenbrock
from keras_curvature.problems.base import Problem, seeded
from keras_curvature.problems.datasets import data, synthetic
from keras_curvature.problems.logistic_regression import logistic
from keras_curvature.problems.losses import SumSquares
from keras_curvature.problems.networks import SparseNormal
from keras_curvature.problems.registry import PROBLEMS, get
from keras_curvature.problems.table_1 import first_below, rosenbrock_start, table_1_starts

__all__ = [
    "PROBLEMS",
    "Problem",
    "SparseNormal",
    "SumSquares",
    "data",
    "first_below",
    "get",
    "logistic",
    "quadratic",
    "rahimi_recht",
    "rosenbrock",
    "rosenbrock_start",
    "seeded",
    "synthetic",
    "table_1_starts",
]
