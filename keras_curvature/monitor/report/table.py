"""The report as text, from its numbers alone."""

import math
import textwrap

from keras_curvature.monitor.objective.kinds import KINDS
from keras_curvature.monitor.report.numbers import count, number, percent, with_error

# Of many layers, those with the largest shares are shown; the others are one line.
SHOWN_LAYERS = 20
BAR = 20  # characters for a share of 100 %
WIDTH = 110  # characters per line of the sentences below the tables
EDGE = 0.1  # a gauge within this distance of 1 is at the edge


def table(report):
    """The text of a report, a dict as `measure` gives it."""
    parts = [_header(report), "", *_columns(_numbers(report)), _top(report), "", *_layers(report)]
    parts += ["", _cost(report), *map(_wrapped, report["caveats"])]
    return "\n".join(line.rstrip() for line in parts)


def _wrapped(sentence):
    return textwrap.fill(f"- {sentence}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _header(report):
    mode = "eval mode"
    if report["training"]:
        mode = f"train mode, batches of {count(report['batch_size'])}"
    parts = [
        f"{count(report['weights'])} weights", f"{count(report['examples'])} examples", KINDS[report["kind"]].title,
        mode, report["dtype"], f"loss {number(report['loss'])}",
    ]  # fmt: skip
    return f"curvature of {report['model']}    " + " · ".join(parts)


def _numbers(report):
    """Rows of name, number and remark."""
    preconditioned = report["stability"]["sharpness"]  # in the optimizer's metric, which its limit refers to
    said = stability(report["stability"])
    yield "sharpness", _pair(report["sharpness"]), said if preconditioned is None else ""
    if preconditioned is not None:
        yield f"  in {report['stability']['optimizer']}'s metric", _pair(preconditioned), said
    if report["most_negative"] is not None:
        yield "most negative", _pair(report["most_negative"]), _negative(report["negative_share"])
    yield "trace", _estimate(report["trace"]), ""
    if report["effective_directions"] is not None:
        yield "effective directions", _estimate(report["effective_directions"]), "trace / sharpness"
    gradient = report["gradient"]
    cosine = f"cosine with the sharpest direction {gradient['cosine']:.2f}"
    yield "gradient norm", _estimate({"value": gradient["norm"], "stderr": gradient["stderr"]}), cosine
    if report["noise"] is not None:
        yield from _noise(report["noise"], gradient["norm"])


def _pair(pair):
    return with_error(pair["value"], pair["residual"])


def _estimate(estimate):
    if not _is_known(estimate["stderr"]):
        return number(estimate["value"], 3)
    return with_error(estimate["value"], estimate["stderr"])


def stability(stability):
    """A sentence on how near the optimizer's limit is."""
    if stability["limit"] is None:
        return "no limit is known, see below"
    gauge = stability["gauge"]
    words = "stable"
    if not stability["of_training"]:
        words = "but of the model in eval mode, see below"
    elif gauge > 1 + EDGE:
        words = "unstable, the step bounces along the sharpest direction"
    elif gauge > 1 - EDGE:
        words = "at the edge"
    limit = number(stability["limit"], 3)
    return f"{percent(gauge)} of the limit {limit} = {stability['formula']}: {words}"


def _negative(share):
    words = "saddle-like" if share["value"] > 0.1 else "nearly convex"
    bar = f"{100 * share['value']:.0f} ± {100 * share['stderr']:.0f} %"
    return f"{words}: {bar} of the |curvature| mass is negative"


def _noise(noise, norm):
    simple, curved = noise["simple"], noise["with_curvature"]
    if not norm:
        yield "noise scale", "", "none: the gradient is zero on these examples"
    elif not _is_known(simple["value"]):
        yield "noise scale", "", "beyond these examples: they are too few to see the gradient in its noise"
    else:
        remark = f"examples: larger batches shorten training ever less{_doubt(simple)}"
        yield "noise scale", _estimate(simple), remark
        if _is_known(curved["value"]):
            remark = f"examples: the same along steps of the best rate{_doubt(curved)}"
            yield "  with curvature", _estimate(curved), remark


def _is_known(value):
    """Whether it is a finite number; JSON has null for the others."""
    return value is not None and math.isfinite(value)


def _doubt(scale):
    return "" if _is_known(scale["stderr"]) else "; error unknown, too few examples"


def _columns(rows):
    """Names to the left, numbers in the middle, remarks to the right."""
    rows = list(rows)
    names, numbers = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"{name:<{names}}  {value:>{numbers}}   {remark}" for name, value, remark in rows]


def _top(report):
    values = [number(pair["value"], 2) for pair in report["top"]]
    first = report["outliers"]
    barred = first is not None and 0 < first < len(values)
    if barred:
        values.insert(first, "|")
    worst = max((pair["residual"] for pair in report["top"]), default=0.0)
    line = f"top: {' '.join(values)}   ± {worst:.0e} at most"
    return line + (f"   {first} = classes - 1 before the bar" if barred else "")


def _layers(report):
    head = ("layer", "weights", "share", "sharpness", "trace", "per weight", "")
    rows = [head, *(_layer_row(*row) for row in shown_layers(report["layers"]))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["   ".join(_placed(row, widths)) for row in rows]


def _placed(row, widths):
    yield f"{row[0]:<{widths[0]}}"
    for value, width in zip(row[1:-1], widths[1:-1]):
        yield f"{value:>{width}}"
    yield row[-1]


def _layer_row(name, layer):
    sharpness = "" if layer["sharpness"] is None else _pair(layer["sharpness"])
    bar = "#" * max(0, round(BAR * layer["share"]))
    trace = _estimate(layer["trace"])
    return name, count(layer["weights"]), percent(layer["share"]), sharpness, trace, f"{layer['per_weight']:.1e}", bar


def shown_layers(layers):
    """`[(name, layer)]` in the model's order; of many layers, those with the largest shares and one for the others."""
    if len(layers) <= SHOWN_LAYERS:
        return list(layers.items())
    ordered = sorted(layers, key=lambda name: -abs(layers[name]["share"]))
    largest = set(ordered[: SHOWN_LAYERS - 1])
    rest = [layer for name, layer in layers.items() if name not in largest]
    return [*((n, layer) for n, layer in layers.items() if n in largest), (f"{len(rest)} others", _together(rest))]


def _together(layers):
    """One row for several layers; their errors add up, since they may have the same sign."""
    weights = sum(layer["weights"] for layer in layers)
    trace = {key: sum(layer["trace"][key] for layer in layers) for key in ("value", "stderr")}
    share = sum(layer["share"] for layer in layers)
    return {
        "weights": weights, "share": share, "trace": trace, "sharpness": None,
        "per_weight": trace["value"] / weights,
    }  # fmt: skip


def _cost(report):
    cost = report["cost"]
    return (
        f"{cost['products']} products, {cost['seconds']:.1f} s; ± behind an eigenvalue: its residual; "
        "behind other numbers: one standard error"
    )
