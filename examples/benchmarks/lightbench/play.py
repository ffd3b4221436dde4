"""One optimizer on one task: trials with other rates and decays until one wins, by the rules of LightBench.

A trial takes blocks of steps. After a block its losses are checked one by one. The first loss that is not finite ends
the trial. A task that asks for a loss is won by any loss of the block, also by one lucky step. A task that asks for
weights is won by the weights at the end of the block. A trial also ends if its losses have no new minimum in half of
its steps, or at its time limit.
"""

import dataclasses
import time

import numpy as np
import tensorflow as tf

import keras_curvature as kc
from keras_curvature.problems import lightbench

# Tasks whose steps are products of matrices.
PRODUCTS = {"noisy_matmul", *(name for name in lightbench.TASKS if name.startswith("xor"))}


@dataclasses.dataclass(frozen=True)
class Budget:
    """`trials` for each level of a task, each of at most `steps` steps and `seconds`."""

    trials: int = 30
    steps: int = 20_000
    seconds: float = 60.0


class Program:
    """A model and optimizer with a graph of one block of steps; every trial begins at the same weights."""

    def __init__(self, task, level, contestant, decays, seed):
        self.task, self.level, self.seed = task, level, seed
        self.model = task.model(level, seed)
        if contestant.curved:
            self.model = kc.curved(self.model)
        self.model.compile(contestant.make(**decays), loss=lightbench.Output(dtype=task.dtype), jit_compile=False)
        optimizer = self.model.optimizer
        optimizer.build(self.model.trainable_variables)
        self._state = [*self.model.variables, *optimizer.variables]
        self._initial = [v.numpy() for v in self._state]
        # XLA makes small steps up to 60 times as fast. It is slower where products of matrices take the time
        self._block = tf.function(self._steps, autograph=False, jit_compile=task.name not in PRODUCTS)

    def begin(self, rate):
        """Back to the first step, with another rate; `None` is the optimizer's own."""
        for variable, value in zip(self._state, self._initial):
            variable.assign(value)
        if rate is not None:
            self.model.optimizer.learning_rate.assign(rate)

    def block(self, first):
        """The losses of a block of steps, an array."""
        return self._block(tf.constant(first, tf.int32)).numpy()

    def _steps(self, first):
        size = self.task.block
        found = tf.TensorArray(tf.float32, size, element_shape=[])

        def body(i, found):
            for metric in self.model.metrics:
                metric.reset_state()  # so that what is logged is the loss of this step
            logs = self.model.train_step((tf.reshape(first + i, [1, 1]), tf.zeros([1, 1])))
            return i + 1, found.write(i, tf.cast(logs["loss"], tf.float32))

        _, found = tf.while_loop(lambda i, _: i < size, body, (0, found), parallel_iterations=1)
        return found.stack()

    def wins(self, loss):
        return self.task.won(self.model, self.level, loss, self.seed)


def trial(program, rate, budget):
    """`(won, steps taken)` of one trial."""
    program.begin(rate)
    steps, begin = budget.steps * program.task.patience, time.perf_counter()
    best, best_at, taken = np.inf, 0, 0
    while taken < steps:
        losses = program.block(taken + 1)
        finite = losses[: np.argmin(np.isfinite([*losses, np.nan]))]  # up to the first that is not
        if len(finite) and program.wins(finite.min()):
            return True, taken + len(finite)
        if len(finite) < len(losses):
            return False, taken + len(finite) + 1
        if finite.min() < best:
            best, best_at = finite.min(), taken + int(finite.argmin()) + 1
        taken += len(losses)
        if taken - best_at > steps // 2 or time.perf_counter() - begin > budget.seconds:
            break
    return False, taken


def play(task, level, contestant, budget, seed=0):
    """`{"won", "trial", "steps", "seconds"}`: the number of the trial that won, from 1 on, and steps of all trials."""
    begin, taken, program, last = time.perf_counter(), [], None, None
    for rate, decays in contestant.trials(budget.trials, seed):
        if program is None or decays != last:
            program, last = Program(task, level, contestant, decays, seed), decays
        won, steps = trial(program, rate, budget)
        taken.append(steps)
        if won:
            break
    seconds = round(time.perf_counter() - begin, 1)
    return {"won": won, "trial": len(taken), "steps": sum(taken), "seconds": seconds}
