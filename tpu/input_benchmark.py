"""How many images per second the input pipeline makes, alone, against the least that any pipeline must do:

    python tpu/input_benchmark.py [--data_dir DIR] [--out tpu/results/input.txt]

The bound reads the same records and does nothing but decode every JPEG whole and resize it. All run in one process, in
turn, several times over; the ratio of the medians is the figure, since images per second are those of the machine and
of what else it does. Without `--data_dir` it writes generated JPEGs of ImageNet's mean size (about 110 kB).
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import data
import generated
import tensorflow as tf

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default generated images")
parser.add_argument("--image_size", type=int, default=224)
parser.add_argument("--images", type=int, default=512, help="per measurement")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--out", help="a file for the table, too")


def pipelines(imagenet, images):
    """`{name: a function that gives a fresh dataset}`."""
    strategy = tf.distribute.get_strategy()
    size = imagenet.image_size

    def bound():
        def decode(epoch, index, jpeg, label):
            return tf.image.resize(tf.io.decode_jpeg(jpeg, channels=3), (size, size))

        records = imagenet.records(images, 0, 0).map(decode, tf.data.AUTOTUNE, deterministic=True)
        return records.batch(32, drop_remainder=True).prefetch(2)

    def evaluation():
        return imagenet.evaluation(strategy)

    def training(color):
        changed = data.ImageNet(imagenet.data_dir, size, color=color, shuffle_buffer=imagenet.shuffle_buffer)
        return lambda: changed.training(strategy, 32)

    return {
        "decode whole, resize (the bound)": bound, "training, --color fast": training("fast"),
        "training, --color full": training("full"), "training, --color none": training("none"),
        "evaluation": evaluation,
    }  # fmt: skip


def speed(dataset, images):
    """Images per second, past the first batches; the pipeline starts and its shuffle buffer fills before."""
    iterator = iter(dataset)
    for _ in range(4):
        next(iterator)
    began = time.perf_counter()
    for _ in range(images // 32):
        next(iterator)
    return 32 * (images // 32) / (time.perf_counter() - began)


def main():
    """Prints the table."""
    args = parser.parse_args()
    folder = args.data_dir
    if folder is None:
        folder = tempfile.mkdtemp(prefix="input_benchmark_")
        generated.write(folder, train=256, validation=64)
    imagenet = data.ImageNet(folder, args.image_size, shuffle_buffer=64)
    made = pipelines(imagenet, args.images)
    speeds = {name: [] for name in made}
    for _ in range(args.repeats):
        for name, make in made.items():
            speeds[name].append(speed(make(), args.images))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    reference, cores = next(iter(medians.values())), len(os.sched_getaffinity(0))
    size = generated.mean_bytes(folder, "validation") / 1000
    lines = [
        f"{args.image_size} pixels, JPEGs of {size:.0f} kB on average, {cores} cores, median of {args.repeats}",
        "",
        f"{'pipeline':<34} {'images/s':>9} {'per core':>9} {'of the bound':>13}",
        *[f"{n:<34} {v:>9.0f} {v / cores:>9.0f} {v / reference:>12.0%}" for n, v in medians.items()],
    ]
    print("\n".join(lines))
    if args.out:
        with open(args.out, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
