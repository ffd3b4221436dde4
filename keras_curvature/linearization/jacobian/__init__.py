"""The rows of the Jacobian: one for each output of each example, scaled as the compiled loss is.

With `J` the Jacobian of the model's outputs `z` in the weights, `H_L` the second derivative of the loss in the outputs
and `R` its root, `H_L = R'R`, the rows are

    A = R J,      A'A = J' H_L J      the Gauss-Newton matrix

A loss of squares has the residuals `r = R^-T dL/dz`, and `A'r` is its gradient: near the weights the loss is
`1/2 |A d + r|^2`. Both hold for the compiled loss with all its weights: means, sample weights, loss weights, masks.

`roots.py` finds `R`. `frames.py` says what a row is: `R J`, the gradient of an example, a row of a Fisher matrix.
`by_layers.py` reads rows off the inputs and slopes of layers, `columns.py` computes them by products; `matrix.py` and
`rows.py` multiply and store.
"""
