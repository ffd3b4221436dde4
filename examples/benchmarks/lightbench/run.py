"""LightBench: which of 148 rows an optimizer wins, at its defaults, within ten trials, and within all.

    python examples/benchmarks/lightbench/run.py --out rows.jsonl adam soap          # goes on where it stopped
    python examples/benchmarks/lightbench/run.py --out rows.jsonl --table            # of what is there
    python examples/benchmarks/lightbench/run.py --out rows.jsonl --tasks quick --trials 100 adam    # lost rows again

The tasks are `keras_curvature.problems.lightbench`; rules and search are in `play.py` and `contestants.py`. How it
differs from the published contest, so that the numbers are only comparable with one another:

* 30 trials of at most 20 000 steps, not 1000 of a million. The first trial has the optimizer's defaults. Then rates and
  decays are log-uniform in the published ranges, from a Halton sequence, new decays in every fifth trial.
* Rows that are lost with one budget can be played again with a larger one: run the same file with it.
* Every level is run. The published contest counts all levels after the first failure as lost; the column `gated` does.
* A trial ends at a loss that is not finite, without a new minimum in half of its steps, or after its seconds.
* Twelve of the 148 rows cannot be won and are not run. The share in the table is of 148.

In the published table `adversarial_gradient` counts 0 of 6 for every optimizer: trials stop early, its first level is
its hardest, and all levels after a lost one count as lost. `sparse_gradient` at its last level is won by untouched
weights with probability 0.78.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's greetings, before it is imported

ROWS = 148


def chosen(args):
    """`[(optimizer, task, level)]` that are still to be played, or were lost with less than this budget."""
    from keras_curvature.problems.lightbench import LEVELS, TASKS

    there = {
        (row["optimizer"], row["task"], row["level"]) for row in rows(args.out)
        if row["won"] or all(row["budget"][name] >= getattr(args, name) for name in ("trials", "steps", "seconds"))
    }  # fmt: skip
    left_out = {"all": (), "toys": ("xor",), "quick": ("xor", "noisy_matmul")}[args.tasks]
    tasks = [t for t in TASKS.values() if t.can_be_won and not t.name.startswith(left_out)]
    wanted = [
        (optimizer, task.name, level)
        for optimizer in args.optimizers for level in LEVELS[: args.levels] for task in tasks if level in task.levels
    ]  # fmt: skip
    return [key for key in wanted if key not in there]


def rows(path):
    """The rows of a file, a list of dicts."""
    path = pathlib.Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def played(job):
    """One row, as a dict."""
    (optimizer, name, level), budget, seed = job
    import tensorflow as tf
    from contestants import CONTESTANTS
    from play import Budget, play

    from keras_curvature.problems.lightbench import TASKS

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    found = play(TASKS[name], level, CONTESTANTS[optimizer], Budget(**budget), seed)
    return {"optimizer": optimizer, "task": name, "level": level, "seed": seed, "budget": budget, **found}


def run(args):
    """Play what is left, and write each row as soon as it is known."""
    budget = {"trials": args.trials, "steps": args.steps, "seconds": args.seconds}
    jobs = [(key, budget, args.seed) for key in chosen(args)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, maxtasksperchild=8) as pool, open(args.out, "a") as file:
        for row in pool.imap_unordered(played, jobs):
            print(json.dumps(row), file=file, flush=True)
            verdict = f"{'won' if row['won'] else 'lost':5} trial {row['trial']:3}, {row['seconds']:6.1f} s"
            print(f"{row['optimizer']:22} {row['task']:26} {row['level']:10} {verdict}", flush=True)


def table(args):
    """Wins of every optimizer in a file."""
    from keras_curvature.problems.lightbench import TASKS

    found = collections.defaultdict(dict)
    for row in rows(args.out):
        found[row["optimizer"]][row["task"], row["level"]] = row
    print(f"{'optimizer':22} {'rows':>5} {'defaults':>9} {'10 trials':>10} {'all':>5} {'of 148':>7} {'gated':>6}")
    for optimizer, mine in sorted(found.items(), key=lambda item: -sum(r["won"] for r in item[1].values())):
        wins = {limit: sum(r["won"] and r["trial"] <= limit for r in mine.values()) for limit in (1, 10, 10**9)}
        gated = sum(
            all(mine.get((task.name, easier), {"won": False})["won"] for easier in task.levels[: i + 1])
            for task in TASKS.values() for i in range(len(task.levels))
        )  # fmt: skip
        first, ten, every = wins.values()
        print(f"{optimizer:22} {len(mine):5} {first:9} {ten:10} {every:5} {every / ROWS:7.1%} {gated:6}")


def main():
    from contestants import CONTESTANTS

    parser = argparse.ArgumentParser(description="Rows of LightBench that optimizers win.")
    parser.add_argument("optimizers", nargs="*", metavar="optimizer", help=f"one of {', '.join(CONTESTANTS)}; all")
    parser.add_argument("--out", required=True, help="file of rows (jsonl), to begin or to go on with")
    parser.add_argument("--table", action="store_true", help="print the table of the file, and play nothing")
    parser.add_argument(
        "--tasks", choices=["all", "toys", "quick"], default="all",
        help="toys: without recurrent networks; quick: and without noisy_matmul, 94 rows in all"
    )  # fmt: skip
    parser.add_argument("--levels", type=int, default=6, help="the first so many levels of each task (default: 6)")
    parser.add_argument("--trials", type=int, default=30, help="for each level of a task (default: 30)")
    parser.add_argument("--steps", type=int, default=20_000, help="of a trial, at most (default: 20000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a trial, at most (default: 60)")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, draws and search (default: 0)")
    args = parser.parse_args()
    unknown = [name for name in args.optimizers if name not in CONTESTANTS]
    if unknown:
        parser.error(f"unknown optimizer {unknown[0]!r}: choose from {', '.join(CONTESTANTS)}")
    args.optimizers = args.optimizers or list(CONTESTANTS)
    if not args.table:
        run(args)
    table(args)


if __name__ == "__main__":
    sys.exit(main())
