"""`curvature`: the curvature matrix of a model on some data."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_curvature.component import check_flag
from keras_curvature.monitor.matrix import Curvature as Curvature
from keras_curvature.monitor.objective.layers import check_layers
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.typing import Kind


def curvature(
    model: keras.Model, data: Any, kind: Kind = "hessian", layers: Sequence[str] | None = None,
    examples: int | None = None, batch_size: int | None = None, training: bool = False, seed: int = 0,
    progress: bool = False,
) -> Curvature:  # fmt: skip
    """The curvature of a model's loss on some data, as an operator.

        f(w + d)  ~  f(w) + g'd + 1/2 d'B d

    `f` is the compiled loss, a mean over the examples, with sample weights, regularizers and added losses. `B` is one
    of

        "hessian"           H = d2f/dw2
        "ggn"               J' H_L J,  the generalized Gauss-Newton matrix, with the L2 weight regularizers
        "fisher"            mean_n J_n' E_y[s_n s_n'] J_n,  with s_n the gradient of -log p(y | z_n) in the outputs z_n
                            and labels y drawn from the model
        "empirical_fisher"  mean_n J_n' s_n s_n' J_n,  the same with the true labels: the outer products of the
                            per-example gradients, where each example has one label

    at the weights that the model has when the operator is used. Nothing of the model changes: not its weights,
    optimizer, batch statistics, seeds or metrics. Decoupled weight decay is not part of the loss, nor of `B`.

    Args:
        model: A compiled `keras.Model`.
        data: `(x, y)`, `(x, y, sample_weight)` or `x`, each an array, a tensor, or a dict or list of them; or a
            `tf.data.Dataset` or `keras.utils.PyDataset` of batches of these. Data are read once and kept; a `Dataset`
            that reshuffles each epoch has one epoch behind it afterwards.
        kind: One of the above. Defaults to `"hessian"`.
        layers: Names of layers, or regular expressions that match whole names. `B` is then the block of their weights,
            and vectors are lists of these weights. Defaults to all layers.
        examples: Use the first so many examples, an integer. Shuffle sorted data first. Defaults to all.
        batch_size: Number of examples at a time, an integer. In training mode batch normalization takes its statistics
            over so many. Defaults to the batches of a data set; for arrays to all examples at once, or above 1024
            examples or 16 MB of inputs, to at most 512.
        training: `True` runs layers in training mode, which tells whether a step is stable; `False` in inference mode,
            which tells how flat the trained function is. Defaults to `False`.
        seed: An integer, for dropout masks in training mode and for the random vectors of the estimates. Defaults to
            `0`.
        progress: Whether to show a progress bar while products are computed. Defaults to `False`.

    Returns:
        A `Curvature`.

    Raises:
        ValueError: An argument is invalid; see `monitor/objective/objective.py`. A layer name matches nothing: the
            message lists the layers.

    Example:

    ```python
    c = keras_curvature.curvature(model, (x, y), kind="ggn")
    c.top(10).values                        # the largest eigenvalues
    c.trace(by_layer=True)                  # {layer: Estimate(value, stderr, products)}
    c.block("dense_1").sharpness().values   # of one layer
    ```
    """
    check_flag(curvature, "progress", progress)
    if layers is not None:
        check_layers(curvature, layers)
    objective = Objective(model, data, kind, examples, batch_size, training, seed, asked_by=curvature)
    return Curvature(objective, layers, progress)
