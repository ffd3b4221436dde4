"""Fit curves to round-off by Levenberg-Marquardt, in half a minute:

    pip install ".[examples]" && python examples/curve_fitting.py

fits one of NIST's regressions with certified values, and a network of 61 weights to a curve on which Adam stops at a
loss of 1e-3. It prints how many digits are right, and writes a figure of both fits into `--out`.
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

import keras_curvature as kc

parser = argparse.ArgumentParser(description="Levenberg-Marquardt on a regression and on a network.")
parser.add_argument("--out", default="curve_fitting_out", help="folder for the figure")
parser.add_argument("--epochs", type=int, default=200)
args = parser.parse_args()

# Digits beyond the seventh need float64. Set it before the model is made.
keras.config.set_floatx("float64")

# The electron mobility of silicon, 37 observations: a rational function with seven weights. Levenberg-Marquardt needs
# the rows of the Jacobian of all observations, so the whole set is one batch, and an epoch is one step.
problem = kc.problems.nist("Thurber")
x, y = problem.data()
model = kc.curved(problem.compiled(kc.GaussNewton.levenberg_marquardt()))
model.fit(x, y, batch_size=len(x), epochs=60, shuffle=False, verbose=0)
weights, (certified,) = model.get_weights()[0], problem.solution()
print("Thurber       ours               NIST's certified value")
for ours, theirs in zip(weights, certified):
    print(f"{ours:22.10f} {theirs:22.10f}")
digits = -np.log10(np.abs(weights / certified - 1).max())
print(f"at least {digits:.1f} digits of each; the loss is {model.evaluate(x, y, verbose=0):.10f}, "
      f"certified {problem.minimum:.10f}\n")  # fmt: skip

# A network 1-20-1 for sin(10 x) / (10 x). A step that does not lower the loss is taken back, and the damping grows.
problem = kc.problems.sinc(samples=1000)
points, values = problem.data()
network = kc.curved(problem.compiled(kc.GaussNewton.levenberg_marquardt()))
history = network.fit(points, values, batch_size=len(points), epochs=args.epochs, shuffle=False, verbose=0).history
print(f"sinc: the loss falls from {history['loss'][0]:.1e} to {history['loss'][-1]:.1e} in {args.epochs} steps; the "
      f"damping from {max(history['damping']):.0e} to {history['damping'][-1]:.0e}")  # fmt: skip

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
line = np.linspace(x.min(), x.max(), 300)[:, None]
left.plot(x, y, "o", markersize=4, label="observations")
left.plot(line, model(line), label="fit")
left.set(title="Thurber", xlabel="log of the density", ylabel="mobility")
left.legend()
order = np.argsort(points[:, 0])
middle.plot(points[order], values[order], label="sin(10 x) / (10 x)")
middle.plot(points[order], np.asarray(network(points))[order], "--", label="network")
middle.set(title="sinc", xlabel="x")
middle.legend()
right.semilogy(history["loss"])
right.set(title="sinc: mean squared error", xlabel="step")
folder = pathlib.Path(args.out)
folder.mkdir(parents=True, exist_ok=True)
figure.savefig(folder / "curve_fitting.png", dpi=110)
print(f"figure: {folder / 'curve_fitting.png'}")
