"""Compiles the train step of `fit` by a TPU's own compiler, for chips that are only named, and says what it needs:

    pip install ".[tensorflow,tpu-check]"
    python tpu/compile.py --topology v5e:2x2 --model cnn --optimizer neumann
    python tpu/compile.py --topology v5e:4x4 --model resnet50 --optimizer neumann,curveball --mixed_bfloat16
    python tpu/compile.py --topology v5e:1x1 --model cnn --optimizer all      # v5e:1x1: one chip

For each optimizer, and for SGD beside it: memory of a chip, operations and bytes, collectives, the time of a step by
the bound that it meets, and what does not belong on a TPU. Loops and conditions count once. Nothing runs: the time is
an estimate.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from compiler import DoesNotFit, compiled, foreign, topology
from methods import OPTIMIZERS

HEAD = (
    f"{'optimizer':<30} {'MB':>8} {'of SGD':>7} {'GFLOP':>9} {'of SGD':>7} {'GB moved':>9} {'all-reduces':>11} "
    f"{'MB':>8} {'step ms':>8}  {'bound':<10} {'traced s':>8} {'compiled s':>10}  foreign"
)


def arguments(argv=None):
    """The parsed command line, and the parser."""
    parser = argparse.ArgumentParser(description="A train step by a TPU's own compiler, without a TPU.")
    parser.add_argument("--topology", default="v5e:2x2", help="kind and chips: v5e:1x1, v5e:4x4, v4:2x2x1, v5p, v6e")
    models = "cnn, cnn_32, mlp, autoencoder, resnet50, transformer, transformer_100m"
    parser.add_argument("--model", default="cnn", help=models)
    parser.add_argument("--optimizer", default="neumann", help="names with commas, or all: " + ", ".join(OPTIMIZERS))
    parser.add_argument("--per_replica_batch", type=int, default=32, help="examples of a chip; default 32")
    parser.add_argument("--mixed_bfloat16", action="store_true", help="compute in bfloat16, keep weights in float32")
    return parser.parse_args(argv), parser


def check(args):
    """The names of the optimizers; raises a `ValueError` for what cannot be."""
    from traced import NETWORKS

    names = list(OPTIMIZERS) if args.optimizer == "all" else args.optimizer.split(",")
    for option, given, known in (("model", [args.model], NETWORKS), ("optimizer", names, OPTIMIZERS)):
        for name in given:
            if name not in known:
                raise ValueError(f"`--{option}` must be one of {', '.join(known)}. Received: {name!r}")
    if args.per_replica_batch < 1:
        raise ValueError(f"`--per_replica_batch` must be at least 1. Received: {args.per_replica_batch}")
    return names


def measured(name, args, chips):
    """`(Step, Compiled)` of an optimizer."""
    from traced import traced

    step = traced(name, args.model, len(chips.devices), args.per_replica_batch)
    return step, compiled(step.text, chips.devices)


def row(name, step, found, reference, chips):
    """A line of the table."""
    times = found.times(chips.machine, len(chips.devices))
    bound = max(times, key=times.get)
    reduces = sum(kind == "all-reduce" for kind, _ in found.collectives)
    odd = "; ".join(f"{kind} {', '.join(what)}" for kind, what in foreign(step.text).items() if what) or "nothing"
    return (
        f"{name:<30} {found.memory / 1e6:>8.1f} {found.memory / reference.memory:>7.2f} {found.flops / 1e9:>9.3f} "
        f"{found.flops / reference.flops:>7.2f} {found.moved / 1e9:>9.3f} {reduces:>11} {found.reduced / 1e6:>8.2f} "
        f"{1e3 * times[bound]:>8.3f}  {bound:<10} {step.seconds:>8.1f} {found.seconds:>10.1f}  {odd}"
    )


def largest_batch(name, args, chips):
    """The largest batch of a chip that fits, among the halves of what was asked for; 0 if none does."""
    batch = args.per_replica_batch // 2
    while batch:
        try:
            measured(name, argparse.Namespace(**{**vars(args), "per_replica_batch": batch}), chips)
        except DoesNotFit:
            batch //= 2
        else:
            break
    return batch


def lines(args, names, chips):
    """The table, line by line."""
    import keras

    policy = "mixed_bfloat16" if args.mixed_bfloat16 else "float32"
    keras.mixed_precision.set_global_policy(policy)
    yield (
        f"{args.model}, {policy}, {args.per_replica_batch} examples on each of {len(chips.devices)} chips "
        f"({chips.machine.name}, {chips.machine.memory / 2**30:.0f} GiB)"
    )
    yield HEAD
    reference = None
    for name in dict.fromkeys(["sgd", *names]):
        try:
            step, found = measured(name, args, chips)
        except DoesNotFit as error:
            fits = largest_batch(name, args, chips)
            remedy = f"`--per_replica_batch {fits}` fits" if fits else "no batch does"
            yield f"{name:<30} does not fit: {error}; {remedy}"
            continue
        except ValueError as error:  # of an optimizer that does not take the model, such as a dense matrix too large
            yield f"{name:<30} is refused: {error}"
            continue
        reference = reference or found
        yield row(name, step, found, reference, chips)


def main(argv=None):
    """The program."""
    args, parser = arguments(argv)
    try:
        names, chips = check(args), topology(args.topology)
    except (ValueError, ConnectionError) as error:
        parser.exit(2, f"compile.py: error: {error}\n")
    for line in lines(args, names, chips):
        print(line, flush=True)


if __name__ == "__main__":
    main()
