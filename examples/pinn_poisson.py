"""Poisson's equation by a physics-informed network and Levenberg-Marquardt, to eight digits in a minute or two:

    pip install ".[examples]" && python examples/pinn_poisson.py

solves `-laplace(u) = 2 pi^2 sin(pi x) sin(pi y)` in the unit square, `u = 0` on its boundary. It prints the error
against the solution, beside Adam's with the same number of steps, and writes a figure of solution and error into
`--out`.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import keras_curvature as kc

parser = argparse.ArgumentParser(description="Levenberg-Marquardt on a physics-informed network.")
parser.add_argument("--out", default="pinn_poisson_out", help="folder for the figure")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

# In float32 the second derivatives of the network would be noise below 1e-4.
keras.config.set_floatx("float64")

# The outputs of the model are the residuals: of the equation at 900 points inside, of the boundary values at 120 points
# on the sides. The targets are zeros and the loss is "mse", so nothing else than an ordinary Keras model is needed, and
# its Gauss-Newton matrix is the one of the residuals. The derivatives in x and y are taken inside `call`: see
# `keras_curvature/problems/physics.py`, which is short and meant to be copied.
problem = kc.problems.poisson()
points = problem.data()
data = tf.data.Dataset.from_tensors(points).cache().repeat()  # the whole set in each step


def solved(optimizer):
    """The trained model and its errors, after every twentieth of the steps."""
    model = kc.curved(problem.compiled(optimizer, seed=args.seed, jit_compile=True))
    errors, part = [kc.problems.relative_error(model)], max(1, args.steps // 20)
    for _ in range(args.steps // part):
        model.fit(data, steps_per_epoch=part, shuffle=False, verbose=0)
        errors.append(kc.problems.relative_error(model))
    return model, errors, np.arange(len(errors)) * part


# A path of fourth order, with a search along it: a digit or two more than by a path of second order.
search = kc.GridSearch(count=5)
model, errors, steps = solved(kc.GaussNewton.levenberg_marquardt(geodesic=4, line_search=search))
_, of_adam, _ = solved(keras.optimizers.Adam(1e-2))
print(f"relative error in L2 after {steps[-1]} steps: Levenberg-Marquardt {errors[-1]:.1e}, Adam {of_adam[-1]:.1e}")

axis = np.linspace(0.0, 1.0, 101)
grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
residuals = model.get_layer("residuals")
u = residuals.u(tf.constant(grid)).numpy().reshape(101, 101)
difference = u - residuals.solution(tf.constant(grid)).numpy().reshape(101, 101)

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
for axes, values, title in ((left, u, "the network"), (middle, difference, "its error")):
    image = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1))
    figure.colorbar(image, ax=axes)
    axes.set(title=title, xlabel="x", ylabel="y")
right.semilogy(steps, errors, label="Levenberg-Marquardt")
right.semilogy(steps, of_adam, label="Adam, 1e-2")
right.set(title="relative error", xlabel="step")
right.legend()
folder = pathlib.Path(args.out)
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "pinn_poisson.png", dpi=110)
print(f"figure: {folder / 'pinn_poisson.png'}")
