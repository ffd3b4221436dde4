"""Appendix B of the Neumann paper: an ill-conditioned logistic regression, without the regularizers.

    python examples/benchmarks/logistic.py | tee examples/benchmarks/results/logistic.txt

It takes 10000 steps at batch size 10 with learning rate 0.05, and at batch size 200 with 0.5. The table shows the loss
of all data. The data are ours (see `problems.logistic`), so compare only the optimizers of one block. With alpha = beta
= 0 and no resets, the Neumann optimizer is SGD with Nesterov momentum 0.9, so its effective learning rate is ten times
that of SGD.
"""

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import Neumann, problems

STEPS = (500, 1000, 2000, 4000, 10_000)
RATES = {10: 0.05, 200: 0.5}
OPTIMIZERS = {
    "SGD": keras.optimizers.SGD,
    "Neumann": lambda rate: Neumann(rate, alpha=0.0, beta=0.0, warmup_steps=0),
}
# read off the figure of the paper, about +- 0.002
PUBLISHED = {
    10: {"SGD": (0.254, 0.196, 0.154, 0.120, 0.087), "Neumann": (0.120, 0.095, 0.076, 0.057, 0.044)},
    200: {"SGD": (0.112, 0.089, 0.069, 0.054, 0.040), "Neumann": (0.041, 0.035, 0.027, 0.023, 0.0185)},
}


def losses(name, batch_size, seed=0):
    """The loss at each of `STEPS`, a list."""
    problem = problems.get("logistic")
    model = problem.compiled(OPTIMIZERS[name](RATES[batch_size]))
    optimizer, weights = model.optimizer, model.trainable_variables
    optimizer.build(weights)
    x, y = (tf.constant(a) for a in problem.data())
    batches = np.random.RandomState(seed).randint(len(x), size=(STEPS[-1], batch_size))

    @tf.function
    def run(batches):
        for rows in batches:
            with tf.GradientTape() as tape:
                loss = model.compute_loss(y=tf.gather(y, rows), y_pred=model(tf.gather(x, rows), training=True))
            optimizer.apply(tape.gradient(loss, weights), weights)

    @tf.function
    def loss_of_all():
        return model.compute_loss(y=y, y_pred=model(x))

    reached = []
    for begin, end in zip((0, *STEPS), STEPS):
        run(tf.constant(batches[begin:end]))
        displaced = [w.numpy() for w in weights]
        optimizer.finalize_variable_values(weights)  # the solution of Neumann is w - mu m
        reached.append(float(loss_of_all()))
        for w, value in zip(weights, displaced):
            w.assign(value)
        if isinstance(optimizer, Neumann):
            optimizer.mark_displaced()
    return reached


def line(first, cells):
    """One row."""
    return f"{first:28}" + "".join(f"{cell:>12}" for cell in cells)


def main():
    for batch_size, rate in RATES.items():
        print(line(f"batch {batch_size}, learning rate {rate}", [f"step {s}" for s in STEPS]))
        ends = {}
        for name in OPTIMIZERS:
            published, here = PUBLISHED[batch_size][name], losses(name, batch_size)
            ends[name] = published[-1], here[-1]
            print(line(f"  {name}, paper", [f"{value:.3f}" for value in published]))
            print(line(f"  {name}, here", [f"{value:.3f}" for value in here]), flush=True)
        paper, ours = (after / before for before, after in zip(ends["SGD"], ends["Neumann"]))
        print(f"  Neumann / SGD at the end: paper {paper:.2f}, here {ours:.2f}\n")


if __name__ == "__main__":
    main()
