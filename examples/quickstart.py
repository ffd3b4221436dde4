"""Four optimizers on one small network and real data, in a minute:

    pip install ".[examples]" && python examples/quickstart.py

trains the same network from the same weights with Keras' Adam, `Neumann`, `CurveBall` and `HessianFree`. None of them
is tuned. The data are the handwritten digits that come with scikit-learn. The program prints a table. Into `--out`
it writes a figure of the loss against time, and logs for TensorBoard.
"""

import argparse
import math
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import matplotlib

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

import keras_curvature as kc

parser = argparse.ArgumentParser(description="Adam, Neumann, CurveBall and HessianFree on scikit-learn's digits.")
parser.add_argument("--out", default="quickstart_out", help="folder for the figure and the logs")
parser.add_argument("--epochs", type=int, default=40)
args = parser.parse_args()

# 1437 images of 8x8 pixels in 10 classes, 360 for testing; a 64-64-32-10 network with tanh.
problem = kc.problems.get("digits_mlp")
(x, y), (x_test, y_test) = problem.data()

# Adam and Neumann need gradients, which any `keras.Model` gives. CurveBall and HessianFree also need products with the
# curvature: `curved(model)` is the one line more. HessianFree solves for the minimum of its quadratic model of the
# loss, so the batch behind that model should be large: here it is all of the data, one step per epoch. Neumann counts
# its warm-up and its resets in epochs here, as its paper does, and must be told how long one is.
steps_per_epoch = math.ceil(len(x) / problem.batch_size)
RUNS = {
    "Adam": (keras.optimizers.Adam, False, problem.batch_size),
    "Neumann": (lambda: kc.Neumann.from_epochs(steps_per_epoch), False, problem.batch_size),
    "CurveBall": (kc.CurveBall, True, problem.batch_size),
    "HessianFree": (kc.HessianFree, True, len(x)),
}


class Watch(keras.callbacks.Callback):
    """One progress bar for the whole run; the time that the steps take; the loss of the whole training set.

    The clock runs during steps only: not while TensorFlow traces the graph (the first step counts as a median one), and
    not during evaluations. The loss in Keras' own logs is the mean over an epoch in which the weights move; with one
    step per epoch that is the loss *before* it. So it is evaluated here, at the same weights as the test accuracy.
    """

    def __init__(self):
        super().__init__()
        self.steps, self.ends, self.losses = [], [], []

    def on_train_begin(self, logs=None):
        self.bar = keras.utils.Progbar(self.params["epochs"], unit_name="epoch")

    def on_train_batch_begin(self, batch, logs=None):
        self.begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(time.perf_counter() - self.begin)

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(len(self.steps))
        self.losses.append(self.model.evaluate(x, y, batch_size=len(x), verbose=0, return_dict=True)["loss"])
        shown = [("loss", self.losses[-1])] + [(k, v) for k, v in logs.items() if k in ("val_accuracy", "damping")]
        self.bar.stateful_metrics = {name for name, _ in shown}
        self.bar.update(epoch + 1, shown)

    @property
    def seconds(self):
        """Time in steps up to the end of each epoch."""
        steps = [statistics.median(self.steps[1:] or self.steps), *self.steps[1:]]
        return [sum(steps[:end]) for end in self.ends]


def train(name, optimizer, curve, batch_size):
    """One run; its `Watch` and the test accuracy."""
    model = problem.model(seed=0)
    if curve:
        model = kc.curved(model)
    model.compile(optimizer=optimizer(), loss=problem.loss(), metrics=["accuracy"])
    watch = Watch()
    callbacks = [watch, keras.callbacks.TensorBoard(os.path.join(args.out, "logs", name), write_graph=False)]
    if name == "Neumann" and not curve:  # on a plain model: validate at the solution, not at the displaced weights
        callbacks.insert(0, kc.callbacks.SwapNeumannWeights(swap_on_epoch=True))
    keras.utils.set_random_seed(0)  # the same batches for all
    test = (x_test, y_test)
    model.fit(x, y, batch_size=batch_size, epochs=args.epochs, validation_data=test, callbacks=callbacks, verbose=0)
    return watch, model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]


def draw(results, path):
    """Training loss against seconds and against epochs."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colors = dict(zip(results, ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728")))
    for name, (watch, _) in results.items():
        batch = RUNS[name][2]
        style = {"color": colors[name], "lw": 1.8, "label": f"{name}, batch {batch}"}
        axes[0].plot(watch.seconds, watch.losses, **style)
        axes[1].plot(range(1, len(watch.losses) + 1), watch.losses, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="seconds in training steps (without tracing and evaluation)")
    axes[0].set_ylabel("loss of the training set")
    axes[1].set_xlabel("epochs (passes over the data)")
    for axis in axes:
        axis.grid(alpha=0.3, which="major")
    axes[1].legend(frameon=False)
    figure.suptitle("Handwritten digits, 64-64-32-10 network, no optimizer tuned")
    figure.savefig(path, dpi=110)


results = {}
for name, (optimizer, curve, batch_size) in RUNS.items():
    print(f"\n{name}, batches of {batch_size}")
    results[name] = train(name, optimizer, curve, batch_size)

print(f"\n{'optimizer':<12} {'batch':>6} {'epochs':>7} {'seconds':>8} {'training loss':>14} {'test accuracy':>14}")
for name, (watch, accuracy) in results.items():
    print(
        f"{name:<12} {RUNS[name][2]:>6} {len(watch.losses):>7} {watch.seconds[-1]:>8.1f} {watch.losses[-1]:>14.2g} "
        f"{accuracy:>14.1%}"
    )
figure, logs = os.path.join(args.out, "loss.png"), os.path.join(args.out, "logs")
draw(results, figure)
print(f"\nThe figure: {figure}")
print(f"The logs, damping and all:\n\n    tensorboard --logdir {logs}\n\nand open http://localhost:6006 in a browser.")
