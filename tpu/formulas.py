"""What a step of each optimizer reduces, multiplies and remembers: `formula(optimizer)`."""

import dataclasses
import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import formulas_layers
import formulas_newton
import keras
from costs import GRADIENT, LOSS, WITH_LOSS, Method, Work
from matrices import (
    STACKED,
    factors,
    inverses,
    lengths,
    means,
    of_inputs,
    of_kernel,
    pairs,
    signs,
    squares,
    stacked,
)

import keras_curvature as kc


def first_order(state, traffic, vectors=1):
    """A function of a step's beginning: a `Method` that needs the gradient alone."""
    return lambda optimizer, step: Method({"step": step}, state, vectors, traffic=traffic)


def _and(step, **more):
    """The `step`, and more work in the same section."""
    names = {name: getattr(step, name) + more[name] for name in more if name != "others"}
    return Work(**{**step.__dict__, **more, **names})


def curveball(optimizer, step):
    """J z, then G z + g in one backward pass, then J dz; the loss, three inner products at once. The check: a loss."""
    begin = Work(reductions=3, vectors=1, scalars=4, joined=2, forward=1, backward=3)
    looks = optimizer._trial.looks
    return Method(
        {"step": begin, **({"cond": LOSS} if looks else {})}, state=1, vectors=2, recordings=3,
        turns={"cond": 1 / optimizer.damping.every} if looks else {}, traffic=9,
    )  # fmt: skip


def two_loop_neumann(optimizer, step):
    """The loop: a gradient at a shifted point, and with it the loss there, which nobody reads."""
    turn = Work(reductions=1, vectors=1, scalars=1, forward=1, backward=1)
    steps = optimizer.solver.steps
    return Method({"step": step, "while": turn}, 0, 4, turns={"while": steps}, traffic=3 + 6 * steps)


def by_weight(state, held, recordings, traffic, **work):
    """A method with a diagonal that it estimates from time to time, and counts the estimates of each variable."""

    def of(optimizer, step):
        sections, turns = {"step": _and(step, **work)}, {}
        if optimizer.every > 1:
            sections, turns = {"step": step, "cond": Work(**work)}, {"cond": 1 / optimizer.every}
        return Method(sections, state, held, recordings, turns, kept=lambda model: model.tensors, traffic=traffic)

    return of


def square_root_free_adam(optimizer, step):
    """With sampled labels another gradient."""
    sampled = optimizer.fisher == "sampled"
    more = {"reductions": 1, "vectors": 1, "backward": 1} if sampled else {}
    return Method({"step": _and(step, **more)}, 2, 4, kept=lambda model: model.tensors, traffic=7)


def diagonal_newton(optimizer, step):
    """The diagonal of the Hessian, from a product."""
    work = {"reductions": 1, "vectors": 1, "hessians": 1}
    return Method({"step": _and(step, **work)}, 0, 3, recordings=5, traffic=6)


def kfac(optimizer, step):
    """Factors from labels that the model draws; their inverses. The check: a loss, and `momentum=None` two products."""
    adapts, looks = optimizer.momentum is None, optimizer._trial.looks
    begin = Work(reductions=3, vectors=1, scalars=4, joined=2, forward=1, backward=3) if adapts else step
    estimate = Work(others=factors, slopes=1)
    sections = {"step": begin, "cond": estimate, "cond_1": Work(others=inverses)}
    turns = {"cond": 1 / optimizer.factors_every, "cond_1": 1 / optimizer.inverses_every}
    if looks:
        sections["cond_2"], turns["cond_2"] = LOSS, 1 / optimizer.damping.every
    return Method(
        sections, 1, 7, 3 if adapts else 2, turns,
        kept=lambda model: 2 * sum(map(sum, pairs(model))) + 2 * len(model.blocks) + sum(model.outside)
        + len(model.outside), matrices=True, traffic=9,
    )  # fmt: skip


def ekfac(optimizer, step):
    """Factors and, by the same pass, second moments in their bases; the bases, of large factors in other steps."""

    def estimates(model, replicas):
        return factors(model, replicas) + squares(model, replicas)

    sections = {"step": step, "cond": Work(others=estimates, slopes=1), "cond/cond": Work(others=inverses)}
    often, seldom = 1 / optimizer.factors_every, 1 / optimizer.inverses_every

    def kept(model):
        moments = sum(map(math.prod, model.blocks)) + 3 * len(model.blocks)
        return 2 * sum(map(sum, pairs(model))) + moments + sum(model.outside) + len(model.outside)

    return Method(
        sections, 1, 8, 3, {"cond": often, "cond/cond": seldom}, kept=kept, matrices=True, traffic=9,
    )  # fmt: skip


def skfac(optimizer, step):
    """Each step the rows of the factors, gathered; factors of normalization layers alone, which have two rows."""
    begin = kfac(optimizer, step).sections["step"]

    def of(model, replicas):
        small = [tuple(math.prod(b[:-2]) * n * n for n in b[-2:]) for b in model.blocks if is_small(b)]
        sums = [*sum(small, ()), *model.outside]
        wide = [b for b in model.blocks if not is_small(b)]
        rows = [[replicas * model.examples * math.prod(b[:-2]) * n] for b in wide for n in b[-2:]]
        return ([sums] if sums else []) + rows

    def is_small(block):
        return len(block) == 3 and block[1] <= 2 and block[2] == 1

    return Method(
        {"step": _and(begin, others=of, slopes=1)}, 1, 3, matrices=True, traffic=9,
        kept=lambda model: sum(model.outside) + len(model.outside),
    )  # fmt: skip


def singd(optimizer, step):
    """K-FAC's factors now and then, and with them a change of four matrices for each layer."""

    def estimates(model, replicas):
        moved = stacked([(a, g, a, g) for a, g in pairs(model)], replicas, STACKED * 2 / 3)
        return factors(model, replicas) + ([moved] if moved else [])

    return Method(
        {"step": step, "cond": Work(others=estimates, slopes=1)}, 1, 7, turns={"cond": 1 / optimizer.every},
        kept=lambda model: 2 * sum(map(sum, pairs(model))) + 2 * sum(model.outside) + len(model.blocks)
        + len(model.outside), matrices=True, traffic=9,
    )  # fmt: skip


def tnt(optimizer, step):
    """A momentum; the gradient for drawn labels now and then; a covariance for each axis, and their inverses."""

    def of(model):
        return [n for tile in lengths(model, optimizer.merge, longest=optimizer.max_dimension) for n in tile]

    def inverted(model, replicas):
        sizes = stacked([(n * n,) for n in of(model)], replicas)
        return [sizes] if sizes else []

    sections = {"step": step, "cond": Work(reductions=1, vectors=1, backward=1), "cond_1": Work(others=inverted)}
    return Method(
        sections, 1, 10, turns={"cond": 1 / optimizer.factors_every, "cond_1": 1 / optimizer.inverses_every},
        kept=lambda model: 2 * sum(n * n for n in of(model)) + len(of(model)), matrices=True, traffic=10,
    )  # fmt: skip


def eva(optimizer, step):
    """The means of a layer's inputs and slopes, in the call of the gradient."""
    begin = Work(reductions=1, vectors=1, scalars=1, others=means, forward=1, backward=1)
    return Method({"step": begin}, 1, 2, 2, kept=lambda model: sum(map(sum, means(model, 1))), traffic=9)


def shampoo(optimizer, step):
    """Roots of the factors: a call for each exponent, which is by the number of a tile's axes."""
    merge = min(optimizer.block_size, optimizer.max_dimension or optimizer.block_size)

    def of(model):
        return lengths(model, merge, optimizer.block_size, optimizer.max_dimension)

    def roots(model, replicas):
        tiles = of(model)
        return [
            stacked([(n * n,) * each for tile in tiles if len(tile) == axes for n in tile], replicas)
            for axes in sorted({len(tile) for tile in tiles} - {0})
        ]

    each = 1 if isinstance(optimizer.every, int) else 2  # `Refresh` also keeps the factor that a root is of
    moments = (optimizer.beta_1 > 0) + (optimizer.grafting in ("adam", "rmsprop"))
    return Method(
        {"step": step, "cond": Work(others=roots)}, moments, 11, turns={"cond": 1 / optimizer.period},
        kept=lambda model: (1 + each) * sum(n * n for tile in of(model) for n in tile), matrices=True, traffic=12,
    )  # fmt: skip


def by_basis(optimizer, step, state, kept, vectors):
    """SOAP and KL-Shampoo: bases of the factors; from the second on by a product and a decomposition into Q R."""

    def of(model):
        merge = min(optimizer.merge, optimizer.block_size or optimizer.merge)
        return lengths(model, merge, optimizer.block_size, optimizer.max_dimension, vectors=False)

    def bases(model, replicas):  # both branches of the condition, of which a step takes one
        call = stacked([(n * n,) for tile in of(model) for n in tile], replicas)
        return [call, call] if call else []

    section = "cond" if optimizer.period == 1 else "cond/cond"
    return Method(
        {"step": step, section: Work(others=bases)}, state, vectors, turns={section: 0.5 / optimizer.period},
        kept=lambda model: kept(model, of(model)), matrices=True, traffic=14,
    )  # fmt: skip


def soap(optimizer, step):
    """Two moments; factors and bases, of KL factors also eigenvalues; signs of the matrices between the ends."""

    def kept(model, tiles):
        values = sum(map(sum, tiles)) if optimizer.factors == "kl" else 0
        return 2 * sum(n * n for tile in tiles for n in tile) + values

    return by_basis(optimizer, _and(step, others=signs) if optimizer.sign else step, 2, kept, 11)


def kl_shampoo(optimizer, step):
    """A moment; factors, bases and eigenvalues; for variables without a matrix a second moment."""

    def kept(model, tiles):
        plain = sum(math.prod(shape) for shape, tile in zip(model.shapes, tiles) if not tile)
        return 2 * sum(n * n for tile in tiles for n in tile) + sum(map(sum, tiles)) + plain

    return by_basis(optimizer, step, 1, kept, 10)


def of_window(state, held):
    """A method with a window of vectors, and the inner products of its rows."""
    return lambda optimizer, step: Method(
        {"step": step}, state, held, kept=lambda model: optimizer.window * (model.weights + optimizer.window),
        matrices=True, traffic=4 + 2 * optimizer.window,
    )  # fmt: skip


def psgd(optimizer, step):
    """The preconditioner is fitted on every replica alike; the Newton type to a product with the Hessian."""
    sections, turns = {"step": step}, {}
    if optimizer.kind == "newton":
        work = {"reductions": 1, "vectors": 1, "hessians": 1}
        sections = {"step": _and(step, **work)} if optimizer.every == 1 else {"step": step, "cond": Work(**work)}
        turns = {} if optimizer.every == 1 else {"cond": 1 / optimizer.every}

    def kept(model):
        return sum(math.prod(shape) for _, shape, _ in optimizer._geometry.specs(list(model.shapes)))

    newton = optimizer.kind == "newton"
    return Method(
        sections, int(optimizer.momentum > 0), 11 if newton else 7, 5 if newton else 1, turns, kept=kept, matrices=True,
        traffic=10,
    )  # fmt: skip


def muon(optimizer, step):
    """A momentum; the others' second moment, and signs of the matrices between the ends of the model, or of all."""
    everywhere = optimizer.adam_for is not None and not optimizer.adam_for  # other patterns have no formula

    def of(model):
        return model.hidden + model.ends if everywhere else model.hidden

    return Method(
        {"step": _and(step, others=lambda model, replicas: signs(model, replicas, everywhere))}, 1, 5,
        kept=lambda model: model.weights - sum(of(model)), matrices=True, traffic=9,
    )  # fmt: skip


def foof(optimizer, step):
    """A momentum; second moments of the inputs of each layer, and their inverses."""
    return _by_inputs({"step": step}, 5, optimizer.factors_every, optimizer.inverses_every, 9)


def newton_muon(optimizer, step):
    """Muon's state and signs; second moments of the inputs of the layers between the ends, and their inverses."""
    plain = muon(optimizer, step)
    method = _by_inputs(plain.sections, 7, optimizer.every, optimizer.every, 11, bias=False)
    return dataclasses.replace(method, kept=lambda model: plain.kept(model) + method.kept(model))


def _by_inputs(sections, vectors, factors_every, inverses_every, traffic, bias=True):
    """Moments of the inputs of all layers with the row of the bias, or of those between the ends without it."""

    def of(model):
        blocks = [b for b in model.blocks if bias or of_kernel(b) in model.hidden]
        return [of_inputs(block, bias) for block in blocks]

    def estimates(model, replicas):
        return [of(model)]

    def inverted(model, replicas):
        sizes = stacked([(size,) for size in of(model)], replicas, STACKED)
        return [sizes] if sizes else []

    return Method(
        sections | {"cond": Work(others=estimates), "cond_1": Work(others=inverted)}, 1, vectors, 1,
        {"cond": 1 / factors_every, "cond_1": 1 / inverses_every},
        kept=lambda model: 2 * sum(of(model)) + len(of(model)), matrices=True, traffic=traffic,
    )  # fmt: skip


def scion(optimizer, step):
    """A momentum; signs of the matrices between the ends of the model."""
    return Method({"step": _and(step, others=signs)}, 1, 5, matrices=True, traffic=8)


def splus(optimizer, step):
    """A momentum; factors and bases, each basis decomposed anew."""

    def of(model):
        return lengths(model, optimizer.merge, longest=optimizer.max_dimension, vectors=False)

    def bases(model, replicas):
        call = stacked([(n * n,) for tile in of(model) for n in tile], replicas)
        return [call] if call else []

    return Method(
        {"step": step, "cond": Work(others=bases)}, 1, 8, turns={"cond": 1 / optimizer.every},
        kept=lambda model: 2 * sum(n * n for tile in of(model) for n in tile), matrices=True, traffic=12,
    )  # fmt: skip


def sassha(optimizer, step):
    """A gradient uphill; now and then a product there; the estimates of each variable are counted."""
    more = {"reductions": 2, "vectors": 1, "scalars": 1, "forward": 1, "backward": 1} if optimizer.rho else {}
    return by_weight(2, 5, 5, 11, **_hessian)(optimizer, _and(step, **more))


_hessian = {"reductions": 1, "vectors": 1, "hessians": 1}
FORMULAS = {
    keras.optimizers.SGD: first_order(1, 5),
    keras.optimizers.Adam: first_order(2, 7),
    keras.optimizers.Lamb: first_order(2, 11),
    kc.Neumann: first_order(2, 11, vectors=2),  # besides the gradient the distance to the average v
    kc.CurveBall: curveball,
    kc.TwoLoopNeumann: two_loop_neumann,
    kc.AdaHessian: by_weight(2, 4, 5, 8, **_hessian),
    kc.SophiaG: by_weight(2, 4, 1, 8, reductions=1, vectors=1, backward=1),
    kc.SophiaH: by_weight(2, 4, 5, 8, **_hessian),
    kc.ESGD: by_weight(1, 3, 5, 8, **_hessian),
    kc.DiagonalNewton: diagonal_newton,
    kc.SquareRootFreeAdam: square_root_free_adam,
    kc.KFAC: kfac,
    kc.EKFAC: ekfac,
    kc.Eva: eva,
    kc.SKFAC: skfac,
    kc.SINGD: singd,
    kc.TNT: tnt,
    kc.Shampoo: shampoo,
    kc.FOOF: foof,
    kc.NewtonMuon: newton_muon,
    kc.SASSHA: sassha,
    kc.SOAP: soap,
    kc.KLShampoo: kl_shampoo,
    kc.PSGD: psgd,
    kc.MFAC: of_window(0, 2),
    kc.GGT: of_window(1, 3),
    kc.Muon: muon,
    kc.Scion: scion,
    kc.SPlus: splus,
    **formulas_layers.FORMULAS,
    **formulas_newton.FORMULAS,
}


def formula(optimizer, curved=True):
    """The `Method` of an optimizer.

    Args:
        optimizer: One of the classes in `FORMULAS`.
        curved: Whether the model is curved, so that its step also reduces the loss.

    Raises:
        KeyError: There is no formula for its class.
    """
    ours = isinstance(optimizer, kc.CurvatureOptimizer)
    return FORMULAS[type(optimizer)](optimizer, WITH_LOSS if curved and ours else GRADIENT)
