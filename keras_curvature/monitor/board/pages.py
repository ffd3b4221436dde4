"""The pages of a board in TensorBoard: numbers with their limits, charts, advice, texts and pictures."""

import math
import os

from keras_curvature.monitor.board import layout
from keras_curvature.monitor.board.advice import Advice
from keras_curvature.monitor.board.events import Events

SPECTRUM = "1_stability/spectrum"


class Pages:
    """Writes the runs `folder` and, for limits, `folder/limit`.

    Attributes:
        tags: The tags of the numbers written so far, a set.
    """

    def __init__(self, folder):
        self._values = Events(folder, layout.describe)
        self._limits = Events(os.path.join(folder, "limit"), lambda tag: f"The limit of `{tag}`.")
        self.begin()

    def begin(self):
        """Start a training: no charts yet, no advice given."""
        self.tags, self._advice = set(), Advice()

    def numbers(self, values, limits, step):
        """Write `{tag: number}` and the limits, and the layout of the charts where there are new tags."""
        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        known = {tag: layout.LIMITS[tag] for tag in values if tag in layout.LIMITS}
        self._values.scalars(values, step)
        self._limits.scalars(known | limits, step)
        if not self.tags.issuperset(values):
            self.tags.update(values)
            self._values.layout(layout.layout(self.tags), step)

    def advise(self, values, step):
        """Write the advice that new numbers call for."""
        said = self._advice.of(values)
        if said:
            self.text("advice", "\n".join(f"* step {step}: {sentence}" for sentence in said), step)

    def text(self, tag, markdown, step):
        """Write a text in Markdown."""
        self._values.text(tag, markdown, step)

    def image(self, tag, png, step):
        """Write a picture, the bytes of a PNG file."""
        self._values.image(tag, png, step)

    def spectrum(self, bars, axis, step):
        """Write a histogram of eigenvalues on an `Axis`."""
        self._values.histogram(SPECTRUM, bars, step, axis.title(), axis.words())

    def flush(self):
        """Make what was written visible to readers."""
        self._values.flush()
        self._limits.flush()

    def close(self):
        """Close the files."""
        self._values.close()
        self._limits.close()
