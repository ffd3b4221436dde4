"""Who takes part, and what is searched for each: LightBench's ranges, for the arguments that the optimizer has."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from scipy.stats import qmc

import keras_curvature as kc

RATES = (1e-7, 100.0)
# one minus the decay of an average: the first and the second moment, and the matrices of a preconditioner
DECAYS = {"momentum": (1e-5, 1.0), "beta_1": (1e-5, 1.0), "beta_2": (1e-7, 1.0)}
TRIALS_OF_A_PROGRAM = 5  # of one set of decays: a rate is a variable, and new decays are a new graph


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An optimizer, and the names of its decays that are searched with the rate."""

    make: Callable[..., keras.Optimizer]
    decays: tuple[str, ...] = ()
    curved: bool = False

    def trials(self, count, seed):
        """`[(rate or None, decays)]`: the defaults first, where a rate of `None` is the optimizer's own."""
        points = qmc.Halton(1 + len(self.decays), seed=seed).random(count)
        found = []
        for i, (first, *_) in enumerate(points):
            others = points[i - i % TRIALS_OF_A_PROGRAM][1:]
            decays = {n: float(1.0 - _between(*DECAYS[n], at)) for n, at in zip(self.decays, others)}
            found.append((float(_between(*RATES, first)), decays))
        return [(None, {}), *found[1:]]


def _between(low, high, share):
    """Log-uniform."""
    return np.exp(np.log(low) + share * (np.log(high) - np.log(low)))


BETAS = ("beta_1", "beta_2")
CONTESTANTS = {
    "sgd": Contestant(lambda **k: keras.optimizers.SGD(**{"momentum": 0.9, **k}, nesterov=True), ("momentum",)),
    "adam": Contestant(keras.optimizers.Adam, BETAS),
    "adamw": Contestant(lambda **k: keras.optimizers.AdamW(weight_decay=0.0, **k), BETAS),
    "keras_muon": Contestant(keras.optimizers.Muon, ("momentum",)),
    "cautious_shampoo": Contestant(lambda **k: kc.Shampoo(cautious=True, **k), BETAS),
    "soap": Contestant(kc.SOAP, BETAS),
    "kl_soap": Contestant(lambda **k: kc.SOAP(factors="kl", **k), BETAS),
    "cautious_soap": Contestant(lambda **k: kc.SOAP(cautious=True, **k), BETAS),
    "kl_shampoo": Contestant(kc.KLShampoo, BETAS),
    "shampoo": Contestant(kc.Shampoo, BETAS),
    "splus": Contestant(kc.SPlus, BETAS),
    "muon": Contestant(kc.Muon, ("momentum",)),
    "scion": Contestant(kc.Scion, ("momentum",)),
    "psgd": Contestant(kc.PSGD, ("momentum",)),
    "psgd_newton": Contestant(lambda **k: kc.PSGD(kind="newton", **k), ("momentum",), True),
    "neumann": Contestant(kc.Neumann),
    "square_root_free_adam": Contestant(kc.SquareRootFreeAdam, BETAS),
    "adahessian": Contestant(kc.AdaHessian, BETAS, True),
    "sophia_h": Contestant(kc.SophiaH, BETAS, True),
    "esgd": Contestant(kc.ESGD, (), True),
    "lbfgs": Contestant(kc.LBFGS, (), True),
    "newton_cg": Contestant(kc.NewtonCG, (), True),
    "nys_newton_cg": Contestant(kc.NysNewtonCG, (), True),
    "saddle_free_newton": Contestant(kc.SaddleFreeNewton, (), True),
}
