"""The optimizers that `scaling.py` and `compile.py` look at, by the names of their tables."""

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras

import keras_curvature as kc

# name: (optimizer with its defaults, whether the model is curved)
OPTIMIZERS = {
    "sgd": (lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True), False),
    "adam": (keras.optimizers.Adam, False),
    "lamb": (keras.optimizers.Lamb, False),
    "neumann": (kc.Neumann, False),
    "shampoo": (kc.Shampoo, False),
    "soap": (kc.SOAP, False),
    "kl_shampoo": (kc.KLShampoo, False),
    "psgd": (kc.PSGD, False),
    "mfac": (kc.MFAC, False),
    "ggt": (kc.GGT, False),
    "muon": (kc.Muon, False),
    "scion": (kc.Scion, False),
    "splus": (kc.SPlus, False),
    "square_root_free_adam": (kc.SquareRootFreeAdam, False),
    "neumann_curved": (kc.Neumann, True),
    "curveball": (kc.CurveBall, True),
    "two_loop_neumann": (kc.TwoLoopNeumann, True),
    "hessian_free": (kc.HessianFree, True),
    # with `attempts=1`: the work of a step whose first attempt is taken
    "newton_cg": (lambda: kc.NewtonCG(attempts=1), True),
    "nys_newton_cg": (kc.NysNewtonCG, True),
    "saddle_free_newton": (kc.SaddleFreeNewton, True),
    "newton": (lambda: kc.Newton(attempts=1), True),
    "gauss_newton": (lambda: kc.GaussNewton(attempts=1), True),
    "gauss_newton_cg": (lambda: kc.GaussNewton(solver=kc.ConjugateGradient(), attempts=1), True),
    "gauss_newton_array": (lambda: kc.GaussNewton.levenberg_marquardt(attempts=1), True),
    "natural_gradient": (kc.NaturalGradient, True),
    "lissa": (kc.LiSSA, True),
    "lbfgs": (kc.LBFGS, True),
    "bfgs": (kc.BFGS, True),
    "adahessian": (kc.AdaHessian, True),
    "sophia_g": (kc.SophiaG, True),
    "sophia_h": (kc.SophiaH, True),
    "esgd": (kc.ESGD, True),
    "diagonal_newton": (kc.DiagonalNewton, True),
    "sassha": (kc.SASSHA, True),
    "eva": (kc.Eva, True),
    "foof": (kc.FOOF, True),
    "newton_muon": (kc.NewtonMuon, True),
    "singd": (kc.SINGD, True),
    "if_shampoo": (kc.IFShampoo, True),
    "kbfgs": (kc.KBFGS, True),
    "mkor": (kc.MKOR, True),
    "locoprop": (kc.LocoProp, True),
    "tnt": (kc.TNT, True),
    "skfac": (kc.SKFAC, True),
    "seng": (kc.SENG, True),
    "kfac": (kc.KFAC, True),
    "kfac_adaptive": (kc.KFAC.adaptive, True),
    "ekfac": (kc.EKFAC, True),
    "psgd_newton": (lambda: kc.PSGD(kind="newton"), True),
    "square_root_free_adam_sampled": (lambda: kc.SquareRootFreeAdam(fisher="sampled"), True),
}
# a matrix with a row for each weight; rows of the Jacobian, which `GaussNewton` replaces by products if they do not fit
DENSE, ROWS = ("bfgs", "newton"), ("gauss_newton", "gauss_newton_array", "natural_gradient")
# models of `counting.py` that are too large for some
LEFT_OUT = {"wide": DENSE, "tall": (*DENSE, *ROWS), "resnet50": (*DENSE, *ROWS)}
# more than scalars in float64, which a TPU emulates: small matrices, of which the digits matter
IN_DOUBLE = (*DENSE, "lbfgs", "saddle_free_newton", "nys_newton_cg", "mfac", "ggt")


@functools.cache
def formulas():
    """`{name: Method}`; a function, because an optimizer has variables, which set up TensorFlow."""
    from formulas import formula

    return {name: formula(make(), curve) for name, (make, curve) in OPTIMIZERS.items()}
