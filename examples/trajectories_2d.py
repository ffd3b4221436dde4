"""Every optimizer of the package on four functions of two weights, as one figure.

    python examples/trajectories_2d.py --out trajectories_2d.png

Each method has four panels, runs of 100 steps at the settings below: Rosenbrock's valley, Himmelblau's four minima,
Rastrigin's many, and a random quartic. It shows how a method moves, not how good it is: two weights without noise are
not a network.

Each function is a sum of squares of residuals of the two weights, so it can be written as a network: a `Dense` layer
whose outputs for the input 1 are its weights, a layer of residuals, and the mean squared error against zero. So methods
that need layers or a loss of outputs, such as K-FAC and Gauss-Newton, run too.
"""

import argparse

import keras
import numpy as np
from keras import ops

import keras_curvature as kc

STEPS, RESIDUALS = 100, 4
# The settings that let a method be seen on functions of this size: rates as large as the functions bear.
RATES = {
    "AdaHessian": {"learning_rate": 0.1, "step_max": None},
    "DiagonalNewton": {"learning_rate": 0.1, "step_max": 0.5},
    "ESGD": {"learning_rate": 0.1, "step_max": None},
    "IFShampoo": {"learning_rate": 0.01},
    "KLShampoo": {"learning_rate": 0.1},
    "MFAC": {"learning_rate": 0.3, "damping": 1.0, "kl_clip": None},
    "MKOR": {"learning_rate": 1e-3},
    "Muon": {"learning_rate": 0.1, "adam_for": []},
    "Neumann": {"learning_rate": 2e-3, "warmup_steps": 5, "beta": 1e-9},
    "NewtonMuon": {"learning_rate": 0.1},
    "PSGD": {"learning_rate": 0.05},
    "SASSHA": {"step_max": None},
    "Scion": {"learning_rate": 3e-5},
    "Shampoo": {"learning_rate": 0.1},
    "SINGD": {"learning_rate": 0.05},
    "SOAP": {"learning_rate": 0.1},
    "SophiaG": {"learning_rate": 0.03},
    "SophiaH": {"learning_rate": 0.03},
    "SPlus": {"learning_rate": 0.1, "vector_scale": 1.0},
    "SquareRootFreeAdam": {"learning_rate": 0.03, "epsilon": 1e-3, "step_max": None},
    "TNT": {"learning_rate": 0.03},
    "TwoLoopNeumann": {"learning_rate": 2e-3},
}


def rosenbrock(a, b):
    return [1.0 - a, 20**0.5 * (b - a**2)]


def himmelblau(a, b):
    return [(a**2 + b - 11.0) / 20**0.5, (a + b**2 - 7.0) / 20**0.5]


def rastrigin(a, b):
    """`(a^2 + b^2) / 4 + 2 - cos 3a - cos 3b`."""
    return [a / 2.0, b / 2.0, 2**0.5 * ops.sin(1.5 * a), 2**0.5 * ops.sin(1.5 * b)]


def quartic(a, b):
    """Random quadratics."""
    c = np.random.default_rng(4).standard_normal((2, 6))
    return [0.3 * (k[0] + k[1] * a + k[2] * b + k[3] * a**2 + k[4] * a * b + k[5] * b**2) for k in c]


FUNCTIONS = {rosenbrock: (-1.5, 2.0), himmelblau: (-0.5, -1.0), rastrigin: (2.4, -1.8), quartic: (2.5, 2.0)}


def value(function, a, b):
    """The function itself, for NumPy arrays."""
    return sum(np.square(np.asarray(residual)) for residual in function(a, b))


class Residuals(keras.layers.Layer):
    """The residuals of one of `FUNCTIONS`, chosen by a weight, so that a model is traced once for all of them."""

    def build(self, shape):
        self.chosen = self.add_weight(shape=(len(FUNCTIONS),), initializer="zeros", trainable=False)

    def call(self, outputs):
        a, b = outputs[:, 0], outputs[:, 1]
        of_all = []
        for function in FUNCTIONS:
            known = function(a, b)
            of_all.append(ops.stack([*known, *[ops.zeros_like(a)] * (RESIDUALS - len(known))], -1))
        # the error is a mean over the residuals, the function a sum
        return RESIDUALS**0.5 * ops.tensordot(ops.stack(of_all, -1), self.chosen, 1)


class Path(keras.callbacks.Callback):
    """Notes the weights of a layer after each step."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.points = layer, []

    def on_train_batch_end(self, batch, logs=None):
        self.points.append(self.layer.kernel.numpy()[0])


def trajectories(optimizer):
    """`{function: the weights after each step, (steps + 1, 2)}`."""
    dense, residuals = keras.layers.Dense(2, use_bias=False), Residuals()
    inputs = keras.Input((1,))
    model = kc.curved(keras.Model(inputs, residuals(dense(inputs))))
    model.compile(optimizer, loss="mse", jit_compile=False)
    optimizer.meet(model)
    optimizer.require(model.trainable_variables)  # creates its state, which each run begins from
    begin = [variable.numpy() for variable in optimizer.variables]
    one, zero = np.ones((STEPS, 1), "float32"), np.zeros((STEPS, RESIDUALS), "float32")
    paths = {}
    for place, (function, start) in enumerate(FUNCTIONS.items()):
        for variable, known in zip(optimizer.variables, begin):
            variable.assign(known)
        dense.kernel.assign([start])
        residuals.chosen.assign(np.eye(len(FUNCTIONS))[place])
        path = Path(dense)
        model.fit(one, zero, batch_size=1, verbose=0, callbacks=[path])
        paths[function] = np.array([start, *path.points])
    return paths


def draw(paths, out, across=3):
    """One panel for each method and function, so many methods in a row."""
    import matplotlib.pyplot as plt

    down, count = -(-len(paths) // across), len(FUNCTIONS)
    figure, axes = plt.subplots(down, across * count, figsize=(1.1 * across * count, 1.15 * down), squeeze=False)
    a, b = np.meshgrid(np.linspace(-4.5, 4.5, 80), np.linspace(-4.5, 4.5, 80))
    levels = {function: np.log(value(function, a, b) + 0.1) for function in FUNCTIONS}
    for panel in axes.flat:
        panel.set_axis_off()
    for place, (name, of_functions) in enumerate(paths.items()):
        row, column = place % down, place // down * count
        for panel, (function, path) in zip(axes[row, column:], of_functions.items()):
            panel.set_axis_on()
            panel.contour(a, b, levels[function], 8, colors="#b8c4cc", linewidths=0.4)
            inside = np.clip(path, -4.5, 4.5)
            panel.plot(*inside.T, ".-", color="#b5452c", linewidth=0.7, markersize=1.5)
            panel.plot(*inside[-1], "o", color="#20506b", markersize=3)
            panel.set(xticks=[], yticks=[], xlim=(-4.5, 4.5), ylim=(-4.5, 4.5))
            if row == 0:
                panel.set_title(function.__name__, fontsize=6, pad=2)
        axes[row, column].text(-4.2, 3.3, name, fontsize=6, backgroundcolor="#ffffffb0")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.985, 0.04, 0.04)
    figure.savefig(out, dpi=100)


def main():
    names = [name for name in kc.optimizers.__all__ if name != "CurvatureOptimizer"]  # the base class
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="trajectories_2d.png", help="file of the figure")
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="names of optimizers; all by default")
    arguments = parser.parse_args()
    paths = {}
    for name in arguments.only:
        keras.utils.set_random_seed(0)
        paths[name] = trajectories(getattr(kc, name)(**RATES.get(name, {})))
        ends = "  ".join(f"{f.__name__} {value(f, *path[-1]):9.2g}" for f, path in paths[name].items())
        print(f"{name:20} {ends}", flush=True)
    draw(paths, arguments.out)


if __name__ == "__main__":
    main()
