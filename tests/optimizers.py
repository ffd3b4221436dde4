"""The registry of optimizers: a new method adds one line and gains every property of `test_properties.py`.

`OPTIMIZERS` maps a name to a factory whose arguments can be overridden: `OPTIMIZERS["neumann"](use_ema=True)`. The
settings suit the tiny models of the tests.
"""

from functools import partial

from keras_curvature import ConjugateGradient, CurveBall, HessianFree, Neumann, NeumannSeries, TwoLoopNeumann, curved

OPTIMIZERS = {
    "neumann": partial(Neumann, learning_rate=0.05, warmup_steps=2),
    "neumann_resets": partial(Neumann, learning_rate=0.05, warmup_steps=2, reset_every=4),
    "two_loop_neumann": partial(TwoLoopNeumann, learning_rate=0.1, solver=NeumannSeries(steps=4, rate=0.1)),
    "two_loop_convexified": partial(
        TwoLoopNeumann, learning_rate=0.1, solver=NeumannSeries(steps=4, rate=0.1), mu=0.9, alpha=1e-3, beta=1e-7
    ),
    "curveball": partial(CurveBall),
    "curveball_fixed": partial(CurveBall, damping=0.1, beta=0.1, rho=0.9),
    "hessian_free": partial(HessianFree, solver=ConjugateGradient(max_steps=8)),
    "hessian_free_hessian": partial(HessianFree, solver=ConjugateGradient(max_steps=8), curvature="hessian"),
    "hessian_free_chunk": partial(HessianFree, solver=ConjugateGradient(max_steps=8), curvature_batch=0.5),
}  # fmt: skip

# What the registry's settings lack to reach the minimum of a quadratic: longer steps, and no repulsion, which keeps
# the weights at a distance from it.
ON_A_QUADRATIC = {
    "neumann": {"learning_rate": 0.5, "beta": 0.0},
    "neumann_resets": {"learning_rate": 0.5, "beta": 0.0},
    "two_loop_neumann": {"learning_rate": 0.5, "solver": NeumannSeries(steps=8, rate=0.5)},
    "two_loop_convexified": {"learning_rate": 1.0, "solver": NeumannSeries(steps=8, rate=0.5), "beta": 0.0},
}

NEEDS_CURVATURE = [name for name, make in OPTIMIZERS.items() if not make.func.by_gradient]
GRADIENTS_SUFFICE = [name for name in OPTIMIZERS if name not in NEEDS_CURVATURE]
# Where gradients suffice a model need not be curved: "plain_neumann" is "neumann" on a plain `keras.Model`.
PLAIN = [f"plain_{name}" for name in GRADIENTS_SUFFICE]
# One of each class; what is dear to trace or compile runs for the others with `-m slow` only.
ONE_OF_EACH = ["neumann_resets", "two_loop_convexified", "curveball", "hessian_free"]


def prepare(name, model, **kwargs):
    """`(model, optimizer)` of a name in `OPTIMIZERS` or `PLAIN`: the model curved, or left as it is."""
    model = model if name in PLAIN else curved(model)
    return model, OPTIMIZERS[name.removeprefix("plain_")](**kwargs)
