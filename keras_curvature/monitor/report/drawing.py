"""The shared parts of all figures. Matplotlib is imported when a figure is made."""

import io
import itertools
import math

import numpy as np

MISSING = 'a figure needs matplotlib: pip install "keras_curvature[monitor]"'
# Red marks what to watch, grey is for reference, blue for the rest.
RED, BLUE, GREY = "#cc3311", "#4477aa", "#bbbbbb"
_LABELS = {
    "sharpest": "sharpest direction (unit length)",
    "gradient": "gradient (unit length)",
    "random": "random, filter-normalized",
}
_COLOURS = {"sharpest": RED, "gradient": "#888888", "random": BLUE}


def blank(panels, height=4.0):
    """An empty figure with panels side by side, `(Figure, [Axes])`, outside of pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
    figure = Figure(figsize=(4.8 * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_lines(ax, axis, loss, quadratic):
    """Draw losses, and dotted their quadratic models, into one panel."""
    others = itertools.cycle([BLUE, "#66ccee", "#228833", "#aa3377"])
    dotted = "its quadratic model" if len(quadratic) == 1 else "dotted: the quadratic models"
    for name, values in loss.items():
        colour = _COLOURS.get(name) or next(others)
        ax.plot(axis, values, color=colour, label=_LABELS.get(name, name))
        if name in quadratic:
            ax.plot(axis, quadratic[name], ":", color=colour, label=dotted)
            dotted = None  # said once
    low, high = _limits(list(loss.values()))
    if math.isfinite(low) and high > low:
        ax.set_ylim(low - 0.03 * (high - low), high + 0.3 * (high - low))  # room for the legend
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(frameon=False, fontsize="small", loc="upper right")


def _limits(lines):
    """The range of the loss axis, from the finite losses; a line above three times the lowest one is cut off."""
    finite = [values[np.isfinite(values)] for values in map(np.asarray, lines)]
    finite = [values for values in finite if values.size]
    low = min((values.min() for values in finite), default=math.inf)
    heights = [values.max() - low for values in finite]
    return low, low + min(max(heights, default=0), 3 * min(heights, default=0) or math.inf)


def png(drawn, dpi=110):
    """The bytes of `drawn.figure()`; `None` where there is no matplotlib."""
    try:
        figure = drawn.figure()
    except ImportError:
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()
