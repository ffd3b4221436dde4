"""The program of `train.py` from end to end on generated images: trained, killed, resumed, evaluated.

    python tpu/train.py --dry_run [--run_dir NEW_FOLDER]

Two replicas on two logical CPUs, each with two micro-batches per step, two epochs of a small ResNet. Both starts are
processes of their own with the very same command.
"""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import generated

HERE = pathlib.Path(__file__).resolve().parent
TRAIN, VALIDATION, BATCH = 512, 100, 32
STOP_AFTER = 20  # steps; of 32, in the second epoch
OPTIONS = [
    "--model", "resnet_small", "--optimizer", "neumann", "--epochs", "2", "--batch_size", str(BATCH),
    "--per_replica_batch", "8", "--strategy", "mirrored", "--cpu_devices", "2", "--warmup_epochs", "0.25",
    "--reset_epochs", "0.75", "--base_learning_rate", "0.4", "--label_smoothing", "0.1", "--checkpoint_every", "8",
    "--log_every", "4",
]  # fmt: skip


def run(folder=None):
    """Run it; returns the exit status, 0 where everything happened as it should."""
    folder = pathlib.Path(folder or tempfile.mkdtemp(prefix="dry_run_"))
    if folder.exists() and any(folder.iterdir()):
        print(f"train.py: error: `--run_dir` '{folder}' is not empty; a dry run takes a new folder.", file=sys.stderr)
        return 2
    began = time.perf_counter()
    generated.write(folder / "data", TRAIN, VALIDATION)
    print(f"wrote {TRAIN} + {VALIDATION} images to {folder / 'data'}, {time.perf_counter() - began:.0f} s")
    options = [*OPTIONS, "--data_dir", str(folder / "data"), "--run_dir", str(folder / "run")]
    print(f"\n$ python tpu/train.py {shlex.join(options)}")
    killed, code = started(options, folder, STOP_AFTER)
    print(f"exit status {code} (128 + SIGTERM is 143)\n\n$ the same command again")
    resumed, again = started(options, folder)
    print(f"exit status {again}")
    stopped, begun = found(killed, r"stopped by SIGTERM after (\d+) steps"), found(resumed, r"resumed at step (\d+)")
    final = found(resumed, r"final: top-1 error ([\d.]+%)"), found(resumed, r"top-5 error ([\d.]+%)")
    passed = code == 143 and again == 0 and stopped is not None and stopped == begun and None not in final
    print(
        f"\nkilled at step {stopped}, resumed at step {begun}; top-1 error {final[0]}, top-5 error {final[1]}; "
        f"{time.perf_counter() - began:.0f} s in all: {'passed' if passed else 'FAILED'}"
    )
    if not passed:
        print((folder / "stderr.txt").read_text()[-3000:], file=sys.stderr)
    return 0 if passed else 1


def started(options, folder, stop_after=None):
    """`(lines, exit status)` of the program; SIGTERM goes to it when it shows step `stop_after`.

    What it says beside its output, TensorFlow's warnings or a traceback, is in `folder`/stderr.txt.
    """
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    lines = []
    with open(folder / "stderr.txt", "a") as stderr, subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *options], stdout=subprocess.PIPE, stderr=stderr, text=True,
        env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as process:  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            print("  " + line, end="", flush=True)
            step = found([line], r"^step +(\d+)")
            if stop_after is not None and step is not None and int(step) >= stop_after:
                process.send_signal(signal.SIGTERM)
                stop_after = None
    return lines, process.returncode


def found(lines, pattern):
    """What the pattern's group matches in the lines, or `None`."""
    match = re.search(pattern, "".join(lines))
    return match and match.group(1)
