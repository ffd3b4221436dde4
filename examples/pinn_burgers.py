"""Burgers' equation by a physics-informed network and Levenberg-Marquardt, to four digits in a minute or two:

    pip install ".[examples]" && python examples/pinn_burgers.py

solves `u_t + u u_x = 0.01 / pi u_xx` for `t` in [0, 1] and `x` in [-1, 1], from `u(0, x) = -sin(pi x)` with `u = 0` on
both sides. A front forms at `x = 0`, where the solution falls by 2 within a hundredth. The program prints the error
against the solution, beside Adam's in about the same time, and writes a figure of solution and error into `--out`.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import keras_curvature as kc

parser = argparse.ArgumentParser(description="Levenberg-Marquardt on a physics-informed network.")
parser.add_argument("--out", default="pinn_burgers_out", help="folder for the figure")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

# In float32 the second derivatives of the network would be noise below 1e-4.
keras.config.set_floatx("float64")

# The outputs of the model are the residuals: of the equation at 1600 points inside, of the data at 120 points on three
# sides. The targets are zeros and the loss is "mse". The derivatives are taken inside `call`: see
# `keras_curvature/problems/diffusion.py`. The points inside are scattered, and denser towards x = 0: between the lines
# of a grid a network finds room for a jump, satisfies the equation at all points, and is wrong by 20 percent.
problem = kc.problems.burgers()
points = problem.data()
data = tf.data.Dataset.from_tensors(points).cache().repeat()  # the whole set in each step


def solved(optimizer, steps):
    """The trained model, its errors after every twentieth of the steps, and the seconds until then."""
    model = kc.curved(problem.compiled(optimizer, seed=args.seed, jit_compile=False))
    errors, seconds, part = [kc.problems.relative_error(model)], [0.0], max(1, steps // 20)
    for _ in range(steps // part):
        begin = time.perf_counter()
        model.fit(data, steps_per_epoch=part, shuffle=False, verbose=0)
        seconds.append(seconds[-1] + time.perf_counter() - begin)
        errors.append(kc.problems.relative_error(model))
    return model, errors, seconds


# The network has 921 weights, and a step solves with the Jacobian of 1720 residuals: as long as some thirty steps of
# Adam. For networks too large for that there is `kc.BFGS(scaling="broyden")`: three digits here, in 1500 steps.
search = kc.GridSearch(count=5)
model, errors, seconds = solved(kc.GaussNewton.levenberg_marquardt(geodesic=4, line_search=search), args.steps)
_, of_adam, seconds_of_adam = solved(keras.optimizers.Adam(1e-3), 30 * args.steps)
print(f"relative error in L2: Levenberg-Marquardt {errors[-1]:.1e} after {args.steps} steps and {seconds[-1]:.0f} s,")
print(f"Adam {of_adam[-1]:.1e} after {30 * args.steps} steps and {seconds_of_adam[-1]:.0f} s")

t, x = np.meshgrid(np.linspace(0.005, 1.0, 200), np.linspace(-1.0, 1.0, 201), indexing="ij")
grid = np.stack([t, x], -1).reshape(-1, 2)
residuals = model.get_layer("residuals")
u = residuals.u(tf.constant(grid)).numpy().reshape(t.shape)
solution = residuals.solution(grid).reshape(t.shape)

figure, ((left, right), (profiles, course)) = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
error = np.log10(np.abs(u - solution) + 1e-12)
for axes, values, title in ((left, u, "the network"), (right, error, "log10 of its error")):
    image = axes.imshow(values.T, origin="lower", extent=(0, 1, -1, 1), aspect="auto")
    figure.colorbar(image, ax=axes)
    axes.set(title=title, xlabel="t", ylabel="x")
for moment in (0.25, 0.5, 0.75):
    row = int(np.argmin(np.abs(t[:, 0] - moment)))
    profiles.plot(x[row], u[row], label=f"t = {moment}")
    profiles.plot(x[row], solution[row], ":", color="black", linewidth=1)
profiles.set(title="u, and the solution (dotted)", xlabel="x")
profiles.legend()
course.semilogy(seconds, errors, label="Levenberg-Marquardt")
course.semilogy(seconds_of_adam, of_adam, label="Adam, 1e-3")
course.set(title="relative error", xlabel="seconds")
course.legend()
folder = pathlib.Path(args.out)
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "pinn_burgers.png", dpi=90)
print(f"figure: {folder / 'pinn_burgers.png'}")
