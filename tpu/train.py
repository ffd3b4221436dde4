"""Trains the paper's networks on ImageNet with large batches, on one device, several, several machines, or a TPU:

    pip install ".[examples]"
    python tpu/train.py --preset paper/resnet50-b32000 --data_dir gs://BUCKET/tensorflow_datasets --run_dir gs://BUCKET/run
    python tpu/train.py --model resnet50 --optimizer neumann --batch_size 4000 --data_dir DIR --run_dir RUN
    python tpu/train.py --list_presets
    python tpu/train.py --dry_run

A run lives in `--run_dir`. Killed or asked to stop (SIGTERM), it goes on where it was by the same command. `--dry_run`
does all of that at once on generated images, in a folder of its own; nothing else is touched. README.md has the rest.
"""

import dataclasses
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import data
import keras
import models
import presets
import strategy as strategies
import tensorflow as tf
from making import DECOUPLED, optimizer_of
from options import arguments, check_execution, claim, micro_batches, profiled, recipe_of
from progress import Checkpoints, Lazily, Progress, TensorBoard, whole

import keras_curvature as kc
from keras_curvature.callbacks import ChiefOnly, Terminated
from keras_curvature.training.callbacks.chief import is_chief


def model_of(recipe, imagenet, passes, args):
    """The compiled model; call it in the strategy's scope."""
    decay = 0.0 if recipe.optimizer in DECOUPLED else recipe.weight_decay
    model = models.build(
        recipe.model, imagenet.image_size, imagenet.classes, decay, recipe.batch_norm_momentum, recipe.zero_last_gamma
    )
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


def prepare(args):
    """Everything that a run needs, `(recipe, strategy, passes, imagenet)`; what is wrong with it is said here."""
    recipe = recipe_of(args)
    args.profile = args.profile and profiled(args.profile)
    for option in ("data_dir", "run_dir"):
        if not getattr(args, option):
            raise ValueError(f"`--{option}` is needed (or `--dry_run`).")
    if args.cpu_devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * args.cpu_devices)
    strategy = strategies.make(args.strategy, args.tpu, args.tpu_timeout)
    refuse_what_does_not_go_together(args, strategy)
    passes = micro_batches(recipe.batch_size, strategy.num_replicas_in_sync, args.per_replica_batch)
    size = args.image_size or models.image_size(recipe.model)
    imagenet = data.ImageNet(
        args.data_dir, size, args.per_replica_batch, args.seed, args.color, args.shuffle_buffer,
        args.eval_batch or args.per_replica_batch,
    )  # fmt: skip
    check_execution(imagenet.steps_per_epoch(recipe.batch_size), args.steps_per_execution)
    settings = {**dataclasses.asdict(recipe), "seed": args.seed, "image_size": size, "color": args.color}
    settings["shuffle_buffer"] = args.shuffle_buffer
    settings = {k: v for k, v in settings.items() if k not in ("epochs", "published", "source")}
    claim(args.run_dir, settings, is_chief(strategy))
    return recipe, strategy, passes, imagenet


def refuse_what_does_not_go_together(args, strategy):
    """Raise a `ValueError` for options that the strategy does not have."""
    if args.xla and strategy.num_replicas_in_sync > 1 and not strategies.on_tpu(strategy):
        raise ValueError(
            f"`--xla` compiles the step of one replica. Received: {strategy.num_replicas_in_sync} replicas of "
            f"`{type(strategy).__name__}`, whose variables are on several devices. Leave `--xla` out."
        )
    if args.checkpoint_minutes and strategies.several_processes(strategy):
        raise ValueError(
            "`--checkpoint_minutes` is for one process: the clocks of several workers differ. Use `--checkpoint_every`."
        )


def fit_arguments(args, recipe, strategy, imagenet, checkpoint, say):
    """`(callbacks, validation)` of a run; the validation as arguments of `evaluate`."""
    steps, at_once = imagenet.steps_per_epoch(recipe.batch_size), args.steps_per_execution
    board = TensorBoard(
        os.path.join(args.run_dir, "logs"), update_freq=whole(args.log_every, at_once), write_graph=False,
        profile_batch=args.profile or 0,
    )  # fmt: skip
    progress = Progress(recipe.batch_size, steps, args.log_every, say, strategy.num_replicas_in_sync)
    pipelines = strategies.pipelines(strategy)
    evaluation = {
        "x": imagenet.evaluation(strategy, at_once), "steps": imagenet.evaluation_steps(strategy, pipelines, at_once)
    }  # fmt: skip
    return [checkpoint, progress, ChiefOnly(board)], evaluation


def train(args, recipe, strategy, passes, imagenet):
    """Train, or go on training, and report."""
    chief, steps = is_chief(strategy), imagenet.steps_per_epoch(recipe.batch_size)
    say = (lambda *words: print(*words, flush=True)) if chief else (lambda *words: None)
    say(
        f"{recipe.model}, {recipe.optimizer}, {type(strategy).__name__}; batch {recipe.batch_size} = "
        f"{strategy.num_replicas_in_sync} replicas x {passes} passes x {args.per_replica_batch} images; {steps} steps "
        f"per epoch, {recipe.epochs} epochs"
    )
    say(f"on {strategies.devices(strategy)}")
    keras.utils.set_random_seed(args.seed)
    if args.mixed_bfloat16:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    with strategy.scope():
        model = model_of(recipe, imagenet, passes, args)

    checkpoint = Checkpoints(os.path.join(args.run_dir, "checkpoints"), args.checkpoint_every, args.checkpoint_minutes)
    epoch, step = checkpoint.position
    check_execution(steps, args.steps_per_execution, step)
    done = epoch * steps + step
    say(f"resumed at step {done} (step {step} of epoch {epoch + 1})" if done else "begins at step 0")
    callbacks, evaluation = fit_arguments(args, recipe, strategy, imagenet, checkpoint, say)
    callbacks = Lazily(callbacks, add_history=True, model=model, epochs=recipe.epochs, steps=steps, verbose=0)
    try:
        model.fit(
            imagenet.training(strategy, recipe.batch_size, epoch, step), steps_per_epoch=steps, epochs=recipe.epochs,
            validation_data=evaluation["x"], validation_steps=evaluation["steps"], validation_freq=args.eval_every,
            verbose=0, shuffle=False, callbacks=callbacks,
        )  # fmt: skip
    except Terminated as stop:
        say(stop)
        raise
    report(model, evaluation, recipe, say)
    if chief:
        # without the optimizer, whose learning rate is a class of this program: any Keras loads it
        keras.Model(model.inputs, model.outputs, name=model.name).save(os.path.join(args.run_dir, "model.keras"))


def report(model, evaluation, recipe, say):
    """Evaluate, and say what came; on a curved model the weights are the answer, `w - mu m`, at all times."""
    found = model.evaluate(**evaluation, verbose=0, return_dict=True)
    published = f" (published: {recipe.published}%, {recipe.source})" if recipe.published else ""
    say(
        f"final: top-1 error {100 - 100 * found['top_1']:.2f}%{published}, top-5 error "
        f"{100 - 100 * found['top_5']:.2f}%, cross-entropy {found['cross_entropy']:.4f}"
    )


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
        except (tf.errors.OpError, OSError) as error:
            folders = f"`--data_dir` '{args.data_dir}', `--run_dir` '{args.run_dir}'"
            parser.exit(2, f"train.py: error: {folders} cannot be read: {type(error).__name__}: {error}\n")
        train(args, *prepared)


if __name__ == "__main__":
    main()
