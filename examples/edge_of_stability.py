"""Training reaches the largest curvature at which its optimizer is stable, and stays there. One minute on two cores:

    pip install ".[examples]" && python examples/edge_of_stability.py

trains one network from the same weights with gradient descent, with momentum and with Adam. Each step uses all of 500
handwritten digits that come with scikit-learn. During training the program measures the sharpness, which is the largest
eigenvalue of the Hessian (for Adam: of the preconditioned Hessian), and compares it with the limit that the learning
rate sets:

    gauge = learning_rate * sharpness / limit          above 1, steps along the sharpest direction grow

All three gauges climb to 1 and stay there, although the sharpnesses differ by a factor of a thousand. The program
prints a table and writes a figure to `--out`.

After Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient descent on neural networks typically occurs at the edge of
stability" (2021), and Cohen et al., "Adaptive gradient methods at the edge of stability" (2022).
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import matplotlib
import numpy as np
import tensorflow as tf

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt

import keras_curvature as kc
from keras_curvature.monitor.stability import stability
from keras_curvature.solvers import lanczos

parser = argparse.ArgumentParser(description="Gradient descent, momentum and Adam at the edge of stability.")
parser.add_argument("--out", default="edge_of_stability.png", help="where the figure goes")
parser.add_argument("--steps", type=int, default=8000, help="training steps of each optimizer")
parser.add_argument("--every", type=int, default=50, help="steps from one look at the curvature to the next")
args = parser.parse_args()

(images, digits), _ = kc.problems.data("digits")
x, y = images[:500] - 0.5, keras.utils.to_categorical(digits[:500], 10)
RUNS = {
    "gradient descent": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.12, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(1e-3, beta_2=0.99),
}


def network():
    """64-50-50-10 with tanh; always the same weights."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(50, activation="tanh") for _ in range(2)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


def half_squared_error(y, z):
    """Summed over the classes; Keras takes the mean over the images."""
    return 0.5 * tf.reduce_sum(tf.square(y - z), -1)


class Watch(keras.callbacks.Callback):
    """Looks at the curvature after each epoch, which is `--every` steps here."""

    def __init__(self):
        super().__init__()
        self.steps, self.sharpness, self.gauges, self.start = [], [], [], None

    def on_train_begin(self, logs=None):
        self.operator = kc.curvature(self.model, (x, y))
        self.bar = keras.utils.Progbar(self.params["epochs"], unit_name="look")

    def on_epoch_end(self, epoch, logs=None):
        # what the optimizer's state says of its limit now; `preconditioner` is None for gradient descent and momentum
        self.found = stability(self.model.optimizer, self.model.trainable_variables)
        # from the last eigenvector on, a few products are enough
        products = 20 if self.start is None else 6
        like, metric = self.model.trainable_variables, self.found.preconditioner
        largest, _ = lanczos.extremes(self.operator, like, products, start=self.start, metric=metric)
        (self.start,), (sharpness,) = largest.vectors, largest.values
        self.steps.append((epoch + 1) * args.every)
        self.sharpness.append(sharpness)
        self.gauges.append(self.found.gauge(sharpness))
        self.bar.update(epoch + 1, [("gauge", self.gauges[-1]), ("loss", logs["loss"])])

    @property
    def at_the_edge(self):
        """The gauges from the first on that has come to 1, but for 3 %; none, where it has not."""
        reached = np.array(self.gauges) >= 0.97
        return np.array(self.gauges)[np.argmax(reached) :] if reached.any() else np.array([np.nan])


def train(optimizer):
    """One run; its `Watch`."""
    model = network()
    # many steps in one call: the network is so small that the calls would take most of the time
    model.compile(optimizer, half_squared_error, steps_per_execution=args.every)
    watch, batches = Watch(), tf.data.Dataset.from_tensors((x, y)).repeat()
    epochs = args.steps // args.every
    model.fit(batches, epochs=epochs, steps_per_epoch=args.every, callbacks=[watch], verbose=0, shuffle=False)
    return watch


def written(value):
    """A number with four digits, as one would write it."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def draw(results, path):
    """Above, each sharpness with the limit that it has; below, all of them in units of it."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(results), figsize=(11, 5.6), sharex=True, layout="constrained")
    for (name, watch), above, below in zip(results.items(), axes[0], axes[1]):
        limit, edge = watch.found.sharpness_limit, {"color": "#444444", "ls": "--", "lw": 1.2}
        above.plot(watch.steps, watch.sharpness, color="#d62728", lw=1.0)
        above.axhline(limit, label=f"limit {written(limit)}\n= {watch.found.formula}", **edge)
        above.set(title=name, ylim=(0, 1.25 * limit))
        below.plot(watch.steps, watch.gauges, color="#1f77b4", lw=1.0)
        below.axhline(1.0, label="the edge of stability", **edge)
        below.set(xlabel="training steps", ylim=(0, 1.25))
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.legend(loc="lower right", frameon=False)
    axes[0, 0].set_ylabel("sharpness")
    axes[0, -1].set_ylabel("sharpness, preconditioned")
    axes[1, 0].set_ylabel("gauge: learning rate\n× sharpness / limit")
    figure.suptitle("Three optimizers, three limits, one edge: full-batch training of a 64-50-50-10 network on digits")
    figure.savefig(path, dpi=110)


results = {}
for name, optimizer in RUNS.items():
    print(f"\n{name}")
    results[name] = train(optimizer())

print(f"\n{'':<18} {'limit of the sharpness':>32} {'sharpness':>10} {'gauge at the edge: median [10-90 %]':>36}")
for name, watch in results.items():
    low, median, high = np.quantile(watch.at_the_edge, [0.1, 0.5, 0.9])
    limit = f"{watch.found.formula} = {written(watch.found.sharpness_limit)}"
    print(f"{name:<18} {limit:>32} {written(watch.sharpness[-1]):>10} {f'{median:.3f} [{low:.3f}, {high:.3f}]':>36}")
draw(results, args.out)
print(f"\nThe figure: {args.out}")
