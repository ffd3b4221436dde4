"""The registry of methods: one record gives a method every property of `test_properties.py` and the other files.

`OPTIMIZERS` maps a name to a factory whose arguments can be overridden: `OPTIMIZERS["neumann"](use_ema=True)`. All
other lists are read off the records and the classes. No optimizer is created here: its variables would set up
TensorFlow, in processes that choose their devices first.
"""

import dataclasses
from collections.abc import Callable

import keras
from own_optimizers import DampedGaussNewton, Lion

import keras_curvature as kc
from keras_curvature import ConjugateGradient, NeumannSeries, curved


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with settings that suit the tiny models of the tests.

    The first record of a class stands for the class where a test takes one of each.

    Args:
        make: The class, or a class method that makes an optimizer.
        settings: Arguments of `make`.
        on_a_quadratic: Arguments that replace them to reach the minimum of a quadratic.
        steps: How many steps the method may take to that minimum.
        family: Whether the method stands for its family in tests that are dear.
        by_gradient: Whether gradients suffice. Defaults to what the class says.
        amplifies: Whether its solver amplifies rounding from step to step, as conjugate gradients do.
    """

    make: Callable
    settings: dict = dataclasses.field(default_factory=dict)
    on_a_quadratic: dict = dataclasses.field(default_factory=dict)
    steps: int = 120
    family: bool = False
    by_gradient: bool | None = None
    amplifies: bool = False

    def __post_init__(self):
        if self.by_gradient is None:
            object.__setattr__(self, "by_gradient", self.cls.needs.only_gradients)

    @property
    def cls(self):
        """The class of the optimizer."""
        return self.make if isinstance(self.make, type) else self.make.__self__

    @property
    def layerwise(self):
        """Whether the method looks at layers, so that bare variables do not do."""
        return self.cls.needs.layers

    def __call__(self, **kwargs):
        """The optimizer, with some settings overridden."""
        return self.make(**{**self.settings, **kwargs})


# Where the length of a step does not depend on the gradient, only a falling learning rate ends at a minimum.
FALLING = {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.3, 50, 0.6)}
FALLING_FAST = {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.3, 10, 0.8)}
LONG = {"learning_rate": 0.5}
# Repulsion would keep the weights at a distance from the minimum.
NO_REPULSION = {**LONG, "beta": 0.0}
SERIES, TWO_LOOP = NeumannSeries(steps=4, rate=0.1), NeumannSeries(steps=8, rate=0.5)
CG = {"solver": ConjugateGradient(max_steps=8)}
# The 4x6 kernel's factor of 6x6 has rank 4, and a basis that rounding chooses: no matrix for an axis of 6.
BY_AXIS = {"learning_rate": 0.01, "every": 2, "epsilon": 1e-3, "max_dimension": 5}
LOCAL = {
    "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.7), "gamma": 1.0, "steps": 5,
    "momentum": 0.0,
}  # fmt: skip
LAZY = {"factors_every": 1, "inverses_every": 2}

OPTIMIZERS = {
    "neumann_resets": Method(
        kc.Neumann, {"learning_rate": 0.05, "warmup_steps": 2, "reset_every": 4}, NO_REPULSION, family=True
    ),
    "neumann": Method(kc.Neumann, {"learning_rate": 0.05, "warmup_steps": 2}, NO_REPULSION),
    "two_loop_convexified": Method(
        kc.TwoLoopNeumann, {"learning_rate": 0.1, "solver": SERIES, "mu": 0.9, "alpha": 1e-3, "beta": 1e-7},
        {"learning_rate": 1.0, "solver": TWO_LOOP, "beta": 0.0},
    ),
    "two_loop_neumann": Method(
        kc.TwoLoopNeumann, {"learning_rate": 0.1, "solver": SERIES}, {**LONG, "solver": TWO_LOOP}
    ),
    "curveball": Method(kc.CurveBall, family=True),
    "curveball_fixed": Method(kc.CurveBall, {"damping": 0.1, "beta": 0.1, "rho": 0.9}),
    "hessian_free": Method(kc.HessianFree, CG, family=True, amplifies=True),
    "hessian_free_hessian": Method(kc.HessianFree, {**CG, "curvature": "hessian"}, amplifies=True),
    "hessian_free_chunk": Method(kc.HessianFree, {**CG, "curvature_batch": 0.5}, amplifies=True),
    "gauss_newton": Method(kc.GaussNewton, {"damping": kc.LevenbergMarquardt.martens(initial=10.0)}, steps=40),
    "gauss_newton_cg": Method(kc.GaussNewton, {**CG, "damping": kc.LevenbergMarquardt.martens()}, amplifies=True),
    "levenberg_marquardt": Method(
        kc.GaussNewton.levenberg_marquardt, {"damping": kc.Nielsen(tau=30.0), "geodesic": 4}, steps=40
    ),
    "spring": Method(kc.GaussNewton.spring, {"learning_rate": 0.1, "momentum": 0.5, "damping": 1.0},
        {"learning_rate": 1.0, "momentum": 0.5, "damping": 0.1}),
    "energy_natural_gradient": Method(
        kc.GaussNewton.energy_natural_gradient, {"damping": 0.1, "line_search": kc.GridSearch(count=4)}, steps=20
    ),
    "natural_gradient": Method(kc.NaturalGradient, {"fisher": "exact"}),
    "natural_gradient_average": Method(kc.NaturalGradient, {"damping": 1.0, "decay": 0.5, "fisher": "empirical"}),
    "shampoo": Method(kc.Shampoo, {"learning_rate": 0.01, "every": 2, "epsilon": 1e-3}, {"learning_rate": 0.3}),
    "shampoo_newton": Method(
        kc.Shampoo,
        {"learning_rate": 0.05, "every": 2, "epsilon": 1e-3, "beta_2": 0.9, "grafting": "sgd",
         "root": kc.CoupledNewton()},
        {"learning_rate": 0.3},
    ),
    "shampoo_sketched": Method(
        kc.Shampoo, {"learning_rate": 0.01, "every": 2, "epsilon": 1e-3, "root": kc.SketchedRoot(2)},
        {"learning_rate": 0.3},
    ),
    "soap": Method(kc.SOAP, BY_AXIS, FALLING, steps=600, family=True),
    "soap_kl_sign": Method(kc.SOAP, {**BY_AXIS, "factors": "kl", "sign": True}, FALLING, steps=600),
    "kl_shampoo": Method(kc.KLShampoo, BY_AXIS, FALLING, steps=600),
    "splus": Method(
        kc.SPlus, {"every": 2, "max_dimension": 5}, {**FALLING, "vector_scale": 1.0}, steps=600, amplifies=True
    ),
    "scion": Method(kc.Scion, {"learning_rate": 2**-9, "radius_of_ends": 50.0}, {**FALLING, "radius": 1.0}, steps=600),
    "soap_refresh": Method(kc.SOAP, {**BY_AXIS, "every": kc.Refresh(0.1)}, FALLING, steps=600),
    "shampoo_refresh": Method(
        kc.Shampoo, {"learning_rate": 0.01, "every": kc.Refresh(0.1), "epsilon": 1e-3}, {"learning_rate": 0.3}
    ),
    "muon": Method(kc.Muon, {"learning_rate": 0.01}, FALLING, steps=600),
    "muon_normalized": Method(
        kc.Muon, {"learning_rate": 0.01, "normalization": kc.SecondMoment(), "adam_for": []}, FALLING, steps=600
    ),
    "dion": Method(
        kc.Muon.dion, {"learning_rate": 0.01, "part": kc.LowRankPart(2), "adam_for": []}, FALLING, steps=600
    ),
    "mfac": Method(kc.MFAC, {"learning_rate": 0.01, "window": 4, "damping": 1e-2}, {
        "learning_rate": 0.3, "window": 4, "damping": 1.0, "kl_clip": None,
    }, steps=300),
    "ggt": Method(kc.GGT, {"learning_rate": 0.01, "window": 4}, FALLING, steps=600),
    "psgd_newton": Method(
        kc.PSGD, {"learning_rate": 0.05, "kind": "newton", "geometry": kc.LowRankGeometry(rank=2), "every": 2}, LONG,
        family=True, by_gradient=False,
    ),
    "psgd": Method(kc.PSGD, {"learning_rate": 0.01}, FALLING, steps=600),
    "adahessian": Method(kc.AdaHessian.paper, {}, LONG, family=True),
    "adahessian_lazy": Method(kc.AdaHessian, {"every": 2, "hessian_power": 0.5}, {**LONG, "step_max": 1.0}),
    "sophia_h": Method(kc.SophiaH, {"learning_rate": 0.01, "every": 2}, FALLING, steps=600),
    "sophia_g": Method(kc.SophiaG, {"learning_rate": 0.01, "every": 2}, FALLING, steps=600),
    "esgd": Method(kc.ESGD, {"every": 2}, {**LONG, "step_max": None}),
    "sassha": Method(kc.SASSHA, {"learning_rate": 0.05, "every": 2}, {**LONG, "rho": 0.0, "step_max": None}, steps=300),
    "diagonal_newton": Method(kc.DiagonalNewton, {}, {**LONG, "step_max": None}),
    "square_root_free_adam_sampled": Method(
        kc.SquareRootFreeAdam, {"fisher": "sampled"}, {"learning_rate": 0.1}, steps=600, by_gradient=False
    ),
    "square_root_free_adam": Method(kc.SquareRootFreeAdam, {}, FALLING_FAST),
    "kfac": Method(kc.KFAC, LAZY, family=True),
    "kfac_adaptive": Method(kc.KFAC.adaptive, {"damping": kc.LevenbergMarquardt(every=2), "inverses_every": 2}),
    "ekfac": Method(kc.EKFAC, LAZY),
    "foof": Method(kc.FOOF, {"factors_every": 1, "inverses_every": 2}, {
        **LONG, "damping": 0.1, "output_clip": None,
    }),
    "skfac": Method(kc.SKFAC, {}, {"learning_rate": 0.1}),
    "seng": Method(kc.SENG, {"damping": 0.1}, {"learning_rate": 0.1, "damping": 0.1}, steps=300),
    "seng_sketched": Method(
        kc.SENG, {"damping": 1.0, "rank": 2, "columns": 3, "largest": 0},
        {"learning_rate": 0.1, "damping": 0.1, "columns": 5},
        steps=300,
    ),
    "tnt": Method(kc.TNT, {"learning_rate": 1e-3, "damping": 0.1, **LAZY},
        {"learning_rate": 0.05, "damping": 0.5, "kl_clip": None}, steps=300),
    "singd": Method(kc.SINGD, {"learning_rate": 0.05, "damping": 0.1, "every": 2}, {
        **LONG, "damping": 0.3, "kl_clip": None,
    }),
    "if_shampoo": Method(kc.IFShampoo, {"learning_rate": 0.01, "damping": 0.1, "every": 2},
        {"learning_rate": 0.3, "damping": 1.0, "kl_clip": None}, steps=300),
    "kbfgs": Method(kc.KBFGS, {"damping": 0.1, "warmup_steps": 2}, {"damping": 0.01, "momentum": 0.0}),
    "locoprop": Method(kc.LocoProp, {"steps": 3, "loss": "squared"}, LOCAL),
    "locoprop_matching": Method(kc.LocoProp, {"steps": 3}, LOCAL),
    "mkor": Method(kc.MKOR, {"every": 2}, {"learning_rate": 0.1, "kl_clip": None}),
    "newton_muon": Method(kc.NewtonMuon, {"learning_rate": 0.01, "every": 2}, FALLING, steps=600),
    "eva": Method(kc.Eva, {}, {"damping": 0.3, "kl_clip": None}),
    "lbfgs": Method(kc.LBFGS, family=True, amplifies=True),
    "lbfgs_wolfe": Method(kc.LBFGS, {"memory": 3, "search": kc.StrongWolfe(), "update": "damped"}, amplifies=True),
    "lbfgs_fixed": Method(kc.LBFGS, {"learning_rate": 0.1, "search": None}, {"learning_rate": 1.0}),
    "bfgs": Method(kc.BFGS, amplifies=True),
    "bfgs_self_scaled": Method(kc.BFGS, {"scaling": "self_scaled", "search": kc.ArmijoLineSearch()}, amplifies=True),
    "bfgs_broyden": Method(kc.BFGS, {"scaling": "broyden"}, amplifies=True),
    "newton_cg": Method(kc.NewtonCG, {"max_steps": 8}, {"max_steps": 100}, amplifies=True),
    "newton_cg_gauss_newton": Method(kc.NewtonCG, {"max_steps": 8, "curvature": "gauss_newton"}, amplifies=True),
    "newton": Method(kc.Newton, {"damping": 1.0}, {"damping": 0.01}, amplifies=True),
    "newton_trust_region": Method(kc.Newton, {"trust_region": kc.TrustRegion()}, amplifies=True),
    "saddle_free_newton": Method(kc.SaddleFreeNewton, {"rank": 6}, amplifies=True),
    "nys_newton_cg": Method(
        kc.NysNewtonCG, {"rank": 4, "every": 2, "solver": ConjugateGradient(8, 0.0)}, amplifies=True
    ),
    "lissa": Method(kc.LiSSA, {"learning_rate": 0.3, "steps": 4, "damping": 1.0, "power_steps": 4}, {
        "learning_rate": 1.0, "steps": 20, "curvature_batch": 1.0, "damping": 0.0, "power_steps": 10,
    }),
    # the methods of the guide
    "lion": Method(Lion, {"learning_rate": 0.01}, FALLING, steps=600),
    "damped_gauss_newton": Method(DampedGaussNewton, {"learning_rate": 0.5}),
}  # fmt: skip

LAYERWISE = [name for name, method in OPTIMIZERS.items() if method.layerwise]
GRADIENTS_SUFFICE = [name for name, method in OPTIMIZERS.items() if method.by_gradient]
NEEDS_CURVATURE = [name for name, method in OPTIMIZERS.items() if not method.by_gradient]
AMPLIFY = [name for name, method in OPTIMIZERS.items() if method.amplifies]
_CLASSES = [method.cls for method in OPTIMIZERS.values()]
ONE_OF_EACH = [name for i, name in enumerate(OPTIMIZERS) if _CLASSES[i] not in _CLASSES[:i]]
# By default a cheap property is tested with every method, a dear one with `FAMILIES`, and one that takes seconds for
# each method with `FEW`, which differ in what a step does: CurveBall multiplies by the curvature and adapts its damping
# (products, a trial step, state of several kinds), K-FAC looks at layers and keeps inverses of factors between its
# refreshes, and SOAP needs gradients alone, so that it also trains a plain model. All others run with `-m slow`.
FAMILIES = [name for name, method in OPTIMIZERS.items() if method.family]
FEW = ["curveball", "kfac", "soap"]
# Where gradients suffice a model need not be curved: "plain_neumann" is "neumann" on a plain `keras.Model`.
PLAIN = [f"plain_{name}" for name in GRADIENTS_SUFFICE]
PLAIN_FAMILIES = [name for name in PLAIN if name.removeprefix("plain_") in FAMILIES]
FEW_PLAIN_OR_CURVED = ["curveball", "kfac", "plain_soap"]


def prepare(name, model, **kwargs):
    """`(model, optimizer)` of a name in `OPTIMIZERS` or `PLAIN`: the model curved, or left as it is."""
    model = model if name in PLAIN else curved(model)
    return model, OPTIMIZERS[name.removeprefix("plain_")](**kwargs)
