"""ImageNet as batches: `tfds.load("imagenet2012")`, Inception's augmentation, an order that can be taken up anywhere.

The training stream is a function of `(seed, epoch)`: the order of files and records, and what happens to the i-th
image of an epoch, are drawn from these and nothing else. So a run that goes on from a checkpoint skips to its place
among the undecoded records and sees from there on what it would have seen. Every input pipeline (one per worker, or
per host of a TPU) reads a fixed share of its own, of the same size as all others, and all batches are full.

In the evaluation every image counts exactly once: the last batches are filled up with images of weight 0.
"""

import dataclasses
import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
import tensorflow_datasets as tfds

NAME = "imagenet2012"
CROP = 0.875  # of the shorter side, in the evaluation


@dataclasses.dataclass(frozen=True)
class ImageNet:
    """The two splits as distributed batches for a strategy.

    Args:
        data_dir: The folder of TensorFlow Datasets, which holds `imagenet2012/`; `gs://` works too.
        image_size: Side of the square images.
        per_replica_batch: Images in a batch of one replica.
        seed: Of order and augmentation.
        color: Colour distortion: "none", "fast" (brightness and saturation, Inception's fast mode) or "full" (also hue
            and contrast).
        shuffle_buffer: Records, undecoded, among which an epoch's order is drawn, beyond that of the files.
        evaluation_batch: Images in a batch of one replica in the evaluation; `None`: `per_replica_batch`.
    """

    data_dir: str
    image_size: int = 224
    per_replica_batch: int = 32
    seed: int = 0
    color: str = "fast"
    shuffle_buffer: int = 16384
    evaluation_batch: int | None = None

    def __post_init__(self):
        builder = tfds.builder(NAME, data_dir=self.data_dir)
        if not builder.is_prepared():
            raise FileNotFoundError(
                f"`--data_dir`: no {NAME} in '{self.data_dir}': there is no '{builder.data_dir}' that TensorFlow "
                "Datasets has prepared. ImageNet must be fetched by hand: log in at https://image-net.org, put "
                "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into a folder and run "
                f"`tfds build {NAME} --data_dir {self.data_dir} --manual_dir FOLDER`."
            )
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "classes", builder.info.features["label"].num_classes)

    def steps_per_epoch(self, batch_size):
        """Full batches in an epoch."""
        steps = self.sizes["train"] // batch_size
        if steps == 0:
            raise ValueError(
                f"`--batch_size`: {batch_size} is more than the {self.sizes['train']} images in '{self.data_dir}'."
            )
        return steps

    # Training.

    def training(self, strategy, batch_size, epoch=0, step=0):
        """An endless distributed stream of `(images, one-hot labels)` from `step` of `epoch` on.

        Every replica gets its part of a batch in one piece; the model cuts it into micro-batches.
        """

        def pipeline(context):
            share = batch_size // context.num_input_pipelines
            stream = self.records(share * self.steps_per_epoch(batch_size), epoch, share * step, context)
            images = stream.map(self._augmented, tf.data.AUTOTUNE, deterministic=True)
            batches = images.batch(batch_size // strategy.num_replicas_in_sync, drop_remainder=True).prefetch(2)
            # a strategy gives batches of unknown size where it does not know that the data do not end
            return batches.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

        return strategy.distribute_datasets_from_function(pipeline)

    def records(self, length, epoch, skip, context=tf.distribute.InputContext()):
        """Undecoded `(epoch, index, jpeg, label)` of one pipeline: `length` per epoch, without the first `skip`."""
        split = tfds.even_splits("train", context.num_input_pipelines, drop_remainder=True)
        split = split[context.input_pipeline_id]

        @tf.autograph.experimental.do_not_convert
        def of_epoch(number):
            # of this function's graph: the order shall not depend on the seed that the program has set
            tf.compat.v1.set_random_seed(1)
            examples = self._read(split, shuffle_files=True, shuffle_seed=self.seed + 1_000_003 * number)
            examples = examples.map(lambda example: (example["image"], example["label"]))
            examples = examples.shuffle(self.shuffle_buffer, self.seed + 7 + 1_000_003 * number).take(length)
            examples = examples.enumerate().skip(tf.where(number == epoch, tf.cast(skip, tf.int64), 0))
            return examples.map(lambda index, example: (number, index, *example))

        return tf.data.Dataset.range(epoch, 2**31).flat_map(of_epoch)

    def _read(self, split, shuffle_files=False, shuffle_seed=None):
        options = tf.data.Options()
        options.deterministic = True
        return tfds.load(
            NAME, split=split, data_dir=self.data_dir, download=False, shuffle_files=shuffle_files,
            decoders=tfds.decode.PartialDecoding(
                {"image": True, "label": True}, decoders={"image": tfds.decode.SkipDecoding()}
            ),
            read_config=tfds.ReadConfig(options=options, shuffle_seed=shuffle_seed, try_autocache=False),
        )  # fmt: skip

    def _augmented(self, epoch, index, jpeg, label):
        seed = tf.random.experimental.stateless_fold_in(tf.stack([tf.cast(self.seed, tf.int64), epoch]), index)
        return augmented(jpeg, self.image_size, seed, self.color), tf.one_hot(label, self.classes)

    # Evaluation.

    def evaluation_steps(self, strategy, pipelines=1, at_once=1):
        """Batches in an evaluation, a multiple of `at_once`, the steps per execution."""
        largest = -(-self.sizes["validation"] // pipelines)
        images = at_once * (strategy.num_replicas_in_sync // pipelines) * self._evaluation_batch
        return at_once * -(-largest // images)

    @property
    def _evaluation_batch(self):
        return self.evaluation_batch or self.per_replica_batch

    def evaluation(self, strategy, at_once=1):
        """A distributed dataset of `(images, one-hot labels, weights)`; every image has weight 1 exactly once.

        It begins again after `evaluation_steps`: Keras draws a batch from an iterator that it has used up before it
        makes a new one.
        """

        def pipeline(context):
            split = tfds.even_splits("validation", context.num_input_pipelines, drop_remainder=False)
            images = self._read(split[context.input_pipeline_id]).map(self._central, tf.data.AUTOTUNE)
            pads = tf.data.Dataset.from_tensors(self._pad()).repeat()
            replicas = strategy.num_replicas_in_sync // context.num_input_pipelines
            batches = replicas * self.evaluation_steps(strategy, context.num_input_pipelines, at_once)
            images = images.concatenate(pads).batch(self._evaluation_batch, drop_remainder=True)
            images = images.take(batches).repeat().prefetch(2)
            return images.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

        return strategy.distribute_datasets_from_function(pipeline)

    def _central(self, example):
        return central(example["image"], self.image_size), tf.one_hot(example["label"], self.classes), 1.0

    def _pad(self):
        return tf.zeros((self.image_size, self.image_size, 3), tf.uint8), tf.zeros(self.classes), 0.0


# One image. Bytes, that the model scales: batches of 32000 are waiting on the host.


def augmented(jpeg, size, seed, color="fast"):
    """A random crop of 8 to 100% of the area, resized, perhaps mirrored, its colours distorted; (size, size, 3)."""
    seeds = tf.unstack(tf.random.split(seed, 6))
    box, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(jpeg), tf.zeros((1, 0, 4)), seeds[0], aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0), max_attempts=100, use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    window = tf.concat([box[:2], extent[:2]], axis=0)  # y, x, height, width
    image = tf.io.decode_and_crop_jpeg(jpeg, window, channels=3)
    image = tf.image.resize(image, (size, size)) / 255.0
    image = tf.image.stateless_random_flip_left_right(image, seeds[1])
    return as_bytes(distorted(image, seeds[2:], color))


def distorted(image, seeds, color):
    """An image in [0, 1] with its colours changed by Inception's amounts, in one of two orders."""
    if color == "none":
        return image

    def brightness(image):
        return tf.image.stateless_random_brightness(image, 32 / 255, seeds[0])

    def saturation(image):
        return tf.image.stateless_random_saturation(image, 0.5, 1.5, seeds[1])

    def hue(image):
        return tf.image.stateless_random_hue(image, 0.2, seeds[2])

    def contrast(image):
        return tf.image.stateless_random_contrast(image, 0.5, 1.5, seeds[2] + 1)

    def after_one_another(*changes):
        return lambda: functools.reduce(lambda image, change: change(image), changes, image)

    one, two = ((brightness, saturation), (saturation, brightness))
    if color == "full":
        one, two = (brightness, saturation, hue, contrast), (saturation, brightness, contrast, hue)
    first = tf.random.stateless_uniform((), seeds[3]) < 0.5
    return tf.clip_by_value(tf.cond(first, after_one_another(*one), after_one_another(*two)), 0.0, 1.0)


def central(jpeg, size):
    """The middle of the image, 87.5% of the shorter side, resized; (size, size, 3)."""
    shape = tf.io.extract_jpeg_shape(jpeg)
    side = tf.cast(CROP * tf.cast(tf.minimum(shape[0], shape[1]), tf.float32), tf.int32)
    window = tf.stack([(shape[0] - side) // 2, (shape[1] - side) // 2, side, side])
    return as_bytes(tf.image.resize(tf.io.decode_and_crop_jpeg(jpeg, window, channels=3), (size, size)) / 255.0)


def as_bytes(image):
    """[0, 1] as `uint8`."""
    return tf.saturate_cast(tf.round(255.0 * image), tf.uint8)
