"""From a recipe to its optimizer and learning rate."""

import math

import keras
from lars import LARS
from schedule import RampThenFall, RampThenStairs

import keras_curvature as kc

# name: the learning rate per 256 images at the top of the ramp. The first two are those of Goyal et al. (2017), LARS'
# is that of TensorFlow's TPU models, 25 at a batch of 16384, LAMB's that of You et al. (2020), 0.04 at 32768 by the
# square root; none was tuned here. CurveBall and Hessian-free find their own step.
OPTIMIZERS = {
    "neumann": 0.1, "sgd": 0.1, "lars": 0.39, "rmsprop": 0.01, "adam": 0.001, "lamb": 0.00354, "curveball": None,
    "hessian_free": None,
}  # fmt: skip
DECOUPLED = ("adam", "lamb", "lars")  # their weight decay is the optimizer's; that of the others is part of the loss
BY_ROOT = ("adam", "lamb")  # their rate is by the square root of the batch
NOT_DECAYED = ["bias", "gamma", "beta"]


def schedule_of(recipe, steps_per_epoch):
    """A ramp over the warm-up to a rate by the batch size, then the recipe's decay; a constant for the others."""
    base = recipe.base_learning_rate or OPTIMIZERS[recipe.optimizer]
    if recipe.learning_rate is None and base is None:
        return None
    batches = recipe.batch_size / 256
    peak = recipe.learning_rate or base * (math.sqrt(batches) if recipe.optimizer in BY_ROOT else batches)
    start = min(base, peak) if base else peak  # the ramp begins at the rate of a small batch
    ramp, stairs = (round(epochs * steps_per_epoch) for epochs in (recipe.warmup_epochs, recipe.stair_epochs))
    if recipe.decay == "stairs":
        return RampThenStairs(start, peak, ramp, recipe.stair_factor, max(stairs, 1))
    power = 2.0 if recipe.decay == "polynomial" else None
    return RampThenFall(start, peak, ramp, recipe.epochs * steps_per_epoch, power)


def optimizer_of(recipe, steps_per_epoch):
    """The optimizer with the paper's settings."""
    rate, name = schedule_of(recipe, steps_per_epoch), recipe.optimizer
    if name == "neumann":
        own = {key: getattr(recipe, key) for key in ("alpha", "beta", "gamma", "mu_end")}
        own = {key: value for key, value in own.items() if value is not None}
        return kc.Neumann.from_epochs(
            steps_per_epoch, recipe.warmup_epochs, recipe.reset_epochs or None, learning_rate=rate, **own
        )
    if name in ("curveball", "hessian_free"):
        make = kc.CurveBall if name == "curveball" else kc.HessianFree
        return make() if rate is None else make(rate)
    if name == "sgd":
        return keras.optimizers.SGD(rate, momentum=0.9)
    if name == "lars":
        return LARS(rate, decay=recipe.weight_decay, excluded=NOT_DECAYED)
    if name == "rmsprop":
        return keras.optimizers.RMSprop(rate, rho=0.9, momentum=0.9, epsilon=1.0)
    decay = recipe.weight_decay or None
    if name == "adam":
        optimizer = keras.optimizers.Adam(rate, weight_decay=decay)
    else:
        optimizer = keras.optimizers.Lamb(rate, epsilon=1e-6, weight_decay=decay)
    optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    return optimizer
