"""`TASKS`: every task by name, the order of the published table left aside."""

from keras_curvature.problems.lightbench.noisy import NOISY
from keras_curvature.problems.lightbench.parity import PARITY
from keras_curvature.problems.lightbench.toys import TOYS

TASKS = {task.name: task for task in [*TOYS, *NOISY, *PARITY]}
