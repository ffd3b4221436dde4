"""The formulas of `formulas.py` for methods that solve with the curvature of each batch, or search along a line.

What their loops do depends on the data. Assumed are `ITERATIONS` of conjugate gradients; line searches that accept the
first length they look at; batches that change from step to step, so that no gradient is used again.
"""

import math

from costs import LOSS, PRODUCT, WITH_LOSS, Method, Work

import keras_curvature as kc

ITERATIONS = 30  # of conjugate gradients in a step, an assumption; the rule stops between 10 and 250 of them


def product(hessian):
    """A product with the Hessian, or with the Gauss-Newton matrix."""
    return PRODUCT if hessian else Work(reductions=1, vectors=1, backward=2)


def hessian_free(optimizer, step):
    """Loss and gradient; squares by example, from passes of their own; of a chunk the loss before and after. Loops: an
    iteration, and the first residual as one more; the loss of the last iterate and of one before it; the line search.
    """
    chunk = 2 * (optimizer.curvature_batch is not None)
    begin = Work(reductions=3 + chunk, vectors=2, scalars=1 + chunk, forward=2, backward=2)
    hessian = optimizer.curvature == "hessian"
    kept = sum(i <= ITERATIONS for i in optimizer.solver._stored_steps()) + 1  # and the last one
    return Method(
        {"step": begin, "while": product(hessian), "while_1": LOSS, "while_2": LOSS}, state=1, vectors=8,
        recordings=5 if hessian else 3, turns={"while": ITERATIONS + 1, "while_1": 2, "while_2": 0}, iterates=kept,
        traffic=20 + 14 * ITERATIONS,
    )  # fmt: skip


def newton_cg(optimizer, step):
    """The loop: an iteration. The loss after the step."""
    hessian = optimizer.curvature == "hessian"
    return Method(
        {"step": tested(1), "while": product(hessian)}, 0, 6, recordings=5 if hessian else 3,
        turns={"while": ITERATIONS}, traffic=8 + 14 * ITERATIONS,
    )  # fmt: skip


def tested(losses, **more):
    """Loss and gradient, and further losses."""
    return Work(**{
        "reductions": 2 + losses, "vectors": 1, "scalars": 1 + losses, "forward": 1 + losses, "backward": 1, **more,
    })  # fmt: skip


def nys_newton_cg(optimizer, step):
    """From time to time a product for each vector of the sketch. Loops: an iteration, and the first residual as one
    more; the line search. The loss at its first length.
    """
    hessian, one = optimizer.curvature == "hessian", product(optimizer.curvature == "hessian")

    def rank(model):
        return min(optimizer.rank, model.weights)

    return Method(
        {"step": tested(1), "cond/map": one, "while": one, "while_1": LOSS}, 1, optimizer.rank + 59,
        recordings=5 if hessian else 3, kept=lambda model: rank(model) * (model.weights + 1), matrices=True,
        turns={"cond/map": lambda model: rank(model) / optimizer.every, "while": ITERATIONS + 1, "while_1": 0},
        traffic=20 + (14 + 2 * optimizer.rank) * ITERATIONS,
    )  # fmt: skip


def saddle_free_newton(optimizer, step):
    """A product for each vector of the Krylov space, which is kept; a loss for each damping."""
    rank, dampings = optimizer.rank, len(optimizer.dampings)
    return Method(
        {"step": WITH_LOSS, "while": PRODUCT, "map": LOSS}, 0, 2 * rank + 6, recordings=5, matrices=True,
        turns={"while": rank, "map": dampings}, traffic=4 * rank**2 + rank * dampings,
    )  # fmt: skip


def newton(optimizer, step):
    """A product for each weight. The loss after the step."""
    return Method(
        {"step": tested(1), "map": PRODUCT}, 0, 3, recordings=5, turns={"map": lambda model: model.weights},
        matrices=True, traffic=6, dense=2,
    )  # fmt: skip


def gauss_newton(optimizer, step):
    """With rows, as `"auto"` solves a small model: residuals, inputs and slopes of all layers and replicas, and of a
    loss that is no square the gradient; with the geodesic acceleration another residual for each order. A scaling makes
    an array of the rows. With conjugate gradients a quadratic form for the predicted change, one for a damping that
    begins with the curvature, and the loop. This is a step of one attempt, as of `attempts=1`.
    """
    products, searches = isinstance(optimizer.solver, kc.ConjugateGradient), optimizer.line_search is not None
    losses = int(searches or optimizer._trial.looks)
    pair = 2 * hasattr(optimizer._rule, "numbers")
    sections = {"while_1" if products and searches else "while": LOSS} if searches else {}
    turns = dict.fromkeys(sections, getattr(optimizer.line_search, "count", 1) - 1)  # of a grid all but the first
    state, scaled = (optimizer.momentum > 0) + (optimizer.scaling == "more"), optimizer.scaling != "identity"
    if products:
        forms = optimizer._trial.looks + hasattr(optimizer._rule, "begun")
        begin = tested(losses, reductions=2 + losses + forms, scalars=1 + losses + forms, backward=1 + forms)
        return Method(
            {"step": begin, "while": product(False), **sections}, state, 6, recordings=3, kept=lambda model: pair,
            turns={"while": ITERATIONS, **turns}, traffic=10 + 14 * ITERATIONS,
        )  # fmt: skip

    def rows(model, replicas):
        count = replicas * model.rows
        gathered = [[count], *of_layers(model, replicas, model.outputs)] + (optimizer.order - 1) * [[count]]
        if not model.apart:
            gathered = [[count], [count * model.weights]] + (optimizer.order - 1) * [[count]]
        return gathered if model.squares else [*gathered, list(map(math.prod, model.shapes))]

    begin = Work(reductions=1 + losses, scalars=1 + losses, others=rows, forward=1 + losses)
    if pair and optimizer.scaling == "identity":
        sections, turns = {**sections, "cond": Work()}, {**turns, "cond": 1}
    return Method(
        {"step": begin, **sections}, state, 3 + scaled, turns=turns, kept=lambda model: pair, matrices=True, traffic=10,
        rows=2 * scaled,
    )  # fmt: skip


def of_layers(model, replicas, rows):
    """The inputs and the slopes of each layer at all positions, `rows` slopes for each example."""
    sizes, positions = [], model.positions or (1,) * len(model.blocks)
    for (*groups, d_in, d_out), count in zip(model.blocks, positions, strict=True):
        examples = replicas * model.examples * math.prod(groups) * count
        sizes += [[examples * d_in], [examples * rows * d_out]]
    return sizes


def seng(optimizer, step):
    """A backward pass for the slopes of all examples. Of each layer replicas gather the inputs and the slopes, or their
    sketch, or the rows where these are smaller; of all layers together they sum a vector.
    """

    def rows(model, replicas):
        calls, positions = [], model.positions or (1,) * len(model.blocks)
        for (*groups, d_in, d_out), count in zip(model.blocks, positions, strict=True):
            if optimizer.largest is not None and math.prod(groups) * d_in * d_out > optimizer.largest:
                count = min(count, optimizer.rank)
                d_in, d_out = min(d_in, optimizer.columns), min(d_out, optimizer.columns)
            of_inputs, of_slopes, of_row = (math.prod(groups) * n for n in (count * d_in, count * d_out, d_in * d_out))
            sizes = (of_row, 1) if of_row < of_inputs + of_slopes else (of_inputs, of_slopes)
            calls += [[replicas * model.examples * size] for size in sizes]
        return [*calls, list(map(math.prod, model.blocks))] if calls else []

    begin = Work(**{**step.__dict__, "slopes": step.slopes + 1, "others": rows})
    return Method({"step": begin}, 1, 3, matrices=True, traffic=9)


def natural_gradient(optimizer, step):
    """By layers, with one label drawn for each example or all of them; with an average an array of the rows. The loss
    after the step.
    """
    average, losses = optimizer.decay > 0, int(optimizer._trial.looks)

    def rows(model, replicas):
        labels = model.outputs if optimizer.fisher == "exact" else 1
        count = replicas * model.examples * labels
        if not model.apart:
            return [[count], [count * model.weights]]
        return [[count], *of_layers(model, replicas, labels)] + (not average) * [[count]]

    return Method(
        {"step": tested(losses, others=rows)}, 0, 4, matrices=True, traffic=10,
        kept=lambda model: average * model.weights**2,
    )  # fmt: skip


def lissa(optimizer, step):
    """Both loops, the power method and the series: a product on a part of the slice, from a forward pass of its own."""
    part = optimizer.curvature_batch if isinstance(optimizer.curvature_batch, float) else 1.0
    turn = Work(reductions=1, vectors=1, forward=1, slopes=1, hessians=1, share=part)
    sections, turns = {"while": turn}, {"while": optimizer.steps}
    if optimizer.rate is None:
        sections, turns = {"while": turn, "while_1": turn}, {"while": optimizer.power_steps, "while_1": optimizer.steps}
    return Method(
        {"step": WITH_LOSS, **sections}, 0, 3, turns=turns, traffic=5 + 8 * sum(turns.values())
    )  # fmt: skip


def quasi_newton(optimizer, step):
    """The loss, and the fingerprint of the batch; the gradient, if it is not that of the last end point; loss and
    gradient at the length of the search. `BFGS` remembers a matrix of float64, `LBFGS` pairs of vectors and their inner
    products.
    """
    limited = isinstance(optimizer, kc.LBFGS)
    memory = optimizer.memory if limited else 0
    gradient = Work(reductions=1, vectors=1, backward=1)
    along = Work(reductions=1, vectors=1, scalars=1, forward=1, backward=1)
    loss_and_batch = Work(reductions=2, scalars=2, forward=1)
    return Method(
        {"step": loss_and_batch, "cond": gradient, "while": along}, 2 + 2 * memory, 6,
        kept=lambda model: 2 * memory * (memory + 1) if limited else model.weights**2, matrices=True,
        traffic=20 + 4 * memory, dense=0 if limited else 2,
    )  # fmt: skip


FORMULAS = {
    kc.HessianFree: hessian_free,
    kc.NewtonCG: newton_cg,
    kc.NysNewtonCG: nys_newton_cg,
    kc.SaddleFreeNewton: saddle_free_newton,
    kc.Newton: newton,
    kc.GaussNewton: gauss_newton,
    kc.NaturalGradient: natural_gradient,
    kc.SENG: seng,
    kc.LiSSA: lissa,
    kc.LBFGS: quasi_newton,
    kc.BFGS: quasi_newton,
}
