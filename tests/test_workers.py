"""Two processes over loopback, under `MultiWorkerMirroredStrategy`: they train as one, and come back when killed."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from optimizers import AMPLIFY, OPTIMIZERS
from workers import KERAS

FEW = ["curveball", "adam_accumulating"]
HERE = pathlib.Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def start(*arguments, **environment):
    """A process of `workers.py`."""
    return subprocess.Popen(
        [sys.executable, HERE / "workers.py", *map(str, arguments)], env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_two(directories, *arguments, **of_the_second):
    """Two workers that know of each other; each with its own directory."""
    sockets = [socket.socket() for _ in range(2)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    what, *names = arguments
    configs = [
        json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}}) for i in range(2)
    ]
    return [
        start(what, directory, *names, TF_CONFIG=config, **extra)
        for config, directory, extra in zip(configs, directories, ({}, of_the_second))
    ]


def finished(processes):
    """What they print at the end; all of them are stopped if one fails."""
    try:
        results = [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, results):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in results]


def compare(names, tmp_path):
    """Histories of two workers against those of one process; logs from the chief alone."""
    directories = [tmp_path / "first", tmp_path / "second"]
    two = finished(start_two(directories, "fit", *names))
    (one,) = finished([start("fit", tmp_path / "alone", *names)])
    assert two[0] == two[1]
    for name in names:
        assert two[0][name].keys() == one[name].keys()
        for key, values in one[name].items():
            np.testing.assert_allclose(two[0][name][key], values, rtol=1e-5, err_msg=f"{name} {key}")
        assert np.isfinite(one[name]["loss"] + one[name]["val_loss"]).all(), name
        # on so few examples at a time conjugate gradients with a Hessian do not get better in every epoch
        assert one[name]["loss"][-1] < one[name]["loss"][0] or name in AMPLIFY, name
        assert list((directories[0] / name / "train").iterdir())
    assert not directories[1].exists()


def test_two_workers_fit_as_one_process(tmp_path):
    compare(FEW, tmp_path)


@pytest.mark.slow
def test_two_workers_fit_as_one_process_with_every_optimizer(tmp_path):
    # the last batch is uneven, and parts of uneven slices are another part of the batch: see `Linearization.chunk`
    others = [name for name in [*OPTIMIZERS, *KERAS] if name not in [*FEW, "hessian_free_chunk"]]
    compare(others, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curveball", "hessian_free"])
def test_a_job_with_a_killed_worker_is_started_again_and_ends_bit_for_bit_the_same(name, tmp_path):
    whole = finished(start_two([tmp_path / "whole"] * 2, "resume", name))

    # dead in the middle of the second epoch: after step 8 of 15, one step after the last checkpoint
    first, second = start_two([tmp_path / "killed"] * 2, "resume", name, DIE_AT="9")
    second.communicate(timeout=1800)
    assert second.returncode == -9
    first.kill()  # by the scheduler, as a job is that has lost a worker
    first.communicate()

    again = finished(start_two([tmp_path / "killed"] * 2, "resume", name))
    assert again[0]["weights"] == again[1]["weights"] == whole[0]["weights"]
    assert again[0]["history"]["loss"] == whole[0]["history"]["loss"][1:]
