"""A dataset of the shape of ImageNet, generated: JPEGs of many sizes, written in the form of TensorFlow Datasets.

It lies where the real one would, under its name and version, so that `tfds.load("imagenet2012", data_dir=...)` itself
reads it. The images show a class: a field of one of ten colours with noise on it. They are no test of a method.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

NAME, VERSION, CLASSES = "imagenet2012", "5.1.0", 1000
SHOWN = 10  # classes that have images


def write(data_dir, train=512, validation=100, sides=(200, 600), seed=0):
    """Write the two splits below `data_dir`; returns the builder.

    Raises:
        FileExistsError: There is an `imagenet2012` in `data_dir` already.
    """
    folder = pathlib.Path(data_dir) / NAME
    if folder.exists():
        raise FileExistsError(f"`data_dir`: '{folder}' is there already and is not overwritten.")
    tfds.disable_progress_bar()
    splits = {"train": images(train, sides, seed), "validation": images(validation, sides, seed + 1)}
    return tfds.dataset_builders.store_as_tfds_dataset(
        name=NAME, version=VERSION, data_dir=data_dir, split_datasets=splits, description="Generated; not ImageNet.",
        download_config=tfds.download.DownloadConfig(num_shards=4),
        features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
            "file_name": tfds.features.Text(),
        }),
    )  # fmt: skip


def images(count, sides, seed):
    """Names and examples, one after another; each is a function of the seed and its number."""
    for number in range(count):
        random = np.random.default_rng((seed, number))
        shown = number % SHOWN
        height, width = random.integers(*sides, size=2)
        color = np.random.default_rng(shown).uniform(40, 215, 3)
        grain = random.normal(0, 30, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
        fine = random.normal(0, 12, (height, width, 3))
        image = np.clip(color + grain + fine, 0, 255).astype("uint8")
        label = shown * (CLASSES // SHOWN)
        name = f"n{label:08d}_{number}.JPEG"
        yield name, {"image": image, "label": label, "file_name": name}


def mean_bytes(data_dir, split="train"):
    """Mean size of a JPEG."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    dataset = tfds.load(NAME, split=split, data_dir=data_dir, download=False, decoders=decoders)
    return float(np.mean([tf.strings.length(example["image"]) for example in dataset]))
