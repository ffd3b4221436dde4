"""Every optimizer of the package on four functions of two weights, as one figure.

    python examples/trajectories_2d.py --out trajectories_2d.png

Each row is an optimizer, each panel a run of 100 steps at the settings below: Rosenbrock's valley, Himmelblau's four
minima, Rastrigin's many, and a random quartic. It shows how a method moves, not how good it is: two weights without
noise are not a network. Methods that look at layers or outputs are left out, because there are none.
"""

import argparse

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_curvature as kc

STEPS = 100
# The settings that let a method be seen on functions of this size: rates as large as the functions bear.
RATES = {
    "Neumann": {"learning_rate": 2e-3, "warmup_steps": 5, "beta": 1e-9},
    "TwoLoopNeumann": {"learning_rate": 2e-3},
    "AdaHessian": {"learning_rate": 0.1, "step_max": None},
    "ESGD": {"learning_rate": 0.1, "step_max": None},
    "SophiaH": {"learning_rate": 0.03},
    "DiagonalNewton": {"learning_rate": 0.1, "step_max": 0.5},
    "SquareRootFreeAdam": {"learning_rate": 0.03, "epsilon": 1e-3, "step_max": None},
    "Shampoo": {"learning_rate": 0.1},
    "SOAP": {"learning_rate": 0.1},
    "KLShampoo": {"learning_rate": 0.1},
    "PSGD": {"learning_rate": 0.05},
    "Muon": {"learning_rate": 0.1, "adam_for": []},
    "Scion": {"learning_rate": 0.01},
    "SPlus": {"learning_rate": 0.1},
}


def rosenbrock(a, b):
    return (1.0 - a) ** 2 + 20.0 * (b - a**2) ** 2


def himmelblau(a, b):
    return ((a**2 + b - 11.0) ** 2 + (a + b**2 - 7.0) ** 2) / 20.0


def rastrigin(a, b):
    return 2.0 + (a**2 + b**2) / 4.0 - ops.cos(3.0 * a) - ops.cos(3.0 * b)


def quartic(a, b):
    """A quartic with random coefficients, bounded from below."""
    c = np.random.default_rng(4).standard_normal(6)
    return 0.1 * (a**4 + b**4) + c[0] * a * b + c[1] * a**2 + c[2] * b**2 + c[3] * a + c[4] * b + 0.1 * c[5] * a**2 * b


FUNCTIONS = {rosenbrock: (-1.5, 2.0), himmelblau: (-0.5, -1.0), rastrigin: (2.4, -1.8), quartic: (2.5, 2.0)}


class OfTwoWeights(keras.layers.Layer):
    """A layer that ignores its input and returns a function of its two weights."""

    def __init__(self, function, start, **kwargs):
        super().__init__(**kwargs)
        self.function, self.start = function, start

    def build(self, shape):
        self.w = self.add_weight(shape=(2,), initializer="zeros", name="w")
        self.w.assign(self.start)

    def call(self, x):
        return 0.0 * x + self.function(self.w[0], self.w[1])


def trajectory(optimizer, function, start):
    """The weights after each step, `(steps + 1, 2)`."""
    inputs = keras.Input((1,))
    model = kc.curved(keras.Model(inputs, OfTwoWeights(function, start)(inputs)))
    model.compile(optimizer, loss=lambda y, output: output[:, 0], jit_compile=False)
    path = [np.array(start)]
    note = keras.callbacks.LambdaCallback(on_batch_end=lambda batch, logs: path.append(model.get_weights()[0]))
    ones = np.ones((STEPS, 1), "float32")
    model.fit(ones, ones, batch_size=1, verbose=0, callbacks=[note])
    return np.array(path)


def optimizers():
    """`{name: function that makes the optimizer}` of all that do without layers and outputs."""
    found = {}
    for name in kc.optimizers.__all__:
        cls = getattr(kc, name)
        if name in ("CurvatureOptimizer", "SophiaG"):  # the base class; `SophiaG` samples labels
            continue
        needs = cls().needs
        if not (needs.layers or needs.products):
            found[name] = lambda cls=cls, name=name: cls(**RATES.get(name, {}))
    found["HessianFree"] = lambda: kc.HessianFree(curvature="hessian", preconditioner=0.0)
    return found


def draw(paths, out):
    """One panel for each method, with the level lines of each function in a quarter of it."""
    import matplotlib.pyplot as plt

    rows = len(paths)
    figure, axes = plt.subplots(rows, len(FUNCTIONS), figsize=(2.2 * len(FUNCTIONS), 1.8 * rows), squeeze=False)
    for row, (name, of_functions) in zip(axes, paths.items()):
        for panel, (function, path) in zip(row, of_functions.items()):
            a, b = np.meshgrid(np.linspace(-4.5, 4.5, 80), np.linspace(-4.5, 4.5, 80))
            panel.contour(a, b, np.log1p(np.asarray(function(tf.constant(a), tf.constant(b))) + 8.0), 10,
                          colors="#b8c4cc", linewidths=0.5)  # fmt: skip
            inside = np.clip(path, -4.5, 4.5)
            panel.plot(*inside.T, "-", color="#b5452c", linewidth=0.9)
            panel.plot(*inside.T, ".", color="#b5452c", markersize=2)
            panel.plot(*inside[-1], "o", color="#20506b", markersize=4)
            panel.set(xticks=[], yticks=[], xlim=(-4.5, 4.5), ylim=(-4.5, 4.5))
        row[0].set_ylabel(name, fontsize=7)
    for panel, function in zip(axes[0], FUNCTIONS):
        panel.set_title(function.__name__, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=60)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="trajectories_2d.png", help="file of the figure")
    parser.add_argument("--only", nargs="*", help="names of optimizers; all by default")
    arguments = parser.parse_args()
    paths = {}
    for name, make in optimizers().items():
        if not arguments.only or name in arguments.only:
            paths[name] = {function: trajectory(make(), function, start) for function, start in FUNCTIONS.items()}
            ends = "  ".join(f"{f.__name__} {float(f(*path[-1])):9.2g}" for f, path in paths[name].items())
            print(f"{name:20} {ends}", flush=True)
    draw(paths, arguments.out)


if __name__ == "__main__":
    main()
