"""Trains the paper's networks on ImageNet with large batches, on one device, several, several machines, or a TPU:

    pip install ".[examples]"
    python tpu/train.py --preset paper/resnet50-b32000 --data_dir gs://BUCKET/tensorflow_datasets --run_dir gs://BUCKET/run
    python tpu/train.py --model resnet50 --optimizer neumann --batch_size 4000 --data_dir DIR --run_dir RUN
    python tpu/train.py --list_presets
    python tpu/train.py --dry_run

A run lives in `--run_dir`. Killed or asked to stop (SIGTERM), it goes on where it was by the same command. `--dry_run`
does all of that at once on generated images, in a folder of its own; nothing else is touched. README.md has the rest.
"""

import argparse
import dataclasses
import json
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import data
import keras
import models
import presets
import strategy as strategies
import tensorflow as tf
from schedule import RampThenStairs

import keras_curvature as kc
from keras_curvature.callbacks import Checkpoint, ChiefOnly, Terminated
from keras_curvature.training.callbacks.chief import is_chief

# name: the learning rate per 256 images at the top of the ramp. The first two are those of Goyal et al. (2017), LAMB's
# is that of You et al. (2020) at a batch of 32000; none was tuned here. CurveBall and Hessian-free find their own step.
OPTIMIZERS = {
    "neumann": 0.1, "sgd": 0.1, "rmsprop": 0.01, "adam": 0.01, "lamb": 0.0003, "curveball": None, "hessian_free": None
}  # fmt: skip
DECOUPLED = ("adam", "lamb")  # their weight decay is the optimizer's; that of the others is part of the loss


def arguments(argv=None):
    """The parsed command line, and the parser."""
    parser = argparse.ArgumentParser(
        description="The Neumann paper's ImageNet training.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets, and the single-crop top-1 error that each should reach:\n\n" + presets.table(),
    )  # fmt: skip
    what = parser.add_argument_group("what", "a preset, and what differs from it")
    what.add_argument("--preset", metavar="NAME", help="see below; the other options of this group override it")
    what.add_argument("--model", metavar="{" + ",".join(models.NAMES) + "}")
    what.add_argument("--optimizer", metavar="{" + ",".join(OPTIMIZERS) + "}")
    for field in dataclasses.fields(presets.Recipe):
        if field.name not in ("model", "optimizer", "published", "source"):
            kind = int if field.type is int else float
            what.add_argument(f"--{field.name}", type=kind, help=f"default {field.default}")
    where = parser.add_argument_group("where")
    where.add_argument("--strategy", default="auto", metavar="{" + ",".join(strategies.KINDS) + "}")
    where.add_argument("--tpu", help="name of the TPU, or 'local'; by default the variable TPU_NAME")
    where.add_argument("--tpu_timeout", type=float, default=300, help="seconds until a silent TPU is given up")
    where.add_argument("--per_replica_batch", type=int, default=32, help="images in a pass, and of a batch statistic")
    where.add_argument("--mixed_bfloat16", action="store_true")
    where.add_argument("--xla", action="store_true", help="compile the step, where the strategy does not anyway")
    where.add_argument("--steps_per_execution", type=int, default=1)
    where.add_argument("--cpu_devices", type=int, help="logical CPUs, to try --strategy mirrored without GPUs")
    data_group = parser.add_argument_group("data")
    data_group.add_argument("--data_dir", help="TensorFlow Datasets' folder; by default the variable TFDS_DATA_DIR")
    data_group.add_argument("--image_size", type=int, help="by default that of the model, 224 or 299")
    data_group.add_argument("--color", choices=["none", "fast", "full"], default="fast", help="distortion of colours")
    data_group.add_argument("--shuffle_buffer", type=int, default=16384)
    data_group.add_argument("--seed", type=int, default=0)
    run = parser.add_argument_group("the run")
    run.add_argument("--run_dir", help="its folder: checkpoints, logs, the trained model")
    run.add_argument("--checkpoint_every", type=int, default=500, help="steps, besides every epoch's end")
    run.add_argument("--log_every", type=int, default=100, help="steps between two lines, and points in TensorBoard")
    run.add_argument("--dry_run", action="store_true", help="everything, small, on generated images")
    run.add_argument("--list_presets", action="store_true")
    return parser.parse_args(argv), parser


def recipe_of(args):
    """The preset, and what the command line changes of it."""
    names = [field.name for field in dataclasses.fields(presets.Recipe)]
    given = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = dataclasses.replace(presets.get(args.preset) if args.preset else presets.Recipe(), **given)
    for option, value, known in (("model", recipe.model, models.NAMES), ("optimizer", recipe.optimizer, OPTIMIZERS)):
        if value not in known:
            raise ValueError(f"`--{option}` must be one of {', '.join(known)}. Received: {value!r}")
    return recipe


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


def claim(run_dir, settings, chief):
    """Make the folder this run's, or find that it is; nothing that lies there is overwritten."""
    path = os.path.join(run_dir, "settings.json")
    if tf.io.gfile.exists(path):
        with tf.io.gfile.GFile(path) as file:
            there = json.load(file)
        differ = [f"--{k} {there.get(k)} there, {v} here" for k, v in settings.items() if there.get(k) != v]
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


def schedule_of(recipe, steps_per_epoch):
    """A ramp over the warm-up to a rate that is linear in the batch size, then stairs; a constant for the others."""
    base = recipe.base_learning_rate or OPTIMIZERS[recipe.optimizer]
    if recipe.learning_rate is None and base is None:
        return None
    peak = recipe.learning_rate or base * recipe.batch_size / 256
    start = min(base, peak) if base else peak  # the ramp begins at the rate of a small batch
    ramp, stairs = (round(epochs * steps_per_epoch) for epochs in (recipe.warmup_epochs, recipe.stair_epochs))
    return RampThenStairs(start, peak, ramp, recipe.stair_factor, max(stairs, 1))


def optimizer_of(recipe, steps_per_epoch):
    """The optimizer with the paper's settings."""
    rate, name = schedule_of(recipe, steps_per_epoch), recipe.optimizer
    if name == "neumann":
        return kc.Neumann.from_epochs(
            steps_per_epoch, recipe.warmup_epochs, recipe.reset_epochs or None, learning_rate=rate
        )
    if name in ("curveball", "hessian_free"):
        make = kc.CurveBall if name == "curveball" else kc.HessianFree
        return make() if rate is None else make(rate)
    if name == "sgd":
        return keras.optimizers.SGD(rate, momentum=0.9)
    if name == "rmsprop":
        return keras.optimizers.RMSprop(rate, rho=0.9, momentum=0.9, epsilon=1.0)
    decay = recipe.weight_decay or None
    if name == "adam":
        optimizer = keras.optimizers.Adam(rate, epsilon=0.01, weight_decay=decay)
    else:
        optimizer = keras.optimizers.Lamb(rate, weight_decay=decay)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def model_of(recipe, imagenet, passes, args):
    """The compiled model; call it in the strategy's scope."""
    decay = 0.0 if recipe.optimizer in DECOUPLED else recipe.weight_decay
    model = models.build(recipe.model, imagenet.image_size, imagenet.classes, decay)
    model = kc.curved(model, micro_batches=passes) if passes > 1 else kc.curved(model)
    optimizer = optimizer_of(recipe, imagenet.steps_per_epoch(recipe.batch_size))
    model.compile(
        optimizer,
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        weighted_metrics=[
            keras.metrics.CategoricalAccuracy("top_1"),
            keras.metrics.TopKCategoricalAccuracy(5, "top_5"),
            keras.metrics.CategoricalCrossentropy("cross_entropy", from_logits=True),
        ],
        steps_per_execution=args.steps_per_execution,
        jit_compile=True if args.xla else "auto",
    )
    return model


class Progress(keras.callbacks.Callback):
    """Images per second into the logs, and a line now and then."""

    def __init__(self, batch_size, steps_per_epoch, every, say):
        super().__init__()
        self.batch_size, self.steps_per_epoch, self.every, self.say = batch_size, steps_per_epoch, every, say

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.began = epoch, None

    def on_train_batch_end(self, batch, logs=None):
        if self.began is None:  # the first step traces the graph
            self.began = time.perf_counter(), batch
        step = self.epoch * self.steps_per_epoch + batch + 1
        if step % self.every == 0:
            self.say(f"step {step:>7}  epoch {step / self.steps_per_epoch:7.2f}  {shown(logs)}{self.speed(batch)}")

    def images_per_second(self, batch):
        began, first = self.began
        return self.batch_size * (batch - first) / (time.perf_counter() - began)

    def speed(self, batch):
        return f"  images/s {self.images_per_second(batch):.0f}" if batch > self.began[1] else ""

    def on_test_begin(self, logs=None):
        if getattr(self, "began", None) is not None:
            self.trained = self.images_per_second(self.steps_per_epoch - 1)

    def on_epoch_end(self, epoch, logs=None):
        if self.began is not None:
            logs["images_per_second"] = self.trained
        self.say(f"epoch {epoch + 1:>4} of {self.params['epochs']}  {shown(logs)}")


def shown(logs):
    """The numbers worth a line."""
    names = ("loss", "top_1", "top_5", "mu", "damping", "skipped_steps", "val_top_1", "val_top_5", "images_per_second")
    return "  ".join(f"{name} {float(logs[name]):.4g}" for name in names if name in logs)


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras', whose axis of batches goes on where the run does."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._global_train_batch = int(self.model.optimizer.iterations.numpy())


def prepare(args):
    """Everything that a run needs, `(recipe, strategy, passes, imagenet)`; what is wrong with it is said here."""
    recipe = recipe_of(args)
    for option in ("data_dir", "run_dir"):
        if not getattr(args, option):
            raise ValueError(f"`--{option}` is needed (or `--dry_run`).")
    if args.cpu_devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * args.cpu_devices)
    strategy = strategies.make(args.strategy, args.tpu, args.tpu_timeout)
    passes = micro_batches(recipe.batch_size, strategy.num_replicas_in_sync, args.per_replica_batch)
    size = args.image_size or models.image_size(recipe.model)
    imagenet = data.ImageNet(args.data_dir, size, args.per_replica_batch, args.seed, args.color, args.shuffle_buffer)
    imagenet.steps_per_epoch(recipe.batch_size)
    settings = {**dataclasses.asdict(recipe), "seed": args.seed, "image_size": size, "color": args.color}
    settings = {k: v for k, v in settings.items() if k not in ("epochs", "published", "source")}
    claim(args.run_dir, settings, is_chief(strategy))
    return recipe, strategy, passes, imagenet


def train(args, recipe, strategy, passes, imagenet):
    """Train, or go on training, and report."""
    chief, steps = is_chief(strategy), imagenet.steps_per_epoch(recipe.batch_size)
    say = (lambda *words: print(*words, flush=True)) if chief else (lambda *words: None)
    say(
        f"{recipe.model}, {recipe.optimizer}, {type(strategy).__name__}; batch {recipe.batch_size} = "
        f"{strategy.num_replicas_in_sync} replicas x {passes} passes x {args.per_replica_batch} images; {steps} steps "
        f"per epoch, {recipe.epochs} epochs"
    )
    keras.utils.set_random_seed(args.seed)
    if args.mixed_bfloat16:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    with strategy.scope():
        model = model_of(recipe, imagenet, passes, args)

    checkpoint = Checkpoint(os.path.join(args.run_dir, "checkpoints"), every=args.checkpoint_every, skip_batches=False)
    epoch, step = checkpoint.position
    done = epoch * steps + step
    say(f"resumed at step {done} (step {step} of epoch {epoch + 1})" if done else "begins at step 0")
    board = TensorBoard(os.path.join(args.run_dir, "logs"), update_freq=args.log_every, write_graph=False)
    evaluation = {
        "x": imagenet.evaluation(strategy),
        "steps": imagenet.evaluation_steps(strategy, strategies.pipelines(strategy)),
    }
    try:
        model.fit(
            imagenet.training(strategy, recipe.batch_size, epoch, step), steps_per_epoch=steps, epochs=recipe.epochs,
            validation_data=evaluation["x"], validation_steps=evaluation["steps"], verbose=0, shuffle=False,
            callbacks=[checkpoint, Progress(recipe.batch_size, steps, args.log_every, say), ChiefOnly(board)],
        )  # fmt: skip
    except Terminated as stop:
        say(stop)
        raise
    # on a curved model the weights are the answer, `w - mu m`, at all times
    found = model.evaluate(**evaluation, verbose=0, return_dict=True)
    published = f" (published: {recipe.published}%, {recipe.source})" if recipe.published else ""
    say(
        f"final: top-1 error {100 - 100 * found['top_1']:.2f}%{published}, top-5 error "
        f"{100 - 100 * found['top_5']:.2f}%, cross-entropy {found['cross_entropy']:.4f}"
    )
    if chief:
        model.save(os.path.join(args.run_dir, "model.keras"))


def main(argv=None):
    """The program."""
    tf.get_logger().setLevel("ERROR")
    args, parser = arguments(argv)
    args.data_dir = args.data_dir or os.environ.get("TFDS_DATA_DIR")
    if args.list_presets:
        print(presets.table())
    elif args.dry_run:
        import dry_run

        sys.exit(dry_run.run(args.run_dir))
    else:
        try:
            prepared = prepare(args)
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            parser.exit(2, f"train.py: error: {error}\n")
        train(args, *prepared)


if __name__ == "__main__":
    main()
