"""Checks of an `Objective`, and the weights of its batches."""

import math
import warnings

from keras_curvature import keras_internals, trees
from keras_curvature.component import check, check_choice, check_count, check_flag
from keras_curvature.linearization.fisher import of_losses
from keras_curvature.linearization.pure import slices
from keras_curvature.linearization.pure.functional import check_model
from keras_curvature.monitor.objective.kinds import EXPECTED, KINDS
from keras_curvature.solvers.krylov import Eigenpairs
from keras_curvature.training.models import has_own_train_step

MOST_SEEDS = 2**32  # as NumPy's and Keras'
# Largest difference of two evaluations of one loss, relative and absolute: devices differ in the order of their sums.
TOLERANCES = {"float32": (5e-5, 1e-6), "float64": (1e-10, 1e-10)}


def check_arguments(owner, model, kind, examples, batch_size, training, seed):
    """Check the arguments of an `Objective` that can be checked without data."""
    check_model(owner, model)
    check_choice(owner, "kind", kind, KINDS, EXPECTED)
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        check_count(owner, name, value, or_none=True)
    check_flag(owner, "training", training)
    check_count(owner, "seed", seed, low=0)
    check(owner, "seed", seed, seed < MOST_SEEDS, f"less than {MOST_SEEDS}")


def check_train_step(owner, model):
    """Refuse a loss that only the model's own `train_step` knows, and warn where that step may train another one."""
    if not has_own_train_step(model):
        return
    name, loss = type(model).__name__, "`compute_loss(self, x, y, y_pred, sample_weight, training)`"
    if model.loss is None and not of_losses.is_of_compute_loss(model):
        raise ValueError(
            f"`{owner.__name__}`: `{name}` computes its loss in its own `train_step`, where it cannot be measured. "
            f"Compute it in {loss}."
        )
    warnings.warn(
        f"`{owner.__name__}`: `{name}` has its own `train_step`. What is measured is the model's `compute_loss`, which "
        f"is the loss that is trained only if that step trains it and nothing else. Compute the loss in {loss} instead "
        "of `train_step`.",
        stacklevel=4,
    )


def check_trainable(owner, model):
    """Refuse a model with nothing to differentiate with respect to."""
    if not trees.count(model.trainable_variables):
        raise ValueError(
            f"`{owner.__name__}`: the model {model.name!r} has no trainable weights, so its loss has no curvature. "
            "Set `trainable = True` on the layers to measure, and compile the model again."
        )


def check_kind(owner, kind, model, not_convex):
    """Refuse a matrix that the compiled loss does not have."""
    if kind == "ggn" and not_convex:
        raise ValueError(
            f"`{owner.__name__}`: `kind='ggn'` needs a loss that is convex in the outputs; `{', '.join(not_convex)}` "
            "is not known to be. Use kind='hessian'."
        )
    if kind == "fisher":
        name = of_losses.unknown(model)
        if name is not None:
            raise ValueError(
                f"`{owner.__name__}`: `kind='fisher'` needs a loss that is minus the logarithm of a known likelihood; "
                f"`{name}` is not. Use kind='ggn', kind='empirical_fisher' or kind='hessian'."
            )


def check_loss(owner, objective):
    """Refuse a loss that is not finite, or that changes when it is computed again."""
    loss, again = float(objective.loss()), float(objective.loss())
    name = objective.model.name
    if not math.isfinite(loss):
        raise ValueError(
            f"`{owner.__name__}`: the loss on these examples is {loss}, so it has no derivatives. Look for "
            f"values that are not finite in `data` and in the weights of the model {name!r}."
        )
    relative, absolute = TOLERANCES["float64" if objective.dtype == "float64" else "float32"]
    if abs(again - loss) > relative * abs(loss) + absolute:
        raise ValueError(
            f"`{owner.__name__}`: the loss of the model {name!r} differs between two evaluations, {loss} and "
            f"{again}, at the same weights and examples. A layer draws random numbers without its own "
            "`keras.random.SeedGenerator`. Give it one, `self.seed = keras.random.SeedGenerator()` and "
            "`keras.random.normal(shape, seed=self.seed)`, or measure with `training=False`."
        )


def check_gradient(owner, objective):
    """Refuse data with NaN or infinite values, unless the model replaces them."""
    # some kernels drop NaN (a matrix product and a ReLU in one) and leave the loss finite
    if not bool(trees.is_finite(objective.gradient())):
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold finite numbers, unless the model {objective.model.name!r} itself "
            "fills what is missing. Received: NaN or infinite ones; the loss is finite, but its gradient is not. "
            "Leave these examples out, or fill them."
        )


def shares(owner, model, counts):
    """The weight of each batch: its share of the examples."""
    if "sum" in reductions(model) and len(set(counts)) > 1:
        raise ValueError(
            f"`{owner.__name__}`: a loss with `reduction='sum'` grows with the batch, so `data` must be cut into equal "
            f"batches. Received: batches of {sorted(set(counts))} examples. Pass a `batch_size` that divides their "
            "number, or fewer `examples`."
        )
    return [count / sum(counts) for count in counts]


def warn_of_coupled(owner, objective, losses):
    """Warn of losses, by their names, whose mean over several batches may not be the loss of all examples.

    A function in which replicas cut the batches warns by itself; see `slices.py`.
    """
    for loss in dict.fromkeys(losses):
        slices.warn_once(
            f"`{owner.__name__}`: the loss {loss!r} does not return an independent value for each example, and "
            f"`data` are measured in {objective.batches} batches. The result is the mean of the batches' losses. It is "
            "the loss of all examples if the loss is a mean over examples, without sample weights. If the loss couples "
            "examples (contrastive losses, `Circle`, `Dice` or `Tversky` over the batch, the root of a mean), pass "
            f"batch_size={objective.examples} to measure all examples in one batch (`CurvatureBoard`: `data` of one "
            "batch), or use a loss that returns one value for each example.",
            stacklevel=5,
        )


def reductions(model):
    """The reductions of the compiled losses, a set of names."""
    return {loss.reduction for loss in keras_internals.losses_of(model)}


def check_pairs(owner, pairs, matrix, variables):
    """Refuse what is no `Eigenpairs` of a matrix.

    Args:
        owner: The function to name in messages.
        pairs: `Eigenpairs`, or `None`.
        matrix: The matrix in words, as `Eigenpairs.matrix`.
        variables: Those that vectors must be shaped like.
    """
    check(owner, "pairs", pairs, pairs is None or isinstance(pairs, Eigenpairs), "`Eigenpairs` of `top`, or None")
    if pairs is None:
        return
    if pairs.matrix not in ("", matrix):
        raise ValueError(
            f"`{owner.__name__}`: `pairs` must be `Eigenpairs` of this matrix, the {matrix}. Received: pairs of the "
            f"{pairs.matrix}"
        )
    for i, vector in enumerate(pairs.vectors):
        trees.check(f"pairs.vectors[{i}]", vector, variables)
