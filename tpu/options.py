"""The command line of `train.py`: its options, and what is wrong with their values."""

import argparse
import dataclasses
import json
import os

import models
import presets
import strategy as strategies
import tensorflow as tf
from making import OPTIMIZERS

# the smallest value of options that are counts, and of those that are numbers
COUNTS = {
    "batch_size": 1, "epochs": 1, "per_replica_batch": 1, "eval_batch": 1, "steps_per_execution": 1, "cpu_devices": 1,
    "image_size": 32, "shuffle_buffer": 1, "checkpoint_every": 1, "log_every": 1, "eval_every": 1, "seed": 0,
}  # fmt: skip
POSITIVE = ("learning_rate", "base_learning_rate", "stair_epochs", "stair_factor", "tpu_timeout", "checkpoint_minutes")
AT_LEAST_0 = ("warmup_epochs", "reset_epochs", "weight_decay", "alpha", "beta")
SHARES = ("label_smoothing", "gamma", "mu_end", "batch_norm_momentum")  # in [0, 1)


def arguments(argv=None):
    """The parsed command line, and the parser."""
    parser = argparse.ArgumentParser(
        description="The Neumann paper's ImageNet training.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets, and the single-crop top-1 error that each should reach:\n\n" + presets.table(),
    )  # fmt: skip
    what = parser.add_argument_group("what", "a preset, and what differs from it")
    what.add_argument("--preset", metavar="NAME", help="see below; the other options of this group override it")
    what.add_argument("--model", metavar="{" + ",".join(models.NAMES) + "}", help="the network; default resnet50")
    what.add_argument("--optimizer", metavar="{" + ",".join(OPTIMIZERS) + "}", help="the method; default neumann")
    for field in (field for field in dataclasses.fields(presets.Recipe) if field.metadata):
        says = field.metadata["help"] + ("" if field.default is None else f"; default {field.default}")
        if field.type is bool:
            what.add_argument(f"--{field.name}", action="store_true", default=None, help=says)
        else:
            kind = field.type if field.type in (int, str) else float
            what.add_argument(f"--{field.name}", type=kind, choices=field.metadata["choices"], help=says)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--strategy", default="auto", metavar="{" + ",".join(strategies.KINDS) + "}",
        help="auto: a TPU where one is named or seen, else the workers of TF_CONFIG, else all GPUs, else one device",
    )  # fmt: skip
    where.add_argument("--tpu", help="name of the TPU, or 'local' on a TPU VM; by default the variable TPU_NAME")
    where.add_argument("--tpu_timeout", type=float, default=300, help="seconds until a silent TPU is given up; 300")
    where.add_argument("--per_replica_batch", type=int, default=32, help="images in a pass and its statistics; 32")
    where.add_argument("--mixed_bfloat16", action="store_true", help="compute in bfloat16, keep weights in float32")
    where.add_argument("--xla", action="store_true", help="compile the step, on one replica; a TPU does anyway")
    where.add_argument(
        "--steps_per_execution",
        type=int,
        default=1,
        help="steps without the host, a divisor of the steps of an epoch; on a TPU 10 to 100 (default 1)",
    )
    where.add_argument("--cpu_devices", type=int, help="logical CPUs, to try --strategy mirrored without GPUs")
    data_group = parser.add_argument_group("data")
    data_group.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default the variable TFDS_DATA_DIR")
    data_group.add_argument("--image_size", type=int, help="side in pixels; by default that of the model, 224 or 299")
    data_group.add_argument(
        "--color", choices=["none", "fast", "full"], default="fast", help="distortion of colours; default fast"
    )
    data_group.add_argument("--shuffle_buffer", type=int, default=16384, help="undecoded images to draw from; 16384")
    data_group.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation; default 0")
    run = parser.add_argument_group("the run")
    run.add_argument("--run_dir", help="its folder: checkpoints, logs, the trained model")
    run.add_argument("--checkpoint_every", type=int, help="steps between two checkpoints; default: those of an epoch")
    run.add_argument("--checkpoint_minutes", type=float, help="minutes between two checkpoints, at most")
    run.add_argument("--eval_every", type=int, default=1, help="epochs between two validations; default 1")
    run.add_argument("--eval_batch", type=int, help="images of a replica in validation; default --per_replica_batch")
    run.add_argument("--log_every", type=int, default=100, help="steps between two lines and points; 100")
    run.add_argument("--profile", metavar="START,STOP", help="steps of this start to profile into TensorBoard")
    run.add_argument("--dry_run", action="store_true", help="everything, small, on generated images")
    run.add_argument("--list_presets", action="store_true", help="print the presets and stop")
    return parser.parse_args(argv), parser


def recipe_of(args):
    """The preset, and what the command line changes of it.

    Raises:
        ValueError: A value cannot be.
    """
    names = [field.name for field in dataclasses.fields(presets.Recipe)]
    given = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = presets.changed(presets.get(args.preset) if args.preset else presets.Recipe(), **given)
    for option, value, known in (("model", recipe.model, models.NAMES), ("optimizer", recipe.optimizer, OPTIMIZERS)):
        if value not in known:
            raise ValueError(f"`--{option}` must be one of {', '.join(known)}. Received: {value!r}")
    if recipe.zero_last_gamma and recipe.model in models.MODELS:
        raise ValueError(f"`--zero_last_gamma` needs `--model {models.V1_5}`. Received: --model {recipe.model}")
    check({**vars(args), **dataclasses.asdict(recipe)})
    return recipe


def check(values):
    """Raise a `ValueError` for a number that is out of its range."""
    rules = [
        *((name, f"an integer of at least {low}", lambda v, low=low: v >= low) for name, low in COUNTS.items()),
        *((name, "more than 0", lambda v: v > 0) for name in POSITIVE),
        *((name, "at least 0", lambda v: v >= 0) for name in AT_LEAST_0),
        *((name, "at least 0 and less than 1", lambda v: 0 <= v < 1) for name in SHARES),
    ]
    for name, words, holds in rules:
        value = values.get(name)
        if value is not None and not holds(value):  # a NaN does not either
            raise ValueError(f"`--{name}` must be {words}. Received: {value}")


def profiled(text):
    """`(first, last)` of `--profile START,STOP`."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts) or not 0 < int(parts[0]) <= int(parts[1]):
        raise ValueError(f"`--profile` must be two steps, such as 100,110. Received: {text}")
    return int(parts[0]), int(parts[1])


def micro_batches(batch_size, replicas, per_replica):
    """Passes that a replica makes for one step."""
    if batch_size % (replicas * per_replica) == 0:
        return batch_size // (replicas * per_replica)
    share, rest = divmod(batch_size, replicas)
    fits = [size for size in range(1, min(per_replica, share) + 1) if share % size == 0]
    remedy = f"`--per_replica_batch {fits[-1]}` divides it" if not rest and fits else "choose another batch size"
    raise ValueError(
        f"`--batch_size` {batch_size} cannot be cut into whole passes of `--per_replica_batch` {per_replica} on "
        f"{replicas} replicas: it must be a multiple of {replicas * per_replica}; {remedy}."
    )


def check_execution(steps, at_once, done=0):
    """Raise a `ValueError` where `at_once` steps do not divide an epoch's: Keras would run more, unseen by schedules.

    Args:
        steps: Steps in an epoch.
        at_once: `--steps_per_execution`.
        done: Steps of the epoch that the run has behind it.
    """
    divisors = [n for n in range(1, min(steps, 1000) + 1) if steps % n == 0]
    if steps % at_once:
        near = sorted(divisors, key=lambda n: abs(n - at_once))[:3]
        raise ValueError(
            f"`--steps_per_execution` {at_once} must divide the {steps} steps of an epoch. Near it are "
            f"{', '.join(map(str, sorted(near)))}."
        )
    if done % at_once:
        raise ValueError(
            f"`--steps_per_execution` {at_once} must divide the {done} steps that the run has done of its epoch. Go on "
            "with the number that it was started with."
        )


def claim(run_dir, settings, chief):
    """Make the folder this run's, or find that it is; nothing that lies there is overwritten."""
    path = os.path.join(run_dir, "settings.json")
    if tf.io.gfile.exists(path):
        with tf.io.gfile.GFile(path) as file:
            there = json.load(file)
        differ = [f"--{k} {there[k]} there, {v} here" for k, v in settings.items() if k in there and there[k] != v]
        if differ:
            raise ValueError(
                f"`--run_dir` '{run_dir}' holds a run with other settings: {'; '.join(differ)}. Go on with those, or "
                "give another folder."
            )
    elif tf.io.gfile.isdir(run_dir) and tf.io.gfile.listdir(run_dir):
        raise ValueError(f"`--run_dir` '{run_dir}' is not empty and no run of this program. Give a new folder.")
    elif chief:
        tf.io.gfile.makedirs(run_dir)
        with tf.io.gfile.GFile(path, "w") as file:
            json.dump(settings, file, indent=1)
