"""Finds the likelihood of a loss: Keras' own losses have one, and other losses and models can name theirs."""

import keras

from keras_curvature import keras_internals
from keras_curvature.linearization.fisher.convexity import name_of
from keras_curvature.linearization.fisher.likelihoods import (
    Bernoulli,
    Categorical,
    Divergence,
    Gaussian,
    Laplace,
    Likelihood,
    Poisson,
    SparseCategorical,
)

_OF_LOSSES = {
    keras.losses.mean_squared_error: Gaussian,
    keras.losses.mean_absolute_error: Laplace,
    keras.losses.poisson: Poisson,
    keras.losses.binary_crossentropy: Bernoulli,
    keras.losses.categorical_crossentropy: Categorical,
    keras.losses.kl_divergence: Divergence,
    keras.losses.sparse_categorical_crossentropy: SparseCategorical,
}


def likelihood(loss, logits):
    """The `Likelihood` whose negative logarithm is a `keras.losses.Loss`.

    Args:
        loss: A loss as Keras has compiled it. A custom loss can name its likelihood in an attribute, such as
            `likelihood = Gaussian`. The loss must be the negative logarithm of that likelihood, up to the weight of
            each entry (or row) and a term without `z`. An object states the arguments too:
            `likelihood = Bernoulli({}, logits=True)`.
        logits: Whether the loss reads the logits that the model's output carries.

    Raises:
        ValueError: No likelihood of this loss is known.
    """
    error = objection(loss)
    if error is not None:
        raise error
    options, found = keras_internals.options_of(loss), _found(loss)
    if isinstance(found, Likelihood):
        return found
    return found(options, logits or options.get("from_logits", False))


def of_compute_loss(model):
    """The `Likelihood` of a model with its own `compute_loss`, from its attribute `likelihood`.

    Raises:
        ValueError: The model has no such attribute.
    """
    own = getattr(model, "likelihood", None)
    if own is None:
        raise no_likelihood(f"{type(model).__name__}.compute_loss")
    return own if isinstance(own, Likelihood) else own({}, False)


def is_of_compute_loss(model):
    """Whether a model computes its loss itself, from outputs and targets."""
    return type(model).compute_loss is not keras.Model.compute_loss


def objection(loss):
    """The reason why a loss has no `likelihood`, a `ValueError`; `None` if it has one."""
    options = keras_internals.options_of(loss)
    if _found(loss) is None:
        return no_likelihood(name_of(getattr(loss, "fn", loss)))
    if options.get("axis", -1) != -1:
        return ValueError(
            "Labels can be sampled only along the last axis of the outputs. Received: "
            f"loss={type(loss).__name__}(axis={options['axis']}). Move this axis to the end, and use axis=-1."
        )
    if options.get("label_smoothing", 0.0) == 1.0:
        return no_likelihood(f"{type(loss).__name__}(label_smoothing=1.0)")
    return None


def unknown(model):
    """The name of the first loss of a compiled and built model that has no `likelihood`; `None` if all have one."""
    if is_of_compute_loss(model):
        return "compute_loss" if getattr(model, "likelihood", None) is None else None
    losses = keras_internals.losses_of(model)
    return next((name_of(getattr(loss, "fn", loss)) for loss in losses if objection(loss)), None)


def no_likelihood(loss):
    """The error for a loss that is not `-log p(y | z)` of a known distribution."""
    return ValueError(
        f"Labels cannot be sampled for loss={loss}: it is not the negative log-likelihood of a known distribution. "
        "Those are: mean_squared_error, mean_absolute_error, poisson, kl_divergence and the binary, categorical "
        "and sparse categorical crossentropies. Choose one of them, or set the likelihood of your own loss, such as "
        "`my_loss.likelihood = keras_curvature.likelihoods.Gaussian`; a model with a `compute_loss` of its own and one "
        "output has it in its class, `likelihood = keras_curvature.likelihoods.Gaussian`, or for logits "
        "`keras_curvature.likelihoods.Bernoulli({}, logits=True)`. Or use the true labels, for which `KFAC`, `EKFAC`, "
        '`SINGD`, `NaturalGradient` and `SquareRootFreeAdam` have `fisher="empirical"`; or the Hessian, with `SophiaH` '
        "instead of `SophiaG`."
    )


def _found(loss):
    """The class of the likelihood of a loss, or `None`."""
    own = getattr(loss, "likelihood", None) or getattr(getattr(loss, "fn", None), "likelihood", None)
    return own or _OF_LOSSES.get(keras_internals.function_of(loss))
