"""A training loop of your own that uses the curvature of the loss:

    python examples/custom_loop.py

Research often begins with a loop that you can see in full. `Linearization` is all that such a loop needs. It takes a
compiled model and a batch. It gives the loss, the gradient, products with the Hessian and with the Gauss-Newton matrix,
and the loss at other weights. A vector is a list of tensors, one for each trainable variable.

The loop below is nonlinear conjugate gradients (Polak and Ribiere) without a learning rate. The curvature `d'Gd` along
the direction `d` gives the length of the step, for one product. If the loss rises, the step is halved until it does
not. The program prints the curvature along `d` by both matrices, whether the quadratic model predicted the change of
the loss, and at the end the largest eigenvalue of the Hessian. It takes seconds on a laptop, with all of scikit-learn's
digits as one batch.
"""

import argparse

import tensorflow as tf

import keras_curvature as kc
from keras_curvature import trees

parser = argparse.ArgumentParser(description="Nonlinear conjugate gradients on digits, by hand.")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--eigenvalue_steps", type=int, default=30, help="products spent on the largest eigenvalue")
args = parser.parse_args()

problem = kc.problems.get("digits_mlp")
(x, y), (x_test, y_test) = problem.data()
x, y = tf.constant(x), tf.constant(y)
model = problem.compiled("sgd")  # the optimizer is never asked; `compile` is where the loss and the metrics live


@tf.function
def step(direction, last_gradient):
    """One step along the next conjugate direction; what to remember, and what to print."""
    lin = kc.Linearization(model, x, y)
    g = lin.gradient
    # Polak and Ribiere: how much of the last direction to keep; none where that would point uphill.
    keep = tf.math.divide_no_nan(trees.dot(g, trees.subtract(g, last_gradient)), trees.squared_norm(last_gradient))
    d = trees.add(trees.negative(g), direction, tf.maximum(keep, 0.0))
    d = trees.where(trees.dot(g, d) < 0, d, trees.negative(g))

    # Along d the loss is f + s g'd + s^2/2 d'Bd, least at s = -g'd / d'Bd. G never bends downwards, H may.
    slope = trees.dot(g, d)
    bend_g = trees.dot(d, lin.gauss_newton() @ d)
    bend_h = trees.dot(d, lin.hessian() @ d)
    length = -slope / bend_g
    predicted = 0.5 * length * slope

    # Nothing has been assigned so far: `loss_at` is a pure function of the step. Shorten it until the loss falls.
    actual = lin.loss_at(trees.scale(length, d)) - lin.loss
    ratio = actual / predicted
    while actual > 0 and length > 1e-6:
        length *= 0.5
        actual = lin.loss_at(trees.scale(length, d)) - lin.loss

    for variable, change in zip(lin.variables, d):
        variable.assign_add(length * change)
    lin.commit()  # batch statistics and random seeds, of which this model has none
    square = trees.squared_norm(d)
    return d, g, (lin.loss, trees.norm(g), length, bend_g / square, bend_h / square, ratio)


@tf.function
def largest_eigenvalue(steps):
    """Of the Hessian at the current weights, by power iteration."""
    H = kc.Linearization(model, x, y).hessian()
    v = [tf.random.stateless_normal(w.shape, (0, i)) for i, w in enumerate(model.trainable_variables)]
    value = tf.constant(0.0)
    for _ in tf.range(steps):
        v = trees.scale(1.0 / trees.norm(v), v)
        Hv = H @ v
        value, v = trees.dot(v, Hv), Hv
    return value


print(f"largest eigenvalue of the Hessian at the start: {largest_eigenvalue(tf.constant(args.eigenvalue_steps)):.3g}")
print("step      loss  |gradient|  length   d'Gd/d'd   d'Hd/d'd  actual/predicted")
direction = gradient = [tf.zeros_like(w) for w in model.trainable_variables]
for i in range(args.steps):
    direction, gradient, numbers = step(direction, gradient)
    if i % 10 == 0 or i == args.steps - 1:
        print("{:4d} {:9.5f}   {:9.2e} {:7.3g} {:10.3g} {:10.3g} {:17.2f}".format(i, *(float(n) for n in numbers)))
print(f"largest eigenvalue of the Hessian at the end:   {largest_eigenvalue(tf.constant(args.eigenvalue_steps)):.3g}")
loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"test loss {loss:.3f}, test accuracy {accuracy:.1%}")
