"""The registry of optimizers: a new method adds one line and gains every property of `test_properties.py`.

`OPTIMIZERS` maps a name to a factory whose arguments can be overridden: `OPTIMIZERS["neumann"](use_ema=True)`. The
settings suit the tiny models of the tests.
"""

from functools import partial

import keras

import keras_curvature as kc
from keras_curvature import ConjugateGradient, NeumannSeries, curved

OPTIMIZERS = {
    "neumann": partial(kc.Neumann, learning_rate=0.05, warmup_steps=2),
    "neumann_resets": partial(kc.Neumann, learning_rate=0.05, warmup_steps=2, reset_every=4),
    "two_loop_neumann": partial(kc.TwoLoopNeumann, learning_rate=0.1, solver=NeumannSeries(steps=4, rate=0.1)),
    "two_loop_convexified": partial(
        kc.TwoLoopNeumann, learning_rate=0.1, solver=NeumannSeries(steps=4, rate=0.1), mu=0.9, alpha=1e-3, beta=1e-7
    ),
    "curveball": partial(kc.CurveBall),
    "curveball_fixed": partial(kc.CurveBall, damping=0.1, beta=0.1, rho=0.9),
    "hessian_free": partial(kc.HessianFree, solver=ConjugateGradient(max_steps=8)),
    "hessian_free_hessian": partial(kc.HessianFree, solver=ConjugateGradient(max_steps=8), curvature="hessian"),
    "hessian_free_chunk": partial(kc.HessianFree, solver=ConjugateGradient(max_steps=8), curvature_batch=0.5),
    "shampoo": partial(kc.Shampoo, learning_rate=0.01, every=2, epsilon=1e-3),
    "shampoo_newton": partial(
        kc.Shampoo, learning_rate=0.05, every=2, epsilon=1e-3, beta_2=0.9, grafting="sgd", root=kc.CoupledNewton()
    ),
    # the 4x6 kernel's factor of 6x6 has rank 4, and a basis that rounding chooses
    "soap": partial(kc.SOAP, learning_rate=0.01, every=2, epsilon=1e-3, max_dimension=5),
    "kl_shampoo": partial(kc.KLShampoo, learning_rate=0.01, every=2, epsilon=1e-3, max_dimension=5),
    "psgd": partial(kc.PSGD, learning_rate=0.01),
    "psgd_newton": partial(kc.PSGD, learning_rate=0.05, kind="newton", geometry=kc.LowRankGeometry(rank=2), every=2),
    "adahessian": partial(kc.AdaHessian),
    "adahessian_lazy": partial(kc.AdaHessian, every=2, hessian_power=0.5),
    "sophia_h": partial(kc.SophiaH, learning_rate=0.01, every=2),
    "sophia_g": partial(kc.SophiaG, learning_rate=0.01, every=2),
    "esgd": partial(kc.ESGD, every=2),
    "diagonal_newton": partial(kc.DiagonalNewton),
    "square_root_free_adam": partial(kc.SquareRootFreeAdam),
    "square_root_free_adam_sampled": partial(kc.SquareRootFreeAdam, fisher="sampled"),
    "kfac": partial(kc.KFAC, factors_every=1, inverses_every=2),
    "kfac_adaptive": partial(kc.KFAC.adaptive, damping=kc.LevenbergMarquardt(every=2), inverses_every=2),
    "ekfac": partial(kc.EKFAC, factors_every=1, inverses_every=2),
    "eva": partial(kc.Eva),
}  # fmt: skip

# Steps of the same length whatever the gradient, as these methods take them, end at a minimum as the rate falls.
FALLING = keras.optimizers.schedules.ExponentialDecay(0.3, 50, 0.6)
# What the registry's settings lack to reach the minimum of a quadratic: longer steps, and no repulsion, which keeps
# the weights at a distance from it.
ON_A_QUADRATIC = {
    "neumann": {"learning_rate": 0.5, "beta": 0.0},
    "neumann_resets": {"learning_rate": 0.5, "beta": 0.0},
    "two_loop_neumann": {"learning_rate": 0.5, "solver": NeumannSeries(steps=8, rate=0.5)},
    "two_loop_convexified": {"learning_rate": 1.0, "solver": NeumannSeries(steps=8, rate=0.5), "beta": 0.0},
    "shampoo": {"learning_rate": 0.3},
    "shampoo_newton": {"learning_rate": 0.3},
    "soap": {"learning_rate": FALLING},
    "kl_shampoo": {"learning_rate": FALLING},
    "psgd": {"learning_rate": FALLING},
    "psgd_newton": {"learning_rate": 0.5},
    "adahessian": {"learning_rate": 0.5},
    "adahessian_lazy": {"learning_rate": 0.5},
    "sophia_h": {"learning_rate": FALLING},
    "sophia_g": {"learning_rate": FALLING},
    "esgd": {"learning_rate": 0.5},
    "diagonal_newton": {"learning_rate": 0.5, "step_max": None},
    "square_root_free_adam": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.3, 10, 0.8)},
    "square_root_free_adam_sampled": {"learning_rate": 0.1},
    "eva": {"damping": 0.3, "kl_clip": None},
}
# These look at layers, of which a quadratic has none that they know: they have a linear regression.
LAYERWISE = ["kfac", "kfac_adaptive", "ekfac", "eva"]

# Not asked of an optimizer that is made: its variables would set up TensorFlow, in processes with plans of their own.
BY_GRADIENT = {"neumann", "neumann_resets", "shampoo", "shampoo_newton", "soap", "kl_shampoo", "psgd",
               "square_root_free_adam"}  # fmt: skip
NEEDS_CURVATURE = [name for name in OPTIMIZERS if name not in BY_GRADIENT]
GRADIENTS_SUFFICE = [name for name in OPTIMIZERS if name in BY_GRADIENT]
# Where gradients suffice a model need not be curved: "plain_neumann" is "neumann" on a plain `keras.Model`.
PLAIN = [f"plain_{name}" for name in GRADIENTS_SUFFICE]
# One of each class; and one of each family, for what is dear to trace or compile. The others run with `-m slow`.
ONE_OF_EACH = [
    "neumann_resets", "two_loop_convexified", "curveball", "hessian_free", "shampoo", "soap", "kl_shampoo",
    "psgd_newton", "adahessian", "sophia_h", "sophia_g", "esgd", "diagonal_newton", "square_root_free_adam_sampled",
    "kfac", "ekfac", "eva",
]  # fmt: skip
FAMILIES = ["neumann_resets", "curveball", "hessian_free", "soap", "psgd_newton", "adahessian", "kfac"]
PLAIN_FAMILIES = ["plain_neumann_resets", "plain_soap"]


def prepare(name, model, **kwargs):
    """`(model, optimizer)` of a name in `OPTIMIZERS` or `PLAIN`: the model curved, or left as it is."""
    model = model if name in PLAIN else curved(model)
    return model, OPTIMIZERS[name.removeprefix("plain_")](**kwargs)
