"""The curvature of two trainings, side by side in TensorBoard, in a minute:

    pip install ".[examples]"
    python examples/watch_curvature.py
    tensorboard --logdir watch_curvature_out/logs

trains the same network from the same weights with Keras' Adam and with `CurveBall`, on the handwritten digits that come
with scikit-learn. A `CurvatureBoard` watches each training. In the browser, http://localhost:6006:

* Custom Scalars: each group of charts answers a question. Is the step stable? Is the batch large enough? How far does
  a step go? Where is the curvature? The runs `curvature/limit` draw the limits as second lines.
* Histograms: the eigenvalues of the Hessian, from the beginning of training to its end.
* Text: what the board measures, its advice, and the report at the end.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras

import keras_curvature as kc

parser = argparse.ArgumentParser(description="The curvature of two trainings in TensorBoard.")
parser.add_argument("--out", default="watch_curvature_out", help="folder for the logs")
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--budget", type=float, default=0.2, help="share of the time for looking at the curvature")
args = parser.parse_args()

# 1437 images of 8x8 pixels in 10 classes, 360 for testing; a 64-64-32-10 network with tanh.
problem = kc.problems.get("digits_mlp")
(x, y), test = problem.data()

RUNS = {"adam": (keras.optimizers.Adam, False), "curveball": (kc.CurveBall, True)}


def train(name, optimizer, curve):
    """One run with a board; `data` are 1024 images, where the default would be the first batch of 64."""
    keras.utils.clear_session()  # layers of the same names in both
    model = problem.model(seed=0)
    if curve:
        model = kc.curved(model)
    model.compile(optimizer=optimizer(), loss=problem.loss(), metrics=["accuracy"])
    board = kc.callbacks.CurvatureBoard(os.path.join(args.out, "logs", name), data=(x, y), budget=args.budget)
    keras.utils.set_random_seed(0)  # the same batches for both
    model.fit(
        x, y, batch_size=args.batch_size, epochs=args.epochs, validation_data=test, callbacks=[board], verbose=2
    )


for name, (optimizer, curve) in RUNS.items():
    print(f"\n{name}")
    train(name, optimizer, curve)

print(f"\nNow\n\n    tensorboard --logdir {os.path.join(args.out, 'logs')}\n\nand http://localhost:6006 in a browser.")
