"""The curvature of a small network after an epoch of MNIST: which layers hold it, and is the learning rate stable?

    pip install ".[examples]"
    python examples/curvature_report.py --data_dir ~/tensorflow_datasets --download

It prints the report and writes `curvature_report.png`, `.json` and `.txt`. The saved model can be measured again, with
another matrix or in training mode, from the command line:

    keras-curvature report mnist_cnn.keras --data mnist --data_dir ~/tensorflow_datasets --kind ggn
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
from keras import layers

import keras_curvature as kc

parser = argparse.ArgumentParser(description="The curvature of a network on MNIST.")
parser.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default the variable TFDS_DATA_DIR")
parser.add_argument("--download", action="store_true", help="download MNIST into it, where it is not there")
parser.add_argument("--path", default="curvature_report", help="where to write the report, without an ending")
parser.add_argument("--save", default="mnist_cnn.keras", help="where to write the model")
args = parser.parse_args()

(x, y), _ = kc.problems.data("mnist", args.data_dir, args.download)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(3),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(10),
    ],
    name="mnist_cnn",
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"])
model.fit(x, y, batch_size=128, epochs=1, verbose=2)
model.save(args.save)

kc.report(model, (x, y), path=args.path)
