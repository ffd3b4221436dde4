"""The deep autoencoder of the Hessian-free literature, trained by `HessianFree` and by Adam:

    pip install ".[examples]"
    python examples/autoencoder.py --small --data_dir ~/tensorflow_datasets --download

MNIST through 784-1000-500-250-30 and back, logistic units, a linear code of 30 numbers, Martens' sparse initialization:
the network of Hinton and Salakhutdinov (2006), which plain gradient descent could not train. `--small` suits two
cores: 784-200-100-30 and a tenth of the images.

The network is trained on the cross-entropy of the pixels. As in the literature, the program reports the squared error,
summed over the pixels of an image and averaged over the images. For the large network and the training set,
Sutskever et al. (2013) give 0.69 for Hessian-free without weight decay, 0.73 for well-tuned Nesterov momentum and 2.1
for plain SGD, after hundreds of thousands of steps. Martens' first Hessian-free reached 1.40. A few minutes are not
enough for these numbers, but they show how far each update goes.

Adam gets batches of 200. HessianFree has the settings of Martens' code: gradient and loss of the whole training set,
curvature of a quarter of it, initial damping 45. To save time, the large network gets batches of 6000 images in place
of the whole set. Martens' loss is the sum over the pixels and Keras' cross-entropy is their mean, so the same damping
is 45 / 784 here.
"""

import argparse
import functools
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras

import keras_curvature as kc

parser = argparse.ArgumentParser(description="A deep autoencoder: HessianFree against Adam.")
parser.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default the variable TFDS_DATA_DIR")
parser.add_argument("--download", action="store_true", help="download MNIST into it, where it is not there")
parser.add_argument("--small", action="store_true", help="784-200-100-30 and 6000 images")
parser.add_argument("--optimizer", choices=["both", "adam", "hessian_free"], default="both")
parser.add_argument("--seconds", type=float, default=120, help="time in training steps for each optimizer")
args = parser.parse_args()

problem = kc.problems.get("autoencoder")
(x, _), (x_test, _) = problem.data(args.data_dir, args.download)
build = problem.model
if args.small:
    x = x[:6000]
    build = kc.problems.seeded(functools.partial(kc.problems.networks.autoencoder, (784, 200, 100, 30)))



def hessian_free():
    """Martens' settings."""
    damping = kc.LevenbergMarquardt(initial=45 / 784, decay=2 / 3, low=0.25, high=0.75, every=1)
    return kc.HessianFree(damping=damping, curvature_batch=0.25)


RUNS = {"adam": (keras.optimizers.Adam, False, 200), "hessian_free": (hessian_free, True, 6000)}


class Budget(keras.callbacks.Callback):
    """Ends `fit` when the time for steps is used up; prints the squared errors ten times on the way.

    The first step, which traces the graph, is not counted.
    """

    def __init__(self, seconds):
        super().__init__()
        self.limit, self.seconds, self.updates, self.rows = seconds, 0.0, 0, []

    def on_train_batch_begin(self, batch, logs=None):
        self.begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.updates += 1
        if self.updates > 1:
            self.seconds += time.perf_counter() - self.begin
        self.model.stop_training = over = self.seconds >= self.limit
        if self.seconds >= len(self.rows) * self.limit / 10 or over:
            self.say(logs)

    def say(self, logs):
        """One line, in between; `evaluate` would reset the metrics of the running epoch."""
        errors = [float(keras.ops.mean(squared_error(self.model, part))) for part in (x, x_test)]
        self.rows.append((self.seconds, self.updates, *errors))
        numbers = "  ".join(f"{k} {logs[k]:.3g}" for k in ("damping", "cg_iterations", "reduction_ratio") if k in logs)
        print("{:7.1f} {:8d} {:15.3f} {:11.3f}  ".format(*self.rows[-1]) + numbers, flush=True)


def squared_error(model, images):
    """Per image, summed over its pixels."""
    pixels = keras.ops.sigmoid(model.predict(images, batch_size=2000, verbose=0))
    return keras.ops.sum(keras.ops.square(pixels - images), axis=-1)


rows = {}
for name in RUNS if args.optimizer == "both" else [args.optimizer]:
    optimizer, curve, batch_size = RUNS[name]
    model = build(0)
    if curve:
        model = kc.curved(model)
    model.compile(optimizer=optimizer(), loss=problem.loss())
    print(f"\n{name}, batches of {batch_size}, {model.count_params()} weights, {len(x)} images")
    print("seconds  updates  training error  test error")
    budget = Budget(args.seconds)
    keras.utils.set_random_seed(0)
    model.fit(x, x, batch_size=batch_size, epochs=10**6, callbacks=[budget], verbose=0)
    rows[name] = budget.rows[-1]

print(f"\n{'optimizer':<14} {'seconds':>8} {'updates':>8} {'training error':>15} {'test error':>11}")
for name, row in rows.items():
    print("{:<14} {:>8.0f} {:>8d} {:>15.3f} {:>11.3f}".format(name, *row))
