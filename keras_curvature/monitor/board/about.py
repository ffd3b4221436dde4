"""The page of text about a board: what it measures, what that costs, and what each number means."""

from keras_curvature import trees
from keras_curvature.monitor.board import layout
from keras_curvature.monitor.objective.kinds import KINDS


def words(panels, data, budget, measurements, dropped, tags):
    """The page in Markdown.

    Args:
        panels: The `Panels`, after a measurement.
        data: Which data are measured on, in words.
        budget: The `Budget`.
        measurements: Number of measurements.
        dropped: Names of the pieces that failed, a list.
        tags: The tags of the numbers written, a list.
    """
    parts = [_what(panels, data, dropped), _time(budget, measurements), _limit(panels.stability), _numbers(tags)]
    return "\n\n".join(parts)


def _what(panels, data, dropped):
    measured = panels.measured.objective
    matrix = KINDS[measured.kind].title + ("" if measured.kind == "hessian" else " matrix")
    failed = f" Left out because it failed: {', '.join(dropped)}." if dropped else ""
    return (
        f"**Measured**: the {matrix} of the loss of `{measured.model.name}`, which has "
        f"{trees.count(panels.weights)} weights, in training mode, on {measured.examples} examples in "
        f"{measured.batches} batch{'es' if measured.batches > 1 else ''}: {data}. Batches of training have "
        f"{panels.batch_size} examples.{failed}"
    )


def _time(budget, measurements):
    spent = budget.spent["measurements"] + budget.spent["density"]
    allowed = budget.shares["measurements"] + budget.shares["density"]
    report = f", reports {budget.once['report']:.1f} s" if "report" in budget.once else ""
    once = sum(seconds for kind, seconds in budget.once.items() if kind != "report")
    return (
        f"**Time**: work that is done once, mostly tracing, took {once:.1f} s{report}. Of the other "
        f"{budget.elapsed:.1f} s, {measurements} measurements and the spectra took {spent:.2f} s, "
        f"{_share(spent, budget)}; the budget is {allowed:.1%}. Live numbers took {budget.spent['live']:.2f} s."
    )


def _share(seconds, budget):
    return f"{seconds / budget.elapsed:.1%}" if budget.elapsed > 0 else "none yet"


def _limit(stability):
    if stability.limit is None:
        return f"**Limit of the optimizer**: none. {stability.reason}"
    matrix = "Hessian" if stability.preconditioner is None else "preconditioned Hessian"
    note = f" {stability.note}" if stability.note else ""
    return (
        f"**Limit of the optimizer**: the largest eigenvalue of the {matrix} must stay below "
        f"{stability.formula} = {stability.sharpness_limit:.4g}; above it steps grow along its direction.{note}"
    )


def _numbers(tags):
    return "\n".join(["| number | what it is |", "|---|---|", *(f"| `{t}` | {layout.describe(t)} |" for t in tags)])
