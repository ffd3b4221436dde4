"""The report as a figure of three panels, from its numbers alone. Matplotlib is imported when a figure is made."""

import math

import numpy as np

from keras_curvature.monitor.report.drawing import BLUE, GREY, RED, blank, draw_lines
from keras_curvature.monitor.report.table import shown_layers
from keras_curvature.monitor.spectra.density import Density


def figure(report):
    """Spectral density, shares of the layers, and the loss along two lines; a `matplotlib.figure.Figure`."""
    figure, axes = blank(3)
    _density(axes[0], report)
    _shares(axes[1], report)
    _lines(axes[2], report["landscape"])
    return figure


def _density(ax, report):
    """Eigenvalues per decade, on the axis of `Density`."""
    top = np.array([pair["value"] for pair in report["top"]])
    drawn = Density(*(np.array(report["density"][key], float) for key in ("nodes", "weights")), report["weights"])
    axis = drawn.axis(1000, margin=0.5)
    density, ends = drawn.smooth(axis), (axis[0], axis[-1])
    ax.set_xscale("function", functions=(drawn.scale, drawn.unscale))
    floor = 0.1 / report["weights"]  # a tenth of one eigenvalue
    ax.fill_between(axis, floor, np.maximum(density, floor), color=BLUE, alpha=0.8, linewidth=0)
    ax.set_yscale("log")
    ax.set_ylim(floor, 8 * density.max())
    ax.set_xlim(*ends)
    _mark_top(ax, top, report["outliers"], 1.5 * floor)
    ax.set_xticks(_ticks(drawn.linear, *ends))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="eigenvalue (symmetric log scale)", ylabel="share of the eigenvalues per decade")
    ax.set_title("Spectral density")


def _mark_top(ax, top, outliers, height):
    first = outliers or len(top)
    label = f"top {first} = classes - 1" if outliers else f"top {first}"
    ax.plot(top[:first], np.full(len(top[:first]), height), "v", color=RED, label=label)
    if len(top) > first:
        ax.plot(top[first:], np.full(len(top) - first, height), "v", color="#888888", label="the next")
    ax.legend(frameon=False, fontsize="small", loc="upper right")


def _ticks(linear, low, high):
    """Zero and powers of ten to both sides, as far as the axis goes; not those where it is linear."""
    first, last = math.ceil(math.log10(2 * linear)), math.floor(math.log10(max(high, -low)))
    powers = [10.0**i for i in range(first, last + 1)]
    return [x for x in [*(-p for p in reversed(powers)), 0.0, *powers] if low <= x <= high]


def _shares(ax, report):
    rows = shown_layers(report["layers"])
    places, n = np.arange(len(rows)), report["weights"]
    errors = [_share_of(layer["trace"]["stderr"], report) for _, layer in rows]
    shares = [layer["share"] for _, layer in rows]
    ax.barh(
        places - 0.2, shares, 0.36, xerr=errors, color=RED, error_kw={"ecolor": "#661100", "capsize": 2},
        label="share of the trace",
    )  # fmt: skip
    ax.barh(places + 0.2, [layer["weights"] / n for _, layer in rows], 0.36, color=GREY, label="share of the weights")
    ax.set_yticks(places, [name for name, _ in rows], fontsize="small" if len(rows) > 10 else None)
    ax.invert_yaxis()
    ax.margins(y=0.02)
    ax.set_ylim(len(rows) - 0.5, -0.5 - 0.15 * len(rows))  # room for the legend
    ax.axvline(0, color="black", linewidth=0.8)
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    ax.set_title("Where the curvature lives")


def _share_of(error, report):
    whole = sum(abs(layer["trace"]["value"]) for layer in report["layers"].values())
    return error / whole if whole else 0.0


def _lines(ax, landscape):
    axis = np.array(landscape["axis"])
    # what is not a finite number is null in JSON, and None
    loss = {name: np.array(values, float) for name, values in landscape["loss"].items()}
    quadratic = {"sharpest": np.array(landscape["quadratic"]["sharpest"], float)}
    draw_lines(ax, axis, loss, quadratic)
    ax.locator_params(axis="x", nbins=5)
    ax.set_title("Loss along two lines through the weights")
