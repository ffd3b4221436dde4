"""Test problems: analytic problems with known solutions, small networks, and data sets by name.

A `Problem` is a recipe. `problem.model(seed)`, `problem.loss()` and `problem.data()` return a new model, a new loss and
NumPy arrays, so that optimizers can start from the same weights and train on the same samples:

    problem = problems.get("rosenbrock")
    model = problem.compiled(keras.optimizers.SGD(1e-3, momentum=0.95), seed=3)
    x, y = problem.data()
    model.fit(x, y, batch_size=problem.batch_size)

`PROBLEMS` has all problems by name. The models are plain Keras models and do not depend on the optimizers of this
package.
"""

from keras_curvature.problems import lightbench
from keras_curvature.problems.analytic import quadratic, rahimi_recht, rosenbrock
from keras_curvature.problems.base import Problem, seeded
from keras_curvature.problems.datasets import data, synthetic
from keras_curvature.problems.diffusion import burgers, heat
from keras_curvature.problems.evolution import convection, reaction, wave
from keras_curvature.problems.logistic_regression import logistic
from keras_curvature.problems.losses import SumSquares
from keras_curvature.problems.networks import SparseNormal
from keras_curvature.problems.physics import poisson
from keras_curvature.problems.registry import PROBLEMS, get
from keras_curvature.problems.regression import nist, sinc
from keras_curvature.problems.residuals import relative_error
from keras_curvature.problems.table_1 import first_below, rosenbrock_start, table_1_starts

__all__ = [
    "PROBLEMS",
    "Problem",
    "SparseNormal",
    "SumSquares",
    "burgers",
    "convection",
    "data",
    "first_below",
    "get",
    "heat",
    "lightbench",
    "logistic",
    "nist",
    "poisson",
    "quadratic",
    "rahimi_recht",
    "reaction",
    "relative_error",
    "rosenbrock",
    "rosenbrock_start",
    "seeded",
    "sinc",
    "synthetic",
    "table_1_starts",
    "wave",
]
