"""Arithmetic that `monitor_cost.py` shares with the process that it starts. Imports neither TensorFlow nor torch."""

import time

import numpy as np


def timed(call, *args):
    """`(what it gives, seconds by the clock)`."""
    begin = time.perf_counter()
    found = call(*args)
    return found, time.perf_counter() - begin


def least(holds, most):
    """The least number from 1 to `most` for which `holds`, if it does for all larger ones; None where there is none."""
    low, high = 0, 1
    while not holds(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def off(values, reference):
    """The largest relative difference."""
    return float(np.max(np.abs(np.asarray(values, "float64") / np.asarray(reference, "float64") - 1)))


def root_mean_square(values):
    """Of numbers."""
    return float(np.sqrt(np.mean(np.square(values))))
