"""The race: each candidate trains a copy of the model for as many seconds, and the lowest loss wins.

Which optimizer lowers a loss fastest depends on what a step costs here and on what it is worth for this loss. Both are
measured at once. What the package knows beforehand decides who runs: `candidates.py`.
"""

import dataclasses
import math
import random
import re
import sys
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import keras_internals, replicas
from keras_curvature.component import check, check_count, check_flag, check_number
from keras_curvature.linearization.pure.functional import build_for, check_model
from keras_curvature.monitor.choosing.candidates import CANDIDATES, Candidate, facts_of
from keras_curvature.monitor.choosing.twins import twin_of
from keras_curvature.monitor.objective import reading, shapes


class Losses(keras.callbacks.Callback):
    """The loss of every batch, and the seconds until then; ends `fit` when its time is over.

    Attributes:
        found: `[(seconds, loss)]`.
    """

    def __init__(self, seconds):
        super().__init__()
        self._most, self.found = seconds, []

    def on_train_begin(self, logs=None):
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Note the loss, and let the next one be that of its batch alone."""
        if "loss" not in (logs or {}):
            raise ValueError("`auto` compares losses, and the model's `train_step` returns no \"loss\"")
        self.found.append((time.perf_counter() - self._begin, float(logs["loss"])))
        self.model.reset_metrics()
        if self.found[-1][0] >= self._most:
            self.model.stop_training = True


@dataclasses.dataclass(frozen=True)
class Result:
    """What one candidate reached: its loss, the mean over the last quarter of its seconds; its steps, and a reason."""

    candidate: Candidate
    loss: float = math.inf
    steps: int = 0
    seconds: float = 0.0
    reason: str | None = None

    def __str__(self):
        if self.reason:
            return f"  {self.candidate.name:38} not tried: {self.reason}"
        return f"  {self.candidate.name:38}{1000 * self.seconds / self.steps:10.3g}{self.steps:10}{self.loss:14.5g}"


def auto(
    model: keras.Model, data: Any, batch_size: int = 32, seconds: float = 20.0, verbose: bool = True
) -> keras.optimizers.Optimizer:
    """The optimizer that lowers the model's loss most in a few seconds on this machine, out of those that fit it.

    Trains a copy of the model with each candidate at its defaults, from the same weights, for the same time: half of
    `seconds`, divided by the candidates. The other half is for tracing. The one with the lowest training loss (the mean
    over the last quarter of its time) is returned, new and unbuilt; that is Keras' `Adam()` if none is better. The
    table says what ran, what did not, and why. The model keeps its values; it is built if it was not. A loss function
    that calls the model itself sees the model and not the copy: write it as `compute_loss`.

    `Adam()`, `SOAP`, `Muon`, `SquareRootFreeAdam` and `KLShampoo` run with any model; `KFAC` with a curved one; with
    full batches or large ones also `GaussNewton`, where a step takes about a second at most, as
    `GaussNewton.levenberg_marquardt()` for `loss="mse"`; and with full batches `LBFGS`. So pass what you would give to
    `fit`: the curved model, and the `batch_size`.

    What it cannot know: what happens later. An optimizer that leads after a second may be overtaken in an hour, the
    training loss is not the validation loss, and learning rates are not searched. The choice depends on times, and may
    differ between two calls. `examples/benchmarks/auto.py` judges it on twelve problems that it was not built with. The
    choice reached the loss of ten seconds of `Adam()` in 0.06 to 1.06 of its time, the median 0.26. Ten times it took
    at most 1.5 times as long as the best candidate.

    Args:
        model: A compiled `keras.Model` with one replica; which optimizer it has does not matter.
        data: `(x, y)` or `(x, y, sample_weight)`, nests of arrays, which are shuffled; a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches.
        batch_size: Examples of a batch, for arrays. Defaults to `32`, as in `fit`.
        seconds: For all candidates together, with tracing. A candidate whose turn comes later does not run, so larger
            models need more. Defaults to `20.0`.
        verbose: Whether to print the table. Defaults to `True`.

    Returns:
        A `keras.optimizers.Optimizer` for `compile`.

    Raises:
        ValueError: An argument is invalid; the model is not compiled, has several replicas, or cannot be copied; the
            data do not fit the model; the loss is not finite with any candidate.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(loss="mse")
    model.compile(keras_curvature.auto(model, (x, y), batch_size=128), loss="mse")
    model.fit(x, y, batch_size=128, epochs=20)
    ```
    """
    begin = time.perf_counter()
    check_model(auto, model)
    check_count(auto, "batch_size", batch_size)
    check_number(auto, "seconds", seconds, low=0, open_low=True)
    check_flag(auto, "verbose", verbose)
    replicas_of_model = replicas.strategy_of(model).num_replicas_in_sync
    if replicas_of_model > 1:
        raise ValueError(
            f"`auto` measures on one replica. Received: a model with {replicas_of_model}. Call it for a model that was "
            "made outside of `strategy.scope()`, with the batch of one replica."
        )
    state = random.getstate()  # initializers and optimizers draw their seeds from it
    try:
        with replicas.strategy_of(model).scope():
            facts, results = _measured(model, data, batch_size, begin, seconds)
    finally:
        random.setstate(state)
    best = min(results, key=lambda result: result.loss)
    tried = [result for result in results if not result.reason]
    if verbose:
        print(f"auto: {facts}\n  {'':38}{'ms a step':>10}{'steps':>10}{'loss':>14}")
        print("\n".join(f"{result}{'   <- chosen' if result is best and tried else ''}" for result in results))
    if not tried:
        raise ValueError(f"`auto`: no optimizer could train the model: {results[0].reason}")
    if not math.isfinite(best.loss):
        raise ValueError(
            "`auto`: the training loss is not finite with any optimizer that was tried. Look at the data and the "
            f"model's outputs: `model.evaluate` of the first batch. {best}"
        )
    return best.candidate.make()


def _measured(model, data, batch_size, begin, seconds):
    """`(facts, results)`."""
    stream, batch, labels, examples = _stream(data, batch_size, reading.dtype_of(model))
    shapes.check_inputs(auto, model, batch[0])
    shapes.check_targets(auto, model, batch[1])
    shapes.check_labels(auto, model, [labels])
    build_for(model, *batch)
    facts = facts_of(model, batch, examples)
    return facts, _race(model, stream, batch, facts, begin, seconds)


def _stream(data, batch_size, dtype):
    """`(what fit takes, its first batch (x, y, sample_weight), known targets, number of examples or None)`."""
    if isinstance(data, keras.utils.PyDataset):
        check(auto, "data", data, data.num_batches != 0, "a data set with at least one batch")
        batch = _unpacked(data[0])
        return data, batch, batch[1], reading.count(batch) if data.num_batches == 1 else None
    if not isinstance(data, tf.data.Dataset):
        (read,) = reading.batches(auto, data, None, sys.maxsize, dtype)  # all in one
        count = reading.count(read)
        # TensorFlow stacks the entries of a list
        present = tuple(keras.tree.lists_to_tuples(part) for part in read if part is not None)
        parts = tf.data.Dataset.from_tensor_slices(present)
        if batch_size < count:
            parts = parts.shuffle(count, seed=0)
        batches = parts.batch(min(batch_size, count), drop_remainder=True)
        if read[1] is None and read[2] is not None:
            batches = batches.map(lambda x, sample_weight: (x, None, sample_weight))
        return batches.repeat(), _unpacked(next(iter(batches))), read[1], count
    first = next(iter(data), None)
    check(auto, "data", data, first is not None, "a data set with at least one batch")
    batch, number = _unpacked(first), int(data.cardinality())
    return data.repeat(), batch, batch[1], reading.count(batch) if number == 1 else None


def _unpacked(batch):
    """`(x, y, sample_weight)` of a batch, tensors."""

    def tensor(a):
        return a if a is None or tf.is_tensor(a) else tf.convert_to_tensor(a)

    return tuple(keras.tree.map_structure(tensor, part) for part in keras.utils.unpack_x_y_sample_weight(batch))


def _race(model, stream, batch, facts, begin, seconds):
    """A `Result` for each of `CANDIDATES`."""
    objections = [candidate.objection(facts) for candidate in CANDIDATES]
    each = seconds / (2 * objections.count(None))
    copy, results = twin_of(auto, model, batch), []
    variables = list(copy.variables)
    start = [np.array(v) for v in variables]
    for candidate, objection in zip(CANDIDATES, objections, strict=True):
        if objection is None and results and time.perf_counter() - begin > seconds - each:
            objection = f"no time was left; pass more than `seconds={seconds:g}`"
        if objection is not None:
            results.append(Result(candidate, reason=objection))
            continue
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        results.append(_tried(copy, candidate, stream, each))
    return results


def _tried(copy, candidate, stream, seconds):
    """Train the copy from the weights that it has."""
    copy.compile(**{**keras_internals.compiled_with(copy), "optimizer": candidate.make()})
    try:
        copy.fit(stream, epochs=1, steps_per_epoch=2, shuffle=False, verbose=0)  # traces
        losses = Losses(seconds)
        endless = {} if isinstance(stream, keras.utils.PyDataset) else {"steps_per_epoch": 2**31}
        copy.fit(stream, epochs=2**31, shuffle=False, verbose=0, callbacks=[losses], **endless)
    except ValueError as error:  # what this method refuses, in words
        return Result(candidate, reason=re.split(r"\.\s", str(error))[0])
    late = [loss for at, loss in losses.found if at >= 0.75 * losses.found[-1][0]]
    mean, steps = sum(late) / len(late), copy.steps_per_execution * len(losses.found)
    return Result(candidate, mean if math.isfinite(mean) else math.inf, steps, losses.found[-1][0])
