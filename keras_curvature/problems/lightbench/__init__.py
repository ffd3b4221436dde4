"""LightBench: 28 small tasks on which optimizers fail one by one, 24 of them at six levels, so 148 rows.

A task asks for a loss, or for weights, that a working optimizer reaches and a slightly wrong one does not: noise that
does not fall, gradients of 18 orders of magnitude, a target that moves, parity of 96 bits. The definitions are those
of the HeavyBall repository of 20 June 2025, to which its published scores belong, written anew:

    task = problems.lightbench.TASKS["rosenbrock"]
    model = task.model("trivial", seed=0)          # its output is the loss of a step, and the step is its input
    model.compile(optimizer, loss=problems.lightbench.Output(dtype=task.dtype))
    model.fit(*problems.lightbench.steps(1000), batch_size=1, shuffle=False)
    task.won(model, "trivial", loss)

Of the 148 rows 12 cannot be won by construction (`Task.can_be_won`): `minimax` asks for the point 0 where its gradient
keeps `p0 - p1` as it is, and `wide_linear` asks for the negative of its solution.

The loss of a model is the mean of its output, so there is no Gauss-Newton matrix here: only methods that need gradients
or Hessian products can take part.

Reference: HomebrewML/HeavyBall, folder `benchmark` (BSD-2-Clause). Differences: (1) draws are TensorFlow's; (2) a
gradient that comes late (`gradient_delay`) is that of the current weights, every so many steps, where the original
keeps graphs whose weights have changed since; (3) one bias in a recurrent layer where torch has two.
"""

from keras_curvature.problems.lightbench.registry import TASKS
from keras_curvature.problems.lightbench.task import LEVELS, Output, Task, steps

__all__ = ["LEVELS", "TASKS", "Output", "Task", "steps"]
