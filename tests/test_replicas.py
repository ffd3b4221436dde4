"""Several replicas train as one, over logical CPUs: every optimizer, every kind of layer, dropout included.

Each test runs `replicas_run.py` in a process of its own, since two strategies in one process collide. Models whose
batch statistics (or masked means) are of each slice are compared with micro-batches, which are the same slices.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from cases import MODELS
from optimizers import AMPLIFY, OPTIMIZERS
from selection import crossed, is_on_a_diagonal
from workers import KERAS

HERE = pathlib.Path(__file__).parent
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
ALL = [*OPTIMIZERS, *KERAS]
# each kind once and each optimizer several times
PAIRS = [f"{ALL[i % len(ALL)]}:{kind}" for i, kind in enumerate(MODELS)]
FEW = ["neumann_resets:batch_normalization", "curveball:dropout", "adam_accumulating:several_outputs"]
MORE = [
    "hessian_free_chunk:spatial_dropout", "adam_averaging:gaussian_noise", "hessian_free:recurrent_dropout",
    "hessian_free_hessian:attention", "two_loop_convexified:embedding_lstm", "curveball_fixed:masked_outputs",
    "sgd:nested",
]  # fmt: skip


def run(replicas, floatx, *items):
    """`{item: {"one": what is left, "many": what is left, "rounding": number}}` from a process of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, HERE / "replicas_run.py", str(replicas), floatx, *items],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def agree(found, item, floatx):
    """The weights of one and of several replicas agree, and they have trained."""
    assert "error" not in found, found["error"]
    one, many = found["one"], found["many"]
    # Conjugate gradients amplify the rounding of the first step, up to tenfold with each further step: from 1e-16 to
    # 1e-5 at worst in ten steps. From the 1e-7 of float32 nothing is left to compare.
    amplified = item.split(":")[0] in AMPLIFY
    assert one["way"] > 1e-3 and one["skipped"] == many["skipped"] == 0
    if amplified and floatx == "float32":
        return
    # division by small numbers, or an eigenbasis that rounding chooses, amplify too: by about as much on one device
    tolerance = max(1e-5 if amplified else TOLERANCE[floatx], 100 * found["rounding"])
    np.testing.assert_allclose(many["weights"], one["weights"], rtol=0, atol=tolerance, equal_nan=False)
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=max(1e-5, tolerance), equal_nan=False)


few = functools.cache(lambda replicas, floatx: run(replicas, floatx, *FEW))
more = functools.cache(lambda replicas, floatx: run(replicas, floatx, *FEW, *MORE))
every = functools.cache(lambda replicas, floatx: run(replicas, floatx, *PAIRS))



@functools.cache
def with_kinds(name, on_a_diagonal):
    """An optimizer with the kinds of layers that are on the diagonals of the cross, or with all others."""
    row = ALL.index(name)
    kinds = [kind for j, kind in enumerate(MODELS) if is_on_a_diagonal(row, j) == on_a_diagonal]
    return run(2, "float64", *[f"{name}:{kind}" for kind in kinds])


@pytest.mark.parametrize("item", FEW)
def test_replicas_end_with_the_weights_of_one(item):
    agree(few(2, "float64")[item], item, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("item", [*FEW, *MORE])
@pytest.mark.parametrize(("replicas", "floatx"), [(1, "float64"), (2, "float64"), (4, "float32")])
def test_more_replicas_end_with_the_weights_of_one(replicas, floatx, item):
    agree(more(replicas, floatx)[item], item, floatx)


@pytest.mark.slow
@pytest.mark.parametrize("item", PAIRS)
@pytest.mark.parametrize(("replicas", "floatx"), [(4, "float64"), (2, "float32")])
def test_with_every_kind_of_layer(replicas, floatx, item):
    agree(every(replicas, floatx)[item], item, floatx)


# fixed rates with which training diverges, on one device too
TOO_FAST = [(name, "max_pooling_overlapping") for name in ("sgd", "curveball_fixed")]


@pytest.mark.parametrize(("name", "kind"), crossed(ALL, MODELS))
def test_every_optimizer_with_every_kind_of_layer(name, kind):
    if (name, kind) in TOO_FAST:
        pytest.skip("diverges on one device")
    found = with_kinds(name, is_on_a_diagonal(ALL.index(name), list(MODELS).index(kind)))
    agree(found[f"{name}:{kind}"], f"{name}:{kind}", "float64")
