"""Neumann, two-loop Neumann, CurveBall and Hessian-free with their defaults on MNIST, beside Adam:

    pip install ".[examples]"
    python examples/mnist.py --data_dir ~/tensorflow_datasets --download

A 784-128-64-10 network with ReLU, five epochs, the same initial weights and the same order of the images for all.
Nothing is tuned: every optimizer has its defaults. The only choice is the batch size. Adam, Neumann, CurveBall and the
two-loop Neumann take batches of 128. HessianFree minimizes a quadratic model of each batch, so it overfits small
batches. Its test accuracy was 90% after two epochs with batches of 512 and 93% with 1024. After five epochs it was
96.8% with 2048, 96.0% to 97.2% with 6000, and 97.5% and 97.7% with 12000, which makes five steps per epoch.

`--optimizer` runs one of them beside Adam: adam, neumann, two_loop_neumann, curveball, hessian_free.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras

import keras_curvature as kc

HESSIAN_FREE_BATCH = 12000

# name: (optimizer, whether the model must be curved, batch size)
RUNS = {
    "adam": (keras.optimizers.Adam, False, 128),
    "neumann": (kc.Neumann, False, 128),
    "two_loop_neumann": (kc.TwoLoopNeumann, True, 128),
    "curveball": (kc.CurveBall, True, 128),
    "hessian_free": (kc.HessianFree, True, HESSIAN_FREE_BATCH),
}

parser = argparse.ArgumentParser(description="Neumann, CurveBall and Hessian-free on MNIST.")
parser.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default the variable TFDS_DATA_DIR")
parser.add_argument("--download", action="store_true", help="download MNIST into it, where it is not there")
parser.add_argument("--optimizer", choices=["all", *RUNS], default="all")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the images")
args = parser.parse_args()

problem = kc.problems.get("mnist_mlp")
(x, y), (x_test, y_test) = problem.data(args.data_dir, args.download)


class Clock(keras.callbacks.Callback):
    """Seconds in the steps of each epoch; the run's first step, which traces the graph, counts as a median one."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append([])

    def on_train_batch_begin(self, batch, logs=None):
        self.begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.epochs[-1].append(time.perf_counter() - self.begin)

    @property
    def seconds_per_epoch(self):
        self.epochs[0][0] = statistics.median(self.epochs[0][1:])
        return sum(map(sum, self.epochs)) / len(self.epochs)


def train(name):
    """One row of the table."""
    optimizer, curve, batch_size = RUNS[name]
    model = problem.model(args.seed)
    if curve:
        model = kc.curved(model)
    model.compile(optimizer=optimizer(), loss=problem.loss(), metrics=["accuracy"])
    clock = Clock()
    keras.utils.set_random_seed(args.seed)
    model.fit(x, y, batch_size=batch_size, epochs=args.epochs, callbacks=[clock], verbose=2)
    # Neumann's weights are displaced while `fit` runs; its end assigns the solution.
    train_loss = model.evaluate(x, y, batch_size=2000, verbose=0, return_dict=True)["loss"]
    accuracy = model.evaluate(x_test, y_test, batch_size=2000, verbose=0, return_dict=True)["accuracy"]
    return clock.seconds_per_epoch, train_loss, accuracy


rows = {}
for name in RUNS if args.optimizer == "all" else dict.fromkeys(["adam", args.optimizer]):
    print(f"\n{name}, batches of {RUNS[name][2]}")
    rows[name] = train(name)

print(f"\n784-128-64-10 on MNIST, {args.epochs} epochs, defaults (97% is the mark)\n")
print(f"{'optimizer':<18} {'batch':>6} {'s/epoch':>8} {'Adam =1':>8} {'training loss':>14} {'test accuracy':>14}")
for name, (seconds, loss, accuracy) in rows.items():
    print(
        f"{name:<18} {RUNS[name][2]:>6} {seconds:>8.2f} {seconds / rows['adam'][0]:>8.1f} {loss:>14.4f} "
        f"{accuracy:>14.2%}"
    )
